"""The steps around the matching layer: mask IoU for its cost (Eq. 1) and pasted, weighted proposals after it (Eq. 8).

``torch.ops.dmm.mask_iou`` and ``torch.ops.dmm.paste_combine`` (scriptable, exportable) are the ops below; the native
libraries hold their kernels, this file teaches torch the rest: shapes without data (fake kernels) and the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmm_fast.ops import library, reference

library.let_triton_serve("mask_iou")
library.let_triton_serve("paste_combine", "paste_combine_backward")

_paste_backward = torch.ops.dmm.paste_combine_backward.default


def mask_iou(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """Intersection over union of every pair of masks.

    Args:
        a: ``[N, H, W]`` or ``[B, N, H, W]``, bool, any strides (a view that is not contiguous is copied first).
        b: ``[M, H, W]`` or ``[B, M, H, W]``, bool.
        backend: as in ``dmm_fast.match``.

    Returns:
        ``[N, M]`` or ``[B, N, M]`` float32 in [0, 1], exact counts rounded once; 0 where the union is empty. No
        gradient.

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit. ValueError: an unknown backend.
    """
    library.check_backend("mask_iou", a, backend)
    if backend == "reference":
        return reference.mask_iou(a, b)
    if backend == "triton":
        from dmm_fast.kernels.mask_iou import mask_iou as mask_iou_triton

        return mask_iou_triton(a, b)
    return torch.ops.dmm.mask_iou(a, b)


def paste_combine(assignment: Tensor, masks: Tensor, boxes: Tensor, size: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """Eq. 8 from boxes and small masks: ``out_i = sum_j X_ij paste(mask_j, box_j)``, without M full-size masks.

    Pasting is detectron2's continuous paste (bilinear, pixel centres at + 0.5, 0 outside). Zero assignments are
    skipped, so after ``mask_confident`` the time follows the area of one box per template.

    Args:
        assignment: X, ``[N, M]`` (N templates, M proposals), float32, float64, float16 or bfloat16.
        masks: ``[M, S, S]``, logits or probabilities, the dtype of assignment. Any S.
        boxes: ``[M, 4]`` x0 y0 x1 y1 in pixels, float32 (float64 with a float64 assignment). A box may leave the image.
            One without a positive, finite width and height (x1 <= x0, NaN, infinite) pastes nothing.
        size: (H, W) of the result.
        backend: as in ``dmm_fast.match``.

    Returns:
        ``[N, H, W]``, the dtype of assignment; half precision is computed in float32.

    Differentiable once in assignment (all entries, also those that are 0) and masks, not in boxes; the backward repeats
    bit for bit.

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit. ValueError: an unknown backend.
    """
    library.check_backend("paste_combine", assignment, backend)
    if backend == "reference":
        return reference.paste_combine(assignment, masks, boxes, size)
    if backend == "triton":
        from dmm_fast.kernels.paste_combine import paste_combine as paste_combine_triton

        return paste_combine_triton(assignment, masks, boxes, size[0], size[1])
    return torch.ops.dmm.paste_combine(assignment, masks, boxes, size[0], size[1])


# ---- what torch needs to know ----


@torch.library.register_fake("dmm::mask_iou")
def _(a, b):
    torch._check(a.dim() in (3, 4) and b.dim() == a.dim(), lambda: f"dmm::mask_iou: got shapes {a.shape} and {b.shape}")
    return a.new_empty(*a.shape[:-2], b.shape[-3], dtype=torch.float32)


@torch.library.register_fake("dmm::paste_combine")
def _(assignment, masks, boxes, height, width):
    torch._check(
        assignment.dim() == 2, lambda: f"dmm::paste_combine: assignment must have shape [N, M], got {assignment.shape}"
    )
    return assignment.new_empty(assignment.shape[0], height, width)


@torch.library.register_fake("dmm::paste_combine_backward")
def _(grad, assignment, masks, boxes):
    return assignment.new_empty(assignment.shape), masks.new_empty(masks.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _gradient(ctx, grad):
    grad_assignment, grad_masks = _paste_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_assignment, grad_masks, None, None, None


torch.library.register_autograd("dmm::paste_combine", _gradient, setup_context=_setup_context)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "dmm::paste_combine_backward: paste_combine is differentiable once; a gradient of its gradient "
        "(create_graph=True) is not available. Use dmm_fast.paste_combine(..., backend='reference') for that."
    )


torch.library.register_autograd("dmm::paste_combine_backward", _no_double_backward)

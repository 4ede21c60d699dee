"""The steps around the matching layer: mask IoU for its cost (Eq. 1), pasted, weighted proposals after it (Eq. 8), and the
conversions at both ends: proposals to a grid of cells (``paste_masks``, ``decode_runs``), logits to labels
(``upsample_argmax``). ``bias_clamp`` ends the convolutions of a network.

``torch.ops.dmm.mask_iou`` and its kin (scriptable, exportable) are the ops below; the native libraries hold their kernels,
this file teaches torch the rest: shapes without data (fake kernels) and the gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmm_fast.kernels.gradient import bias_clamp_gradient, setup_bias_clamp
from dmm_fast.ops import library, reference
from dmm_fast.ops.layer import refuse_forward_mode, transformable, transforming

library.let_triton_serve("mask_iou")
library.let_triton_serve("paste_combine", "paste_combine_backward")
library.let_triton_serve("paste_masks")
library.let_triton_serve("decode_runs")
library.let_triton_serve("upsample_argmax")
library.let_triton_serve("bias_clamp")

NO_RUN = 2**31 - 1  # fills up the rows of ``runs``: beyond every frame

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

    Differentiable once in assignment (all entries, also those that are 0) and masks, not in boxes, in reverse mode; the backward
    repeats bit for bit.

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit; derivatives in forward mode (other than with
            backend="reference"). ValueError: an unknown backend.
    """
    library.check_backend("paste_combine", assignment, backend)
    if backend == "reference":
        return reference.paste_combine(assignment, masks, boxes, size)
    refuse_forward_mode("paste_combine", (assignment, masks, boxes))
    if backend == "triton":
        from dmm_fast.kernels.paste_combine import paste_combine as paste_combine_triton

        return paste_combine_triton(assignment, masks, boxes, size[0], size[1])
    call = _PasteCombine.apply if transforming() else torch.ops.dmm.paste_combine
    return call(assignment, masks, boxes, size[0], size[1])


def paste_masks(
    masks: Tensor, boxes: Tensor, rows: int, columns: int, samples: int = 2, *, backend: str = "auto"
) -> Tensor:  # fmt: skip
    """How much of each cell of a grid a pasted mask covers: the share of its points at which the mask is above 0.5.

    Pasting is that of ``paste_combine``. A cell has ``samples`` x ``samples`` points, evenly spaced: with two, and half as
    many rows and columns as a frame, the result is the frame's thresholded masks averaged over 2 x 2 pixels. Beyond filling
    the result with 0, the time follows the boxes' areas.

    Args:
        masks: ``[M, S, S]``, probabilities, float32, float64, float16 or bfloat16. Any S.
        boxes: ``[M, 4]`` x0 y0 x1 y1 in cells, float32 (float64 with float64 masks). A box may leave the grid. One without
            a positive, finite width and height (x1 <= x0, NaN, infinite) pastes nothing.
        rows, columns: the size of the grid.
        samples: points along each side of a cell, 1 to 64.
        backend: as in ``dmm_fast.match``.

    Returns:
        ``[M, rows, columns]`` in [0, 1], the dtype of masks; half precision is computed in float32. No gradient.

    Raises:
        RuntimeError: shapes, dtypes, devices or sizes that don't fit. ValueError: an unknown backend.
    """
    library.check_backend("paste_masks", masks, backend)
    if backend == "reference":
        return reference.paste_masks(masks, boxes, rows, columns, samples)
    if backend == "triton":
        from dmm_fast.kernels.paste_masks import paste_masks as paste_masks_triton

        return paste_masks_triton(masks, boxes, rows, columns, samples)
    return torch.ops.dmm.paste_masks(masks, boxes, rows, columns, samples)


def decode_runs(runs: Tensor, height: int, width: int, rows: int, columns: int, *, backend: str = "auto") -> Tensor:
    """How much of each cell of a grid the mask of a run-length code covers, exactly, without the full-size mask.

    Cell (r, c) has the pixels from ``r * height / rows`` to ``(r + 1) * height / rows`` down and from ``c * width / columns``
    to ``(c + 1) * width / columns`` across, parts of pixels by their share. So ``rows, columns = height, width`` decodes
    the mask itself, in exact 0 and 1. The grid may be finer than the frame.

    Args:
        runs: ``[M, R]`` int32. Per mask, the ascending positions ``x * height + y`` at which it changes (the cumulated counts
            of COCO's code): outside up to the first, inside from the first to the second, and so on; an odd number of them
            means inside to the end. What is left of the row is ``NO_RUN``; anything from ``height * width`` on stands for the
            end. For other values, negative or descending, the result is not specified.
        height, width: the frame's size in pixels, ``height * width`` below 2^31.
        rows, columns: the size of the grid.
        backend: as in ``dmm_fast.match``.

    Returns:
        ``[M, rows, columns]`` float32 in [0, 1]: whole numbers divided and rounded once. No gradient.

    Raises:
        RuntimeError: a shape, dtype or size that doesn't fit. ValueError: an unknown backend.
    """
    library.check_backend("decode_runs", runs, backend)
    if backend == "reference":
        return reference.decode_runs(runs, height, width, rows, columns)
    if backend == "triton":
        from dmm_fast.kernels.decode_runs import decode_runs as decode_runs_triton

        return decode_runs_triton(runs, height, width, rows, columns)
    return torch.ops.dmm.decode_runs(runs, height, width, rows, columns)


def upsample_argmax(logits: Tensor, rank: Tensor, height: int, width: int, *, backend: str = "auto") -> Tensor:
    """One label per pixel from small logits, enlarged bilinearly, without N full-size logits.

    The logits are interpolated as by ``F.interpolate(mode="bilinear", align_corners=False)``, also to smaller sizes (without
    antialiasing). Positions are exact fractions here and rounded there, sums are rounded in another order: pixels at which
    the two highest logits, or the highest and 0, nearly tie may differ. Logits that are equal everywhere tie exactly.

    Args:
        logits: ``[N, h, w]``, finite, at most 255 of them, at least one pixel; float32, float64, float16 or bfloat16.
        rank: ``[N]`` int64: of equal logits, that with the highest rank wins (of equal ranks, the first).
        height, width: the size of the result.
        backend: as in ``dmm_fast.match``.

    Returns:
        ``[height, width]`` uint8: 0 where no logit is above 0, else 1 + the index of the highest. Half precision is
        computed in float32. No gradient.

    Raises:
        RuntimeError: shapes, dtypes, devices or sizes that don't fit. ValueError: an unknown backend.
    """
    library.check_backend("upsample_argmax", logits, backend)
    if backend == "reference":
        return reference.upsample_argmax(logits, rank, height, width)
    if backend == "triton":
        from dmm_fast.kernels.upsample_argmax import upsample_argmax as upsample_argmax_triton

        return upsample_argmax_triton(logits, rank, height, width)
    return torch.ops.dmm.upsample_argmax(logits, rank, height, width)


def bias_clamp(
    x: Tensor, bias: Tensor, residual: Tensor | None = None, low: float = -math.inf, high: float = math.inf, *, backend: str = "auto"
) -> Tensor:  # fmt: skip
    """What follows a convolution, in one pass: ``clamp(x + bias[c] + residual, low, high)``.

    ReLU is ``low=0``, ReLU6 ``low=0, high=6``; NaN stays. Differentiable in x, bias and residual, in reverse mode.

    Args:
        x: ``[N, C, H, W]``, float32, float64, float16 or bfloat16, contiguous or channels-last (else it is copied first).
        bias: ``[C]``, the dtype of x.
        residual: the shape of x, or one of the two has a single image, which goes with all of the other; the dtype of x.
        low, high: low <= high.
        backend: as in ``dmm_fast.match``.

    Returns:
        ``[N, C, H, W]``, laid out as x; half precision is computed in float32 and rounded once.

    Raises:
        RuntimeError: shapes, dtypes, devices or limits that don't fit; derivatives in forward mode (other than with
            backend="reference"). ValueError: an unknown backend.
    """
    library.check_backend("bias_clamp", x, backend)
    if backend == "reference":
        return reference.bias_clamp(x, bias, residual, low, high)
    refuse_forward_mode("bias_clamp", (x, bias, residual))
    if backend == "triton":
        from dmm_fast.kernels.bias_clamp import bias_clamp as bias_clamp_triton

        return bias_clamp_triton(x, bias, residual, low, high)
    call = _BiasClamp.apply if transforming() else torch.ops.dmm.bias_clamp
    return call(x, bias, residual, low, high)


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


@torch.library.register_fake("dmm::paste_masks")
def _(masks, boxes, rows, columns, samples):
    torch._check(masks.dim() == 3, lambda: f"dmm::paste_masks: masks must have shape [M, S, S], got {masks.shape}")
    return masks.new_empty(masks.shape[0], rows, columns)


@torch.library.register_fake("dmm::decode_runs")
def _(runs, height, width, rows, columns):
    torch._check(runs.dim() == 2, lambda: f"dmm::decode_runs: runs must have shape [M, R], got {runs.shape}")
    return runs.new_empty(runs.shape[0], rows, columns, dtype=torch.float32)


@torch.library.register_fake("dmm::upsample_argmax")
def _(logits, rank, height, width):
    return logits.new_empty(height, width, dtype=torch.uint8)


@torch.library.register_fake("dmm::bias_clamp")
def _(x, bias, residual, low, high):
    torch._check(x.dim() == 4, lambda: f"dmm::bias_clamp: x must have shape [N, C, H, W], got {x.shape}")
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    like = residual if residual is not None and x.shape[0] == 1 else x
    return torch.empty_like(like, memory_format=torch.channels_last if last else torch.contiguous_format)


# Step functions: their results belong to no graph.
_fragment = torch.library.Library("dmm", "FRAGMENT")
for _op in ("paste_masks", "upsample_argmax"):
    _fragment.impl(_op, torch.library.fallthrough_kernel, "Autograd")


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _gradient(ctx, grad, backward=_paste_backward):
    refuse_forward_mode("paste_combine", (grad,))
    grad_assignment, grad_masks = backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_assignment, grad_masks, None, None, None


torch.library.register_autograd("dmm::paste_combine", _gradient, setup_context=_setup_context)
for _device in ("cpu", "cuda"):  # its weights are coordinates: float32 inside autocast
    torch.library.register_autocast("dmm::paste_combine", _device, torch.float32)


torch.library.register_autograd("dmm::bias_clamp", bias_clamp_gradient, setup_context=setup_bias_clamp)
_BiasClamp = transformable(torch.ops.dmm.bias_clamp.default, setup_bias_clamp, bias_clamp_gradient)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "dmm::paste_combine_backward: paste_combine is differentiable once; a gradient of its gradient "
        "(create_graph=True) is not available. Use dmm_fast.paste_combine(..., backend='reference') for that."
    )


torch.library.register_autograd("dmm::paste_combine_backward", _no_double_backward)
_PasteBackward = transformable(_paste_backward, lambda ctx, inputs, output: None, _no_double_backward)
_PasteCombine = transformable(
    torch.ops.dmm.paste_combine.default, _setup_context, lambda ctx, grad: _gradient(ctx, grad, _PasteBackward.apply)
)

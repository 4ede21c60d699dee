"""``paste_combine`` (Eq. 8) in Triton, forward and backward, cut up as in ``csrc/cuda/paste_combine.cu``.

Forward: a program takes a tile of one template's image and visits the proposals that the template uses and that reach
the tile. Backward: a program takes one row of cells of one mask. No atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dmm_fast.kernels.launch import accumulate_dtype, in_float32, launch
from torch import Tensor
from torch.library import triton_op

_TILE_H, _TILE_W = 16, 64
_BLOCK_X = 128


@triton.jit
def _extent_is_valid(low, high):
    extent = high - low
    return (extent > 0) & (extent < float("inf"))


@triton.jit
def _axis(low, high, S, size, COMPUTE: tl.constexpr):
    """(scale, first pixel, end pixel) of a box along one axis of an image: the pixels that may see the mask."""
    valid = _extent_is_valid(low, high)
    scale = S / tl.where(valid, high - low, 1)
    begin = tl.floor(tl.where(valid, low, 0) - 0.5 / scale - 0.5)
    end = tl.ceil(tl.where(valid, high, 0) + 0.5 / scale - 0.5) + 1
    limit = tl.where(valid, size, 0).to(COMPUTE)
    return (
        scale,
        tl.minimum(tl.maximum(begin, 0), limit).to(tl.int32),
        tl.minimum(tl.maximum(end, 0), limit).to(tl.int32),
    )


@triton.jit
def _position(pixel, low, scale):
    """u: where a pixel's centre falls among the mask's cells."""
    return (pixel + 0.5 - low) * scale - 0.5


@triton.jit
def _tap(u, S):
    """The two cells that position u is interpolated from, and their weights (0 outside the mask)."""
    inside = (u > -1) & (u < S)
    u = tl.where(inside, u, 0)
    cell = tl.floor(u)
    fraction = u - cell
    cell = cell.to(tl.int32)
    weight0 = tl.where(inside & (cell >= 0), 1 - fraction, 0)
    weight1 = tl.where(inside & (cell + 1 < S), fraction, 0)
    return tl.maximum(cell, 0), tl.minimum(cell + 1, S - 1), weight0, weight1


@triton.jit
def _tent(u, cell):
    weight = 1 - tl.abs(u - cell)
    return tl.where(weight > 0, weight, 0)


@triton.jit
def _forward_kernel(
    assignment, masks, boxes, out, M, S, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    i = tl.program_id(2).to(tl.int64)
    left, top = tl.program_id(0) * TILE_W, tl.program_id(1) * TILE_H
    x = left + tl.arange(0, TILE_W)
    y = top + tl.arange(0, TILE_H)
    image = tl.zeros([TILE_H, TILE_W], COMPUTE)
    mask = masks  # of proposal j
    for j in range(M):
        weight = tl.load(assignment + i * M + j).to(COMPUTE)
        if weight != 0:
            x0, y0 = tl.load(boxes + 4 * j), tl.load(boxes + 4 * j + 1)
            x_scale, x_begin, x_end = _axis(x0, tl.load(boxes + 4 * j + 2), S, W, COMPUTE)
            y_scale, y_begin, y_end = _axis(y0, tl.load(boxes + 4 * j + 3), S, H, COMPUTE)
            if (x_begin < left + TILE_W) & (x_end > left) & (y_begin < top + TILE_H) & (y_end > top):
                cx0, cx1, wx0, wx1 = _tap(_position(x, x0, x_scale)[None, :], S)
                cy0, cy1, wy0, wy1 = _tap(_position(y, y0, y_scale)[:, None], S)
                at00, at01 = tl.load(mask + cy0 * S + cx0), tl.load(mask + cy0 * S + cx1)
                at10, at11 = tl.load(mask + cy1 * S + cx0), tl.load(mask + cy1 * S + cx1)
                row0 = wx0 * at00.to(COMPUTE) + wx1 * at01.to(COMPUTE)
                row1 = wx0 * at10.to(COMPUTE) + wx1 * at11.to(COMPUTE)
                # Outside the box the weights are 0, and a cell may be infinite.
                seen = ((y >= y_begin) & (y < y_end))[:, None] & ((x >= x_begin) & (x < x_end))[None, :]
                image += tl.where(seen, weight * (wy0 * row0 + wy1 * row1), 0)
        mask += S * S
    inside = (y < H)[:, None] & (x < W)[None, :]
    tl.store(out + i * H * W + y[:, None] * W + x[None, :], image.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, assignment, masks, boxes, parts, grad_masks, N, M, S, H, W,
    BLOCK_X: tl.constexpr, CELLS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """parts [M, S, N]: what a row of cells adds to grad_assignment; grad_masks [M, S, S]. CELLS: S or the next 2^k."""
    j, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x0, y0 = tl.load(boxes + 4 * j), tl.load(boxes + 4 * j + 1)
    x_scale, x_begin, x_end = _axis(x0, tl.load(boxes + 4 * j + 2), S, W, COMPUTE)
    y_scale, y_begin, y_end = _axis(y0, tl.load(boxes + 4 * j + 3), S, H, COMPUTE)
    # The image rows that see this row of cells: |u(y) - s| < 1, or one more on either side.
    limit = y_end.to(COMPUTE)
    origin = tl.where(_extent_is_valid(y0, tl.load(boxes + 4 * j + 3)), y0, 0) - 0.5
    top = tl.minimum(tl.maximum(tl.floor(origin + (s - 0.5) / y_scale), y_begin.to(COMPUTE)), limit).to(tl.int32)
    bottom = tl.minimum(tl.maximum(tl.ceil(origin + (s + 1.5) / y_scale) + 1, 0), limit).to(tl.int32)
    mask_row = masks + (j * S + s) * S
    cell = tl.arange(0, CELLS)
    cells = tl.zeros([CELLS], COMPUTE)
    image = grad  # of template i
    for i in range(N):
        weight = tl.load(assignment + i * M + j).to(COMPUTE)
        part = tl.zeros([BLOCK_X], COMPUTE)
        for step in range(x_begin, x_end, BLOCK_X):
            x = step + tl.arange(0, BLOCK_X)
            gathered = tl.zeros([BLOCK_X], COMPUTE)
            for y in range(top, bottom):
                row = tl.load(image + y * W + x, mask=x < x_end, other=0).to(COMPUTE)
                gathered += _tent(_position(y, y0, y_scale), s) * row
            u = _position(x, x0, x_scale)
            cell0, cell1, weight0, weight1 = _tap(u, S)
            part += gathered * (
                weight0 * tl.load(mask_row + cell0).to(COMPUTE) + weight1 * tl.load(mask_row + cell1).to(COMPUTE)
            )
            if weight != 0:
                cells += tl.sum(_tent(u[None, :], cell[:, None]) * (weight * gathered)[None, :], 1)
        tl.store(parts + (j * S + s) * N + i, tl.sum(part, 0))
        image += H * W
    tl.store(grad_masks + (j * S + s) * S + cell, cells.to(grad_masks.dtype.element_ty), mask=cell < S)


def _check(op: str, assignment: Tensor, masks: Tensor, boxes: Tensor, height: int, width: int) -> None:
    """The checks of csrc/paste_combine.h."""
    if assignment.dim() != 2:
        raise RuntimeError(f"{op}: assignment must have shape [N, M], got {list(assignment.shape)}")
    M = assignment.shape[1]
    if masks.dim() != 3 or masks.shape[0] != M or masks.shape[1] != masks.shape[2]:
        raise RuntimeError(f"{op}: masks must have shape [M, S, S] with M = {M}, got {list(masks.shape)}")
    if boxes.dim() != 2 or boxes.shape[0] != M or boxes.shape[1] != 4:
        raise RuntimeError(f"{op}: boxes must have shape [M, 4] with M = {M}, got {list(boxes.shape)}")
    if assignment.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise RuntimeError(f"{op}: assignment must be float32, float64, float16 or bfloat16, got {assignment.dtype}")
    for name, tensor, dtype in (("masks", masks, assignment.dtype), ("boxes", boxes, accumulate_dtype(assignment))):
        if tensor.dtype != dtype:
            raise RuntimeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != assignment.device:
            raise RuntimeError(f"{op}: {name} must be on the device of assignment")
    if not (0 <= height < 2**24 and 0 <= width < 2**24):
        raise RuntimeError(f"{op}: height and width must be in [0, 2^24), got {height} and {width}")
    if height * width >= 2**31 or masks.shape[1] > 4096:
        raise RuntimeError(
            f"{op}: Triton takes H * W below 2^31 and S up to 4096, got {height} x {width} and masks {list(masks.shape)}"
        )


@triton_op("dmm::paste_combine_triton", mutates_args={})
def paste_combine(assignment: Tensor, masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """``dmm_fast.paste_combine`` (shapes, errors and result are those of ``torch.ops.dmm.paste_combine``)."""
    _check("dmm::paste_combine", assignment, masks, boxes, height, width)
    N, M = assignment.shape
    out = assignment.new_empty(N, height, width)
    if masks.numel() == 0:
        return out.zero_()
    if out.numel() > 0:
        grid = (triton.cdiv(width, _TILE_W), triton.cdiv(height, _TILE_H), N)
        launch(
            _forward_kernel, grid,
            assignment.contiguous(), masks.contiguous(), boxes.contiguous(), out, M, masks.shape[-1], height, width,
            TILE_H=_TILE_H, TILE_W=_TILE_W, COMPUTE=tl.float64 if assignment.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return out


@triton_op("dmm::paste_combine_backward_triton", mutates_args={})
def paste_combine_backward(grad: Tensor, assignment: Tensor, masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``paste_combine`` for grad ``[N, H, W]``: of assignment ``[N, M]`` and of masks ``[M, S, S]``."""
    N, height, width = grad.shape
    _check("dmm::paste_combine_backward", assignment, masks, boxes, height, width)
    M, S = assignment.shape[1], masks.shape[-1]
    parts = boxes.new_zeros(M, S, N)
    grad_masks = masks.new_empty(M, S, S)
    if M * S > 0:
        launch(
            _backward_kernel, (M, S),
            grad.contiguous(), assignment.contiguous(), masks.contiguous(), boxes.contiguous(), parts, grad_masks,
            N, M, S, height, width, BLOCK_X=_BLOCK_X, CELLS=triton.next_power_of_2(S),
            COMPUTE=tl.float64 if assignment.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return parts.sum(1).T.to(assignment.dtype).contiguous(), grad_masks


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _gradient(ctx, grad):
    grad_assignment, grad_masks = paste_combine_backward(grad.contiguous(), *ctx.saved_tensors)
    return grad_assignment, grad_masks, None, None, None


paste_combine.register_autograd(_gradient, setup_context=_setup_context)
in_float32(paste_combine)

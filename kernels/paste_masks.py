"""``paste_masks`` in Triton: a program takes a tile of one mask's grid; where the box does not reach, it writes 0."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dmm_fast.kernels.launch import accumulate_dtype, launch
from dmm_fast.kernels.paste_combine import _axis, _position, _tap
from torch import Tensor
from torch.library import triton_op

_TILE_R, _TILE_C = 16, 64


@triton.jit
def _cover_kernel(
    masks, boxes, cover, S, rows, columns, samples, TILE_R: tl.constexpr, TILE_C: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    j = tl.program_id(2).to(tl.int64)
    left, top = tl.program_id(0) * TILE_C, tl.program_id(1) * TILE_R
    c = left + tl.arange(0, TILE_C)
    r = top + tl.arange(0, TILE_R)
    x0, y0 = tl.load(boxes + 4 * j) * samples, tl.load(boxes + 4 * j + 1) * samples
    x_scale, x_begin, x_end = _axis(x0, tl.load(boxes + 4 * j + 2) * samples, S, columns * samples, COMPUTE)
    y_scale, y_begin, y_end = _axis(y0, tl.load(boxes + 4 * j + 3) * samples, S, rows * samples, COMPUTE)
    count = tl.zeros([TILE_R, TILE_C], tl.int32)
    reached_x = (x_begin < (left + TILE_C) * samples) & (x_end > left * samples)
    if reached_x & (y_begin < (top + TILE_R) * samples) & (y_end > top * samples):
        mask = masks + j * S * S
        for ky in range(samples):
            cy0, cy1, wy0, wy1 = _tap(_position(r * samples + ky, y0, y_scale)[:, None], S)
            for kx in range(samples):
                cx0, cx1, wx0, wx1 = _tap(_position(c * samples + kx, x0, x_scale)[None, :], S)
                at00, at01 = tl.load(mask + cy0 * S + cx0), tl.load(mask + cy0 * S + cx1)
                at10, at11 = tl.load(mask + cy1 * S + cx0), tl.load(mask + cy1 * S + cx1)
                row0 = wx0 * at00.to(COMPUTE) + wx1 * at01.to(COMPUTE)
                row1 = wx0 * at10.to(COMPUTE) + wx1 * at11.to(COMPUTE)
                count += (wy0 * row0 + wy1 * row1 > 0.5).to(tl.int32)
    share = count.to(tl.float64) / (samples * samples)  # float32 would be divided approximately
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    at = cover + (j * rows + r[:, None]) * columns + c[None, :]
    tl.store(at, share.to(COMPUTE).to(cover.dtype.element_ty), mask=inside)


@triton_op("dmm::paste_masks_triton", mutates_args={})
def paste_masks(masks: Tensor, boxes: Tensor, rows: int, columns: int, samples: int) -> Tensor:
    """``dmm_fast.paste_masks`` (shapes, errors and result are those of ``torch.ops.dmm.paste_masks``)."""
    op = "dmm::paste_masks"
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2]:
        raise RuntimeError(f"{op}: masks must have shape [M, S, S], got {list(masks.shape)}")
    M, S = masks.shape[:2]
    if boxes.shape != (M, 4):
        raise RuntimeError(f"{op}: boxes must have shape [M, 4] with M = {M}, got {list(boxes.shape)}")
    if masks.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise RuntimeError(f"{op}: masks must be float32, float64, float16 or bfloat16, got {masks.dtype}")
    if boxes.dtype != accumulate_dtype(masks):
        raise RuntimeError(f"{op}: boxes must be {accumulate_dtype(masks)}, got {boxes.dtype}")
    if boxes.device != masks.device:
        raise RuntimeError(f"{op}: boxes must be on the device of masks")
    if not 1 <= samples <= 64:
        raise RuntimeError(f"{op}: samples must be in [1, 64], got {samples}")
    limit = 2**24 // samples
    if not (0 <= rows < limit and 0 <= columns < limit):
        raise RuntimeError(f"{op}: rows and columns must be in [0, 2^24 / samples), got {rows} and {columns}")
    cover = masks.new_empty(M, rows, columns)
    if masks.numel() == 0:
        return cover.zero_()
    if cover.numel() > 0:
        grid = (triton.cdiv(columns, _TILE_C), triton.cdiv(rows, _TILE_R), M)
        launch(
            _cover_kernel, grid,
            masks.contiguous(), boxes.contiguous(), cover, S, rows, columns, samples, TILE_R=_TILE_R, TILE_C=_TILE_C,
            COMPUTE=tl.float64 if masks.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return cover


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def _gradient(ctx, grad):
    return None, None, None, None, None


paste_masks.register_autograd(_gradient, setup_context=_setup_context)

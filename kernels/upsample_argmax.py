"""``upsample_argmax`` in Triton: a program takes a tile of pixels and looks at all logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dmm_fast.kernels.launch import launch
from torch import Tensor
from torch.library import triton_op

_TILE_H, _TILE_W = 8, 128


@triton.jit
def _between(pixel, samples, pixels, COMPUTE: tl.constexpr):
    """The two samples that a pixel lies between, and the weight of the second, as in ``csrc/cell_geometry.h``."""
    place = tl.maximum((2 * pixel.to(tl.int64) + 1) * samples - pixels, 0)
    first = tl.minimum(place // (2 * pixels), samples - 1)
    second = tl.minimum(first + 1, samples - 1)
    weight = (place - first * 2 * pixels).to(COMPUTE) / (2 * pixels)
    return first, second, tl.where(second > first, weight, 0)


@triton.jit
def _label_kernel(
    logits, rank, labels, N, h, w, H, W, TILE_H: tl.constexpr, TILE_W: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    x = (tl.program_id(0) * TILE_W + tl.arange(0, TILE_W))[None, :]
    y = (tl.program_id(1) * TILE_H + tl.arange(0, TILE_H))[:, None]
    x0, x1, wx = _between(x, w, W, COMPUTE)
    y0, y1, wy = _between(y, h, H, COMPUTE)
    highest = tl.zeros([TILE_H, TILE_W], COMPUTE)
    best_rank = tl.zeros([TILE_H, TILE_W], tl.int64)
    label = tl.zeros([TILE_H, TILE_W], tl.int32)
    for n in range(N):
        mine = tl.load(rank + n)
        at00, at01 = tl.load(logits + y0 * w + x0), tl.load(logits + y0 * w + x1)
        at10, at11 = tl.load(logits + y1 * w + x0), tl.load(logits + y1 * w + x1)
        left = (1 - wy) * at00.to(COMPUTE) + wy * at10.to(COMPUTE)
        right = (1 - wy) * at01.to(COMPUTE) + wy * at11.to(COMPUTE)
        value = (1 - wx) * left + wx * right
        wins = (value > highest) | ((value == highest) & (label > 0) & (mine > best_rank))
        highest = tl.where(wins, value, highest)
        best_rank = tl.where(wins, mine, best_rank)
        label = tl.where(wins, n + 1, label)
        logits += h * w
    tl.store(labels + y.to(tl.int64) * W + x, label.to(tl.uint8), mask=(y < H) & (x < W))


@triton_op("dmm::upsample_argmax_triton", mutates_args={})
def upsample_argmax(logits: Tensor, rank: Tensor, height: int, width: int) -> Tensor:
    """``dmm_fast.upsample_argmax`` (shapes, errors and result are those of ``torch.ops.dmm.upsample_argmax``)."""
    op = "dmm::upsample_argmax"
    if logits.dim() != 3:
        raise RuntimeError(f"{op}: logits must have shape [N, h, w], got {list(logits.shape)}")
    N, h, w = logits.shape
    if N > 255:
        raise RuntimeError(f"{op}: a label is a byte: N must be at most 255, got {N}")
    if rank.shape != (N,):
        raise RuntimeError(f"{op}: rank must have shape [N] with N = {N}, got {list(rank.shape)}")
    if logits.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise RuntimeError(f"{op}: logits must be float32, float64, float16 or bfloat16, got {logits.dtype}")
    if rank.dtype != torch.int64:
        raise RuntimeError(f"{op}: rank must be torch.int64, got {rank.dtype}")
    if rank.device != logits.device:
        raise RuntimeError(f"{op}: rank must be on the device of logits")
    if not (0 < h < 2**24 and 0 < w < 2**24):
        raise RuntimeError(f"{op}: h and w of logits must be in [1, 2^24), got {list(logits.shape)}")
    if not (0 <= height < 2**24 and 0 <= width < 2**24):
        raise RuntimeError(f"{op}: height and width must be in [0, 2^24), got {height} and {width}")
    labels = logits.new_empty(height, width, dtype=torch.uint8)
    if labels.numel() > 0:
        grid = (triton.cdiv(width, _TILE_W), triton.cdiv(height, _TILE_H))
        launch(
            _label_kernel, grid,
            logits.contiguous(), rank.contiguous(), labels, N, h, w, height, width, TILE_H=_TILE_H, TILE_W=_TILE_W,
            COMPUTE=tl.float64 if logits.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return labels

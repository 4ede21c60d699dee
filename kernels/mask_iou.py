"""``mask_iou`` in Triton: the counts are a matrix product of the masks in half precision, exact in float32, split over the pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dmm_fast.kernels.launch import launch
from torch import Tensor
from torch.library import triton_op

_BLOCK_N, _BLOCK_M, _BLOCK_PIXELS, _BLOCKS_PER_PROGRAM = 16, 64, 128, 8


@triton.jit
def _count_kernel(
    a, b, counts, N, M, pixels,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Adds some pixels of a tile of pairs to counts [B, N + 1, M + 1]: overlaps; areas in the last column and row."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n, tile_m = tl.program_id(1) // tiles_m, tl.program_id(1) % tiles_m
    batch = tl.program_id(2).to(tl.int64)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_a = a + (batch * N + n)[:, None] * pixels  # [BLOCK_N, 1]
    row_b = b + (batch * M + m)[None, :] * pixels  # [1, BLOCK_M]
    both = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)  # counts of BLOCKS * BLOCK_PIXELS pixels at most
    area_a = tl.zeros([BLOCK_N], tl.int32)
    area_b = tl.zeros([BLOCK_M], tl.int32)
    for block in range(BLOCKS):
        p = (tl.program_id(0) * BLOCKS + block) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        inside = p < pixels
        set_a = tl.load(row_a + p[None, :], mask=(n < N)[:, None] & inside[None, :], other=0) != 0
        set_b = tl.load(row_b + p[:, None], mask=(m < M)[None, :] & inside[:, None], other=0) != 0
        both = tl.dot(set_a.to(tl.float16), set_b.to(tl.float16), both)
        area_a += tl.sum(set_a.to(tl.int32), 1)
        area_b += tl.sum(set_b.to(tl.int32), 0)
    counts += batch * (N + 1) * (M + 1)
    # Integers: the order in which programs add does not matter.
    tl.atomic_add(counts + n[:, None] * (M + 1) + m[None, :], both.to(tl.int32), mask=(n < N)[:, None] & (m < M)[None, :])
    if tile_m == 0:
        tl.atomic_add(counts + n * (M + 1) + M, area_a, mask=n < N)
    if tile_n == 0:
        tl.atomic_add(counts + N * (M + 1) + m, area_b, mask=m < M)


@triton_op("dmm::mask_iou_triton", mutates_args={})
def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """``dmm_fast.mask_iou`` (shapes, errors and result are those of ``torch.ops.dmm.mask_iou``)."""
    op = "dmm::mask_iou"
    if a.dim() not in (3, 4):
        raise RuntimeError(f"{op}: a must have shape [N, H, W] or [B, N, H, W], got {list(a.shape)}")
    if b.dim() != a.dim() or b.shape[-2:] != a.shape[-2:] or b.shape[:-3] != a.shape[:-3]:
        raise RuntimeError(
            f"{op}: b must have the shape of a {list(a.shape)} except for the number of masks, got {list(b.shape)}"
        )
    for name, masks in (("a", a), ("b", b)):
        if masks.dtype != torch.bool:
            raise RuntimeError(f"{op}: {name} must be torch.bool, got {masks.dtype}")
    if b.device != a.device:
        raise RuntimeError(f"{op}: b must be on the device of a")
    N, M, pixels = a.shape[-3], b.shape[-3], a.shape[-2] * a.shape[-1]
    if pixels >= 2**31:
        raise RuntimeError(f"{op}: H * W must be below 2^31, got {pixels}")
    B = a.shape[0] if a.dim() == 4 else 1
    counts = torch.zeros((B, N + 1, M + 1), dtype=torch.int32, device=a.device)
    tiles = triton.cdiv(N, _BLOCK_N) * triton.cdiv(M, _BLOCK_M)
    if B * tiles * pixels > 0:
        grid = (triton.cdiv(pixels, _BLOCK_PIXELS * _BLOCKS_PER_PROGRAM), tiles, B)
        launch(
            _count_kernel, grid,
            a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8), counts, N, M, pixels,
            BLOCK_N=_BLOCK_N, BLOCK_M=_BLOCK_M, BLOCK_PIXELS=_BLOCK_PIXELS, BLOCKS=_BLOCKS_PER_PROGRAM,
        )  # fmt: skip
    both = counts[:, :N, :M].double()  # [B, N, M]
    either = counts[:, :N, M:].double() + counts[:, N:, :M].double() - both
    iou = torch.where(either > 0, both / either.clamp(min=1), 0.0).float()
    return iou if a.dim() == 4 else iou[0]

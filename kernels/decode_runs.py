"""``decode_runs`` in Triton: a program takes a tile of one mask's grid.

F(p) counts the pixels of a mask before position p: those of whole runs, summed beforehand, and a part of the run that p is
in. A cell has F at its lower edge less F at its upper one of each pixel column it has a part of. Whole numbers throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from dmm_fast.kernels.launch import launch
from torch import Tensor
from torch.library import triton_op

_TILE_R, _TILE_C = 8, 32


@triton.jit
def _places_to(places, position, R):
    """How many places are at or before a position, one number."""
    low = tl.zeros([], tl.int32)
    high = low + R
    while low < high:
        middle = (low + high) // 2
        passed = tl.load(places + middle) <= position
        low = tl.where(passed, middle + 1, low)
        high = tl.where(passed, high, middle)
    return low


@triton.jit
def _units_before(places, before, x, edge, first, last, height, rows):
    """The units of pixel column x and those before it that the mask has above `edge`; between `first` and `last` places of it
    are at or before that. [TILE_R, TILE_C]"""
    y = edge // rows
    position = x * height + y
    low = tl.zeros(position.shape, tl.int32) + first
    high = tl.zeros(position.shape, tl.int32) + last
    while tl.max(tl.max(high - low, 1), 0) > 0:
        middle = (low + high) // 2
        open = low < high
        passed = tl.load(places + middle, mask=open, other=0) <= position
        low = tl.where(open & passed, middle + 1, low)
        high = tl.where(open & (passed == 0), middle, high)
    inside = low % 2 == 1
    begin = tl.load(places + low - 1, mask=inside, other=0)
    pixels = tl.load(before + low // 2) + tl.where(inside, position - begin, 0)
    return pixels * rows + tl.where(inside, edge - y * rows, 0)


@triton.jit
def _share_kernel(
    places, before, share, R, height, width, rows, columns, per_cell, TILE_R: tl.constexpr, TILE_C: tl.constexpr
):  # fmt: skip
    """places [M, R], R even, before [M, R / 2 + 1] int64. per_cell: the most pixel columns that a cell has a part of."""
    j = tl.program_id(2).to(tl.int64)
    left, top = tl.program_id(0).to(tl.int64) * TILE_C, tl.program_id(1).to(tl.int64) * TILE_R
    c = left + tl.arange(0, TILE_C)[None, :]
    r = top + tl.arange(0, TILE_R)[:, None]
    places += j * R
    before += j * (R // 2 + 1)
    # Between these places the tile's pixel columns lie.
    right = tl.minimum(left + TILE_C, columns)
    first = _places_to(places, left * width // columns * height, R)
    last = _places_to(places, (right * width + columns - 1) // columns * height, R)
    area = tl.zeros([], tl.int64) + height * width
    units = tl.zeros([TILE_R, TILE_C], tl.int64)
    if first == last:
        units += area * (first % 2)
    else:
        begin = c * width // columns
        for step in range(per_cell):
            x = tl.minimum(begin + step, width - 1)
            shared = tl.minimum((begin + step + 1) * columns, (c + 1) * width) - tl.maximum((begin + step) * columns, c * width)
            # A row or a column beyond the grid is not stored; it must only stay within the frame.
            above = _units_before(places, before, x, tl.minimum(r, rows) * height, first, last, height, rows)
            below = _units_before(places, before, x, tl.minimum(r + 1, rows) * height, first, last, height, rows)
            units += tl.where(shared > 0, shared, 0) * (below - above)
    at = share + (j * rows + r) * columns + c
    tl.store(at, (units.to(tl.float64) / area.to(tl.float64)).to(tl.float32), mask=(r < rows) & (c < columns))


@triton_op("dmm::decode_runs_triton", mutates_args={})
def decode_runs(runs: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """``dmm_fast.decode_runs`` (shapes, errors and result are those of ``torch.ops.dmm.decode_runs``)."""
    op = "dmm::decode_runs"
    if runs.dim() != 2:
        raise RuntimeError(f"{op}: runs must have shape [M, R], got {list(runs.shape)}")
    if runs.dtype != torch.int32:
        raise RuntimeError(f"{op}: runs must be torch.int32, got {runs.dtype}")
    if not (0 < height < 2**16 and 0 < width < 2**16 and height * width < 2**31):
        raise RuntimeError(f"{op}: height and width must be in [1, 2^16), their product below 2^31, got {height} and {width}")
    if not (0 <= rows < 2**16 and 0 <= columns < 2**16):
        raise RuntimeError(f"{op}: rows and columns must be in [0, 2^16), got {rows} and {columns}")
    share = runs.new_empty(runs.shape[0], rows, columns, dtype=torch.float32)
    if share.numel() == 0:
        return share
    total = height * width
    places = F.pad(runs, (0, runs.shape[1] % 2), value=total).clamp(0, total).contiguous()  # [M, 2K]
    before = F.pad((places[:, 1::2] - places[:, ::2]).cumsum(1), (1, 0)).contiguous()  # [M, K + 1] int64
    grid = (triton.cdiv(columns, _TILE_C), triton.cdiv(rows, _TILE_R), runs.shape[0])
    launch(
        _share_kernel, grid,
        places, before, share, places.shape[1], height, width, rows, columns, (width + columns - 1) // columns + 1,
        TILE_R=_TILE_R, TILE_C=_TILE_C,
    )  # fmt: skip
    return share

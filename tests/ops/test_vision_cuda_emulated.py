"""The CUDA kernels of the vision ops without a GPU: compiled for the host, threads as fibers.

What this can show: arithmetic, indexing, reads of memory that nothing wrote (scratch, shared memory and results start
as NaN). What it cannot: timing, and races between a barrier and the next.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from helpers import epilogues, grids
from helpers.emulated import ELEMENT, Result, address, build
from torch import Tensor

from dmm_fast.ops import reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return build("vision", tmp_path_factory.mktemp("emulated"))


def sizes_of(*sizes: int):
    return (ctypes.c_int64 * len(sizes))(*sizes)


def mask_iou(device, a: Tensor, b: Tensor) -> Tensor:
    """a [B, N, pixels] and b [B, M, pixels], uint8."""
    B, N, pixels = a.shape
    iou = torch.full((B, N, b.shape[1]), torch.nan)
    device.mask_iou(address(a), address(b), sizes_of(B, N, b.shape[1], pixels), address(iou))
    return iou


@pytest.mark.parametrize("offset", [0, 3], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("B, N, M, pixels", [(1, 3, 5, 2064), (1, 1, 1, 1), (2, 4, 3, 63), (2, 33, 65, 1040), (1, 2, 2, 0)])
def test_mask_iou(device, B, N, M, pixels, offset):
    generator = torch.Generator().manual_seed(0)

    def masks(count):
        memory = torch.randint(0, 3, (B * count * pixels + offset,), generator=generator, dtype=torch.uint8) * 127
        masks = memory[offset:].view(B, count, pixels)
        masks[:, 0] = 0
        return masks

    a, b = masks(N), masks(M)
    assert torch.equal(mask_iou(device, a, b), reference.mask_iou(a[:, :, None] != 0, b[:, :, None] != 0))


BOXES = [
    [2, 1, 14, 17], [-5, -6, 4, 3], [14, 30, 20, 40], [2.5, 2.5, 3.5, 3.5], [3, 3, 3.0001, 3.0001],
    [-1e6, -1e6, 1e6, 1e6], [-1e30, -1e30, 1e30, 1e30], [0, 0, 0, 5], [5, 5, 1, 1], [1e3, 1e3, 2e3, 2e3],
    [NAN, 0, 5, 5], [0, 0, INF, 5], [-INF, 0, INF, 5],
]  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(
    "N, M, S, size",
    [(2, 13, 7, (33, 17)), (10, 9, 28, (9, 40)), (19, 140, 1, (5, 40)), (5, 2, 1, (7, 7)), (1, 2, 131, (6, 150)),
     (0, 3, 4, (5, 6)), (2, 0, 4, (5, 6)), (2, 3, 0, (5, 6)), (2, 3, 4, (0, 6)), (2, 3, 4, (6, 0))],
)  # fmt: skip
def test_paste_combine(device, N, M, S, size, dtype):
    generator = torch.Generator().manual_seed(1)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assignment = torch.rand(N, M, generator=generator, dtype=torch.float64)
    assignment[assignment < 0.4] = 0
    assignment = assignment.to(dtype)
    masks = (torch.rand(M, S, S, generator=generator, dtype=torch.float64) * 2 - 0.5).to(dtype)
    boxes = torch.tensor(BOXES, dtype=compute).repeat(math.ceil(M / len(BOXES)), 1)[:M].contiguous()
    grad = (torch.rand(N, *size, generator=generator, dtype=torch.float64) - 0.5).to(dtype)

    double = [x.double().requires_grad_() for x in (assignment, masks)]
    expected = reference.paste_combine(*double, boxes.double(), size)
    expected = expected, *torch.autograd.grad(expected, double, grad.double())
    actual = [torch.full_like(x, torch.nan) for x in (grad, assignment, masks)]
    device.paste_combine(
        address(assignment), address(masks), address(boxes), sizes_of(N, M, S, *size), ELEMENT[dtype], address(grad),
        *map(address, actual),
    )  # fmt: skip
    for value, want in zip(actual, expected):
        scale = max(1.0, float(want.detach().abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(value.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


def test_a_cell_that_is_infinite_spoils_only_pixels_that_see_it(device):
    masks = torch.zeros(1, 8, 8)
    masks[0, 0, 0] = -INF
    assignment, boxes, grad = torch.ones(1, 1), torch.tensor([[16.0, 16, 24, 24]]), torch.ones(1, 40, 40)
    actual = [torch.full_like(x, torch.nan) for x in (grad, assignment, masks)]
    device.paste_combine(
        address(assignment), address(masks), address(boxes), sizes_of(1, 1, 8, 40, 40), ELEMENT[torch.float32], address(grad),
        *map(address, actual),
    )  # fmt: skip
    expected = torch.ops.dmm.paste_combine(assignment, masks, boxes, 40, 40).isfinite()
    assert 0 < int((~expected).sum()) < 64 and torch.equal(actual[0].isfinite(), expected)


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", [name for name in grids.PASTES if not name.startswith("no ")] + ["no cells of a mask"])
def test_paste_masks(device, name, dtype):
    masks, boxes, rows, columns, samples = grids.paste_inputs(name, dtype)
    M, S = masks.shape[:2]
    cover = Result((M, rows, columns), dtype)
    sizes = sizes_of(M, S, rows, columns, samples)
    device.paste_masks(address(masks), address(boxes), sizes, ELEMENT[dtype], address(cover.tensor))
    grids.check_cover(cover.take(), masks, boxes, rows, columns, samples)


def decode_runs(device, runs: Tensor, *sizes: int) -> Tensor:
    share = Result((len(runs), *sizes[2:]), torch.float32)
    device.decode_runs(address(runs), sizes_of(*runs.shape, *sizes), address(share.tensor))
    return share.take()


@pytest.mark.parametrize("name", [name for name in grids.RUNS if not name.startswith("no ")] + ["no places"])
def test_decode_runs(device, name):
    runs, *sizes = grids.run_inputs(name)
    grids.check_decoded(decode_runs(device, runs, *sizes), runs, *sizes)


def test_bad_runs_stay_in_memory(device):
    """Negative, descending, extreme places, and no more than there are: what lies beside them is not read."""
    generator = torch.Generator().manual_seed(0)
    bad = torch.randint(-(2**31), 2**31 - 1, (8, 31), generator=generator).int()
    near = torch.randint(-40, 2100, (8, 31), generator=generator).int()
    for runs in (bad, near, near.sort(1, descending=True).values):
        beside = [torch.cat([runs, torch.full((1, 31), fill).int()])[:-1] for fill in (-1, 500, 2**31 - 1)]
        shares = [decode_runs(device, x, 40, 50, 10, 12) for x in beside]
        assert torch.equal(shares[0], shares[1]) and torch.equal(shares[0], shares[2])


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", [name for name in grids.LABELS if name != "no pixels"])
def test_upsample_argmax(device, name, dtype):
    logits, rank, height, width = grids.label_inputs(name, dtype)
    labels = torch.full((height * width + 128,), 254, dtype=torch.uint8)
    sizes = sizes_of(*logits.shape, height, width)
    device.upsample_argmax(address(logits), address(rank), sizes, ELEMENT[dtype], address(labels[64:]))
    assert bool((labels[:64] == 254).all() and (labels[-64:] == 254).all())
    grids.check_labels(labels[64:-64].view(height, width), logits, rank, height, width)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("layout", epilogues.LAYOUTS)
@pytest.mark.parametrize("dtype", epilogues.DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", [name for name in epilogues.CASES if not name.startswith("no ")])
def test_bias_clamp(device, name, dtype, layout, offset):
    x, bias, residual, low, high = epilogues.inputs(name, dtype, layout)
    memory = torch.empty(x.numel() + offset, dtype=dtype)[offset:]  # 16 bytes lie right, or do not
    given = memory.as_strided(x.shape, x.stride(), offset).copy_(x)
    last = not x.is_contiguous()
    larger = residual if residual is not None and len(x) == 1 else x
    out = Result((larger.numel(),), dtype)
    added = 1 if residual is None else residual.numel()
    sizes = sizes_of(larger.numel(), x.shape[1], 1 if last else x.shape[2] * x.shape[3], x.numel(), added)
    limits = (ctypes.c_double * 2)(low, high)
    device.bias_clamp(address(given), address(bias), address(residual), sizes, limits, ELEMENT[dtype], address(out.tensor))
    epilogues.check(out.take().as_strided(larger.shape, larger.stride(), out.GUARD), x, bias, residual, low, high)

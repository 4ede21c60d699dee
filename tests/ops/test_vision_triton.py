"""The Triton kernels of the vision ops: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported
pytest.importorskip("triton")

from dmm_fast.kernels.bias_clamp import bias_clamp  # noqa: E402
from dmm_fast.kernels.decode_runs import decode_runs  # noqa: E402
from dmm_fast.kernels.mask_iou import mask_iou  # noqa: E402
from dmm_fast.kernels.paste_combine import paste_combine  # noqa: E402
from dmm_fast.kernels.paste_masks import paste_masks  # noqa: E402
from dmm_fast.kernels.upsample_argmax import upsample_argmax  # noqa: E402
from helpers import epilogues, grids  # noqa: E402

from dmm_fast.ops import reference  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NAN, INF = float("nan"), float("inf")


def masks(*shape, seed=0):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4).to(DEVICE)


@pytest.mark.parametrize(
    "a, b",
    [
        ((3, 20, 33), (5, 20, 33)),
        ((20, 9, 7), (70, 9, 7)),  # more masks than one tile
        ((2, 40, 61), (3, 40, 61)),  # more pixels than one program
        ((2, 3, 8, 8), (2, 4, 8, 8)),
        ((0, 4, 4), (2, 4, 4)),
        ((2, 0, 4), (3, 0, 4)),
    ],
)
def test_mask_iou(a, b):
    a, b = masks(*a), masks(*b, seed=1)
    a[..., :1, :, :] = False
    b[..., :1, :, :] = False
    assert torch.equal(mask_iou(a, b), reference.mask_iou(a, b))


def test_mask_iou_refuses():
    with pytest.raises(RuntimeError, match="dmm::mask_iou: b must have the shape of a"):
        mask_iou(masks(2, 3, 4), masks(2, 3, 5))


BOXES = [
    [2, 1, 14, 17], [-5, -6, 4, 3], [14, 30, 20, 40], [2.5, 2.5, 3.5, 3.5], [-1e6, -1e6, 1e6, 1e6],
    [0, 0, 0, 5], [5, 5, 1, 1], [1e3, 1e3, 2e3, 2e3], [NAN, 0, 5, 5], [0, 0, INF, 5], [-INF, 0, INF, 5],
]  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(
    "N, M, S, size",
    [
        (2, 11, 7, (19, 17)),
        (3, 2, 1, (5, 70)),
        (0, 3, 4, (5, 6)),
        (2, 0, 4, (5, 6)),
        (2, 3, 0, (5, 6)),
        (2, 3, 4, (0, 6)),
    ],
)
def test_paste_combine(N, M, S, size, dtype):
    generator = torch.Generator().manual_seed(1)
    assignment = torch.rand(N, M, generator=generator, dtype=torch.float64)
    assignment[assignment < 0.3] = 0
    values = torch.rand(M, S, S, generator=generator, dtype=torch.float64) * 2 - 0.5
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    boxes = torch.tensor(BOXES[:M], dtype=compute, device=DEVICE).view(M, 4)
    assignment, values = (x.to(DEVICE, dtype).requires_grad_() for x in (assignment, values))
    double = [x.detach().double().requires_grad_() for x in (assignment, values)]

    out = paste_combine(assignment, values, boxes, *size)
    expected = reference.paste_combine(*double, boxes.double(), size)
    grad = torch.rand(expected.shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    pairs = zip(torch.autograd.grad(out, (assignment, values), grad), torch.autograd.grad(expected, double, grad.double()))
    for value, want in [(out, expected), *pairs]:
        assert value.dtype == dtype and value.shape == want.shape
        torch.testing.assert_close(value.double(), want, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_paste_combine_refuses():
    with pytest.raises(RuntimeError, match="masks must have shape"):
        paste_combine(torch.ones(2, 3), torch.ones(4, 5, 5), torch.ones(3, 4), 6, 7)


def on_device(inputs):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs]


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", grids.PASTES)
def test_paste_masks(name, dtype):
    inputs = on_device(grids.paste_inputs(name, dtype))
    grids.check_cover(paste_masks(*inputs), *inputs)


def test_paste_masks_has_no_gradient():
    inputs = on_device(grids.paste_inputs("one row"))
    inputs[0].requires_grad_()
    assert not paste_masks(*inputs).requires_grad


@pytest.mark.parametrize("name", grids.RUNS)
def test_decode_runs(name):
    runs, *sizes = on_device(grids.run_inputs(name))
    grids.check_decoded(decode_runs(runs, *sizes), runs, *sizes)


def test_decode_runs_of_any_strides():
    runs, *sizes = on_device(grids.run_inputs("one row"))
    grids.check_decoded(decode_runs(runs.T.contiguous().T, *sizes), runs, *sizes)
    grids.check_decoded(decode_runs(runs[:, ::2], *sizes), runs[:, ::2].contiguous(), *sizes)


@pytest.mark.parametrize("layout", epilogues.LAYOUTS)
@pytest.mark.parametrize("dtype", epilogues.DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", epilogues.CASES)
def test_bias_clamp(name, dtype, layout):
    inputs = on_device(epilogues.inputs(name, dtype, layout))
    epilogues.check(bias_clamp(*inputs), *inputs)


def test_bad_runs_stay_in_memory():
    generator = torch.Generator().manual_seed(0)
    bad = torch.randint(-(2**31), 2**31 - 1, (3, 31), generator=generator).int()
    near = torch.randint(-40, 2100, (3, 31), generator=generator).int()
    for runs in (bad, near, near.sort(1, descending=True).values):
        assert decode_runs(runs.to(DEVICE), 40, 50, 10, 12).shape == (3, 10, 12)


@pytest.mark.parametrize("dtype", grids.DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", grids.LABELS)
def test_upsample_argmax(name, dtype):
    inputs = on_device(grids.label_inputs(name, dtype))
    grids.check_labels(upsample_argmax(*inputs), *inputs)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paste_masks(torch.ones(2, 3, 4), torch.ones(2, 4), 5, 5, 2), "masks must have shape [M, S, S], got [2, 3, 4]"),
        (lambda: paste_masks(torch.ones(2, 3, 3), torch.ones(3, 4), 5, 5, 2), "boxes must have shape [M, 4] with M = 2"),
        (lambda: paste_masks(torch.ones(2, 3, 3), torch.ones(2, 4), 5, 5, 0), "samples must be in [1, 64], got 0"),
        (lambda: decode_runs(torch.ones(2, 3), 5, 5, 5, 5), "dmm::decode_runs: runs must be torch.int32"),
        (lambda: decode_runs(torch.ones(2, 3).int(), 0, 5, 5, 5), "height and width must be in"),
        (lambda: upsample_argmax(torch.ones(2, 3, 3), torch.ones(3).long(), 5, 5), "rank must have shape [N] with N = 2"),
        (lambda: upsample_argmax(torch.ones(2, 3, 3), torch.ones(2), 5, 5), "rank must be torch.int64"),
        (lambda: bias_clamp(torch.ones(1, 2, 3, 3), torch.ones(3), None, 0.0, 6.0), "bias must have shape [C] with C = 2, got [3]"),
        (lambda: bias_clamp(torch.ones(1, 2, 3, 3), torch.ones(2), torch.ones(2), 0.0, 6.0), "residual must have the shape of x"),
    ],
)  # fmt: skip
def test_grids_refuse(call, message):
    with pytest.raises(RuntimeError) as error:
        call()
    assert message in str(error.value)

"""The Triton kernels of the vision ops: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported
pytest.importorskip("triton")

from dmm_fast.kernels import bias_clamp as bias_clamp_kernels  # noqa: E402
from dmm_fast.kernels.bias_clamp import bias_clamp  # noqa: E402
from dmm_fast.kernels.decode_runs import decode_runs  # noqa: E402
from dmm_fast.kernels.launch import launch  # noqa: E402
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


def test_a_cell_that_is_infinite_spoils_only_pixels_that_see_it():
    values = torch.zeros(1, 8, 8, device=DEVICE)
    values[0, 0, 0] = -INF
    inputs = torch.ones(1, 1, device=DEVICE), values, torch.tensor([[16.0, 16, 24, 24]], device=DEVICE)
    expected = torch.ops.dmm.paste_combine(*inputs, 40, 40).isfinite()
    assert 0 < int((~expected).sum()) < 64 and torch.equal(paste_combine(*inputs, 40, 40).isfinite(), expected)


def test_paste_combine_in_autocast():
    inputs = torch.rand(2, 3, device=DEVICE).bfloat16(), torch.rand(3, 7, 7, device=DEVICE), torch.rand(3, 4, device=DEVICE) * 9
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = paste_combine(*inputs, 9, 9)
    assert out.dtype == torch.float32 and torch.equal(out, paste_combine(inputs[0].float(), *inputs[1:], 9, 9))


def test_bias_clamp_has_a_gradient():
    x, bias = torch.randn(2, 3, 4, 5, device=DEVICE, requires_grad=True), torch.randn(3, device=DEVICE, requires_grad=True)
    residual, grad = torch.randn(1, 3, 4, 5, device=DEVICE, requires_grad=True), torch.rand(2, 3, 4, 5, device=DEVICE)
    ours, theirs = (
        torch.autograd.grad(function(x, bias, residual, 0.0, 1.0), (x, bias, residual), grad)
        for function in (bias_clamp, reference.bias_clamp)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_what_no_launch_takes():
    with pytest.raises(RuntimeError, match="b must be on the device of a"):
        mask_iou(masks(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool, device="meta"))
    with pytest.raises(RuntimeError, match=r"takes no grid of \(1, 70000\) programs"):
        launch(bias_clamp_kernels._finish_kernel, (1, 70_000), torch.ones(1))
    with pytest.raises(RuntimeError, match="H \\* W below 2"):
        paste_combine(torch.ones(1, 1), torch.ones(1, 2, 2), torch.ones(1, 4), 2**16, 2**16)


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmm_fast.kernels import bias_clamp, decode_runs, mask_iou, paste_combine, paste_masks, upsample_argmax

tiles = dict(TILE_H=8, TILE_W=32, TILE_R=8, TILE_C=16, COMPUTE=tl.float32, BLOCK_X=128, CELLS=32)
tiles |= dict(LOW=0.0, HIGH=float("inf"), ADD=True, BLOCK=1024, BLOCK_N=16, BLOCK_M=64, BLOCK_PIXELS=128, BLOCKS=8)
types = dict.fromkeys(("a", "b"), "*u8") | dict.fromkeys(("counts", "places"), "*i32")
types |= dict.fromkeys(("rank", "labels", "before"), "*i64")
types |= dict.fromkeys(("assignment", "masks", "boxes", "out", "grad", "parts", "grad_masks", "x", "bias", "residual", "logits", "cover", "share"), "*fp32")
for capability, kernels in (
    (75, [mask_iou._count_kernel, paste_combine._forward_kernel]),
    (90, [mask_iou._count_kernel, paste_combine._forward_kernel, paste_combine._backward_kernel, paste_masks._cover_kernel,
          decode_runs._share_kernel, upsample_argmax._label_kernel, bias_clamp._finish_kernel]),
):
    for kernel in kernels:
        constants = {name: tiles[name] for name in kernel.arg_names if name in tiles}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
"""


def test_kernels_compile_without_a_gpu():
    """What the interpreter forgives, the compiler may not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

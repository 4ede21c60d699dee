"""bias_clamp against its plain reference, and what torch can do with it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import epilogues
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dmm_fast.ops import library, reference
from dmm_fast.ops.vision import bias_clamp

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def moved(inputs, device: str):
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", epilogues.LAYOUTS)
@pytest.mark.parametrize("dtype", epilogues.DTYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", epilogues.CASES)
def test_bias_clamp(name, dtype, layout, device):
    inputs = moved(epilogues.inputs(name, dtype, layout), device)
    out = bias_clamp(*inputs)
    epilogues.check(out, *inputs)
    assert out.is_contiguous(memory_format=epilogues.LAYOUTS[layout]) or out.numel() == 0


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_mix(device):
    """A residual is laid out as x is; an x that has gaps becomes contiguous."""
    x, bias, residual, low, high = moved(epilogues.inputs("carried"), device)
    last = residual.contiguous(memory_format=torch.channels_last)
    epilogues.check(bias_clamp(x, bias, last, low, high), x, bias, residual, low, high)
    wide = torch.stack([x, x + 1], -1)[..., 0]
    out = bias_clamp(wide, torch.stack([bias, bias], 1)[:, 0], residual.expand_as(x), low, high)
    epilogues.check(out, x, bias, residual, low, high)
    assert not wide.is_contiguous() and out.is_contiguous()


def test_activations():
    x, bias, *_ = epilogues.inputs("relu6")
    for limits, function in (((), lambda y: y), ((None, 0.0), F.relu), ((None, 0.0, 6.0), F.relu6)):
        torch.testing.assert_close(bias_clamp(x, bias, *limits), function(x + bias[:, None, None]), equal_nan=True)


@pytest.mark.parametrize("name", ["relu6", "carried", "one for all, relu", "all for one", "odd"])
def test_gradient(name):
    x, bias, residual, low, high = epilogues.inputs(name, torch.float64)
    leaves = [t.nan_to_num().requires_grad_() for t in (x, bias, residual) if t is not None]
    rest = [] if residual is not None else [None]
    grad = torch.randn_like(reference.bias_clamp(x, bias, residual, low, high))
    ours, theirs = (
        torch.autograd.grad(function(*leaves, *rest, low, high), leaves, grad)
        for function in (bias_clamp, reference.bias_clamp)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_torch_func():
    x, bias, residual, low, high = epilogues.inputs("one for all, relu", torch.float64)
    x = x.nan_to_num()

    def gradient(backend, residual=residual):
        return torch.func.grad(lambda x, bias: bias_clamp(x, bias, residual, low, high, backend=backend).square().sum(), (0, 1))

    for given in (residual, None):
        torch.testing.assert_close(gradient("auto", given)(x, bias), gradient("reference", given)(x, bias))
    several = torch.stack([x, -x])
    ours, theirs = (torch.func.vmap(gradient(b), (0, None))(several, bias) for b in ("auto", "reference"))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="dmm::bias_clamp: has no derivative in forward mode"):
        torch.func.jvp(lambda b: bias_clamp(x, b, residual, low, high), (bias,), (bias,))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 3, 2, 1), (3, 2, 1, 4), (2, 3, 4, 1), (2, 3, 1, 1), (1, 1, 3, 2), (1, 1, 1, 1)], ids=str)
def test_a_dimension_of_one_may_have_any_stride(shape, device):
    """As torch has it: what is compiled relies on the fake kernel's layout."""
    N, C, H, W = shape
    strides = [77 if size == 1 else stride for size, stride in zip(shape, (C * H * W, 1, C * W, C))]  # channels-last
    inputs = torch.rand(N * C * H * W, device=device).as_strided(shape, strides), torch.rand(C, device=device), None, 0.0, 1.0
    out = bias_clamp(*inputs)
    epilogues.check(out, *inputs)
    with FakeTensorMode() as mode:
        fake = bias_clamp(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in inputs))
    ours, theirs = ([stride for stride, size in zip(t.stride(), shape) if size > 1] for t in (out, fake))
    assert ours == theirs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", epilogues.LAYOUTS)
@pytest.mark.parametrize("name", ["relu6", "one for all, relu", "all for one"])
def test_opcheck(name, layout, device):
    x, bias, residual, low, high = moved(epilogues.inputs(name, layout=layout), device)
    tensors = [t if t is None else t.nan_to_num().requires_grad_() for t in (x, bias, residual)]
    torch.library.opcheck(torch.ops.dmm.bias_clamp.default, (*tensors, low, high))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.ones(3, 4)), "dmm::bias_clamp: x must have shape [N, C, H, W], got [3, 4]"),
        (dict(x=torch.ones(2, 3, 4, 4).int()), "x must be float32, float64, float16 or bfloat16, got Int"),
        (dict(bias=torch.ones(4)), "bias must have shape [C] with C = 3, got [4]"),
        (dict(bias=torch.ones(3).double()), "bias must be Float, got Double"),
        (dict(residual=torch.ones(3, 3, 4, 4)), "residual must have the shape of x, [2, 3, 4, 4], or one of the two a single image, got [3, 3, 4, 4]"),
        (dict(residual=torch.ones(2, 3, 4, 4).half()), "residual must be Float, got Half"),
        (dict(low=1.0, high=0.0), "low must be at most high, got 1 and 0"),
        (dict(low=float("nan")), "low must be at most high, got nan"),
    ],
)  # fmt: skip
def test_refuses(change, message):
    given = dict(x=torch.ones(2, 3, 4, 4), bias=torch.ones(3), residual=None, low=0.0, high=6.0) | change
    with pytest.raises(RuntimeError) as error:
        bias_clamp(**given)
    assert message in str(error.value)


@pytest.mark.parametrize("backend", library.BACKENDS)
def test_backends_agree(backend):
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("no GPU: tests/ops/test_vision_triton.py runs the kernel in Triton's interpreter")
    inputs = moved(epilogues.inputs("large"), "cuda" if backend == "triton" else "cpu")
    epilogues.check(bias_clamp(*inputs, backend=backend), *inputs)
    with pytest.raises(ValueError, match="bias_clamp: backend must be one of"):
        bias_clamp(*inputs, backend="magic")

"""The Triton kernels of dmm::match_prices: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import triton_kernels
from helpers.triton_kernels import DEVICE, random
from torch import Tensor

import dmm_fast
from dmm_fast.ops import reference

kernels = triton_kernels.kernels("match_prices")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
OUTPUTS = pytest.mark.parametrize("last", [True, False], ids=["last", "average"])


def check(cost: Tensor, lr: Tensor, last: bool, n_grad: int = 5, n_proj: int = 1, own: Tensor | None = None, **counts):
    """X and the gradients of <w, X> in cost, lr and unmatched_cost, against autograd through the float64 reference."""
    weight = random(*cost.shape, seed=9) - 0.5

    def results(solve, *leaves) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        x = solve(*leaves)
        (x.double() * weight).sum().backward()
        return x.detach(), *(leaf.grad for leaf in leaves)

    options = dict(n_grad=n_grad, n_proj=n_proj, **counts)
    output = "last" if last else "average"
    given = (cost, lr) if own is None else (cost, lr, own.to(lr.dtype))

    def kernel(c, rate, alone=None):
        return kernels.match_prices(c, lr_tensor=rate, last=last, unmatched_cost=alone, **options)

    def expect(c, rate, alone=None):
        return reference.match_prices(c, lr=rate, output=output, unmatched_cost=alone, **options)

    actual, expected = results(kernel, *given), results(expect, *(tensor.double() for tensor in given))
    for name, got, want in zip(("X", "grad_cost", "grad_lr", "grad_unmatched_cost"), actual, expected):
        assert got.dtype == (cost.dtype if name in ("X", "grad_cost") else lr.dtype)
        tolerance = TOLERANCE[cost.dtype]
        atol = tolerance * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=atol, msg=lambda m: f"{name}: {m}")


@OUTPUTS
@pytest.mark.parametrize("n_proj", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 5, 9), (1, 7, 3)], ids=str)
def test_forward_and_backward(shape, n_proj, last):
    lr = torch.tensor(4.0, dtype=torch.float64, device=DEVICE)
    check(random(*shape), lr, last, n_proj=n_proj)
    check(random(*shape), lr, last, n_proj=n_proj, own=random(*shape[:-1], seed=5) * 0.6)
    check(random(*shape), lr, last, n_proj=n_proj, own=random(shape[-2], seed=5) * 0.6)


@OUTPUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype, last):
    check(random(2, 3, 6, dtype=dtype), torch.full((2,), 1.0, device=DEVICE), last)


@OUTPUTS
def test_ragged(last):
    cost = random(5, 3, 6)
    n, m = torch.tensor([3, 1, 0, 2, 3], device=DEVICE), torch.tensor([6, 4, 5, 0, 1], device=DEVICE)
    for b in range(5):
        cost[b, n[b] :] = torch.nan
        cost[b, :, m[b] :] = torch.inf
    lr = torch.linspace(0.5, 4.0, 5, dtype=torch.float64, device=DEVICE)
    check(cost, lr, last, num_templates=n, num_proposals=m)
    own = random(5, 3, seed=5) * 0.5
    for b in range(5):
        own[b, n[b] :] = torch.nan
    check(cost, lr, last, num_templates=n, num_proposals=m, own=own)


def test_the_defaults_decide():
    cost = random(2, 5, 20)
    x = kernels.match_prices(cost)
    torch.testing.assert_close(x, reference.match_prices(cost), rtol=1e-9, atol=1e-9)
    assert torch.equal(x.argmax(-1), dmm_fast.hungarian(cost).argmax(-1))


def test_programs_take_problems_in_turn(monkeypatch):
    leaf, again = (random(5, 3, 4).requires_grad_() for _ in range(2))
    grad = random(5, 3, 4, seed=1)
    kernels.match_prices(leaf, n_grad=3, last=False).backward(grad)
    monkeypatch.setattr(kernels.layer, "MAX_SCRATCH", 400)
    kernels.match_prices(again, n_grad=3, last=False).backward(grad)
    assert torch.equal(leaf.grad, again.grad)


def test_non_contiguous():
    cost = random(2, 5, 12).transpose(1, 2)[:, ::3]  # [2, 4, 5]
    grad = torch.ones((), device=DEVICE, dtype=cost.dtype).expand(cost.shape)
    leaf, again = cost.detach().requires_grad_(), cost.detach().contiguous().requires_grad_()
    x = kernels.match_prices(leaf, n_grad=3, last=False)
    x.backward(grad)
    kernels.match_prices(again, n_grad=3, last=False).backward(grad.contiguous())
    assert x.is_contiguous() and torch.equal(leaf.grad, again.grad)


def test_poison_and_counts_out_of_range_stay_in_their_problem():
    cost = random(6, 2, 5)
    cost[1, 0, 3] = torch.nan
    cost[2, 1, 1] = torch.inf
    counts = torch.tensor([2, 2, 2, 3, 2, 2], device=DEVICE)
    lr = torch.tensor([10, 10, 10, 10, 0, torch.nan], dtype=torch.float64, device=DEVICE).requires_grad_()
    leaf = cost.requires_grad_()
    x = kernels.match_prices(leaf, num_templates=counts, lr_tensor=lr, n_grad=2)
    x.sum().backward()
    for result in (x.detach(), leaf.grad, lr.grad):
        assert result[0].isfinite().all() and result[1:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 5)], ids=str)
def test_empty(shape):
    cost = random(*shape).requires_grad_()
    x = kernels.match_prices(cost)
    x.sum().backward()
    assert x.shape == cost.grad.shape == shape


def test_errors_name_op_argument_rule_and_value():
    cost = random(2, 3, 4)
    for options, words in [
        (dict(n_grad=0), "dmm::match_prices: n_grad must be at least 1, got 0"),
        (dict(lr=0.0), "dmm::match_prices: lr must be positive and finite, got 0"),
        (dict(lr_tensor=torch.zeros(3, device=DEVICE)), r"lr_tensor must have shape \[\] or \[2\], got \[3\]"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            kernels.match_prices(cost, **options)


def test_a_second_derivative_is_refused():
    cost = random(2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(kernels.match_prices(cost, n_grad=2).sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmm_fast.kernels import match_prices

for last in (True, False):
    constants = dict(RAGGED_N=True, RAGGED_M=True, UNMATCHED=True, LAST=last, DTYPE=tl.float32, BLOCK_N=8, BLOCK_M=64)
    pointers = dict.fromkeys(("cost", "out", "grad", "grad_cost"), "*bf16")
    pointers |= dict.fromkeys(("lr", "own", "grad_lr", "scratch"), "*fp32")
    pointers |= dict.fromkeys(("num_templates", "num_proposals"), "*i64")
    for kernel in (match_prices._forward_kernel, match_prices._backward_kernel):
        signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
        target = GPUTarget("cuda", 90, 32)
        triton.compile(ASTSource(kernel, signature, constants), target=target, options=dict(num_warps=1))
"""


def test_kernels_compile_without_a_gpu():
    """What the interpreter forgives, the compiler may not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

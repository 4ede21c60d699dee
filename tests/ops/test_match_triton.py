"""The Triton kernels of the matching layer: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from dmm_fast.kernels.launch import launch
from helpers import triton_kernels
from helpers.triton_kernels import DEVICE, random
from torch import Tensor

import dmm_fast
from dmm_fast.ops import library, reference

kernels = triton_kernels.kernels("match")
MODES = [dict(dykstra=dykstra, output=output) for dykstra in ("reset", "carry") for output in ("average", "last")]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def results(function, cost, init, lr, **options) -> tuple[Tensor, ...]:
    """X and the gradients of <w, X> in cost, init and lr."""
    leaves = [t.detach().clone().requires_grad_() for t in (cost, init, lr)]
    if "unmatched_cost" in options:
        leaves.append(options.pop("unmatched_cost").detach().clone().to(lr.dtype).requires_grad_())
    own = {"unmatched_cost": leaves[3]} if leaves[3:] else {}
    x = function(leaves[0], leaves[1], lr=leaves[2], n_grad=3, n_proj=3, **options, **own)
    weight = random(*cost.shape, seed=9) - 0.5
    (x.to(weight.dtype) * weight).sum().backward()
    return x.detach(), *(t.grad for t in leaves)


def check(cost, init, lr, **options):
    actual = results(lambda *a, **k: dmm_fast.match(*a, backend="triton", **k), cost, init, lr, **options)
    expected = results(reference.match, cost.double(), init.double(), lr.double(), **options)
    tolerance = TOLERANCE[cost.dtype]
    for name, got, want in zip(("X", "grad_cost", "grad_init", "grad_lr", "grad_unmatched_cost"), actual, expected):
        assert got.dtype == (lr.dtype if name in ("grad_lr", "grad_unmatched_cost") else cost.dtype)
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 5, 9), (1, 7, 3)], ids=str)
def test_forward_and_backward(shape, mode):
    lr = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    check(random(*shape), random(*shape, seed=1) - 0.3, lr, **mode)
    check(random(*shape), random(*shape, seed=1) * 0.3, lr, unmatched_cost=random(*shape[:-1], seed=5) * 0.6, **mode)
    check(random(*shape), random(*shape, seed=1) * 0.3, lr, unmatched_cost=random(shape[-2], seed=5) * 0.6, **mode)
    check(random(*shape), random(*shape, seed=1) * 0.3, lr, unmatched_cost=torch.full_like(lr, 0.3), **mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    lr = torch.full((2,), 0.1, device=DEVICE)
    check(random(2, 3, 6, dtype=dtype), random(2, 3, 6, dtype=dtype, seed=1), lr)
    check(random(2, 3, 6, dtype=dtype), random(2, 3, 6, dtype=dtype, seed=1), lr, unmatched_cost=random(2, 3, seed=5))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_ragged(mode):
    cost, init = random(5, 3, 6), random(5, 3, 6, seed=1)
    n, m = torch.tensor([3, 1, 0, 2, 3], device=DEVICE), torch.tensor([6, 4, 5, 0, 1], device=DEVICE)
    for tensor in (cost, init):
        for b in range(5):
            tensor[b, n[b] :] = torch.nan
            tensor[b, :, m[b] :] = torch.inf
    lr = torch.linspace(0.05, 0.2, 5, dtype=torch.float64, device=DEVICE)
    check(cost, init, lr, num_templates=n, num_proposals=m, **mode)
    own = random(5, 3, seed=5) * 0.5
    for b in range(5):
        own[b, n[b] :] = torch.nan
    check(cost, init, lr, num_templates=n, num_proposals=m, unmatched_cost=own, **mode)


def test_without_start_and_with_a_float_lr():
    cost = random(2, 3, 5)
    x = dmm_fast.match(cost, n_grad=4, lr=0.07, backend="triton")
    torch.testing.assert_close(x, reference.match(cost, n_grad=4, lr=0.07), rtol=1e-12, atol=1e-12)


def test_non_contiguous():
    wide = random(2, 5, 12)
    cost = wide.transpose(1, 2)[:, ::3]  # [2, 4, 5]
    grad = torch.ones((), device=DEVICE, dtype=cost.dtype).expand(cost.shape)
    leaf = cost.detach().requires_grad_()
    x = dmm_fast.match(leaf, n_grad=3, backend="triton")
    x.backward(grad)
    again = cost.detach().contiguous().requires_grad_()
    dmm_fast.match(again, n_grad=3, backend="triton").backward(grad.contiguous())
    assert x.is_contiguous() and torch.equal(leaf.grad, again.grad)


def test_poison_and_counts_out_of_range_stay_in_their_problem():
    cost = random(4, 2, 5)
    cost[1, 0, 3] = torch.nan
    cost[2, 1, 1] = torch.inf
    counts = torch.tensor([2, 2, 2, 3], device=DEVICE)
    leaf = cost.requires_grad_()
    x = dmm_fast.match(leaf, n_grad=2, num_templates=counts, backend="triton")
    x.sum().backward()
    for result in (x.detach(), leaf.grad):
        assert result[0].isfinite().all() and result[1:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 5), (0, 300, 300)], ids=str)
def test_empty(shape):
    cost = random(*shape).requires_grad_()
    x = dmm_fast.match(cost, backend="triton")
    x.sum().backward()
    assert x.shape == cost.grad.shape == shape


@pytest.mark.parametrize("name", ["match", "match_prices"])
def test_serves_where_the_cuda_library_is_absent(name, monkeypatch):
    """torch passes on no arguments at the end that have their defaults."""
    served = {}
    monkeypatch.setattr(library, "CUDA_MISSING", "not built")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.library, "impl", lambda op, device, function: served.update({(op, device): function}))
    library.let_triton_serve(name)
    cost = random(3, 5)
    expected = getattr(reference, name)(cost)
    torch.testing.assert_close(served[f"dmm::{name}", "cuda"](cost), expected, rtol=1e-9, atol=1e-9)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    entered, launched = [], []

    @contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append((grid, args[1:], constants, *entered))

    for name in ("cuda:1", "cpu"):
        launch(Kernel(), (3,), SimpleNamespace(device=torch.device(name)), 7, BLOCK=8)
    assert launched == [((3,), (7,), {"BLOCK": 8}, torch.device("cuda:1")), ((3,), (7,), {"BLOCK": 8})]


def test_errors_name_op_argument_rule_and_value():
    cost = random(2, 3, 4)
    for call, words in [
        (lambda: kernels.match(cost[0, 0]), r"dmm::match: cost must have shape \[B, N, M\] or \[N, M\], got \[4\]"),
        (
            lambda: kernels.match(cost, cost[0]),
            r"dmm::match: init must have the shape of cost \[2, 3, 4\], got \[3, 4\]",
        ),
        (lambda: kernels.match(cost, n_grad=0), "dmm::match: n_grad must be at least 1, got 0"),
        (lambda: kernels.match(cost.long()), "dmm::match: cost must be float32"),
        (
            lambda: kernels.match(cost, lr_tensor=torch.zeros(3, device=DEVICE)),
            r"lr_tensor must have shape \[\] or \[2\], got \[3\]",
        ),
        (
            lambda: kernels.match(cost, unmatched_cost=random(2)),
            r"dmm::match: unmatched_cost must have shape \[3\] or \[2, 3\], got \[2\]",
        ),
        (lambda: kernels.match(cost, unmatched_cost=random(3).float()), "unmatched_cost must be torch.float64"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            call()


def test_a_second_derivative_is_refused():
    cost = random(2, 3).requires_grad_()
    (grad,) = torch.autograd.grad(dmm_fast.match(cost, n_grad=2, backend="triton").sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


COMPILE = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dmm_fast.kernels import match

flags = dict.fromkeys(("HAS_INIT", "RAGGED_N", "RAGGED_M", "UNMATCHED", "CARRY"), True)
constants = dict(flags, LAST=False, DTYPE=tl.float32, BLOCK_N=8, BLOCK_M=64)
pointers = dict.fromkeys(("cost", "init", "out", "grad", "grad_cost", "grad_init"), "*bf16")
pointers |= dict.fromkeys(("lr", "own", "grad_lr", "scratch"), "*fp32")
pointers |= dict.fromkeys(("num_templates", "num_proposals"), "*i64")
for kernel in (match._forward_kernel, match._backward_kernel):
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=dict(num_warps=1))
"""


def test_kernels_compile_without_a_gpu():
    """What the interpreter forgives, the compiler may not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_autocast_computes_in_float32():
    cost = torch.rand(3, 5, 20).to(DEVICE, torch.bfloat16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        x = dmm_fast.match(cost, backend="triton")
    assert x.dtype == torch.float32 and torch.equal(x, dmm_fast.match(cost.float(), backend="triton"))

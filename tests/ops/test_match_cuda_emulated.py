"""The CUDA kernels of the matching layer without a GPU: compiled for the host, threads as fibers (tests/emulated_cuda).

What this can show: arithmetic, indexing, which kernel serves which shape, reads of memory that nothing wrote (scratch,
shared memory and results start as NaN), a missing barrier where the order of threads shows it. What it cannot: timing.
"""

from __future__ import annotations

import pytest
import torch
from helpers.emulated import Device, random
from torch import Tensor

from dmm_fast.ops import reference

OPTIONS = dict(n_grad=8, n_proj=5, lr=0.1)


class Match(Device):
    def match(self, cost, init=None, **options):
        return super().forward(cost, init, **{**OPTIONS, **options})

    def backward(self, grad, cost, init=None, **options):
        return super().backward(grad, cost, init, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return Match("match", tmp_path_factory.mktemp("emulated"), starts=True)


def expected(cost, init, grad, *, lr=0.1, carry=False, last=False, unmatched_cost=None, **options):
    """X and the gradients of <grad, X>, by autograd through the float64 reference."""
    B = cost.shape[0]
    if unmatched_cost is not None:
        options["unmatched_cost"] = unmatched_cost.double()
    cost = cost.double().requires_grad_()
    start = (torch.zeros_like(cost) if init is None else init.double()).detach().requires_grad_()
    steps = (
        (lr.double() if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)).expand(B).clone().requires_grad_()
    )
    options = dict(n_grad=8, n_proj=5, dykstra="carry" if carry else "reset", output="last" if last else "average") | options
    x = reference.match(cost, start, lr=steps, **options)
    gradients = torch.autograd.grad(x, (cost, start, steps), grad.double(), allow_unused=True)
    return x.detach(), *(torch.zeros(B) if g is None else g for g in gradients)


def check(device, cost, init=None, grad=None, tolerance=None, **options):
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(cost.shape, generator=generator, dtype=torch.float64).to(cost.dtype) if grad is None else grad
    tolerance = tolerance or {torch.float64: 1e-10, torch.float32: 2e-5}.get(cost.dtype, 1e-2)
    actual = device.match(cost, init, **options), *device.backward(grad, cost, init, **options)
    for name, got, want in zip(("X", "grad_cost", "grad_init", "grad_lr"), actual, expected(cost, init, grad, **options)):
        scale = max(1.0, float(want.abs().max()) if want.numel() else 1.0)
        torch.testing.assert_close(
            got.double(), want.double(), rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{name}: {m}"
        )


MODES = [dict(), dict(carry=True), dict(last=True), dict(carry=True, last=True)]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 1, 50), (1, 5, 50), (2, 3, 70), (1, 10, 33), (1, 16, 100), (1, 7, 3)], ids=str
)
def test_a_warp_per_problem(device, shape, mode):
    device.resize(processors=100)
    check(device, random(*shape), **mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(13, 1, 9), (10, 5, 50), (9, 5, 100), (9, 4, 60), (9, 10, 40)], ids=str)
def test_several_problems_per_warp(device, shape, mode):
    device.resize(processors=1)
    check(device, random(*shape), n_grad=4, **mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 5), (1, 3, 140)], ids=str)
def test_general(device, shape, mode):
    check(device, random(*shape), n_grad=4, **mode)
    check(device, random(*shape, dtype=torch.float64), n_grad=3, **mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("processors", [1, 100])
@pytest.mark.parametrize(
    "shape", [(9, 1, 9), (9, 3, 60), (9, 5, 50), (9, 5, 100), (9, 10, 40), (1, 16, 100), (9, 7, 3)], ids=str
)
def test_templates_that_may_stay_alone(device, shape, processors, mode):
    device.resize(processors)
    own = random(*shape[:2], seed=5) * 0.4
    check(device, random(*shape), init=random(*shape, seed=1) * 0.2, unmatched_cost=own, n_grad=4, **mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 5), (1, 3, 140), (1, 40, 33)], ids=str)
def test_templates_that_may_stay_alone_in_general(device, shape, mode):
    own = random(shape[1], seed=5) * 0.3
    check(device, random(*shape), unmatched_cost=own, n_grad=4, **mode)
    check(device, random(*shape, dtype=torch.float64), unmatched_cost=own, n_grad=3, **mode)


@pytest.mark.parametrize("shape", [(1, 5, 50), (3, 17, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(device, shape, dtype):
    check(device, random(*shape, dtype=dtype), init=random(*shape, dtype=dtype, seed=1), n_grad=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("processors", [1, 100])
def test_ragged_start_and_lr(device, dtype, mode, processors):
    device.resize(processors)
    cost, init = random(10, 6, 20, dtype=dtype), random(10, 6, 20, dtype=dtype, seed=1) - 0.5
    n = torch.tensor([6, 1, 0, 3, 5, 6, 2, 4, 6, 1])
    m = torch.tensor([20, 7, 4, 0, 1, 19, 16, 8, 2, 1])
    for tensor in (cost, init):
        for b in range(10):
            tensor[b, n[b] :] = torch.nan
            tensor[b, :, m[b] :] = torch.inf
    lr = torch.linspace(0.02, 0.2, 10, dtype=dtype)
    check(device, cost, init, num_templates=n, num_proposals=m, lr=lr, n_grad=4, **mode)
    own = random(10, 6, dtype=dtype, seed=2) * 0.5
    for b in range(10):
        own[b, n[b] :] = torch.nan
    check(device, cost, init, num_templates=n, num_proposals=m, lr=lr, n_grad=4, unmatched_cost=own, **mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("processors", [1, 100])
def test_long_runs_in_segments(device, mode, processors):
    device.resize(processors, shared_bytes=16 << 10)
    check(device, random(10, 4, 20), n_grad=7, n_proj=11, **mode)
    check(device, random(10, 4, 20), n_grad=7, n_proj=11, unmatched_cost=random(10, 4, seed=5) * 0.3, **mode)
    device.resize()


def test_masks_of_a_step_that_fit_nowhere(device):
    device.resize(shared_bytes=8 << 10)
    check(device, random(1, 1, 3), n_grad=2, n_proj=130)
    device.resize()


@pytest.mark.parametrize("alone", [False, True], ids=["all", "alone"])
@pytest.mark.parametrize("shape", [(10, 5, 50), (9, 5, 100), (9, 4, 60), (9, 10, 40)], ids=str)
def test_layouts_agree_to_the_bit(device, shape, alone):
    cost, grad = random(*shape), random(*shape, seed=1) - 0.5
    results = []
    for processors in (1, 100):
        device.resize(processors)
        for carry in (False, True):
            options = dict(n_grad=4, carry=carry, unmatched_cost=random(*shape[:2], seed=5) * 0.3 if alone else None)
            results.append((device.match(cost, **options), *device.backward(grad, cost, **options)))
    for few, many in zip(results[:2], results[2:]):
        for a, b in zip(few, many):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape, shared_bytes", [((2, 17, 40), 99 << 10), ((2, 3, 140), 1 << 10)], ids=str)
def test_the_order_of_threads_does_not_matter(device, shape, shared_bytes, mode):
    cost, grad = random(*shape), random(*shape, seed=1) - 0.5
    results = []
    for last_thread_first in (False, True):
        device.resize(shared_bytes=shared_bytes, last_thread_first=last_thread_first)
        options = dict(n_grad=2, n_proj=3, unmatched_cost=random(shape[1], seed=5) * 0.3, **mode)
        results.append((device.match(cost, **options), *device.backward(grad, cost, **options)))
    device.resize()
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poison_stays_in_its_problem(device, dtype):
    device.resize(1)
    cost = random(10, 3, 12, dtype=dtype)
    clean = device.match(cost, n_grad=3), *device.backward(cost, cost, n_grad=3)
    bad = cost.clone()
    bad[1, 2, 3], bad[4, 0, 0], bad[8, 1, 11] = torch.nan, torch.inf, -torch.inf
    poisoned = device.match(bad, n_grad=3), *device.backward(cost, bad, n_grad=3)
    for a, b in zip(clean, poisoned):
        for i in range(10):
            assert b[i].isnan().all() if i in (1, 4, 8) else torch.equal(a[i], b[i])
    own = random(10, 3, dtype=dtype, seed=5)
    clean = device.match(cost, n_grad=3, unmatched_cost=own), *device.backward(cost, cost, n_grad=3, unmatched_cost=own)
    own[2, 1], own[7, 0] = torch.inf, torch.nan
    poisoned = device.match(cost, n_grad=3, unmatched_cost=own), *device.backward(cost, cost, n_grad=3, unmatched_cost=own)
    for a, b in zip(clean, poisoned):
        for i in range(10):
            assert b[i].isnan().all() if i in (2, 7) else torch.equal(a[i], b[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_out_of_range_give_nan(device, dtype):
    cost = random(4, 3, 12, dtype=dtype)
    counts = dict(num_templates=torch.tensor([3, -1, 4, 3]), num_proposals=torch.tensor([12, 12, 12, 1 << 40]))
    for result in (device.match(cost, **counts), *device.backward(cost, cost, **counts)):
        assert not result[0].isnan().any() and result[1:].isnan().all()

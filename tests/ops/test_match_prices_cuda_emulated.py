"""The CUDA kernels of dmm::match_prices without a GPU, as test_match_cuda_emulated.py does it."""

from __future__ import annotations

import pytest
import torch
from helpers.emulated import Device, random

from dmm_fast.ops import reference

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}


class Prices(Device):
    def __call__(
        self, cost, grad, *, n_grad=8, n_proj=1, lr=10.0, last=True, num_templates=None, num_proposals=None,
        unmatched_cost=None, **where,
    ):  # fmt: skip
        """X, and the gradients of <grad, X> in cost and lr. where: see `resize`."""
        self.resize(**where)
        options = dict(
            n_grad=n_grad, n_proj=n_proj, lr=lr, last=last, num_templates=num_templates, num_proposals=num_proposals,
            unmatched_cost=unmatched_cost,
        )  # fmt: skip
        return self.forward(cost, **options), *self.backward(grad, cost, **options)


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return Prices("match_prices", tmp_path_factory.mktemp("emulated"), starts=False)


def check(
    device, cost, n_grad=8, lr=10.0, last=True, n_proj=1, num_templates=None, num_proposals=None, unmatched_cost=None, **where
):
    """Against autograd through the float64 reference."""
    grad = random(*cost.shape, dtype=cost.dtype, seed=3) - 0.5
    options = dict(n_grad=n_grad, n_proj=n_proj, num_templates=num_templates, num_proposals=num_proposals)
    options["unmatched_cost"] = None if unmatched_cost is None else unmatched_cost.double()
    leaf = cost.double().requires_grad_()
    rate = torch.as_tensor(lr, dtype=torch.float64).expand(cost.shape[0]).clone().requires_grad_()
    x = reference.match_prices(leaf, lr=rate, output="last" if last else "average", **options)
    expected = x.detach(), *torch.autograd.grad(x, (leaf, rate), grad.double())
    actual = device(cost, grad, lr=lr, last=last, **options, **where)
    for name, got, want in zip(("X", "grad_cost", "grad_lr"), actual, expected):
        tolerance = TOLERANCE[cost.dtype]
        atol = tolerance * max(1.0, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=atol, msg=lambda m: f"{name}: {m}")


OUTPUTS = pytest.mark.parametrize("last", [True, False], ids=["last", "average"])


@OUTPUTS
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (2, 1, 50), (2, 5, 50), (1, 5, 100), (1, 10, 33), (1, 9, 70), (1, 16, 64), (1, 16, 128), (2, 7, 3)],
    ids=str,
)
def test_a_warp_per_problem(device, shape, last):
    check(device, random(*shape), lr=4.0, last=last)


@OUTPUTS
@pytest.mark.parametrize("shape", [(1, 17, 5), (1, 3, 140), (4, 3, 7)], ids=str)
def test_general(device, shape, last):
    check(device, random(*shape, dtype=torch.float64), lr=4.0, n_grad=6, last=last)
    if shape[1] > 16 or shape[2] > 128:
        check(device, random(*shape), lr=4.0, n_grad=6, last=last)


@OUTPUTS
@pytest.mark.parametrize("shape", [(2, 1, 50), (2, 5, 50), (1, 5, 100), (1, 10, 33), (1, 16, 128), (2, 7, 3)], ids=str)
def test_templates_that_may_stay_alone(device, shape, last):
    own = random(*shape[:2], seed=5) * 0.3
    check(device, random(*shape), lr=4.0, last=last, unmatched_cost=own)
    check(device, random(*shape), lr=4.0, last=last, unmatched_cost=own, n_grad=4, n_proj=2, processors=1, shared_bytes=2 << 10)


@OUTPUTS
@pytest.mark.parametrize("shape", [(1, 17, 5), (1, 3, 140), (1, 40, 33)], ids=str)
def test_templates_that_may_stay_alone_in_general(device, shape, last):
    own = random(shape[1], seed=5) * 0.3
    for dtype in (torch.float32, torch.float64):
        check(device, random(*shape, dtype=dtype), lr=4.0, n_grad=6, last=last, unmatched_cost=own)


def test_forty_rounds_decide(device):
    cost = random(4, 5, 50)
    x, *_ = device(cost, cost, n_grad=40)
    assert torch.equal(x.argmax(-1), reference.match_prices(cost.double()).argmax(-1))
    check(device, random(1, 5, 9, dtype=torch.float64), n_grad=40)


@OUTPUTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 5, 50), (1, 3, 140)], ids=str)
def test_half_precision_in_and_out(device, shape, dtype, last):
    check(device, random(*shape, dtype=dtype), lr=1.0, n_grad=4, last=last)


@OUTPUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ragged_lr_and_rounds(device, dtype, last):
    cost = random(8, 11, 20, dtype=dtype)
    n = torch.tensor([11, 1, 0, 3, 5, 6, 10, 1])
    m = torch.tensor([20, 7, 4, 0, 1, 19, 16, 1])
    for b in range(8):
        cost[b, n[b] :] = torch.nan
        cost[b, :, m[b] :] = torch.inf
    lr = torch.linspace(0.5, 4.0, 8, dtype=dtype)
    check(device, cost, num_templates=n, num_proposals=m, lr=lr, n_grad=4, n_proj=2, last=last)
    own = random(8, 11, dtype=dtype, seed=2) * 0.5
    for b in range(8):
        own[b, n[b] :] = torch.nan
    check(device, cost, num_templates=n, num_proposals=m, lr=lr, n_grad=4, n_proj=2, last=last, unmatched_cost=own)


@OUTPUTS
@pytest.mark.parametrize(
    "shape, shared_bytes", [((10, 4, 20), 2 << 10), ((1, 16, 100), 10 << 10), ((3, 2, 140), 1 << 10)], ids=str
)
def test_bits_and_arrays_that_do_not_fit_shared_memory(device, shape, shared_bytes, last):
    check(device, random(*shape), lr=2.0, n_grad=9, n_proj=2, last=last, shared_bytes=shared_bytes, processors=1)


@pytest.mark.parametrize("shape, shared_bytes", [((1, 17, 9), 99 << 10), ((3, 2, 140), 1 << 10)], ids=str)
def test_the_order_of_threads_does_not_matter(device, shape, shared_bytes):
    cost, grad = random(*shape), random(*shape, seed=1) - 0.5
    first, last = (
        device(
            cost,
            grad,
            n_grad=3,
            last=False,
            unmatched_cost=random(shape[1], seed=5) * 0.3,
            shared_bytes=shared_bytes,
            processors=1,
            last_thread_first=order,
        )
        for order in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_poison_stays_in_its_problem(device, dtype):
    cost, lr = random(8, 3, 12, dtype=dtype), torch.full((8,), 10.0)
    clean = device(cost, cost, lr=lr, n_grad=3, last=False)
    bad = cost.clone()
    bad[1, 2, 3], bad[4, 0, 0], bad[5, 1, 11] = torch.nan, torch.inf, -torch.inf
    lr[6], lr[7] = 0.0, torch.nan
    for a, b in zip(clean, device(bad, cost, lr=lr, n_grad=3, last=False)):
        for i in range(8):
            assert b[i].isnan().all() if i in (1, 4, 5, 6, 7) else torch.equal(a[i], b[i])
    own = random(8, 3, dtype=dtype, seed=5)
    clean = device(cost, cost, n_grad=3, last=False, unmatched_cost=own)
    own[2, 1], own[7, 0] = torch.inf, torch.nan
    for a, b in zip(clean, device(cost, cost, n_grad=3, last=False, unmatched_cost=own)):
        for i in range(8):
            assert b[i].isnan().all() if i in (2, 7) else torch.equal(a[i], b[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_out_of_range_give_nan(device, dtype):
    cost = random(4, 3, 12, dtype=dtype)
    counts = dict(num_templates=torch.tensor([3, -1, 4, 3]), num_proposals=torch.tensor([12, 12, 12, 1 << 40]))
    for result in device(cost, cost, **counts):
        assert not result[0].isnan().any() and result[1:].isnan().all()

"""dmm_fast.match: what it has beyond every layer (test_layer.py): a start, and the paper's relatives of Algorithm 1."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import dmm_fast
from dmm_fast.ops import reference

COST = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))


def test_gradient_only_where_asked():
    cost, init = torch.rand(3, 4), torch.rand(3, 4, requires_grad=True)
    dmm_fast.match(cost, init).sum().backward()
    assert init.grad.abs().sum() > 0 and cost.grad is None
    assert not dmm_fast.match(cost).requires_grad
    with torch.no_grad():
        assert not dmm_fast.match(cost, init).requires_grad


@pytest.mark.parametrize(
    "init, message",
    [
        (COST.double(), r"init must be Float, got Double"),
        (COST[0], r"init must have the shape of cost \[2, 3, 4\], got \[3, 4\]"),
    ],
)
def test_a_start_that_does_not_fit(init, message):
    with pytest.raises(RuntimeError, match=f"dmm::match: {message}"):
        dmm_fast.match(COST, init)


@pytest.mark.parametrize("option", [dict(dykstra="nope"), dict(dykstra="released")])
def test_bad_option(option):
    with pytest.raises(ValueError, match="match: dykstra must be"):
        dmm_fast.match(COST, **option)


@pytest.mark.gpu
def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="init must be on the device of cost"):
        dmm_fast.match(COST.cuda(), COST)


def test_reference_backend_is_the_reference():
    for dykstra, output in itertools.product(reference.DYKSTRA, reference.OUTPUT):
        options = dict(n_grad=5, dykstra=dykstra, output=output)
        assert torch.equal(dmm_fast.match(COST, backend="reference", **options), reference.match(COST, **options))


def literal_dykstra(cost: Tensor, own: Tensor, n_grad: int, n_proj: int, lr: float) -> Tensor:
    """Algorithm 1 of one problem, with rows that sum to at most 1, to the letter."""
    n, m = cost.shape
    x, total = torch.zeros_like(cost), torch.zeros_like(cost)

    def rows(y):
        return y - (y.sum(1, keepdim=True) - 1).clamp(min=0) / m

    def columns(y):
        return y - (y.sum(0, keepdim=True) - 1).clamp(min=0) / n

    for _ in range(n_grad):
        x = x - lr * (cost - own[:, None])
        corrections = [torch.zeros_like(x) for _ in range(3)]
        for _ in range(n_proj):
            for i, project in enumerate((rows, columns, torch.relu)):
                y = x + corrections[i]
                x = project(y)
                corrections[i] = y - x
        total += x
    return total / n_grad


@pytest.mark.parametrize("shape", [(5, 50), (7, 3), (1, 9), (10, 20), (3, 1)], ids=str)
def test_unmatched_cost_is_literal_dykstra(shape):
    for _ in range(10):
        cost, own = torch.rand(shape, dtype=torch.float64), torch.rand(shape[0], dtype=torch.float64) * 0.6
        expected = literal_dykstra(cost, own, 20, 5, 0.1)
        for backend in ("native", "reference"):
            x = dmm_fast.match(cost, n_grad=20, unmatched_cost=own, backend=backend)
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-14)
    assert 0 < dmm_fast.match(cost, n_grad=3, unmatched_cost=0.4, dykstra="released", backend="reference").sum() < 2 * shape[0]

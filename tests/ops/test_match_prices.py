"""dmm_fast.match_prices: what it has beyond every layer (test_layer.py): it decides."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import DEVICES
from torch import Tensor

import dmm_fast
from dmm_fast.ops import reference

on_devices = pytest.mark.parametrize("device", DEVICES)


def contested(N: int, M: int, count: int) -> Tensor:
    """Random problems in which two templates have their cheapest proposal in common: ``[count, N, M]``."""
    cost = torch.rand(20 * count, N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    choice = cost.argmin(-1).sort(-1).values  # [B, N]
    return cost[(choice.diff() == 0).any(-1)][:count]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("output, share", [("last", 0.97), ("average", 0.95)])
def test_decides_like_hungarian(output, share, dtype, device):
    """What this op is for; the paper's setting agrees in .04 of these problems."""
    cost = contested(5, 50, 200)
    x = dmm_fast.match_prices(cost.to(device, dtype), output=output).cpu().double()
    choice, best = x.argmax(-1), dmm_fast.hungarian(cost).argmax(-1)
    assert (choice == best).all(-1).double().mean() >= share
    assert (dmm_fast.match(cost).argmax(-1) == best).all(-1).double().mean() < 0.2
    if output == "last":
        residual = reference.feasibility(x)
        assert residual["rows"].median() < 1e-2 and residual["columns"].median() < 1e-2


LARGE = torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(0)) * 3000


@on_devices
@pytest.mark.parametrize("cost", [torch.zeros(2, 4, 9), torch.ones(20, 4, 9) * 5000, LARGE], ids=["zero", "constant", "large"])
def test_constant_and_large_costs_stay_finite(cost, device):
    leaf_cost = cost.to(device).requires_grad_()
    x = dmm_fast.match_prices(leaf_cost, output="average")
    x.square().sum().backward()
    assert x.isfinite().all() and leaf_cost.grad.isfinite().all()


@on_devices
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
def test_a_step_size_that_is_not_positive_is_nan_and_alone(bad, backend, device):
    cost = torch.rand(3, 4, 20, device=device)
    lr = torch.tensor([10, bad, 10], device=device)
    x = dmm_fast.match_prices(cost, lr=lr, backend=backend)
    assert x[1].isnan().all()
    torch.testing.assert_close(x[::2], dmm_fast.match_prices(cost, backend=backend)[::2])


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_decides_who_stays_alone(dtype, device):
    """Pairs of near duplicates at a cost at which two fifths of the templates stay alone."""
    cost = torch.rand(200, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    cost[..., 6:] = cost[..., :6] + 0.02 * cost[..., 6:]
    best = dmm_fast.linear_assignment(cost, unmatched_cost=0.12)
    x = dmm_fast.match_prices(cost.to(device, dtype), unmatched_cost=0.12).cpu()
    choice = x.argmax(-1).where(x.sum(-1) > 0.5, -1)
    assert 0.3 < (best < 0).double().mean() < 0.5
    assert (choice == best).all(-1).double().mean() > 0.9
    assert torch.equal(dmm_fast.assign(x, unmatched=True), choice)

"""dmm_fast.match: what it has beyond every layer (test_layer.py): a start, and the paper's relatives of Algorithm 1."""

from __future__ import annotations

import itertools

import pytest
import torch

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

"""Ways to decide beside the layers: greedy, Hungarian, Sinkhorn; rounding; and how far X is from feasible."""

from __future__ import annotations

import pytest
import torch

import dmm_fast


@pytest.mark.parametrize(
    "name", ["match", "match_prices", "greedy", "hungarian", "sinkhorn", "assign", "mask_confident", "feasibility"]
)
def test_a_list_is_refused(name):
    with pytest.raises(TypeError, match=rf"{name}: takes a tensor \[N, M\] or \[B, N, M\], got list"):
        getattr(dmm_fast, name)([[0.1, 0.2], [0.3, 0.4]])


@pytest.mark.parametrize("name", ["greedy", "hungarian", "sinkhorn", "assign"])
def test_peers_check_the_shape(name):
    with pytest.raises(ValueError, match=rf"{name}: must have shape \[B, N, M\] or \[N, M\], got \[4\]"):
        getattr(dmm_fast, name)(torch.rand(4))


def test_assign_and_feasibility_know_what_is_there():
    counts = dict(num_templates=torch.tensor([2, 3, 3]), num_proposals=torch.tensor([4, 1, 4]))
    cost = torch.rand(3, 3, 4)
    cost[2, 0, 0] = torch.nan
    x = dmm_fast.match(cost, **counts, n_grad=400, n_proj=50)
    choice = dmm_fast.assign(x, **counts)
    assert choice[0, 2] == -1 and len(set(choice[0, :2].tolist())) == 2  # no third template; one proposal each
    assert sorted(choice[1].tolist()) == [-1, -1, 0]  # one proposal for three
    assert choice[2].eq(-1).all()  # not finite, and alone in that
    residual = dmm_fast.feasibility(x, num_templates=counts["num_templates"])
    assert residual["rows"][0] < 0.05 and residual["columns"].shape == (3,) and residual["sign"][0] == 0
    assert dmm_fast.feasibility(torch.zeros(0, 4))["rows"] == 0
    single = dmm_fast.feasibility(x[0], num_templates=counts["num_templates"][:1])
    assert {name: value.shape for name, value in single.items()} == dict.fromkeys(("rows", "columns", "sign"), ())
    assert single["rows"] == residual["rows"][0]


def test_peers_solve_what_they_should():
    from itertools import permutations

    torch.manual_seed(0)
    cost = torch.rand(20, 3, 5, dtype=torch.float64)
    best = torch.stack([cost[:, range(3), list(p)].sum(1) for p in permutations(range(5), 3)]).amin(0)  # [B]
    for solve, optimal in ((dmm_fast.hungarian, True), (dmm_fast.greedy, False)):
        x = solve(cost)
        assert x.sum(2).eq(1).all() and x.sum(1).le(1).all()
        gap = (x * cost).sum((1, 2)) - best
        assert gap.min() > -1e-12 and (gap.max() < 1e-12) == optimal
    soft = dmm_fast.sinkhorn(cost)
    assert (soft.sum(1) <= 1 + 1e-9).all() and ((soft * cost).sum((1, 2)) - best).min() > -0.05
    kept = dmm_fast.mask_confident(soft)
    assert torch.equal((kept > 0).sum(2), torch.ones(20, 3, dtype=torch.int64)) and torch.equal(kept.amax(2), soft.amax(2))


def test_peers_take_ragged_and_broken_batches():
    """Against one problem at a time; padding holds NaN, one problem does too."""
    from scipy.optimize import linear_sum_assignment

    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(40, 6, 7, generator=generator)
    n, m = torch.randint(0, 7, (40,), generator=generator), torch.randint(0, 8, (40,), generator=generator)
    n[3], m[3] = 4, 5
    for b in range(40):
        cost[b, n[b] :], cost[b, :, m[b] :] = torch.nan, torch.inf
    cost[3, 1, 2] = torch.nan
    optimal, near = (solve(cost, num_templates=n, num_proposals=m) for solve in (dmm_fast.hungarian, dmm_fast.greedy))
    choice = dmm_fast.assign(1 - cost, num_templates=n, num_proposals=m)
    for b in range(40):
        inner = cost[b, : n[b], : m[b]]
        for x in (optimal[b], near[b]):
            assert x[n[b] :].eq(0).all() and x[:, m[b] :].eq(0).all()
        if b == 3:
            assert optimal[b, :4, :5].isnan().all() and near[b, :4, :5].isnan().all() and choice[b].eq(-1).all()
            continue
        row, column = linear_sum_assignment(inner.numpy())
        assert optimal[b].nonzero().tolist() == [[i, j] for i, j in zip(row, column)]
        assert choice[b, row].tolist() == column.tolist() and (choice[b] >= 0).sum() == len(row)
        free, pairs = inner.clone(), set()
        for _ in range(min(inner.shape)):
            i, j = divmod(int(free.argmin()), inner.shape[1])
            free[i], free[:, j] = torch.inf, torch.inf
            pairs.add((i, j))
        assert {tuple(pair) for pair in near[b].nonzero().tolist()} == pairs


@pytest.mark.parametrize("own", [None, 0.2])
@pytest.mark.parametrize("name", ["match", "match_prices", "greedy", "hungarian", "sinkhorn", "linear_assignment"])
def test_padding_is_as_if_cut_off(name, own):
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(8, 4, 6, generator=generator, dtype=torch.float64)
    n, m = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4]), torch.tensor([6, 6, 5, 4, 0, 1, 2, 3])
    solve = getattr(dmm_fast, name)
    for padding in (cost, torch.full_like(cost, torch.nan)):
        given = cost.clone()
        for b in range(8):
            given[b, n[b] :], given[b, :, m[b] :] = padding[b, n[b] :], padding[b, :, m[b] :]
        x = solve(given, num_templates=n, num_proposals=m, unmatched_cost=own)
        for b in range(8):
            alone = solve(cost[b, : n[b], : m[b]], unmatched_cost=own)
            cut = x[b, : n[b]] if name == "linear_assignment" else x[b, : n[b], : m[b]]
            torch.testing.assert_close(cut, alone)
            assert x[b, n[b] :].eq(-1 if name == "linear_assignment" else 0).all()


def test_peers_leave_templates_alone():
    generator = torch.Generator().manual_seed(0)
    cost, own = torch.rand(40, 4, 6, generator=generator), torch.rand(40, 4, generator=generator) * 0.4
    counts = dict(
        num_templates=torch.randint(0, 5, (40,), generator=generator),
        num_proposals=torch.randint(0, 7, (40,), generator=generator),
    )
    best = dmm_fast.linear_assignment(cost, unmatched_cost=own, **counts)
    x = dmm_fast.hungarian(cost, unmatched_cost=own, **counts)
    assert torch.equal(x.argmax(-1).where(x.sum(-1) > 0, -1), best)
    assert torch.equal(dmm_fast.assign(x, unmatched=True, **counts), best)
    near = dmm_fast.greedy(cost, unmatched_cost=own, **counts)
    gain = own[..., None] - cost
    for b in range(40):
        inner = gain[b, : counts["num_templates"][b], : counts["num_proposals"][b]].clone()
        pairs = set()
        while inner.numel() and inner.max() >= 0:
            i, j = divmod(int(inner.argmax()), inner.shape[1])
            inner[i], inner[:, j] = -1, -1
            pairs.add((i, j))
        assert {tuple(pair) for pair in near[b].nonzero().tolist()} == pairs
    assert ((x - near) * gain).sum((1, 2)).min() > -1e-6  # the optimum saves most
    soft = dmm_fast.sinkhorn(cost, unmatched_cost=own, temperature=0.01, rounds=500, **counts)
    assert ((soft.sum(2) > 0.5) == (best >= 0)).double().mean() > 0.95
    for name in ("greedy", "sinkhorn"):
        with pytest.raises(ValueError, match=rf"{name}: unmatched_cost must have shape \[4\] or \[40, 4\], got \[3\]"):
            getattr(dmm_fast, name)(cost, unmatched_cost=torch.rand(3))


def test_peers_take_one_unmatched_cost_for_all():
    cost, one = torch.rand(8, 4, 6), torch.nn.Parameter(torch.tensor(0.2))
    for name in ("greedy", "hungarian", "sinkhorn", "linear_assignment"):
        solve = getattr(dmm_fast, name)
        for given in (cost, cost[0]):
            assert torch.equal(solve(given, unmatched_cost=one), solve(given, unmatched_cost=0.2)), name
    each = one.detach().expand(4).clone().requires_grad_()
    for own in (one, each):
        dmm_fast.sinkhorn(cost, unmatched_cost=own).sum().backward()
    torch.testing.assert_close(one.grad, each.grad.sum())


@pytest.mark.parametrize("name", ["greedy", "hungarian", "sinkhorn", "linear_assignment", "assign", "feasibility"])
def test_counts_are_tensors(name):
    with pytest.raises(TypeError, match=rf"{name}: num_templates takes an int64 tensor \[B\], got list"):
        getattr(dmm_fast, name)(torch.rand(2, 3, 4), num_templates=[2, 3])


@pytest.mark.parametrize("name", ["greedy", "sinkhorn", "hungarian"])
def test_counts_out_of_range(name, monkeypatch):
    """NaN throughout the problem, and the others as they are. hungarian does so on CUDA, where the op cannot raise: what the op
    answers there stands in for it here."""
    decide, cost = getattr(dmm_fast, name), torch.rand(3, 3, 4)
    expected = decide(cost, num_templates=torch.tensor([2, 3, 3]))
    if name == "hungarian":
        own = torch.tensor([[9.0, 9, torch.nan], [9, 9, 9], [9, torch.inf, 9]])  # the first is padding
        choice = expected.argmax(2).masked_fill(expected.sum(2) == 0, -1)
        monkeypatch.setattr(torch.ops.dmm, "linear_assignment", lambda *given: choice)
        unmatched = decide(cost, num_templates=torch.tensor([2, 3, 3]), unmatched_cost=own)
        assert torch.equal(unmatched[:2], expected[:2]) and unmatched[2].isnan().all()
    for wrong in (4, -1):
        x = decide(cost, num_templates=torch.tensor([2, wrong, 3]))
        assert torch.equal(x[::2], expected[::2]) and x[1].isnan().all(), wrong
    x = decide(cost, num_templates=torch.tensor([2, 3, 3]), num_proposals=torch.tensor([4, 5, 4]))
    assert torch.equal(x[::2], expected[::2]) and x[1].isnan().all()
    with pytest.raises(RuntimeError, match=r"num_templates must have shape \[3\], got \[2\]"):
        decide(cost, num_templates=torch.tensor([2, 3]))


def test_sinkhorn_has_a_gradient_in_unmatched_cost():
    cost, own = torch.rand(2, 3, 4, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    leaves = cost.requires_grad_(), own.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, o: dmm_fast.sinkhorn(c, unmatched_cost=o, rounds=5, temperature=0.3), leaves)
    for far, all_matched in ((10.0, True), (-10.0, False)):
        x = dmm_fast.sinkhorn(cost, unmatched_cost=far)
        assert x.sum(2).sub(float(all_matched)).abs().max() < 1e-4


def test_unmatched_rows_may_lack():
    x = torch.tensor([[0.6, 0.1], [0.0, 0.2]])
    assert dmm_fast.feasibility(x)["rows"] == pytest.approx(0.8) and dmm_fast.feasibility(x, unmatched=True)["rows"] == 0
    assert dmm_fast.assign(x).tolist() == [0, 1] and dmm_fast.assign(x, unmatched=True).tolist() == [0, -1]
    padded = torch.tensor([[[0.6, torch.nan], [torch.inf, 0.0]]])
    counts = dict(num_templates=torch.tensor([1]), num_proposals=torch.tensor([1]))
    assert dmm_fast.assign(padded, unmatched=True, **counts).tolist() == [[0, -1]]

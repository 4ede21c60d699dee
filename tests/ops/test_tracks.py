"""Tracks over several frames: against the exact answer of an integer program, and what is promised of bound, gap and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_matrix
from torch import Tensor

import dmm_fast
from dmm_fast.ops import tracks as tracks_module
from dmm_fast.ops.tracks import Tracks


def best(C: Tensor, L: Tensor, own: Tensor) -> float:
    """The least cost, by integer programming: x for states, y for their links. C may be infinite; own [W, N]."""
    W, N, M = C.shape
    S = M + 1
    unary = torch.cat([C, own[..., None]], 2).numpy()
    link = torch.nn.functional.pad(L, (0, 1, 0, 1)).numpy()
    x = np.arange(W * N * S).reshape(W, N, S)
    y = W * N * S + np.arange((W - 1) * N * S * S).reshape(W - 1, N, S, S)
    costs = np.concatenate([unary.ravel(), np.broadcast_to(link[:, None], y.shape).ravel()])
    forbidden = ~np.isfinite(costs)
    rows, low, high = [], [], []

    def rule(plus: np.ndarray, minus: tuple[int, ...], least: float, most: float) -> None:
        rows.append((plus.ravel(), minus))
        low.append(least)
        high.append(most)

    for w in range(W):
        for n in range(N):
            rule(x[w, n], (), 1, 1)
            for s in range(S) if w < W - 1 else ():
                rule(y[w, n, s], (x[w, n, s],), 0, 0)
                rule(y[w, n, :, s], (x[w + 1, n, s],), 0, 0)
        for m in range(M):
            rule(x[w, :, m], (), 0, 1)
    A = lil_matrix((len(rows), len(costs)))
    for k, (plus, minus) in enumerate(rows):
        A[k, plus] = 1
        for place in minus:
            A[k, place] = -1
    found = milp(
        np.where(forbidden, 0, costs), constraints=LinearConstraint(A.tocsr(), low, high), integrality=np.ones(len(costs)),
        bounds=Bounds(0, np.where(forbidden, 0, 1)),
    )  # fmt: skip
    assert found.success
    return found.fun


def problem(seed: int, W: int = 4, N: int = 3, M: int = 5) -> tuple[Tensor, Tensor]:
    """Templates and proposals that move, in two dimensions; links cost how far they are apart. Every third one is pure noise."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if seed % 3 == 0:
        return rand(W, N, M), rand(W - 1, M, M)
    places = rand(1, M, 2) + 0.15 * torch.randn(W, M, 2, generator=generator, dtype=torch.float64).cumsum(0)
    looks = rand(N, 1) - rand(1, M)
    return looks.abs() + 0.3 * rand(W, N, M), torch.cdist(places[:-1], places[1:])


def paid(tracks: Tracks, C: Tensor, L: Tensor, own: Tensor) -> float:
    """What the tracks cost, counted anew; and they are one-to-one."""
    total = 0.0
    for w, row in enumerate(tracks.choice.tolist()):
        taken = [m for m in row if m >= 0]
        assert len(set(taken)) == len(taken)
        total += sum(C[w, n, m].item() if m >= 0 else own[w, n].item() for n, m in enumerate(row))
        if w:
            before = tracks.choice[w - 1].tolist()
            total += sum(L[w - 1, a, b].item() for a, b in zip(before, row) if a >= 0 and b >= 0)
    return total


@pytest.mark.parametrize("alone", [None, 0.5])
def test_against_an_integer_program(alone):
    optimal, proven = 0, 0
    for seed in range(40):
        C, L = problem(seed, W=3 + seed % 3, M=4 + seed % 2)
        own = torch.full(C.shape[:2], 100.0 if alone is None else alone, dtype=torch.float64)
        tracks = dmm_fast.match_tracks(C, L, unmatched_cost=alone)
        least = best(C, L, own)
        assert tracks.bound.item() - 1e-6 <= least <= tracks.cost.item() + 1e-6
        assert tracks.cost.item() == pytest.approx(paid(tracks, C, L, own))
        optimal += tracks.cost.item() < least + 1e-6
        proven += (tracks.cost - tracks.bound).item() < 1e-6
    assert optimal >= 38 and proven >= 28, (optimal, proven)


def test_ragged_frames_and_forbidden_pairs():
    C, L = problem(4, W=4, N=2, M=5)
    counts = torch.tensor([5, 3, 1, 4])
    C[1, 0, 0] = torch.inf
    for w, count in enumerate(counts):
        C[w, :, count:] = torch.nan
        if w:
            L[w - 1, :, count:] = torch.nan
        if w < 3:
            L[w, count:] = torch.nan
    cut, finite = C.clone(), L.nan_to_num(0)
    for w, count in enumerate(counts):
        cut[w, :, count:] = torch.inf
    tracks = dmm_fast.match_tracks(C, L, unmatched_cost=0.4, num_proposals=counts)
    own = torch.full((4, 2), 0.4, dtype=torch.float64)
    assert tracks.cost.item() == pytest.approx(best(cut, finite, own)) == pytest.approx(paid(tracks, C, L, own))
    assert (tracks.choice < counts[:, None]).all() and tracks.choice[1, 0] != 0
    assert torch.isfinite(tracks.assignment).all() and (tracks.assignment[2, :, 1:] == 0).all()
    every = dmm_fast.match_tracks(C, L, num_proposals=counts)
    assert (every.choice >= 0).sum() == 7  # all but one, where there is one proposal for two templates


def test_links_decide_where_looks_do_not():
    """Two alike objects cross: by looks alone they are the same, by motion they are not."""
    W = 6
    left, right = torch.arange(0.0, W), torch.arange(W - 1.0, -1, -1)
    places = torch.stack([left, right], 1)  # [W, M]
    places[4] = places[4].flip(0)  # the order of proposals means nothing
    C = torch.zeros(W, 2, 2)
    C[0] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    expected = places[:-1] + torch.tensor([1.0, -1.0])  # where each would be next
    expected[4] = places[4] + torch.tensor([-1.0, 1.0])
    L = (expected[:, :, None] - places[1:, None]).abs()
    tracks = dmm_fast.match_tracks(C, L)
    followed = places.gather(1, tracks.choice)
    torch.testing.assert_close(followed, torch.stack([left, right], 1))
    assert tracks.cost == tracks.bound == 0
    assert torch.equal(tracks.assignment.argmax(2), tracks.choice)


def test_one_frame_is_an_assignment():
    C = torch.rand(1, 4, 6)
    tracks = dmm_fast.match_tracks(C, torch.zeros(0, 6, 6), unmatched_cost=torch.full((4,), 0.2))
    assert torch.equal(tracks.choice[0], dmm_fast.linear_assignment(C[0], unmatched_cost=torch.full((4,), 0.2)))


def test_to_be_left_over_costs_nothing():
    """With more templates than proposals; against an integer program, in which that is the last resort."""
    tracks = dmm_fast.match_tracks(torch.zeros(1, 2, 1), torch.zeros(0, 1, 1))
    assert tracks.cost == tracks.bound == 0
    for seed in range(6):
        C, L = problem(seed, W=3, N=4, M=3)
        tracks = dmm_fast.match_tracks(C, L)
        least = best(C, L, torch.full((3, 4), 100.0, dtype=torch.float64)) - 3 * 100
        assert tracks.bound.item() - 1e-6 <= least <= tracks.cost.item() + 1e-6
        assert tracks.cost.item() == pytest.approx(paid(tracks, C, L, torch.zeros(3, 4))) and (tracks.choice < 0).sum() == 3


@pytest.mark.parametrize("alone", [None, 0.5])
def test_counts_may_be_on_another_device(alone, monkeypatch):
    found = []

    def prices(cost, num_proposals, **options):
        found.append(num_proposals.device)
        return cost

    monkeypatch.setattr(tracks_module, "_check", lambda *given: None)  # which looks at values
    monkeypatch.setattr(tracks_module, "_decompose", lambda costs, rounds: (costs[0][..., 0].long(), costs[0], costs[0].sum()))
    monkeypatch.setattr(tracks_module, "match_prices", prices)
    C, L = torch.rand(3, 2, 4, device="meta"), torch.rand(2, 4, 4, device="meta")
    dmm_fast.match_tracks(C, L, unmatched_cost=alone, num_proposals=torch.tensor([4, 3, 4]))
    assert found == [C.device]


@pytest.mark.parametrize("alone", [False, True])
def test_gradients(alone):
    """Of the soft form, in all costs; the multipliers, which a small change moves too, are taken as they are."""
    C, L = problem(1, W=3, N=2, M=3)
    own = torch.full((2,), 0.6, dtype=torch.float64, requires_grad=True) if alone else None
    C, L = C.requires_grad_(), L.requires_grad_()
    tracks = dmm_fast.match_tracks(C, L, unmatched_cost=own, temperature=0.3, lr=1.0)
    goal = torch.nn.functional.one_hot(tracks.choice.clamp(min=0), 3).flip(2)
    (tracks.assignment * goal).sum().backward()
    assert not tracks.cost.requires_grad and not tracks.bound.requires_grad
    for tensor in (C, L, *([own] if alone else [])):
        assert torch.isfinite(tensor.grad).all() and tensor.grad.abs().sum() > 0


def test_learning_through_tracks():
    """Link costs are learnt until the wanted tracks are the ones found, from a first frame that is known."""
    torch.manual_seed(0)
    C = torch.rand(3, 2, 4)
    wanted = torch.tensor([[0, 1], [3, 2], [1, 0]])
    C[0] = 1 - torch.eye(4)[:2]
    L = torch.zeros(2, 4, 4, requires_grad=True)
    optimizer = torch.optim.Adam([L], 0.1)
    assert not torch.equal(dmm_fast.match_tracks(C, L).choice, wanted)
    losses = []
    for _ in range(30):
        tracks = dmm_fast.match_tracks(C, L, temperature=0.2, rounds=5)
        losses.append(-(tracks.assignment.gather(2, wanted[..., None]) + 1e-3).log().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.equal(dmm_fast.match_tracks(C, L).choice, wanted) and losses[-1] < 0.5 * losses[0]


def test_one_unmatched_cost_for_all():
    C, L, one = torch.rand(3, 2, 4), torch.rand(2, 4, 4), torch.nn.Parameter(torch.tensor(0.3))
    each = one.detach().expand(2).clone().requires_grad_()
    ours, theirs = (dmm_fast.match_tracks(C, L, unmatched_cost=own) for own in (one, each))
    assert torch.equal(ours.choice, theirs.choice) and torch.equal(ours.assignment, theirs.assignment)
    for tracks in (ours, theirs):
        tracks.assignment.square().sum().backward()
    torch.testing.assert_close(one.grad, each.grad.sum())


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(template_costs=torch.rand(3, 2)), RuntimeError, r"template_costs must be float32 or float64 \[W, N, M\]"),
        (dict(link_costs=torch.rand(3, 4, 4)), RuntimeError, r"link_costs must be torch.float32 \[2, 4, 4\] on cpu, got"),
        (dict(link_costs=torch.full((2, 4, 4), torch.inf)), ValueError, "link_costs must be finite"),
        (dict(num_proposals=torch.tensor([1, 2, 5])), RuntimeError, r"num_proposals must be in \[0, 4\], got \[1, 2, 5\]"),
        (dict(num_proposals=[1, 2, 2]), TypeError, r"num_proposals takes an int64 tensor \[3\], got list"),
        (dict(num_proposals=torch.tensor([1, 2])), RuntimeError, r"num_proposals must be int64 \[3\]"),
        (dict(unmatched_cost=float("nan")), ValueError, "unmatched_cost must be finite, got nan"),
        (dict(unmatched_cost=torch.rand(3)), RuntimeError, r"unmatched_cost must have shape \[2\] or \[3, 2\], got \[3\]"),
        (dict(rounds=0), ValueError, "rounds must be at least 1, got 0"),
        (dict(temperature=0.0), ValueError, "temperature must be positive and finite, got 0"),
        (dict(template_costs=[[1.0]]), TypeError, "match_tracks"),
    ],
)
def test_what_is_refused(change, error, message):
    given = dict(template_costs=torch.rand(3, 2, 4), link_costs=torch.rand(2, 4, 4), **{})
    with pytest.raises(error, match=message):
        dmm_fast.match_tracks(**{**given, **change})

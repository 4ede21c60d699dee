"""``dmm_fast.match_tracks``: one track of proposals per template over several frames, by dual decomposition (docs/tracks.md).

minimise sum_w <C_w, X_w> + sum_w sum_n L_w[j_n(w), j_n(w + 1)], where j_n(w) is template n's proposal in frame w and no two
templates share one: the multi-partite matching that the paper leaves for later.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dmm_fast.ops import reference
from dmm_fast.ops.assignment import linear_assignment
from dmm_fast.ops.match import match_prices

Costs = tuple[Tensor, Tensor]  # [W, N, S] by frame, template and state; [W - 1, S, S] from state to state


class Tracks(NamedTuple):
    """What ``match_tracks`` finds."""

    choice: Tensor  # [W, N] int64: the proposal of each template in each frame, -1 for none
    cost: Tensor  # [] of the tracks
    bound: Tensor  # [] no tracks cost less, or without unmatched_cost none with as many proposals: cost - bound is the gap,
    # about 0 where the tracks are proven to be the best
    assignment: Tensor  # [W, N, M] soft, differentiable


def match_tracks(
    template_costs: Tensor,
    link_costs: Tensor,
    *,
    unmatched_cost: float | Tensor | None = None,
    num_proposals: Tensor | None = None,
    rounds: int = 100,
    temperature: float = 0.05,
    n_grad: int = 40,
    lr: float | Tensor = 2.0,
) -> Tracks:
    """One track of proposals for each template through W frames, one-to-one in every frame.

    Two views of the problem must agree on every (frame, template, proposal): the best path of each template alone, and the best
    assignment of each frame alone. A multiplier on each makes them (dual decomposition, by subgradients with Polyak's step); a
    round is one batch of W exact assignments and N shortest paths. Each new set of tracks is then improved frame by frame, exactly,
    with its neighbours held. What no tracks can beat is known too.

    Args:
        template_costs: C, ``[W, N, M]``, float32 or float64. What is not finite is forbidden.
        link_costs: L, ``[W - 1, M, M]``: what it costs to go from a proposal of frame w to one of frame w + 1, same dtype, finite.
        unmatched_cost: c, a finite number, or a tensor ``[]``, ``[N]`` or ``[W, N]``: what it costs a template to have no proposal in a frame; links from and to
            there cost nothing. None: templates have a proposal wherever there are enough; to have none costs nothing.
        num_proposals: int64 ``[W]``: frame w has the first so many. Padding may hold anything.
        rounds: at most so many; fewer where the gap closes.
        temperature: of the soft form, in units of cost: how much worse a path may be and still count.
        n_grad, lr: of ``match_prices``, which makes the soft form one-to-one.

    Returns:
        ``Tracks``. ``assignment`` is X of ``match_prices`` (output="average") on the costs of the best paths through each proposal (at
        `temperature`): it has a gradient in both costs and in unmatched_cost; the rest has none.

    Raises:
        RuntimeError: shapes, dtypes, or counts that don't fit. ValueError: numbers out of range. TypeError: no tensor, or counts in a list.

    The loop asks the device after every round whether to go on.
    """
    _check(template_costs, link_costs, num_proposals, rounds, temperature)
    W, N, M = template_costs.shape
    if num_proposals is not None:
        num_proposals = num_proposals.to(template_costs.device)
    with torch.no_grad():
        unary, link = _states(template_costs.double(), link_costs.double(), unmatched_cost, num_proposals)
        state, multipliers, bound = _decompose((unary, link), rounds)
        cost = _cost(state, (unary, link))
        choice = torch.where(state < M, state, -1)
        if unmatched_cost is None:  # take out what made that the last resort
            penalty = unary[..., M].where(choice < 0, 0).sum()
            cost, bound = cost - penalty, bound - penalty
    soft = _soft(template_costs, link_costs, unmatched_cost, num_proposals, multipliers, temperature, n_grad, lr)
    dtype = template_costs.dtype
    return Tracks(choice, cost.to(dtype), torch.minimum(bound, cost).to(dtype), soft)


def _check(C: Tensor, L: Tensor, counts: Tensor | None, rounds: int, temperature: float) -> None:
    reference.check_tensor("match_tracks", C)
    reference.check_tensor("match_tracks", L)
    if C.dim() != 3 or C.dtype not in (torch.float32, torch.float64) or 0 in C.shape:
        raise RuntimeError(
            f"match_tracks: template_costs must be float32 or float64 [W, N, M] and not empty, got {C.dtype} {list(C.shape)}"
        )
    W, _, M = C.shape
    if tuple(L.shape) != (W - 1, M, M) or L.dtype != C.dtype or L.device != C.device:
        raise RuntimeError(
            f"match_tracks: link_costs must be {C.dtype} [{W - 1}, {M}, {M}] on {C.device}, got {L.dtype} {list(L.shape)} on {L.device}"
        )
    reference.check_counts("match_tracks", None, counts, f"[{W}]")
    if counts is not None:
        if tuple(counts.shape) != (W,) or counts.dtype != torch.int64:
            raise RuntimeError(f"match_tracks: num_proposals must be int64 [{W}], got {counts.dtype} {list(counts.shape)}")
        if ((counts < 0) | (counts > M)).any():
            raise RuntimeError(f"match_tracks: num_proposals must be in [0, {M}], got {counts.tolist()}")
    if not torch.isfinite(L if counts is None else L[_linked(L, counts)]).all():
        raise ValueError("match_tracks: link_costs must be finite; forbid a proposal in template_costs")
    if rounds < 1:
        raise ValueError(f"match_tracks: rounds must be at least 1, got {rounds}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"match_tracks: temperature must be positive and finite, got {temperature:g}")


def _linked(L: Tensor, counts: Tensor) -> Tensor:
    """Which links [W - 1, M, M] join proposals that there are."""
    real = torch.arange(L.shape[2], device=L.device) < counts.to(L.device)[:, None]  # [W, M]
    return real[:-1, :, None] & real[1:, None]


def _states(C: Tensor, L: Tensor, own: float | Tensor | None, counts: Tensor | None) -> Costs:
    """Costs by state, of which the last is to have no proposal: [W, N, M + 1], infinite where forbidden; [W - 1, M + 1, M + 1]."""
    W, N, M = C.shape
    allowed = torch.isfinite(C)
    if counts is not None:
        allowed = allowed & (torch.arange(M, device=C.device) < counts[:, None])[:, None]
        L = L.where(_linked(L, counts), 0)
    if own is None:  # more than all else can cost: to have none is the last resort
        span = C.where(allowed, 0).abs().amax() + 2 * (L.abs().amax() if L.numel() else 0) + 1
        absent = (2 * W * N * span).expand(W, N)
    else:
        absent = _unmatched(C, own)
    unary = torch.cat([C.where(allowed, torch.inf), absent[..., None]], 2)
    return unary, torch.nn.functional.pad(L, (0, 1, 0, 1))


def _unmatched(C: Tensor, own: float | Tensor) -> Tensor:
    """``unmatched_cost`` as [W, N]."""
    W, N, _ = C.shape
    if isinstance(own, Tensor):
        if tuple(own.shape) not in ((), (N,), (W, N)):
            raise RuntimeError(f"match_tracks: unmatched_cost must have shape [{N}] or [{W}, {N}], got {list(own.shape)}")
        if not torch.isfinite(own.detach()).all():
            raise ValueError("match_tracks: unmatched_cost must be finite")
        return own.to(C).expand(W, N)
    if not math.isfinite(own):
        raise ValueError(f"match_tracks: unmatched_cost must be finite, got {own:g}")
    return C.new_full((W, N), own)


# ---- the decision ----


def _decompose(costs: Costs, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best tracks found, as states [W, N]; multipliers [W, N, S]; the best lower bound []."""
    unary, link = costs
    half = unary / 2
    multipliers = torch.zeros_like(unary)
    best = _improve(_assignments(unary), costs)
    least = _cost(best, costs)
    bound, kept = unary.new_tensor(-torch.inf), multipliers
    scale, stalled = 1.0, 0
    largest = unary[torch.isfinite(unary)].abs().amax()
    seen: set[tuple[int, ...]] = set()
    for _ in range(rounds):
        paths, path_cost = _shortest_paths(half + multipliers, link)
        single = _assignments(half - multipliers)
        single_cost = (half - multipliers).gather(2, single[..., None]).sum()
        reached = path_cost.sum() + single_cost
        if reached > bound:
            bound, kept, stalled = reached, multipliers, 0
        else:
            stalled += 1
        for state in (single, _assignments(unary - 10 * largest * _one_hot(paths, unary))):
            if (tracks := tuple(state.flatten().tolist())) in seen:
                continue
            seen.add(tracks)
            better = _improve(state, costs)
            if (cost := _cost(better, costs)) < least:
                best, least = better, cost
        apart = _one_hot(paths, unary) - _one_hot(single, unary)
        difference = apart.square().sum()
        if difference == 0 or least - bound <= 1e-9 * (1 + least.abs()):
            break
        if stalled == 5:
            scale, stalled = scale / 2, 0
        multipliers = multipliers + scale * (least - reached).clamp(min=1e-6) / difference * apart
    return best, kept, bound


def _one_hot(state: Tensor, like: Tensor) -> Tensor:
    return (state[..., None] == torch.arange(like.shape[2], device=like.device)).to(like.dtype)


def _assignments(unary: Tensor) -> Tensor:
    """The best assignment of each frame alone, as states [W, N]."""
    M = unary.shape[2] - 1
    choice: Tensor = linear_assignment(unary[..., :M].contiguous(), unmatched_cost=unary[..., M].contiguous())  # type: ignore[assignment]
    return torch.where(choice < 0, M, choice)


def _shortest_paths(unary: Tensor, link: Tensor) -> tuple[Tensor, Tensor]:
    """The best path of each template alone: states [W, N], costs [N]."""
    reach, origins = unary[0], []
    for frame, step in zip(unary[1:], link):
        best, origin = (reach[:, :, None] + step).min(1)  # [N, S]
        reach = best + frame
        origins.append(origin)
    cost, state = reach.min(1)
    states = [state]
    for origin in reversed(origins):
        state = origin.gather(1, state[:, None])[:, 0]
        states.append(state)
    return torch.stack(states[::-1]), cost


def _cost(state: Tensor, costs: Costs) -> Tensor:
    unary, link = costs
    frames = torch.arange(len(link), device=state.device)[:, None]
    return unary.gather(2, state[..., None]).sum() + link[frames, state[:-1], state[1:]].sum()


def _improve(state: Tensor, costs: Costs) -> Tensor:
    """Frame after frame assigned anew, exactly, given the frames beside it, until nothing changes."""
    unary, link = costs
    W = len(unary)
    least = _cost(state, costs)
    for _ in range(10):
        for w in (*range(W), *range(W - 2, 0, -1)):
            frame = unary[w]
            if w > 0:
                frame = frame + link[w - 1][state[w - 1]]
            if w < W - 1:
                frame = frame + link[w].T[state[w + 1]]
            state = state.clone()
            state[w] = _assignments(frame[None])[0]
        cost = _cost(state, costs)
        if not cost < least:
            break
        least = cost
    return state


# ---- the soft form ----


def _soft(
    C: Tensor, L: Tensor, own: float | Tensor | None, counts: Tensor | None, multipliers: Tensor, temperature: float, n_grad: int,
    lr: float | Tensor,
) -> Tensor:  # fmt: skip
    """[W, N, M]: `match_prices` on the soft costs of each template's paths, and half of the frame's own costs."""
    W, N, M = C.shape
    unary, link = _states(C, L, own, counts)
    allowed = torch.isfinite(unary)
    unary = unary.where(allowed, 1e4 * temperature + unary.detach().where(allowed, 0).abs().amax())
    multipliers = multipliers.to(C)
    frame = unary / 2 - multipliers
    path = _through(unary / 2 + multipliers, link, temperature)
    total = (path - path.detach().amin(2, keepdim=True)) + (frame - frame.detach().amin(2, keepdim=True))
    if own is None:
        return match_prices(total[..., :M], n_grad=n_grad, lr=lr, output="average", num_proposals=counts)
    # A template's own column stands for no proposal.
    dear = total.detach().amax() + 1
    alone = torch.eye(N, dtype=torch.bool, device=C.device)
    columns = torch.where(alone, total[..., M:], dear)  # [W, N, N]
    joined = torch.cat([columns, total[..., :M]], 2)
    counted = None if counts is None else counts + N
    return match_prices(joined, n_grad=n_grad, lr=lr, output="average", num_proposals=counted)[..., N:]


def _through(unary: Tensor, link: Tensor, temperature: float) -> Tensor:
    """-t log sum over the paths through each state of exp(-cost / t), [W, N, S]: forwards, and backwards."""
    score, step = -unary / temperature, -link / temperature
    forwards, backwards = [score[0]], [torch.zeros_like(score[0])]
    for w in range(1, len(score)):
        forwards.append(score[w] + (forwards[-1][:, :, None] + step[w - 1]).logsumexp(1))
    for w in range(len(score) - 1, 0, -1):
        backwards.append(((score[w] + backwards[-1])[:, None] + step[w - 1]).logsumexp(2))
    return -temperature * (torch.stack(forwards) + torch.stack(backwards[::-1]))

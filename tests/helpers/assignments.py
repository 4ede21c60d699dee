"""Problems for the exact assignment, and what every solution of them must be."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dmm_fast.ops import reference


@dataclass
class Sample:
    """One call: ``linear_assignment(cost, **options)``, float64."""

    name: str
    cost: Tensor
    options: dict = field(default_factory=dict)

    def to(self, device, dtype) -> Sample:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        options = {
            key: value.to(device, wide if value.is_floating_point() else None) if isinstance(value, Tensor) else value
            for key, value in self.options.items()
        }
        return Sample(self.name, self.cost.to(device, dtype), options)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(5)

    def rand(*shape):  # float32 numbers: exact in either precision
        return torch.rand(*shape, generator=generator).double()

    def ties(*shape):
        return torch.randint(-2, 4, shape, generator=generator).double()

    def holes(cost, share):
        bad = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=cost.dtype)
        which = torch.randint(0, 3, cost.shape, generator=generator)
        return cost.where(torch.rand(cost.shape, generator=generator) >= share, bad[which])

    ragged = rand(40, 6, 9)
    counts = dict(
        num_templates=torch.randint(0, 7, (40,), generator=generator),
        num_proposals=torch.randint(0, 10, (40,), generator=generator),
    )
    for b in range(40):
        ragged[b, counts["num_templates"][b] :] = torch.nan  # padding may hold anything
        ragged[b, :, counts["num_proposals"][b] :] = -torch.inf
    alike = rand(4, 3, 3, 4).repeat_interleave(4, 1).repeat_interleave(5, 2).sum(-1)  # [4, 12, 15]: groups that compete
    own = torch.randint(-2, 3, (40, 6), generator=generator).double()
    product = torch.arange(1, 18).double()[:, None] * torch.arange(1, 22)  # every path passes through every column
    plain = [
        Sample("one problem", rand(5, 50)),
        Sample("5 x 50", rand(30, 5, 50)),
        Sample("20 x 50", rand(8, 20, 50)),
        Sample("50 x 5", rand(8, 50, 5)),
        Sample("17 x 63", rand(4, 17, 63)),
        Sample("30 x 30", rand(4, 30, 30)),
        Sample("5 x 8", rand(300, 5, 8)),
        Sample("1 x 1", rand(3, 1, 1)),
        Sample("1 x 40", rand(3, 1, 40)),
        Sample("40 x 1", rand(3, 40, 1)),
        Sample("ties", ties(200, 6, 7)),
        Sample("more ties", ties(20, 19, 24)),
        Sample("equal", torch.ones(2, 4, 9, dtype=torch.float64)),
        Sample("alike", alike),
        Sample("product", product[None]),
        Sample("turned product", product.T.contiguous()),
        Sample("large", rand(4, 9, 12) * 2**40),
        Sample("holes", holes(ties(200, 6, 7), 0.6)),
        Sample("more holes", holes(rand(200, 8, 8), 0.8)),
        Sample("holes, turned", holes(ties(200, 8, 5), 0.7)),
        Sample("few columns for many", holes(rand(20, 12, 30), 0.2).index_fill(2, torch.arange(4, 30), torch.inf)),
        Sample("nothing allowed", torch.full((2, 4, 6), torch.inf, dtype=torch.float64)),
        Sample("ragged", ragged, counts),
        Sample("ragged ties", ties(40, 6, 9), counts),
        Sample("no problems", rand(0, 4, 6)),
        Sample("no templates", rand(2, 0, 6)),
        Sample("no proposals", rand(2, 4, 0)),
    ]
    alone = [
        Sample("alone at a number", rand(30, 5, 20), dict(unmatched_cost=0.1)),
        Sample("alone at a negative number", rand(9, 20, 7) - 0.5, dict(unmatched_cost=-0.3)),
        Sample("alone, per template", rand(9, 6, 9), dict(unmatched_cost=rand(6) * 0.4)),
        Sample("alone, per problem", rand(40, 6, 9), dict(unmatched_cost=rand(40, 6) * 0.4)),
        Sample("alone, ties", ties(40, 6, 5), dict(unmatched_cost=own)),
        Sample("alone, ragged ties", ties(40, 6, 9), dict(unmatched_cost=own, **counts)),
        Sample("alone, ragged", ragged, dict(unmatched_cost=rand(40, 6) * 0.4, **counts)),
        Sample("alone, holes", holes(ties(40, 6, 9), 0.6), dict(unmatched_cost=own)),
        Sample("alone, one problem", rand(7, 5), dict(unmatched_cost=rand(7))),
        Sample("alone, no proposals", rand(2, 4, 0), dict(unmatched_cost=1.0)),
        Sample("alone, no templates", rand(2, 0, 4), dict(unmatched_cost=1.0)),
    ]
    return plain + alone


def problems(sample: Sample) -> list[tuple[Tensor, Tensor | None]]:
    """(cost [n, m] with infinity where forbidden, unmatched cost [n] or None) of each problem, float64 on the CPU."""
    cost = sample.cost.double().cpu()
    cost = cost if cost.dim() == 3 else cost[None]
    B, N, M = cost.shape
    rows, columns = (
        [size] * B if counts is None else counts.tolist()
        for counts, size in ((sample.options.get("num_templates"), N), (sample.options.get("num_proposals"), M))
    )
    own = sample.options.get("unmatched_cost")
    own = own if own is None else torch.as_tensor(own, dtype=torch.float64).cpu().expand(B, N)
    inner = [c[:n, :m] for c, n, m in zip(cost, rows, columns)]
    return [(c.where(c.isfinite(), torch.inf), None if own is None else own[b, : c.shape[0]]) for b, c in enumerate(inner)]


def value(cost: Tensor, own: Tensor | None, choice: Tensor) -> tuple[int, float]:
    """How many matches of a problem [n, m], and what they and those left alone cost."""
    row = (choice >= 0).nonzero()[:, 0]
    assert choice[row].unique().numel() == row.numel() and choice.ge(-1).all() and choice.lt(cost.shape[1]).all()
    total = cost[row, choice[row]].sum()
    return row.numel(), float(total if own is None else total + own[choice < 0].sum())


def check(sample: Sample, choice: Tensor, a: Tensor, b: Tensor) -> None:
    """Against scipy: as many matches, the same cost; and the prices prove it without scipy."""
    expected = reference.linear_assignment(sample.cost, **sample.options)
    if sample.cost.dim() == 2:
        choice, a, b, expected = choice[None], a[None], b[None], expected[None]
    choice, a, b, expected = choice.cpu(), a.double().cpu(), b.double().cpu(), expected.cpu()
    rounding = torch.finfo(torch.float64 if sample.cost.dtype == torch.float64 else torch.float32).eps * 32
    for i, (cost, own) in enumerate(problems(sample)):
        n, m = cost.shape
        found, best = value(cost, own, choice[i, :n]), value(cost, own, expected[i, :n])
        assert found[0] == best[0], f"problem {i}: {found[0]} matches, there can be {best[0]}"
        scale = max(1.0, _largest(cost), _largest(a[i]))
        assert abs(found[1] - best[1]) <= 1e-13 * scale * max(1, n), f"problem {i}: costs {found[1]}, optimal is {best[1]}"
        assert choice[i, n:].eq(-1).all() and a[i, n:].eq(0).all() and b[i, m:].eq(0).all()
        _prove(cost, own, choice[i, :n], a[i, :n], b[i, :m], rounding * scale)


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _prove(cost: Tensor, own: Tensor | None, choice: Tensor, a: Tensor, b: Tensor, tolerance: float) -> None:
    """Complementary slackness."""
    slack = cost - a[:, None] - b
    row = (choice >= 0).nonzero()[:, 0]
    assert not slack.lt(-tolerance).any() and not slack.isnan().any()
    assert slack[row, choice[row]].abs().le(tolerance).all()
    left = torch.ones(b.shape, dtype=torch.bool).index_fill(0, choice[row], False)  # [m]
    if own is not None:
        assert a.le(own + tolerance).all() and (a - own)[choice < 0].abs().le(tolerance).all()
        assert b.le(tolerance).all() and b[left].abs().le(tolerance).all()
        return
    for price, alone in ((a, choice < 0), (b, left)):
        if alone.any():
            assert (price[alone] - price.max()).abs().le(tolerance).all()

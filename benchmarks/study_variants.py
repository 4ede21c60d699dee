"""Study: which variant of the matching layer decides like Hungarian at no more than the cost of 40 x 5?

    python benchmarks/study_variants.py [--data DIR] [--write docs/variants.md] [--only decide|sizes|learn]

Measures every variant on contested problems and trains a small embedding through it, then prints the tables, or puts
them between the markers of ``docs/variants.md``. DIR holds the development data (the folder with ``davis16-train``);
without it the real cost matrices are left out. float64, fixed seeds, one thread, about three minutes on a busy machine.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dmm_fast
from dmm_fast.ops import reference

# The settings of Newton prices were chosen on other seeds (1 to 7, and 0 to 2 for learning): these are fresh.
COUNT = 500  # contested problems per family
N, M = 5, 50

# ---- problems --------------------------------------------------------------------------------------------------------


def contested(cost: Tensor) -> Tensor:
    """Where two templates want the same proposal: ``[B, N, M] -> [B]`` bool.

    The row minima are then not one-to-one, so the greedy row argmin is not an assignment; where they are one-to-one,
    they are the optimum, which every method finds. Ties aside, this is "the row argmin differs from Hungarian".
    """
    choice = cost.argmin(-1).sort(-1).values  # [B, N]
    return (choice[:, 1:] == choice[:, :-1]).any(-1)


def random_costs(rng: torch.Generator, batch: int = 1000) -> Tensor:
    """Uniform in [0, 1]: what contests there are, are lost by a small margin."""
    return torch.rand(batch, N, M, generator=rng, dtype=torch.float64)


def video_costs(rng: torch.Generator, batch: int = 1000) -> Tensor:
    """Objects in 3 groups of lookalikes; half of the proposals are clutter, the rest duplicates of the objects.

    1 - similarity: .8 with one's own proposals, .7 with a lookalike's, .2 otherwise; noise .08 a proposal, .04 a pair.
    """
    group = torch.randint(0, 3, (batch, N), generator=rng)
    owner = torch.randint(0, N, (batch, M), generator=rng)
    clutter = torch.rand(batch, 1, M, generator=rng) < 0.5
    own = owner[:, None, :] == torch.arange(N)[None, :, None]  # [B, N, M]
    alike = group.gather(1, owner)[:, None, :] == group[:, :, None]  # [B, N, M]
    similarity = torch.where(clutter, 0.2, torch.where(own, 0.8, torch.where(alike, 0.7, 0.2))).double()
    quality = 0.08 * torch.randn(batch, 1, M, generator=rng, dtype=torch.float64)
    pair = 0.04 * torch.randn(batch, N, M, generator=rng, dtype=torch.float64)
    return 1 - (similarity + quality + pair)


def take(generate: Callable[[torch.Generator], Tensor], seed: int) -> tuple[Tensor, float]:
    """The first ``COUNT`` contested problems, and the share of problems that are contested."""
    rng = torch.Generator().manual_seed(seed)
    kept, seen = [], 0
    while sum(map(len, kept)) < COUNT:
        cost = generate(rng)
        seen += len(cost)
        kept.append(cost[contested(cost)])
    problems = torch.cat(kept)
    return problems[:COUNT], len(problems) / seen


class RealCosts:
    """DAVIS 2016 objects pasted over each other: 1 - IoU of a frame's true masks with the next frame's real proposals.

    A problem takes two sequences and pastes their object 3 and 2 times, each copy from another frame and shifted by up
    to half the object's extent, with the 10 best proposals of the copy's next frame: lookalikes that overlap.
    A tenth of 1 - score is added, as proposals that overlap nothing would all cost the same.
    """

    def __init__(self, data: Path, frames: int = 6):
        from dmm_fast.data.masks import read_mask
        from dmm_fast.proposals.coco import read_coco

        rng = np.random.default_rng(107)
        root = data / "davis16-train"
        self.sequences = []
        for path in sorted((root / "proposals").glob("*.json")):
            stems = sorted(p.stem for p in (root / "Annotations" / path.stem).glob("*.png"))
            proposals = read_coco(path, top=10)
            clips = []
            for index in rng.choice(len(stems) - 1, frames, replace=False):
                mask = read_mask(root / "Annotations" / path.stem / f"{stems[index]}.png")[::2, ::2] > 0  # [H, W]
                found = proposals.frame(stems[index + 1])
                if mask.any() and len(found.scores) >= 2:
                    clips.append((mask, found.masks[:, ::2, ::2].numpy(), found.scores.double().numpy()))
            if len(clips) >= 3:
                self.sequences.append(clips)

    def __call__(self, rng: torch.Generator, batch: int = 400) -> Tensor:
        draw = np.random.default_rng(int(torch.randint(0, 2**31, (), generator=rng)))
        return torch.stack([self._problem(draw) for _ in range(batch)])

    def _problem(self, draw: np.random.Generator) -> Tensor:
        templates, masks, scores = [], [], []
        for sequence, copies in zip(draw.choice(len(self.sequences), 2, replace=False), (3, 2)):
            clips = self.sequences[sequence]
            for clip in draw.choice(len(clips), copies, replace=False):
                mask, found, score = clips[clip]
                extent = [np.ptp(np.flatnonzero(mask.any(axis))) for axis in (1, 0)]  # height, width
                shift = [round(draw.uniform(-0.5, 0.5) * e) for e in extent]
                templates.append(np.roll(mask, shift, (0, 1)))
                masks.append(np.roll(found, shift, (1, 2)))
                scores.append(score)
        a, b = (torch.from_numpy(array) for array in (np.stack(templates), np.concatenate(masks)))
        cost = 1 - reference.mask_iou(a, b).double() + 0.1 * (1 - torch.from_numpy(np.concatenate(scores)))  # [N, <=M]
        return torch.nn.functional.pad(cost, (0, M - cost.shape[1]), value=1.5)  # absent proposals: dearer than any


# ---- variants --------------------------------------------------------------------------------------------------------


def simplex_dual(z: Tensor) -> Tensor:
    """The u of each row with sum(relu(z - u)) = 1, exactly, by sorting: ``[..., N, M] -> [..., N, 1]``."""
    ordered = z.sort(-1, descending=True).values
    candidates = (ordered.cumsum(-1) - 1) / torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    support = (ordered > candidates).sum(-1, keepdim=True)
    return candidates.gather(-1, support - 1)


def simplex(cost: Tensor, *, n_grad: int, n_proj: int, lr: float, last: bool, newton: bool) -> Tensor:
    """Algorithm 1 with P1 and P3 together as one exact projection onto the row simplex; columns by Dykstra's step, or
    (``newton``) divided by the entries in use instead of by n."""
    x = total = torch.zeros_like(cost)
    for _ in range(n_grad):
        y0 = x - lr * cost
        v = torch.zeros_like(cost[..., :1, :])  # [B, 1, M]
        for _ in range(n_proj):
            x = (y0 - v - simplex_dual(y0 - v)).relu()
            used = (x > 0).sum(-2, keepdim=True).clamp(min=1) if newton else x.shape[-2]
            v = (v + (x.sum(-2, keepdim=True) - 1) / used).relu()
        x = (y0 - v - simplex_dual(y0 - v)).relu()
        total = total + x
    return x if last else total / n_grad


def carried(
    cost: Tensor, *, n_grad: int, n_proj: int, lr: float, newton: bool = False, omega: float = 1.0, momentum: float = 0
) -> Tensor:
    """``carry`` (Listing 1, last iterate) with changed steps: x = relu(-k lr C - u - v), u and v kept throughout.

    ``omega`` multiplies both dual steps, ``momentum`` repeats that share of the previous one, ``newton`` divides by the
    entries in use instead of by m and n.
    """
    x = y0 = torch.zeros_like(cost)
    u, v = torch.zeros_like(cost[..., :1]), torch.zeros_like(cost[..., :1, :])  # [B, N, 1], [B, 1, M]
    du, dv, used = torch.zeros_like(u), torch.zeros_like(v), torch.ones_like(x)
    for _ in range(n_grad):
        y0 = y0 - lr * cost
        x = x - lr * used * cost  # as carry does: not clipped before the first row step, which takes out what rows share
        for _ in range(n_proj):
            d = (x.sum(-1, keepdim=True) - 1) / used.sum(-1, keepdim=True).clamp(min=1)
            s = (x - used * d).sum(-2, keepdim=True)
            du = omega * d + momentum * du
            after = (v + omega * (s - 1) / used.sum(-2, keepdim=True).clamp(min=1) + momentum * dv).relu()
            u, v, dv = u + du, after, after - v
            x = (y0 - u - v).relu()
            used = (x > 0).to(cost.dtype) if newton else used
    return x


def sharpness(n_grad: int, lr: float, power: float = 3.0) -> list[float]:
    """The inverse temperatures t_1 .. t_K = n_grad lr (k / n_grad)^power; ``power=1`` is k lr, as in ``carry``."""
    return [n_grad * lr * (k / n_grad) ** power for k in range(1, n_grad + 1)]


def prices(
    cost: Tensor,
    *,
    n_grad: int = 40,
    n_proj: int = 1,
    lr: float | Tensor = 10.0,
    power: float = 3.0,
    output: str = "last",
    newton: bool = True,
    omega: float = 1.0,
) -> Tensor:
    """x_k = t_k relu(-C - a - b): duals kept as prices a (rows) and b >= 0 (columns), in units of the cost; a Newton step
    for each per round.

    ``newton=False`` takes Dykstra's steps (1/m and 1/n), ``omega`` multiplies both steps, ``output`` is last, average or
    tail (the mean of the second half).
    """
    times = sharpness(n_grad, lr, power)
    a = (-cost).amax(-1, keepdim=True).detach() - 1 / times[0]  # [B, N, 1]; the first step forgets it
    b = torch.zeros_like(cost[..., :1, :])  # [B, 1, M]
    first = {"last": n_grad - 1, "average": 0, "tail": n_grad // 2}[output]
    total = torch.zeros_like(cost)
    for k, t in enumerate(times):
        for _ in range(n_proj):
            p = (-cost - a - b).relu()
            used = (p > 0).to(cost.dtype) if newton else torch.ones_like(p)
            d = omega * (p.sum(-1, keepdim=True) - 1 / t) / used.sum(-1, keepdim=True).clamp(min=1)
            s = (p - used * d).sum(-2, keepdim=True)  # column sums after the row step, were the support to stay
            b = (b + omega * (s - 1 / t) / used.sum(-2, keepdim=True).clamp(min=1)).relu()
            a = a + d
        if k >= first:
            total = total + t * (-cost - a - b).relu()
    return total / (n_grad - first)


def hand_adjoint(cost: Tensor, grad: Tensor, *, n_grad: int, n_proj: int, lr: float, average: bool) -> tuple[Tensor, Tensor]:
    """dL/dcost and dL/dlr of ``prices`` for last or average, written as a kernel would: only bit masks are kept."""
    times = sharpness(n_grad, lr)
    a = (-cost).amax(-1, keepdim=True) - 1 / times[0]
    b = torch.zeros_like(cost[..., :1, :])
    masks = []  # per round: pos [B, N, M] before the round, col [B, 1, M]
    for t in times:
        for _ in range(n_proj):
            p = (-cost - a - b).relu()
            pos = p > 0
            d = (p.sum(-1, keepdim=True) - 1 / t) / pos.sum(-1, keepdim=True).clamp(min=1)
            w = b + ((p - pos * d).sum(-2, keepdim=True) - 1 / t) / pos.sum(-2, keepdim=True).clamp(min=1)
            masks.append((pos, w > 0))
            a, b = a + d, w.relu()
    after = -cost - a - b > 0  # the support of x_k is the one that the next round starts from
    dcost = torch.zeros_like(cost)
    da, db = torch.zeros_like(a), torch.zeros_like(b)
    for k in range(n_grad, 0, -1):
        if average or k == n_grad:
            h = times[k - 1] * (grad / n_grad if average else grad) * after
            dcost, da, db = dcost - h, da - h.sum(-1, keepdim=True), db - h.sum(-2, keepdim=True)
        for _ in range(n_proj):
            pos, col = masks.pop()
            db = col * db
            ds = db / pos.sum(-2, keepdim=True).clamp(min=1)
            dd = da - (pos * ds).sum(-1, keepdim=True)
            h = pos * (ds + dd / pos.sum(-1, keepdim=True).clamp(min=1))
            dcost, da, db = dcost - h, da - h.sum(-1, keepdim=True), db - h.sum(-2, keepdim=True)
            after = pos
    return dcost, (dcost * cost).sum() / lr  # X depends on lr * C alone


@dataclass(frozen=True)
class Variant:
    name: str
    solve: Callable[[Tensor], Tensor]
    work: float | None = None  # vector operations per element of the cost; None: not of this kind
    native: bool = False  # dmm_fast.match does it today

    def __str__(self) -> str:
        return self.name


def existing(name: str, n_grad: int, n_proj: int, lr: float, dykstra: str = "reset", output: str = "average") -> Variant:
    # A round: two subtractions, relu, row sum, column sum. An outer step: the gradient, the mean.
    work = n_grad * (5 * n_proj + 1 + (output == "average"))
    options = {"n_grad": n_grad, "n_proj": n_proj, "lr": lr, "dykstra": dykstra, "output": output}
    return Variant(name, lambda cost: dmm_fast.match(cost, **options), work, True)


def carry(name: str, n_grad: int, n_proj: int, lr: float, **options) -> Variant:
    work = n_grad * ((10 if options.get("newton") else 5) * n_proj + 1)
    return Variant(name, lambda cost: carried(cost, n_grad=n_grad, n_proj=n_proj, lr=lr, **options), work)


def newton(name: str, n_grad: int, lr: float, output: str = "last", n_proj: int = 1, **options) -> Variant:
    # A round: two subtractions, relu, row and column sum as above; comparison, two counts, the masked subtraction of d,
    # and the columns' divisions (one for N entries, but slow). The mean: one multiply-add a step.
    work = n_grad * ((10 if options.get("newton", True) else 5) * n_proj + (output != "last")) + 4
    return Variant(name, lambda cost: prices(cost, n_grad=n_grad, n_proj=n_proj, lr=lr, output=output, **options), work)


def exact(name: str, lr: float, last: bool = True, newton: bool = False, n_grad: int = 40, n_proj: int = 5) -> Variant:
    # The row dual by Newton from the row maximum takes about 4 sweeps of 5 operations; then columns.
    work = n_grad * (n_proj * (20 + 3 + newton * 2) + 22)
    options = {"n_grad": n_grad, "n_proj": n_proj, "lr": lr, "last": last, "newton": newton}
    return Variant(name, lambda cost: simplex(cost, **options), work)


def greedy_rows(cost: Tensor) -> Tensor:
    return torch.zeros_like(cost).scatter_(-1, cost.argmin(-1, keepdim=True), 1.0)


VARIANTS = [
    Variant("greedy: row argmin of C", greedy_rows),
    Variant("Sinkhorn, 50 rounds, temperature .05", reference.sinkhorn),
    Variant("Sinkhorn, 50 rounds, temperature .01", lambda cost: reference.sinkhorn(cost, temperature=0.01)),
    existing("**paper: 40x5, lr .1, reset, average**", 40, 5, 0.1),
    existing("40x5, lr .1, reset, last", 40, 5, 0.1, output="last"),
    existing("40x5, lr .25, reset, last", 40, 5, 0.25, output="last"),
    existing("40x5, lr 1, reset, last", 40, 5, 1.0, output="last"),
    existing("40x5, lr .1, carry, last", 40, 5, 0.1, "carry", "last"),
    existing("200x1, lr .02, carry, last", 200, 1, 0.02, "carry", "last"),
    existing("200x1, lr .1, carry, last", 200, 1, 0.1, "carry", "last"),
    existing("100x2, lr .04, reset, last", 100, 2, 0.04, "reset", "last"),
    existing("20x10, lr .4, reset, last", 20, 10, 0.4, "reset", "last"),
    existing("10x20, lr .4, reset, average", 10, 20, 0.4, "reset"),
    existing("10x20, lr .8, reset, last", 10, 20, 0.8, "reset", "last"),
    existing("4x50, lr 2, reset, last", 4, 50, 2.0, "reset", "last"),
    existing("400x50, lr .1, reset, average (the study setting)", 400, 50, 0.1),
    carry("dykstra steps x 1.8, 40x5, lr .1, carry, last", 40, 5, 0.1, omega=1.8),
    carry("dykstra steps x 4, 40x5, lr .1, carry, last", 40, 5, 0.1, omega=4.0),
    carry("momentum .8, 40x5, lr .4, carry, last", 40, 5, 0.4, momentum=0.8),
    carry("Newton steps, 100x1, lr 1.6, carry, last", 100, 1, 1.6, newton=True),
    newton("prices, dykstra steps, 200x1, lr .2, linear, last", 200, 0.2, newton=False, power=1.0),
    exact("row simplex, 40x5, lr .1, average", 0.1, last=False),
    exact("row simplex, 40x5, lr 4, last", 4.0),
    exact("row simplex, Newton columns, 40x5, lr 4, last", 4.0, newton=True),
    newton("Newton prices, 40x1, lr 4, linear, last", 40, 4.0, power=1.0),
    newton("Newton prices, 40x1, lr 4, linear, average", 40, 4.0, "average", power=1.0),
    newton("Newton prices, 40x1, lr 4, linear, steps x 1.3, last", 40, 4.0, power=1.0, omega=1.3),
    newton("Newton prices, 20x1, lr 20, last", 20, 20.0),
    newton("Newton prices, 40x1, lr 4, last", 40, 4.0),
    newton("**Newton prices, 40x1, lr 10, last**", 40, 10.0),
    newton("Newton prices, 80x1, lr 5, last", 80, 5.0),
    newton("Newton prices, 40x2, lr 10, last", 40, 10.0, n_proj=2),
    newton("Newton prices, 40x1, lr 1, average", 40, 1.0, "average"),
    newton("Newton prices, 40x1, lr 4, average", 40, 4.0, "average"),
    newton("**Newton prices, 40x1, lr 10, average**", 40, 10.0, "average"),
    newton("Newton prices, 40x1, lr 10, mean of the last half", 40, 10.0, "tail"),
    newton("Newton prices, 80x1, lr 5, average", 80, 5.0, "average"),
]
BY_NAME = {variant.name: variant for variant in VARIANTS}
PAPER = "**paper: 40x5, lr .1, reset, average**"
DECIDE = "**Newton prices, 40x1, lr 10, last**"

# ---- measures --------------------------------------------------------------------------------------------------------


def value(cost: Tensor, choice: Tensor) -> Tensor:
    return cost.gather(2, choice[..., None]).sum((1, 2))


def hungarian(cost: Tensor) -> Tensor:
    return dmm_fast.hungarian(cost).argmax(-1)  # [B, N]


def agreement(cost: Tensor, choice: Tensor, best: Tensor) -> float:
    """Share of problems decided as well as Hungarian does: one-to-one, at the optimal cost (so that ties don't matter)."""
    ordered = choice.sort(-1).values
    one_to_one = (ordered[:, 1:] != ordered[:, :-1]).all(-1)
    return float((one_to_one & (value(cost, choice) < best + 1e-9)).double().mean())


@dataclass
class Row:
    argmax: list[float]
    rounded: list[float]
    rows: list[float]
    columns: list[float]
    gap: list[float]


def decide(variant: Variant, families: dict[str, Tensor]) -> Row:
    row = Row([], [], [], [], [])
    for cost in families.values():
        best = value(cost, hungarian(cost))
        x = variant.solve(cost)
        row.argmax.append(agreement(cost, x.argmax(-1), best))
        row.rounded.append(agreement(cost, hungarian(-x), best))
        residual = dmm_fast.feasibility(x)
        row.rows.append(float(residual["rows"].quantile(0.99)))
        row.columns.append(float(residual["columns"].quantile(0.99)))
        spread = x / x.sum(-1, keepdim=True).clamp(min=1e-9)  # rows made 1: otherwise leaving a template out would pay
        row.gap.append(float(((spread * cost).sum((1, 2)) / best - 1).median()))
    return row


def native_time(variant: Variant, batch: int = 256) -> float:
    """Microseconds per problem, float32, one thread, the best of 15."""
    cost = torch.rand(batch, N, M, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        variant.solve(cost)
        times.append(time.perf_counter() - start)
    return min(times) / batch * 1e6


def best_existing(families: dict[str, Tensor]) -> str:
    """The best row argmax of each family over a grid of the existing options with n_grad n_proj = 200."""
    results = []
    for n_grad, dykstra, output in itertools.product((1, 2, 4, 10, 20, 40, 100, 200), ("reset", "carry"), ("average", "last")):
        for total in (1, 2, 4, 7, 10, 15, 25, 50):
            variant = existing("", n_grad, 200 // n_grad, total / n_grad, dykstra, output)
            results.append([
                agreement(cost, variant.solve(cost).argmax(-1), value(cost, hungarian(cost))) for cost in families.values()
            ])  # fmt: skip
    best = " / ".join(f"{max(column):.3f}" for column in zip(*results))
    return f"Best row argmax over {len(results)} settings of the existing options with n_grad n_proj = 200: {best}."


def eager_ratio(cost: Tensor) -> str:
    """What the operation count can't say: both loops in plain PyTorch, alternating, the best of 5 each."""

    def seconds(solve: Callable[[Tensor], Tensor]) -> float:
        start = time.perf_counter()
        solve(cost)
        return time.perf_counter() - start

    paper, ours = zip(*((seconds(reference.match_batched), seconds(prices)) for _ in range(5)))
    ratio = min(ours) / min(paper)
    return f"In plain PyTorch, batched, Newton prices 40x1 take {ratio:.2f} of the time of the paper's 40x5."


# ---- gradient usefulness: learn an embedding through the layer -------------------------------------------------------


class Toy:
    """Templates and proposals with 4 informative and 12 louder, misleading features; training has to bring out the former.

    5 templates, 20 proposals: one true proposal each, 5 lookalikes of two templates, 10 others. A linear map R^16 -> R^8
    is trained with cost = (1 - cosine) / 2 and the loss 1 - mean X[true], by Adam, for a fixed number of steps.
    """

    templates, proposals, informative, nuisance = 5, 20, 4, 12

    def __init__(self, seed: int):
        self.rng = torch.Generator().manual_seed(seed)
        self.mix = torch.linalg.qr(self.normal(16, 16)).Q

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng, dtype=torch.float64)

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """-> templates [B, 5, 16], proposals [B, 20, 16], the true proposal of each template [B, 5]."""
        identity = self.normal(size, self.templates, self.informative)
        identity[:, 1] = identity[:, 0] + 0.5 * self.normal(size, self.informative)  # two templates look alike
        lookalike = identity[:, :1] + 0.7 * self.normal(size, 5, self.informative)
        others = self.normal(size, self.proposals - self.templates - 5, self.informative)
        found = torch.cat([identity + 0.25 * self.normal(*identity.shape), lookalike, others], 1)
        order = torch.rand(size, self.proposals, generator=self.rng).argsort(-1)  # [B, 20]
        a = torch.cat([identity, 1.5 * self.normal(size, self.templates, self.nuisance)], -1) @ self.mix
        b = torch.cat([found, 1.5 * self.normal(size, self.proposals, self.nuisance)], -1) @ self.mix
        b = b.gather(1, order[..., None].expand_as(b))
        return a, b, order.argsort(-1)[:, : self.templates]


def cosine_cost(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a, b = (torch.nn.functional.normalize(t @ weight, dim=-1) for t in (a, b))
    return (1 - a @ b.mT) / 2


@dataclass
class Learned:
    argmax: float  # accuracy of the variant's own row argmax
    decided: float  # the same, when DECIDE decides on the learned cost
    embedding: float  # accuracy of Hungarian on the learned cost: how good the embedding has become
    norm: float  # median gradient norm per problem at the start
    zero: float  # share of problems without any gradient, at the start
    zero_end: float  # the same at the end, among problems decided wrongly


def gradients(variant: Variant, weight: Tensor, toy: Toy) -> tuple[Tensor, Tensor]:
    """dL/dcost per problem -> (norms [B], decided wrongly [B])."""
    a, b, truth = toy.batch(200)
    cost = cosine_cost(weight.detach(), a, b).requires_grad_()
    x = variant.solve(cost)
    (grad,) = torch.autograd.grad((1 - x.gather(2, truth[..., None]).mean((1, 2))).sum(), cost)
    return grad.flatten(1).norm(dim=1), (x.argmax(-1) != truth).any(-1)


def learn(variant: Variant, seed: int, steps: int = 100, batch: int = 32) -> Learned:
    toy = Toy(seed)
    weight = (0.25 * toy.normal(16, 8)).requires_grad_()
    norms, _ = gradients(variant, weight, toy)
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for _ in range(steps):
        a, b, truth = toy.batch(batch)
        x = variant.solve(cosine_cost(weight, a, b))
        loss = 1 - x.gather(2, truth[..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    a, b, truth = toy.batch(1000)
    with torch.no_grad():
        cost = cosine_cost(weight, a, b)
        argmax = float((variant.solve(cost).argmax(-1) == truth).double().mean())
        decided = float((BY_NAME[DECIDE].solve(cost).argmax(-1) == truth).double().mean())
        embedding = float((hungarian(cost) == truth).double().mean())
    end, wrong = gradients(variant, weight, toy)
    zero, zero_end = (float((g == 0).double().mean()) for g in (norms, end[wrong]))
    return Learned(argmax, decided, embedding, float(norms.median()), zero, zero_end)


# ---- tables ----------------------------------------------------------------------------------------------------------


def decide_table(data: Path | None) -> str:
    families = {"random": take(random_costs, 101), "video-like": take(video_costs, 102)}
    if data is not None:
        families["real"] = take(RealCosts(data), 103)
    problems = {name: cost for name, (cost, _) in families.items()}
    shares = ", ".join(f"{name} {share:.2f}" for name, (_, share) in families.items())
    paper = BY_NAME[PAPER].work
    lines = [
        (
            f"{COUNT} contested problems of {N} x {M} per family, float64; each cell gives {', '.join(problems)}. "
            f"Share of problems that are contested: {shares}."
        ),
        "",
        best_existing(problems),
        "",
        eager_ratio(problems["random"]),
        "",
        (
            "| variant | row argmax agrees | rounded X agrees | row residual, 99% | column excess, 99% | cost above optimum "
            "| work | us |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        row = decide(variant, problems)
        cells = [" / ".join(f"{v:.3f}" for v in cell) for cell in (row.argmax, row.rounded)]
        cells += [" / ".join(f"{v:.1g}" for v in cell) for cell in (row.rows, row.columns)]
        cells += [" / ".join(f"{100 * v:.1f}%" for v in row.gap)]
        cells += ["" if variant.work is None else f"{variant.work / paper:.2f}"]
        cells += [f"{native_time(variant):.1f}" if variant.native else ""]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sizes_table() -> str:
    """Agreement at other sizes; as many templates as proposals is the hard case."""
    global N, M
    families = {}
    for N, M in ((10, 50), (16, 100), (10, 10), (5, 6)):
        families[f"video-like {N}x{M}"] = take(lambda rng: video_costs(rng, 400), 104)[0]
    for N, M in ((10, 10), (5, 6)):
        families[f"random {N}x{M}"] = take(random_costs, 104)[0]
    N, M = 5, 50
    families["video-like 5x50 in float32"] = take(video_costs, 102)[0].float()
    names = (PAPER, DECIDE, "Newton prices, 80x1, lr 5, last", "**Newton prices, 40x1, lr 10, average**",
             "Newton prices, 80x1, lr 5, average")  # fmt: skip
    lines = [f"| row argmax agrees | {' | '.join(families)} |", "|---" * (len(families) + 1) + "|"]
    for name in (*names, "Newton prices, 200x1, lr 5, last"):
        variant = BY_NAME.get(name) or newton(name, 200, 5.0)
        cells = []
        for cost in families.values():
            exact_cost = cost.double()
            best = value(exact_cost, hungarian(exact_cost))
            cells.append(f"{agreement(exact_cost, variant.solve(cost).argmax(-1), best):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


LEARNERS = (
    "Sinkhorn, 50 rounds, temperature .05",
    PAPER,
    "40x5, lr .1, reset, last",
    "40x5, lr 1, reset, last",
    "10x20, lr .4, reset, average",
    DECIDE,
    "Newton prices, 40x1, lr 10, mean of the last half",
    "Newton prices, 40x1, lr 1, average",
    "Newton prices, 40x1, lr 4, linear, average",
    "Newton prices, 40x1, lr 4, average",
    "**Newton prices, 40x1, lr 10, average**",
    "Newton prices, 80x1, lr 5, average",
)


def learn_table(seeds: int = 3) -> str:
    lines = [
        f"100 Adam steps, batch 32; mean of {seeds} seeds (in brackets their range).",
        "",
        (
            "| trained through | accuracy, own row argmax | decided by Newton prices 40x1, lr 10, last "
            "| Hungarian on the learned cost | median gradient norm, start | no gradient, start "
            "| no gradient where wrong, end |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for name in LEARNERS:
        runs = [learn(BY_NAME[name], seed) for seed in range(100, 100 + seeds)]
        mean = [float(np.mean([getattr(run, field) for run in runs])) for field in Learned.__dataclass_fields__]
        accuracies = " | ".join(f"{v:.3f}" for v in mean[:3])
        accuracies += " ({:.3f} to {:.3f})".format(*(pick(run.embedding for run in runs) for pick in (min, max)))
        lines.append(f"| {name} | {accuracies} | {mean[3]:.2g} | {mean[4]:.3f} | {mean[5]:.3f} |")
    return "\n".join(lines)


def check_adjoint() -> float:
    """The largest relative difference between the hand-written adjoint of ``prices`` and autograd."""
    worst = 0.0
    rng = torch.Generator().manual_seed(5)
    for n_grad, n_proj, average in itertools.product((1, 3, 40), (1, 2), (False, True)):
        for generate in (random_costs, video_costs):
            cost = generate(rng, 50).requires_grad_()
            lr = torch.tensor(400.0 / n_grad, dtype=torch.float64, requires_grad=True)
            grad = torch.randn(cost.shape, generator=rng, dtype=torch.float64)
            x = prices(cost, n_grad=n_grad, n_proj=n_proj, lr=lr, output="average" if average else "last")
            expected = torch.autograd.grad((x * grad).sum(), (cost, lr))
            options = {"n_grad": n_grad, "n_proj": n_proj, "lr": lr.item(), "average": average}
            for ours, theirs in zip(hand_adjoint(cost.detach(), grad, **options), expected):
                worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def insert(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    before, rest = path.read_text().split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- /{name} -->")[1]
    path.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with davis16-train: adds the real cost matrices")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables between FILE's markers")
    parser.add_argument("--only", choices=("decide", "sizes", "learn"), help="one of the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"hand-written adjoint of Newton prices against autograd, largest relative difference: {check_adjoint():.1e}")
    tables = {"decide": lambda: decide_table(arguments.data), "sizes": sizes_table, "learn": learn_table}
    for name in tables if arguments.only is None else (arguments.only,):
        text = tables[name]()
        print(f"\n{text}")
        if arguments.write is not None:
            insert(arguments.write, name, text)


if __name__ == "__main__":
    main()

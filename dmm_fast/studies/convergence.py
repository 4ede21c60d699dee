"""Figure 5 of the paper, and a numerical check of its Theorem 1: how Algorithm 1 converges on random costs.

f(X) = Tr(C X^T), f* its least value over the set C of Eq. 3, X* where it is taken. Z^k = X^{k-1} - lr C is projected onto
the set by `n_proj` rounds of Dykstra's algorithm, which gives X^k, and Xhat_k is the mean of X^1 .. X^k.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor

from dmm_fast.ops.assignment import hungarian
from dmm_fast.ops.reference import _dykstra, project_columns, project_rows, project_sign

from .figures import COLOURS, INK, QUIET, figure, label_ends


@dataclass(frozen=True)
class Settings:
    """Figure 5's: uniform costs in [0, 1), uniform starts, and the grid of `n_proj` and `lr`."""

    templates: int = 5
    proposals: int = 100
    costs: int = 3
    starts: int = 10
    n_grad: int = 400
    n_proj: tuple[int, ...] = (5, 20, 50)
    lr: tuple[float, ...] = (0.005, 0.01, 0.1)
    epsilon: tuple[float, ...] = (0.5, 0.2)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.templates <= self.proposals:
            raise ValueError(f"study: need 1 <= templates <= proposals, got {self.templates} and {self.proposals}")
        for name in ("costs", "starts", "n_grad", "n_proj", "lr", "epsilon"):
            value = getattr(self, name)
            if not value or min(value if isinstance(value, tuple) else [value]) <= 0:
                raise ValueError(f"study: {name} must be positive, got {value}")


class Descent(NamedTuple):
    """One run of Algorithm 1 on B problems, after each of its K steps."""

    average: Tensor  # [B, N, M], Xhat_K
    gap: Tensor  # [K, B], f(Xhat_k) - f*
    distance: Tensor  # [K, B], |Xhat_k - P(Xhat_k)|, from the feasible set
    error: Tensor  # [K, n_proj, B], |X - P(Z^k)| after each round of projections
    radius: Tensor  # [B], r_0 = |X^0 - X*|

    @property
    def delta(self) -> Tensor:
        """[K, B], the largest projection error of the steps so far."""
        return self.error[:, -1].cummax(0).values


def project(z: Tensor, tolerance: float = 1e-13, limit: int = 100_000) -> Tensor:
    """The projection of z [..., N, M] onto the set of Eq. 3, N <= M: relu(z - u - v) with row prices u, column prices v >= 0.

    Alternates exact solutions for u and for v (each a sort) until v moves by less than `tolerance`.
    """
    v = torch.zeros_like(z[..., :1, :])  # [..., 1, M]
    for _ in range(limit):
        u = _level(z - v, -1)  # [..., N, 1]
        full = (z - u).relu().sum(-2, keepdim=True) > 1
        following = torch.where(full, _level(z - u, -2), 0)  # [..., 1, M]
        moved = (following - v).abs().max()
        v = following
        if moved < tolerance:
            return (z - _level(z - v, -1) - v).relu()
    raise RuntimeError(f"study: the projection moved by {moved:.1e} still after {limit} rounds, not {tolerance:.1e}")


def _level(y: Tensor, dim: int) -> Tensor:
    """The number u, along `dim`, for which relu(y - u) sums to 1."""
    ranked = y.sort(dim, descending=True).values
    count = torch.ones_like(y).cumsum(dim)
    levels = (ranked.cumsum(dim) - 1) / count
    return levels.gather(dim, (ranked > levels).sum(dim, keepdim=True) - 1)


def descend(cost: Tensor, start: Tensor, n_grad: int, n_proj: int, lr: float) -> Descent:
    """Algorithm 1 on cost and start [B, N, M], float64, watched at every step and round."""
    best = hungarian(cost)
    least = (cost * best).sum((1, 2))  # [B]
    x, total = start, torch.zeros_like(cost)
    gap, distance, error = [], [], []
    for k in range(1, n_grad + 1):
        x = x - lr * cost
        exact = project(x)
        corrections = [torch.zeros_like(x)] * 3
        rounds = []
        for _ in range(n_proj):
            x = _dykstra(x, corrections, (project_rows, project_columns, project_sign), 1)
            rounds.append(_norm(x - exact))
        total = total + x
        gap.append((cost * total).sum((1, 2)) / k - least)
        distance.append(_norm(total / k - project(total / k)))
        error.append(torch.stack(rounds))
    return Descent(total / n_grad, torch.stack(gap), torch.stack(distance), torch.stack(error), _norm(start - best))


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)  # [B]


def check_rate(cost: Tensor, radius: Tensor, lr: float) -> None:
    """ValueError for a step size that Theorem 1 does not allow; radius: r_0 of each problem."""
    if not bool((lr < torch.minimum(15 * radius, radius / _norm(cost))).all()):
        raise ValueError(f"study: Theorem 1 asks for lr < r_0 / |C| = {float((radius / _norm(cost)).min()):.3g}, got {lr}")


def bounds(cost: Tensor, run: Descent, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """What Theorem 1's proof (Eq. 16) promises after k steps, each [K, B]:

    |Xhat_k - P(Xhat_k)| <= delta,  -|C| delta <= f(Xhat_k) - f* <= 2 r_0^2 / (k lr) + 5 r_0 delta / lr + 5 k delta^2 / lr,

    where delta bounds the projection error |X^i - P(Z^i)| of steps 1 .. k. It asks for lr < min(15 r_0, r_0 / |C|).
    """
    check_rate(cost, run.radius, lr)
    k = torch.arange(1, run.gap.shape[0] + 1, dtype=cost.dtype)[:, None]  # [K, 1]
    delta = run.delta
    upper = 2 * run.radius**2 / (k * lr) + 5 * run.radius * delta / lr + 5 * k * delta**2 / lr
    return delta, -_norm(cost) * delta, upper


def guarantee(cost: Tensor, epsilon: float, lr: float) -> dict[str, float]:
    """Theorem 1 taken at its word: K = ceil(6 r_0^2 / (lr epsilon)) steps from the layer's own start, 1 / M, with rounds
    doubled until the measured projection error is at most lr epsilon / (15 r_0). What comes out must be epsilon-optimal."""
    start = torch.full_like(cost, 1 / cost.shape[-1])
    radius = _norm(start - hungarian(cost))
    steps = math.ceil(6 * float(radius.max()) ** 2 / (lr * epsilon))
    allowed = lr * epsilon / (15 * float(radius.max()))
    rounds, run = 5, descend(cost, start, steps, 5, lr)
    while run.delta.max() > allowed:
        rounds *= 2
        run = descend(cost, start, steps, rounds, lr)
    return {
        "epsilon": epsilon, "n_grad": steps, "n_proj": rounds, "allowed": allowed, "delta": float(run.delta.max()),
        "gap": float(run.gap[-1].abs().max()), "distance": float(run.distance[-1].max()),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the study


def study(settings: Settings) -> dict[str, Any]:
    """All runs; numbers only, so that a figure can be drawn again from the JSON."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = (settings.templates, settings.proposals)
    costs = torch.rand(settings.costs, *size, generator=generator, dtype=torch.float64)
    starts = torch.rand(settings.costs * settings.starts, *size, generator=generator, dtype=torch.float64)
    cost = costs.repeat_interleave(settings.starts, 0)  # [B, N, M], B = costs * starts
    centre = torch.full_like(costs, 1 / size[1])  # the layer's own start
    for problem, start in ((cost, starts), (costs, centre)):
        radius = _norm(start - hungarian(problem))
        for lr in settings.lr:
            check_rate(problem, radius, lr)
    steps = sorted({round(settings.n_grad ** (i / 59)) for i in range(60)})  # 1 .. n_grad, evenly on a log axis
    at = torch.tensor(steps) - 1
    runs = []
    for lr in settings.lr:
        for n_proj in settings.n_proj:
            run = descend(cost, starts, settings.n_grad, n_proj, lr)
            same = run.average.argmax(-1) == hungarian(cost).argmax(-1)  # [B, N]
            runs.append({
                "lr": lr, "n_proj": n_proj, "gap": _spread(run.gap[at]), "distance": float(run.distance[-1].median()),
                "rows": float((run.average.sum(-1) - 1).abs().amax(-1).median()),
                "decided": float(same.double().mean()), "error": float(run.delta.max()),
                "last_error": [float(f"{e:.4g}") for e in run.error[-1].amax(1).tolist()],
            })  # fmt: skip
    lr = max(settings.lr)
    theorem = []
    for n_proj in (max(settings.n_proj), 10 * max(settings.n_proj)):
        run = descend(costs, centre, settings.n_grad, n_proj, lr)
        delta, lower, upper = bounds(costs, run, lr)
        holds = (run.distance <= delta + 1e-12) & (lower - 1e-12 <= run.gap) & (run.gap <= upper)
        theorem.append({
            "lr": lr, "n_proj": n_proj, "delta": float(delta.max()), "holds": bool(holds.all()),
            "gap": _spread(run.gap[at]), "upper": _spread(upper[at]),
        })  # fmt: skip
    return {
        "settings": asdict(settings), "steps": steps, "runs": runs, "theorem": theorem,
        "guarantee": [guarantee(costs, epsilon, lr) for epsilon in settings.epsilon],
    }  # fmt: skip


def _spread(values: Tensor) -> dict[str, list[float]]:
    """Median, least and largest over problems of values [K, B]."""
    rows = {"median": values.median(1).values, "low": values.amin(1), "high": values.amax(1)}
    return {name: [float(f"{v:.5g}") for v in row.tolist()] for name, row in rows.items()}


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """convergence.json and convergence.svg in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    numbers, picture = out / "convergence.json", out / "convergence.svg"
    numbers.write_text(json.dumps(result) + "\n")
    draw(result, picture)
    return [numbers, picture]


def draw(result: dict[str, Any], path: Path) -> None:
    settings, steps = result["settings"], result["steps"]
    runs = {(run["lr"], run["n_proj"]): run for run in result["runs"]}
    most, fastest = max(settings["n_proj"]), max(settings["lr"])
    gap = r"$f(\hat{X}_k) - f^*$"
    with figure(path, 2, 2, 9.6, 7) as (by_rate, by_rounds, projection, theorem):
        by_rate.set(title="A larger step is sooner at the optimum", xlabel="gradient steps k", ylabel=gap)
        _note(by_rate, f"n_proj = {most}")
        gaps = [(runs[lr, most]["gap"], f"lr {lr:g}", colour) for lr, colour in zip(settings["lr"], cycle(COLOURS))]
        _bands(by_rate, steps, gaps)

        by_rounds.set(title="Too few rounds leave a gap", xlabel="gradient steps k", ylabel=gap)
        _note(by_rounds, f"lr = {fastest:g}")
        gaps = [(runs[fastest, n]["gap"], f"n_proj {n}", colour) for n, colour in zip(settings["n_proj"], cycle(COLOURS))]
        _bands(by_rounds, steps, gaps)

        projection.set(title="A larger step needs more rounds", xlabel="rounds of projections j", yscale="log")
        projection.set(ylabel=r"$\|Y_j - P(Z^k)\|$ in the last step k")
        ends = []
        for lr, colour in zip(settings["lr"], cycle(COLOURS)):
            error = runs[lr, most]["last_error"]
            projection.plot(range(1, most + 1), error, color=colour)
            ends.append((most, error[-1], f"lr {lr:g}", colour))
        label_ends(projection, ends)

        loose, tight = result["theorem"]
        theorem.set(title="Theorem 1 holds, with room to spare", xlabel="gradient steps k", ylabel=gap)
        _note(theorem, f"lr = {tight['lr']:g}, start 1/M")
        lines = [(loose["upper"], f"bound,\nn_proj {loose['n_proj']}", COLOURS[1])]
        lines += [(tight["upper"], f"bound,\nn_proj {tight['n_proj']}", INK), (tight["gap"], "measured", COLOURS[0])]
        _bands(theorem, steps, lines)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.02, 0.04, text, transform=axes.transAxes, color=QUIET)


def _bands(axes: Axes, steps: list[int], lines: list[tuple[dict[str, list[float]], str, str]]) -> None:
    """Median and range of each line, on logarithmic axes."""
    axes.set(xscale="log", yscale="log")
    for values, _, colour in lines:
        axes.fill_between(steps, values["low"], values["high"], color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, values["median"], color=colour)
    label_ends(axes, [(steps[-1], values["median"][-1], name, colour) for values, name, colour in lines])


def table(result: dict[str, Any]) -> str:
    """What the run found, as two Markdown tables."""
    last = result["settings"]["n_grad"]
    lines = [
        f"| lr | n_proj | gap after {last} steps | row sums off by | largest projection error | decides like Hungarian |",
        "|---|---|---|---|---|---|",
    ]
    for run in result["runs"]:
        lines.append(
            f"| {run['lr']:g} | {run['n_proj']} | {run['gap']['median'][-1]:.3f} | {run['rows']:.2g} | "
            f"{run['error']:.2g} | {run['decided']:.2f} |"
        )
    lines += [
        "", "| epsilon | steps K | rounds | projection error (allowed) | distance from the set | gap | epsilon-optimal |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["guarantee"]:
        holds = max(row["gap"], row["distance"]) <= row["epsilon"]
        lines.append(
            f"| {row['epsilon']:g} | {row['n_grad']} | {row['n_proj']} | {row['delta']:.1e} ({row['allowed']:.1e}) | "
            f"{row['distance']:.1e} | {row['gap']:.4f} | {'yes' if holds else 'NO'} |"
        )
    return "\n".join(lines)

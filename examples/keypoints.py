"""Keypoints matched where many have no partner: the same network trained through the layer, and through Sinkhorn with a dustbin.

    python examples/keypoints.py               # two networks, 400 steps each
    python examples/keypoints.py --seeds 5     # mean and standard error
    python examples/keypoints.py --quick       # a look at what it prints; nothing has been learned yet

Two views of a scene of points: a random homography, noisy positions, descriptors that several points nearly share. Attention within and
across the views gives a cost for every pair, `unmatched_cost` is one more parameter, and the loss is on the assignment.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmm_fast

# -------------------------------------------------------------------------------------------------------------- the scenes


class Views(NamedTuple):
    """A batch of pairs of views: in each, positions [B, N, 2] and descriptors [B, N, 8]."""

    left: tuple[Tensor, Tensor]
    right: tuple[Tensor, Tensor]
    truth: Tensor  # [B, N, N] bool: which pairs are one point


def homographies(batch: int) -> Tensor:
    """[B, 3, 3]: any rotation, half to twice the size, some shear, shift and perspective."""
    angle = torch.rand(batch) * 2 * torch.pi
    cos, sin = angle.cos(), angle.sin()
    size = torch.exp2(torch.rand(batch) * 2 - 1)[:, None, None]
    rotation = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    matrix = torch.eye(3).repeat(batch, 1, 1)
    matrix[:, :2, :2] = size * rotation @ (torch.eye(2) + 0.15 * torch.randn(batch, 2, 2))
    matrix[:, :2, 2] = 0.3 * torch.randn(batch, 2)
    matrix[:, 2, :2] = 0.1 * torch.randn(batch, 2)
    return matrix


def draw(batch: int, points: int = 32, families: int = 6, noise: float = 0.18) -> Views:
    """`points` in each view, of which 3/8 to 7/8 are in both. The points of a scene are of few `families`: within one, they look alike."""
    shared = torch.randint(points * 3 // 8, points * 7 // 8 + 1, (batch, 1))  # [B, 1]
    where = torch.rand(batch, 2 * points, 2) * 2 - 1  # of all points of the scene: the first are in the left view
    family = torch.randint(families, (batch, 2 * points, 1)).expand(-1, -1, 8)
    look = F.normalize(torch.randn(batch, families, 8), dim=2).gather(1, family) + 0.35 * torch.randn(batch, 2 * points, 8)
    moved = F.pad(where, (0, 1), value=1.0) @ homographies(batch).mT
    moved = moved[..., :2] / moved[..., 2:].clamp(min=0.3)

    place = torch.rand(batch, points).argsort(1)  # the right view has the first `shared` points and new ones, in any order
    seen = torch.where(place < shared, place, place + points - shared)  # [B, N]
    there = moved.gather(1, seen[..., None].expand(-1, -1, 2)) + 0.02 * torch.randn(batch, points, 2)
    looks = look.gather(1, seen[..., None].expand(-1, -1, 8)) + noise * torch.randn(batch, points, 8)
    truth = torch.arange(points)[:, None] == seen[:, None]
    return Views((where[:, :points], look[:, :points]), (there, looks), truth)


# ------------------------------------------------------------------------------------------------------------- the network


class Attention(nn.Module):
    """Each point of one set gathers from the points of another, or of its own."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.query, self.pair = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.update = nn.Sequential(
            nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, points: Tensor, others: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query(points), *self.pair(others).chunk(2, 2))
        )  # [B, heads, N, width / heads]
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return points + self.update(torch.cat([points, found], 2))


class Matcher(nn.Module):
    """Views -> the cost of every pair [B, N, N], and of leaving a point of the left view alone [N]."""

    def __init__(self, width: int = 48, layers: int = 2):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(2 + 8, width), nn.ReLU(), nn.Linear(width, width))
        self.within = nn.ModuleList(Attention(width) for _ in range(layers))
        self.across = nn.ModuleList(Attention(width) for _ in range(layers))
        self.describe = nn.Linear(width, width)
        self.unmatched_cost = nn.Parameter(torch.tensor(-1.0))

    def forward(self, views: Views) -> tuple[Tensor, Tensor]:
        left, right = (self.encode(torch.cat(view, 2)) for view in (views.left, views.right))
        for within, across in zip(self.within, self.across):
            left, right = within(left, left), within(right, right)
            left, right = across(left, right), across(right, left)
        left, right = self.describe(left), self.describe(right)
        return -left @ right.mT / left.size(2) ** 0.5, self.unmatched_cost.expand(left.size(1))


# ------------------------------------------------------------------------------------------------------------ the contest

# Cost and cost of staying alone -> X [B, N, N]. How sharp each is was chosen for it; beyond that the network scales its costs.
LAYERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "match": lambda cost, own: dmm_fast.match(cost, unmatched_cost=own, lr=0.3),
    "sinkhorn": lambda cost, own: dmm_fast.sinkhorn(cost, unmatched_cost=own, temperature=0.05),
}


def square(assignment: Tensor, truth: Tensor) -> Tensor:
    """The squared error of X. It has a gradient at X = 0, and where a row sum is above 1; a logarithm has none there."""
    return (assignment - truth.float()).square().sum() / truth.sum()


def logarithm(assignment: Tensor, truth: Tensor) -> Tensor:
    """SuperGlue's: -log of X at true pairs, and of what rows and columns leave to the dustbin where there is none."""
    alone = [(1 - assignment.sum(side)).clamp(min=0)[~truth.any(side)] for side in (2, 1)]
    return -torch.cat([assignment[truth], *alone]).add(1e-3).log().mean()


def train(solve: Callable, loss_of: Callable, steps: int, batch: int = 32) -> tuple[Matcher, float]:
    """The network, and the seconds of CPU time that it took."""
    net = Matcher()
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    start = time.process_time()
    for _ in range(steps):
        views = draw(batch)
        loss = loss_of(solve(*net(views)), views.truth)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net, time.process_time() - start


def f1(choice: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Precision, recall and F1 of the matches `choice` [B, N], -1 for none."""
    said = choice >= 0
    right = (truth.gather(2, choice.clamp(min=0)[..., None])[..., 0] & said).sum().item()
    precision, recall = right / max(said.sum().item(), 1), right / truth.sum().item()
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)


def average_precision(assignment: Tensor, truth: Tensor) -> tuple[float, Tensor, Tensor]:
    """Of all pairs, in the order of X: the area below precision against recall, and that curve."""
    hit = truth.flatten()[assignment.flatten().argsort(descending=True)].double()
    precision, recall = hit.cumsum(0) / torch.arange(1, len(hit) + 1), hit.cumsum(0) / hit.sum()
    return (precision * hit).sum().item() / hit.sum().item(), precision, recall


def reliability(assignment: Tensor, truth: Tensor, bins: int = 10) -> tuple[float, list[tuple[float, float]]]:
    """Is 1 - row sum the probability of having no partner? Expected calibration error; by bin, what was said and what is true."""
    said, true = (1 - assignment.sum(2)).clamp(0, 1).flatten(), (~truth.any(2)).float().flatten()
    place = (said * bins).long().clamp(max=bins - 1)
    pairs = [
        (said[place == k].mean().item(), true[place == k].mean().item(), (place == k).float().mean().item())
        for k in range(bins)
    ]
    pairs = [pair for pair in pairs if pair[2] > 0]
    return sum(abs(a - b) * share for a, b, share in pairs), [(a, b) for a, b, _ in pairs]


@torch.no_grad()
def judge(net: Matcher, solve: Callable, views: Views) -> dict:
    """Decided from X, and exactly from the learned costs."""
    cost, own = net(views)
    assignment = solve(cost, own)
    error, bins = reliability(assignment, views.truth)
    scores = ("precision", "recall", "F1")
    figures = dict(zip(scores, f1(dmm_fast.assign(assignment, unmatched=True), views.truth)))
    choice = dmm_fast.linear_assignment(cost, unmatched_cost=own)
    exact = dict(zip(scores, f1(choice, views.truth)))
    area, *curve = average_precision(assignment, views.truth)
    return {**figures, "AP": area, "calibration error": error, "curve": curve, "bins": bins, "exact": exact}


WAYS = {
    "match, squared error": ("match", square),
    "sinkhorn, squared error": ("sinkhorn", square),
    "sinkhorn, logarithm": ("sinkhorn", logarithm),
}


def contest(ways: list[str], seeds: int, steps: int, scenes: int) -> dict[str, list[dict]]:
    """For each way and seed its figures; all ways of a seed begin with the same network and see the same scenes."""
    results: dict[str, list[dict]] = {way: [] for way in ways}
    for seed in range(seeds):
        torch.manual_seed(1000 + seed)
        held_out = draw(scenes)
        for way in ways:
            layer, loss_of = WAYS[way]
            torch.manual_seed(seed)
            net, seconds = train(LAYERS[layer], loss_of, steps)
            results[way].append({**judge(net, LAYERS[layer], held_out), "seconds": seconds})
            print(f"  seed {seed}, {way}: F1 {results[way][-1]['F1']:.3f} after {seconds:.0f} s", flush=True)
    return results


def spread(values: list[float]) -> str:
    """Mean and standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def table(results: dict[str, list[dict]]) -> str:
    columns = ("precision", "recall", "F1", "AP", "calibration error")
    lines = [f"| trained through, decided by | {' | '.join(columns)} | seconds |", "|---|" + "--:|" * (len(columns) + 1)]
    for way, runs in results.items():
        cells = [spread([run[column] for run in runs]) for column in columns]
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        lines.append(f"| {way}; its X | {' | '.join(cells)} | {seconds:.0f} |")
        cells = [spread([run["exact"][column] for run in runs]) for column in columns[:3]]
        lines.append(f"| {way}; `linear_assignment` | {' | '.join(cells)} | | | |")
    return "\n".join(lines)


def draw_figure(results: dict[str, list[dict]], path: Path) -> None:
    """Precision against recall on held-out scenes, and how reliable "no partner" is."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for (way, runs), colour in zip(results.items(), ("#0072b2", "#cc79a7", "#e69f00")):
        for number, run in enumerate(runs):
            label = way if number == 0 else None
            precision, recall = (values[:: max(len(values) // 4000, 1)] for values in run["curve"])
            left.plot(recall, precision, color=colour, linewidth=1, label=label)
            right.plot(*zip(*run["bins"]), color=colour, linewidth=1, marker=".", label=label)
    left.set(xlabel="recall", ylabel="precision", xlim=(0.5, 1), ylim=(0.5, 1))
    right.plot([0, 1], [0, 1], color="black", linewidth=0.5)
    right.set(xlabel="1 - row sum", ylabel="share of points without a partner")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict[str, list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:2], metavar="WAY", help=f"of: {', '.join(WAYS)}")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="of training, 32 scenes each (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=512, help="held out, to judge on (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="20 steps, 32 scenes")
    parser.add_argument("--figure", type=Path, help="draw precision, recall and reliability to this file, .svg or .png")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.scenes = 20, 32
    results = contest(options.ways, options.seeds, options.steps, options.scenes)
    print(table(results))
    if options.figure:
        draw_figure(results, options.figure)
    return results


if __name__ == "__main__":
    main()

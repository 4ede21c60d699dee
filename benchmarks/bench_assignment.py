"""The exact assignment against a loop over scipy: ``pytest benchmarks/bench_assignment.py``, one thread.

Scipy gets its problems in float64, as it wants them. torch-linear-assignment takes part where it is installed. Every case first
compares the total cost of each problem.
"""

from __future__ import annotations

import importlib.util

import core
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import dmm_fast

SHAPES = {(5, 50): 1024, (20, 50): 512, (50, 100): 128, (100, 300): 32, (300, 900): 4, (300, 300): 4}  # and the batch

KINDS = ["uniform", "integers", "clustered", "product"]


def costs(kind: str, batch: int, n: int, m: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    if kind == "uniform":
        return torch.rand(batch, n, m, generator=generator)
    if kind == "integers":  # 0 to 9: ties everywhere
        return torch.randint(0, 10, (batch, n, m), generator=generator).float()
    if kind == "clustered":  # about ten of each side resemble each other
        sides = []
        for size in (n, m):
            centre = torch.rand(batch, max(2, size // 10), 8, generator=generator)
            near = centre.repeat_interleave(-(-size // centre.shape[1]), 1)[:, :size]
            sides.append(near + 0.02 * torch.randn(batch, size, 8, generator=generator))
        return torch.cdist(*sides)
    product = torch.arange(1.0, n + 1)[:, None] * torch.arange(1.0, m + 1)  # Machol and Wien: the longest paths
    return product.repeat(batch, 1, 1)


def total(cost: Tensor, choice: Tensor) -> Tensor:
    return cost.double().gather(2, choice[..., None]).sum((1, 2))  # [B]


def measure(kind: str, shape: tuple[int, int], rounds: int = 5) -> tuple[dict[str, list[float]], list[dict]]:
    """(samples of each contestant, a row for each peer)."""
    batch = SHAPES[shape]
    cost = costs(kind, batch, *shape)
    host = cost.double().numpy()

    def scipy():
        return [linear_sum_assignment(problem)[1] for problem in host]

    functions = {"ours": lambda: dmm_fast.linear_assignment(cost), "scipy": scipy}
    if importlib.util.find_spec("torch_linear_assignment"):
        from torch_linear_assignment import batch_linear_assignment

        functions["torch-linear-assignment"] = lambda: batch_linear_assignment(cost)

    expected = torch.stack([torch.from_numpy(columns) for columns in scipy()])
    best = total(cost, expected)
    for solve in (functions[name] for name in functions if name != "scipy"):
        choice = solve()
        assert choice.sort(1).values.diff(dim=1).gt(0).all()
        torch.testing.assert_close(total(cost, choice), best, rtol=1e-12, atol=0)
    with core.one_thread():
        times = core.compare(functions, core.cpu_time, rounds=rounds)
    return times, core.rows_of(f"linear_assignment {shape[0]}x{shape[1]} {kind} B={batch}", times, problems=batch)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("kind", KINDS)
def bench_linear_assignment(benchmark, kind, shape):
    times, rows = measure(kind, shape)
    core.record(benchmark, times["ours"], *rows)

"""The studies: Theorem 1's inequalities, exact projections, and tiny runs of both commands."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import dmm_fast
from dmm_fast import cli
from dmm_fast.studies import convergence
from dmm_fast.studies.convergence import bounds, descend, guarantee, project


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------- convergence


@pytest.mark.parametrize(("n", "m", "scale"), [(5, 100, 1.0), (4, 4, 1.0), (5, 6, 3.0), (1, 7, 5.0), (3, 9, 0.01)])
def test_projection_is_the_nearest_feasible_point(n: int, m: int, scale: float):
    """p is nearest to z in a convex set exactly if <z - p, y - p> <= 0 for all its y; the largest is an assignment problem."""
    z = scale * (random(6, n, m, seed=n * m) - 0.3)
    p = project(z)
    worst = dmm_fast.feasibility(p)
    assert all(float(value.max()) < 1e-9 for value in worst.values()), worst
    corner = dmm_fast.hungarian(-(z - p))
    assert float(((z - p) * (corner - p)).sum((1, 2)).max()) < 1e-9


def test_projection_leaves_feasible_points_alone():
    inside = torch.full((2, 3, 8), 1 / 8, dtype=torch.float64)
    assert torch.allclose(project(inside), inside, atol=1e-12)


def test_the_study_watches_the_layer_itself():
    cost, start = random(3, 5, 30), random(3, 5, 30, seed=1)
    run = descend(cost, start, 17, 4, 0.1)
    torch.testing.assert_close(run.average, dmm_fast.match(cost, start, n_grad=17, n_proj=4, lr=0.1), atol=1e-12, rtol=0)
    least = (cost * dmm_fast.hungarian(cost)).sum((1, 2))
    torch.testing.assert_close(run.gap[-1], (cost * run.average).sum((1, 2)) - least)


@pytest.mark.parametrize("n_proj", [5, 50])
@pytest.mark.parametrize("lr", [0.01, 0.1])
@pytest.mark.parametrize("size", [(5, 100), (6, 8)])
def test_theorem_1(size: tuple[int, int], lr: float, n_proj: int):
    """Eq. 16 at every step, with the projection error that was measured; contested costs (6 x 8) too."""
    cost, start = random(4, *size), random(4, *size, seed=1)
    run = descend(cost, start, 60, n_proj, lr)
    delta, lower, upper = bounds(cost, run, lr)
    assert (run.distance <= delta + 1e-12).all()
    assert (lower - 1e-12 <= run.gap).all() and (run.gap <= upper).all()
    # Not vacuous: the bound on the distance is near what is measured somewhere, and the gap has come down.
    assert (run.distance > 0.01 * delta).any() and (run.gap[-1] < run.gap[0]).all()


def test_theorem_1_wants_a_small_step():
    cost = random(1, 3, 10)
    run = descend(cost, torch.full_like(cost, 0.1), 2, 5, 5.0)
    with pytest.raises(ValueError, match="Theorem 1 asks for lr < r_0"):
        bounds(cost, run, 5.0)


def test_the_promised_steps_are_enough():
    row = guarantee(random(2, 3, 12), epsilon=0.9, lr=0.1)
    assert row["delta"] <= row["allowed"] and row["n_grad"] == 184  # ceil(6 * 2.75 / 0.09), r_0^2 = 3 (1 - 1 / 12)
    assert row["gap"] <= 0.9 and row["distance"] <= 0.9


def test_convergence_command(tmp_path, capsys):
    arguments = ["study", "convergence", "--out", str(tmp_path / "new"), "--proposals", "12", "--costs", "2", "--starts", "2"]
    arguments += ["--templates", "3", "--n-grad", "12", "--n-proj", "2,6", "--lr", "0.05,0.1", "--epsilon", "0.9"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| 0.05 | 2 |" in printed and "| 0.1 | 6 |" in printed and "| 0.9 |" in printed
    result = json.loads((tmp_path / "new/convergence.json").read_text())
    assert all(row["holds"] for row in result["theorem"]) and len(result["runs"]) == 4
    picture = (tmp_path / "new/convergence.svg").read_text()
    assert "Theorem 1 holds" in picture and "lr 0.05" in picture


@pytest.mark.parametrize(
    ("change", "words"),
    [({"templates": 9, "proposals": 4}, "templates <= proposals"), ({"lr": (0.1, 0.0)}, "lr must be positive"),
     ({"n_proj": ()}, "n_proj must be positive")],
)  # fmt: skip
def test_settings_say_what_is_wrong(change: dict, words: str):
    with pytest.raises(ValueError, match=words):
        convergence.Settings(**change)

"""``dmm-fast study``: the paper's studies."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from . import Help, add_command, count, examples


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "study", help="the paper's studies: convergence (Figure 5, Theorem 1), matching (Table 4)", formatter_class=Help,
        description="Run a study of the paper again, and draw it.",
        epilog=examples(
            ("dmm-fast study convergence --out study", "how the layer converges on random costs, a few minutes"),
            ("dmm-fast study matching --data DIR --proposals DIR --out study", "does training through the layer pay?"),
        ),
    )  # fmt: skip
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True)
    _add_convergence(studies)


def _add_convergence(studies: Any) -> None:
    parser = add_command(
        studies, "convergence", _convergence, "Figure 5: objective and projection error; Theorem 1, checked",
        "Run Algorithm 1 on random costs for every pair of --lr and --n-proj, watch its objective and its projection\n"
        "error step by step, and compare with what Theorem 1 promises. Writes convergence.json and convergence.svg.",
        ("dmm-fast study convergence --out study", "Figure 5's setting: 5 x 100, three costs, ten starts"),
        ("dmm-fast study convergence --out study --templates 10 --proposals 20 --lr 0.05,0.1", "a more contested one"),
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument("--templates", type=count, default=5, metavar="N", help="rows of the costs (default: 5)")
    parser.add_argument("--proposals", type=count, default=100, metavar="M", help="columns of the costs (default: 100)")
    parser.add_argument("--costs", type=count, default=3, help="random costs (default: 3)")
    parser.add_argument("--starts", type=count, default=10, help="random starts of each (default: 10)")
    parser.add_argument("--n-grad", type=count, default=400, help="gradient steps (default: 400)")
    parser.add_argument("--n-proj", type=partial(_several, count), default=(5, 20, 50), metavar="N,..",
                        help="rounds of projections (default: 5,20,50)")  # fmt: skip
    parser.add_argument("--lr", type=partial(_several, float), default=(0.005, 0.01, 0.1), metavar="LR,..",
                        help="step sizes (default: 0.005,0.01,0.1)")  # fmt: skip
    parser.add_argument("--epsilon", type=partial(_several, float), default=(0.5, 0.2), metavar="E,..",
                        help="accuracies for which Theorem 1's K and N_proj are tried (default: 0.5,0.2)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of costs and starts (default: 0)")


def _several(kind: Any, text: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, got {text!r}") from None


def _convergence(arguments: argparse.Namespace) -> int:
    from dataclasses import fields

    from dmm_fast.studies.convergence import Settings, study, table, write

    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    result = study(settings)
    print(table(result))
    for path in write(result, arguments.out):
        print(path)
    return 0

"""``dmm-fast demo``: a generated clip, segmented and scored."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import add_command, add_model_options, check_device, count, model_options, summarise


def add(commands: Any) -> None:
    parser = add_command(
        commands, "demo", run, "make a clip, segment it, score it",
        "Make a clip of koi in a pond with exact masks and noisy proposals, segment it as `dmm-fast segment` would,\n"
        "score the result and draw it. Nothing is downloaded.",
        ("dmm-fast demo", "everything goes to ./demo"),
        ("dmm-fast demo --seed 4 --frames 120 --out pond", "another pond, a longer clip"),
        ("dmm-fast demo --matcher greedy", "the same with another matcher"),
    )  # fmt: skip
    parser.add_argument("--out", default="demo", metavar="DIR", help="(default: demo)")
    parser.add_argument("--seed", type=int, default=7, help="which clip (default: 7)")
    parser.add_argument(
        "--frames", type=partial(count, least=3), default=60, metavar="N",
        help="its length (default: 60; at least 3, as the first and the last frame are not scored)",
    )  # fmt: skip
    add_model_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(a: argparse.Namespace) -> int:
    from dmm_fast.inference.demo import run_demo
    from dmm_fast.inference.folder import SHEET

    check_device(a.device)
    demo = run_demo(Path(a.out), seed=a.seed, frames=a.frames, progress=not a.quiet, **model_options(a))
    files = {"masks": demo.folder / "*.png", "sheet": demo.folder / SHEET, "report": demo.folder / "report.json"}
    summarise(demo.report, files)
    print(demo.scores.table())
    print(f"\nJ {demo.scores.summary['J']:.3f}  F {demo.scores.summary['F']:.3f}  overlay: {demo.overlay}")
    return 0

"""``dmm-fast evaluate``: masks against ground truth."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import add_command, named


def add(commands: Any) -> None:
    parser = add_command(
        commands, "evaluate", run, "score masks against ground truth: J and F",
        "Score masks against ground truth as the public evaluators do. --gt and --pred are two folders of PNGs of one\n"
        "sequence, or two folders of such folders.\n\n"
        "davis     DAVIS 2017 semi-supervised: all frames but the first and the last, objects of the first frame\n"
        "vos       objects count from where they first appear: YouTube-VOS and other sets with late objects\n"
        "segtrack  SegTrack v2: mIoU per instance and per frame",
        ("dmm-fast evaluate --gt Annotations/schoolgirls --pred result", "one sequence"),
        ("dmm-fast evaluate --gt Annotations --pred results --json scores.json --csv scores.csv", "a data set, kept"),
        ("dmm-fast evaluate --gt Annotations --pred results --foreground", "DAVIS 2016: one object, whatever its id"),
    )  # fmt: skip
    parser.add_argument("--gt", required=True, metavar="DIR", help="ground truth")
    parser.add_argument("--pred", required=True, metavar="DIR", help="masks to score")
    parser.add_argument("--protocol", choices=("davis", "vos", "segtrack"), default="davis", help="(default: davis)")
    parser.add_argument("--sequences", metavar="FILE|NAME,...", help="score these only: a text file, or names")
    parser.add_argument("--foreground", action="store_true", help="score everything above 0 as one object")
    parser.add_argument(
        "--frames", choices=("inner", "after-first", "all"), help="frames to score in place of the protocol's own"
    )
    parser.add_argument(
        "--by-video", action="store_true", help="segtrack: mIoU* as a mean over videos, not over all frames together"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything, every frame's J and F too")
    parser.add_argument("--csv", metavar="FILE", help="write one line per object")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(a: argparse.Namespace) -> int:
    from dmm_fast.evaluation import evaluate

    for path in (a.json, a.csv):
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"{path}: there is no directory {Path(path).parent}")
    report = evaluate(
        a.gt, a.pred, a.protocol, sequences=named(a.sequences), foreground=a.foreground, frames=a.frames,
        pool_frames=not a.by_video, workers=a.workers, progress=not a.quiet and sys.stderr.isatty(),
    )  # fmt: skip
    if a.json is not None:
        report.to_json(a.json)
    if a.csv is not None:
        report.to_csv(a.csv)
    print(report.table())
    return 0

"""``dmm-fast benchmark``: a data set segmented, scored and timed, as a row beside the paper's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import (
    FAILED,
    STOPPED,
    add_command,
    add_detector_options,
    add_engine_options,
    add_model_options,
    add_run_options,
    add_set_options,
    complain,
    complain_of,
    engine_of,
    named,
    set_job,
    stopped,
)


def add(commands: Any) -> None:
    parser = add_command(
        commands, "benchmark", run, "segment, score and time a data set: a row next to the paper's",
        "Segment the videos of a data set that has ground truth, score them as its public evaluator does, and print a row\n"
        "next to those of the paper's Table 1 (YouTube-VOS), 2 (DAVIS) or 3 (SegTrack v2). OUT holds what segment --dataset\n"
        "writes, benchmark.md and benchmark.json. Finished videos are not done again. Exit code 3: some videos failed and are\n"
        "not in the row.",
        ("dmm-fast benchmark DAVIS --split val --proposals DAVIS/proposals --out result", "Table 2"),
        ("dmm-fast benchmark YouTubeVOS --split train-val --out result --device cuda", "the paper's own part of the training set"),
        ("dmm-fast benchmark SegTrackv2 --preset iou --out result", "Table 3, matching on mask overlap alone"),
    )  # fmt: skip
    parser.add_argument("dataset", metavar="DATASET", help="DAVIS, YouTube-VOS, MOSE, LVOS, SegTrack v2 or plain folders, with masks of "
                        "every frame that is scored")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="where results go")
    add_set_options(parser)
    parser.add_argument("--table", type=int, choices=(0, 1, 2, 3), help="the paper's table to print the row with, 0 for none "
                        "(default: the layout's)")  # fmt: skip
    add_run_options(parser, "a folder of NAME.json, COCO results for each video", "DIR|DETECTOR")
    add_engine_options(parser)
    add_model_options(parser)
    add_detector_options(parser)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that score (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="do finished videos again")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the table")


def run(a: argparse.Namespace) -> int:
    from dmm_fast.inference.benchmark import benchmark
    from dmm_fast.inference.passes import Interrupted

    job, engine = set_job(a, a.dataset), engine_of(a)
    try:
        result = benchmark(job, named(a.sequences), table=a.table, workers=a.workers, engine=engine, progress=not a.quiet)
    except Interrupted as stop:
        complain(stopped(stop, a.overwrite))
        return STOPPED
    if result is None:
        return 0  # the first process of torchrun tells
    complain_of(result["failed"], a.debug)
    print(result["markdown"], end="")
    if not a.quiet:
        print(f"\nscores of every object: {Path(a.out) / 'benchmark.json'}")
    return FAILED if result["failed"] else 0

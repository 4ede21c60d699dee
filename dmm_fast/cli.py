"""The ``dmm-fast`` command. Help needs nothing beyond torch and the layer; a subcommand imports what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dmm_fast.commands import bench, export, proposals, runtime, study, train, train_proposals, weights
from dmm_fast.commands import Help, Parser, add_command, check_device, count, examples

PRESETS = ("small", "iou", "youtube-vos", "davis", "segtrack")
STOPPED = 130  # what a shell reports for a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 cannot be done as asked, 1 a fault of ours, 130 stopped."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        _complain("stopped")
        return STOPPED
    except BrokenPipeError:  # the reader of our output has gone, as in `dmm-fast evaluate ... | head`
        sys.stderr.close()
        return STOPPED
    except Exception as error:
        if arguments.debug:
            raise
        if isinstance(error, ModuleNotFoundError):
            _complain(f"this command needs the package {error.name}: pip install 'dmm_fast[vos]'")
            return 2
        expected = isinstance(error, (ValueError, OSError, ImportError, RuntimeError))
        _complain(str(error) if expected else f"{type(error).__name__}: {error} (--debug shows where)")
        return 2 if expected else 1


def _complain(message: str) -> None:
    print(f"dmm-fast: {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------ what is asked


def _parser() -> Parser:
    parser = Parser(
        prog="dmm-fast",
        description="Follow objects through a video, given their masks in the first frame (DMM-Net).",
        epilog=examples(
            ("dmm-fast demo", "see it work on a clip it makes itself, about half a minute"),
            ("dmm-fast segment clip.mp4 --masks first.png --out result", "proposals from Mask R-CNN"),
            ("dmm-fast segment frames/ --masks first.png --out result --proposals p.json", "proposals from a file"),
            ("dmm-fast proposals clip.mp4 --out p.json", "keep Mask R-CNN's proposals, which take most of the time"),
            ("dmm-fast train small data.path=DAVIS data.proposals=DIR", "a network of your own"),
            ("dmm-fast train-proposals small --data DAVIS --out detector", "a proposal network of your own"),
            ("dmm-fast evaluate --gt Annotations/clip --pred result", "J and F against ground truth"),
            ("dmm-fast study convergence --out study", "the paper's studies, run again"),
            ("dmm-fast doctor", "what is installed, what is missing, and how to mend it"),
        ),
        formatter_class=Help,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    own = (_add_segment, _add_evaluate, _add_demo, _add_doctor)
    for add in (*own, *(module.add for module in (proposals, train_proposals, train, weights, study, export, runtime, bench))):
        add(commands)
    return parser


class _Version(argparse.Action):
    """Prints the version; a class of its own so that the package is imported only when asked."""

    def __init__(self, **options: Any):
        super().__init__(**{**options, "nargs": 0, "help": "print the version and stop"})

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"dmm-fast {version('dmm_fast')}")
        parser.exit()


def _add_segment(commands: Any) -> None:
    parser = add_command(
        commands, "segment", _segment, "segment a video from its first masks",
        "Segment a video from its first masks.\n\n"
        "OUT receives one palette PNG per frame, contact-sheet.png and report.json (per frame and object: the matched\n"
        "proposal, its score, the runner-up's, and whether the object was lost). The report is written last: a folder\n"
        "without it is not finished, and the same command with --resume goes on.",
        ("dmm-fast segment frames/ --masks first.png --proposals proposals.json --out result",
         "a directory of images, its first masks as an indexed PNG, proposals in COCO's results format"),
        ("dmm-fast segment clip.mp4 --masks first.png --out result --overlay result.mp4 --device cuda",
         "a video, proposals from torchvision's Mask R-CNN, and a video of the result"),
        ("dmm-fast segment frames/ --masks masks/ --proposals proposals.json --out result",
         "masks/ holds PNGs named as frames: objects that are new in a later one join there;\n"
         "      or one PNG per object of the first frame"),
        ("dmm-fast segment ... --preset davis --weights imagenet",
         "match on the features of a ResNet-50 too, not on mask overlap alone"),
    )  # fmt: skip
    parser.add_argument("frames", metavar="FRAMES_DIR|VIDEO", help="a directory of images, or a video file")
    parser.add_argument("--masks", required=True, metavar="FIRST.png|DIR", help="the objects to follow")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the result goes")
    parser.add_argument(
        "--proposals", default="small", metavar="FILE|DETECTOR",
        help="mask proposals: a COCO results file whose image_id is the frame's name, or a live detector: small (in the "
        "package, default), torchvision, a FILE.safetensors of train-proposals, detectron2:CONFIG[:WEIGHTS]",
    )  # fmt: skip
    parser.add_argument("--overlay", metavar="OUT.mp4", help="write a video of the frames with the masks drawn on them")
    parser.add_argument(
        "--online", metavar="SECONDS|EPOCHS",
        help="first fit the network to the first frame, for so many seconds (30) or epochs of 8 steps (20e)",
    )  # fmt: skip
    _add_model_options(parser)
    _add_detector_options(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with an unfinished run in OUT, if there is one")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--preset", choices=PRESETS,
        help="small: the trained network in the package (default); iou: overlap alone, no network; the others are the "
        "paper's settings and need weights. Default with --weights FILE: what the file is for",
    )  # fmt: skip
    group.add_argument("--backbone", metavar="NAME", help="a timm backbone in place of the preset's")
    group.add_argument("--weights", metavar="FILE|imagenet", help="a .safetensors file, or the backbone's from ImageNet")
    group.add_argument(
        "--refine", choices=("none", "light", "heavy"),
        help="mask refinement in place of the preset's; none: the masks are the matched proposals",
    )  # fmt: skip
    group.add_argument(
        "--matcher", choices=("dmm", "greedy", "hungarian"), default="dmm",
        help="the matching layer (default), or another on the same cost, to compare with",
    )  # fmt: skip
    group.add_argument(
        "--decision", choices=("confident", "assign"), default="confident",
        help="confident: each object takes its largest entry of the assignment (default); assign: it is rounded, so "
        "that no two objects take the same proposal",
    )  # fmt: skip
    group.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    group.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, default=None,
        help="run the step as a CUDA graph, several times as fast (default: where possible)",
    )  # fmt: skip


def _add_detector_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--detector-weights", default="DEFAULT", metavar="FILE",
        help="weights for torchvision's Mask R-CNN (.pth, .safetensors); else COCO's, fetched on first use",
    )  # fmt: skip


def _add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands, "evaluate", _evaluate, "score masks against ground truth: J and F",
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


def _add_demo(commands: Any) -> None:
    parser = add_command(
        commands, "demo", _demo, "make a clip, segment it, score it",
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
    _add_model_options(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_doctor(commands: Any) -> None:
    add_command(
        commands, "doctor", _doctor, "say what is installed, what is missing, and how to mend it",
        "Say which versions and backends are here and usable, which GPU, what is missing, and how to mend it.",
        ("dmm-fast doctor", "to be sent along with a bug report"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is done


def _segment(a: argparse.Namespace) -> int:
    from dmm_fast.segment import SHEET, Interrupted, segment

    check_device(a.device)
    try:
        report = segment(
            a.frames, a.masks, a.out, proposals=a.proposals, detector_weights=a.detector_weights, video=a.overlay,
            online=a.online,
            resume=a.resume, overwrite=a.overwrite, progress=not a.quiet, **_model_options(a),
        )  # fmt: skip
    except Interrupted as stop:
        _complain(str(stop))
        return STOPPED
    if not a.quiet:
        out = Path(a.out)
        files = {"masks": out / "*.png", "sheet": out / SHEET, "report": out / "report.json", "video": a.overlay}
        _summarise(report, files)
    return 0


def _model_options(a: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(a, name) for name in ("preset", "backbone", "weights", "refine", "matcher", "decision", "device", "graph")
    }


def _summarise(report: dict[str, Any], files: dict[str, Any]) -> None:
    for note in report["notes"]:
        print(f"note: {note}")
    speed = report["speed"]
    shares = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in speed["seconds"].items())
    count = len(report["objects"])
    print(f"{speed['frames']} frames, {count} object{'s' * (count != 1)}, {speed['fps']} frames/s ({shares})")
    for label, row in report["objects"].items():
        if row["lost"]:
            print(f"object {label}: no match in {row['lost']} of {row['frames']} frames, its last mask was kept there")
        if row["shared"]:
            print(f"object {label}: one proposal with another object in {row['shared']} of {row['frames']} frames, "
                  "where one hides the other; --decision assign gives each its own")  # fmt: skip
    for name, path in files.items():
        if path is not None:
            print(f"{name:8}{path}")


def _evaluate(a: argparse.Namespace) -> int:
    from dmm_fast.evaluation import evaluate

    sequences = a.sequences
    if sequences is not None and not Path(sequences).is_file():
        sequences = sequences.split(",")
    for path in (a.json, a.csv):
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"{path}: there is no directory {Path(path).parent}")
    report = evaluate(
        a.gt, a.pred, a.protocol, sequences=sequences, foreground=a.foreground, frames=a.frames,
        pool_frames=not a.by_video, workers=a.workers, progress=not a.quiet and sys.stderr.isatty(),
    )  # fmt: skip
    if a.json is not None:
        report.to_json(a.json)
    if a.csv is not None:
        report.to_csv(a.csv)
    print(report.table())
    return 0


def _demo(a: argparse.Namespace) -> int:
    from dmm_fast.demo import run_demo
    from dmm_fast.segment import SHEET

    check_device(a.device)
    demo = run_demo(Path(a.out), seed=a.seed, frames=a.frames, progress=not a.quiet, **_model_options(a))
    files = {"masks": demo.folder / "*.png", "sheet": demo.folder / SHEET, "report": demo.folder / "report.json"}
    _summarise(demo.report, files)
    print(demo.scores.table())
    print(f"\nJ {demo.scores.summary['J']:.3f}  F {demo.scores.summary['F']:.3f}  overlay: {demo.overlay}")
    return 0


def _doctor(a: argparse.Namespace) -> int:
    from dmm_fast.info import doctor

    text, healthy = doctor()
    print(text)
    return 0 if healthy else 1

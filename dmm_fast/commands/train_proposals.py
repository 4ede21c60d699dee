"""``dmm-fast train-proposals``: the class-agnostic proposal network, trained on pictures and video frames with masks."""

from __future__ import annotations

import argparse
import math
from typing import Any

from dmm_fast.commands.options import add_command, check_device, count


def add(commands: Any) -> None:
    parser = add_command(
        commands, "train-proposals", run, "train the proposal network on pictures and video frames with masks",
        "Train a class-agnostic Mask R-CNN. Writes the weights (detector.safetensors), the curve (curve.jsonl) and the state\n"
        "to OUT; repeat the command to continue after an interruption.\n\n"
        "small       a frozen ImageNet backbone with small heads, for CPUs\n"
        "resnet50    torchvision's Mask R-CNN, full size; resnext101: the paper's\n"
        "FILE.yaml   'preset: small' and any other setting, one a line",
        ("dmm-fast train-proposals small --data DAVIS --held-out bear,tennis --out detector",
         "measure recall on two videos"),
        ("dmm-fast train-proposals small --data DAVIS stills/ --pseudo DAVIS/proposals --out detector --minutes 60",
         "use another detector's proposals as further objects; stop after an hour"),
        ("dmm-fast train-proposals resnext101 batch=8 rate=1e-4 steps=90000 --data FRAMES --out x101 --device cuda",
         "the paper's network, with other settings"),
    )  # fmt: skip
    parser.add_argument("config", metavar="PRESET|FILE.yaml", help="what to train, see above")
    parser.add_settings("changes", metavar="NAME=VALUE", help="settings to change, such as steps=2000 fpn=64")
    parser.add_argument("--data", required=True, nargs="+", metavar="DIR", help="data sets: video or single pictures")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--pseudo", nargs="+", default=[], metavar="DIR", help="folders of VIDEO.json: proposals that count as objects"
    )
    parser.add_argument("--held-out", type=_names, default=[], metavar="NAME,...", help="videos to measure recall on")
    parser.add_argument("--leave-out", type=_names, default=[], metavar="NAME,...", help="videos not to use")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N", help="stop after N minutes")
    parser.add_argument(
        "--init",
        metavar="FILE|small|coco",
        help="weights to start from, small: the packaged ones (default: ImageNet's for the backbone)",
    )
    parser.add_argument(
        "--backbone", metavar="FILE", help="use the backbone of this segmentation network's weights, so that both can share it"
    )
    parser.add_argument("--workers", type=_count, default=0, metavar="N", help="processes that read data (default: 0)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def _count(text: str) -> int:
    return count(text, least=0)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def run(a: argparse.Namespace) -> int:
    from dmm_fast.training.detector import settings, train

    check_device(a.device)
    if not a.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {a.minutes:g}")
    config, schedule = settings(a.config, a.changes)
    row = train(
        config, schedule, a.data, a.out, pseudo=a.pseudo, held_out=a.held_out, leave_out=a.leave_out, minutes=a.minutes,
        init=a.init, backbone=a.backbone, device=a.device, workers=a.workers, progress=not a.quiet,
    )  # fmt: skip
    if not a.quiet:
        print("  ".join(f"{name} {value:g}" for name, value in row.items()))
    return 0

"""``dmm-fast train``: train DMM-Net from a preset or a configuration file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import add_command, check_device

INTERRUPTED = 130


def add(commands: Any) -> None:
    parser = add_command(
        commands, "train", run, "train the network",
        "Train the network. CONFIG is a preset (small, identity, joint, detail, youtube-vos, davis) or a YAML file. Change settings with\n"
        "KEY=VALUE, with dots for nested ones. Writes to OUT (the setting out): curve.jsonl, last.safetensors, best.safetensors,\n"
        "and state.safetensors, from which --resume continues exactly. See docs/training.md for settings and recipes.",
        ("dmm-fast train small data.path=davis16-train data.proposals=davis16-train/proposals",
         "the packaged network"),
        ("dmm-fast train youtube-vos data.path=YouTubeVOS data.proposals=proposals out=runs/a epochs=5",
         "the paper's training, but shorter"),
        ("dmm-fast train youtube-vos .. --resume --minutes 60", "continue for an hour, save, stop"),
        ("torchrun --nproc-per-node 8 -m dmm_fast train youtube-vos ..", "on eight GPUs, which divide the batch"),
        ("dmm-fast train --online frames/00000.jpg --masks first.png --out mine.safetensors --seconds 60",
         "online learning: the packaged network fitted to one frame, for segment --weights mine.safetensors"),
        ("dmm-fast train small --show", "print the whole configuration as YAML, to start your own from"),
        ("dmm-fast train small data.path=davis16-train data.proposals=davis16-train/proposals --sheet clips.jpg",
         "draw the first clips that this run would learn from"),
        ("dmm-fast train identity data.path=davis16-train data.proposals=davis16-train/proposals --write-clips made --clips 400",
         "write the first clips as a data set of plain folders: for train-proposals, or to evaluate on"),
    )  # fmt: skip
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="a preset's name or a .yaml file")
    parser.add_settings("settings", metavar="KEY=VALUE", help="settings to change, such as optim.lr_new=3e-4")
    parser.add_argument("--show", action="store_true", help="print the configuration and stop")
    parser.add_argument("--sheet", metavar="FILE.jpg", help="draw the first clips with their masks and proposals, and stop")
    parser.add_argument(
        "--write-clips", metavar="DIR", help="write the first clips (frames, masks, proposals) to a new folder, and stop"
    )
    parser.add_argument(
        "--clips", type=int, metavar="N", help="how many clips --sheet draws or --write-clips writes (default: 8)"
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="save and stop after N minutes")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue the run in OUT, if there is one")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    online = parser.add_argument_group("online learning (instead of CONFIG)")
    online.add_argument("--online", metavar="FRAME", help="an image: fit a trained network to it")
    online.add_argument("--masks", metavar="FIRST.png|DIR", help="its objects")
    online.add_argument("--proposals", metavar="FILE", help="a COCO results file with its proposals (default: simulated ones)")
    online.add_argument("--weights", metavar="FILE", help="weights to start from: a file, small (default) or detail")
    online.add_argument("--seconds", type=float, default=60.0, metavar="N", help="how long (default: 60)")
    online.add_argument("--out", metavar="FILE", help="the weights to write")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ...: overrides the setting device (with --online the default is cpu)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def learn_online(a: argparse.Namespace) -> int:
    from dmm_fast.data.masks import read_first_masks
    from dmm_fast.data.video import read_image
    from dmm_fast.inference.segmenter import Segmenter
    from dmm_fast.model.weights import weights_file
    from dmm_fast.proposals.coco import read_coco

    if a.config is not None or a.masks is None or a.out is None:
        raise ValueError("train --online takes --masks and --out, and no CONFIG")
    if not Path(a.out).resolve().parent.is_dir():
        raise ValueError(f"{a.out}: there is no directory {Path(a.out).parent}")
    device = a.device or "cpu"
    check_device(device)
    frame = read_image(a.online)
    ids, notes = read_first_masks(a.masks, frame.shape[:2])
    proposals = read_coco(a.proposals).frame(Path(a.online).stem, frame.shape[:2]) if a.proposals else None
    if proposals is not None and not len(proposals.scores):
        notes = [*notes, f"{a.proposals}: no proposals for image id {Path(a.online).stem}; they are made of the masks"]
    segmenter = Segmenter(weights=weights_file(a.weights or "small"), device=device)
    steps = segmenter.tune(frame, ids, proposals, seconds=a.seconds, progress=not a.quiet)
    segmenter.save_weights(a.out)
    for note in notes:
        print(f"note: {note}")
    print(f"{steps} steps: {a.out}")
    return 0


def run(a: argparse.Namespace) -> int:
    import yaml

    from dmm_fast.training.config import read_config

    if a.online is not None:
        return learn_online(a)
    if a.config is None:
        raise ValueError(
            "train needs a CONFIG (small, identity, joint, detail, youtube-vos, davis or a .yaml file), or --online FRAME"
        )
    config = read_config(a.config, a.settings + ([f"device={a.device}"] if a.device else []))
    if a.show:
        print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
        return 0
    if a.sheet is not None:
        from dmm_fast.training.sheet import write_sheet

        write_sheet(a.sheet, config, 8 if a.clips is None else a.clips, progress=not a.quiet)
        if not a.quiet:
            print(a.sheet)
        return 0
    if a.write_clips is not None:
        from dmm_fast.training.written import write_clips

        names = write_clips(a.write_clips, config, 8 if a.clips is None else a.clips, progress=not a.quiet)
        if not a.quiet:
            print(f"{len(names)} clips: {a.write_clips}")
        return 0
    if a.clips is not None:
        raise ValueError("train --clips N is for --sheet FILE.jpg and --write-clips DIR (for an epoch's, set data.clips=N)")

    from dmm_fast.training.loop import train

    result = train(config, resume=a.resume, overwrite=a.overwrite, minutes=a.minutes, progress=not a.quiet)
    if result.stopped:
        print(f"stopped after step {result.step} ({result.stopped}); the same command with --resume continues", file=sys.stderr)
    elif not a.quiet:
        best = result.best
        told = f", J {best['J']:.3f} and F {best['F']:.3f} at step {best['step']}" if best else ""
        print(f"{result.step} steps{told}: {Path(result.weights)}")
    return INTERRUPTED if result.stopped == "interrupted" else 0

"""``dmm-fast segment``: a video, from its first masks to masks of every frame."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import (
    STOPPED,
    add_command,
    add_detector_options,
    add_model_options,
    check_device,
    complain,
    model_options,
    summarise,
)


def add(commands: Any) -> None:
    parser = add_command(
        commands, "segment", run, "segment a video from its first masks",
        "Segment a video from its first masks.\n\n"
        "Writes to OUT: one palette PNG per frame, contact-sheet.png, what --save asks for, and report.json with the matched\n"
        "proposal, its score, the runner-up's score and whether the object was lost, for each frame and object. The report\n"
        "is written last. If a run stops before that, repeat the command with --resume.",
        ("dmm-fast segment frames/ --masks first.png --proposals proposals.json --out result",
         "a directory of images, its first masks as an indexed PNG, proposals in COCO's results format"),
        ("dmm-fast segment clip.mp4 --masks first.png --out result --overlay result.mp4 --device cuda",
         "a video, with proposals from the packaged detector, on a GPU; also writes a video of the result"),
        ("dmm-fast segment frames/ --masks masks/ --proposals proposals.json --out result",
         "masks/ holds PNGs named like frames, each with the objects that appear there;\n"
         "      or one PNG per object of the first frame"),
        ("dmm-fast segment clip.mp4 --masks masks/ --out result --direction both",
         "masks/ holds PNGs of any frames, named like them: objects are followed forward and backward from there, and an\n"
         "      object that has several is joined in between where both ways agree best"),
        ("dmm-fast segment clip.mov --masks first.png --out result --save cutout,alpha-video,tracks",
         "also the objects without their background, and their masks as COCO JSON"),
        ("dmm-fast segment ... --preset davis --weights imagenet",
         "match on ResNet-50 features and mask overlap"),
    )  # fmt: skip
    parser.add_argument("frames", metavar="FRAMES_DIR|VIDEO", help="a directory of images, or a video file")
    parser.add_argument("--masks", required=True, metavar="FIRST.png|DIR", help="the objects to follow")
    parser.add_argument(
        "--clean-masks", action="store_true",
        help="give the stray ids that anti-aliasing or interpolation leaves along outlines to their neighbours; without "
        "it, such masks are refused",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="where the result goes")
    parser.add_argument(
        "--proposals", default="small", metavar="FILE|DETECTOR",
        help="mask proposals: a COCO results file whose image_id is the frame's name or number, a COCO data set, or a live "
        "detector: small (packaged, default), torchvision, FILE.safetensors from train-proposals, or "
        "detectron2:CONFIG[:WEIGHTS]",
    )  # fmt: skip
    parser.add_argument(
        "--direction", choices=("both", "forward", "backward"),
        help="where objects are followed to from the frames in which they are given (default: both where the first mask is not the "
        "first frame's, else forward)",
    )  # fmt: skip
    parser.add_argument(
        "--image-id-offset", type=int, metavar="N",
        help="added to the file's image ids to give frame numbers, -1 for ids that count from 1 (default: found out where "
        "one constant alone fits, 0: as they are)",
    )  # fmt: skip
    parser.add_argument(
        "--save", type=lambda text: text.split(","), default=["masks"], metavar="KIND,KIND",
        help="results: masks (always), binary (a black and white PNG per object and frame), cutout (PNGs with alpha), "
        "alpha-video (ProRes 4444 or VP9), tracks (COCO and YouTube-VIS JSON)",
    )  # fmt: skip
    parser.add_argument(
        "--overlay", metavar="OUT.mp4",
        help="write a video of the frames with the masks drawn on them, with the input's frame times and sound",
    )  # fmt: skip
    parser.add_argument(
        "--online", metavar="SECONDS|EPOCHS",
        help="first fit the network to the first frame, for a number of seconds (30) or of epochs of 8 steps (20e)",
    )  # fmt: skip
    add_model_options(parser)
    add_detector_options(parser)
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an unfinished run in OUT, if there is one")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(a: argparse.Namespace) -> int:
    from dmm_fast.inference.folder import SHEET
    from dmm_fast.inference.passes import Interrupted
    from dmm_fast.inference.results import result_files
    from dmm_fast.inference.run import segment

    check_device(a.device)
    try:
        report = segment(
            a.frames, a.masks, a.out, proposals=a.proposals, detector_weights=a.detector_weights, video=a.overlay,
            image_id_offset=a.image_id_offset, clean_masks=a.clean_masks, direction=a.direction, save=a.save, online=a.online,
            resume=a.resume, overwrite=a.overwrite, progress=not a.quiet, **model_options(a),
        )  # fmt: skip
    except Interrupted as stop:
        complain(str(stop))
        return STOPPED
    if not a.quiet:
        out = Path(a.out)
        files = {"masks": out / "*.png", "sheet": out / SHEET, "report": out / "report.json", "video": a.overlay}
        files |= result_files(out, report)
        summarise(report, files)
    return 0

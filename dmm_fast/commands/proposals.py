"""``dmm-fast proposals``: a detector's proposals of a video, or of every video of a data set, as files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import (
    FAILED,
    LAYOUTS,
    STOPPED,
    add_command,
    add_engine_options,
    check_alone,
    check_device,
    complain,
    complain_of,
    count,
    engine_of,
    named,
    stopped,
)


def add(commands: Any) -> None:
    parser = add_command(
        commands, "proposals", run, "run a detector on a video or a data set and save its proposals",
        "Run an instance segmenter on every frame and write its proposals as a COCO results file, so that you can segment the\n"
        "video many times without it. Repeat the command to continue an interrupted run.\n\n"
        "With --dataset, OUT is a folder with NAME.json for each video. Files that are there are left as they are. A video that\n"
        "fails is reported and does not stop the others; the exit code is then 3.\n\n"
        "detectors:\n"
        "  small                         the proposal network in the package, for CPUs (default)\n"
        "  torchvision                   Mask R-CNN with the classes of COCO, downloaded on first use\n"
        "  FILE.safetensors              a proposal network of dmm-fast train-proposals\n"
        "  hf:MODEL[@REVISION]           a segmenter of the Hugging Face hub (Mask2Former, OneFormer, EoMT, DETR, SAM, ..), or\n"
        "                                its folder; needs dmm_fast[hf]\n"
        "  detectron2:CONFIG[:WEIGHTS]   a model of detectron2: a file, or a name of its model zoo\n"
        "  NAME,NAME,FILE                several of these, and files of proposals, merged (docs/proposals.md)",
        ("dmm-fast proposals frames/ --out proposals.json", "the 50 best proposals of every frame"),
        ("dmm-fast proposals clip.mp4 --out proposals.json --device cuda --top 20", "fewer, on a GPU"),
        ("dmm-fast proposals --dataset DAVIS --split val --out DAVIS/proposals --detector net.safetensors",
         "one file for each video"),
        ("torchrun --nproc-per-node 4 -m dmm_fast proposals --dataset DAVIS --out DAVIS/proposals --device cuda",
         "the same in four processes, each with a GPU (docs/many-machines.md)"),
        ("dmm-fast proposals frames/ --out p.json --detector detectron2:mask_rcnn.yaml:model.pkl", "a model of your own"),
        ("dmm-fast proposals clip.mp4 --out p.json --detector small,hf:facebook/sam2.1-hiera-tiny --device cuda",
         "what either of two models finds"),
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("frames", nargs="?", metavar="FRAMES_DIR|VIDEO", help="a directory of images, or a video file")
    what.add_argument(
        "--dataset",
        metavar="DIR",
        help="every video of a data set: DAVIS, YouTube-VOS, MOSE, LVOS, SegTrack v2 or plain folders",
    )
    parser.add_argument("--split", metavar="NAME", help="the part of the data set: train, val, ..")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", metavar="NAME",
                        help=f"layout of the data set: {', '.join(LAYOUTS)} (default: detected)")  # fmt: skip
    parser.add_argument("--sequences", metavar="FILE|NAME,...", help="these videos only: a text file, or names")
    parser.add_argument("--out", required=True, metavar="FILE|DIR", help="the file to write; for a data set the folder")
    parser.add_argument("--detector", default="small", metavar="NAME", help="see above (default: small)")
    parser.add_argument("--top", type=count, default=50, metavar="N", help="proposals kept per frame (default: 50)")
    parser.add_argument(
        "--short-side", type=count, metavar="PIXELS", help="the frame's short side in the detector (default: its own)"
    )
    parser.add_argument(
        "--detector-weights", default="DEFAULT", metavar="FILE",
        help="weights for torchvision's Mask R-CNN (.pth, .safetensors; default: COCO's, downloaded on first use)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="for models of the hub and of detectron2"
    )
    parser.add_argument("--batch", type=count, metavar="N", help="frames at once in these models (default: 8 on a GPU, else 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace files, and restart interrupted runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    add_engine_options(parser)


def run(a: argparse.Namespace) -> int:
    from dmm_fast.data.video import open_frames
    from dmm_fast.inference.proposing import named_detector, save_proposals
    from dmm_fast.proposals.base import ProposalError
    from dmm_fast.proposals.sources import open_proposer, split

    if a.dataset:
        return _run_set(a)
    check_alone()
    check_device(a.device)
    if of_a_set := [name for name in ("split", "sequences", "engine") if getattr(a, name)]:
        raise ValueError(f"--{of_a_set[0]} belongs to a data set; it needs --dataset")
    video = open_frames(a.frames)
    if Path(a.out).exists() and not a.overwrite:
        raise ProposalError(f"{a.out}: is there already; --overwrite replaces it")
    detector, files = split(a.detector)
    how: dict[str, Any] = {"top": a.top, "short_side": a.short_side, "device": a.device, "precision": a.precision}
    propose = open_proposer(detector, a.detector_weights, **how) if detector else None
    whose = named_detector(a.detector, a.detector_weights, top=a.top, short_side=a.short_side, precision=a.precision)
    save_proposals(
        Path(a.out), video, propose, fresh=a.overwrite, progress=not a.quiet, batch=a.batch, files=files, top=a.top, whose=whose
    )
    if not a.quiet:
        print(f"proposals of 1 video: {a.out}")
    return 0


def _run_set(a: argparse.Namespace) -> int:
    from dmm_fast.inference.passes import Interrupted
    from dmm_fast.inference.proposal_sets import ProposalsJob, propose_set

    job = ProposalsJob(
        a.dataset, a.out, a.layout, a.split, detector=a.detector, weights=a.detector_weights, top=a.top, short_side=a.short_side,
        device=a.device, precision=a.precision, batch=a.batch, overwrite=a.overwrite,
    )  # fmt: skip
    try:
        summary = propose_set(job, named(a.sequences), engine=engine_of(a), progress=not a.quiet)
    except Interrupted as stop:
        complain(stopped(stop, a.overwrite))
        return STOPPED
    if summary is None:
        return 0  # the first process of torchrun tells
    complain_of(summary["failed"], a.debug)
    if not a.quiet:
        done, failed = len(summary["videos"]), len(summary["failed"])
        print(f"proposals of {done} video{'s' * (done != 1)}: {a.out}; {failed} failed")
    return FAILED if summary["failed"] else 0

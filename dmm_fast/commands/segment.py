"""``dmm-fast segment``: a video, from its first masks to masks of every frame; or every video of a data set."""

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
    check_alone,
    check_device,
    complain,
    complain_of,
    engine_of,
    model_options,
    named,
    set_job,
    stopped,
    summarise,
)


def add(commands: Any) -> None:
    parser = add_command(
        commands, "segment", run, "segment a video from its first masks, or every video of a data set",
        "Segment a video from its first masks, or every video of a data set.\n\n"
        "Writes to OUT: one palette PNG per frame, contact-sheet.png, what --save asks for, and report.json. For each frame\n"
        "and object, the report has the matched proposal, its score, the runner-up's score and whether the object was lost.\n"
        "It is written last. If a run stops before that, repeat the command with --resume.\n\n"
        "With --dataset, OUT has such a folder for each video, and summary.json. Repeat the command to continue: finished\n"
        "videos are left as they are, interrupted ones go on. A video that fails is reported and does not stop the others;\n"
        "the exit code is then 3.",
        ("dmm-fast segment frames/ --masks first.png --proposals proposals.json --out result",
         "a directory of images, its first masks as an indexed PNG, proposals in COCO's results format"),
        ("dmm-fast segment clip.mp4 --masks first.png --out result --overlay result.mp4 --device cuda",
         "a video, with proposals from the packaged detector, on a GPU; also writes a video of the result"),
        ("dmm-fast segment frames/ --masks masks/ --proposals proposals.json --out result",
         "masks/ holds PNGs named like frames, each with the objects that appear there;\n"
         "      or one PNG per object of the first frame"),
        ("dmm-fast segment clip.mp4 --masks masks/ --out result --direction both",
         "masks/ holds PNGs of any frames, named like them: objects are followed forward and backward from there;\n"
         "      between two masks of an object, both ways are joined where they agree best"),
        ("dmm-fast segment clip.mov --masks first.png --out result --save cutout,alpha-video,tracks",
         "also the objects without their background, and their masks as COCO JSON"),
        ("dmm-fast segment camera:0 --masks auto:2 --out live --record --seconds 60",
         "follow the two surest objects that a camera sees, for a minute; rtsp://.., udp://.. and /dev/video0 work the same"),
        ("dmm-fast segment ... --preset davis --weights imagenet",
         "match on ResNet-50 features and mask overlap"),
        ("dmm-fast segment --dataset DAVIS --split val --proposals DAVIS/proposals --out result",
         "a data set; proposals come from files NAME.json in a folder, or from a detector"),
        ("torchrun --nproc-per-node 8 -m dmm_fast segment --dataset DAVIS --split val --out result --device cuda",
         "the same in eight processes, each with a GPU; --engine ray uses a cluster of Ray (docs/many-machines.md)"),
        ("dmm-fast segment --dataset YouTubeVOS --split valid_all_frames --out result --zip result.zip",
         "also writes the zip that the server takes, with the frames it wants"),
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("frames", nargs="?", metavar="FRAMES|STREAM", help="a directory of images, a video file, or a live "
        "camera or stream: camera:0, /dev/video0, rtsp://.., udp://..")  # fmt: skip
    what.add_argument("--dataset", metavar="DIR", help="every video of a data set: DAVIS, YouTube-VOS, MOSE, LVOS, SegTrack v2 or plain "
        "folders")  # fmt: skip
    parser.add_argument("--masks", metavar="FIRST.png|DIR|auto:N", help="the objects to follow; for a stream, auto:N takes the "
        "N surest proposals of the first frame that has any; a data set has its own masks")  # fmt: skip
    parser.add_argument("--out", required=True, metavar="DIR", help="where the result goes")
    add_run_options(parser)
    parser.add_argument(
        "--direction", choices=("both", "forward", "backward"),
        help="where to follow objects from the frames in which they are given (default: both if the first mask is not "
        "of the first frame, else forward)",
    )  # fmt: skip
    parser.add_argument(
        "--image-id-offset", type=int, metavar="N",
        help="added to the file's image ids to give frame numbers: -1 for ids that count from 1, 0 for ids as they are "
        "(default: detected if only one constant fits)",
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
    sets = parser.add_argument_group("with --dataset")
    add_set_options(sets)
    sets.add_argument(
        "--zip", metavar="FILE.zip", help="also write what the data set's server takes, checked against its rules"
    )
    add_engine_options(parser)
    add_model_options(parser)
    add_detector_options(parser)
    live = parser.add_argument_group(
        "camera or stream", "Each step takes the newest frame; those that came in between are dropped and counted."
    )
    live.add_argument(
        "--record", action="store_true", help="keep the frames that were taken, in OUT/recording, and their masks"
    )
    live.add_argument(
        "--seconds", type=float, metavar="N", help="stop after N seconds (default: at the stream's end, or Ctrl-C)"
    )
    live.add_argument(
        "--patience", type=float, default=5.0, metavar="N", help="seconds without a frame until the source counts as gone (5)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an unfinished run in OUT, if there is one")
    again.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(a: argparse.Namespace) -> int:
    from dmm_fast.data.stream import is_stream
    from dmm_fast.inference.folder import SHEET
    from dmm_fast.inference.passes import Interrupted
    from dmm_fast.inference.results import result_files

    if a.dataset:
        return _run_set(a)
    check_alone()
    check_device(a.device)
    if not a.masks:
        raise ValueError("--masks FIRST.png|DIR is missing: the objects to follow")
    if of_a_set := [name for name in ("split", "sequences", "keep_proposals", "zip", "engine") if getattr(a, name)]:
        raise ValueError(f"--{of_a_set[0].replace('_', '-')} belongs to a data set; it needs --dataset")
    live = is_stream(a.frames)
    try:
        report = _stream(a) if live else _file(a)
    except Interrupted as stop:
        complain(str(stop))
        return STOPPED
    if not a.quiet:
        out = Path(a.out)
        files = {"report": out / "report.json", "video": a.overlay}
        if not live or a.record:
            files = {"masks": out / "*.png", "sheet": out / SHEET} | files | result_files(out, report)
        summarise(report, files)
    return 0


def _file(a: argparse.Namespace) -> dict[str, Any]:
    from dmm_fast.inference.folder import RunError
    from dmm_fast.inference.run import segment

    if a.record or a.seconds:
        raise RunError(
            f"--record and --seconds are for a camera or a stream; {a.frames} is a file (camera:0, rtsp://..: see --help)"
        )
    return segment(
        a.frames, a.masks, a.out, proposals=a.proposals, detector_weights=a.detector_weights, video=a.overlay,
        image_id_offset=a.image_id_offset, clean_masks=a.clean_masks, direction=a.direction, save=a.save, online=a.online,
        resume=a.resume, overwrite=a.overwrite, progress=not a.quiet, **model_options(a),
    )  # fmt: skip


def _stream(a: argparse.Namespace) -> dict[str, Any]:
    from dmm_fast.inference.folder import RunError
    from dmm_fast.inference.live import segment_stream

    for name in ("resume", "online", "direction", "image_id_offset", "clean_masks", "backbone"):
        if getattr(a, name) not in (None, False):
            raise RunError(f"--{name.replace('_', '-')} is for files, not for a camera or a stream as it comes")
    model = model_options(a)
    del model["backbone"]
    return segment_stream(
        a.frames, a.masks, a.out, proposals=a.proposals, detector_weights=a.detector_weights, record=a.record, save=a.save,
        video=a.overlay, seconds=a.seconds, patience=a.patience, overwrite=a.overwrite, progress=not a.quiet, **model,
    )  # fmt: skip


def _run_set(a: argparse.Namespace) -> int:
    from dmm_fast.data.submission import check_layout, write_submission
    from dmm_fast.inference.engines import Alone
    from dmm_fast.inference.passes import Interrupted
    from dmm_fast.inference.sets import SUMMARY, segment_set

    for name, why in (
        ("masks", "a data set has its own masks"),
        ("overlay", "it names one file; --resume --overlay makes a video's later"),
        ("record", "it is for a camera or a stream"),
        ("seconds", "it is for a camera or a stream"),
    ):
        if getattr(a, name):
            raise ValueError(f"--{name} does not go with --dataset: {why}")
    if a.direction not in (None, "forward"):
        raise ValueError("--dataset goes forward only: what comes before an object's first mask is not scored")
    job = set_job(a, a.dataset, image_id_offset=a.image_id_offset, save=a.save)
    if a.zip:
        if a.sequences:
            raise ValueError("--zip needs every video of the split: leave --sequences out; what is finished is not done again")
        if not Path(a.zip).resolve().parent.is_dir():
            raise ValueError(f"{a.zip}: there is no directory {Path(a.zip).parent}")
        check_layout(job.open())
    engine = engine_of(a)
    try:
        summary = segment_set(job, named(a.sequences), engine=engine, progress=not a.quiet)
    except Interrupted as stop:
        complain(stopped(stop, a.overwrite))
        return STOPPED
    if summary is None:
        return 0  # the first process of torchrun tells
    complain_of(summary["failed"], a.debug)
    if a.zip and not summary["failed"]:
        count = write_submission(job.open(), Path(a.out), Path(a.zip), progress=not a.quiet)
    elif a.zip:
        complain(f"{a.zip}: not written, since not every video is done")
    if not a.quiet:
        print(f"{len(summary['videos'])} videos, {summary['frames']} frames, {summary['objects']} objects, {summary['fps']} frames/s; "
              f"{len(summary['failed'])} failed")  # fmt: skip
        if not isinstance(engine, Alone):
            print(
                f"in {summary['processes']['seconds']:.1f} s by many processes ({summary['processes']['engine']}); frames/s are those of one"
            )
        print(f"{'summary':12}{Path(a.out) / SUMMARY}")
        if a.zip and not summary["failed"]:
            print(f"{'zip':12}{a.zip} ({count} masks)")
    return FAILED if summary["failed"] else 0

"""From a clip and its first masks to masks on disk: what ``dmm-fast segment`` runs.

The folder OUT holds one palette PNG per frame, ``contact-sheet.png``, ``report.json`` and what else was asked for (see
`results`). While a run goes on, or after it was cut short, OUT also holds ``unfinished/`` with what a later run needs to go on
from there; the report is written last, so a folder without it is never mistaken for a finished one.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmm_fast.data.video import ImageFrames, VideoFrames, check_video_name, open_frames
from dmm_fast.files import digest, listed
from dmm_fast.inference.folder import FILES, RESULTS, UNFINISHED, RunError, RunFolder, direction_of, settle, take
from dmm_fast.inference.given import GivenMasks, span
from dmm_fast.inference.joining import Join, backward_from, join
from dmm_fast.inference.models import Models
from dmm_fast.inference.passes import Interrupted, Pass
from dmm_fast.inference.proposing import Live, proposal_source
from dmm_fast.inference.report import by_object, speed
from dmm_fast.inference.results import check_kinds, check_overlay, write_results
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.model import Config
from dmm_fast.proposals.sources import renamed, sources

DIRECTIONS = ("both", "forward", "backward")


def segment(
    frames: str | os.PathLike | ImageFrames | VideoFrames,
    masks: str | os.PathLike,
    out: str | os.PathLike,
    *,
    proposals: str | os.PathLike = "small",
    detector_weights: str | os.PathLike = "DEFAULT",
    image_id_offset: int | None = None,
    clean_masks: bool = False,
    direction: str | None = None,
    save: Sequence[str] = ("masks",),
    video: str | os.PathLike | None = None,
    preset: str | None = None,
    backbone: str | None = None,
    short_side: int | None = None,
    refine: str | None = None,
    matcher: str = "dmm",
    decision: str = "confident",
    weights: str | os.PathLike | None = None,
    online: str | None = None,
    device: str = "cpu",
    graph: bool | None = None,
    precision: str = "float32",
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    label: str | None = None,
    save_every: float = 5.0,
    models: Models | None = None,
    tidy: bool = False,
    apart: Path | None = None,
) -> dict[str, Any]:
    """Segment a clip; returns the report that is also written to OUT/report.json.

    frames: a directory of images or a video file, or either opened. masks: the first frame's masks, or a directory with masks of several
    frames (see `GivenMasks`). clean_masks: give the stray ids of smoothed masks to their neighbours; else they are refused.
    proposals: a COCO file, a detector (see `open_proposer`), or several of both, with commas. image_id_offset: added to the file's image ids to give the
    frames' numbers; without one, ids that are off by a constant are found out (see `ProposalFile.align`).
    direction: "forward", "backward" or "both": where objects are followed to from the frames in which they are given; None: both
    where the first mask is not the first frame's, else forward. Both passes are joined (see `joining`).
    save: kinds of results, of masks (always), binary, cutout, alpha-video, tracks. video: an overlay video to write.
    online: how long to fit the network to the first frame before the rest, "30" for seconds or "20e" for epochs of 8 steps.
    graph: whether the step runs as a CUDA graph, precision: of the convolutions (see `Segmenter`); the report says what it was.
    save_every: seconds between saved states. label: what stands before the progress bar.
    models: where networks are taken from that an earlier run has loaded; a run with online learning takes none from there.
    tidy: after an error leave nothing of the run in OUT; else what --resume goes on from stays.
    apart: a path on OUT's storage where the run works. OUT appears when it is whole, and after Interrupted.

    Raises RunError, FramesError, MaskError or ProposalError for input that cannot be used, Interrupted after a signal.
    """
    kinds = check_kinds(list(save))
    source, out = frames if isinstance(frames, ImageFrames | VideoFrames) else open_frames(frames), Path(out)
    given = GivenMasks(Path(masks), source, clean_masks)
    if video is not None:
        check_video_name(video, coming=out)
    budget = online_budget(online) if online is not None else None
    if direction not in (None, *DIRECTIONS):
        raise RunError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    direction = direction or (resume and direction_of(out)) or ("both" if given.first else "forward")
    settings = run_settings(
        source.path, given.path, proposals, detector_weights, weights, preset=preset, backbone=backbone, short_side=short_side,
        refine=refine, matcher=matcher, decision=decision, online=online, precision=precision, clean_masks=clean_masks,
        image_id_offset=image_id_offset, direction=direction, given=given.digests,
    )  # fmt: skip
    _check_out(out, source.path, given.path)
    folder = RunFolder(out, settings)
    if resume and folder.finished:
        return _finished(source, folder, kinds, video, progress)
    go_on = folder.find(source.stems, resume, overwrite)
    overlays = [str(Path(video).resolve())] if video is not None else []
    own = [] if overwrite else folder.overlays
    if video is not None:
        check_overlay(Path(video), overwrite or overlays[0] in own, source.path)
    models = models if models is not None and budget is None else Models()
    propose, notes = proposal_source(proposals, detector_weights, image_id_offset, source, device, models.detector, precision)
    how: dict[str, Any] = {
        "preset": preset,
        "backbone": backbone,
        "weights": weights,
        "short_side": short_side,
        "refine": refine,
    }
    if go_on and online and folder.started:
        how = {"weights": folder.tuned}
        if isinstance(propose, Live) and folder.tuned_proposer.exists():
            propose.load(folder.tuned_proposer)
    segmenter = _load(
        models, propose.proposer if isinstance(propose, Live) else None, **how, matcher=matcher, decision=decision,
        device=device, graph=graph, precision=precision,
    )  # fmt: skip
    _check_online(budget, segmenter)
    if apart is not None:
        go_on = go_on and take(out, apart)
        folder = RunFolder(apart, settings)
    try:
        folder.begin(source.stems, go_on, resume, overwrite)
    except BaseException:
        if apart is not None and go_on:
            settle(apart, out)
        raise
    try:
        folder.claim(*own, *overlays)
        passes = _follow(source, folder, given, propose, segmenter, budget, notes, progress, label, save_every)
        settings = {**settings, "device": str(segmenter.device), "graph": segmenter.graph}
        report = _report(source, folder, given, passes, settings, progress) | {
            "results": kinds,
            "overlays": folder.overlays,
        }
        report["notes"] += write_results(source, folder, report, kinds, Path(video) if video is not None else None, progress)
        folder.finish(report)
        if apart is not None:
            settle(apart, out)
    except Exception as error:
        if tidy and not isinstance(error, Interrupted):
            folder.discard(source.stems)
            if apart is not None and overwrite and out.is_dir():
                RunFolder(out, settings).discard(source.stems)
        elif apart is not None and not RunFolder(out, settings).finished:
            settle(apart, out)
        raise
    finally:
        folder.release()
    return report


def check_options(
    models: Models,
    *,
    proposals: str | os.PathLike | None = None,
    detector_weights: str | os.PathLike = "DEFAULT",
    save: Sequence[str] = ("masks",),
    online: str | None = None,
    image_id_offset: int | None = None,
    clean_masks: bool = False,
    **how: Any,
) -> None:
    """Load what runs with these arguments of `segment` need, before there is a video, and raise what each of them would.

    proposals: a detector; None for files.
    """
    check_kinds(list(save))
    budget = online_budget(online) if online is not None else None
    detector = None
    if proposals is not None:
        where, precision = how.get("device", "cpu"), how.get("precision", "float32")
        detector = models.detector(proposals, detector_weights, device=where, precision=precision)
    _check_online(budget, _load(models, detector, **how))


def _load(
    models: Models,
    detector: Callable | None,
    *,
    preset: str | None = None,
    backbone: str | None = None,
    weights: str | os.PathLike | None = None,
    short_side: int | None = None,
    refine: str | None = None,
    matcher: str = "dmm",
    decision: str = "confident",
    device: str = "cpu",
    graph: bool | None = None,
    precision: str = "float32",
) -> Segmenter:
    return models.segmenter(
        config_of(preset, backbone), weights=weights, short_side=short_side, refine=refine, matcher=matcher, decision=decision,
        device=device, graph=graph, precision=precision, proposer=detector,
    )  # fmt: skip


def _check_online(budget: dict[str, float] | None, segmenter: Segmenter) -> None:
    if budget is not None and segmenter.config.backbone == "none":
        raise RunError("online learning needs a network: without a backbone (the preset iou) there is nothing to learn")


def _follow(
    frames: ImageFrames | VideoFrames,
    folder: RunFolder,
    given: GivenMasks,
    propose: Callable,
    segmenter: Segmenter,
    budget: dict[str, float] | None,
    notes: list[str],
    progress: bool,
    label: str | None,
    save_every: float,
) -> list[Pass]:
    """The passes of a run, made with networks that are ready."""
    passes: list[Pass] = []
    direction = folder.settings["direction"]
    for name in folder.passes:
        order = range(len(frames)) if name == "forward" else range(backward_from(given.places, direction), -1, -1)
        one = Pass(name, order, frames, given, propose, segmenter, folder)
        if passes:
            one.company = passes[0].folder
        else:
            one.online = budget
            if not one.next:
                one.notes = [segmenter.note, *given.notes, *_not_followed(frames, given, direction), *notes]
                for note in one.notes[1:] if progress else []:
                    tqdm.write(f"note: {note}", sys.stderr)  # now, not after hours
        one.follow(progress, save_every, label)
        passes.append(one)
    return passes


def config_of(preset: str | None, backbone: str | None) -> Any:
    """What a `Segmenter` takes for the two."""
    return Config.preset(preset or "davis", backbone=backbone) if backbone else preset


USUAL = {
    "preset": None, "backbone": None, "short_side": None, "refine": None, "matcher": "dmm", "decision": "confident",
    "precision": "float32", "online": None, "clean_masks": False, "image_id_offset": None, "direction": "forward",
}  # fmt: skip


def run_settings(
    frames: Path,
    masks: Path,
    proposals: str | os.PathLike,
    detector_weights: str | os.PathLike,
    weights: str | os.PathLike | None,
    **how: Any,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed. how: what is not as `USUAL` has it."""
    read = [*sources(proposals), *(str(file) for file in (weights, detector_weights) if file is not None)]
    return {
        "frames": str(frames.resolve()),
        "masks": str(masks.resolve()),
        "proposals": renamed(proposals, lambda path: Path(path).resolve()),
        **USUAL,
        **how,
        "weights": str(Path(weights).resolve()) if weights not in (None, "imagenet") else weights,
        "detector_weights": str(detector_weights) if "torchvision" in sources(proposals) else None,
        FILES: {str(Path(name).resolve()): digest(Path(name)) for name in read if Path(name).is_file()},
    }


def _finished(
    frames: ImageFrames | VideoFrames, folder: RunFolder, kinds: list[str], video: str | os.PathLike | None, progress: bool
) -> dict[str, Any]:
    """The report of a run that has ended; results that are asked for only now are made from its masks."""
    report = folder.report()
    kinds = [kind for kind in kinds if kind not in report.get("results", [])]
    wanted = Path(video) if video is not None else None
    if wanted is not None:
        own = report.get("overlays", [])
        check_overlay(wanted, str(wanted.resolve()) in own, frames.path)
        report["overlays"] = list(dict.fromkeys([*own, str(wanted.resolve())]))
    if kinds or wanted:
        notes = write_results(frames, folder, report, kinds, wanted, progress)
        report["results"] = [*report.get("results", []), *kinds]
        report["notes"] += notes
        folder.write_report(report)
    return report


def online_budget(text: str) -> dict[str, float]:
    """ "30" -> {"seconds": 30.0}, "20e" -> {"epochs": 20}: how long `dmm_fast.learning.online.tune` takes."""
    kind, number = ("epochs", text[:-1]) if text.endswith("e") else ("seconds", text)
    try:
        value = {"epochs": int, "seconds": float}[kind](number)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise RunError(f"online learning takes seconds such as 30, or epochs such as 20e, got {text!r}")
    return {kind: value}


def _not_followed(frames: ImageFrames | VideoFrames, given: GivenMasks, direction: str) -> list[str]:
    """What to say of the frames that no pass comes to."""
    if direction == "forward" and (before := frames.stems[: given.first]):
        where = f"lie before the first mask, that of frame {frames.stems[given.first]}"
        return [f"{span(before)} {where}: no object is followed there, their masks are empty (--direction both does)"]
    if direction == "backward" and (after := frames.stems[(last := backward_from(given.places, direction)) + 1 :]):
        where = f"lie after the last mask, that of frame {frames.stems[last]}"
        return [f"{span(after)} {where}: no object is followed there, their masks are empty (--direction both does)"]
    return []


def _report(
    frames: ImageFrames | VideoFrames,
    folder: RunFolder,
    given: GivenMasks,
    passes: list[Pass],
    settings: dict[str, Any],
    progress: bool,
) -> dict[str, Any]:
    """What there is to say when the last pass has ended; after one backward or two, joins them first."""
    seconds: dict[str, float] = defaultdict(float)
    for name, value in chain.from_iterable(one.seconds.items() for one in passes):
        seconds[name] += value
    joins: list[Join] = []
    if settings["direction"] == "forward":
        rows = folder.passes["forward"].rows()
    else:
        begin = time.perf_counter()
        rows, joins = join(frames.stems, frames.size, folder, given.places, progress)
        seconds["join"] = time.perf_counter() - begin
    notes = [*chain.from_iterable(one.notes for one in passes), *frames.notes, *(one.note for one in joins if one.note)]
    return {
        "dmm_fast": version("dmm_fast"),
        "settings": settings,
        "size": list(frames.size),
        "notes": [*dict.fromkeys(notes), *_held(rows)],
        "speed": speed(len(rows), seconds),
        "objects": by_object(rows),
        **({"joins": [asdict(one) for one in joins]} if joins else {}),
        "frames": rows,
    }


def _held(rows: list[dict[str, Any]]) -> list[str]:
    """What to say of objects that were given more than once."""
    at = defaultdict(list)
    for row in rows:
        for entry in row["objects"]:
            if "given" in entry:
                at[entry["id"]].append(row["frame"])
    together = defaultdict(list)
    for label, frames in sorted(at.items()):
        if len(frames) > 1:
            together[tuple(frames)].append(label)
    return [f"object{'s' * (len(labels) > 1)} {listed(labels)}: given in {len(frames)} frames ({listed(frames)}), where the masks are "
            "those given" for frames, labels in together.items()]  # fmt: skip


def _check_out(out: Path, frames: Path, masks: Path) -> None:
    ours = {out / name for name in (*RESULTS, UNFINISHED)}  # which a run removes
    for what, path in (("frames", frames), ("masks", masks), ("masks", masks.parent)):
        if out.resolve() == path.resolve() or any(path.resolve().is_relative_to(one.resolve()) for one in ours):
            raise RunError(f"{out}: {path}, where the {what} are read from, lies where results go; choose another --out")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; --out must be a directory")

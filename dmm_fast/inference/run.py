"""From a clip and its first masks to masks on disk: what ``dmm-fast segment`` runs.

The folder OUT holds one palette PNG per frame, ``contact-sheet.png``, ``report.json`` and what else was asked for (see
`results`). While a run goes on, or after
it was cut short, OUT also holds ``unfinished/`` with what a later run needs to go on from there; the report is written
last, so a folder without it is never mistaken for a finished one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dmm_fast.data.masks import write_mask
from dmm_fast.data.video import Behind, ImageFrames, VideoFrames, check_video_name, open_frames, prefetch
from dmm_fast.inference.folder import RunError, RunFolder
from dmm_fast.inference.given import GivenMasks
from dmm_fast.inference.report import by_object, row_of, speed
from dmm_fast.inference.results import check_kinds, write_results
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.model import Config, Proposals, load_weights, read_weights
from dmm_fast.model.weights import write_tensors
from dmm_fast.proposals.coco import read_coco
from dmm_fast.proposals.sources import is_detector, open_proposer


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


# ---------------------------------------------------------------------------------------------------------- the run


def segment(
    frames: str | os.PathLike,
    masks: str | os.PathLike,
    out: str | os.PathLike,
    *,
    proposals: str | os.PathLike = "small",
    detector_weights: str | os.PathLike = "DEFAULT",
    image_id_offset: int | None = None,
    clean_masks: bool = False,
    save: Sequence[str] = ("masks",),
    video: str | os.PathLike | None = None,
    preset: str | None = None,
    backbone: str | None = None,
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
    save_every: float = 5.0,
) -> dict[str, Any]:
    """Segment a clip; returns the report that is also written to OUT/report.json.

    frames: a directory of images or a video file. masks: the first frame's masks, or a directory with masks of several
    frames (see `GivenMasks`). clean_masks: give the stray ids of smoothed masks to their neighbours; else they are refused.
    proposals: a COCO file or a detector (see `open_proposer`). image_id_offset: added to the file's image ids to give the
    frames' numbers; without one, ids that are off by a constant are found out (see `ProposalFile.align`).
    save: kinds of results, of masks (always), binary, cutout, alpha-video, tracks. video: an overlay video to write.
    online: how long to fit the network to the first frame before the rest, "30" for seconds or "20e" for epochs of 8 steps.
    graph: whether the step runs as a CUDA graph, precision: of the convolutions (see `Segmenter`); the report says what it was.
    save_every: seconds between saved states.

    Raises RunError, FramesError, MaskError or ProposalError for input that cannot be used, Interrupted after a signal.
    """
    kinds = check_kinds(list(save))
    source, out = open_frames(frames), Path(out)
    given = GivenMasks(Path(masks), source, clean_masks)
    if video is not None:
        check_video_name(video, coming=out)
    budget = online_budget(online) if online is not None else None
    settings = run_settings(
        source.path, given.path, proposals, detector_weights, weights, preset=preset, backbone=backbone, refine=refine,
        matcher=matcher, decision=decision, online=online, precision=precision, clean_masks=clean_masks,
        image_id_offset=image_id_offset,
    )  # fmt: skip
    _check_out(out, source, given)
    folder = RunFolder(out, settings)
    if resume and folder.finished:
        return _finished(source, folder, kinds, video, progress)
    checkpoint = folder.find(source.stems, resume, overwrite)
    propose, notes = proposal_source(proposals, detector_weights, image_id_offset, source, device)
    detector = propose.proposer if isinstance(propose, Live) else None
    if checkpoint and checkpoint["started"]:
        kept = folder.tuned if online is not None else weights
        if folder.tuned_proposer.exists() and isinstance(propose, Live):
            propose.load(folder.tuned_proposer)
        path = folder.state(checkpoint["next"])
        segmenter = Segmenter.load(path, weights=kept, device=device, graph=graph, proposer=detector, precision=precision)
    else:
        config = Config.preset(preset or "davis", backbone=backbone) if backbone else preset
        how: dict[str, Any] = {
            "refine": refine, "matcher": matcher, "decision": decision, "graph": graph, "proposer": detector,
            "precision": precision,
        }  # fmt: skip
        segmenter = Segmenter(config, weights=weights, device=device, **how)
    if budget is not None and segmenter.config.backbone == "none":
        raise RunError("online learning needs a network: without a backbone (the preset iou) there is nothing to learn")
    folder.begin(source.stems, checkpoint)
    run = _Run(source, given, propose, segmenter, folder, checkpoint, budget, [*given.notes, *notes])
    run.forward(progress, save_every)
    return run.finish(kinds, video, {**settings, "device": str(segmenter.device), "graph": segmenter.graph})


def run_settings(
    frames: Path,
    masks: Path,
    proposals: str | os.PathLike,
    detector_weights: str | os.PathLike,
    weights: str | os.PathLike | None,
    **model: Any,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    return {
        "frames": str(frames.resolve()),
        "masks": str(masks.resolve()),
        "proposals": str(proposals if is_detector(proposals) else Path(proposals).resolve()),
        **model,
        "weights": str(Path(weights).resolve()) if weights not in (None, "imagenet") else weights,
        "detector_weights": str(detector_weights) if proposals == "torchvision" else None,
    }


def _finished(
    frames: ImageFrames | VideoFrames, folder: RunFolder, kinds: list[str], video: str | os.PathLike | None, progress: bool
) -> dict[str, Any]:
    """The report of a run that has ended; results that are asked for only now are made from its masks."""
    report = folder.report()
    kinds = [kind for kind in kinds if kind not in report.get("results", [])]
    wanted = Path(video) if video is not None and not Path(video).exists() else None
    if kinds or wanted:
        notes = write_results(frames, folder, report, kinds, wanted, progress)
        report["results"] = [*report.get("results", []), *kinds]
        report["notes"] += notes
        if kinds or notes:
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


class _Run:
    """The loop over frames, and what it counts."""

    def __init__(
        self,
        frames: ImageFrames | VideoFrames,
        given: GivenMasks,
        propose: Callable,
        segmenter: Segmenter,
        folder: RunFolder,
        checkpoint: dict | None,
        online: dict[str, float] | None,
        notes: list[str],
    ):
        self.frames, self.given, self.propose, self.segmenter, self.folder = frames, given, propose, segmenter, folder
        self.online = online
        checkpoint = checkpoint or {"next": 0, "seconds": {}, "notes": [], "started": False}
        self.next: int = checkpoint["next"]
        self.seconds: dict[str, float] = defaultdict(float, checkpoint["seconds"])
        self.notes: list[str] = checkpoint["notes"] or [segmenter.note, *notes]
        self.started: bool = checkpoint["started"]

    def forward(self, progress: bool, save_every: float) -> None:
        self.progress = progress
        if progress and not self.next:
            for note in self.notes[1:]:
                tqdm.write(f"note: {note}", sys.stderr)  # now, not after hours
        bar = tqdm(total=len(self.frames), initial=self.next, unit=" frames", disable=None if progress else True)
        source = iter(prefetch(self.frames.read(self.next)))
        saved = time.monotonic()
        with bar, Behind() as self.behind, _stop_requested() as stop:
            self.stop = stop
            while True:
                with self._clock("decode"):
                    item = next(source, None)
                if item is None:
                    break
                self._one(*item)
                self.next += 1
                bar.update()
                if stop() or time.monotonic() - saved >= save_every:
                    self._save()
                    saved = time.monotonic()
                if stop():
                    raise Interrupted(f"stopped after {self.next} of {len(self.frames)} frames; --resume continues from there")
            if not self.started:
                raise RunError(f"{self.given.path}: no frame was reached for which there is a mask")
            self._save()

    def _one(self, stem: str, frame: np.ndarray) -> None:
        """One frame: match and refine, take in the masks given for it, write."""
        ids, objects = np.zeros(frame.shape[:2], np.uint8), []
        if self.started:
            proposals = None  # a detector's are part of the step
            if not isinstance(self.propose, Live):
                with self._clock("proposals"):
                    proposals = self.propose(stem, frame)
            with self._clock("step"):
                result = self.segmenter.step(frame, proposals)
            ids = np.array(result.ids)
            objects = [row_of(entry) for entry in result.objects]
        if stem in self.given:
            self._take_in(stem, frame, ids, objects)
        row: dict[str, Any] = {"frame": stem, "objects": objects}
        if self.next in self.frames.missing:
            row["picture"] = "missing"  # it could not be decoded; another stands for it
        with self._clock("write"):  # what of it holds up the next frame
            self.behind(self._write, row, ids)

    def _write(self, row: dict[str, Any], ids: np.ndarray) -> None:
        write_mask(self.folder.mask(row["frame"]), ids)
        self.folder.append(row)

    def _take_in(self, stem: str, frame: np.ndarray, ids: np.ndarray, objects: list[dict]) -> None:
        """Start with the masks given for this frame, or add those of them that are new."""
        masks, notes = self.given.read(stem, first=not self.started)
        self.notes += [f"{stem}: {note}" for note in notes]
        known = self.segmenter.object_ids if self.started else []
        new = {int(label): masks == label for label in np.unique(masks) if label and label not in known}
        if not self.started:
            if self.online:
                self._learn(stem, frame, new)
            with self._clock("step"):
                self.segmenter.start(frame, new)
            self.started = True
        elif new:
            with self._clock("step"):
                self.segmenter.add(new)
            self.notes.append(f"{stem}: new object{'s' * (len(new) > 1)} {', '.join(map(str, new))}")
        for label, mask in new.items():
            ids[mask] = label
            objects.append({"id": label, "given": True})

    def _learn(self, stem: str, frame: np.ndarray, objects: dict[int, np.ndarray]) -> None:
        """Online learning; what was learnt is kept beside the checkpoints, for --resume."""
        budget = dict(self.online or {})
        if isinstance(self.propose, Live) and self.propose.learns:
            with self._clock("online"):  # a third of the time: its steps are short
                share = {kind: amount / 3 if kind == "seconds" else amount for kind, amount in budget.items()}
                self.propose.tune(frame, objects, stop=self.stop, **share)
                self.propose.save(self.folder.tuned_proposer)
            if "seconds" in budget:
                budget["seconds"] *= 2 / 3
        with self._clock("proposals"):
            proposals = self.propose(stem, frame)
        with self._clock("online"):
            steps = self.segmenter.tune(frame, objects, proposals, progress=self.progress, stop=self.stop, **budget)
        if self.stop():
            raise Interrupted("stopped while the first frame was learnt; --resume starts it again")
        self.segmenter.save_weights(self.folder.tuned)
        self.notes.append(f"{stem}: the network was fitted to this frame, {steps} steps in {self.seconds['online']:.0f} s")

    def _save(self) -> None:
        with self._clock("write"):
            self.behind.wait()
        with self._clock("save"):
            state = {"next": self.next, "seconds": dict(self.seconds), "notes": self.notes, "started": self.started}
            self.folder.save(state, self.segmenter if self.started else None)

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin

    def finish(self, kinds: list[str], video: str | os.PathLike | None, settings: dict[str, Any]) -> dict[str, Any]:
        rows = self.folder.rows()
        height, width = self.frames.size
        report: dict[str, Any] = {
            "dmm_fast": version("dmm_fast"),
            "settings": settings,
            "size": [height, width],
            "notes": [*self.notes, *self.frames.notes],
            "speed": speed(len(rows), self.seconds),
            "results": kinds,
            "objects": by_object(rows),
            "frames": rows,
        }
        report["notes"] += write_results(
            self.frames, self.folder, report, kinds, Path(video) if video is not None else None, self.progress
        )
        self.folder.finish(report)
        return report


def _check_out(out: Path, frames: ImageFrames | VideoFrames, given: GivenMasks) -> None:
    for what, path in (("frames", frames.path), ("masks", given.path), ("masks", given.path.parent)):
        if out.resolve() == path.resolve():
            raise RunError(f"{out}: this is where the {what} are read from; choose another --out")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; --out must be a directory")


class Live:
    """A live detector as a source of proposals; a class-agnostic one can learn the objects of the first frame."""

    def __init__(self, proposer: Callable):
        self.proposer: Any = proposer
        self.learns = getattr(proposer, "class_agnostic", False)

    def __call__(self, stem: str, frame: np.ndarray) -> Proposals:
        return self.proposer(frame)

    def tune(self, frame: np.ndarray, objects: dict[int, np.ndarray], **budget: Any) -> None:
        from dmm_fast.learning.online import tune_proposer  # training is not needed otherwise

        masks = torch.from_numpy(np.stack(list(objects.values())))
        tune_proposer(self.proposer, torch.from_numpy(frame).permute(2, 0, 1), masks, **budget)

    def save(self, path: Path) -> None:
        """What `tune` has changed."""
        write_tensors(path, self.proposer.model.roi_heads.state_dict(), {"kind": "online"})

    def load(self, path: Path) -> None:
        load_weights(self.proposer.model.roi_heads, read_weights(path), str(path))


def proposal_source(
    proposals: str | os.PathLike,
    weights: str | os.PathLike,
    offset: int | None,
    frames: ImageFrames | VideoFrames,
    device: str,
) -> tuple[Callable, list[str]]:
    """(stem, frame) -> Proposals, and what the user should know of them."""
    if is_detector(proposals):
        return Live(open_proposer(proposals, weights, device=device)), []
    file = read_coco(proposals)
    notes = file.align(frames.stems, offset)
    return lambda stem, frame: file.runs(stem, frame.shape[:2]), notes


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came. The frame at hand is finished; a second Ctrl-C stops
    at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, stack: Any) -> None:
        asked.set()
        os.write(2, b"\nfinishing this frame, then saving; press again to stop at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

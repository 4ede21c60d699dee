"""From a clip and its first masks to masks on disk: what ``dmm-fast segment`` runs.

The folder OUT holds one palette PNG per frame, ``contact-sheet.png`` and ``report.json``. While a run goes on, or after
it was cut short, OUT also holds ``unfinished/`` with what a later run needs to go on from there; the report is written
last, so a folder without it is never mistaken for a finished one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dmm_fast.data.masks import read_mask, write_mask
from dmm_fast.data.video import Behind, ImageFrames, VideoFrames, VideoWriter, check_video_name, open_frames, prefetch
from dmm_fast.inference.folder import SHEET, RunError, RunFolder
from dmm_fast.inference.given import GivenMasks
from dmm_fast.inference.overlay import ContactSheet, overlay
from dmm_fast.inference.segmenter import ObjectResult, Segmenter
from dmm_fast.model import Config, Proposals, load_weights, read_weights
from dmm_fast.model.weights import write_tensors
from dmm_fast.proposals.base import ProposalError
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
    frames (see `GivenMasks`). proposals: a COCO results file or a detector (see `open_proposer`). video: an overlay
    video to write.
    online: how long to fit the network to the first frame before the rest, "30" for seconds or "20e" for epochs of 8 steps.
    graph: whether the step runs as a CUDA graph, precision: of the convolutions (see `Segmenter`); the report says what it was.
    save_every: seconds between saved states.

    Raises RunError, FramesError, MaskError or ProposalError for input that cannot be used, Interrupted after a signal.
    """
    source, out = open_frames(frames), Path(out)
    given = GivenMasks(Path(masks), source)
    if video is not None:
        check_video_name(video, coming=out)
    budget = online_budget(online) if online is not None else None
    settings = run_settings(
        source.path, given.path, proposals, detector_weights, weights, preset=preset, backbone=backbone, refine=refine,
        matcher=matcher, decision=decision, online=online, precision=precision,
    )  # fmt: skip
    _check_out(out, source, given)
    folder = RunFolder(out, settings)
    if resume and folder.finished:
        return _finished(source, folder, video)
    checkpoint = folder.find(source.stems, resume, overwrite)
    propose = proposal_source(proposals, detector_weights, source, device)
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
    run = _Run(source, given, propose, segmenter, folder, checkpoint, budget)
    run.forward(progress, save_every)
    return run.finish(video, {**settings, "device": str(segmenter.device), "graph": segmenter.graph})


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


def _finished(frames: ImageFrames | VideoFrames, folder: RunFolder, video: str | os.PathLike | None) -> dict[str, Any]:
    """The report of a run that has ended; its overlay is drawn if it is asked for only now."""
    report = folder.report()
    if video is not None and not Path(video).exists():
        _draw(frames, folder, report, video)
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
    ):
        self.frames, self.given, self.propose, self.segmenter, self.folder = frames, given, propose, segmenter, folder
        self.online = online
        checkpoint = checkpoint or {"next": 0, "seconds": {}, "notes": [], "started": False}
        self.next: int = checkpoint["next"]
        self.seconds: dict[str, float] = defaultdict(float, checkpoint["seconds"])
        self.notes: list[str] = checkpoint["notes"] or [segmenter.note, *given.notes]
        self.started: bool = checkpoint["started"]

    def forward(self, progress: bool, save_every: float) -> None:
        self.progress = progress
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
        with self._clock("write"):  # what of it holds up the next frame
            self.behind(self._write, stem, ids, objects)

    def _write(self, stem: str, ids: np.ndarray, objects: list[dict]) -> None:
        write_mask(self.folder.mask(stem), ids)
        self.folder.append({"frame": stem, "objects": objects})

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

    def finish(self, video: str | os.PathLike | None, settings: dict[str, Any]) -> dict[str, Any]:
        rows = self.folder.rows()
        height, width = self.frames.size
        report = {
            "dmm_fast": version("dmm_fast"),
            "settings": settings,
            "size": [height, width],
            "notes": self.notes,
            "speed": speed(len(rows), self.seconds),
            "objects": by_object(rows),
            "frames": rows,
        }
        _draw(self.frames, self.folder, report, video)
        self.folder.finish(report)
        return report


def _draw(
    frames: ImageFrames | VideoFrames, folder: RunFolder, report: dict[str, Any], video: str | os.PathLike | None
) -> None:
    """The contact sheet and the overlay video, from the masks on disk: so a resumed run has all frames too."""
    rows, count = report["frames"], len(report["objects"])
    title = f"{frames.path.name}: {len(rows)} frames, {count} object{'s' * (count != 1)}"
    sheet = ContactSheet(len(rows), frames.size, title)
    if video is None:
        for index, stem, frame in frames.pick(sheet.wanted):
            sheet.add(frame, read_mask(folder.mask(stem)), stem, _remark(rows[index]))
    else:
        with VideoWriter(video, frames.size, frames.fps or 24) as writer:
            for index, (stem, frame) in enumerate(prefetch(frames.read())):
                ids = read_mask(folder.mask(stem))
                writer.write(overlay(frame, ids))
                if index in sheet.wanted:
                    sheet.add(frame, ids, stem, _remark(rows[index]))
    sheet.save(folder.path / SHEET)


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
    proposals: str | os.PathLike, weights: str | os.PathLike, frames: ImageFrames | VideoFrames, device: str
) -> Callable:
    """(stem, frame) -> Proposals."""
    if is_detector(proposals):
        return Live(open_proposer(proposals, weights, device=device))
    file = read_coco(proposals)
    if not file.covers(frames.stems):
        found = f"{file.image_ids[0]!r}" if len(file) else "nothing"
        raise ProposalError(f"{proposals}: no proposals for these frames: image_id must be a frame's name such as "
                            f"{frames.stems[0]!r}, the file holds {found}")  # fmt: skip
    return lambda stem, frame: file.runs(stem, frame.shape[:2])


# ------------------------------------------------------------------------------------------------------ given masks


# ------------------------------------------------------------------------------------------------- the folder on disk


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


# --------------------------------------------------------------------------------------------------------- the report


def speed(count: int, seconds: dict[str, float]) -> dict[str, Any]:
    total = sum(seconds.values())
    return {
        "frames": count,
        "fps": round(count / total, 2) if total else None,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }


def by_object(rows: list[dict]) -> dict[str, dict[str, Any]]:
    """Per object: the frame it was given in, frames followed, in how many of those it was lost or shared its proposal
    with another object (one of the two is then hidden), mean score where it was not lost."""
    given = {entry["id"]: row["frame"] for row in rows for entry in row["objects"] if "given" in entry}
    summary = {}
    for label, frame in given.items():
        followed = [e for row in rows for e in row["objects"] if e["id"] == label and "given" not in e]
        scores = [entry["score"] for entry in followed if not entry["lost"]]
        summary[str(label)] = {
            "given": frame,
            "frames": len(followed),
            "lost": len(followed) - len(scores),
            "shared": sum(label in _sharing(row) for row in rows),
            "mean_score": round(float(np.mean(scores)), 4) if scores else None,
        }
    return summary


def row_of(found: ObjectResult) -> dict[str, Any]:
    score, runner_up = (round(value, 4) + 0.0 for value in (found.score, found.runner_up))  # + 0.0: no "-0.0"
    return {"id": found.id, "proposal": found.proposal, "score": score, "runner_up": runner_up, "lost": found.lost}


def _remark(row: dict) -> str:
    lost = [entry["id"] for entry in row["objects"] if entry.get("lost")]
    parts = (("lost", lost), ("one mask for", _sharing(row)))
    return "; ".join(f"{what} {', '.join(map(str, ids))}" for what, ids in parts if ids)


def _sharing(row: dict) -> list[int]:
    """Objects of a frame that matched a proposal which another object matched too."""
    taken = Counter(entry.get("proposal") for entry in row["objects"])
    return [e["id"] for e in row["objects"] if e.get("proposal") is not None and taken[e["proposal"]] > 1]

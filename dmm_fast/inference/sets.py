"""The videos of a data set, one after the other: what ``dmm-fast segment --dataset`` runs.

OUT holds a folder per video, as `run.segment` writes it; ``first-masks/VIDEO``, the masks that the run was given; with
``keep_proposals`` ``proposals/VIDEO.json``; and ``summary.json``. A video is done by `segment_one`, which any process can
call that sees the same files.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dmm_fast.data.annotated import DataError, Video, listed
from dmm_fast.data.datasets import VideoDataset, open_dataset
from dmm_fast.data.masks import write_mask
from dmm_fast.files import whole_file
from dmm_fast.inference.folder import REPORT, UNFINISHED, RunError
from dmm_fast.inference.models import Models
from dmm_fast.inference.passes import Interrupted
from dmm_fast.inference.proposing import save_proposals
from dmm_fast.inference.run import check_options, segment
from dmm_fast.proposals.sources import is_detector, renamed, split

GIVEN, KEPT, SUMMARY = "first-masks", "proposals", "summary.json"
DETECTOR = "detector.txt"  # in the folder of kept proposals: whose they are


@dataclass(frozen=True)
class SetJob:
    """A data set and how its videos are segmented; can be pickled.

    dataset, layout, split: see `open_dataset`. proposals: a detector (see `open_proposer`), a folder with a file NAME.json for
    each video, or several of both, with commas. keep_proposals: first write the detector's to OUT/proposals, then segment from these files, as a later call does
    that names the folder. overwrite: do finished videos again. options: further arguments of `run.segment`.
    """

    dataset: str
    out: str
    layout: str = "auto"
    split: str | None = None
    proposals: str = "small"
    keep_proposals: bool = False
    overwrite: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def open(self) -> VideoDataset:
        """Raises DataError where there is no such data set or split. What is wrong with one video it says when it is opened."""
        _, folders = split(self.proposals)
        for folder in folders:
            if Path(folder).is_file():
                raise DataError(
                    f"{folder}: a file; a data set's proposals are a folder with NAME.json for each video, or a detector"
                )
            if self.keep_proposals:
                raise DataError(f"{folder}: these proposals are kept already; --keep-proposals is for a detector's")
        first = folders[0] if folders else None
        dataset = open_dataset(self.dataset, self.layout, split=self.split, proposals=first, partial=True)
        if dataset.layout == "stills":
            raise DataError(f"{self.dataset}: the stills layout has single images, in which nothing can be followed")
        return dataset

    def folder(self, name: str) -> Path:
        return Path(self.out) / name


class Kept:
    """What a process keeps from one video to the next: the open data set, the networks."""

    def __init__(self, job: SetJob):
        self.dataset, self.models = job.open(), Models()


# ----------------------------------------------------------------------------------------------------------- one video


def segment_one(
    job: SetJob, name: str, kept: Kept | None = None, *, progress: bool = False, label: str | None = None
) -> dict[str, Any]:
    """Segment a video of the data set, or go on with it; returns what the summary says of it.

    The video's folder is what `run.segment` would make of its frames, OUT/first-masks/NAME and its proposals. A finished one is
    left as it is. After an error nothing of the video is left; Interrupted leaves what a later call goes on from.
    """
    kept = kept or Kept(job)
    _check_name(name)
    video = kept.dataset.video(name)
    out = job.folder(name)
    masks = _give(video, Path(job.out) / GIVEN / name, keep=_begun(out) and not job.overwrite)
    try:
        proposals = renamed(job.proposals, lambda folder: Path(folder) / f"{name}.json")
        if job.keep_proposals:
            proposals = _keep(job, video, kept.models, progress, label)
        report = segment(
            video.source, masks, out, proposals=proposals, direction="forward", resume=not job.overwrite,
            overwrite=job.overwrite, progress=progress, label=label, models=kept.models, tidy=True, **job.options,
        )  # fmt: skip
    except Exception:
        if not _begun(out):
            shutil.rmtree(masks, ignore_errors=True)
        raise
    return {
        "frames": len(report["frames"]),
        "objects": len(report["objects"]),
        "fps": report["speed"]["fps"],
        "seconds": report["speed"]["seconds"],
        "lost": sum(row["lost"] for row in report["objects"].values()),  # frames of objects
        "notes": report["notes"],
    }


def _begun(out: Path) -> bool:
    """Whether a run in this folder is finished, or can go on."""
    return (out / REPORT).exists() or (out / UNFINISHED).exists()


def _check_name(name: str) -> None:
    """Results lie in a folder of the video's name."""
    if name in (GIVEN, KEPT, SUMMARY) or name != Path(name).name:
        raise DataError(f"{name}: a video cannot have this name; results would lie among other files of the output folder")


def _give(video: Video, folder: Path, keep: bool) -> Path:
    """The video's first masks as files, whole or not at all. keep: those that are there."""
    if keep and folder.is_dir():
        return folder
    masks = video.first_masks()
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(folder) as part:
        try:
            part.mkdir()
            for index, ids in masks.items():
                write_mask(part / f"{video.stems[index]}.png", ids)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return folder


def _keep(job: SetJob, video: Video, models: Models, progress: bool, label: str | None) -> str:
    """Write the detector's proposals, if they are not there; returns their file."""
    path = Path(job.out) / KEPT / f"{video.name}.json"
    if job.overwrite or not path.exists():
        options = job.options
        detector = models.detector(
            job.proposals, options.get("detector_weights", "DEFAULT"), device=options.get("device", "cpu")
        )
        label = f"{label or video.name}: proposals"
        save_proposals(path, video.source, detector, fresh=job.overwrite, progress=progress, label=label)
    return str(path)


# ---------------------------------------------------------------------------------------------------------- all of them


def segment_set(job: SetJob, sequences: Sequence[str] | None = None, *, progress: bool = False) -> dict[str, Any]:
    """Segment the videos of a data set, or those named; returns the summary that is also written to OUT/summary.json.

    Videos that are finished are not done again, one that was interrupted goes on. A video that fails does not stop the others: it is
    in the summary's ``failed``, with the reason, and nothing of it is left.

    Raises DataError for a data set, split or name that is not there, RunError for proposals in OUT that another detector has left,
    what `run.segment` raises for its options and weights, and Interrupted after a signal: a later call goes on from there.
    """
    kept = Kept(job)
    names = choose(kept.dataset, sequences)
    if not all(finished(job, name) for name in names):  # what no video could work with is not a matter of one
        check_options(kept.models, proposals=job.proposals if is_detector(job.proposals) else None, **job.options)
    _prepare(job)
    told = _Progress(names, progress)
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, dict[str, str]] = {}

    def write() -> dict[str, Any]:
        summary = _summary(job, kept.dataset, names, done, failed)
        with whole_file(Path(job.out) / SUMMARY) as part:
            part.write_text(json.dumps(summary, indent=1) + "\n")
        return summary

    for name in tqdm(names, desc="opening", unit=" videos", delay=2, leave=False, disable=None if progress else True):
        try:  # what cannot work is known before hours of work
            _check_name(name)
            video = kept.dataset.video(name)
            video.check_first_mask()
            told.expect(name, len(video), finished(job, name))
        except Exception as error:
            failed[name] = _failure(name, error)
            told.failed(name, failed[name]["error"])
    with told:
        for name in names:
            if name in failed:
                continue
            try:
                done[name] = segment_one(job, name, kept, progress=progress, label=told.label(name))
                told.done(name, done[name])
            except (Interrupted, KeyboardInterrupt):
                write()
                raise
            except Exception as error:
                failed[name] = _failure(name, error)
                told.failed(name, failed[name]["error"])
    return write()


def choose(dataset: VideoDataset, sequences: Sequence[str] | None) -> list[str]:
    """The names to segment, each once; DataError for one that is not there."""
    if sequences is None:
        return dataset.names
    if unknown := sorted(set(sequences) - set(dataset.names)):
        raise DataError(f"{dataset.path}: no video {listed(unknown)} here, of {len(dataset)}; there: {listed(dataset.names)}")
    return list(dict.fromkeys(sequences))


def finished(job: SetJob, name: str) -> bool:
    """Whether a call would leave the video as it is."""
    out = job.folder(name)
    return not job.overwrite and (out / REPORT).exists() and not (out / UNFINISHED).exists()


def _prepare(job: SetJob) -> None:
    """Make OUT, before anything is computed; kept proposals must be this detector's."""
    out = Path(job.out)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out}: is a file; --out must be a directory")
    out.mkdir(parents=True, exist_ok=True)
    if job.keep_proposals:
        weights = job.options.get("detector_weights", "DEFAULT")
        detector = job.proposals if weights == "DEFAULT" else f"{job.proposals} {weights}"
        mark = out / KEPT / DETECTOR
        if not job.overwrite and mark.exists() and (before := mark.read_text().strip()) != detector:
            raise RunError(
                f"{mark.parent}: holds proposals of the detector {before}, not {detector}; --overwrite replaces them"
            )
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(f"{detector}\n")


def _failure(name: str, error: Exception) -> dict[str, str]:
    """What to say of it; where it is a fault of ours, where it happened too."""
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        return {"error": str(error).removeprefix(f"{name}: ")}
    return {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}


def _summary(job: SetJob, dataset: VideoDataset, names: list[str], done: dict, failed: dict) -> dict[str, Any]:
    seconds: dict[str, float] = defaultdict(float)
    for video in done.values():
        for kind, value in video["seconds"].items():
            seconds[kind] += value
    frames, total = sum(video["frames"] for video in done.values()), sum(seconds.values())
    return {
        "dmm_fast": version("dmm_fast"),
        "dataset": {"path": str(dataset.path), "layout": dataset.layout, "split": dataset.split, "videos": len(dataset)},
        "proposals": job.proposals,
        "options": {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in job.options.items()},
        "frames": frames,
        "objects": sum(video["objects"] for video in done.values()),
        "fps": round(frames / total, 2) if total else None,
        "seconds": {kind: round(value, 3) for kind, value in seconds.items()},
        "videos": done,
        "failed": failed,
        "left": [name for name in names if name not in done and name not in failed],
    }


class _Progress:
    """A line per video, and one for all: bars on a terminal, else text."""

    def __init__(self, names: list[str], on: bool):
        self._number = {name: f"{place}/{len(names)} {name}" for place, name in enumerate(names, 1)}
        self._on, self._bars = on, on and sys.stderr.isatty()
        self._expected: dict[str, int] = {}
        self._before: set[str] = set()
        self._frames = 0

    def expect(self, name: str, frames: int, before: bool) -> None:
        """A video that is to come; before: it is finished already."""
        if before:
            self._before.add(name)
        else:
            self._expected[name] = frames

    def __enter__(self) -> _Progress:
        self._begin, self._total = time.monotonic(), sum(self._expected.values())
        self._bar = tqdm(total=self._total, desc="all", unit=" frames", position=0, disable=not self._bars)
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def label(self, name: str) -> str:
        return self._number[name]

    def done(self, name: str, video: dict[str, Any]) -> None:
        if name in self._before:
            return self._say(f"{self._number[name]}: finished before, {video['frames']} frames")
        self._advance(name)
        if not self._bars:
            speed = f"{video['fps']} frames/s" if video["fps"] else "no time taken"
            objects = f"{video['objects']} object{'s' * (video['objects'] != 1)}"
            self._say(f"{self._number[name]}: {video['frames']} frames, {objects}, {speed}{self._all()}")

    def failed(self, name: str, why: str) -> None:
        if name in self._expected:
            self._total -= self._expected.pop(name)  # its frames are no longer to come
            if self._bars:
                self._bar.total = self._total
                self._bar.refresh()
        self._say(f"{self._number[name]}: failed: {why}")

    def _advance(self, name: str) -> None:
        frames = self._expected.pop(name)
        self._frames += frames
        self._bar.update(frames)

    def _all(self) -> str:
        rate = self._frames / max(time.monotonic() - self._begin, 1e-6)
        left = tqdm.format_interval((self._total - self._frames) / rate) if rate else "?"
        return f"; all: {self._frames} of {self._total} frames, {rate:.1f} frames/s, {left} left"

    def _say(self, text: str) -> None:
        if self._on:
            tqdm.write(text, sys.stderr)

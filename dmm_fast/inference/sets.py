"""The videos of a data set segmented, one after the other or by many processes: what ``dmm-fast segment --dataset`` runs.

OUT holds a folder per video, as `run.segment` writes it; ``first-masks/VIDEO``, the masks that the run was given; with
``keep_proposals`` ``proposals/VIDEO.json``; and ``summary.json``. A video is done by `segment_one`, which any process can
call that sees the same files.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dmm_fast.data.annotated import DataError, Video
from dmm_fast.data.datasets import VideoDataset, open_dataset
from dmm_fast.data.masks import read_ids, write_mask
from dmm_fast.files import whole_file
from dmm_fast.inference.engines import Engine, place_in
from dmm_fast.inference.folder import REPORT, UNFINISHED, RunError, make_out
from dmm_fast.inference.models import Models
from dmm_fast.inference.proposing import mark_detector, named_detector, save_proposals, unusual
from dmm_fast.inference.run import check_options, segment
from dmm_fast.inference.videos import each_video
from dmm_fast.proposals.sources import is_detector, renamed, split

GIVEN, KEPT, SUMMARY = "first-masks", "proposals", "summary.json"


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

    def keep(self) -> Kept:
        return Kept(self)

    def check(self, kept: Kept, device: str | None = None) -> None:
        options = self.options if device is None else self.options | {"device": device, "graph": None}
        check_options(kept.models, proposals=self.proposals if is_detector(self.proposals) else None, **options)

    def look(self, name: str, dataset: VideoDataset) -> Video:
        _check_name(name)
        video = dataset.video(name)
        video.check_first_mask()
        return video

    def folder(self, name: str) -> Path:
        return Path(self.out) / name

    def finished(self, name: str) -> bool:
        out = self.folder(name)
        return not self.overwrite and (out / REPORT).exists() and not (out / UNFINISHED).exists()

    def prepare(self, names: list[str]) -> None:
        """Kept proposals must be this detector's."""
        out = make_out(Path(self.out))
        if self.keep_proposals:
            mark_detector(out / KEPT, self.whose, names, self.overwrite)
        for torn in (out / GIVEN).glob(".*.tmp"):  # of a process that was killed
            shutil.rmtree(torn, ignore_errors=True)

    @property
    def whose(self) -> str:
        """What is said of the detector whose proposals are kept."""
        precision = unusual(self.options.get("precision", "float32"))
        return named_detector(self.proposals, self.options.get("detector_weights", "DEFAULT"), precision=precision)

    def do(
        self, name: str, kept: Kept, *, apart: Path | None = None, progress: bool = False, label: str | None = None
    ) -> dict[str, Any]:
        return segment_one(self, name, kept, apart=apart, progress=progress, label=label)

    def write(self, dataset: VideoDataset, names: list[str], done: dict, failed: dict, processes: dict) -> dict[str, Any]:
        summary = _summary(self, dataset, names, done, failed) | {"processes": processes}
        with whole_file(Path(self.out) / SUMMARY) as part:
            part.write_text(json.dumps(summary, indent=1) + "\n")
        return summary


class Kept:
    """What a process keeps from one video to the next: the open data set, the networks."""

    def __init__(self, job: SetJob):
        self.dataset, self.models = job.open(), Models()


def segment_set(
    job: SetJob, sequences: Sequence[str] | None = None, *, engine: Engine | None = None, progress: bool = False
) -> dict[str, Any] | None:
    """Segment the videos of a data set, or those named; returns the summary that is also written to OUT/summary.json.

    engine: whose processes do it (see `open_engine`); None: this one. Where torchrun has started many, its first process alone
    returns a summary, the others None.

    Videos that are finished are not done again, one that was interrupted goes on. A video that fails does not stop the others: it is
    in the summary's ``failed``, with the reason, and nothing of it is left.

    Raises DataError for a data set, split or name that is not there, RunError for proposals in OUT that another detector has left,
    what `run.segment` raises for its options and weights, and Interrupted after a signal: a later call goes on from there.
    """
    return each_video(job, sequences, engine=engine, progress=progress)


def segment_one(
    job: SetJob,
    name: str,
    kept: Kept | None = None,
    *,
    apart: Path | None = None,
    progress: bool = False,
    label: str | None = None,
) -> dict[str, Any]:
    """Segment a video of the data set, or go on with it; returns what the summary says of it.

    The video's folder is what `run.segment` would make of its frames, OUT/first-masks/NAME and its proposals. A finished one is
    left as it is. After an error nothing of the video is left; Interrupted leaves what a later call goes on from.

    apart: a folder beside the results in which the video is worked on until it is whole. Two processes may then have the same video.
    """
    kept = kept or Kept(job)
    _check_name(name)
    video = kept.dataset.video(name)
    out = job.folder(name)
    masks = _give(video, Path(job.out) / GIVEN / name, keep=_begun(out) and not job.overwrite)
    try:
        proposals = renamed(job.proposals, lambda folder: Path(folder) / f"{name}.json")
        if job.keep_proposals:
            proposals = _keep(job, video, kept.models, apart, progress, label)
        report = segment(
            video.source, masks, out, proposals=proposals, direction="forward", resume=not job.overwrite,
            overwrite=job.overwrite, progress=progress, label=label, models=kept.models, tidy=True,
            apart=place_in(apart, name) if apart is not None else None, **job.options,
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
    """The video's first masks as files, whole or not at all. The same ones are not written again, since another process may be
    reading them. keep: a run has followed those that are there; RunError where they are others."""
    masks = {f"{video.stems[index]}.png": ids for index, ids in video.first_masks().items()}
    if keep and folder.is_dir():
        there = {file.name: read_ids(file) for file in folder.glob("[!.]*.png")}
        if there.keys() != masks.keys() or not all(np.array_equal(there[name], ids) for name, ids in masks.items()):
            raise RunError(f"{folder}: the run there has followed these masks, and the data set's are others by now; "
                           "--overwrite starts again")  # fmt: skip
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        part.mkdir()
        for file, ids in masks.items():
            write_mask(part / file, ids)
        if _contents(folder) != _contents(part):
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else {}


def _keep(job: SetJob, video: Video, models: Models, apart: Path | None, progress: bool, label: str | None) -> str:
    """Write the detector's proposals, if they are not there; returns their file."""
    path = Path(job.out) / KEPT / f"{video.name}.json"
    if job.overwrite or not path.exists():
        options = job.options
        how = {"device": options.get("device", "cpu"), "precision": options.get("precision", "float32")}
        detector = models.detector(job.proposals, options.get("detector_weights", "DEFAULT"), **how)
        label = f"{label or video.name}: proposals"
        work = place_in(apart, path.name) if apart is not None else None
        save_proposals(
            path, video.source, detector, fresh=job.overwrite, progress=progress, label=label, apart=work, whose=job.whose
        )
    return str(path)


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

"""A detector's proposals of the videos of a data set, by one process or many: what ``dmm-fast proposals --dataset`` runs.

OUT holds NAME.json for each video and ``detector.txt``, whose they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmm_fast.data.annotated import DataError, Video
from dmm_fast.data.datasets import VideoDataset, open_dataset
from dmm_fast.inference.engines import Engine, place_in
from dmm_fast.inference.models import Models
from dmm_fast.inference.proposing import mark_detector, named_detector, save_proposals, unusual
from dmm_fast.inference.videos import each_video
from dmm_fast.proposals.base import TOP
from dmm_fast.proposals.sources import renamed, split


@dataclass(frozen=True)
class ProposalsJob:
    """A data set and the detector that goes over its videos; can be pickled.

    dataset, layout, split: see `open_dataset`. detector, weights, top, short_side, device, precision: see `open_proposer`; a detector
    may also be a folder with NAME.json for each video, or several of both, with commas. batch: see `save_proposals`. overwrite: do
    finished videos again.
    """

    dataset: str
    out: str
    layout: str = "auto"
    split: str | None = None
    detector: str = "small"
    weights: str = "DEFAULT"
    top: int = TOP
    short_side: int | None = None
    device: str = "cpu"
    precision: str = "float32"
    batch: int | None = None
    overwrite: bool = False

    def open(self) -> VideoDataset:
        return open_dataset(self.dataset, self.layout, split=self.split, partial=True)

    def keep(self) -> Kept:
        return Kept(self)

    def check(self, kept: Kept, device: str | None = None) -> None:
        self.load(kept.models, device or self.device)

    def load(self, models: Models, device: str) -> Callable | None:
        detector, _ = split(self.detector)
        how: dict[str, Any] = {"top": self.top, "short_side": self.short_side, "device": device, "precision": self.precision}
        return models.detector(detector, self.weights, **how) if detector else None

    def look(self, name: str, dataset: VideoDataset) -> Video:
        if name != Path(name).name:
            raise DataError(f"{name}: a video cannot have this name; its proposals would lie elsewhere")
        return dataset.video(name)

    def path(self, name: str) -> Path:
        return Path(self.out) / f"{name}.json"

    def finished(self, name: str) -> bool:
        return not self.overwrite and self.path(name).exists()

    def prepare(self, names: list[str]) -> None:
        mark_detector(Path(self.out), self.whose, names, self.overwrite)

    @property
    def whose(self) -> str:
        """What `detector.txt` says."""
        top = self.top if self.top != TOP else None
        return named_detector(
            self.detector, self.weights, top=top, short_side=self.short_side, precision=unusual(self.precision)
        )

    def do(
        self, name: str, kept: Kept, *, apart: Path | None = None, progress: bool = False, label: str | None = None
    ) -> dict[str, Any]:
        """Write NAME.json, if it is not there."""
        path, video, seconds = self.path(name), kept.dataset.video(name), 0.0
        if not self.finished(name):
            propose, began = self.load(kept.models, self.device), time.perf_counter()
            work = place_in(apart, path.name) if apart is not None else None
            files = split(renamed(self.detector, lambda folder: Path(folder) / path.name))[1]
            save_proposals(
                path, video.source, propose, fresh=self.overwrite, progress=progress, label=label, apart=work, batch=self.batch,
                files=files, top=self.top, whose=self.whose,
            )  # fmt: skip
            seconds = time.perf_counter() - began
        return {
            "frames": len(video),
            "fps": round(len(video) / seconds, 2) if seconds else None,
            "seconds": {"proposals": round(seconds, 3)},
        }

    def write(self, dataset: VideoDataset, names: list[str], done: dict, failed: dict, processes: dict) -> dict[str, Any]:
        left = [name for name in names if name not in done and name not in failed]
        return {"videos": done, "failed": failed, "left": left, "processes": processes}


class Kept:
    """What a process keeps from one video to the next: the open data set, the detector."""

    def __init__(self, job: ProposalsJob):
        self.dataset, self.models = job.open(), Models()


def propose_set(
    job: ProposalsJob, sequences: Sequence[str] | None = None, *, engine: Engine | None = None, progress: bool = False
) -> dict[str, Any] | None:
    """Write the proposals of the videos of a data set, or of those named; as `segment_set`, but nothing is kept of the summary."""
    return each_video(job, sequences, engine=engine, progress=progress)

"""Every video of a data set, by one process or many: what ``segment --dataset`` and ``proposals --dataset`` have in common."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from dmm_fast.data.annotated import DataError, Video
from dmm_fast.data.datasets import VideoDataset
from dmm_fast.files import listed
from dmm_fast.inference import engines
from dmm_fast.inference.engines import Alone, Engine, Outcome, failure
from dmm_fast.inference.folder import RunError
from dmm_fast.inference.on_ray import OnRay
from dmm_fast.inference.on_torchrun import Torchrun, under_torchrun


class Job(engines.Job, Protocol):
    """A job as the first process sees it."""

    def finished(self, name: str) -> bool:
        """Whether a call would leave the video as it is."""

    def look(self, name: str, dataset: VideoDataset) -> Video:
        """Open a video; raise what can be seen before it is done."""

    def prepare(self, names: list[str]) -> None:
        """Make OUT for these videos, before anything is computed."""

    def write(self, dataset: VideoDataset, names: list[str], done: dict, failed: dict, processes: dict) -> dict[str, Any]:
        """Keep, and return, what there is to say of all: done and failed by name, how many processes for how long."""


def open_engine(name: str | None = None, **resources: Any) -> Engine:
    """The engine called `name`: "ray" or "ray:HOST:PORT", with the resources of `OnRay`; None: torchrun's processes under torchrun,
    else this process alone. Raises RunError for another name."""
    if name is None:
        return Torchrun() if under_torchrun() else Alone()
    kind, _, address = name.partition(":")
    if kind != "ray" or (":" in name and not address):
        raise RunError(f"--engine is ray or ray:HOST:PORT, got {name!r}; torchrun is used by starting the command with it")
    if under_torchrun():
        raise RunError("--engine ray under torchrun: take one of them; Ray starts its processes itself")
    return OnRay(address or None, **resources)


def each_video(
    job: Job, sequences: Sequence[str] | None = None, *, engine: Engine | None = None, progress: bool = False
) -> dict[str, Any] | None:
    """Do the job for the videos of its data set, or those named; returns what `Job.write` does, None where another process has it.

    A video that fails does not stop the others. Raises DataError for a data set, split or name that is not there, what `Job.check`
    and `Job.prepare` raise, and Interrupted after a signal: a later call goes on from there.
    """
    engine = engine or Alone()
    if not engine.first:
        engine.help(job)
        return None
    kept = job.keep()
    names = choose(kept.dataset, sequences)
    if not all(map(job.finished, names)):  # what no video could work with is not a matter of one
        engine.check(job, kept)
    job.prepare(names)
    told, began = _Progress(names, progress, every=not engine.in_order), time.monotonic()
    done: dict[str, dict[str, Any]] = {}
    failed: dict[str, dict[str, str]] = {}

    def took(name: str, outcome: Outcome) -> None:
        if "done" in outcome:
            done[name] = outcome["done"]
            told.done(name, done[name])
        else:
            failed[name] = outcome["failed"]
            told.failed(name, failed[name]["error"])

    def write() -> dict[str, Any]:
        in_order = {name: done[name] for name in names if name in done}
        processes = engine.facts() | {"seconds": round(time.monotonic() - began, 3)}
        return job.write(kept.dataset, names, in_order, failed, processes)

    lengths: dict[str, int] = {}
    for name in tqdm(names, desc="opening", unit=" videos", delay=2, leave=False, disable=None if progress else True):
        try:  # what cannot work is known before hours of work
            video = job.look(name, kept.dataset)
            told.expect(name, len(video), job.finished(name))
            lengths[name] = 0 if job.finished(name) else len(video)
        except Exception as error:
            took(name, {"failed": failure(name, error)})
    todo = list(lengths)
    if not engine.in_order:
        todo.sort(key=lambda name: -lengths[name])
    with told:
        try:
            engine.share(job, todo, kept, took, progress=progress, label=told.label)
        except BaseException:
            write()
            raise
    return write()


def choose(dataset: VideoDataset, sequences: Sequence[str] | None) -> list[str]:
    """The names to segment, each once; DataError for one that is not there."""
    if sequences is None:
        return dataset.names
    if unknown := sorted(set(sequences) - set(dataset.names)):
        raise DataError(f"{dataset.path}: no video {listed(unknown)} here, of {len(dataset)}; there: {listed(dataset.names)}")
    return list(dict.fromkeys(sequences))


class _Progress:
    """A line per video, and one for all: bars on a terminal, else text. every: a line per video beside the bar too."""

    def __init__(self, names: list[str], on: bool, every: bool):
        self._number = {name: f"{place}/{len(names)} {name}" for place, name in enumerate(names, 1)}
        self._on, self._bars = on, on and sys.stderr.isatty()
        self._every = every or not self._bars
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
        if self._every:
            self._say(f"{self._number[name]}: {', '.join(_facts(video))}{self._all()}")

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


def _facts(video: dict[str, Any]) -> Iterator[str]:
    """What to say of a video that is done."""
    yield f"{video['frames']} frames"
    if (count := video.get("objects")) is not None:
        yield f"{count} object{'s' * (count != 1)}"
    yield f"{video['fps']} frames/s" if video["fps"] else "no time taken"

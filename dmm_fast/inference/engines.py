"""How the videos of a data set are shared out: what the engines have in common, and the one that needs no other process.

An engine takes a job and the names of its videos and does each once. `Alone` does them one after the other, `on_torchrun` and
`on_ray` have many processes for it, on one machine or several. All call `do_one`, and what a video gives is the same to the bit.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from dmm_fast.data.datasets import VideoDataset
from dmm_fast.inference.folder import RunError, hold
from dmm_fast.inference.passes import Interrupted

RUNNING = ".running-"  # folders in OUT while a call with several processes works there
Outcome = dict[str, Any]  # {"done": what the summary says of the video} or {"failed": {"error": .., "traceback": ..}}
Took = Callable[[str, Outcome], None]


class Job(Protocol):
    """What is done with the videos of a data set; can be pickled."""

    @property
    def out(self) -> str: ...

    def open(self) -> VideoDataset: ...

    def keep(self) -> Any:
        """What a process keeps from one video to the next: the open data set, the networks."""

    def check(self, kept: Any, device: str | None = None) -> None:
        """Raise what no video could work with. device: in place of the job's own."""

    def do(
        self, name: str, kept: Any, *, apart: Path | None = None, progress: bool = False, label: str | None = None
    ) -> dict[str, Any]:
        """Do a video, or go on with it. apart: a folder to work in until its results are whole."""


class Engine(Protocol):
    """first: whether this process opens the data set, shows progress and keeps the summary; others call `help` alone."""

    @property
    def first(self) -> bool: ...

    @property
    def in_order(self) -> bool:
        """Whether videos are wanted in the data set's order; else longest first."""

    def check(self, job: Job, kept: Any) -> None:
        """As `Job.check`, as far as it can be seen from this process."""

    def share(self, job: Job, names: list[str], kept: Any, took: Took, *, progress: bool, label: Callable[[str], str]) -> None:
        """Have every video done; `took` gets each outcome, from one thread at a time. Raises Interrupted after a signal."""

    def help(self, job: Job) -> None:
        """Do videos that the first process shares out, until there are no more."""

    def facts(self) -> dict[str, Any]:
        """What the summary says of the processes."""


class Alone:
    """This process, one video after the other."""

    first, in_order = True, True

    def check(self, job: Job, kept: Any) -> None:
        job.check(kept)

    def share(self, job: Job, names: list[str], kept: Any, took: Took, *, progress: bool, label: Callable[[str], str]) -> None:
        for name in names:
            took(name, do_one(job, name, kept, progress=progress, label=label(name)))

    def help(self, job: Job) -> None:
        raise AssertionError("there is no other process")

    def facts(self) -> dict[str, Any]:
        return {"engine": "one process", "processes": 1}


def do_one(job: Job, name: str, kept: Any, **how: Any) -> Outcome:
    """As `Job.do`; what is wrong with the video is an outcome too. Raises Interrupted alone."""
    try:
        return {"done": job.do(name, kept, **how)}
    except (Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        return {"failed": failure(name, error)}


def failure(name: str, error: Exception) -> dict[str, str]:
    """What to say of it; where it is a fault of ours, where it happened too."""
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        return {"error": str(error).removeprefix(f"{name}: ")}
    return {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}


@contextmanager
def running_in(out: Path) -> Iterator[Path]:
    """A new folder in OUT that every process of this call must see; those of calls that were killed go.

    Raises RunError where another call is working in OUT.
    """
    out.mkdir(parents=True, exist_ok=True)
    held = hold(out)
    try:
        _clear(out)
        folder = out / f"{RUNNING}{secrets.token_hex(4)}"
        folder.mkdir()
        yield folder
    finally:
        _clear(out)
        os.close(held)


def _clear(out: Path) -> None:
    for folder in out.glob(f"{RUNNING}*"):
        shutil.rmtree(folder, ignore_errors=True)


def check_shared(running: Path, within: float = 60) -> None:
    """Raise RunError where the folder of `running_in` is not seen: results would be written to another disk.

    within: seconds in which it must be seen; NFS keeps what it knows of a folder for so long.
    """
    due = time.monotonic() + within
    while not running.is_dir():
        if time.monotonic() > due or not running.parent.is_dir():
            raise RunError(
                f"{running.parent}: is not the folder here that it is where the command began; --out must be storage that "
                "all machines share"
            )
        time.sleep(0.5)


def place_in(running: Path, name: str) -> Path:
    """A path in the folder of `running_in` that no other process has."""
    return running / f"{name}.{secrets.token_hex(4)}"

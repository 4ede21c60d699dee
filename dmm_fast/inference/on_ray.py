"""The processes of a Ray cluster share out the videos of a data set: a task for each video, the longest first.

A task gets the job and a name, reads frames from the shared storage and writes results there; nothing of a video goes through Ray. When a
machine dies, Ray may start its video elsewhere before the old process has noticed. So a task works in a folder of its own, which takes
the video's place in OUT when it is whole: of two the later one does, with the same bytes.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dmm_fast.inference.engines import Job, Outcome, Took, check_shared, do_one, running_in
from dmm_fast.inference.folder import RunError
from dmm_fast.inference.passes import Interrupted, stop_requested

STOPPING = 60.0  # seconds in which tasks save their state after Ctrl-C


@dataclass(frozen=True)
class OnRay:
    """A cluster and what a video takes of it.

    address: host:port of the cluster's head; None: the one that runs on this machine, else one that is started for this call. cpus, gpus:
    what a task takes, a part of a GPU if several share one. retries: how often a video is done again whose process was killed.
    """

    address: str | None = None
    cpus: float = 1
    gpus: float = 0
    retries: int = 3

    first, in_order = True, False

    def check(self, job: Job, kept: Any) -> None:
        _import_ray()
        if self.address is not None:
            _check_address(self.address)
        job.check(kept, device="cpu")  # the GPUs are elsewhere

    def facts(self) -> dict[str, Any]:
        return {"engine": "ray", "cpus": self.cpus, "gpus": self.gpus}

    def share(self, job: Job, names: list[str], kept: Any, took: Took, *, progress: bool, label: Callable[[str], str]) -> None:
        ray = _import_ray()
        already = ray.is_initialized()
        if not already:
            _connect(ray, self.address)
        try:
            with running_in(Path(job.out)) as running:
                self._check_size(ray)
                self._run(ray, job, names, running.resolve(), took, progress)
        finally:
            if not already:
                ray.shutdown()

    def help(self, job: Job) -> None:
        raise AssertionError("Ray's processes are called by tasks")

    def _check_size(self, ray: Any) -> None:
        """Say it where no machine of the cluster could do a video."""
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(r.get("CPU", 0) >= self.cpus and r.get("GPU", 0) >= self.gpus for r in machines):
            there = "; ".join(f"{r.get('CPU', 0):g} CPUs, {r.get('GPU', 0):g} GPUs" for r in machines)
            raise RunError(
                f"no machine of the cluster has {self.cpus:g} CPUs and {self.gpus:g} GPUs, which a video takes; there: {there} "
                "(--cpus-per-video, --gpus-per-video)"
            )

    def _run(self, ray: Any, job: Job, names: list[str], running: Path, took: Took, progress: bool) -> None:
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0, max_calls=0)(_task)
        threads = max(1, int(self.cpus))
        todo, tries, due = deque(names), dict.fromkeys(names, 0), dict[Any, str]()
        with stop_requested("stopping: videos in work are saved as far as they are; press again to stop at once") as stop:
            try:
                while todo or due:
                    while todo:
                        name = todo.popleft()
                        due[task.remote(job, name, running, os.getcwd(), threads)] = name
                    ready, _ = ray.wait(list(due), timeout=0.5)
                    if stop():
                        raise Interrupted("stopped; repeat the command to continue")
                    for one in ready:
                        name = due.pop(one)
                        try:
                            outcome: Outcome = ray.get(one)
                        except ray.exceptions.RayError as error:
                            fault = isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error.cause, Interrupted)
                            if fault:  # of ours, or nothing can work there; a task that is interrupted got a signal there
                                raise (error.cause if isinstance(error.cause, RunError) else error) from None
                            tries[name] += 1
                            why = f"its process was killed ({type(error).__name__})"
                            if tries[name] <= self.retries:
                                if progress:
                                    tqdm.write(f"{name}: {why}; again, {tries[name]} of {self.retries}", sys.stderr)
                                todo.append(name)
                                continue
                            outcome = {"failed": {"error": f"{why}, {tries[name]} times; its last words: {_first(error)}"}}
                        took(name, outcome)
            except BaseException:
                for one in due:
                    ray.cancel(one)  # what runs saves its state
                if due:
                    ray.wait(list(due), num_returns=len(due), timeout=STOPPING)
                raise


_kept: tuple[Job, Any] | None = None  # of this worker process


def _task(job: Job, name: str, running: Path, folder: str, threads: int) -> Outcome:
    """In a worker process: do a video. Raises RunError for what no video could work with here."""
    global _kept
    torch.set_num_threads(threads)
    try:
        if _kept is None or _kept[0] != job:
            _kept = None  # its memory first
            try:
                os.chdir(folder)  # where names without a leading / begin
            except OSError as error:
                if not Path(job.out).is_absolute():
                    raise RunError(
                        f"{error}; the command was started there: start it in a folder that all machines share"
                    ) from None
            check_shared(running)
            kept = job.keep()
            job.check(kept)
            _kept = job, kept
        check_shared(running)
    except Exception as error:
        raise RunError(f"on the machine {socket.gethostname()}: {error}") from None
    return do_one(job, name, _kept[1], apart=running)


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster that starts here: as this process, not 15
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise RunError("--engine ray needs Ray: pip install 'dmm_fast[ray]'") from None
    return ray


def _check_address(address: str) -> None:
    """Ray would try for minutes, and then end this process."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise RunError(
            f"--engine ray:ADDRESS takes the HOST:PORT of the cluster's head, as in ray:10.0.0.1:6379, got {address!r}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"--engine ray:{address}: nobody answers there ({error}); ray status on that machine tells more"
        ) from None


def _connect(ray: Any, address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        try:
            ray.init("auto", **quiet)
        except ConnectionError:
            ray.init("local", include_dashboard=False, object_store_memory=100 << 20, **quiet)  # nothing goes through its store
        return
    _check_address(address)
    try:
        ray.init(address, **quiet)
    except Exception as error:
        raise RunError(f"--engine ray:{address}: cannot be used ({_first(error)})") from None

"""The processes of torchrun share out the videos of a data set.

Torchrun's store holds the list, longest video first, and a counter: whoever adds one to it has the next video, and nobody else.
A video is done in its place in OUT, with saved states, so a run that was killed goes on from there: when torchrun starts its
processes again, or with the next call. Two processes are never in one video: torchrun stops all before it starts any, and a process
that loses the store stops itself.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dmm_fast.inference.engines import Job, Outcome, Took, check_shared, do_one, running_in
from dmm_fast.inference.folder import RunError
from dmm_fast.inference.passes import Interrupted, stop_requested

BEAT = 2.0  # seconds between signs of life
LOST = 60.0  # without one for so long a process is given up
MEET = timedelta(minutes=10)  # in which every process must have started
# A store that does not answer for so long is gone. Less than LOST: a process that is given up has stopped.
STORE = timedelta(seconds=30)


def under_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


class Torchrun:
    """This process as one of torchrun's."""

    in_order = False

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.first = self.rank == 0
        self._list = _List(self.rank, self.size)

    def check(self, job: Job, kept: Any) -> None:
        job.check(kept)

    def facts(self) -> dict[str, Any]:
        return {"engine": "torchrun", "processes": self.size}

    def share(self, job: Job, names: list[str], kept: Any, took: Took, *, progress: bool, label: Callable[[str], str]) -> None:
        with running_in(Path(job.out)) as running, self._list as shared:
            shared.publish(names, running)
            shared.collect(took)
            shared.work(job, kept)
            shared.wait()

    def help(self, job: Job) -> None:
        with self._list as shared:
            check_shared(shared.read())
            shared.work(job, job.keep())
            shared.wait()


class _List:
    """The list of videos in the store, as one process sees it.

    A store outlives the processes that torchrun starts again, and their number of restarts differs from machine to machine. So
    every process comes with a name of its own: the first process puts the names that it found into the list, and a process takes no
    list without its name.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self._store, *_ = next(dist.rendezvous("env://", timeout=MEET))
        self._store.set_timeout(STORE)
        self._own = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(4)}"
        self._put("hello", rank, self._own)
        self._end, self._threads = threading.Event(), list[threading.Thread]()
        self._lost: list[int] = []

    def _key(self, *words: Any) -> str:
        return "/".join(("dmm_fast", *map(str, words)))

    def _put(self, *words: Any) -> None:
        self._store.set(self._key(*words[:-1]), words[-1])

    def _get(self, *words: Any) -> str | None:
        key = self._key(*words)
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _count(self, *words: Any, add: int = 0) -> int:
        return self._store.add(self._key(*words), add)

    def publish(self, names: list[str], running: Path) -> None:
        """What the first process does, and waits until every other has the list."""
        token, before = running.name, None
        while self._count(token, "has") < self.size - 1:
            found = [self._get("hello", rank) for rank in range(self.size)]
            if None not in found and found != before:
                self._put("list", json.dumps({"token": token, "running": str(running.resolve()), "names": names, "for": found}))
                before = found
            time.sleep(0.1)
        self._begin(token, names)

    def read(self) -> Path:
        """What the others do: wait for the list. -> the folder that must be there."""
        while (text := self._get("list")) is None or self._own not in (found := json.loads(text))["for"]:
            time.sleep(0.1)
        self._count(found["token"], "has", add=1)
        self._begin(found["token"], found["names"])
        return Path(found["running"])

    def _begin(self, token: str, names: list[str]) -> None:
        self.token, self.names = token, names
        self._thread(self._beat)

    def _thread(self, target: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=target, daemon=True))
        self._threads[-1].start()

    def work(self, job: Job, kept: Any) -> None:
        """Take videos and do them."""
        while (number := self._count(self.token, "next", add=1) - 1) < len(self.names):
            self._put(self.token, "taken", number, str(self.rank))
            outcome = do_one(job, self.names[number], kept)
            self._put(self.token, "outcome", number, json.dumps(outcome))
            self._count(self.token, "finished", add=1)

    def collect(self, took: Took) -> None:
        """Begin to hand over the outcomes as they come, in a thread: this process works on videos too."""
        self._left, self._collecting, self._took = set(range(len(self.names))), threading.Lock(), took
        self._thread(self._collect)

    def _collect(self) -> None:
        seen: dict[int, tuple[str | None, float]] = {}
        while not self._end.wait(0.5):
            try:
                self._look()
                now = time.monotonic()
                for rank in range(1, self.size):
                    beat = self._get(self.token, "beat", rank)
                    if rank not in seen or seen[rank][0] != beat:
                        seen[rank] = beat, now
                self._lost = [rank for rank, (_, since) in seen.items() if now - since > LOST]
            except dist.DistError:  # then `_beat` ends this process
                return

    def _look(self) -> None:
        with self._collecting:
            for number in sorted(self._left):
                if (text := self._get(self.token, "outcome", number)) is not None:
                    self._left.discard(number)
                    outcome: Outcome = json.loads(text)
                    self._took(self.names[number], outcome)

    def wait(self) -> None:
        """Until every video is done. Nobody leaves before: the store may be the first process's, and torchrun starts all or none."""
        with stop_requested("stopping") as stop:
            while self._count(self.token, "finished") < len(self.names):
                if stop():
                    raise Interrupted("stopped while others were working; repeat the command to continue")
                self._give_up_lost()
                time.sleep(0.2)
            self._count(self.token, "left", add=1)
            if self.rank == 0:
                self._look()
                due = time.monotonic() + LOST
                while self._count(self.token, "left") < self.size - len(self._lost) and time.monotonic() < due:
                    time.sleep(0.05)

    def _give_up_lost(self) -> None:
        """Raise RunError where nothing is left but the videos of processes that have vanished."""
        if not self._lost:
            return
        with self._collecting:
            doing = {number: self._get(self.token, "taken", number) for number in self._left}
        if all(rank is not None and int(rank) in self._lost for rank in doing.values()):
            who = ", ".join(map(str, self._lost))
            names = ", ".join(self.names[number] for number in sorted(doing))
            raise RunError(
                f"no sign of process {who} for {LOST:.0f} s, which had {names}; the other videos are done, repeat the command"
            )

    def _beat(self) -> None:
        """Give signs of life. Where the store is gone nobody knows what this process does: it stops, its state saved."""
        number = 0
        while not self._end.wait(BEAT):
            number += 1
            try:
                self._put(self.token, "beat", self.rank, str(number))
            except dist.DistError as error:
                if self._end.is_set():
                    return
                cause = str(error).partition("\n")[0]
                print(f"dmm-fast: process {self.rank}: the store of torchrun is gone, stopping ({cause})", file=sys.stderr)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(LOST - STORE.total_seconds() - 2 * BEAT)
                os._exit(1)

    def __enter__(self) -> _List:
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(1)

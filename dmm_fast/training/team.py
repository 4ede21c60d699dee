"""The processes that train together, and their clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmm_fast.ops.device import open_device


class Team:
    """The processes that train together: those of torchrun, or this one alone."""

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.first = self.rank == 0
        self.device = open_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.joined = self.size > 1 and not dist.is_initialized()
        if self.joined:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag: whether some process has it set."""
        return (self.sum(torch.tensor(flags, dtype=torch.float32, device=self.device)) > 0).tolist()

    def gather(self, items: list) -> list:
        """The lists of all processes, one after the other."""
        if self.size == 1:
            return items
        lists: list = [None] * self.size
        dist.all_gather_object(lists, items)
        return [item for each in lists for item in each]

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """All gradients in one sum. It runs after the backward, not beside it as DistributedDataParallel's: unrolled clips
        use the net's stages one by one and at times not at all, and the sum is short beside them.
        """
        if self.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.sum(torch.cat([g.flatten() for g in gradients]))
        for p, g in zip(parameters, total.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p)

    def close(self) -> None:
        if self.joined:
            dist.destroy_process_group()


class Clock:
    """When to save and when to stop: `stopped` is "time" after `minutes`, "interrupted" after Ctrl-C or SIGTERM.

    All processes agree. A second Ctrl-C ends at once.
    """

    def __init__(self, team: Team, save_seconds: float, minutes: float | None):
        self.team, self.save_seconds, self.minutes = team, save_seconds, minutes
        self.began = self.saved = time.monotonic()
        self.due, self.asked = False, False
        self.stopped: str | None = None

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def tick(self) -> None:
        """After every step."""
        now = time.monotonic()
        late = self.minutes is not None and now - self.began >= 60 * self.minutes
        asked, late, self.due = self.team.any(self.asked, late, now - self.saved >= self.save_seconds)
        self.stopped = "interrupted" if asked else "time" if late else None
        if self.due:
            self.saved = now

    def __enter__(self) -> Clock:
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

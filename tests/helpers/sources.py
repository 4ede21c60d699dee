"""A local process that sends a clip in real time, and proposals for its frames."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from dmm_fast.model import Proposals

from dmm_fast.data.masks import read_ids
from dmm_fast.data.video import FramesError, open_frames

T = TypeVar("T")
SENDER = Path(__file__).parent / "sender.py"


@contextlib.contextmanager
def senders(folder: Path) -> Iterator[Callable[..., str]]:
    """start(kind, fps, count): a process sends the directory of images, over and over; -> the url, with a free port.

    By TCP the process listens, for one reader; by UDP it sends whether anyone listens or not. `start.last` is the process of the last.
    """
    running: list[subprocess.Popen] = []

    def start(kind: str, fps: float = 25, count: int = 50) -> str:
        with socket.socket(type=socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as free:
            free.bind(("127.0.0.1", 0))
            url = f"{kind}://127.0.0.1:{free.getsockname()[1]}"
        listen = "?listen=1" if kind == "tcp" else ""
        command = [sys.executable, str(SENDER), str(folder), url + listen, str(fps), str(count)]
        running.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        start.last = running[-1]  # type: ignore[attr-defined]
        return url

    try:
        yield start
    finally:
        for process in running:
            process.kill()
            process.wait()


def patiently(opens: Callable[[], T]) -> T:
    """What `opens` returns once the sender listens."""
    for _ in range(60):
        try:
            return opens()
        except FramesError:
            time.sleep(0.5)
    raise AssertionError("nothing came from the sender")


def knows(images: Path, annotations: Path) -> Callable[[np.ndarray], Proposals]:
    """A detector that proposes the annotated objects of the clip's frame that is most like the one it sees, on half the pixels."""
    frames = np.stack([frame[::4, ::4].astype(np.int16) for _, frame in open_frames(images).read()])
    masks = [read_ids(file) for file in sorted(annotations.iterdir())]

    def propose(frame: np.ndarray) -> Proposals:
        ids = masks[int(np.abs(frames - frame[::4, ::4]).mean((1, 2, 3)).argmin())]
        found = torch.from_numpy(np.stack([ids == label for label in range(1, int(ids.max()) + 1)]))
        found = found[found.flatten(1).any(1)]
        corners = [
            [*(place := mask.nonzero()).amin(0).flip(0).tolist(), *(place.amax(0).flip(0) + 1).tolist()] for mask in found
        ]
        return Proposals(torch.tensor(corners).float(), torch.full((len(found),), 0.9), found)

    return propose

"""A camera or a network stream, always at its newest frame."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dmm_fast.data.video import FramesError

STREAM = re.compile(r"camera:\d+|/dev/video\d+|(rtsps?|rtmps?|rtp|udp|tcp|srt|https?)://.+", re.IGNORECASE)
CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}"), "win32": ("dshow", "video={}")}
# Hand frames over as they come, and lose packets rather than wait for them.
PROMPT = {"fflags": "nobuffer", "flags": "low_delay", "rtsp_transport": "tcp", "overrun_nonfatal": "1", "fifo_size": "20000",
          "analyzeduration": "1000000"}  # fmt: skip


def is_stream(name: object) -> bool:
    """Whether a name means a camera (camera:0, /dev/video0) or a network stream (rtsp://.., udp://..), not a file."""
    return isinstance(name, str) and STREAM.fullmatch(name) is not None


def public_name(name: str) -> str:
    """A stream's name without the user and password in it, for reports and file names."""
    return re.sub(r"(?<=://)[^/]*@", "", name)


class Snapshot(NamedTuple):
    """A frame as it came in."""

    number: int  # counted from the first that was decoded, dropped ones too
    arrived: float  # time.monotonic() when it was decoded
    frame: np.ndarray  # uint8 [H, W, 3] RGB


class Stream:
    """The newest frame of a source, again and again: what comes in while the caller works is dropped and counted.

    name: see `is_stream`; the attribute is without a password. patience: seconds without a frame after which the source counts as
    gone. A context manager; as an iterator it ends when the source does, `ended` then says how. Raises FramesError where the source
    cannot be opened.
    """

    def __init__(self, name: str, patience: float = 5.0):
        self.name, self.patience, self._address = public_name(name), patience, name
        self.dropped = 0
        self.ended = ""
        self._container, first = self._open()
        self.size: tuple[int, int] = _pixels(first).shape[:2]
        rate = self._container.streams.video[0].average_rate
        self.fps = float(rate) if rate else None  # as the source says
        self._newest: tuple[int, float, Any] | None = (0, time.monotonic(), first)
        self._last = -1  # the number of the frame that was taken last
        self._changed, self._closing = threading.Condition(), False
        self._thread = threading.Thread(target=self._read, name=f"reading {self.name}", daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing = True
        self._thread.join(self.patience + 1)  # the decoder may be waiting for a packet

    def __iter__(self) -> Iterator[Snapshot]:
        while (found := self._wait()) is not None:
            number, arrived, picture = found
            self.dropped += number - self._last - 1
            self._last = number
            frame = _pixels(picture)
            if frame.shape[:2] != self.size:
                self.ended = "the frames' size changed from {1}x{0} to {3}x{2}".format(*self.size, *frame.shape[:2])
                return
            yield Snapshot(number, arrived, frame)

    def _wait(self) -> tuple[int, float, Any] | None:
        """The newest frame, when there is one that was not taken; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self.ended, self.patience)
            if self._newest is None and not self.ended:
                self.ended = f"no frame came for {self.patience:g} s"
            found, self._newest = self._newest, None
            return found

    def _open(self) -> tuple[Any, Any]:
        import av

        target, kind = self._address, None
        if re.fullmatch(r"camera:\d+|/dev/video\d+", target):
            kind, pattern = CAMERAS.get(sys.platform, CAMERAS["linux"])
            target = target if target.startswith("/") else pattern.format(target.partition(":")[2])
        try:
            container = av.open(target, format=kind, options=PROMPT, timeout=(2 * self.patience, self.patience))
            if not container.streams.video:
                raise FramesError(f"{self.name}: the stream has no video")
            container.streams.video[0].thread_type = "SLICE"  # threads by frame hold frames back
            first = next(self._decode(container), None)
        except (av.FFmpegError, OSError) as error:
            raise FramesError(f"{self.name}: cannot be opened ({getattr(error, 'strerror', None) or error})") from None
        if first is None:
            raise FramesError(f"{self.name}: no frame could be decoded")
        return container, first

    def _decode(self, container: Any) -> Iterator[Any]:
        from av import InvalidDataError

        for packet in container.demux(container.streams.video[0]):
            try:
                yield from packet.decode()
            except InvalidDataError:  # a stream that is joined in the middle begins with what cannot be decoded
                continue

    def _read(self) -> None:
        ended = "the source has ended"
        try:
            for number, picture in enumerate(self._decode(self._container), 1):
                with self._changed:
                    self._newest = (number, time.monotonic(), picture)
                    self._changed.notify()
                if self._closing:
                    return
        except Exception as error:  # whatever it is, the caller has to hear of it
            ended = f"the source was lost ({getattr(error, 'strerror', None) or error})"
        finally:
            self._container.close()
        with self._changed:
            self.ended = self.ended or ended
            self._changed.notify()


def _pixels(picture: Any) -> np.ndarray:
    """An av.VideoFrame as RGB, the way up it is meant to be seen."""
    return np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90)))

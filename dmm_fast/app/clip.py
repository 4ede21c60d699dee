"""Any frame of a clip at once: by seeking in a video, and a cache of what was shown lately."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from dmm_fast.data.video import FramesError, ImageFrames, VideoFrames, open_frames, read_image

WIDTHS = (320, 1280, 2560, 0)  # of pictures for the page; 0 is the frame's own
CACHED = 96 << 20  # bytes of pictures kept
NEAR = 12  # frames before the one asked for that are kept when decoding passes them


class Clip:
    """A directory of images or a video, by frame number; decodes on demand and holds a few frames at most."""

    def __init__(self, path: str | os.PathLike):
        self.frames = open_frames(path)
        self.path, self.size, self.fps = self.frames.path, self.frames.size, self.frames.fps
        self.stems = self.frames.stems
        self._lock = threading.Lock()
        self._coming: Iterator[tuple[int, Any]] = iter(())  # of a video, after the picture that was shown last
        self._at = -1  # its number
        self._pictures: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self.stems)

    def frame(self, index: int) -> np.ndarray:
        """One frame, uint8 [H, W, 3]."""
        if isinstance(self.frames, ImageFrames):
            return read_image(self.frames.files[index])
        _, frame = next(self.read(index), (index, None))
        if frame is None:
            raise FramesError(f"{self.path}: frame {index} cannot be decoded")
        return frame

    def read(self, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """(number, frame) from `start` on, as a stream."""
        stream = self.frames.read(start, seek=True) if isinstance(self.frames, VideoFrames) else self.frames.read(start)
        for index, (_, frame) in enumerate(stream, start):
            yield index, frame

    def picture(self, index: int, width: int) -> bytes:
        """A frame as JPEG, at most `width` wide (0: as wide as it is)."""
        width = min(width or self.size[1], self.size[1])
        with self._lock:
            if (index, width) not in self._pictures:
                for found, small in self._small(index, width):
                    self._keep((found, width), _jpeg(small))
            self._pictures.move_to_end((index, width))
            return self._pictures[index, width]

    def _small(self, index: int, width: int) -> Iterator[tuple[int, np.ndarray]]:
        """The frame scaled down, after those just before it that a decoder passes on its way."""
        size = _scaled(self.size, width)
        if isinstance(self.frames, ImageFrames):
            image = Image.fromarray(self.frame(index))
            yield index, np.asarray(image.resize(size[::-1], Image.Resampling.BOX))
            return
        key = self.frames.timeline.key_before(index)
        if not max(key - 1, 0) <= self._at < index:
            self._coming = self.frames.shown(max(key, index - NEAR + 1, 0), seek=True)
        self._at = -1
        for found, picture in self._coming:
            if found > index - NEAR:
                yield found, self.frames.upright(picture, found, size)
            if found >= index:
                self._at = found
                return
        raise FramesError(f"{self.path}: frame {index} cannot be decoded")

    def _keep(self, key: tuple[int, int], picture: bytes) -> None:
        self._pictures[key] = picture
        while sum(map(len, self._pictures.values())) > CACHED and len(self._pictures) > NEAR:
            self._pictures.popitem(last=False)


def _scaled(size: tuple[int, int], width: int) -> tuple[int, int]:
    return max(1, round(size[0] * width / size[1])), width


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()

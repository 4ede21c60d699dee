"""Any frame of a clip at once: an index of a video's frames, seeking by it, and a cache of what was shown lately."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dmm_fast.data.video import FramesError, ImageFrames, VideoFrames, open_frames, read_image
from dmm_fast.files import whole_file

WIDTHS = (320, 1280, 2560, 0)  # of pictures for the page; 0 is the frame's own
CACHED = 96 << 20  # bytes of pictures kept
NEAR = 12  # frames before the one asked for that are kept when decoding passes them


class Clip:
    """A directory of images or a video, by frame number; decodes on demand and holds a few frames at most.

    index: a file that keeps a video's index, so that a long one is read through only once.
    """

    def __init__(self, path: str | os.PathLike, index: Path | None = None, progress: bool = False):
        self.frames = open_frames(path)
        self.path, self.size, self.fps = self.frames.path, self.frames.size, self.frames.fps
        self.stems = self.frames.stems
        self._video = _Video(self.frames, index, progress) if isinstance(self.frames, VideoFrames) else None
        if self._video is not None and len(self._video) < len(self.stems):  # headers may promise more than there is
            self.stems = self.stems[: len(self._video)]
        self._lock = threading.Lock()
        self._pictures: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self.stems)

    def frame(self, index: int) -> np.ndarray:
        """One frame, uint8 [H, W, 3]."""
        if self._video is None:
            return self._image(index)
        return next(self._video.read(index))[1]

    def read(self, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """(number, frame) from `start` on, as a stream."""
        if self._video is not None:
            yield from self._video.read(start)
        else:
            for index in range(start, len(self)):
                yield index, self._image(index)

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
        if self._video is not None:
            yield from self._video.pictures(index, _scaled(self.size, width))
        else:
            image = Image.fromarray(self._image(index))
            yield index, np.asarray(image.resize(_scaled(self.size, width)[::-1], Image.Resampling.BOX))

    def _image(self, index: int) -> np.ndarray:
        assert isinstance(self.frames, ImageFrames)
        return read_image(self.frames.files[index])

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


class _Video:
    """Exact access by number: frames are found by their time, as the packets of the file state it.

    Where they do not (AVI), frames are counted from the start, which is slow far into a long file.
    """

    def __init__(self, frames: VideoFrames, index: Path | None, progress: bool):
        self.path = frames.path
        self._times, self._keys = self._index(index, progress)  # in order of display; of those one can start from
        self._container, self._at = None, -1  # the decoder of pictures, and the frame it gave last

    def __len__(self) -> int:
        return len(self._times)

    def _index(self, file: Path | None, progress: bool) -> tuple[np.ndarray, np.ndarray]:
        """Times of all frames and of the key frames; no key frames where times cannot be relied on."""
        entry = self.path.stat()
        key = [entry.st_size, entry.st_mtime_ns]
        if file is not None and file.exists():
            with np.load(file) as kept:
                if kept["key"].tolist() == key:
                    return kept["times"], kept["keys"]
        with self._open() as container:
            stream = container.streams.video[0]
            packets = tqdm(container.demux(stream), desc="indexing", unit=" frames", delay=1, disable=not progress, leave=False)
            found = [(packet.pts, packet.is_keyframe) for packet in packets if packet.size and not packet.is_discard]
            guessed = container.format.name == "avi"  # its times are those of decoding, not of display
        if guessed or any(time is None for time, _ in found) or len({time for time, _ in found}) < len(found):
            times, keys = np.arange(len(found)), np.zeros(0, np.int64)
        else:
            times = np.array(sorted(time for time, _ in found), np.int64)
            keys = np.array(sorted(time for time, is_key in found if is_key), np.int64)
        if file is not None:
            with whole_file(file) as part, part.open("wb") as out:
                np.savez(out, key=np.array(key), times=times, keys=keys)
        return times, keys

    def _open(self):
        import av

        return av.open(str(self.path))

    def _decode(self, container, start: int) -> Iterator:
        """(number, av.VideoFrame) from at most `start` on: from the frame before it that decoding can start from."""
        from av import FFmpegError

        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        if (before := self._key_before(start)) > 0:  # the first needs no seeking, which not every file allows
            container.seek(int(self._times[before]), stream=stream)
        try:
            for count, frame in enumerate(container.decode(stream)):
                index = int(np.searchsorted(self._times, frame.pts)) if len(self._keys) else count
                if index < len(self) and (self._times[index] == frame.pts or not len(self._keys)):
                    yield index, frame
        except FFmpegError as error:
            raise FramesError(f"{self.path}: damaged near frame {start} ({error.strerror})") from None

    def _key_before(self, index: int) -> int:
        """The number of the last key frame up to this frame, 0 where there is none."""
        place = int(np.searchsorted(self._keys, self._times[index], side="right"))
        return int(np.searchsorted(self._times, self._keys[place - 1])) if place else 0

    def read(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        wanted = start
        with self._open() as container:
            for index, frame in self._decode(container, start):
                if index >= wanted:
                    if index > wanted:
                        raise FramesError(f"{self.path}: frame {wanted} cannot be decoded")
                    yield index, _upright(frame, frame.to_ndarray(format="rgb24"))
                    wanted += 1
        if wanted == start:
            raise FramesError(f"{self.path}: frame {start} cannot be decoded")

    def pictures(self, index: int, size: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
        """Frames scaled to `size` up to this one; goes on where the last call ended if that is not further away."""
        if self._container is None or not max(self._key_before(index) - 1, 0) <= self._at < index:
            if self._container is not None:
                self._container.close()
            self._container = self._open()
            self._stream = self._decode(self._container, index)
        for found, frame in self._stream:
            self._at = found
            if found > index - NEAR:
                height, width = size if round(frame.rotation / 90) % 2 == 0 else size[::-1]
                yield found, _upright(frame, frame.to_ndarray(format="rgb24", width=width, height=height))
            if found >= index:
                return
        self._at = -1
        raise FramesError(f"{self.path}: frame {index} cannot be decoded")


def _upright(frame, pixels: np.ndarray) -> np.ndarray:
    """The way up it is meant to be seen, as `VideoFrames` gives it."""
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))

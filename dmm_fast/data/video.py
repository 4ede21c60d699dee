"""Frames in, video out: a directory of images or a video file read as a stream, and a writer for overlay videos."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi")
T = TypeVar("T")


class FramesError(ValueError):
    """Frames that cannot be read; the message says which and why."""


def open_frames(path: str | os.PathLike) -> ImageFrames | VideoFrames:
    """Open a directory of images or a video file.

    Either has ``size`` (H, W), ``fps`` (None for images), ``stems`` (the frames' names), ``read(start)``, which yields
    (stem, uint8 [H, W, 3] RGB) one frame at a time, and ``pick(indices)``, which yields (index, stem, frame) of a few.
    """
    path = Path(path)
    if path.is_dir():
        return ImageFrames(path)
    if not path.exists():
        raise FramesError(f"{path}: no such directory or video file")
    return VideoFrames(path)


class ImageFrames:
    """A directory of images in natural order (frame2 before frame10), all of one size."""

    fps: float | None = None

    def __init__(self, path: Path):
        self.path = path
        images = (file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
        self.files = sorted(images, key=lambda file: natural_key(file.stem))
        if not self.files:
            inner = next((entry.name for entry in sorted(path.iterdir()) if entry.is_dir()), None)
            hint = f"; did you mean {path / inner}?" if inner else ""
            raise FramesError(f"{path}: no images ({', '.join(suffix[1:] for suffix in SUFFIXES)}) here{hint}")
        self.stems = [file.stem for file in self.files]
        for file, other in zip(self.files, self.files[1:]):
            if file.stem == other.stem:
                raise FramesError(f"{path}: {file.name} and {other.name} are the same frame twice")
        self.size = image_size(self.files[0])
        for file in self.files[1:]:  # headers only; better now than an hour into the run
            if image_size(file) != self.size:
                sizes = "is {1}x{0}, the first frame is {3}x{2}".format(*image_size(file), *self.size)
                raise FramesError(f"{file}: {sizes}; all frames of a video must have one size")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        for file in self.files[start:]:
            yield file.stem, read_image(file)

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, str, np.ndarray]]:
        for index in sorted(indices):
            yield index, *next(self.read(index))


class VideoFrames:
    """A video file, decoded as a stream; frames are named 00000, 00001, ... A damaged file may end early."""

    def __init__(self, path: Path):
        self.path = path
        _, frame = next(self.read(), (None, None))
        if frame is None:
            raise FramesError(f"{path}: this video has no frames")
        self.size = frame.shape[:2]
        with _open_video(path) as container:
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate) if stream.average_rate else None
            # Some containers do not say how many frames they hold; packets are counted without decoding.
            count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        self.stems = [f"{index:05d}" for index in range(count)]

    def __len__(self) -> int:
        return len(self.stems)

    def read(self, start: int = 0) -> Iterator[tuple[str, np.ndarray]]:
        from av import FFmpegError

        with _open_video(self.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            index = 0
            try:
                for frame in container.decode(stream):
                    if index >= start:  # decoded and dropped up to there: seeking is not exact in every format
                        turns = round(frame.rotation / 90)  # counter-clockwise, from the file's display matrix
                        yield f"{index:05d}", np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                    index += 1
            except FFmpegError as error:
                raise FramesError(f"{self.path}: damaged at frame {index} ({error.strerror})") from None

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, str, np.ndarray]]:
        wanted = set(indices)
        for index, (stem, frame) in enumerate(self.read()):
            if index in wanted:
                yield index, stem, frame


def _open_video(path: Path):
    import av

    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise FramesError(f"{path}: neither a directory of frames nor a video that FFmpeg reads ({error.strerror})") from None
    if not container.streams.video:
        container.close()
        raise FramesError(f"{path}: neither a directory of frames nor a video: the file has no video stream")
    return container


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image as uint8 [H, W, 3], the way up it is meant to be seen."""
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except OSError as error:
        raise FramesError(f"{path}: cannot be read as an image ({error})") from None


def image_size(file: Path) -> tuple[int, int]:
    """(H, W) as read() will give it, from the header."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the sides
            return image.size if turned else image.size[::-1]
    except OSError as error:
        raise FramesError(f"{file}: cannot be read as an image ({error})") from None


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sorts "frame2" before "frame10"."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part] + [(1, name)]


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """The same items, the next one being made in a thread while the caller works on this one."""
    iterator, end = iter(items), cast(T, object())
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item


class Behind:
    """Calls that run in a thread, one after the other, behind the caller's back; at most `waiting` of them are due at a time.

    What one raises comes out of the next call, of `wait`, or at the end of the `with` block.
    """

    def __init__(self, waiting: int = 4):
        self._pool, self._due, self._waiting = ThreadPoolExecutor(1), deque[Future](), waiting

    def __call__(self, function: Callable[..., Any], *args: Any) -> None:
        while self._due and (self._due[0].done() or len(self._due) >= self._waiting):
            self._due.popleft().result()
        self._due.append(self._pool.submit(function, *args))

    def wait(self) -> None:
        """Until nothing is due."""
        while self._due:
            self._due.popleft().result()

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self.wait()


def check_video_name(path: str | os.PathLike, coming: Path | None = None) -> None:
    """Raise FramesError where a VideoWriter could not write this path, before hours are spent on its frames.

    coming: a directory that will be there by then.
    """
    if Path(path).suffix.lower() not in VIDEO_SUFFIXES:
        raise FramesError(f"{path}: a video's name must end in {', '.join(VIDEO_SUFFIXES)}")
    folder = Path(path).parent.resolve()
    if not folder.is_dir() and (coming is None or folder != coming.resolve()):
        raise FramesError(f"{path}: there is no directory {Path(path).parent}")


class VideoWriter:
    """Writes uint8 [H, W, 3] RGB frames to an H.264 file (MPEG-4 where this FFmpeg has no H.264 encoder).

    The file appears under its name when the writer closes without an error. Odd sizes lose no pixels: the last row or
    column is doubled, since the video formats store colour for 2x2 pixels.
    """

    def __init__(self, path: str | os.PathLike, size: tuple[int, int], fps: float = 25.0):
        import av

        check_video_name(path)
        self.path, self.size = Path(path), tuple(size)
        self._part = self.path.with_name(f"{self.path.stem}.part{self.path.suffix}")
        height, width = self.size
        self._pad = ((0, height % 2), (0, width % 2), (0, 0))
        self._container = av.open(str(self._part), "w")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        self._stream = self._container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        self._stream.width, self._stream.height = width + width % 2, height + height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": "20", "preset": "veryfast"} if codec == "libx264" else {"qscale": "3"}

    def write(self, frame: np.ndarray) -> None:
        import av

        if frame.shape != (*self.size, 3) or frame.dtype != np.uint8:
            raise ValueError(f"frame must be uint8 {(*self.size, 3)}, got {frame.dtype} {frame.shape}")
        padded = np.pad(frame, self._pad, mode="edge")
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(padded, format="rgb24")))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()
        if kind is None:
            os.replace(self._part, self.path)
        else:
            self._part.unlink(missing_ok=True)

"""Frames in, video out: a directory of images or a video file read as a stream, and a writer for overlay videos."""

from __future__ import annotations

import heapq
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from PIL import Image, ImageOps

from dmm_fast.data.sound import Sound
from dmm_fast.data.timeline import read_timeline

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi")
ALPHA = {  # with alpha: codec, pixel format, options
    ".mov": ("prores_ks", "yuva444p10le", {"profile": "4444"}),
    ".webm": ("libvpx-vp9", "yuva420p", {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"}),
}
HELD = 8  # pictures that wait for an earlier one
STRETCH = 512 << 20  # bytes of frames that are held to be read backwards
THREADS = min(4, os.cpu_count() or 1)  # that read or write pictures
S = TypeVar("S")
T = TypeVar("T")


class FramesError(ValueError):
    """Frames that cannot be read; the message says which and why."""


def open_frames(path: str | os.PathLike) -> ImageFrames | VideoFrames:
    """Open a directory of images or a video file.

    Either has ``size`` (H, W), ``fps`` (None for images), ``stems`` (the frames' names), ``read(start)``, which yields
    (stem, uint8 [H, W, 3] RGB) one frame at a time, ``read_back(start)``, which does so from there down to the first, and
    ``pick(indices)``, which yields (index, stem, frame) of a few.
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
    missing: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()

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
        return self._read(range(start, len(self)))

    def read_back(self, start: int) -> Iterator[tuple[str, np.ndarray]]:
        return self._read(range(start, -1, -1))

    def _read(self, order: Iterable[int]) -> Iterator[tuple[str, np.ndarray]]:
        files = [self.files[index] for index in order]
        for file, image in zip(files, in_threads(read_image, files)):
            yield file.stem, image

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, str, np.ndarray]]:
        for index in sorted(indices):
            yield index, self.stems[index], read_image(self.files[index])


class Colours(NamedTuple):
    """Numbers of ITU-T H.273 that say what a video's Y, Cb and Cr mean."""

    matrix: int
    primaries: int = 2  # not said
    transfer: int = 2


BT709, BT601 = 1, 6  # of Colours.matrix
SCALED = {1: 1, 2: 5, 5: 5, 6: 5, 9: 9, 10: 9}  # matrices that we write, and the numbers that FFmpeg's scaler has for them
HD = 720  # rows, from which on a player takes a video of which nothing is said for BT.709, and below for BT.601


class VideoFrames:
    """A video file, decoded as a stream; frames are named 00000, 00001, ... in the order in which they are shown.

    A frame that cannot be decoded keeps its number: the last good picture stands for it (before the first good one, that).
    `missing` and `damaged` hold the numbers of such frames and of those decoded from damaged data, as far as they have been
    read; `notes` says what is wrong with the file; `colours` what it says of its own. `timeline` has the time of every frame, `aspect` the width of a pixel by its
    height, `turns` the quarter turns counter-clockwise that stand a frame upright; frames are read upright.
    """

    def __init__(self, path: Path):
        self.path = path
        with _open_video(path) as container:
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate) if stream.average_rate else None
            self.timeline = read_timeline(container, stream)
        self.missing: set[int] = set()
        self.damaged: set[int] = set()
        self._even = True  # a packet is a frame
        first = self._begin()
        self.turns = round(first.rotation / 90) % 4  # from the file's display matrix
        self.size = _turned((first.height, first.width), self.turns)
        with _open_video(path) as container:
            stream = container.streams.video[0]
            start = Fraction(container.start_time or 0, 1_000_000)  # in microseconds
            self.begin = max(start, Fraction(0))  # the time stamp of the file's first second
            context = stream.codec_context
            aspect = Fraction(stream.sample_aspect_ratio or context.sample_aspect_ratio or 1)
            self.colours = Colours(context.colorspace, context.color_primaries, context.color_trc)
        self.aspect = 1 / aspect if self.turns % 2 else aspect
        self.stems = [f"{index:05d}" for index in range(len(self.timeline.times))]

    def __len__(self) -> int:
        return len(self.stems)

    @property
    def notes(self) -> list[str]:
        """What is wrong with the file, as far as it has been read."""
        found, timeline = [], self.timeline
        for frames, what in (
            (self.missing - timeline.lost, "cannot be decoded"),
            (self.missing & timeline.lost, "missing in the file"),
        ):
            if frames:
                good = "the first good picture stands" if 0 in frames else "the last good picture stands"
                found.append(f"{_numbers(frames)} {what}: {good} for {'it' if len(frames) == 1 else 'them'}")
        if damaged := (self.damaged | timeline.corrupt) - self.missing:
            found.append(f"{_numbers(damaged)}: the data is damaged, the picture may be")
        for index, seconds in timeline.jumps:
            found.append(f"the clock jumps by {seconds:.2f} s after frame {index:05d}; frames are numbered on")
        if timeline.before:
            found.append(f"{timeline.before} packets before the first frame cannot be decoded and have no numbers: the recording "
                         "starts between two key frames")  # fmt: skip
        if timeline.pauses:
            found.append(
                f"longer than the other frames: {_numbers(timeline.pauses)}; if frames are missing there, they have no numbers"
            )
        if timeline.cut:
            length, promised = timeline.cut
            rest = "the rest cannot be read" if promised is None else f"its header promises {promised:.2f} s"
            found.append(f"the file ends early, after {length:.2f} s and {len(self)} frames: {rest}")
        return [f"{self.path.name}: {note}" for note in found]

    def _begin(self) -> Any:
        """The first picture; what the first few say of the numbers of the others."""
        pictures = list(islice(self._pictures(), 4))
        if not pictures:
            packets = len(self.timeline.times)
            why = f"none of its {packets} frames can be decoded" if packets else "this video has no frames"
            raise FramesError(f"{self.path}: {why}")
        skipped = [n for n in range(pictures[-1].number) if n not in {p.number for p in pictures} | self.timeline.lost]
        if skipped and not (pictures[-1].errors or self.timeline.corrupt):
            lead = pictures[0].number
            if skipped[-1] < lead:  # the recording starts between two key frames
                self.timeline.drop_first(lead)
            else:  # packets that are no frames, such as fields of interlaced ones
                self.timeline.timed = self._even = False
        return pictures[0].frame

    def read(self, start: int = 0, seek: bool = False) -> Iterator[tuple[str, np.ndarray]]:
        """seek: begin to decode at the key frame before `start`; `notes` then know nothing of what lies before it."""
        for number, image in self._images(self.shown(start, seek)):
            yield f"{number:05d}", image

    def _images(self, shown: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, np.ndarray]]:
        """What `upright` makes of each, once where one picture stands for several frames."""
        before, image = None, np.empty(0)
        for number, picture in shown:
            if picture is not before:
                before, image = picture, self.upright(picture, number)
            yield number, image

    def shown(self, start: int = 0, seek: bool = False) -> Iterator[tuple[int, Any]]:
        """The number of each frame from `start` on and the av.VideoFrame that is shown for it."""
        index, pictures = self._pictures_near(start) if seek else (0, self._pictures())
        last = None
        for number, *_, picture in pictures:
            for missed in range(index, number):
                self.missing.add(missed)
                if missed >= start:
                    yield missed, last or picture
            last, index = picture, number + 1
            if picture.is_corrupt:
                self.damaged.add(number)
            if number >= start:
                yield number, picture
        if self._even:
            for missed in range(index, len(self)):
                self.missing.add(missed)
                if missed >= start:
                    yield missed, last

    def read_back(self, start: int) -> Iterator[tuple[str, np.ndarray]]:
        """(stem, frame) from `start` down to the first; decoded in stretches of at most `STRETCH` bytes."""
        most, stop = max(8, STRETCH // (3 * math.prod(self.size))), start + 1
        while stop > 0:
            begin = max(0, stop - most)
            begin = next((key for key in self.timeline.keys if begin <= key < stop), begin)  # nothing is decoded to be dropped
            held = list(islice(self.read(begin, seek=True), stop - begin))
            stop = begin
            while held:
                yield held.pop()

    def _pictures_near(self, start: int) -> tuple[int, Iterator[Picture]]:
        """The number of a frame, `start` or one before it, and the pictures from there on."""
        key = self.timeline.key_before(start) if self._even else 0
        if key:  # the first needs no seeking, which not every file allows
            pictures = self._pictures(key)
            first = next(pictures, None)
            if first is not None and first.number == key:
                return key, chain([first], pictures)
        return 0, self._pictures()

    def upright(self, picture: Any, number: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """An av.VideoFrame of frame `number` as uint8 [H, W, 3] RGB, the way up it is meant to be seen; scaled to a size (H, W)."""
        found = _turned((picture.height, picture.width), self.turns)
        if found != self.size:
            sizes = "is {1}x{0}, the first is {3}x{2}".format(*found, *self.size)
            raise FramesError(f"{self.path}: frame {number:05d} {sizes}; all frames of a video must have one size")
        height, width = _turned(size or self.size, self.turns)
        return np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24", height=height, width=width), self.turns))

    def _pictures(self, key: int = 0) -> Iterator[Picture]:
        """What the decoder gives, by number, from a key frame on. Beside lost frames it loses their order too; a few are held
        back until it fits."""
        held: list[Picture] = []
        index = key
        for picture in chain(self._decode(key), [None]):
            if picture is not None:
                heapq.heappush(held, picture)
            while held and (held[0].number <= index or len(held) > HELD or picture is None):
                if (earliest := heapq.heappop(held)).number >= index:  # else its time has passed
                    yield earliest
                    index = earliest.number + 1

    def _decode(self, key: int = 0, threads: str = "AUTO") -> Iterator[Picture]:
        from av import FFmpegError

        index, self._errors, serial = key, 0, count()
        with _open_video(self.path) as container:
            stream = container.streams.video[0]
            stream.thread_type = threads
            if key:
                container.seek(int(self.timeline.stamps[key]), stream=stream)
            packets = container.demux(stream)
            while True:
                try:
                    if (packet := next(packets, None)) is None:
                        break
                    for frame in packet.decode():
                        index = self._number(frame.pts, index)
                        yield Picture(index, next(serial), self._errors, frame)
                        index += 1
                except FFmpegError:
                    self._errors += 1
                    index += not self.timeline.timed  # about where the frame would be shown
        if threads == "AUTO" and self._even and index < len(self.timeline.stamps):
            yield from self._decode(key, "SLICE")  # at the end of a damaged file several threads lose what they hold

    def _number(self, stamp: int | None, index: int) -> int:
        """The number of a picture that is expected to have `index`."""
        stamps = self.timeline.stamps
        if not self.timeline.timed or stamp is None or (index < len(stamps) and stamps[index] == stamp):
            return index
        places = np.flatnonzero(stamps == stamp)  # more than one where the clock was set back
        return int(places[np.abs(places - index).argmin()]) if len(places) else index

    def pick(self, indices: Iterable[int]) -> Iterator[tuple[int, str, np.ndarray]]:
        """Decodes from the key frame before the first of them to the last, and `notes` knows of no other."""
        wanted = set(indices)
        for number, image in self._images(self._shown_of(wanted)) if wanted else ():
            yield number, f"{number:05d}", image

    def _shown_of(self, wanted: set[int]) -> Iterator[tuple[int, Any]]:
        last = max(wanted)
        for number, picture in self.shown(min(wanted), seek=True):
            if number in wanted:
                yield number, picture
            if number >= last:
                return


def _turned(size: tuple[int, int], turns: int) -> tuple[int, int]:
    return size if turns % 2 == 0 else size[::-1]


class Picture(NamedTuple):
    number: int
    serial: int  # so that pictures can be ordered
    errors: int  # of the decoder, up to it
    frame: Any  # av.VideoFrame


def _numbers(frames: Iterable[int], most: int = 8) -> str:
    """ "frame 00003", "frames 00003, 00007 to 00010"."""
    runs: list[list[int]] = []
    for number in sorted(frames):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    named = [f"{a:05d}" if a == b else f"{a:05d} to {b:05d}" for a, b in runs[:most]]
    rest = f" and {sum(b - a + 1 for a, b in runs[most:])} more" if len(runs) > most else ""
    return f"frame{'s' * (runs[0][0] != runs[-1][1])} " + ", ".join(named) + rest


def _open_video(path: Path) -> Any:
    import av

    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        cut = b"ftyp" in path.open("rb").read(16)
        hint = "; this MP4 lacks its index, which is written last: was the recording or the download cut short?" if cut else ""
        raise FramesError(
            f"{path}: neither a directory of frames nor a video that FFmpeg reads ({error.strerror}){hint}"
        ) from None
    if not container.streams.video:
        container.close()
        raise FramesError(f"{path}: neither a directory of frames nor a video: the file has no video stream")
    return container


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image as uint8 [H, W, 3], the way up it is meant to be seen. Of 16 bits the upper eight count."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG"):  # as older Pillows have it
                grey = (np.asarray(upright) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, 2)
            if upright.mode in ("I", "F"):  # Pillow would cut off what is above 255
                raise FramesError(f"{path}: has grey values of 32 bits; frames have 8 or 16")
            return np.array(upright.convert("RGB"))
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


def in_threads(function: Callable[[S], T], items: Iterable[S], threads: int = THREADS) -> Iterator[T]:
    """What `function` makes of each item, in order; threads work on the next few while the caller is busy with one."""
    due, pool = deque[Future](), ThreadPoolExecutor(threads)
    try:
        for item in items:
            due.append(pool.submit(function, item))
            if len(due) > threads:
                yield due.popleft().result()
        while due:
            yield due.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Behind:
    """Calls that run in threads behind the caller's back, with one thread one after the other; few are due at a time.

    What one raises comes out of a later call, of `wait`, or at the end of the `with` block.
    """

    def __init__(self, threads: int = 1):
        self._pool, self._due, self._waiting = ThreadPoolExecutor(threads), deque[Future](), 4 * threads

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


def check_video_name(path: str | os.PathLike, coming: Path | None = None, alpha: bool = False) -> None:
    """Raise FramesError where a VideoWriter could not write this path, before hours are spent on its frames.

    coming: a directory that will be there by then. alpha: for a video with alpha.
    """
    suffixes = tuple(ALPHA) if alpha else VIDEO_SUFFIXES
    if Path(path).suffix.lower() not in suffixes:
        raise FramesError(f"{path}: the name of a video{' with alpha' * alpha} must end in {', '.join(suffixes)}")
    folder = Path(path).parent.resolve()
    if not folder.is_dir() and (coming is None or folder != coming.resolve()):
        raise FramesError(f"{path}: there is no directory {Path(path).parent}")


class VideoWriter:
    """Writes uint8 [H, W, 3] RGB frames to an H.264 file (MPEG-4 where this FFmpeg has no H.264 encoder), or [H, W, 4] RGBA
    frames, with alpha=True, to ProRes 4444 (.mov) or VP9 (.webm).

    like: a video whose frames these are, one by one; their times, the shape of its pixels and its sound are kept, and `notes`
    says what of the sound was not. Else there are `fps` frames a second. The file appears under its name when the writer closes
    without an error. Odd sizes lose no pixels: the last row or column is doubled, since the video formats store colour for 2x2
    pixels. Colours are written, and said to be, as those of `like`; else as BT.709 from 720 rows on, as BT.601 below.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        size: tuple[int, int],
        fps: float = 25.0,
        like: ImageFrames | VideoFrames | None = None,
        alpha: bool = False,
    ):
        import av

        check_video_name(path, alpha=alpha)
        self.path, self.size, self._alpha = Path(path), tuple(size), alpha
        self._part = self.path.with_name(f"{self.path.stem}.part{self.path.suffix}")
        height, width = self.size
        self._pad = ((0, height % 2), (0, width % 2), (0, 0))
        codec, pixels, options = _encoder(self.path.suffix.lower(), alpha)
        like = like if isinstance(like, VideoFrames) else None
        rate = Fraction(fps).limit_denominator(1001)
        self._times = _times(like, rate, codec, self.path)
        self._container = av.open(str(self._part), "w")
        try:
            self._stream = self._container.add_stream(
                codec, rate=Fraction(like.fps or rate).limit_denominator(1001) if like else rate
            )
            self._stream.width, self._stream.height = width + width % 2, height + height % 2
            self._stream.pix_fmt, self._stream.options = pixels, options
            self._stream.codec_context.time_base = self._unit = self._times.unit
            if (
                like and like.aspect != 1 and self.path.suffix.lower() == ".webm"
            ):  # PyAV cannot write its shape of a pixel: square
                self._stream.width = 2 * round(self._stream.width * max(like.aspect, 1) / 2)
                self._stream.height = 2 * round(self._stream.height / min(like.aspect, 1) / 2)
            elif like and like.aspect != 1:
                self._stream.codec_context.sample_aspect_ratio = like.aspect
            untold = codec == "mpeg4" and self.path.suffix.lower() == ".avi"  # which cannot say
            own = (
                like.colours
                if like and like.colours.matrix in SCALED and not untold
                else Colours(BT709 if height >= HD else BT601)
            )
            self._stream.codec_context.colorspace, self._stream.codec_context.color_range = own.matrix, 1  # 16 to 235
            self._stream.codec_context.color_primaries, self._stream.codec_context.color_trc = own.primaries, own.transfer
            self._matrix = SCALED[own.matrix]
            jumps = like is not None and bool(like.timeline.jumps)
            self._sound = Sound(like.path, self._container, self._times.origin) if like and not jumps else None
        except BaseException:
            self._container.close()
            self._part.unlink(missing_ok=True)
            raise
        self.notes = list(self._sound.notes if self._sound else ["the clock of the video jumps: the sound is left out"] * jumps)
        self._index, self._last = 0, -1

    def write(self, frame: np.ndarray) -> None:
        import av

        shape = (*self.size, 4 if self._alpha else 3)
        if frame.shape != shape or frame.dtype != np.uint8:
            raise ValueError(f"frame must be uint8 {shape}, got {frame.dtype} {frame.shape}")
        stream = self._stream
        picture = av.VideoFrame.from_ndarray(np.pad(frame, self._pad, mode="edge"), format="rgba" if self._alpha else "rgb24")
        picture = picture.reformat(stream.width, stream.height, stream.pix_fmt, dst_colorspace=self._matrix, dst_color_range=1)
        picture.pts = self._last = max(self._times(self._index), self._last + 1)  # rounded, two may coincide
        picture.time_base = self._unit
        self._index += 1
        if self._sound:
            self._sound.until(self._last * self._unit)
        self._container.mux(self._stream.encode(picture))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._container.mux(self._stream.encode())
                if self._sound:
                    self._sound.finish()
                    self.notes = self._sound.notes
            elif self._sound:
                self._sound.close()
        finally:
            self._container.close()
        if kind is None:
            os.replace(self._part, self.path)
        else:
            self._part.unlink(missing_ok=True)


def _encoder(suffix: str, alpha: bool) -> tuple[str, str, dict[str, str]]:
    """Codec, pixel format and options."""
    from av import codecs_available

    if not alpha:
        codec = "libx264" if "libx264" in codecs_available else "mpeg4"
        return codec, "yuv420p", {"crf": "20", "preset": "veryfast"} if codec == "libx264" else {"qscale": "3"}
    codec, pixels, options = ALPHA[suffix]
    if codec not in codecs_available:
        raise FramesError(f"this FFmpeg has no encoder {codec}, which a {suffix} with alpha needs; "
                          f"encoders with alpha here: {alpha_suffix() or 'none, save cutout instead'}")  # fmt: skip
    return codec, pixels, options


def alpha_suffix() -> str | None:
    """Of a video with alpha that this FFmpeg can write: .mov (ProRes 4444), else .webm (VP9), else None."""
    from av import codecs_available

    return next((suffix for suffix, (codec, *_) in ALPHA.items() if codec in codecs_available), None)


class _Times:
    """When a writer shows its frames: `unit` seconds times what a call gives, from `origin` on."""

    def __init__(
        self, unit: Fraction, stamps: np.ndarray | None = None, source: Fraction = Fraction(1), origin: Fraction = Fraction(0)
    ):
        self.unit, self.origin, self._stamps, self._source = unit, origin, stamps, source

    def __call__(self, index: int) -> int:
        if self._stamps is None:
            return index
        if index >= len(self._stamps):
            raise FramesError(f"frame {index} of a video of {len(self._stamps)}")
        return round((int(self._stamps[index]) * self._source - self.origin) / self.unit)


def _times(like: VideoFrames | None, rate: Fraction, codec: str, path: Path) -> _Times:
    if like is None or not len(like):
        return _Times(1 / rate)
    timeline = like.timeline
    if path.suffix.lower() == ".avi":  # holds one rate
        if not timeline.regular or timeline.pauses or timeline.jumps:
            raise FramesError(f"{path}: an .avi holds one frame rate, {like.path.name} has several; choose .mp4, .mkv or .mov")
        step = int(np.median(np.diff(timeline.times))) if len(like) > 1 else 1
        return _Times(Fraction(step * timeline.time_base).limit_denominator(60000), origin=like.begin)
    unit = timeline.time_base
    if codec == "mpeg4" and unit.denominator > 65535:
        unit = Fraction(1, 60000)
    return _Times(unit, timeline.times, timeline.time_base, like.begin)

"""Small videos with known frame times, pixel shapes and sound, and ways to damage them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

UNIT = Fraction(1, 90000)  # of a second
SIZE = (48, 64)


def pictures(count: int = 12, size: tuple[int, int] = SIZE) -> list[np.ndarray]:
    """A square that moves over noise, so that no frame is coded as a copy of the one before."""
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 120, (count, *size, 3), dtype=np.uint8))
    for index, frame in enumerate(frames):
        frame[10:30, 2 * index : 2 * index + 20] = (200, 60, 30)
    return frames


def make_video(path: Path, times=None, *, aspect=None, sound=None, gop=4, codec="libx264", options=None, matrix=None) -> Path:
    """12 frames shown at `times` (in UNIT; default: 12 a second), a key frame every `gop`, a second of sound in a codec."""
    import av

    times = [7500 * index for index in range(12)] if times is None else times
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=12)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.time_base, stream.codec_context.gop_size = UNIT, gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            stream.codec_context.colorspace = matrix
        voice = container.add_stream(sound, rate=48000, layout="mono") if sound else None
        for frame, time in zip(pictures(len(times)), times):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            if matrix:
                picture = picture.reformat(format="yuv420p", dst_colorspace=matrix)
            picture.pts, picture.time_base = time, UNIT
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if voice:
            tone = (np.sin(np.arange(48000) * (2 * np.pi * 440 / 48000)) * 8000).astype(np.int16)
            for begin in range(0, 48000, 960):
                part = av.AudioFrame.from_ndarray(tone[None, begin : begin + 960], format="s16", layout="mono")
                part.sample_rate, part.pts, part.time_base = 48000, begin, Fraction(1, 48000)
                container.mux(voice.encode(part))
            container.mux(voice.encode())
    return path


def packets(path: Path) -> list[tuple[int, int, int, bool]]:
    """Of every video packet, in the file's order: time stamp, place in the file, size, whether it is a key frame."""
    import av

    with av.open(str(path)) as container:
        return [(p.pts, p.pos, p.size, p.is_keyframe) for p in container.demux(container.streams.video[0]) if p.size]


def spoil(path: Path, packet: int, keep: int = 0) -> None:
    """Overwrite one packet, all but its first bytes."""
    import av

    with av.open(str(path)) as container:
        coded = [bytes(p) for p in container.demux(container.streams.video[0]) if p.size][packet]
    content = path.read_bytes()
    assert content.count(coded) == 1
    path.write_bytes(content.replace(coded, coded[:keep] + bytes(len(coded) - keep)))


def shown(path: Path) -> list[float]:
    """The seconds at which a video's frames are shown."""
    import av

    with av.open(str(path)) as container:
        return [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]


def seconds_of_sound(path: Path) -> tuple[str, float]:
    """Codec and length of a file's sound, 0.0 for a silent one."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        frames = list(container.decode(stream))
        loud = any(np.abs(frame.to_ndarray().astype(np.float32)).max() > 0.05 for frame in frames)
        return stream.codec_context.name, loud * sum(frame.samples for frame in frames) / frames[0].sample_rate

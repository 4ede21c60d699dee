"""The sound of one file, in another."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any


class Sound:
    """Copies a file's sound beside pictures that are being written: packet by packet, or as AAC (in WebM Opus) where the
    container cannot hold it.

    output: an av container that is open for writing, before its first packet. origin: the second that becomes 0.
    `notes` says what was transcoded or left out.
    """

    def __init__(self, source: Path, output: Any, origin: Fraction = Fraction(0)):
        import av

        self._output, self._origin = output, origin
        self.notes: list[str] = []
        self._input = av.open(str(source))
        self._tracks: dict[int, _Track] = {}
        suffix = Path(output.name).suffix
        for stream in self._input.streams.audio:
            if stream.codec_context is None:
                self.notes.append("sound that this FFmpeg cannot read is left out")
                continue
            codec = stream.codec_context.name
            if _holds(output, stream):
                self._tracks[stream.index] = _Copied(output.add_stream_from_template(stream))
                continue
            other = "libopus" if suffix == ".webm" else "aac"
            if other not in av.codecs_available:
                self.notes.append(f"{suffix} cannot hold sound as {codec}, and there is no encoder for {other}: it is left out")
                continue
            self.notes.append(f"{suffix} cannot hold sound as {codec}: transcoded to {other.removeprefix('lib')}")
            self._tracks[stream.index] = _Transcoded(output, other, stream)
        self._packets = self._demux()
        self._next = next(self._packets, None)

    def _demux(self) -> Iterator[Any]:
        from av import FFmpegError

        streams = [stream for stream in self._input.streams.audio if stream.index in self._tracks]
        try:
            yield from self._input.demux(streams) if streams else ()
        except FFmpegError:
            self.notes.append("the sound is damaged and ends early")

    def until(self, second: float | Fraction) -> None:
        """Write what is heard before this second of the output."""
        while self._next is not None:
            packet = self._next
            if packet.dts is not None:
                if packet.dts * packet.time_base - self._origin >= second:
                    return
                self._tracks[packet.stream_index].write(self._output, packet, self._origin)
            self._next = next(self._packets, None)

    def finish(self) -> None:
        """Write the rest."""
        self.until(float("inf"))
        for track in self._tracks.values():
            track.finish(self._output)
        self.close()

    def close(self) -> None:
        self._input.close()


def _holds(output: Any, stream: Any) -> bool:
    """Whether a container can hold this sound as it is: a file in memory is begun, as FFmpeg's own list promises too much."""
    import av

    if output.format.name == "mp4" and stream.codec_context.name.startswith(("pcm_", "vorbis")):  # nearly nothing plays them
        return False
    try:
        with av.open(io.BytesIO(), "w", format=output.format.name) as trial:
            trial.add_stream_from_template(stream)
            trial.start_encoding()
    except (av.FFmpegError, ValueError):
        return False
    return True


class _Track:
    def write(self, output: Any, packet: Any, origin: Fraction) -> None: ...

    def finish(self, output: Any) -> None: ...


class _Copied(_Track):
    def __init__(self, stream: Any):
        self._stream, self._last = stream, None
        self._edits = stream.container.format.name in ("mp4", "mov")  # what lies before 0 is skipped there; else all would move

    def write(self, output: Any, packet: Any, origin: Fraction) -> None:
        shift = round(origin / packet.time_base)
        packet.pts = (packet.dts if packet.pts is None else packet.pts) - shift
        packet.dts -= shift
        if packet.dts < 0 and not self._edits:
            return
        if packet.size and (self._last is None or packet.dts > self._last):  # a container takes packets in order only
            self._last = packet.dts
            packet.stream = self._stream
            output.mux(packet)


class _Transcoded(_Track):
    def __init__(self, output: Any, codec: str, source: Any):
        from av import AudioResampler

        context = source.codec_context
        rate = 48000 if codec == "libopus" else context.sample_rate
        layout = "stereo" if len(context.layout.channels) > 1 else "mono"
        self._source = source
        self._stream = output.add_stream(codec, rate=rate, layout=layout)
        size = 960 if codec == "libopus" else 1024
        self._resampler = AudioResampler(format=self._stream.codec_context.format, layout=layout, rate=rate, frame_size=size)

    def write(self, output: Any, packet: Any, origin: Fraction) -> None:
        from av import FFmpegError

        try:
            frames = packet.decode()
        except FFmpegError:
            return
        for frame in frames:
            if frame.pts is not None:
                frame.pts -= round(origin / frame.time_base)
            self._encode(output, frame)

    def _encode(self, output: Any, frame: Any) -> None:
        for part in self._resampler.resample(frame):
            output.mux(self._stream.encode(part))

    def finish(self, output: Any) -> None:
        for frame in self._source.codec_context.decode(None):
            self._encode(output, frame)
        self._encode(output, None)
        output.mux(self._stream.encode(None))

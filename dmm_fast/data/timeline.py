"""When a video's frames are shown, from its packets alone: so that a frame keeps its number though it cannot be decoded.

A packet is a compressed frame. It knows when the frame is shown (its time stamp), so the packets in the order of their time
stamps are the frames, and a frame that the decoder does not give is one of them. Where packets themselves are lost, as in a
damaged transport stream, the gap in an otherwise regular rhythm tells how many.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

LONGEST_GAP = 10  # seconds; a longer one is a jump of the clock, not lost frames
LOSSY = {"mpegts", "mpeg"}  # containers without an index: what is lost leaves no trace but the gap


@dataclass
class Timeline:
    """The frames of a video, in the order in which they are shown."""

    stamps: np.ndarray  # int64 [n]: time stamps in units of time_base; of lost packets, where they would be
    time_base: Fraction
    timed: bool  # False: the container has no usable time stamps, and stamps count frames
    times: np.ndarray  # int64 [n]: stamps that only grow, jumps of the clock taken out
    regular: bool  # one frame rate
    lost: set[int] = field(default_factory=set)  # frames without a packet
    corrupt: set[int] = field(default_factory=set)  # frames whose packet is marked as damaged
    jumps: list[tuple[int, float]] = field(default_factory=list)  # frames after which the clock jumps, and by how many seconds
    before: int = 0  # packets before the first frame, which cannot be decoded without what the recording does not have
    pauses: list[int] = field(default_factory=list)  # frames of a regular video that stay for longer than one frame
    cut: tuple[float, float | None] | None = None  # where the file stops early: seconds there are, and promised ones if known
    keys: list[int] = field(default_factory=list)  # frames that decoding can start from, where numbers are sure; else empty

    def key_before(self, index: int) -> int:
        """The last frame up to this one that decoding can start from."""
        place = bisect_right(self.keys, index)
        return self.keys[place - 1] if place else 0

    def drop_first(self, count: int) -> None:
        """Forget the first frames: the recording starts between two key frames."""
        self.before += count
        self.stamps, self.times = self.stamps[count:], self.times[count:]
        self.lost, self.corrupt = (
            {index - count for index in frames if index >= count} for frames in (self.lost, self.corrupt)
        )
        self.jumps = [(index - count, seconds) for index, seconds in self.jumps if index >= count]
        self.pauses = [index - count for index in self.pauses if index >= count]
        self.keys = [index - count for index in self.keys if index >= count]


def read_timeline(container, stream) -> Timeline:
    """Walk through the packets of an opened video; nothing is decoded."""
    from av import FFmpegError

    stamps, decoded, corrupt, keys, end, whole = [], [], [], [], 0, True
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard or _hidden(packet, stream):
                continue
            stamps.append(packet.pts)
            decoded.append(packet.dts)
            corrupt.append(packet.is_corrupt)
            if packet.is_keyframe:
                keys.append(packet.pts)
            end = max(end, (packet.pts or 0) + (packet.duration or 0))
    except FFmpegError:  # the rest of the file cannot be read
        whole = False
    if not stamps or None in stamps:
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        step = np.arange(len(stamps), dtype=np.int64)
        timeline = Timeline(step, 1 / rate, False, step, True, corrupt=set(np.flatnonzero(corrupt).tolist()))
    elif container.format.name == "avi":  # its time stamps follow the order of decoding
        timeline = _by_stamps(np.sort(np.array(stamps, np.int64)), [], np.array(corrupt), stream.time_base)
        timeline.timed = False
    else:
        timeline = _by_stamps(np.array(stamps, np.int64), decoded, np.array(corrupt), stream.time_base)
        if not whole or container.format.name not in LOSSY:
            timeline.cut = _cut(container, stream, timeline, end * stream.time_base, whole)
        if container.format.name in LOSSY or timeline.corrupt or timeline.cut:
            _fill(timeline)
        if container.format.name not in LOSSY and not (timeline.corrupt or timeline.jumps):
            timeline.keys = np.searchsorted(timeline.stamps, sorted(keys)).tolist()
    return timeline


def _hidden(packet, stream) -> bool:
    """VP8's frames that are only referred to, never shown."""
    return stream.codec_context.name == "vp8" and not bytes(packet)[0] >> 4 & 1


def _by_stamps(stamps: np.ndarray, decoded: list, corrupt: np.ndarray, unit: Fraction) -> Timeline:
    pieces = np.split(np.arange(len(stamps)), _restarts(stamps, decoded, unit))
    order = np.concatenate([piece[np.argsort(stamps[piece], kind="stable")] for piece in pieces])
    stamps, corrupt = stamps[order], corrupt[order]
    steps = np.diff(stamps)
    jump = (steps * float(unit) > LONGEST_GAP) | (steps < 0)
    usual = max(1, int(np.median(steps[~jump]))) if (~jump).any() else 1
    times = stamps[0] + np.concatenate([[0], np.where(jump, usual, steps).cumsum()])
    regular = bool(np.mean(np.abs(steps[~jump] - usual) <= 0.25 * usual) >= 2 / 3) if (~jump).any() else True
    timeline = Timeline(stamps, unit, True, times.astype(np.int64), regular and _multiples(steps[~jump], usual))
    timeline.corrupt = set(np.flatnonzero(corrupt).tolist())
    timeline.jumps = [(index, float(steps[index] * unit)) for index in np.flatnonzero(jump).tolist()]
    if timeline.regular:
        timeline.pauses = np.flatnonzero(~jump & (steps > 1.5 * usual)).tolist()
    return timeline


def _restarts(stamps: np.ndarray, decoded: list, unit: Fraction) -> list[int]:
    """Packets before which the clock goes back."""
    if not decoded:
        return []
    known = np.array([index for index, time in enumerate(decoded) if time is not None], np.int64)
    if len(known) < len(decoded) / 2:  # order alone: back by more than what follows from the order of decoding
        return (np.flatnonzero(np.diff(stamps) * float(unit) < -LONGEST_GAP) + 1).tolist()
    back = np.diff(np.array([decoded[index] for index in known], np.int64)) < 0
    return known[1:][back].tolist()


def _multiples(steps: np.ndarray, usual: int) -> bool:
    """Whether every step is a whole number of usual ones, one at least."""
    share = steps / usual
    return bool((np.abs(share - share.round()) <= 0.25).all() and (share.round() >= 1).all())


def _fill(timeline: Timeline) -> None:
    """Give numbers to the frames that should be in the pauses of a regular video: their packets are lost."""
    usual = float(np.median(np.diff(timeline.times))) if len(timeline.times) > 1 else 1.0
    before, ahead = [], []  # of each lost frame: the frame before the gap, and its distance from that
    for index in timeline.pauses:
        steps = range(1, round((timeline.times[index + 1] - timeline.times[index]) / usual))
        before += [index] * len(steps)
        ahead += [round(step * usual) for step in steps]
    if not before:
        return
    places = np.array(before) + 1
    for name in ("stamps", "times"):
        old = getattr(timeline, name)
        setattr(timeline, name, np.insert(old, places, old[places - 1] + ahead))
    timeline.lost, timeline.pauses = set((places + np.arange(len(places))).tolist()), []
    moved = [index + int(np.searchsorted(places, index, side="right")) for index in range(len(timeline.times) - len(places))]
    timeline.corrupt = {moved[index] for index in timeline.corrupt}
    timeline.jumps = [(moved[index], seconds) for index, seconds in timeline.jumps]


def _cut(container, stream, timeline: Timeline, end: Fraction, whole: bool) -> tuple[float, float | None] | None:
    """Seconds that are there and that the header promises, if the file stops before its end."""
    length = max(float(end), float((timeline.times[-1] - timeline.times[0]) * timeline.time_base))
    promised = None
    if stream.duration:
        promised = float(stream.duration * stream.time_base)
    elif container.duration and not container.streams.audio:  # sound may go on for longer
        promised = container.duration / 1e6
    if promised and promised - length > max(0.02, 0.01 * promised):
        return length, promised
    return None if whole else (length, None)

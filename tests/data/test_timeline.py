"""Damaged videos: every frame keeps its number, and what is wrong is said."""

from __future__ import annotations

import av
import numpy as np
import pytest
from helpers.videos import make_video, packets, pictures, shown, spoil

from dmm_fast.data.video import FramesError, open_frames


def numbers(frames, start=0):
    """Of each picture that is read the frame it shows, by its noise."""
    originals = np.stack(pictures()).astype(int)
    return {stem: int(np.abs(originals - image).mean((1, 2, 3)).argmin()) for stem, image in frames.read(start)}


def stems(count):
    return [f"{index:05d}" for index in range(count)]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
def test_an_intact_video_has_nothing_to_say(tmp_path, name):
    frames = open_frames(make_video(tmp_path / name))
    assert list(numbers(frames).values()) == list(range(12)) and frames.notes == [] and not frames.missing


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
@pytest.mark.parametrize("which", ["first", "key", "other", "last"])
def test_a_frame_that_cannot_be_decoded_keeps_its_number(tmp_path, name, which):
    path = make_video(tmp_path / name)
    found = packets(path)
    keys = [place for place, (*_, key) in enumerate(found) if key]
    packet = {"first": 0, "key": keys[1], "other": keys[1] + 1, "last": len(found) - 1}[which]
    lost = sorted(stamp for stamp, *_ in found).index(found[packet][0])
    spoil(path, packet)
    frames = open_frames(path)
    seen = numbers(frames)
    assert list(seen) == frames.stems == stems(12) and lost in frames.missing
    for number, shows in enumerate(seen.values()):
        if number not in frames.missing:
            assert shows == number or which == "key"  # what is predicted from a lost picture is damaged
    good = [number for number in range(12) if number not in frames.missing]
    assert seen[f"{lost:05d}"] == seen[f"{max((n for n in good if n < lost), default=good[0]):05d}"]
    (note,) = [note for note in frames.notes if "cannot be decoded" in note]
    assert f"{lost:05d}" in note or " to " in note
    again = open_frames(path)
    assert list(numbers(again, 7)) == stems(12)[7:] and again.missing == frames.missing


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_a_picture_from_damaged_data_is_named(tmp_path, name):
    path = make_video(tmp_path / name)
    spoil(path, 5, keep=24)
    frames = open_frames(path)
    assert list(numbers(frames)) == stems(12) and not frames.missing and len(frames.damaged) == 1
    (number,) = frames.damaged
    assert f"frame {number:05d}: the data is damaged, the picture may be" in frames.notes[0]


def test_packets_that_a_transport_stream_has_lost_leave_numbered_gaps(tmp_path):
    path = make_video(tmp_path / "clip.ts")
    content = path.read_bytes()
    parts = [content[at : at + 188] for at in range(0, len(content), 188)]
    begin = next(at for at, part in enumerate(parts) if at > len(parts) // 2 and part[1] & 0x40 and _is_video(part))
    end = next(at for at in range(begin + 1, len(parts)) if parts[at][1] & 0x40 and _is_video(parts[at]))
    path.write_bytes(b"".join(parts[:begin] + parts[end:]))
    frames = open_frames(path)
    seen = numbers(frames)
    assert list(seen) == stems(12) and len(packets(path)) == 11
    (lost,) = frames.timeline.lost
    assert lost in frames.missing and f"{lost:05d}" in frames.notes[0]
    assert np.diff(frames.timeline.times).tolist() == [7500] * 11
    assert [seen[f"{n:05d}"] for n in range(lost)] == list(range(lost))


def _is_video(part: bytes) -> bool:
    return ((part[1] & 0x1F) << 8 | part[2]) == 0x100


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_video_that_is_cut_says_so(tmp_path, name):
    path = make_video(tmp_path / name, options={"movflags": "faststart"} if name.endswith("mp4") else None)
    place = packets(path)[8][1]
    path.write_bytes(path.read_bytes()[: place + 50])
    frames = open_frames(path)
    read = list(numbers(frames))
    assert read == frames.stems and 7 <= len(read) < 12
    assert any("ends early" in note and "its header promises 1.00 s" in note for note in frames.notes)


def test_an_mp4_without_its_index_says_what_it_lacks(tmp_path):
    path = make_video(tmp_path / "clip.mp4")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(
        FramesError, match="lacks its index, which is written last: was the recording or the download cut short"
    ):
        open_frames(path)


def test_a_video_of_which_nothing_can_be_decoded(tmp_path):
    path = make_video(tmp_path / "clip.mp4")
    for packet in range(12):
        spoil(path, packet)
    with pytest.raises(FramesError, match="none of its 12 frames can be decoded"):
        open_frames(path)


def test_a_jump_of_the_clock_makes_no_frames(tmp_path):
    path = make_video(tmp_path / "clip.ts", [7500 * index + (90000 * 3600 if index > 5 else 0) for index in range(12)])
    frames = open_frames(path)
    assert list(numbers(frames).values()) == list(range(12)) and not frames.missing
    assert any("the clock jumps by 3600" in note and "00005" in note for note in frames.notes)
    assert np.diff(frames.timeline.times).tolist() == [7500] * 11


def test_two_recordings_in_one_file_are_numbered_on(tmp_path):
    once = make_video(tmp_path / "once.ts").read_bytes()
    (tmp_path / "twice.ts").write_bytes(once + once)
    frames = open_frames(tmp_path / "twice.ts")
    assert list(numbers(frames)) == stems(24) == frames.stems and not frames.missing
    assert (np.diff(frames.timeline.times) > 0).all() and any("the clock jumps" in note for note in frames.notes)


def test_a_recording_that_starts_between_two_key_frames(tmp_path):
    path = make_video(tmp_path / "clip.ts", gop=6)
    content = path.read_bytes()
    parts = [content[at : at + 188] for at in range(0, len(content), 188)]
    start = next(at for at in range(4, len(parts)) if parts[at][1] & 0x40 and _is_video(parts[at]))
    path.write_bytes(b"".join(parts[:3] + parts[start:]))
    frames = open_frames(path)
    assert list(numbers(frames)) == frames.stems and 0 < len(frames) < 12
    assert any("starts between two key frames" in note for note in frames.notes)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_variable_rate_is_no_damage(tmp_path, name):
    times = [0, 3000, 6000, 18000, 21000, 40000, 47500, 50000, 60000, 75000, 80000, 90000]
    frames = open_frames(make_video(tmp_path / name, times))
    assert list(numbers(frames).values()) == list(range(12)) and not frames.timeline.regular and frames.notes == []
    assert shown(tmp_path / name) == pytest.approx([time / 90000 for time in times], abs=1e-3)


def test_a_pause_is_told_but_not_filled(tmp_path):
    """A telephone that drops a frame in the dark: nothing is lost from the file."""
    frames = open_frames(make_video(tmp_path / "clip.mp4", [7500 * index + 7500 * (index > 4) for index in range(12)]))
    assert list(numbers(frames).values()) == list(range(12))
    (note,) = frames.notes
    assert "longer than the other frames: frame 00004" in note


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_hidden_frames_are_not_counted(tmp_path, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    frames = open_frames(make_video(tmp_path / "clip.webm", codec=codec))
    assert list(numbers(frames)) == frames.stems == stems(12) and frames.notes == []

"""Frames in and video out, on files written here and on real clips."""

from __future__ import annotations

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from helpers.videos import make_video, seconds_of_sound, shown
from PIL import Image

from dmm_fast.data.video import Behind, FramesError, VideoWriter, alpha_suffix, natural_key, open_frames, prefetch, read_image


def save(path, value=0, size=(6, 8)):
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def moving_square(count=12, size=(48, 64)):
    for index in range(count):
        frame = np.full((*size, 3), 40, np.uint8)
        frame[10:30, 2 * index : 2 * index + 20] = (200, 60, 30)
        yield frame


def write_video(path, **options):
    frames = list(moving_square(**options))
    with VideoWriter(path, frames[0].shape[:2], fps=12.5) as writer:
        for frame in frames:
            writer.write(frame)
    return frames


def test_directory_in_natural_order_with_mixed_formats(tmp_path):
    for index, name in enumerate(["frame2.jpg", "frame10.png", "frame1.bmp", "frame3.webp"]):
        save(tmp_path / name, value=50 * index)
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "._frame2.jpg").write_text("what a file manager leaves behind")
    frames = open_frames(tmp_path)
    assert frames.stems == ["frame1", "frame2", "frame3", "frame10"]
    assert (frames.size, len(frames), frames.fps) == ((6, 8), 4, None)
    means = [frame.mean() for _, frame in frames.read()]
    assert means == pytest.approx([100, 0, 150, 50], abs=2)
    assert [stem for stem, _ in frames.read(start=2)] == ["frame3", "frame10"]
    assert [(index, stem) for index, stem, _ in frames.pick({3, 0})] == [(0, "frame1"), (3, "frame10")]


def test_turned_photographs_are_read_upright(tmp_path):
    image = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "0.png", exif=exif)
    frames = open_frames(tmp_path)
    ((_, frame),) = frames.read()
    assert frames.size == frame.shape[:2] == (8, 6)
    assert (frame == np.rot90(np.array(image), -1)).all()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no images"),
        ({"0.png": (6, 8), "1.png": (6, 9)}, r"1\.png: is 9x6, the first frame is 8x6"),
        ({"0.png": (6, 8), "0.jpg": (6, 8)}, "same frame twice"),
        ({"0.png": None}, "cannot be read as an image"),
    ],
)
def test_bad_directories(tmp_path, files, message):
    for name, size in files.items():
        save(tmp_path / name, size=size) if size else (tmp_path / name).write_bytes(b"\x89PNG torn")
    with pytest.raises(FramesError, match=message):
        open_frames(tmp_path)


def test_sixteen_bits_of_grey_keep_their_range(tmp_path):
    grey = np.arange(6 * 8, dtype=np.uint16).reshape(6, 8) * 1300
    for name in ("0.png", "0.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        assert (read_image(tmp_path / name) == (grey >> 8)[:, :, None]).all()
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "1.tif")
    with pytest.raises(FramesError, match="1.tif: has grey values of 32 bits"):
        read_image(tmp_path / "1.tif")


def test_a_torn_image_is_named(tmp_path):
    save(tmp_path / "0.png", size=(60, 80))
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:-30])
    with pytest.raises(FramesError, match=r"1\.png: cannot be read"):
        list(open_frames(tmp_path).read())


def test_video_round_trip(tmp_path):
    written = write_video(tmp_path / "clip.mp4")
    frames = open_frames(tmp_path / "clip.mp4")
    assert (frames.size, len(frames), frames.fps) == ((48, 64), 12, 12.5)
    assert frames.stems == [f"{index:05d}" for index in range(12)]
    read = list(frames.read())
    assert [stem for stem, _ in read] == frames.stems
    for (_, frame), original in zip(read, written):
        assert np.abs(frame.astype(int) - original).mean() < 6
    rest = list(frames.read(start=9))
    assert [stem for stem, _ in rest] == frames.stems[9:]
    assert all((a == b).all() for (_, a), (_, b) in zip(rest, read[9:]))


@pytest.mark.parametrize("name", ["clip.mkv", "clip.avi", "clip.mov"])
def test_other_containers_know_their_length(tmp_path, name):
    write_video(tmp_path / name)
    frames = open_frames(tmp_path / name)
    assert len(frames) == len(list(frames.read())) == 12
    assert [(index, stem) for index, stem, _ in frames.pick({7, 2})] == [(2, "00002"), (7, "00007")]


def turned(source, target):
    """The same with a display matrix that says: turn a quarter clockwise."""
    content = bytearray(source.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    target.write_bytes(content)
    return target


def test_telephone_videos_are_read_upright(tmp_path):
    """A file whose display matrix says: turn a quarter clockwise."""
    write_video(tmp_path / "clip.mp4", count=2)
    (_, lying), *_ = open_frames(tmp_path / "clip.mp4").read()
    frames = open_frames(turned(tmp_path / "clip.mp4", tmp_path / "turned.mp4"))
    (_, upright), *_ = frames.read()
    assert frames.size == upright.shape[:2] == (64, 48)
    assert (upright == np.rot90(lying, -1)).all()


def test_odd_sizes_are_padded_not_cropped(tmp_path):
    write_video(tmp_path / "odd.mp4", size=(47, 63), count=2)
    assert open_frames(tmp_path / "odd.mp4").size == (48, 64)


def test_video_writer_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="frame must be uint8"), VideoWriter(tmp_path / "clip.mp4", (48, 64)) as writer:
        writer.write(np.zeros((48, 65, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FramesError, match="must end in .mp4"):
        VideoWriter(tmp_path / "clip.nonsense", (48, 64))
    with pytest.raises(FramesError, match="there is no directory"):
        VideoWriter(tmp_path / "nowhere/clip.mp4", (48, 64))


@pytest.mark.parametrize("content, message", [(b"", "nor a video"), (b"just text\n" * 50, "nor a video")])
def test_files_that_are_no_video(tmp_path, content, message):
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(FramesError, match=message):
        open_frames(tmp_path / "clip.mp4")


def test_a_folder_of_folders_is_answered_with_a_hint(tmp_path):
    (tmp_path / "JPEGImages/clip").mkdir(parents=True)
    with pytest.raises(FramesError, match="no images .* did you mean .*JPEGImages/clip"):
        open_frames(tmp_path / "JPEGImages")


def test_missing_path(tmp_path):
    with pytest.raises(FramesError, match="no such directory or video file"):
        open_frames(tmp_path / "nowhere")


def test_a_cut_video_is_a_shorter_clip_or_a_named_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "clip.mkv", (96, 128)) as writer:
        for frame in noise:
            writer.write(frame)
    content = (tmp_path / "clip.mkv").read_bytes()
    (tmp_path / "clip.mkv").write_bytes(content[: len(content) * 2 // 3])
    frames = open_frames(tmp_path / "clip.mkv")
    try:
        count = sum(1 for _ in frames.read())
    except FramesError as error:
        assert "damaged at frame" in str(error)
    else:
        assert 0 < count < 12


def test_prefetch_keeps_order_and_errors():
    assert list(prefetch(range(5))) == [0, 1, 2, 3, 4]

    def breaks():
        yield 1
        raise FramesError("broken")

    items = prefetch(breaks())
    assert next(items) == 1
    with pytest.raises(FramesError, match="broken"):
        next(items)


def test_natural_order():
    assert sorted(["10", "9", "a2", "a10", "1b", "1"], key=natural_key) == ["1", "1b", "9", "10", "a2", "a10"]


def test_real_clip(data):
    frames = open_frames(data / "clips/JPEGImages/puma-chair")
    assert (frames.size, len(frames)) == ((480, 720), 60)
    stem, frame = next(frames.read(start=59))
    assert stem == "frame_000059" and frame.shape == (480, 720, 3) and frame.dtype == np.uint8


def test_what_runs_behind_keeps_its_order_and_tells_its_errors():
    seen = []
    with Behind(2) as behind:
        for number in range(20):
            behind(seen.append, number)
        behind.wait()
        assert seen == list(range(20))
        behind(seen.append, 20)
    assert seen[-1] == 20
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), Behind() as behind:
        behind(lambda: 1 / 0)
        behind.wait()
    with pytest.raises(KeyError), Behind() as behind:  # what went wrong before is not hidden
        behind(lambda: 1 / 0)
        raise KeyError


# ------------------------------------------------------------------------------------------------- videos like others

UNEVEN = [0, 3000, 6000, 18000, 21000, 40000, 47500, 50000, 60000, 75000, 80000, 90000]


def copied(source, target, alpha=False):
    """A video with the frames of another, as an overlay is written; what the writer had to note."""
    frames = open_frames(source)
    with VideoWriter(target, frames.size, like=frames, alpha=alpha) as writer:
        for _, frame in frames.read():
            writer.write(np.concatenate([frame, frame[..., :1]], 2) if alpha else frame)
    return writer.notes


@pytest.mark.parametrize("name", ["copy.mp4", "copy.mkv", "copy.mov"])
@pytest.mark.parametrize("times", [None, UNEVEN])
def test_frame_times_are_kept(tmp_path, name, times):
    source = make_video(tmp_path / "clip.mp4", times)
    assert copied(source, tmp_path / name) == []
    assert shown(tmp_path / name) == pytest.approx(shown(source), abs=1e-3)


@pytest.mark.parametrize("name, alpha", [("o.mp4", False), ("o.mov", True), ("o.webm", True)])
@pytest.mark.parametrize("matrix", [None, 1, 9])
def test_colours_mean_what_they_did(tmp_path, matrix, name, alpha):
    """The Y, Cb and Cr of a video that is written are those of the video it was read from, and said to be of the same kind."""
    import av

    source = open_frames(make_video(tmp_path / "clip.mp4", matrix=matrix))
    frames = [frame for _, frame in source.read()]
    with VideoWriter(tmp_path / name, source.size, like=source, alpha=alpha) as writer:
        for frame in frames:
            writer.write(np.concatenate([frame, np.full((*frame.shape[:2], 1), 255, np.uint8)], 2) if alpha else frame)
    found = []
    for path in (tmp_path / "clip.mp4", tmp_path / name):
        with av.open(str(path)) as container:
            picture = next(container.decode(video=0))
            found.append((picture.colorspace, *(p[14:26, 4:16].mean() for p in picture.to_ndarray(format="yuv444p"))))
    said = matrix or (6 if name == "o.mov" else 2)  # ProRes says BT.601 where nothing was said, and so it was read
    assert found[0][0] == (matrix or 2) and found[1][0] == said and np.allclose(found[0][1:], found[1][1:], atol=3)


@pytest.mark.parametrize("rows, matrix", [(720, 1), (718, 6)])
def test_colours_of_pictures_are_those_that_players_expect(tmp_path, rows, matrix):
    import av

    with VideoWriter(tmp_path / "o.mp4", (rows, 64)) as writer:
        writer.write(np.full((rows, 64, 3), (199, 39, 40), np.uint8))
    with av.open(str(tmp_path / "o.mp4")) as container:
        picture = next(container.decode(video=0))
    assert picture.colorspace == matrix and np.abs(picture.to_ndarray(format="rgb24")[9, 9] - [199.0, 39, 40]).max() <= 3


def test_one_frame_costs_what_lies_before_it_to_its_key_frame(tmp_path, monkeypatch):
    frames = open_frames(make_video(tmp_path / "clip.mp4"))
    turned, decoded = [], []
    upright, shown = frames.upright, frames.shown
    monkeypatch.setattr(frames, "upright", lambda picture, number: turned.append(number) or upright(picture, number))
    monkeypatch.setattr(frames, "shown", lambda *where, **how: (decoded.append(one[0]) or one for one in shown(*where, **how)))
    want = [frame for _, frame in frames.read()]
    turned.clear(), decoded.clear()
    (picked,) = frames.pick([9])
    assert picked[:2] == (9, "00009") and (picked[2] == want[9]).all() and turned == decoded == [9]


def test_an_avi_holds_one_rate_only(tmp_path):
    make_video(tmp_path / "even.mp4")
    copied(tmp_path / "even.mp4", tmp_path / "even.avi")
    assert open_frames(tmp_path / "even.avi").fps == pytest.approx(12)
    make_video(tmp_path / "uneven.mp4", UNEVEN)
    with pytest.raises(FramesError, match="an .avi holds one frame rate, uneven.mp4 has several; choose .mp4"):
        copied(tmp_path / "uneven.mp4", tmp_path / "uneven.avi")
    assert not list(tmp_path.glob("uneven*.avi"))


def test_recordings_that_begin_late_begin_at_once(tmp_path):
    make_video(tmp_path / "clip.ts", [90000 * 50 + 7500 * index for index in range(12)])
    copied(tmp_path / "clip.ts", tmp_path / "copy.mp4")
    assert shown(tmp_path / "copy.mp4") == pytest.approx([index / 12 for index in range(12)], abs=1e-3)


@pytest.mark.parametrize("alpha, name", [(False, "copy.mp4"), (False, "copy.mkv"), (True, "copy.mov"), (True, "copy.webm")])
def test_pixels_that_are_not_square_are_kept(tmp_path, alpha, name):
    copied(make_video(tmp_path / "clip.mp4", aspect=Fraction(4, 3)), tmp_path / name, alpha)
    frames = open_frames(tmp_path / name)
    assert (frames.size, frames.aspect) == (((48, 86), 1) if name.endswith("webm") else ((48, 64), Fraction(4, 3)))


def test_a_turned_video_with_flat_pixels_has_tall_ones(tmp_path):
    source = turned(make_video(tmp_path / "clip.mp4", aspect=Fraction(4, 3)), tmp_path / "turned.mp4")
    copied(source, tmp_path / "copy.mp4")
    for path in (source, tmp_path / "copy.mp4"):
        frames = open_frames(path)
        assert (frames.size, frames.aspect) == ((64, 48), Fraction(3, 4)), path


@pytest.mark.parametrize(
    "sound, source, target, codec",
    [
        ("aac", "clip.mp4", "copy.mp4", "aac"),
        ("aac", "clip.ts", "copy.mp4", "aac"),
        ("aac", "clip.mp4", "copy.mkv", "aac"),
        ("libopus", "clip.mkv", "copy.mp4", "opus"),
        ("libopus", "clip.mkv", "copy.mov", "aac"),
        ("pcm_s16le", "clip.mov", "copy.mp4", "aac"),
        ("flac", "clip.mkv", "copy.mov", "aac"),
    ],
)
def test_the_sound_is_kept(tmp_path, sound, source, target, codec):
    """Copied where the container holds it, else transcoded, and said so."""
    notes = copied(make_video(tmp_path / source, UNEVEN, sound=sound), tmp_path / target)
    assert notes == (
        [] if codec in sound else [f".{target[-3:]} cannot hold sound as {sound.removeprefix('lib')}: transcoded to aac"]
    )
    found, seconds = seconds_of_sound(tmp_path / target)
    assert found == codec and seconds == pytest.approx(1, abs=0.05)
    steps = np.diff(shown(tmp_path / target))
    assert steps == pytest.approx(np.diff(UNEVEN) / 90000, abs=2e-3)


@pytest.mark.parametrize("name", ["copy.mov", "copy.webm"])
def test_alpha_videos(tmp_path, name):
    """ProRes 4444 and VP9, with the sound and the alpha that was written."""
    source = make_video(tmp_path / "clip.mp4", UNEVEN, sound="aac")
    notes = copied(source, tmp_path / name, alpha=True)
    assert notes == ([] if name.endswith("mov") else [".webm cannot hold sound as aac: transcoded to opus"])
    assert seconds_of_sound(tmp_path / name)[1] == pytest.approx(1, abs=0.05)
    assert shown(tmp_path / name) == pytest.approx(shown(source), abs=2e-3)
    red = np.stack([frame[..., 0] for _, frame in open_frames(source).read()]).astype(int)
    assert np.abs(decoded_alpha(tmp_path / name) - red).mean() < 12


def decoded_alpha(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if stream.codec_context.name == "vp9":  # FFmpeg's own decoder leaves the alpha out
            codec = av.CodecContext.create("libvpx-vp9", "r")
            frames = [f for packet in container.demux(stream) for f in codec.decode(packet if packet.size else None)]
        else:
            frames = list(container.decode(stream))
        return np.stack([frame.to_ndarray(format="rgba")[..., 3] for frame in frames]).astype(int)


def test_alpha_needs_an_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"libx264"})
    with pytest.raises(
        FramesError, match=r"no encoder prores_ks, which a \.mov with alpha needs; encoders with alpha here: none"
    ):
        VideoWriter(tmp_path / "clip.mov", (48, 64), alpha=True)
    assert alpha_suffix() is None
    with pytest.raises(FramesError, match=r"with alpha must end in \.mov, \.webm"):
        VideoWriter(tmp_path / "clip.mp4", (48, 64), alpha=True)

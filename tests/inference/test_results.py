"""What a run leaves beside its masks: the same whether it was killed or not, and what other tools expect."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from helpers.videos import make_video, packets, pictures, seconds_of_sound, shown, spoil
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from pycocotools.coco import COCO

from dmm_fast.commands.main import main
from dmm_fast.data.masks import read_ids, write_mask
from dmm_fast.data.video import open_frames
from dmm_fast.inference import results as module
from dmm_fast.inference import run
from dmm_fast.inference.folder import RunError
from dmm_fast.inference.run import segment
from dmm_fast.proposals.coco import read_coco

EVERY = ("masks", "binary", "cutout", "alpha-video", "tracks")
UNEVEN = [0, 3000, 6000, 18000, 21000, 40000, 47500, 50000, 60000, 75000, 80000, 90000]
SIZE = (48, 64)


def masks_at(index):
    """The moving square, and an object that stands still."""
    ids = np.zeros(SIZE, np.uint8)
    ids[34:44, 4:16] = 7
    ids[10:30, 2 * index : 2 * index + 20] = 2
    return ids


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A video with uneven times, flat pixels and sound, its first masks, and proposals."""
    folder = tmp_path_factory.mktemp("clip")
    make_video(folder / "clip.mp4", UNEVEN, aspect=Fraction(4, 3), sound="aac")
    write_mask(folder / "first.png", masks_at(0))
    save_proposals(folder / "p.json")
    return folder


def save_proposals(path, first=0):
    found = []
    for index in range(12):
        for label, score in ((2, 0.9), (7, 0.8)):
            code = coco.encode(np.asfortranarray((masks_at(index) == label).astype(np.uint8)))
            segmentation = {"size": list(SIZE), "counts": code["counts"].decode()}
            found.append({"image_id": index + first, "score": score, "segmentation": segmentation})
    path.write_text(json.dumps(found))


def options(clip, out, **more):
    return {"frames": clip / "clip.mp4", "masks": clip / "first.png", "out": out, "proposals": clip / "p.json",
            "preset": "iou", **more}  # fmt: skip


def digests(out):
    """Every file of a run but the report, which has times in it, and the H.264 video: its encoder does not repeat itself to the bit."""
    files = [file for file in out.rglob("*") if file.is_file() and file.name not in ("report.json", "overlay.mp4")]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def same_video(one, other):
    """The same times, sound and, within what the encoder loses of these noisy ones, pictures; neighbours differ by 25."""
    assert shown(one) == shown(other) and seconds_of_sound(one) == seconds_of_sound(other)
    pairs = list(zip(open_frames(one).read(), open_frames(other).read(), strict=True))
    return all(np.abs(a.astype(int) - b).mean() < 8 for (_, a), (_, b) in pairs)


@pytest.fixture(scope="module")
def finished(clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    segment(**options(clip, out, save=EVERY, video=out / "overlay.mp4"))
    return out


def test_binary_masks_and_cutouts(clip, finished):
    for index, (stem, frame) in enumerate(open_frames(clip / "clip.mp4").read()):
        ids = read_ids(finished / f"{stem}.png")
        assert (ids == masks_at(index)).all()
        for label in (2, 7):
            image = Image.open(finished / f"binary/{label}/{stem}.png")
            assert image.mode == "L" and (np.asarray(image) == (ids == label) * 255).all()
        cut = Image.open(finished / f"cutout/{stem}.png")
        assert cut.mode == "RGBA" and (np.asarray(cut)[..., 3] == (ids > 0) * 255).all()
        assert (np.asarray(cut)[..., :3] == frame * (ids > 0)[..., None]).all()
    assert {path.name for path in (finished / "binary").iterdir()} == {"2", "7"}


@pytest.mark.parametrize("name", ["overlay.mp4", "alpha.mov"])
def test_videos_keep_times_pixels_and_sound(clip, finished, name):
    assert shown(finished / name) == pytest.approx(shown(clip / "clip.mp4"), abs=1e-3)
    frames = open_frames(finished / name)
    assert (frames.size, frames.aspect) == (SIZE, Fraction(4, 3))
    assert seconds_of_sound(finished / name)[1] == pytest.approx(1, abs=0.05)


def test_tracks_are_read_by_coco_and_by_ourselves(clip, finished, capsys):
    tracks = COCO(str(finished / "tracks.json"))
    assert len(tracks.getImgIds()) == 12 and len(tracks.getAnnIds()) == 24
    for annotation in tracks.loadAnns(tracks.getAnnIds()):
        image = tracks.loadImgs(annotation["image_id"])[0]
        mask = masks_at(image["frame_index"]) == annotation["track_id"]
        assert (tracks.annToMask(annotation) == mask).all() and annotation["area"] == mask.sum()
        y, x = mask.nonzero()
        assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert image["file_name"] == f"{image['frame_index']:05d}.png" and image["width"] == 64 and annotation["score"] <= 1
    again = read_coco(finished / "tracks.json")  # as proposals
    stems = [f"{index:05d}" for index in range(12)]
    assert again.align(stems) == []
    masks = again.frame("00003", SIZE).masks.numpy()
    assert sorted(mask.tobytes() for mask in masks) == sorted((masks_at(3) == label).tobytes() for label in (2, 7))


def test_tracks_in_the_format_of_youtube_vis(finished):
    content = json.loads((finished / "tracks-youtube-vis.json").read_text())
    (video,) = content["videos"]
    assert (video["length"], video["height"], video["width"], len(video["file_names"])) == (12, *SIZE, 12)
    assert [category["id"] for category in content["categories"]] == [1]
    assert [annotation["id"] for annotation in content["annotations"]] == [2, 7]
    for annotation in content["annotations"]:
        assert len(annotation["segmentations"]) == len(annotation["bboxes"]) == len(annotation["areas"]) == 12
        for index, (code, area) in enumerate(zip(annotation["segmentations"], annotation["areas"])):
            mask = masks_at(index) == annotation["id"]
            assert (coco.decode(code) == mask).all() and area == mask.sum()


@pytest.mark.parametrize(
    "width, lost, remark",
    [
        (1600, [2], "lost object 2"),
        (1600, [2, 7], "lost objects 2, 7"),
        (1600, [], "one mask for objects 2, 7"),
        (800, [2, 7], "lost 2, 7"),  # no room for the longer one
    ],
)
def test_the_contact_sheet_says_which_objects_are_lost(clip, tmp_path, monkeypatch, width, lost, remark):
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, *rest, **more: written.append(text))
    monkeypatch.setattr(module, "ContactSheet", partial(module.ContactSheet, width=width))
    objects = [{"id": label, "lost": label in lost, "proposal": None if label in lost else 0} for label in (2, 7)]
    report = {"objects": {"2": {}, "7": {}}, "frames": [{"frame": f"{index:05d}", "objects": objects} for index in range(12)]}
    sheet = module.Sheet(open_frames(clip / "clip.mp4"), tmp_path, report)
    sheet.add(0, pictures()[0], masks_at(0), report["frames"][0])
    assert written[-2:] == ["00000", remark]


def test_an_object_that_is_not_there_yet_has_no_track(clip, tmp_path):
    write_mask(tmp_path / "00004.png", masks_at(4))
    report = segment(**options(clip, tmp_path / "out", masks=tmp_path, direction="forward", save=["tracks", "binary"]))
    content = json.loads((tmp_path / "out/tracks-youtube-vis.json").read_text())
    for annotation in content["annotations"]:
        assert annotation["segmentations"][:4] == annotation["bboxes"][:4] == annotation["areas"][:4] == [None] * 4
        assert None not in annotation["segmentations"][4:]
    assert not np.asarray(Image.open(tmp_path / "out/binary/7/00003.png")).any()
    assert any("frames 00000 to 00003 (4 frames) lie before the first mask" in note for note in report["notes"])


KILLED = """
import os, signal, sys
from dmm_fast.inference import passes, results, run
where, number, *paths = sys.argv[1:]
owner, name = {"frame": (passes, "write_mask"), "result": (results.Tracks, "add"), "end": (results.Cutout, "__exit__")}[where]
original, calls = getattr(owner, name), []
def dies(*arguments):
    calls.append(1)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)
setattr(owner, name, dies)
frames, masks, proposals, out = paths
run.segment(frames, masks, out, proposals=proposals, preset="iou", save_every=0,
            save=["binary", "cutout", "alpha-video", "tracks"], video=out + "/overlay.mp4")
"""


@pytest.mark.parametrize("where, number", [("frame", 6), ("result", 7), ("end", 1)])
def test_a_killed_run_that_resumes_leaves_the_same_files(clip, finished, tmp_path, where, number):
    out = tmp_path / "out"
    paths = [clip / "clip.mp4", clip / "first.png", clip / "p.json", out]
    assert subprocess.run([sys.executable, "-c", KILLED, where, str(number), *map(str, paths)]).returncode == -9
    segment(**options(clip, out, save=EVERY, video=out / "overlay.mp4", resume=True))
    assert digests(out) == digests(finished) and same_video(out / "overlay.mp4", finished / "overlay.mp4")


def test_a_finished_run_can_be_asked_for_more(clip, finished, tmp_path):
    out = tmp_path / "out"
    segment(**options(clip, out))
    assert not (out / "binary").exists()
    report = segment(**options(clip, out, save=["binary", "tracks"], resume=True))
    assert report["results"] == ["binary", "tracks"] == json.loads((out / "report.json").read_text())["results"]
    ours = digests(out)
    assert {name: digests(finished)[name] for name in ours} == ours


def test_results_of_a_folder_of_images(clip, finished, tmp_path):
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(pictures()):
        Image.fromarray(frame).save(tmp_path / f"frames/{index:05d}.jpg")
    out = tmp_path / "out"
    segment(**options(clip, out, frames=tmp_path / "frames", save=EVERY, video=tmp_path / "o.mp4"))
    names = [image["file_name"] for image in json.loads((out / "tracks.json").read_text())["images"]]
    assert names == [f"{index:05d}.jpg" for index in range(12)]
    assert len(open_frames(out / "alpha.mov")) == len(open_frames(tmp_path / "o.mp4")) == 12


def test_overwriting_leaves_nothing_of_the_run_before(clip, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (tmp_path / "frames").mkdir()
    for index in range(3):
        Image.fromarray(pictures()[index]).save(tmp_path / f"frames/{index:05d}.png")
    with pytest.raises(RunError, match=rf"holds a finished run \({clip}/clip.mp4, 12 frames\); --overwrite replaces it"):
        segment(**options(clip, out, frames=tmp_path / "frames"))
    segment(**options(clip, out, frames=tmp_path / "frames", overwrite=True))
    assert {path.name for path in out.iterdir()} == {
        "00000.png", "00001.png", "00002.png", "contact-sheet.png", "report.json", "overlay.mp4",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["other.png", "tracks.json", "binary/1/00000.png", "report.json", "unfinished/notes.txt"])
def test_the_results_of_others_are_told_before_anything_is_computed(clip, tmp_path, monkeypatch, name):
    monkeypatch.setattr("dmm_fast.inference.run.Segmenter", None)
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(RunError, match=rf"out: holds a?.*{name.split('/')[0]}.*no run has written; choose another --out"):
            segment(**options(clip, tmp_path / "out", overwrite=overwrite))
    assert file.read_text() == "{}"


def test_a_recording_of_a_run_that_did_not_end_is_kept(clip, tmp_path):
    """A stream's has no checkpoint."""
    out = tmp_path / "out"
    (out / "unfinished").mkdir(parents=True)
    (out / "unfinished/settings.json").write_text("{}")
    (out / "recording").mkdir()
    (out / "recording/000000.jpg").write_text("")
    with pytest.raises(RunError, match="holds the recording of a run that did not end; --overwrite replaces it"):
        segment(**options(clip, out))
    assert (out / "recording/000000.jpg").exists()
    segment(**options(clip, out, overwrite=True))
    assert not (out / "recording").exists()


def test_what_is_read_does_not_lie_where_results_go(clip, finished, tmp_path):
    out = tmp_path / "out"
    (out / "recording").mkdir(parents=True)
    Image.fromarray(pictures()[0]).save(out / "recording/00000.png")
    with pytest.raises(RunError, match="recording, where the frames are read from, lies where results go"):
        segment(**options(clip, out, frames=out / "recording", overwrite=True))
    shutil.copytree(finished / "binary", tmp_path / "kept/binary")
    with pytest.raises(RunError, match="where the masks are read from, lies where results go"):
        segment(**options(clip, tmp_path / "kept", masks=tmp_path / "kept/binary/2", overwrite=True))


def test_an_overlay_takes_the_place_of_nothing_unasked(clip, tmp_path):
    video, there = clip / "clip.mp4", tmp_path / "there.mp4"
    before = video.read_bytes()
    there.write_bytes(b"mine")
    with pytest.raises(RunError, match="clip.mp4: is the clip itself"):
        segment(**options(clip, tmp_path / "out", video=video, overwrite=True))
    with pytest.raises(RunError, match="there.mp4: is there already; --overwrite replaces it"):
        segment(**options(clip, tmp_path / "out", video=there))
    assert video.read_bytes() == before and there.read_bytes() == b"mine" and not (tmp_path / "out").exists()


def test_nor_does_that_of_a_run_that_goes_on(clip, tmp_path, monkeypatch):
    """An overlay that is there is replaced by the run that began to write it, and by no other."""
    there, own = tmp_path / "there.mp4", tmp_path / "own.mp4"
    there.write_bytes(b"mine")
    with monkeypatch.context() as broken:
        broken.setattr(module.Tracks, "__exit__", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            segment(**options(clip, tmp_path / "out", save=["tracks"], video=own))
    own.write_bytes(b"as a killed run may leave it")
    with pytest.raises(RunError, match="there.mp4: is there already"):
        segment(**options(clip, tmp_path / "out", save=["tracks"], video=there, resume=True))
    segment(**options(clip, tmp_path / "out", save=["tracks"], video=own, resume=True))
    assert len(own.read_bytes()) > 1000
    segment(**options(clip, tmp_path / "out", video=own, resume=True))  # finished: its own is drawn again
    with pytest.raises(RunError, match="there.mp4: is there already"):
        segment(**options(clip, tmp_path / "out", video=there, resume=True))
    assert len(own.read_bytes()) > 1000 and there.read_bytes() == b"mine"
    segment(**options(clip, tmp_path / "out", video=tmp_path / "further.mp4", resume=True))
    assert (tmp_path / "further.mp4").exists()


def test_two_masks_of_one_frame(clip, tmp_path):
    (tmp_path / "masks").mkdir()
    for suffix in (".png", ".bmp"):
        Image.open(clip / "first.png").convert("L").save(tmp_path / f"masks/00000{suffix}")
    with pytest.raises(RunError, match="00000.bmp and 00000.png are masks of one frame|00000.png and 00000.bmp are masks of"):
        segment(**options(clip, tmp_path / "out", masks=tmp_path / "masks"))


def test_two_runs_do_not_share_a_folder(clip, tmp_path, monkeypatch):
    """A second one that begins while the first is at work is told so, and a later one is not."""
    told = []

    def write(*arguments):
        if not told:
            told.append("")
            with pytest.raises(RunError, match="out: another run is working there") as refused:
                segment(**options(clip, tmp_path / "out", overwrite=True))
            told.append(str(refused.value))
        return results(*arguments)

    results = module.write_results
    monkeypatch.setattr("dmm_fast.inference.run.write_results", write)
    segment(**options(clip, tmp_path / "out"))
    assert len(told) == 2
    segment(**options(clip, tmp_path / "out", overwrite=True))


@pytest.mark.parametrize("again", [{}, {"resume": True}], ids=["anew", "resumed"])
def test_a_run_that_ends_while_another_begins_is_kept(clip, tmp_path, monkeypatch, again):
    """Between a look at the folder and the work in it networks are loaded."""
    out, load = tmp_path / "out", run._load

    def late(*arguments, **more):
        monkeypatch.setattr(run, "_load", load)
        segment(**options(clip, out))
        return load(*arguments, **more)

    monkeypatch.setattr(run, "_load", late)
    with pytest.raises(RunError, match="holds a finished run"):
        segment(**options(clip, out, **again))
    assert (out / "report.json").exists() and not (out / "unfinished").exists()
    segment(**options(clip, out, overwrite=True))  # nothing is held


def test_an_unfinished_run_without_a_checkpoint_begins_again(clip, finished, tmp_path):
    """As the page leaves one that went both ways."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "report.json").unlink()
    (out / "unfinished").mkdir()
    (out / "unfinished/settings.json").write_text("{}")
    segment(**options(clip, out, resume=True))
    assert (out / "report.json").exists() and not (out / "binary").exists()


def test_kinds_that_cannot_be_made_are_refused_at_once(clip, tmp_path, monkeypatch, capsys):
    with pytest.raises(RunError, match="--save gif: the kinds are masks, binary, cutout, alpha-video, tracks"):
        segment(**options(clip, tmp_path / "out", save=["gif"]))
    monkeypatch.setattr(module, "alpha_suffix", lambda: None)
    with pytest.raises(RunError, match="neither ProRes 4444 nor VP9"):
        segment(**options(clip, tmp_path / "out", save=["alpha-video"]))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- what is wrong with the input is told


def test_the_report_and_the_summary_name_frames_that_cannot_be_decoded(clip, tmp_path, capsys):
    damaged = make_video(tmp_path / "clip.mp4")
    found = packets(damaged)
    spoil(damaged, 5)
    lost = sorted(stamp for stamp, *_ in found).index(found[5][0])
    out = tmp_path / "out"
    arguments = ["segment", damaged, "--masks", clip / "first.png", "--proposals", clip / "p.json", "--out", out,
                 "--preset", "iou", "--overlay", tmp_path / "o.mp4"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    assert f"note: clip.mp4: frame {lost:05d} cannot be decoded: the last good picture stands for it" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert [row["frame"] for row in report["frames"] if row.get("picture") == "missing"] == [f"{lost:05d}"]
    assert len(list(out.glob("0*.png"))) == len(open_frames(tmp_path / "o.mp4")) == 12


def test_image_ids_that_count_from_one_are_told_in_time(clip, tmp_path, capsys):
    save_proposals(tmp_path / "p.json", first=1)
    arguments = ["segment", clip / "clip.mp4", "--masks", clip / "first.png", "--proposals", tmp_path / "p.json",
                 "--out", tmp_path / "out", "--preset", "iou"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    shown = capsys.readouterr()
    assert "-1 is added to each" in shown.err.partition("frames/s")[0] and "-1 is added to each" in shown.out
    assert (read_ids(tmp_path / "out/00005.png") == masks_at(5)).all()


def test_smoothed_masks_are_cleaned_when_asked(clip, tmp_path, capsys):
    smooth = Image.fromarray(masks_at(0)[::2, ::2]).resize((64, 48), Image.Resampling.BILINEAR)
    write_mask(tmp_path / "m.png", np.asarray(smooth))
    arguments = ["segment", clip / "clip.mp4", "--masks", tmp_path / "m.png", "--proposals", clip / "p.json",
                 "--out", tmp_path / "out", "--preset", "iou"]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 2
    assert "--clean-masks" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([str(argument) for argument in [*arguments, "--clean-masks"]]) == 0
    assert (read_ids(tmp_path / "out/00006.png") == masks_at(6)).all()
    assert "cleaned: " in capsys.readouterr().out

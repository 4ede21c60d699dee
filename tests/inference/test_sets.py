"""Whole data sets: each video as if it were alone, what is done once, what fails, and what servers and tables get."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from dmm_fast.commands.main import main
from dmm_fast.data.datasets import open_dataset
from dmm_fast.data.masks import read_ids, write_mask
from dmm_fast.data.submission import SubmissionError, write_submission
from dmm_fast.inference import passes, sets
from dmm_fast.inference.benchmark import TABLES, benchmark
from dmm_fast.inference.demo import make_clip
from dmm_fast.inference.folder import SHEET, RunError
from dmm_fast.inference.passes import Interrupted
from dmm_fast.inference.proposal_sets import ProposalsJob, propose_set
from dmm_fast.inference.run import segment
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.inference.sets import SetJob, segment_one, segment_set

LENGTH, SIZE = 6, (48, 80)
NAMES = ("carp", "koi", "trout")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Three made clips: frames, exact masks and proposals by name."""
    root = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(NAMES):
        make_clip(root / name, seed=seed + 1, frames=LENGTH + seed, size=SIZE)
    return root


def fill(made, images, annotations, given=lambda index: True, stem=lambda index: f"{index:05d}"):
    """Lay the clips out: frames, and the masks of some frames."""
    for name in NAMES:
        (images / name).mkdir(parents=True)
        (annotations / name).mkdir(parents=True)
        for frame in sorted((made / name / "JPEGImages/koi").iterdir()):
            index = int(frame.stem)
            (images / name / f"{stem(index)}.jpg").symlink_to(frame)
            if given(index):
                mask = made / name / f"Annotations/koi/{frame.stem}.png"
                shutil.copyfile(mask, annotations / name / f"{stem(index)}.png")


@pytest.fixture
def proposals(made, tmp_path):
    folder = tmp_path / "proposals"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.json").symlink_to(made / name / "proposals/koi.json")
    return folder


@pytest.fixture
def davis(made, tmp_path):
    root = tmp_path / "DAVIS"
    fill(made, root / "JPEGImages/480p", root / "Annotations/480p")
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("carp\nkoi\ntrout\n")
    return root


def job(dataset, out, proposals, **more):
    options = {"preset": "iou", **more.pop("options", {})}
    return SetJob(str(dataset), str(out), proposals=str(proposals), options=options, **more)


def contents(out):
    """Masks by name and the report, less what differs from run to run."""
    masks = {path.name: path.read_bytes() for path in out.glob("*.png") if path.name != SHEET}
    report = json.loads((out / "report.json").read_text())
    return masks, {name: report[name] for name in ("frames", "objects", "notes", "size")}


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def single(made, proposals, name, out, **more):
    """The same video, alone."""
    masks = made / name / "Annotations/koi/00000.png"
    options = {"proposals": proposals / f"{name}.json", **more}
    return segment(made / name / "JPEGImages/koi", masks, out, **options)


# ----------------------------------------------------------------------------------------------------- one after another


def test_a_data_set_is_its_videos(made, davis, proposals, tmp_path, capsys):
    """One process, one network: what comes out is what each video gives alone, to the bit."""
    out = tmp_path / "out"
    command = ["segment", "--dataset", davis, "--split", "val", "--proposals", proposals, "--out", out]
    assert main([str(word) for word in command]) == 0  # the packaged network
    shown = capsys.readouterr()
    assert "3 videos, 21 frames" in shown.out and "0 failed" in shown.out
    lines = [line for line in shown.err.splitlines() if "frames/s; all:" in line]
    assert [line.split(":")[0] for line in lines] == ["1/3 carp", "2/3 koi", "3/3 trout"] and lines[-1].endswith("00:00 left")
    for name in NAMES:
        single(made, proposals, name, tmp_path / "alone" / name)
        assert contents(out / name) == contents(tmp_path / "alone" / name)
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["videos"]) == list(NAMES) and summary["frames"] == 3 * LENGTH + 3 and not summary["failed"]
    assert summary["fps"] > 0 and summary["dataset"]["layout"] == "davis" and summary["dataset"]["split"] == "val"


def test_networks_are_loaded_once_and_a_learning_run_has_its_own(davis, proposals, tmp_path, monkeypatch):
    made, tuned, before = [], [], Segmenter.__init__

    def init(self, *args, **more):
        made.append(self)
        before(self, *args, **more)

    monkeypatch.setattr(Segmenter, "__init__", init)
    segment_set(job(davis, tmp_path / "plain", proposals))
    assert len(made) == 1

    def tune(self, *args, **budget):
        tuned.append(self)
        return 1

    monkeypatch.setattr(Segmenter, "tune", tune)
    segment_set(job(davis, tmp_path / "online", proposals, options={"preset": "small", "online": "1e"}))
    assert len(made) == 5 and tuned == made[2:]  # and one to see whether the options work


def test_a_job_can_be_done_elsewhere(davis, proposals, tmp_path):
    """By a process that has nothing but the pickled job and the video's name."""
    asked = job(davis, tmp_path / "far", proposals)
    code = "import pickle, sys; from dmm_fast.inference.sets import segment_one; print(segment_one(*pickle.load(sys.stdin.buffer))['frames'])"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps((asked, "koi")), capture_output=True, check=True)
    assert int(done.stdout) == LENGTH + 1
    segment_set(job(davis, tmp_path / "near", proposals))
    assert contents(tmp_path / "far/koi") == contents(tmp_path / "near/koi")


@pytest.mark.parametrize("masks, late", [(LENGTH + 3, 0.0), (2 * LENGTH + 1, 0.3)])
def test_finished_videos_are_skipped_and_interrupted_ones_go_on(masks, late, davis, proposals, tmp_path, monkeypatch, capsys):
    """It is stopped when so many masks are written: in the second video, and when all of it is done but that."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    segment_set(job(davis, whole, proposals))
    write, number = passes.write_mask, itertools.count(1)

    def stops(path, ids):
        mine = next(number)  # several threads write
        write(path, ids)
        if mine == masks:
            time.sleep(late)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(passes, "write_mask", stops)
    command = ["segment", "--dataset", davis, "--split", "val", "--proposals", proposals, "--out", out, "--preset", "iou"]
    assert main([str(word) for word in command]) == 130
    assert "repeat the command to continue" in capsys.readouterr().err
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["videos"]) == ["carp"] and summary["left"] == ["koi", "trout"]
    monkeypatch.setattr(passes, "write_mask", write)
    kept = (out / "carp/00003.png").stat().st_mtime_ns
    assert main([str(word) for word in command]) == 0
    shown = capsys.readouterr().err
    assert "1/3 carp: finished before" in shown and "2/3 koi: 7 frames" in shown and "all: 7 of 15 frames" in shown
    assert (out / "carp/00003.png").stat().st_mtime_ns == kept
    for name in NAMES:
        assert contents(out / name) == contents(whole / name)
    assert everything(out) == everything(whole)
    monkeypatch.setattr(passes, "write_mask", lambda *_: pytest.fail("nothing is left to do"))
    assert main([str(word) for word in command]) == 0
    # Other settings are refused, video by video; nothing is lost.
    assert main([str(word) for word in command] + ["--matcher", "greedy"]) == 3
    assert "the finished run there has matcher = 'dmm', this one 'greedy'" in capsys.readouterr().err
    assert everything(out) == everything(whole)


def test_overwrite(davis, proposals, tmp_path):
    segment_set(job(davis, tmp_path / "out", proposals), ["koi"])
    segment_set(job(davis, tmp_path / "out", proposals, overwrite=True, options={"matcher": "greedy"}), ["koi"])
    assert json.loads((tmp_path / "out/koi/report.json").read_text())["settings"]["matcher"] == "greedy"


# ------------------------------------------------------------------------------------------------------ what goes wrong


def spoil(davis, proposals, what):
    """Break the video koi in one way; -> what must be said."""
    images, masks = davis / "JPEGImages/480p/koi", davis / "Annotations/480p/koi"
    if what == "no frames":
        shutil.rmtree(images)
        return "koi: no such directory"
    if what == "a broken frame":
        (images / "00003.jpg").unlink()
        (images / "00003.jpg").write_bytes(b"no picture")
        return "00003.jpg: cannot be read as an image"
    if what == "no masks":
        shutil.rmtree(masks)
        return "koi: no masks"
    if what == "no first mask":
        (masks / "00000.png").unlink()
        return "koi: no mask of the first frame, 00000; the first is that of 00001"
    if what == "an empty first mask":
        write_mask(masks / "00000.png", np.zeros(SIZE, np.uint8))
        return "koi: no object in its masks"
    if what == "no proposals":
        (proposals / "koi.json").unlink()
        return "koi.json: no proposals for video koi"
    found = json.loads((proposals / "koi.json").read_text())
    (proposals / "koi.json").unlink()
    if what == "proposals of other frames":
        (proposals / "koi.json").write_text(json.dumps([entry | {"image_id": "elsewhere-7"} for entry in found]))
        return "koi.json: no proposals for these frames"
    assert what == "proposals of another size"  # seen in the middle of the run
    for entry in found:
        if entry["image_id"] in ("00004", 4):
            entry["segmentation"] = {"size": [4, 4], "counts": [0, 16]}
    (proposals / "koi.json").write_text(json.dumps(found))
    return "image_id '00004'"


@pytest.mark.parametrize(
    "what", ["no frames", "a broken frame", "no masks", "no first mask", "an empty first mask", "no proposals",
             "proposals of other frames", "proposals of another size"],
)  # fmt: skip
def test_a_video_that_fails_is_named_and_the_rest_goes_on(davis, proposals, tmp_path, capsys, what):
    said, out = spoil(davis, proposals, what), tmp_path / "out"
    command = ["segment", "--dataset", davis, "--split", "val", "--proposals", proposals, "--out", out, "--preset", "iou"]
    assert main([str(word) for word in command] + ["--quiet", "--zip", str(tmp_path / "all.zip")]) == 3
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("dmm-fast: koi: ") and said in shown[0] and len(shown) == 2
    assert "all.zip: not written" in shown[1] and not (tmp_path / "all.zip").exists()
    assert sorted(path.name for path in out.iterdir()) == ["carp", "first-masks", "summary.json", "trout"]
    assert sorted(path.name for path in (out / "first-masks").iterdir()) == ["carp", "trout"]
    summary = json.loads((out / "summary.json").read_text())
    assert said in f"koi: {summary['failed']['koi']['error']}" and list(summary["videos"]) == ["carp", "trout"]


def test_a_full_disk(davis, proposals, tmp_path, monkeypatch):
    write = passes.write_mask

    def full(path, ids):
        if path.parent.name == "koi" and path.stem == "00004":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, ids)

    monkeypatch.setattr(passes, "write_mask", full)
    summary = segment_set(job(davis, tmp_path / "out", proposals))
    assert list(summary["failed"]) == ["koi"] and "No space left on device" in summary["failed"]["koi"]["error"]
    assert not (tmp_path / "out/koi").exists() and not (tmp_path / "out/first-masks/koi").exists()
    monkeypatch.setattr(passes, "write_mask", write)
    assert not segment_set(job(davis, tmp_path / "out", proposals))["failed"]


def test_a_fault_of_ours_keeps_its_traceback(davis, proposals, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sets, "segment", lambda *_, **__: [][1])
    command = ["segment", "--dataset", davis, "--split", "val", "--proposals", proposals, "--out", tmp_path / "out", "--quiet"]
    assert main([str(word) for word in command]) == 3
    assert "koi: IndexError: list index out of range" in capsys.readouterr().err
    assert main([str(word) for word in command] + ["--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_what_cannot_be_asked(davis, proposals, tmp_path, capsys):
    def fails(*words, message):
        assert main(["segment", "--out", str(tmp_path / "out"), *map(str, words)]) == 2
        assert message in capsys.readouterr().err

    here = ("--dataset", davis, "--preset", "iou")
    fails(
        *here,
        "--split",
        "vall",
        message="ImageSets/2017/vall.txt: no such list of videos; DAVIS keeps its splits in ImageSets/2017, there: val",
    )
    fails(*here, "--sequences", "koi,kio", message="no video kio here, of 3; there: carp, koi, trout")
    fails(*here, "--masks", "m.png", message="a data set has its own masks")
    fails(*here, "--overlay", "o.mp4", message="--overlay does not go with --dataset")
    fails(*here, "--direction", "both", message="goes forward only")
    fails(*here, "--proposals", proposals / "koi.json", message="a data set's proposals are a folder")
    fails(*here, "--proposals", proposals, "--keep-proposals", message="these proposals are kept already")
    fails(*here, "--zip", tmp_path / "no/x.zip", message="there is no directory")
    fails(*here, "--zip", tmp_path / "x.zip", "--sequences", "koi", message="--zip needs every video of the split")
    # What no video could work with is said once.
    fails(*here, "--proposals", proposals, "--weights", "gone.safetensors", "--preset", "small", message="gone.safetensors")
    fails(*here, "--proposals", proposals, "--online", "soon", message="online learning takes seconds such as 30")
    fails(*here, "--proposals", proposals, "--online", "3", message="online learning needs a network")
    fails(*here, "--proposals", proposals, "--save", "gif", message="gif")
    fails(*here, "--proposals", "small", "--backbone", "nonsense", message="nonsense")
    fails(davis / "JPEGImages/480p/koi", "--masks", "m.png", "--split", "val", message="--split belongs to a data set")
    fails(davis / "JPEGImages/480p/koi", message="--masks FIRST.png|DIR is missing")
    assert not (tmp_path / "out").exists()


def test_two_videos_of_one_name(made, tmp_path):
    from dmm_fast.data.video import VideoWriter, open_frames

    root = tmp_path / "videos"
    for name, suffix in (("carp", "mp4"), ("koi", "mp4"), ("koi", "avi")):
        (root / "Annotations" / name).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made / name / "Annotations/koi/00000.png", root / f"Annotations/{name}/00000.png")
        with VideoWriter(root / f"{name}.{suffix}", SIZE, 10) as writer:
            for _, frame in open_frames(made / name / "JPEGImages/koi").read():
                writer.write(frame)
    folder = tmp_path / "p"
    folder.mkdir()
    for name in ("carp", "koi"):
        (folder / f"{name}.json").symlink_to(made / name / "proposals/koi.json")
    summary = segment_set(job(root, tmp_path / "out", folder))
    assert list(summary["videos"]) == ["carp"] and "koi.mp4: the same name as koi.avi" in summary["failed"]["koi"]["error"]


def test_a_name_that_would_mix_results(davis, proposals, tmp_path):
    (davis / "ImageSets/2017/val.txt").write_text("first-masks\nkoi\n")
    summary = segment_set(job(davis, tmp_path / "out", proposals, split="val"))
    assert list(summary["videos"]) == ["koi"] and "cannot have this name" in summary["failed"]["first-masks"]["error"]


# ------------------------------------------------------------------------------------------- objects that appear late


@pytest.fixture
def youtube(made, tmp_path):
    """A validation split: every second frame of the clips counts; object 2 comes with the fourth frame, the others are given at first."""
    root, meta = tmp_path / "YT", {}
    for part in ("valid", "valid_all_frames"):
        fill(made, root / part / "JPEGImages", root / part / "Annotations", given=lambda index: index in (0, 2))
        if part == "valid":
            for name in NAMES:
                for index in range(LENGTH + 2):
                    if index % 2:
                        (root / f"valid/JPEGImages/{name}/{index:05d}.jpg").unlink(missing_ok=True)
        else:
            shutil.rmtree(root / part / "Annotations")
    for name in NAMES:
        folder = root / "valid/Annotations" / name
        first, later = read_ids(folder / "00000.png"), read_ids(folder / "00002.png")
        write_mask(folder / "00000.png", np.where(first == 2, 0, first).astype(np.uint8))
        write_mask(folder / "00002.png", later)  # all objects: those that are known must not be taken from here
        stems = [path.stem for path in sorted((root / "valid/JPEGImages" / name).iterdir())]
        numbers = [int(number) for number in np.unique(first) if number]
        meta[name] = {"objects": {str(n): {"category": "fish", "frames": stems[n == 2 :]} for n in numbers}}
    (root / "valid/meta.json").write_text(json.dumps({"videos": meta}))
    return root


def test_only_an_objects_first_mask_is_given(youtube, proposals, tmp_path):
    out = tmp_path / "out"
    segment_set(job(youtube, out, proposals, split="valid_all_frames"))
    for name in NAMES:
        given = out / "first-masks" / name
        assert sorted(path.name for path in given.iterdir()) == ["00000.png", "00002.png"]
        assert set(np.unique(read_ids(given / "00002.png"))) == {0, 2} and 2 not in read_ids(given / "00000.png")
        report = json.loads((out / name / "report.json").read_text())
        assert report["objects"]["2"]["given"] == "00002" and report["settings"]["direction"] == "forward"
        assert 2 not in read_ids(out / name / "00001.png")  # not followed backward
        assert report["objects"]["1"]["frames"] == len(report["frames"]) - 1  # given once, followed in all others


def test_full_annotations_are_not_used_as_corrections(made, davis, proposals, tmp_path):
    """The same masks come out with the ground truth of all frames at hand as without it."""
    bare = tmp_path / "bare"
    fill(made, bare / "JPEGImages", bare / "Annotations", given=lambda index: index == 0)
    full = tmp_path / "full"
    fill(made, full / "JPEGImages", full / "Annotations")
    for root, out in ((bare, "one"), (full, "other")):
        segment_set(job(root, tmp_path / out, proposals), ["koi"])
    assert contents(tmp_path / "one/koi") == contents(tmp_path / "other/koi")


# --------------------------------------------------------------------------------------------------------------- zips


def inside(path):
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        return {entry: Image.open(file.open(entry)) for entry in file.namelist()}


def test_zip_for_davis(davis, proposals, tmp_path, capsys):
    out, path = tmp_path / "out", tmp_path / "davis.zip"
    command = [
        "segment",
        "--dataset",
        davis,
        "--split",
        "val",
        "--proposals",
        proposals,
        "--out",
        out,
        "--preset",
        "iou",
        "--zip",
        path,
    ]
    assert main([str(word) for word in command]) == 0
    assert f"{path} (21 masks)" in capsys.readouterr().out
    masks = inside(path)
    assert {name.split("/")[0] for name in masks} == set(NAMES) and len(masks) == 21
    for name, image in masks.items():
        assert image.mode == "P" and image.size == SIZE[::-1] and (np.asarray(image) == read_ids(out / name)).all()
    content = path.read_bytes()
    assert main([str(word) for word in command]) == 0 and path.read_bytes() == content
    # It passes the public evaluator's check of folders: every sequence in the root, an indexed PNG for every frame.
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "unpacked")
    assert main(["evaluate", "--gt", str(davis / "Annotations/480p"), "--pred", str(tmp_path / "unpacked"), "--quiet"]) == 0


def test_zip_for_youtube_vos_has_the_frames_that_count(youtube, proposals, tmp_path):
    command = ["segment", "--dataset", youtube, "--split", "valid_all_frames", "--proposals", proposals, "--out", tmp_path / "out",
               "--preset", "iou", "--quiet", "--zip", tmp_path / "yt.zip"]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    expected = {
        f"Annotations/{name}/{path.stem}.png" for name in NAMES for path in (youtube / "valid/JPEGImages" / name).iterdir()
    }
    assert set(inside(tmp_path / "yt.zip")) == expected and (tmp_path / "out/koi/00001.png").exists()


@pytest.mark.parametrize("layout, root, stem", [("mose", "", "{:05d}"), ("lvos", "Annotations/", "{:08d}")])
def test_mose_and_lvos(made, tmp_path, layout, root, stem):
    data, folder = tmp_path / "data", tmp_path / "proposals"
    naming = (lambda index: stem.format(index + 1)) if layout == "lvos" else (lambda index: stem.format(index))
    fill(
        made,
        data / "valid/JPEGImages",
        data / "valid/Annotations",
        given=lambda index: index == 0 or layout == "lvos",
        stem=naming,
    )
    folder.mkdir()
    for name in NAMES:
        found = json.loads((made / name / "proposals/koi.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps([e | {"image_id": naming(int(e["image_id"]))} for e in found]))
    if layout == "lvos":  # object 1 of koi comes with the third frame only
        ranges = {name: {"objects": {str(n): {"frame_range": {"start": naming(2 * (n == 1 and name == "koi")), "end": naming(5)}}
                                     for n in (1, 2)}} for name in NAMES}  # fmt: skip
        (data / "valid/valid_meta.json").write_text(json.dumps({"videos": ranges}))
    for place in (data, data / "valid"):
        dataset = open_dataset(place, "auto" if place == data else layout)
        assert dataset.layout == layout and dataset.split == "valid" and dataset.names == list(NAMES)
    out = tmp_path / "out"
    command = [
        "segment",
        "--dataset",
        data,
        "--proposals",
        folder,
        "--out",
        out,
        "--preset",
        "iou",
        "--quiet",
        "--zip",
        tmp_path / "z.zip",
    ]
    assert main([str(word) for word in command]) == 0
    assert {f"{root}{name}/{naming(index)}.png" for seed, name in enumerate(NAMES) for index in range(LENGTH + seed)} == set(
        inside(tmp_path / "z.zip")
    )
    given = {path.stem: set(np.unique(read_ids(path))) - {0} for path in (out / "first-masks/koi").iterdir()}
    if layout == "lvos":
        assert given == {naming(0): {2}, naming(2): {1}}
    else:
        assert set(given) == {naming(0)}
    with pytest.raises(ValueError, match="no such split, there: valid"):
        open_dataset(data, split="test")


def test_what_a_server_would_refuse(davis, proposals, tmp_path):
    out = tmp_path / "out"
    segment_set(job(davis, out, proposals))
    dataset, path, mask = open_dataset(davis), tmp_path / "z.zip", out / "koi/00003.png"
    path.write_text("an earlier one")
    kept = mask.read_bytes()

    def refused(message):
        with pytest.raises(SubmissionError, match=message):
            write_submission(dataset, out, path)
        assert path.read_text() == "an earlier one" and not list(tmp_path.glob(".*tmp"))

    mask.unlink()
    refused("koi: 1 of 7 masks are missing: 00003")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(mask)
    refused("00003.png: must be an indexed PNG, is PNG with pixels of mode L")
    write_mask(mask, np.zeros((SIZE[0], SIZE[1] + 2), np.uint8))
    refused("the mask is 82x48, the frame 80x48")
    write_mask(mask, np.full(SIZE, 77, np.uint8))
    refused("object 77 was not given up to this frame")
    mask.write_bytes(kept)
    assert write_submission(dataset, out, path) == 21
    plain = tmp_path / "plain"
    for part in ("JPEGImages", "Annotations"):
        (plain / part).mkdir(parents=True)
        (plain / part / "koi").symlink_to(davis / part / "480p/koi")
    with pytest.raises(SubmissionError, match="no server takes results of the folder layout"):
        write_submission(open_dataset(plain), out, path)


# ---------------------------------------------------------------------------------------------------- kept proposals


def test_a_detectors_proposals_are_kept(davis, tmp_path, capsys):
    command = ["segment", "--dataset", davis, "--split", "val", "--sequences", "koi", "--preset", "iou", "--quiet"]
    kept, out = tmp_path / "out/proposals", tmp_path / "again"
    assert main([str(word) for word in [*command, "--out", tmp_path / "out", "--keep-proposals"]]) == 0
    assert sorted(path.name for path in kept.iterdir()) == ["detector.txt", "koi.json"]
    assert main([str(word) for word in [*command, "--out", out, "--proposals", kept]]) == 0
    assert contents(out / "koi")[0] == contents(tmp_path / "out/koi")[0]
    assert (
        main([str(word) for word in ["proposals", "--dataset", davis, "--split", "val", "--out", tmp_path / "p", "--quiet"]])
        == 0
    )
    assert (tmp_path / "p/koi.json").read_bytes() == (kept / "koi.json").read_bytes()
    other = [*command, "--out", tmp_path / "out", "--keep-proposals", "--proposals", "torchvision"]
    assert main([str(word) for word in other]) == 2
    assert "holds proposals of the detector small, not torchvision" in capsys.readouterr().err


def test_a_folder_holds_proposals_of_one_detector(davis, tmp_path):
    """--overwrite with another detector leaves none of the one before, also where it is cut short."""
    out = tmp_path / "p"
    propose_set(ProposalsJob(str(davis), str(out), split="val"), ["carp", "koi"])
    other = ProposalsJob(str(davis), str(out), split="val", short_side=120, overwrite=True)
    with pytest.raises(RunError, match="small, not small short-side 120, also koi.json, which would not be replaced"):
        propose_set(other, ["carp"])
    assert everything(out) == ["carp.json", "detector.txt", "koi.json"]
    other.prepare(list(NAMES))
    assert everything(out) == ["detector.txt"] and (out / "detector.txt").read_text() == "small short-side 120\n"


def test_inputs_that_change_under_their_names(davis, proposals, tmp_path, capsys):
    """A finished video is not taken for one of other proposals, or other first masks."""
    proposals = shutil.copytree(proposals, tmp_path / "own")
    done = segment_set(job(davis, tmp_path / "out", proposals))
    assert segment_set(job(davis, tmp_path / "out", proposals))["videos"] == done["videos"]
    entries = json.loads((proposals / "koi.json").read_text())
    (proposals / "koi.json").write_text(json.dumps(entries[1:]))
    mask = davis / "Annotations/480p/carp/00000.png"
    write_mask(mask, np.where(read_ids(mask) == 1, read_ids(mask), 0).astype(np.uint8))
    summary = segment_set(job(davis, tmp_path / "out", proposals))
    assert sorted(summary["failed"]) == ["carp", "koi"] and list(summary["videos"]) == ["trout"]
    assert "koi.json is not what it was for the finished run there; --overwrite" in summary["failed"]["koi"]["error"]
    assert "the data set's are others by now; --overwrite" in summary["failed"]["carp"]["error"]
    assert not segment_set(job(davis, tmp_path / "out", proposals, overwrite=True))["failed"]


# ------------------------------------------------------------------------------------------------------------ benchmark


def test_benchmark(davis, proposals, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "benchmark",
        davis,
        "--split",
        "val",
        "--proposals",
        proposals,
        "--out",
        out,
        "--preset",
        "iou",
        "--workers",
        "1",
    ]
    assert main([str(word) for word in command]) == 0
    shown = capsys.readouterr().out
    result = json.loads((out / "benchmark.json").read_text())
    assert shown.startswith((out / "benchmark.md").read_text())
    assert "| DMM-Net | no | 68.1 | 73.3 | 70.7 | - |" in shown and "comparable" not in shown  # DAVIS 2017 val, all of it
    row = result["row"]
    assert f"| **dmm_fast iou** | no | **{row['J']:.1f}** | **{row['F']:.1f}** | **{row['G']:.1f}** |" in shown
    assert row["G"] == pytest.approx((row["J"] + row["F"]) / 2, abs=0.01) and row["J"] > 50 and row["FPS"] > 0
    assert main(["evaluate", "--gt", str(davis / "Annotations/480p"), "--pred", str(out), "--quiet", "--workers", "1",
                 "--json", str(tmp_path / "s.json")]) == 0  # fmt: skip
    assert json.loads((tmp_path / "s.json").read_text())["summary"] == result["scores"]["summary"]
    part = benchmark(job(davis, out, proposals, split="val"), ["koi"], table=0)
    assert "1 of the data set's 3 videos." in part["markdown"] and "DMM-Net" not in part["markdown"]
    (proposals / "trout.json").unlink()
    shutil.rmtree(out)
    assert main([str(word) for word in command] + ["--quiet"]) == 3
    shown = capsys.readouterr()
    assert "1 of 3 videos failed and are not in the row: trout" in shown.out and "not comparable" in shown.out
    assert "dmm-fast: trout: " in shown.err


def test_benchmark_on_segtrack(made, proposals, tmp_path):
    root = tmp_path / "SegTrackv2"
    fill(made, root / "JPEGImages", root / "GroundTruth")
    result = benchmark(job(root, tmp_path / "out", proposals), workers=1)
    assert set(result["row"]) == {"method", "online", "mIoU*", "mIoU†", "FPS"} and result["row"]["mIoU†"] > 50
    assert "| DMM-Net | no | 76.8 | 76.7 | - |" in result["markdown"] and result["scores"]["settings"]["protocol"] == "segtrack"


def test_benchmark_on_youtube_vos(made, youtube, proposals, tmp_path):
    with pytest.raises(ValueError, match="3 of 3 videos have no masks to score with but those of the first frames"):
        benchmark(job(youtube, tmp_path / "out", proposals, split="valid"))
    assert not (tmp_path / "out").exists()
    fill(made, youtube / "train/JPEGImages", youtube / "train/Annotations")
    frames = [f"{index:05d}" for index in range(LENGTH)]
    meta = {name: {"objects": {str(n): {"category": "fish", "frames": frames} for n in (1, 2)}} for name in NAMES}
    (youtube / "train/meta.json").write_text(json.dumps({"videos": meta}))
    result = benchmark(job(youtube, tmp_path / "out", proposals, split="train"), workers=1)
    assert "| DMM-Net+ | no | 58.3 | 41.6 | 60.7 | 46.3 | 51.7 | 12.0 |" in result["markdown"]
    assert f"| **dmm_fast iou** | no | **{result['row']['J']:.1f}** | **-** |" in result["markdown"]


@pytest.mark.parametrize("object_is", [1, 255])
def test_benchmark_on_plain_folders(made, proposals, tmp_path, object_is):
    """0/255 masks are one object; so DAVIS 2016."""
    root = tmp_path / "plain"
    fill(made, root / "JPEGImages", root / "Annotations")
    for path in root.glob("Annotations/*/*.png"):
        Image.fromarray(((read_ids(path) == 1) * object_is).astype(np.uint8)).save(path)
    result = benchmark(job(root, tmp_path / "out", proposals), workers=1)
    assert result["row"]["J"] > 50 and result["scores"]["settings"]["foreground"] == (object_is == 255)
    assert set(result["row"]) == {"method", "online", "J", "F", "G", "FPS"} and "DMM-Net |" not in result["markdown"]


def test_the_papers_tables():
    for number, table in TABLES.items():
        assert table.number == number and all(len(values) == len(table.columns) for *_, values in table.rows)
    for method, _, (j, f, g) in TABLES[2].rows:
        assert f is None or g == pytest.approx((j + f) / 2, abs=0.11), method
    for method, _, (js, ju, fs, fu, g, _) in TABLES[1].rows:
        assert ju is None or g == pytest.approx((js + ju + fs + fu) / 4, abs=0.11), method


def test_interrupted_is_passed_on(davis, proposals, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise Interrupted("stopped after 3 of 7 frames; --resume continues from there")

    monkeypatch.setattr(sets, "segment", stopped)
    with pytest.raises(Interrupted):
        segment_one(job(davis, tmp_path / "out", proposals), "koi")
    with pytest.raises(Interrupted):
        segment_set(job(davis, tmp_path / "out", proposals))
    assert json.loads((tmp_path / "out/summary.json").read_text())["left"] == list(NAMES)

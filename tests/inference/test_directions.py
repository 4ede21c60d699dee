"""Masks given anywhere: followed both ways, joined where both agree, the same after a kill, in bounded memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.videos import make_video, packets, spoil

from dmm_fast.commands.main import main
from dmm_fast.data import video
from dmm_fast.data.masks import read_ids, write_mask
from dmm_fast.data.video import open_frames
from dmm_fast.evaluation import jaccard
from dmm_fast.inference.demo import make_clip
from dmm_fast.inference.folder import RunError
from dmm_fast.inference.run import segment
from dmm_fast.inference.segmenter import Segmenter

LENGTH = 14


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The synthetic koi: four objects that cross, proposals, the truth of every frame."""
    root = tmp_path_factory.mktemp("clip")
    make_clip(root, seed=7, frames=LENGTH, size=(96, 160))
    return root


def truth(clip, index):
    return read_ids(clip / f"Annotations/koi/{index:05d}.png")


def masks_of(clip, folder, given):
    """A directory of masks: objects by frame."""
    folder.mkdir(parents=True)
    for index, objects in given.items():
        ids = truth(clip, index)
        write_mask(folder / f"{index:05d}.png", np.where(np.isin(ids, objects), ids, 0).astype(np.uint8))
    return folder


def run(clip, masks, out, **more):
    return segment(clip / "JPEGImages/koi", masks, out, proposals=clip / "proposals/koi.json", preset="iou", **more)


def results(out):
    return [read_ids(out / f"{index:05d}.png") for index in range(LENGTH)]


def score(clip, out, label, frames=range(LENGTH)):
    return np.mean([jaccard(read_ids(out / f"{t:05d}.png") == label, truth(clip, t) == label) for t in frames])


def test_from_the_middle_both_ways(clip, tmp_path):
    masks = masks_of(clip, tmp_path / "masks", {6: [1, 2]})
    report = run(clip, masks, tmp_path / "both")  # by default: the first mask is not the first frame's
    assert report["settings"]["direction"] == "both" and "joins" not in report
    assert all(score(clip, tmp_path / "both", label) > 0.7 for label in (1, 2))
    for direction, empty in (("forward", range(6)), ("backward", range(7, LENGTH))):
        told = run(clip, masks, tmp_path / direction, direction=direction)
        assert f"{len(empty)} frames) lie {'before the first' if direction == 'forward' else 'after the last'} mask" in str(
            told["notes"]
        )
        for index, (one, both) in enumerate(zip(results(tmp_path / direction), results(tmp_path / "both"))):
            assert (one == (0 if index in empty else both)).all()
    entries = {row["frame"]: row["objects"] for row in report["frames"]}
    assert all(entry["direction"] == "backward" for entry in entries["00002"]) and "direction" not in entries["00009"][0]
    assert [entry["given"] for entry in entries["00006"]] == [True, True] and report["objects"]["1"]["given"] == "00006"


def test_backward_is_forward_on_the_turned_clip(clip, tmp_path):
    turned = tmp_path / "turned"
    for folder in ("JPEGImages/koi", "Annotations/koi"):
        (turned / folder).mkdir(parents=True)
        for index, file in enumerate(sorted((clip / folder).iterdir())):
            (turned / folder / f"{LENGTH - 1 - index:05d}{file.suffix}").symlink_to(file)
    found = json.loads((clip / "proposals/koi.json").read_text())
    (turned / "proposals").mkdir()
    (turned / "proposals/koi.json").write_text(
        json.dumps([entry | {"image_id": f"{LENGTH - 1 - int(entry['image_id']):05d}"} for entry in found])
    )
    last = masks_of(clip, tmp_path / "last", {LENGTH - 1: [1, 2, 3, 4]})
    run(clip, last, tmp_path / "back", direction="backward")
    run(turned, turned / "Annotations/koi/00000.png", tmp_path / "forth")
    for one, other in zip(results(tmp_path / "back"), reversed(results(tmp_path / "forth"))):
        assert (one == other).all()


def test_an_object_given_twice_is_joined_where_the_passes_agree(clip, tmp_path):
    masks = masks_of(clip, tmp_path / "masks", {0: [1, 2, 3], 11: [1, 3]})
    report = run(clip, masks, tmp_path / "both", direction="both")
    run(clip, masks, tmp_path / "forward", direction="forward")
    run(clip, masks, tmp_path / "backward", direction="backward")
    passes = {name: results(tmp_path / name) for name in ("both", "forward", "backward")}
    assert {join["object"] for join in report["joins"]} == {1, 3} and report["settings"]["direction"] == "both"
    for join in report["joins"]:
        label, at = join["object"], int(join["at"])
        one, other = ([ids == label for ids in passes[name]] for name in ("forward", "backward"))
        agree = [jaccard(one[t], other[t]) for t in range(1, 11)]
        assert join["iou"] == pytest.approx(max(agree), abs=1e-4) == pytest.approx(agree[at - 1], abs=1e-4)
        for t in range(1, 11):  # overlaps with other objects aside
            taken = (one if t <= at else other)[t]
            assert jaccard(passes["both"][t] == label, taken) > 0.9
    for t in (0, 11):
        assert ((passes["both"][t] == 1) == (truth(clip, t) == 1)).all()
    assert "objects 1, 3: given in 2 frames (00000, 00011), where the masks are those given" in str(report["notes"])


def test_passes_that_disagree_are_told(clip, tmp_path):
    masks = masks_of(clip, tmp_path / "masks", {0: [1]})
    ids = truth(clip, 11)
    write_mask(masks / "00011.png", (ids == 2).astype(np.uint8))  # another fish
    report = run(clip, masks, tmp_path / "out", direction="both")
    (join,) = report["joins"]
    assert join["iou"] < 0.5 and any("disagree between the frames 00000 and 00011" in note for note in report["notes"])


def test_a_correction_is_followed_from_there(clip, tmp_path):
    """Forward, as when an object comes late: a mask given for an object that is followed replaces its mask."""
    masks = masks_of(clip, tmp_path / "masks", {0: [1, 2]})
    ids = truth(clip, 5)
    write_mask(masks / "00005.png", np.where(ids == 2, 1, 0).astype(np.uint8))  # "1" is now the other fish
    report = run(clip, masks, tmp_path / "out")
    assert report["settings"]["direction"] == "forward"
    found = results(tmp_path / "out")
    assert ((found[5] == 1) == (ids == 2)).all()
    assert jaccard(found[7] == 1, truth(clip, 7) == 2) > 0.5
    assert report["objects"]["1"]["given"] == "00000"


KILLED = """
import os, signal, sys
from dmm_fast.inference import passes, joining, run
where, number, clip, masks, out = sys.argv[1:]
owner = {"forward": passes, "backward": passes, "join": joining}[where]
original, calls = owner.write_mask, []
def dies(path, ids):
    calls.append(path)
    if len([one for one in calls if where == "join" or where in str(one)]) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, ids)
owner.write_mask = dies
run.segment(clip + "/JPEGImages/koi", masks, out, proposals=clip + "/proposals/koi.json", preset="iou", save_every=0)
"""


@pytest.mark.parametrize("where, number", [("forward", 9), ("backward", 1), ("backward", 4), ("join", 5)])
def test_killed_anywhere_and_resumed(clip, tmp_path, where, number):
    masks = masks_of(clip, tmp_path / "masks", {4: [1, 2], 9: [1, 4]})
    run(clip, masks, tmp_path / "whole")
    dead = [sys.executable, "-c", KILLED, where, str(number), str(clip), str(masks), str(tmp_path / "out")]
    assert subprocess.run(dead, timeout=120).returncode == -signal.SIGKILL
    out = tmp_path / "out"
    assert not (out / "report.json").exists()
    with pytest.raises(RunError, match="holds an unfinished run"):
        run(clip, masks, out)
    with pytest.raises(RunError, match="has direction = 'both', this one 'forward'"):
        run(clip, masks, out, resume=True, direction="forward")
    report = run(clip, masks, out, resume=True)
    assert all((one == other).all() for one, other in zip(results(out), results(tmp_path / "whole"), strict=True))
    assert report["joins"] == json.loads((tmp_path / "whole/report.json").read_text())["joins"]
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in (tmp_path / "whole").iterdir())
    run(clip, masks, out, resume=True)  # finished; the direction is the run's


def test_learning_serves_both_passes(clip, tmp_path, monkeypatch):
    masks = masks_of(clip, tmp_path / "masks", {3: [1, 2]})
    learnt = []

    def tune(self, frame, masks, proposals=None, **budget):
        learnt.append(self.net)
        return 7

    monkeypatch.setattr(Segmenter, "tune", tune)
    report = segment(clip / "JPEGImages/koi", masks, tmp_path / "out", proposals=clip / "proposals/koi.json", online="1e")
    assert len(learnt) == 1 and sum("was fitted to this frame, 7 steps" in note for note in report["notes"]) == 1
    assert {row["frame"] for row in report["frames"] if row["objects"]} == {f"{t:05d}" for t in range(LENGTH)}


def test_a_run_that_stops_before_the_first_mask_still_learns(clip, tmp_path, monkeypatch):
    masks, learnt = masks_of(clip, tmp_path / "masks", {5: [1]}), []

    def tune(self, frame, masks, proposals=None, **budget):
        learnt.append(budget)
        if len(learnt) == 1:
            raise KeyboardInterrupt  # as a second Ctrl-C would; five frames without objects are saved by then
        return 7

    monkeypatch.setattr(Segmenter, "tune", tune)
    asked = {"proposals": clip / "proposals/koi.json", "online": "1e", "direction": "forward", "save_every": 0}
    with pytest.raises(KeyboardInterrupt):
        segment(clip / "JPEGImages/koi", masks, tmp_path / "out", **asked)
    report = segment(clip / "JPEGImages/koi", masks, tmp_path / "out", resume=True, **asked)
    assert len(learnt) == 2 and any("was fitted to this frame, 7 steps" in note for note in report["notes"])


def test_backward_from_the_last_mask_that_has_an_object(clip, tmp_path):
    masks = masks_of(clip, tmp_path / "masks", {3: [1], 9: []})
    report = run(clip, masks, tmp_path / "out", direction="backward")
    assert "00004 to 00013 (10 frames) lie after the last mask" in str(report["notes"])
    assert read_ids(tmp_path / "out/00000.png").max() == 1 and read_ids(tmp_path / "out/00004.png").max() == 0


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.ts"])
@pytest.mark.parametrize("damage", [False, True])
def test_reading_backwards_in_small_stretches(tmp_path, monkeypatch, name, damage):
    make_video(tmp_path / name)
    if damage and name.endswith("ts"):
        pytest.skip("a transport stream's packets are spread over the file")
    if damage:
        spoil(tmp_path / name, 5)
    expected = list(open_frames(tmp_path / name).read())
    frames = open_frames(tmp_path / name)
    monkeypatch.setattr(video, "STRETCH", 0)  # the least there is: eight frames
    back = list(frames.read_back(10))
    assert [stem for stem, _ in back] == [f"{index:05d}" for index in range(10, -1, -1)]
    assert all((frame == expected[10 - place][1]).all() for place, (_, frame) in enumerate(back))


def test_seeking_reads_what_it_needs(tmp_path):
    path = make_video(tmp_path / "clip.mp4")
    frames = open_frames(path)
    keys = [stamp for stamp, *_, key in packets(path) if key]
    assert [int(frames.timeline.stamps[key]) for key in frames.timeline.keys] == keys and len(keys) > 2
    last = frames.timeline.keys[-1]
    assert frames.timeline.key_before(last - 1) == frames.timeline.keys[-2] and frames.timeline.key_before(11) == last
    key, pictures = frames._pictures_near(11)
    assert key == next(pictures).number == last
    for start in range(12):
        assert all((a == b).all() for (_, a), (_, b) in zip(frames.read(start, seek=True), frames.read(start), strict=True))


def test_words_are_checked(clip, tmp_path, capsys):
    with pytest.raises(RunError, match="direction must be one of both, forward, backward, got 'up'"):
        run(clip, clip / "Annotations/koi/00000.png", tmp_path / "out", direction="up")
    words = ["segment", clip / "JPEGImages/koi", "--masks", masks_of(clip, tmp_path / "m", {5: [1]}), "--out", tmp_path / "out",
             "--proposals", clip / "proposals/koi.json", "--preset", "iou", "--direction", "backward", "--quiet"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert read_ids(tmp_path / "out/00000.png").max() == 1 and read_ids(tmp_path / "out/00009.png").max() == 0

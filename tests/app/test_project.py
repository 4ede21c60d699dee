"""Projects: any frame at once, what is given, stale and followed again, and results that `dmm-fast segment` goes on from."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
from helpers.videos import make_video, seconds_of_sound, shown
from PIL import Image

from dmm_fast.app import runs
from dmm_fast.app.clip import Clip
from dmm_fast.app.exports import EXPORTS
from dmm_fast.app.project import DONE, OPEN, STALE, BusyError, ProjectError, open_project
from dmm_fast.app.worker import Settings, Worker
from dmm_fast.data.masks import read_mask, write_mask
from dmm_fast.data.video import VideoWriter, open_frames
from dmm_fast.inference.folder import RunError, hold
from dmm_fast.inference.run import segment

SIZE, LENGTH = (96, 160), 12


@pytest.fixture
def project(demo, tmp_path):
    opened = open_project(tmp_path / "koi.dmm", demo / "JPEGImages/koi")
    yield opened
    opened.close()


def truth(demo, index: int) -> np.ndarray:
    return read_mask(demo / f"Annotations/koi/{index:05d}.png")


def worker(project, demo, notify=lambda event: None) -> Worker:
    return Worker(project, Settings(str(demo / "proposals/koi.json"), model={"preset": "iou"}), notify)


def follow(project, demo) -> list[int]:
    """Run to the end; the frames that were made."""
    made = []
    runner = worker(project, demo, lambda event: made.append(event.get("frame")))
    runner.start()
    runner._thread.join()
    assert not runner.state["error"], runner.state
    return [index for index in made if index is not None]


def follow_until(project, demo, last: int) -> None:
    """A run that is stopped after this frame."""
    runner = worker(project, demo, lambda event: event.get("frame") == last and runner._stop.set())
    runner.start()
    runner._thread.join()
    assert not runner.state["error"], runner.state


@pytest.fixture
def states(monkeypatch):
    """A state is saved after every frame."""
    monkeypatch.setattr("dmm_fast.app.worker.SAVE_EVERY", -1.0)


def resume(project, demo, out=None, **options) -> dict:
    """What `dmm-fast segment --resume` makes of the project's masks."""
    return segment(project.clip.path, project.masks, out or project.results, proposals=demo / "proposals/koi.json",
                   preset="iou", resume=True, **options)  # fmt: skip


def progress(project) -> int:
    return json.loads((project.results / "unfinished/progress.json").read_text())["next"]


def give(project, demo, index: int, objects=(1, 2, 3, 4)) -> None:
    ids = truth(demo, index)
    for label in objects:
        project.names.setdefault(label, f"Object {label}")
    shown = project.ids(index)
    shown[np.isin(shown, objects)] = 0
    project.paint(index, np.where(np.isin(ids, objects), ids, shown), {*objects, *project.given.get(index, ())},
                  project.ends.get(index, ()))  # fmt: skip


def results(project) -> list[bytes]:
    return [project.ids(index).tobytes() for index in range(len(project.clip))]


@pytest.mark.parametrize(
    "ids", [np.zeros((1, 1), np.uint8), np.arange(255, dtype=np.uint8)[None], np.zeros((4100, 4100), np.uint8)]
)
def test_runs_are_exact(ids):
    assert (runs.decode(runs.encode(ids), ids.shape) == ids).all()


@pytest.mark.parametrize("data", [b"", b"abc", np.array([5 << 8], "<u4").tobytes(), np.array([7 << 8], "<u4").tobytes()])
def test_runs_that_do_not_fill_the_frame_are_refused(data):
    with pytest.raises(ValueError, match="a mask"):
        runs.decode(data, (2, 3))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_any_frame_of_a_video_is_that_of_a_read_from_the_start(tmp_path, name):
    frames = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    with VideoWriter(tmp_path / name, (64, 64), 25) as writer:
        for frame in frames:
            writer.write(frame)
    expected = [frame for _, frame in open_frames(tmp_path / name).read()]
    clip = Clip(tmp_path / name)
    assert len(clip) == len(expected) == 70
    for index in (0, 69, 13, 12, 40, 41, 3):
        assert (clip.frame(index) == expected[index]).all()
        assert (next(clip.read(index))[1] == expected[index]).all()
        shown = np.asarray(Image.open(io.BytesIO(clip.picture(index, 0))))
        assert np.abs(shown.astype(int) - expected[index]).mean() < 12
    assert [index for index, _ in clip.read(55)] == list(range(55, 70))
    assert [stem for stem, _ in clip.frames.read_back(33)] == clip.stems[33::-1]
    assert all((frame == expected[33 - back]).all() for back, (_, frame) in enumerate(clip.frames.read_back(33)))


def test_a_run_is_that_of_segment(project, demo, tmp_path):
    give(project, demo, 0)
    assert follow(project, demo) == list(range(LENGTH))
    report = segment(project.clip.path, project.masks, tmp_path / "out", proposals=demo / "proposals/koi.json", preset="iou")
    assert [read_mask(tmp_path / f"out/{stem}.png").tobytes() for stem in project.clip.stems] == results(project)
    mine = json.loads((project.results / "report.json").read_text())
    assert mine["frames"] == report["frames"] and mine["objects"] == report["objects"]


def test_a_correction_is_followed_up_to_the_next_given_frame(project, demo):
    give(project, demo, 0)
    give(project, demo, 8)
    follow(project, demo)
    before = results(project)
    give(project, demo, 4, objects=(1, 2, 3, 4))
    assert list(project.status) == [DONE] * 5 + [STALE] * 3 + [DONE] * 4
    assert not (project.results / "report.json").exists()
    assert follow(project, demo) == [5, 6, 7]
    after = results(project)
    assert after[:4] == before[:4] and after[8:] == before[8:] and after[4] == truth(demo, 4).tobytes()
    assert (project.results / "report.json").exists()


def test_a_correction_gives_what_a_run_from_the_start_gives(project, demo, tmp_path):
    give(project, demo, 0)
    follow(project, demo)
    give(project, demo, 5, objects=(2,))
    assert list(project.status) == [DONE] * 6 + [STALE] * 6
    assert follow(project, demo) == list(range(6, LENGTH))
    again = open_project(tmp_path / "again.dmm", project.clip.path)
    give(again, demo, 0)
    give(again, demo, 5, objects=(2,))
    follow(again, demo)
    assert results(again) == results(project)
    again.close()


def test_an_object_ends_and_another_begins(project, demo):
    give(project, demo, 0, objects=(1, 2))
    follow(project, demo)
    ids = project.ids(6)
    project.paint(6, np.where(ids == 2, np.uint8(0), ids), [], ends=[2])
    give(project, demo, 6, objects=(3,))
    follow(project, demo)
    assert all(2 not in project.ids(index) for index in range(6, LENGTH))
    assert all(2 in project.ids(index) and 3 not in project.ids(index) for index in range(3))
    assert 3 in project.ids(8) and 1 in project.ids(8)
    project.remove(1)
    assert all(1 not in project.ids(index) for index in range(LENGTH)) and 1 not in read_mask(project.mask_file(0))


def test_objects_that_all_end_and_come_back(project, demo):
    give(project, demo, 2, objects=(1,))
    project.paint(5, project.ids(5), [], ends=[1])
    give(project, demo, 9, objects=(1,))
    follow(project, demo)
    present = [1 in project.ids(index) for index in range(LENGTH)]
    assert present == [False] * 2 + [True] * 3 + [False] * 4 + [True] * 3


def test_a_project_goes_on_after_a_kill(project, demo, tmp_path):
    give(project, demo, 0)
    runner = worker(project, demo, lambda event: None)
    one = runner._one

    def until_6(index, frame):  # not by its event, which may come when four more frames are done
        if index == 6:
            runner._stop.set()
        return one(index, frame)

    runner._one = until_6
    runner.start()
    runner._thread.join()
    assert project.next_open() == 7
    with project._journal.open("a") as journal:
        journal.write('{"frame": 9, "st')  # cut short
    project._lock_file.close()  # as the end of its process does
    again = open_project(project.folder, None)
    assert again.next_open() == project.next_open() and again.given == project.given and again.names == project.names
    follow(again, demo)
    assert again.next_open() is None and all(status == DONE for status in again.status)
    again.close()


def test_segment_resumes_what_the_page_began_and_the_page_takes_it_over(project, demo):
    give(project, demo, 0)
    runner = worker(project, demo, lambda event: event.get("frame") == 4 and runner._stop.set())
    runner.start()
    runner._thread.join()
    stopped = project.next_open()
    project.close()
    segment(project.clip.path, project.masks, project.results, proposals=demo / "proposals/koi.json", preset="iou", resume=True)
    again = open_project(project.folder, None)
    assert 0 < stopped < LENGTH and again.next_open() is None and 4 in project.names
    again.close()


def masks_in(folder) -> list[bytes]:
    return [read_mask(file).tobytes() for file in sorted(folder.glob("0*.png"))]


@pytest.mark.parametrize("end", [8, LENGTH - 1])
@pytest.mark.parametrize("killed", [False, True])
def test_segment_follows_a_correction_that_the_page_did_not(project, demo, tmp_path, states, end, killed):
    give(project, demo, 0)
    follow_until(project, demo, end)
    give(project, demo, 7, objects=(1,))
    assert progress(project) == 7
    give(project, demo, 5, objects=(2,))
    project._lock_file.close() if killed else project.close()
    assert progress(project) == 5 and not (project.results / "report.json").exists()
    report = resume(project, demo)
    assert report["frames"] == resume(project, demo, tmp_path / "fresh")["frames"]
    assert masks_in(project.results) == masks_in(tmp_path / "fresh")
    again = open_project(project.folder, None)
    assert list(again.status) == [DONE] * LENGTH and masks_in(project.results) == results(again)
    again.close()


@pytest.mark.parametrize("held", ["mask", "end"])
@pytest.mark.parametrize("way", ["page", "segment"])
def test_what_is_let_go_is_followed_in_that_frame_too(project, demo, states, held, way):
    give(project, demo, 0)
    follow(project, demo)
    before, ids = results(project), project.ids(5)
    if held == "mask":
        project.paint(5, np.roll(ids, 30, 0), [1, 2, 3, 4])
    else:
        project.paint(5, np.where(ids == 1, np.uint8(0), ids), [], [1])
    follow(project, demo)
    project.paint(5, project.ids(5), [])
    assert list(project.status) == [DONE] * 5 + [STALE] * 7 and progress(project) == 5 and not project.ends
    if way == "page":
        assert follow(project, demo) == list(range(5, LENGTH))
    project.close()
    resume(project, demo)
    assert masks_in(project.results) == before
    again = open_project(project.folder, None)
    assert list(again.status) == [DONE] * LENGTH
    again.close()


def test_segment_follows_a_correction_of_the_last_frame_that_was_made(project, demo, tmp_path, states):
    give(project, demo, 0)
    follow_until(project, demo, 6)
    last = project.next_open() - 1
    give(project, demo, last, objects=(2,))
    assert progress(project) == last
    project.close()
    resume(project, demo)
    resume(project, demo, tmp_path / "fresh")
    assert masks_in(project.results) == masks_in(tmp_path / "fresh")


def test_a_correction_of_the_last_frame_leaves_a_run_finished(project, demo):
    give(project, demo, 0)
    project.close()
    resume(project, demo)
    again = open_project(project.folder, None)
    give(again, demo, LENGTH - 1, objects=(2,))
    again.close()
    assert {"id": 2, "given": True} in resume(project, demo)["frames"][-1]["objects"]
    assert read_mask(again.result_file(LENGTH - 1)).tobytes() == read_mask(project.result_file(LENGTH - 1)).tobytes()


@pytest.mark.parametrize("way", ["last frame", "the page follows", "segment without it"])
def test_an_overlay_is_made_again_after_a_correction(project, demo, tmp_path, states, way):
    overlay, frame = tmp_path / "o.mp4", LENGTH - 1 if way == "last frame" else 5
    give(project, demo, 0)
    project.close()
    resume(project, demo, video=overlay)
    before = overlay.read_bytes()
    again = open_project(project.folder, None)
    give(again, demo, frame, objects=(2,))
    if way == "the page follows":
        follow_until(again, demo, LENGTH - 1)
    again.close()
    if way == "segment without it":
        resume(project, demo)
    resume(project, demo, video=overlay)
    assert overlay.read_bytes() != before


def test_segment_begins_a_run_both_ways_again_after_a_correction(project, demo, tmp_path):
    give(project, demo, 3)
    project.close()
    overlay = tmp_path / "o.mp4"
    resume(project, demo, video=overlay)
    before = overlay.read_bytes()
    again = open_project(project.folder, None)
    give(again, demo, 5, objects=(2,))
    again.close()
    assert resume(project, demo, video=overlay)["settings"]["direction"] == "both"
    assert overlay.read_bytes() != before  # its own is replaced
    resume(project, demo, tmp_path / "fresh")
    assert masks_in(project.results) == masks_in(tmp_path / "fresh")


@pytest.mark.parametrize("end", [8, LENGTH - 1])
def test_segment_does_not_follow_an_object_that_was_removed(project, demo, states, end):
    give(project, demo, 0, objects=(1,))
    give(project, demo, 4, objects=(2,))
    follow_until(project, demo, end)
    project.remove(2)
    if end < LENGTH - 1:
        assert progress(project) == 4
    project.close()
    assert list(resume(project, demo)["objects"]) == ["1"]
    assert all(2 not in read_mask(file) for file in project.results.glob("0*.png"))


def test_the_page_and_segment_do_not_work_in_the_results_at_once(project, demo):
    """While `segment` does, nothing is painted, removed or followed; while the page does, `segment` is refused."""
    give(project, demo, 0)
    before = project.given_ids(0)
    descriptor = hold(project.results)
    for change in (lambda: project.paint(0, np.zeros_like(before), []), lambda: project.remove(1)):
        with pytest.raises(BusyError, match="dmm-fast segment is working there"):
            change()
    with pytest.raises(BusyError):
        worker(project, demo)._follow()
    assert (project.given_ids(0) == before).all() and 1 in project.names
    os.close(descriptor)
    with project.alone(), project.alone(), pytest.raises(RunError, match="another run is working there"):
        resume(project, demo)
    project.remove(1)
    handed = []
    project._hand_back, project.next_open = handed.append, lambda: None  # as after a whole run
    descriptor = hold(project.results)
    project.close()
    os.close(descriptor)
    assert not handed


def test_what_is_stale_stays_so_until_it_has_been_made_again(project, demo):
    give(project, demo, 0)
    follow(project, demo)
    report = (project.results / "report.json").read_text()
    give(project, demo, 5)
    project.close()
    shutil.rmtree(project.results / "unfinished")
    (project.results / "report.json").write_text(report)  # of a run that went on from a frame that was stale
    after = project._journal.stat().st_mtime + 5
    os.utime(project.results / "report.json", (after, after))
    again = open_project(project.folder, None)
    assert list(again.status) == [DONE] * 6 + [STALE] * (LENGTH - 6)
    again.close()


def test_the_timeline_knows_where_objects_are_first_lost(project, monkeypatch):
    monkeypatch.setattr("dmm_fast.app.project.BINS", 3)
    for index, lost in enumerate([(), (1,), (1,), (1, 2), (2,), (), (2,)]):
        project._note(index, DONE, [{"id": label, "score": 0.1, "lost": True} for label in lost])
    assert project.timeline()["lost"] == [1, 3, 6]


def test_a_frame_whose_result_has_gone_is_open(project, demo):
    give(project, demo, 0)
    follow(project, demo)
    project.close()
    project.result_file(7).unlink()
    again = open_project(project.folder, None)
    assert again.next_open() == 7 and again.status[7] == OPEN and again.status.count(DONE) == LENGTH - 1
    again.close()


@pytest.mark.parametrize("content", [b"", b"no picture"])
@pytest.mark.parametrize("way", ["page", "segment"])
def test_a_damaged_result_is_made_again(project, demo, content, way):
    give(project, demo, 0)
    follow(project, demo)
    before = results(project)
    project.close()
    project.result_file(7).write_bytes(content)
    again = open_project(project.folder, None)
    assert not again.ids(7).any() and again.status[7] == OPEN
    again.close()
    again = open_project(project.folder, None)
    assert again.next_open() == 7 and (way == "segment" or follow(again, demo) == [7])
    again.close()
    resume(project, demo)
    assert masks_in(project.results) == before


def test_a_damaged_result_can_be_painted_and_rid_of_an_object(project, demo):
    give(project, demo, 0)
    follow(project, demo)
    for index in (5, 7):
        project.result_file(index).write_bytes(b"")
    give(project, demo, 5, objects=(1,))
    project.remove(2)
    assert project.given[5] == {1} and all(2 not in ids for ids in map(project.ids, range(LENGTH)))
    assert [index for index in range(LENGTH) if project.status[index] == OPEN] == [5, 7]


@pytest.mark.parametrize("way", ["again", "page", "killed"])
def test_a_removal_that_breaks_off_is_finished(project, demo, monkeypatch, way):
    def breaks(path, ids):
        if path == project.result_file(5):
            raise OSError("the disk is full")
        write_mask(path, ids)

    give(project, demo, 0)
    follow(project, demo)
    with monkeypatch.context() as broken:
        broken.setattr("dmm_fast.app.project.write_mask", breaks)
        with pytest.raises(OSError, match="the disk is full"):
            project.remove(2)
    with pytest.raises(ProjectError, match="Object 2 is half removed: remove it again"):
        give(project, demo, 3, objects=(2,))
    if way == "again":
        project.remove(2)
    project._lock_file.close() if way == "killed" else project.close()
    again = open_project(project.folder, None)
    assert 2 not in again.names and all(2 not in ids for ids in map(again.ids, range(LENGTH)))
    assert "removing" not in (project.folder / "project.json").read_text()
    again.close()


def test_a_run_can_be_stopped_before_the_first_mask(project, demo):
    give(project, demo, LENGTH - 1)
    told = []
    runner = worker(project, demo, lambda event: (told.append(event), event.get("frame") == 2 and runner._stop.set()))
    runner.start()
    runner._thread.join()
    assert project.next_open() == 3 and runner.state["message"] == "stopped"
    assert [event["done"] for event in told if "before the first mask" in event.get("message", "")] == [1, 2, 3]


def test_an_object_with_the_id_of_a_removed_one_is_followed_from_its_own_mask(project, demo, states):
    give(project, demo, 0, objects=(1, 2))
    follow_until(project, demo, 4)
    project.remove(2)
    assert project.add_object() == 2
    ids = np.where(truth(demo, 8) == 3, np.uint8(2), np.uint8(0))
    project.paint(8, ids, {2})
    follow(project, demo)
    assert [2 in project.ids(index) for index in range(LENGTH)] == [False] * 8 + [True] * 4
    assert all(1 in project.ids(index) for index in range(8))
    project.paint(2, np.where(truth(demo, 2) == 3, np.uint8(2), project.ids(2)), {2})  # before states that hold nothing of it
    assert not [at for at in project._states() if 2 <= at < 8]
    follow(project, demo)
    assert [2 in project.ids(index) for index in range(9)] == [False] * 2 + [True] * 7


def test_segment_takes_corrections_but_not_ends(project, demo):
    give(project, demo, 0, objects=(1, 2))
    give(project, demo, 7, objects=(1,))
    project.close()
    segment(project.clip.path, project.masks, project.results, proposals=demo / "proposals/koi.json", preset="iou")
    again = open_project(project.folder, None)
    assert list(again.status) == [DONE] * LENGTH and (again.ids(7) == 1).tolist() == (truth(demo, 7) == 1).tolist()
    before = results(again)
    again.status[1:] = bytes([STALE]) * (LENGTH - 1)
    follow(again, demo)
    assert results(again) == before
    ids = again.ids(9)
    again.paint(9, np.where(ids == 2, 0, ids).astype(np.uint8), again.given.get(9, ()), {2})
    follow(again, demo)
    again.close()
    segment(
        project.clip.path, project.masks, project.results, proposals=demo / "proposals/koi.json", preset="iou", overwrite=True
    )
    again = open_project(project.folder, None)
    assert list(again.status) == [DONE] * 9 + [STALE] * (LENGTH - 9)
    again.close()


def test_what_cannot_be_opened(project, demo, tmp_path):
    with pytest.raises(ProjectError, match="open in another"):
        open_project(project.folder, None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ProjectError, match="is not a project"):
        open_project(tmp_path / "other", demo / "JPEGImages/koi")
    with pytest.raises(ProjectError, match="name the clip"):
        open_project(tmp_path / "none", None)
    shutil.copytree(demo / "JPEGImages/koi", tmp_path / "shorter")
    (tmp_path / "shorter/00011.jpg").unlink()
    project._lock_file.close()
    for stored in (project.clip.path, "gone"):  # the clip is where it was, or may have moved
        about = json.loads((project.folder / "project.json").read_text())
        (project.folder / "project.json").write_text(json.dumps({**about, "clip": str(stored)}))
        with pytest.raises(ProjectError, match="another clip"):
            open_project(project.folder, tmp_path / "shorter")
    (project.folder / "project.json").write_text("{}")
    with pytest.raises(ProjectError, match="not the file of a project"):
        open_project(project.folder, None)


def test_a_project_is_that_of_one_clip(demo, tmp_path):
    first, second, moved = (tmp_path / name / "frames" for name in ("scene1", "scene2", "moved"))
    for clip in (first, second):
        shutil.copytree(demo / "JPEGImages/koi", clip)
    open_project(tmp_path / "frames.dmm", first).close()
    with pytest.raises(ProjectError, match=f"another clip, {first}, not of {second}; choose another --project"):
        open_project(tmp_path / "frames.dmm", second)
    (tmp_path / "link").symlink_to(first)
    open_project(tmp_path / "frames.dmm", tmp_path / "link").close()
    moved.parent.mkdir()
    first.rename(moved)
    again = open_project(tmp_path / "frames.dmm", moved)
    assert json.loads((again.folder / "project.json").read_text())["clip"] == str(moved)
    again.close()


def test_nothing_is_painted_for_unknown_objects(project, demo):
    with pytest.raises(ProjectError, match="no object 2"):
        project.paint(0, truth(demo, 0), [1])
    assert not list(project.masks.iterdir()) and list(project.status) == [OPEN] * LENGTH


def test_an_exported_overlay_is_shown_and_heard_as_the_clip(tmp_path):
    stamps = [0, 3000, 9000, 12000, 90000]
    make_video(tmp_path / "clip.mp4", stamps, sound="aac")
    opened = open_project(tmp_path / "clip.dmm", tmp_path / "clip.mp4")
    write, name = EXPORTS["overlay"]
    write(opened, tmp_path / name, lambda done: None)
    opened.close()
    assert shown(tmp_path / name) == pytest.approx(shown(tmp_path / "clip.mp4"), abs=1e-3)
    codec, seconds = seconds_of_sound(tmp_path / name)
    assert codec == "aac" and seconds == pytest.approx(1, abs=0.1)


def test_exports(project, demo, tmp_path):
    give(project, demo, 0)
    project.rename(1, "Kohaku / red")
    follow(project, demo)
    seen: list[int] = []
    for kind, (write, name) in EXPORTS.items():
        write(project, tmp_path / name, seen.append)
        assert seen[-1] == LENGTH, kind
    with zipfile.ZipFile(tmp_path / "masks.zip") as archive:
        names = archive.namelist()
        assert names == [f"{stem}.png" for stem in project.clip.stems]
        image = Image.open(archive.open(names[3]))
        assert image.mode == "P" and (np.asarray(image) == project.ids(3)).all()
    with zipfile.ZipFile(tmp_path / "cut-outs.zip") as archive:
        pixels = np.asarray(Image.open(archive.open("1 Kohaku _ red/00003.png")))
        inside = project.ids(3) == 1
        assert ((pixels[..., 3] == 255) == inside).all() and not pixels[~inside].any()
        assert (pixels[inside][:, :3] == project.clip.frame(3)[inside]).all()
    assert len(list(open_frames(tmp_path / "overlay.mp4").read())) == LENGTH
    from pycocotools import mask as coco

    tracks = json.loads((tmp_path / "tracks.json").read_text())
    assert [entry["name"] for entry in tracks["categories"]][0] == "Kohaku / red" and len(tracks["annotations"]) == 4
    code = tracks["annotations"][1]["segmentations"][5]
    assert (coco.decode(code).astype(bool) == (project.ids(5) == 2)).all()
    resume(project, demo, save=["tracks"])
    theirs = json.loads((project.results / "tracks-youtube-vis.json").read_text())
    assert [{**each, "category_id": 1} for each in tracks["annotations"]] == theirs["annotations"]
    assert [each["category_id"] for each in tracks["annotations"]] == [1, 2, 3, 4] and tracks["videos"] == theirs["videos"]


def test_an_object_that_comes_while_cutouts_are_made(project, demo, tmp_path):
    give(project, demo, 0, objects=(1,))
    write, name = EXPORTS["cutouts"]
    write(project, tmp_path / name, lambda done: done == 3 and give(project, demo, 8, objects=(2,)))
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert "2 Object 2/00008.png" in archive.namelist()

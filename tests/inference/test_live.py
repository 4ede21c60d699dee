"""A stream that a local process sends in real time: followed at its newest frame, until it ends or vanishes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from dmm_fast.model import Proposals
from helpers.sources import patiently, senders

from dmm_fast.commands.main import main
from dmm_fast.data.masks import read_ids
from dmm_fast.data.stream import Stream, is_stream, public_name
from dmm_fast.data.video import FramesError, open_frames
from dmm_fast.inference import live
from dmm_fast.inference.demo import make_clip
from dmm_fast.inference.folder import RunError
from dmm_fast.inference.live import segment_stream, surest

SIZE = (96, 160)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip")
    make_clip(root, seed=7, frames=12, size=SIZE)
    return root


@pytest.fixture
def sent(clip):
    with senders(clip / "JPEGImages/koi") as start:
        yield start


def opened(url, **more):
    return patiently(lambda: Stream(url, **more))


def test_names_of_streams():
    for name in ("camera:0", "/dev/video2", "rtsp://host/live", "UDP://127.0.0.1:5000", "https://host/x.m3u8"):
        assert is_stream(name)
    for name in ("camera", "clip.mp4", "frames/", "camera:a", Path("camera:0"), "/dev/null"):
        assert not is_stream(name)


def test_a_password_is_not_part_of_a_public_name():
    assert public_name("rtsp://me:se@cret@host/door?user@x") == "rtsp://host/door?user@x"
    assert public_name("rtsp://me:secret@host/door") == "rtsp://host/door" and public_name("camera:0") == "camera:0"


def test_the_newest_frame_and_the_end(sent, clip):
    with opened(sent("tcp", count=40)) as stream:
        assert stream.size == SIZE
        taken = []
        for found in stream:
            taken.append(found)
            time.sleep(0.15)  # four frames come in meanwhile
    assert stream.ended == "the source has ended"
    numbers = [found.number for found in taken]
    assert numbers == sorted(set(numbers)) and stream.dropped == numbers[-1] + 1 - len(numbers) > len(numbers)
    assert all(found.frame.shape == (*SIZE, 3) and found.frame.dtype == np.uint8 for found in taken)
    originals = [frame.astype(int) for _, frame in open_frames(clip / "JPEGImages/koi").read()]
    shows = [int(np.argmin([np.abs(found.frame - frame).mean() for frame in originals])) for found in taken]
    steps = np.diff(numbers) % 12
    assert ((np.diff(shows) - steps) % 12 == 0).mean() > 0.8  # neighbours are hardly told apart after coding


def test_a_source_that_vanishes(sent):
    with opened(sent("udp", count=200), patience=3) as stream:
        count = sum(1 for _ in stream)
    assert count > 5 and ("no frame came for 3 s" in stream.ended or "was lost" in stream.ended)


def test_sources_that_cannot_be_opened(tmp_path):
    with pytest.raises(FramesError, match="^rtsp://127.0.0.1:9/door: cannot be opened"):  # a password is not repeated
        Stream("rtsp://me:secret@127.0.0.1:9/door")
    with pytest.raises(FramesError, match="tcp://127.0.0.1:9: cannot be opened"):
        Stream("tcp://127.0.0.1:9")
    with pytest.raises(FramesError, match="camera:77: cannot be opened"):
        Stream("camera:77")


@pytest.fixture
def light(monkeypatch):
    """Without a network: overlap alone, and a detector that finds nothing."""
    none = Proposals(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, *SIZE, dtype=torch.bool))
    monkeypatch.setattr(live, "open_proposer", lambda *_, **__: lambda frame: none)


def test_a_recorded_run(sent, clip, tmp_path, light, capsys):
    masks, out = clip / "Annotations/koi/00000.png", tmp_path / "out"
    words = ["segment", sent("tcp", count=80), "--masks", masks, "--out", out, "--record", "--preset", "iou", "--save", "binary,tracks",
             "--overlay", tmp_path / "o.mp4"]  # fmt: skip
    for _ in range(60):
        if (told := main([str(word) for word in words])) == 0:
            break
        assert "cannot be opened" in capsys.readouterr().err and not out.exists()  # the sender does not listen yet
        time.sleep(0.5)
    assert told == 0 and "were dropped" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    rows = report["frames"]
    assert "the stream ended: the source has ended" in report["notes"] and not (out / "unfinished").exists()
    assert len(rows) > 5 and [row["frame"] for row in rows] == [f"{n:06d}" for n in range(len(rows))]
    assert [row["number"] for row in rows] == sorted({row["number"] for row in rows})
    assert report["speed"]["dropped"] == rows[-1]["number"] + 1 - len(rows)
    assert 0 < report["speed"]["latency"]["mean"] <= report["speed"]["latency"]["max"] < 30
    recorded = open_frames(out / "recording")
    assert recorded.stems == [row["frame"] for row in rows] and len(open_frames(tmp_path / "o.mp4")) == len(rows)
    assert (read_ids(out / "000000.png") == read_ids(masks)).all() and (out / "contact-sheet.png").exists()
    assert len(list((out / "binary/1").iterdir())) == len(rows) and (out / "tracks.json").exists()
    assert main(["explain", str(out), "--quiet"]) == 0 and (out / "explain.html").exists()
    again = main([*map(str, ["segment", out / "recording", "--masks", out / "000000.png", "--out", tmp_path / "again", "--preset", "iou",
                             "--proposals", tmp_path / "none.json", "--quiet"])])  # fmt: skip
    assert again != 0  # no such proposals; with some, a recording is a clip like others


def test_ctrl_c_ends_a_stream(sent, clip, tmp_path):
    url = sent("udp", fps=10, count=600)
    command = [sys.executable, "-m", "dmm_fast", "segment", url, "--masks", str(clip / "Annotations/koi/00000.png"), "--out",
               str(tmp_path / "out"), "--preset", "iou"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    rows = tmp_path / "out/unfinished/rows.jsonl"
    for _ in range(240):
        if rows.exists():
            break
        time.sleep(0.5)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0, told
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "the stream ended: stopped" in report["notes"] and report["frames"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json"]  # nothing is recorded unasked


def test_for_some_seconds_with_the_surest_objects(sent, tmp_path, monkeypatch):
    boxes = torch.tensor([[10.0, 10, 50, 50], [12, 12, 50, 50], [80, 20, 120, 60], [0, 0, 9, 9]])
    masks = torch.zeros(4, *SIZE, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    found = Proposals(boxes, torch.tensor([0.9, 0.8, 0.7, 0.2]), masks)
    ids = surest(found, SIZE, 3)
    assert np.unique(ids).tolist() == [0, 1, 2] and (ids[20:60, 80:120] == 2).all()
    assert np.unique(surest(found, SIZE, 1)).tolist() == [0, 1]
    monkeypatch.setattr(live, "open_proposer", lambda *_, **__: lambda frame: found)
    url = sent("udp", count=500)
    report = segment_stream(url, "auto:2", tmp_path / "out", preset="iou", seconds=1.5)
    assert "the stream ended: after 1.5 s, as asked" in report["notes"] and set(report["objects"]) == {"1", "2"}
    assert report["frames"][-1]["objects"][1]["score"] > 0.9


@pytest.mark.parametrize(
    "more, told",
    [
        ({"save": ["cutout"]}, "cutout of a stream is made of its recorded frames: add --record"),
        ({"proposals": "p.json"}, "p.json: a stream needs a live detector"),
        ({"masks": "auto:0"}, "auto:0: say auto for the surest"),
    ],
)
def test_what_is_refused(sent, tmp_path, light, more, told):
    url = sent("udp", count=500) if "masks" in more else "udp://127.0.0.1:9"
    with pytest.raises(RunError, match=told):
        segment_stream(url, **{"masks": "auto", "out": tmp_path / "out", "preset": "iou", **more})
    assert not (tmp_path / "out").exists()


def test_options_of_files_and_streams_are_told_apart(tmp_path, capsys):
    for words, told in (
        (["camera:0", "--direction", "both"], "--direction is for files"),
        (["camera:0", "--resume"], "--resume is for files"),
        ([str(tmp_path), "--seconds", "3"], "--record and --seconds are for a camera or a stream"),
    ):
        assert main(["segment", *words, "--masks", "m.png", "--out", str(tmp_path / "o")]) == 2
        assert told in capsys.readouterr().err

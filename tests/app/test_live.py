"""A stream that a local process sends, through the page's server: watched, taken, followed, recorded; and what goes wrong with it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from helpers.sources import knows, patiently, senders
from PIL import Image
from starlette.testclient import TestClient

from dmm_fast.app import runs
from dmm_fast.app.live import default_folder
from dmm_fast.app.project import ProjectError, open_project
from dmm_fast.app.server import Studio, create_app
from dmm_fast.app.worker import Settings
from dmm_fast.commands.main import main
from dmm_fast.data.masks import read_mask
from dmm_fast.data.video import open_frames
from dmm_fast.inference import proposing
from dmm_fast.inference.demo import make_clip

SIZE, LENGTH, PORT, TOKEN = (96, 160), 12, 8765, "correct-horse"
OWN = {"origin": f"http://127.0.0.1:{PORT}"}


@pytest.fixture
def sent(demo):
    with senders(demo / "JPEGImages/koi") as start:
        yield start


@pytest.fixture(autouse=True)
def detector(demo, monkeypatch):
    propose = knows(demo / "JPEGImages/koi", demo / "Annotations/koi")
    monkeypatch.setattr(proposing, "open_proposer", lambda *_, **__: propose)
    return propose


class Watched:
    """A server that watches a source, and a page that talks to it."""

    def __init__(self, source: str, folder: Path | None):
        self.studio = Studio(folder, Settings(model={"preset": "iou"}))
        patiently(lambda: self.studio.watch(source))
        self.page = TestClient(create_app(self.studio, TOKEN, PORT), base_url=f"http://127.0.0.1:{PORT}", headers=OWN,
                               raise_server_exceptions=False)  # fmt: skip
        self.page.get(f"/?token={TOKEN}")

    def state(self):
        return self.page.get("/api/state").json()

    def act(self, action, **body):
        return self.page.post(f"/api/live/{action}", json=body)

    def picture(self, after=0, width=1280):
        answer = self.page.get(f"/api/live/picture?after={after}&width={width}")
        return answer, json.loads(answer.headers["x-live"])

    def until(self, holds, seconds=90):
        """The live state, once it is as wanted."""
        for _ in range(int(20 * seconds)):
            if holds(state := self.studio.live.state):
                return state
            time.sleep(0.05)
        raise AssertionError(self.studio.live.state)

    def paint(self, ids):
        labels = ",".join(map(str, np.unique(ids[ids > 0])))
        for label in range(2, int(ids.max()) + 1):
            if label not in self.studio.project.names:
                self.page.post("/api/objects", json={})
        assert self.page.put(f"/api/frames/0/mask?given={labels}", content=runs.encode(ids)).status_code == 200


@pytest.fixture
def watched(tmp_path):
    made: list[Watched] = []

    def start(source, folder=tmp_path / "pond.dmm"):
        made.append(Watched(source, folder))
        return made[-1]

    yield start
    for each in made:
        each.studio.close()


def shown(studio, propose):
    """What the detector sees in the frame that was taken: its masks as ids."""
    masks = propose(studio.project.clip.frame(0)).masks.numpy()
    return np.sum([np.where(mask, label, 0) for label, mask in enumerate(masks, 1)], 0).astype(np.uint8)


def test_from_the_picture_to_a_recording(sent, watched, detector, tmp_path):
    live = watched(sent("tcp", fps=20, count=4000))
    state = live.state()
    assert state["clip"] is None and state["live"]["phase"] == "watching" and state["live"]["size"] == list(SIZE)
    answer, about = live.picture()
    assert answer.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(answer.content)).size == SIZE[::-1]
    later, on = live.picture(about["number"], 320)
    assert on["number"] > about["number"] and later.content != answer.content
    assert live.page.get("/api/frames/0/mask").status_code == 409  # there is no clip yet
    assert not (tmp_path / "pond.dmm").exists()

    assert live.act("take").json()["phase"] == "taken"
    state = live.state()
    assert (state["clip"]["frames"], state["clip"]["name"]) == (1, "pond.dmm")
    taken = open_frames(tmp_path / "pond.dmm/recording")
    assert taken.stems == ["000000"] and taken.size == SIZE
    assert live.act("follow").status_code == 400 and live.act("take").status_code == 400  # no mask yet; taken already
    assert len(live.page.get("/api/frames/0/proposals").json()["items"]) >= 3  # as of any clip

    live.act("back")
    assert live.state()["live"]["phase"] == "watching" and not (tmp_path / "pond.dmm").exists()
    before = state["clip"]["opened"]
    live.act("take")
    assert live.state()["clip"]["opened"] != before  # a browser may still have the other's picture
    ids = shown(live.studio, detector)
    live.paint(ids)
    assert "masks" in live.act("back").json()["error"]

    assert live.act("follow", record=True).json()["phase"] == "following"
    state = live.until(lambda state: state["frames"] >= 8)
    assert 0 < state["latency"] < 10 and 0 < state["mean"] < 10 and state["dropped"] >= 0
    answer, about = live.picture()
    assert about["phase"] == "following" and about["frames"] >= 8 and answer.status_code == 200
    for refused in (live.page.get("/api/frames/0/mask"), live.page.post("/api/run"), live.page.post("/api/exports/masks"),
                    live.page.put("/api/frames/0/mask?given=1", content=runs.encode(ids))):  # fmt: skip
        assert refused.status_code == 409 and "stop first" in refused.json()["error"]

    live.act("stop")
    state = live.until(lambda state: state["phase"] == "done")
    count = state["frames"] + 1
    assert state["ended"] == ""
    now = live.state()
    assert now["live"] is None and now["clip"]["frames"] == count and now["timeline"]["status"] == [1] * count
    assert (
        now["clip"]["fps"] > 1
        and now["run"]["message"] == "done"
        and now["timeline"]["given"] == {"0": list(range(1, ids.max() + 1))}
    )
    recorded = open_frames(tmp_path / "pond.dmm/recording")
    assert recorded.stems == [f"{k:06d}" for k in range(count)]
    fits = []
    for index, (stem, frame) in enumerate(recorded.read()):
        found, masks = read_mask(tmp_path / f"pond.dmm/results/{stem}.png", SIZE), detector(frame).masks.numpy()
        followed = {entry["id"] for entry in live.studio.project.rows[index] if not entry.get("lost")}
        fits += [max((found == label)[mask].mean() for mask in masks) for label in followed if (found == label).any()]
        assert index or (found == ids).all()
    assert np.mean(fits) > 0.7  # they lie on what is there in that very frame
    frame, found = live.studio.live._shown
    drawn = np.asarray(Image.open(io.BytesIO(live.studio.live.picture(0)[1]))).astype(int)
    change = np.abs(drawn - frame).mean(2)
    assert change[found > 0].mean() > 4 * change[found == 0].mean()  # the masks are drawn on the picture
    report = json.loads((tmp_path / "pond.dmm/results/report.json").read_text())
    assert len(report["frames"]) == count and report["recorded"]["ended"] == "stopped"
    assert report["recorded"]["dropped"] == state["dropped"] and report["recorded"]["latency"]["mean"] > 0

    ids = np.zeros(SIZE, np.uint8)  # corrected and followed again, as any clip
    ids[20:50, 20:60] = 1
    assert live.page.put("/api/frames/4/mask?given=1", content=runs.encode(ids)).json()["given"] == [1]
    assert live.state()["timeline"]["status"][5:] == [2] * (count - 5)
    live.page.post("/api/run")
    live.studio.worker._thread.join()
    assert live.state()["timeline"]["status"] == [1] * count
    live.page.post("/api/exports/masks")
    live.studio._export.join()
    assert live.page.get("/api/exports/masks").headers["content-disposition"] == 'attachment; filename="pond-masks.zip"'
    live.studio.close()
    again = open_project(tmp_path / "pond.dmm", None)
    assert len(again.clip) == count and again.clip.fps == now["clip"]["fps"]
    again.close()


def test_a_folder_that_became_a_project_meanwhile_is_kept(sent, watched, demo, tmp_path):
    live, folder = watched(sent("tcp", fps=20, count=4000)), tmp_path / "pond.dmm"
    live.picture()
    open_project(folder, demo / "JPEGImages/koi").close()
    assert "pond.dmm: is a project already" in live.act("take").json()["error"]
    open_project(folder, None).close()


def test_slow_work_drops_frames_and_nothing_grows_unasked(sent, watched, detector, monkeypatch, tmp_path):
    live = watched(sent("tcp", fps=25, count=4000))
    live.act("take")
    live.paint(shown(live.studio, detector))

    def slow(frame):
        time.sleep(0.2)
        return detector(frame)

    monkeypatch.setattr(proposing, "open_proposer", lambda *_, **__: slow)
    live.studio.worker._propose = None
    live.act("follow", record=False)
    state = live.until(lambda state: state["frames"] >= 6)
    assert state["dropped"] >= 2 * state["frames"] and state["latency"] > 0.2 and not state["record"]
    begin = time.monotonic()
    assert live.page.get("/api/state").status_code == 200 and live.picture()[0].status_code == 200
    assert time.monotonic() - begin < 1.5  # the server answers meanwhile
    live.act("stop")
    state = live.until(lambda state: state["phase"] == "taken")  # from here it can be followed again
    folder = tmp_path / "pond.dmm"
    assert [file.name for file in (folder / "recording").iterdir()] == ["000000.jpg"] and not list(
        (folder / "results").iterdir()
    )
    assert live.state()["clip"]["frames"] == 1
    live.act("follow", record=True)
    live.until(lambda state: state["frames"] >= 3)
    live.act("stop")
    live.until(lambda state: state["phase"] == "done")
    assert live.state()["clip"]["frames"] >= 4


def test_the_source_ends_while_it_is_followed(sent, watched, detector):
    live = watched(sent("tcp", fps=20, count=4000))
    live.act("take")
    live.paint(shown(live.studio, detector))
    live.act("follow")
    live.until(lambda state: state["frames"] >= 5)
    sent.last.kill()
    state = live.until(lambda state: state["phase"] == "done")
    assert state["ended"] == "the source has ended" or "was lost" in state["ended"]
    assert live.state()["timeline"]["status"] == [1] * (state["frames"] + 1)
    assert live.studio.project.recorded["ended"] == state["ended"]


def test_a_source_that_ends_too_soon_and_comes_again(sent, watched, detector, tmp_path):
    url = sent("udp", fps=20, count=4000)
    live = watched(url)
    live.studio.live.source = url  # UDP: whoever sends there next is read
    live.picture()
    sent.last.kill()
    state = live.until(lambda state: state["ended"])
    assert "no frame came for 5 s" in state["ended"] or "was lost" in state["ended"]
    assert live.act("take").json()["error"].startswith("no frame can be taken") and not (tmp_path / "pond.dmm").exists()
    assert live.act("follow").status_code == 400
    live.studio.live.source = sent("udp", fps=20, count=4000)
    assert live.act("connect").json()["ended"] == ""
    assert "open already" in live.act("connect").json()["error"]
    live.until(lambda state: state["fps"] > 0)
    live.act("take")
    live.paint(shown(live.studio, detector))
    sent.last.kill()  # while the frame is painted
    live.until(lambda state: state["ended"])
    assert "connect again first" in live.act("follow").json()["error"]
    make_clip(tmp_path / "wide", seed=7, frames=2, size=(48, 160))
    with senders(tmp_path / "wide/JPEGImages/koi") as wide:
        live.studio.live.source = wide("udp", fps=20, count=4000)
        assert "the frames are 160x48 now, the one that was taken is 160x96" in live.act("connect").json()["error"]
    live.studio.live.source = sent("udp", fps=20, count=4000)
    live.act("connect")
    with live.studio.worker.models:
        live.act("follow")
        live.act("stop")  # before the network is there
    live.until(lambda state: state["phase"] == "taken")
    assert live.state()["clip"]["frames"] == 1
    live.act("follow")
    live.until(lambda state: state["frames"] >= 2)
    live.studio.close()  # as after Ctrl-C: what was followed is whole
    report = json.loads((tmp_path / "pond.dmm/results/report.json").read_text())
    assert len(report["frames"]) == len(list((tmp_path / "pond.dmm/recording").iterdir())) >= 3


def test_a_fault_while_following_keeps_what_was_recorded(sent, watched, detector, monkeypatch):
    live = watched(sent("tcp", fps=20, count=4000))
    live.act("take")
    live.paint(shown(live.studio, detector))
    seen = []

    def breaks(frame):
        seen.append(frame)
        if len(seen) > 6:
            raise RuntimeError("the detector is broken")
        return detector(frame)

    monkeypatch.setattr(proposing, "open_proposer", lambda *_, **__: breaks)
    live.studio.worker._propose = None
    live.act("follow")
    state = live.until(lambda state: state["phase"] == "done")
    assert state["ended"] == "the detector is broken" and 2 <= live.state()["clip"]["frames"] <= 7


@pytest.mark.parametrize("path", ["/api/live/picture", "/api/live/take"])
def test_the_live_routes_are_guarded(sent, watched, path):
    live = watched(sent("tcp", fps=20, count=4000))
    method = "GET" if path.endswith("picture") else "POST"
    for headers in ({"origin": "http://evil.example"}, {"origin": "null"}, {**OWN, "sec-fetch-site": "cross-site"}):
        assert live.page.request(method, path, headers=headers).status_code == 403
    assert live.page.request(method, path, headers={"host": "evil.example"}).status_code == 421
    live.page.cookies.clear()
    assert live.page.request(method, path).status_code == 403
    assert live.studio.live.phase == "watching"


def test_what_the_live_routes_refuse(sent, watched):
    live = watched(sent("tcp", fps=20, count=4000))
    tries = [
        (live.page.get("/api/live/picture?after=x"), 400),
        (live.page.get("/api/live/picture?width=31"), 400),
        (live.page.get("/api/live/..%2fstate"), 404),
        (live.act("dance"), 404),
        (live.act("back"), 400),
        (live.page.post("/api/live/take", content=b"{"), 400),
        (live.page.post("/api/clip?name=a.mp4", content=b"0"), 409),
    ]
    assert [answer.status_code for answer, _ in tries] == [expected for _, expected in tries]


def test_sources_that_cannot_be_opened(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.dmm").mkdir()
    (tmp_path / "old.dmm/notes.txt").write_text("keep")
    for words, told in (
        (["camera:77"], "camera:77: cannot be opened"),
        (["tcp://127.0.0.1:9"], "tcp://127.0.0.1:9: cannot be opened"),
        (["camera:0", "--project", "old.dmm"], "old.dmm: exists and is not a project"),
    ):
        assert main(["app", *words, "--no-browser"]) == 2
        assert told in capsys.readouterr().err
    Path("p.json").write_text("[]")
    assert main(["app", "camera:0", "--proposals", "p.json"]) == 2
    assert "a stream needs a live detector" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.dmm", "p.json"]
    with pytest.raises(ProjectError, match="is not a project"):
        Studio(tmp_path / "old.dmm", Settings()).watch("camera:0")


def test_the_command_watches_and_ends_cleanly(sent, tmp_path):
    url = sent("udp", fps=10, count=4000)
    words = [sys.executable, "-m", "dmm_fast", "app", url, "--no-browser", "--port", "0", "--preset", "iou"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
    )
    told = [process.stdout.readline() for _ in range(2)]
    assert re.search(r"live: .*160x96.*127-0-0-1", told[0]), told
    address, token = re.search(r"(http://\S+)/\?token=(\S+)", told[1]).groups()
    request = Request(f"{address}/api/live/take", method="POST", headers={"Authorization": f"Bearer {token}"})
    for _ in range(50):
        try:
            assert json.load(urlopen(request, timeout=20))["phase"] == "taken"
            break
        except OSError:  # it does not listen yet, or has no frame yet
            time.sleep(0.2)
    assert len(list(tmp_path.glob("*.dmm/recording/000000.jpg"))) == 1
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGINT, 130)
    assert not list(tmp_path.iterdir())  # nothing was painted: nothing is left behind


def test_a_folder_is_named_by_source_and_time_without_its_password():
    assert re.fullmatch(r"cam-local-554-door-\d{8}-\d{6}\.dmm", str(default_folder("rtsp://me:secret@cam.local:554/door")))
    assert str(default_folder("camera:0")).startswith("camera-0-2")


def test_a_killed_server_keeps_what_was_recorded(sent, tmp_path, demo):
    url, folder = sent("tcp", fps=10, count=4000), tmp_path / "pond.dmm"
    program = (
        "import sys, time\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from helpers.sources import knows, patiently\n"
        "from dmm_fast.inference import proposing\n"
        "from dmm_fast.app.server import Studio\n"
        "from dmm_fast.app.worker import Settings\n"
        "propose = knows(Path(sys.argv[4]) / 'JPEGImages/koi', Path(sys.argv[4]) / 'Annotations/koi')\n"
        "proposing.open_proposer = lambda *_, **__: propose\n"
        "studio = Studio(Path(sys.argv[2]), Settings(model={'preset': 'iou'}))\n"
        "patiently(lambda: studio.watch(sys.argv[1]))\n"
        "while not studio.live.count: time.sleep(0.1)\n"
        "studio.live.take()\n"
        "mask = propose(studio.project.clip.frame(0)).masks[0].numpy()\n"
        "studio.project.paint(0, mask.astype(np.uint8), [1])\n"
        "studio.live.follow(True)\n"
        "time.sleep(600)\n"
    )
    words = [url, folder, Path(__file__).parents[1], demo]
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, words)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    for _ in range(600):
        if len(list(folder.glob("results/0*.png"))) >= 8:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    frames, masks = (len(list(folder.glob(pattern))) for pattern in ("recording/0*.jpg", "results/0*.png"))
    assert masks >= 8 and frames - masks in (0, 1)
    project = open_project(folder, None)
    assert len(project.clip) == frames and sum(project.status) in (masks - 1, masks) and project.given == {0: {1}}
    assert bool(project.rows[3]) and (project.ids(0) == project.given_ids(0)).all()
    project.close()
    moved = folder.rename(tmp_path / "elsewhere.dmm")
    project = open_project(moved, None)
    assert project.clip.path == moved / "recording" and project.ids(3).shape == SIZE
    project.close()

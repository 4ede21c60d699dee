"""The page in a real browser: from a raw clip to exports, corrections, a killed server, keys alone, a tablet, and a stream."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from helpers.served import served
from helpers.sources import knows, patiently, senders
from PIL import Image
from scipy import ndimage

from dmm_fast.app.project import DONE
from dmm_fast.app.server import Studio, make_server
from dmm_fast.app.worker import Settings
from dmm_fast.data.masks import read_mask
from dmm_fast.data.video import VideoWriter
from dmm_fast.inference import proposing

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
SIZE, LENGTH = (180, 320), 14
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def studio_of(demo, project) -> Studio:
    made = Studio(None, Settings(str(demo / "proposals/koi.json"), model={"preset": "iou"}))
    made.open(project, demo / "JPEGImages/koi")
    return made


@pytest.fixture
def studio(demo, tmp_path):
    return studio_of(demo, tmp_path / "koi.dmm")


@pytest.fixture
def address(studio):
    with served(studio) as url:
        yield url


class Page:
    """A page and what a person does with it. A fault that the page's scripts report fails the test."""

    def __init__(self, browser, address: str, first: str = "shown", **options):
        self.context = browser.new_context(viewport={"width": 1280, "height": 760}, **options)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("pageerror", lambda fault: self.faults.append(str(fault)))
        self.page.on("console", lambda line: self.faults.append(line.text) if line.type == "error" else None)
        self.page.goto(address)
        self.until(first, r"\d+")

    def __getattr__(self, name: str):
        return getattr(self.page, name)

    def until(self, name: str, value: str, timeout: float = 30_000) -> None:
        """The body says in data-NAME what the page is at."""
        self.page.wait_for_function(f"() => /^({value})$/.test(document.body.dataset.{name} ?? '')", timeout=timeout)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What is done inside changes a mask; returns when the server has it."""
        before = self.page.evaluate("() => studio.saves")
        yield
        self.page.wait_for_function(
            f"() => studio.saves > {before} && document.querySelector('#saved').textContent === 'Saved'"
        )

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the frame is on the screen."""
        box = self.page.locator("#stage").bounding_box()
        view = self.page.evaluate("() => { const s = stageView(); return [s.x, s.y, s.scale]; }")
        return box["x"] + view[0] + x * view[2], box["y"] + view[1] + y * view[2]

    def ids(self) -> np.ndarray:
        """The masks that the page shows."""
        runs = self.page.evaluate("() => Array.from(studio.mask.runs())")
        return np.repeat([code & 255 for code in runs], [code >> 8 for code in runs]).astype(np.uint8).reshape(SIZE)

    def pointed(self) -> np.ndarray | None:
        """The proposal that is lit up, bool [H, W]."""
        turns = self.page.evaluate("() => stageView().items[stageView().chosen]?.mask")
        return None if turns is None else np.repeat(np.arange(len(turns)) % 2 == 1, turns).reshape(SIZE)

    def pick(self, wanted: np.ndarray) -> None:
        """Point into an object, turn the wheel until what lights up fits it best, click."""
        depth = ndimage.distance_transform_edt(wanted)
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        self.page.mouse.move(*self.at(x + 0.5, y + 0.5))
        count = self.page.evaluate("() => stageView().candidates().length")
        assert count > 0
        fits = []
        for _ in range(count):
            fits.append(overlap(self.pointed(), wanted))
            self.page.mouse.wheel(0, 100)
        for _ in range(int(np.argmax(fits))):
            self.page.mouse.wheel(0, 100)
        self.page.wait_for_function("() => stageView().chosen >= 0")
        with self.saving():
            self.page.mouse.click(*self.at(x + 0.5, y + 0.5))

    def stroke(self, *points: tuple[float, float]) -> None:
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.at(*point), steps=3)
        self.page.mouse.up()

    def drag(self, *points: tuple[float, float]) -> None:
        with self.saving():
            self.stroke(*points)

    def says(self, text: str) -> None:
        """Waits until this is what the page says of saving."""
        self.page.wait_for_function(f"() => document.querySelector('#saved').textContent === '{text}'")

    def follow(self) -> None:
        self.page.click("#run")
        self.until("run", "running|done", 5_000)
        self.until("run", "done", 60_000)

    def close(self) -> None:
        self.context.close()
        assert not self.faults, self.faults


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def truth(demo, index: int) -> np.ndarray:
    return read_mask(demo / f"Annotations/koi/{index:05d}.png")


def test_from_a_raw_clip_to_exports(browser, address, studio, demo, tmp_path):
    page, project = Page(browser, address), tmp_path / "koi.dmm"
    assert "token" not in page.url  # it would stay in the browser's history
    page.until("proposals", "0")
    first = truth(demo, 0)
    for label in range(1, 5):  # click what is proposed
        if label > 1:
            page.keyboard.press("n")
            page.wait_for_function(f"() => studio.current === {label}")
        page.pick(first == label)
    clicked = page.ids()
    assert min(overlap(clicked == label, first == label) for label in range(1, 5)) > 0.75
    assert (read_mask(project / "masks/00000.png") == clicked).all()

    page.keyboard.press("b")  # paint over a corner, and undo it
    page.keyboard.press("2")
    page.drag((10, 10), (40, 10), (40, 30))
    painted = page.ids()
    assert (painted[8:12, 12:38] == 2).all() and (read_mask(project / "masks/00000.png") == painted).all()
    page.keyboard.press("e")
    page.drag((10, 10), (20, 10))
    assert (page.ids()[8:12, 8:18] == 0).all()
    for _ in range(2):
        with page.saving():
            page.keyboard.press("Control+z")
    assert (page.ids() == clicked).all() and (read_mask(project / "masks/00000.png") == clicked).all()
    with page.saving():
        page.keyboard.press("Control+Shift+z")
    assert (page.ids() == painted).all()
    with page.saving():
        page.keyboard.press("Control+z")

    page.follow()
    scores = [overlap(read_mask(project / f"results/{k:05d}.png") == label, truth(demo, k) == label)
              for k in range(1, LENGTH) for label in range(1, 5) if (truth(demo, k) == label).any()]  # fmt: skip
    assert np.mean(scores) > 0.8
    assert page.inner_text("#progress-text") == f"All {LENGTH} frames done" and page.is_disabled("#run")

    box = page.locator("#timeline").bounding_box()  # scrub
    page.mouse.move(box["x"] + 130, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 40, steps=4)
    page.mouse.up()
    page.keyboard.press("Home")
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    page.until("shown", "6")
    assert (page.ids() == read_mask(project / "results/00006.png")).all()

    page.keyboard.press("p")  # correct a frame: a polygon for object 1
    page.keyboard.press("1")
    for corner in ((60, 20), (120, 20), (120, 60), (60, 60)):
        page.mouse.click(*page.at(*corner))
    with page.saving():
        page.keyboard.press("Enter")
    assert (page.ids()[22:58, 62:118] == 1).all() and page.inner_text("#frame-status") == "given"
    assert set(np.unique(read_mask(project / "masks/00006.png"))) - {0} >= {1}
    corrected = page.ids()
    page.keyboard.press("Enter")  # which has nothing to close, and gives no proposal while this tool is in hand
    page.wait_for_timeout(200)
    assert (page.ids() == corrected).all()
    page.wait_for_function("() => document.querySelector('#run').textContent === 'Run on'")
    before = [(project / f"results/{k:05d}.png").read_bytes() for k in range(6)]
    page.follow()
    assert [(project / f"results/{k:05d}.png").read_bytes() for k in range(6)] == before
    report = json.loads((project / "results/report.json").read_text())
    assert [e for e in report["frames"][6]["objects"] if e.get("given")] and len(report["frames"]) == LENGTH

    page.click("#export-open")  # export
    found = {}
    for kind in ("masks", "overlay", "cutouts", "tracks"):
        row = page.locator(f"#exports li[data-kind={kind}]")
        row.get_by_role("button").click()
        with page.expect_download() as coming:
            row.get_by_role("link", name="Download").click(timeout=20_000)
        found[kind] = Path(coming.value.path()).read_bytes()
    with zipfile.ZipFile(io.BytesIO(found["cutouts"])) as archive:
        cut = np.asarray(Image.open(archive.open("2 Object 2/00003.png")))
    assert ((cut[..., 3] > 0) == (read_mask(project / "results/00003.png") == 2)).all()
    assert (
        found["masks"][:2] == b"PK"
        and found["overlay"][4:8] == b"ftyp"
        and len(json.loads(found["tracks"])["annotations"]) == 4
    )
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.drag((20, 20), (60, 20))
    studio.feed.put({"kind": "export", "name": "masks", "of": LENGTH, "done": 5})
    page.wait_for_timeout(300)
    page.click("#export-open")
    row = page.locator("#exports li[data-kind=masks]")
    assert row.get_by_role("link").inner_text() == "Download (before the last change)"
    assert row.get_by_role("button").is_disabled() and row.get_by_role("button").inner_text() == "36 %"
    page.close()


def test_objects_are_named_end_and_go(browser, address, demo, tmp_path):
    page, project = Page(browser, address), tmp_path / "koi.dmm"
    page.until("proposals", "0")
    page.pick(truth(demo, 0) == 1)
    page.keyboard.press("F2")
    page.keyboard.type("Kohaku")
    page.keyboard.press("Enter")
    page.wait_for_function("() => studio.objects[0].name === 'Kohaku'")
    page.click("#add")
    page.wait_for_function("() => studio.current === 2")
    page.pick(truth(demo, 0) == 2)
    page.follow()
    page.until("shown", str(LENGTH - 1))  # it went along, and may not have come to the end yet
    page.fill("#jump", "9")
    page.keyboard.press("Enter")
    page.until("shown", "8")
    page.locator("#objects li").nth(1).click()
    with page.saving():
        page.keyboard.press("x")
    page.follow()
    assert json.loads((project / "project.json").read_text())["ends"] == {"00008": [2]}
    assert all(2 not in read_mask(project / f"results/{k:05d}.png") for k in range(8, LENGTH))
    assert 2 in read_mask(project / "results/00004.png")
    page.click("#remove")
    page.locator("#confirm").get_by_role("button", name="Remove").click()
    page.wait_for_function("() => studio.objects.length === 1")
    assert 2 not in read_mask(project / "results/00004.png") and 2 not in read_mask(project / "masks/00000.png")
    page.close()


def test_focus_clicks_and_names_outlast_what_changes_meanwhile(browser, address, studio, monkeypatch):
    monkeypatch.setattr("dmm_fast.app.project.BINS", 3)  # as in a long clip, where the timeline has several frames in one
    for index in (6, 7):
        studio.project._note(index, DONE, [{"id": 1, "score": 0.1, "lost": True}])
    page = Page(browser, address)
    page.until("proposals", "0")
    page.keyboard.press("l")
    page.until("shown", "6")
    for label in (2, 3):
        page.keyboard.press("n")
        page.wait_for_function(f"() => studio.current === {label}")
    names = page.locator("#objects .name")
    names.nth(0).focus()
    assert page.evaluate("() => studio.current === 1 && document.activeElement.matches('#objects li:first-child .name')")
    names.nth(2).dblclick()
    page.keyboard.type("Sanke")
    page.keyboard.press("Enter")
    page.wait_for_function("() => studio.objects[2].name === 'Sanke'")
    page.locator("#objects .dot").nth(1).hover()
    page.mouse.down()
    page.evaluate("() => studio.goto(0)")  # as a run does
    page.until("shown", "0")
    page.mouse.up()
    assert page.evaluate("() => studio.current") == 2

    page.focus("#along")
    page.keyboard.press(" ")
    assert not page.is_checked("#along") and page.get_attribute("#play", "aria-label") == "Play"
    page.keyboard.press("Delete")
    page.locator("#confirm").get_by_role("button", name="Remove").click()
    page.wait_for_function("() => studio.objects.length === 2")
    page.keyboard.press("Delete")
    page.mouse.click(5, 700)  # beside the dialog, which closes it
    page.wait_for_function("() => !document.querySelector('#confirm').open")
    page.wait_for_timeout(300)
    assert sorted(studio.project.names) == [1, 3]
    page.close()


def test_painting_during_a_run_and_undoing_after_it(browser, address, studio, demo, tmp_path, monkeypatch):
    page, project, worker, one, last = Page(browser, address), tmp_path / "koi.dmm", studio.worker, studio.worker._one, [2]

    def up_to_the_last(index, frame):
        while index > last[0] and not worker._stop.is_set():
            time.sleep(0.02)
        return one(index, frame)

    page.until("proposals", "0")
    page.pick(truth(demo, 0) == 1)
    page.keyboard.press("n")
    page.wait_for_function("() => studio.current === 2")
    with monkeypatch.context() as slow:
        slow.setattr(worker, "_one", up_to_the_last)
        page.keyboard.press("b")
        page.click("#run")
        page.until("shown", "2")
        page.mouse.move(*page.at(20, 20))
        page.mouse.down()
        for k in range(4):  # while frames are done
            last[0] += 1
            page.mouse.move(*page.at(30 + 10 * k, 20))
            page.wait_for_timeout(150)
        with page.saving():
            page.mouse.up()
        page.until("run", "|stopped")
        assert page.evaluate("() => studio.frame") == 2 and studio.project.given == {0: {1}, 2: {2}}
        assert (page.ids()[20, 20:60] == 2).all() and (read_mask(project / "masks/00002.png")[20, 20:60] == 2).all()

        last[0] = 8
        page.click("#run")
        page.until("shown", "8")
        page.keyboard.press("p")
        for corner in ((60, 20), (120, 20), (120, 60)):
            page.mouse.click(*page.at(*corner))
            last[0] += 1
            page.wait_for_timeout(150)
        with page.saving():
            page.keyboard.press("Enter")
        page.until("run", "|stopped")
        assert studio.project.given == {0: {1}, 2: {2}, 8: {2}} and (page.ids()[22:40, 100:118] == 2).all()

    page.keyboard.press("End")
    page.until("shown", str(LENGTH - 1))
    page.keyboard.press("b")
    page.drag((5, 5), (5, 175), (315, 175))  # around an object that is not there yet
    page.follow()
    page.keyboard.press("End")
    page.until("shown", str(LENGTH - 1))
    page.wait_for_function(f"() => studio.about.frame === {LENGTH - 1} && studio.about.status === 1 && studio.mask.has(1)")
    before = page.ids()
    with page.saving():
        page.keyboard.press("Control+z")
    assert ((page.ids() == 1) == (before == 1)).all() and 2 in before and 2 not in page.ids()

    page.keyboard.press("Home")
    page.until("shown", "0")
    saves = page.evaluate("() => studio.saves")
    for _ in range(2):
        page.keyboard.press("Control+z")
    page.wait_for_function(f"() => studio.saves >= {saves + 2}")
    assert studio.project.given == {0: {1}}

    page.keyboard.press("p")
    page.click("#take")
    before, saves = page.ids(), page.evaluate("() => studio.saves")
    for corner in ((60, 20), (120, 20), (120, 60), (60, 60), (60, 20)):
        page.mouse.click(*page.at(*corner))
    page.wait_for_timeout(300)
    assert (page.ids() == before).all() and page.evaluate("() => [stageView().points.length, studio.saves]") == [0, saves]
    page.close()


def test_keys_are_enough(browser, address, tmp_path):
    page = Page(browser, address)
    page.until("proposals", "0")
    page.focus("#stage")
    page.keyboard.press("Tab")  # to the best proposal, then the next
    page.keyboard.press("Tab")
    lit = page.pointed()
    with page.saving():
        page.keyboard.press("Enter")
    assert lit is not None and ((page.ids() == 1) == lit).all()
    page.keyboard.press("r")
    page.until("run", "done", 60_000)
    page.keyboard.press("ArrowUp")
    page.until("shown", "0")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("+")
    assert page.inner_text("#zoom-value") != page.evaluate(
        "() => { stageView().fit(); return document.querySelector('#zoom-value').textContent; }"
    )
    page.close()


def test_a_stroke_that_could_not_be_saved_is_sent_again(browser, address, tmp_path):
    page = Page(browser, address)
    page.until("proposals", "0")
    page.keyboard.press("b")
    page.route("**/api/frames/0/mask?given=*", lambda route: route.abort())
    page.stroke((20, 20), (60, 20))
    page.says("Not saved")
    painted = page.ids()
    page.keyboard.press("End")  # it is not lost with another frame
    page.until("shown", str(LENGTH - 1))
    assert page.evaluate("() => !dispatchEvent(new Event('beforeunload', { cancelable: true }))")  # it would warn
    page.keyboard.press("Home")
    page.until("shown", "0")
    assert (page.ids() == painted).all() and painted.any() and page.inner_text("#saved") == "Not saved"
    page.unroute("**/api/frames/0/mask?given=*")
    page.says("Saved")
    assert (read_mask(tmp_path / "koi.dmm/masks/00000.png") == painted).all()
    assert any("Not saved" in fault for fault in page.faults)
    page.route("**/api/frames/0/mask?given=*", lambda route: route.fulfill(status=400, json={"error": "no"}))
    page.stroke((20, 90), (60, 90))
    page.wait_for_function("() => studio.saves > 0 && !studio.mask.ids[90 * 320 + 40]")  # what is refused goes
    assert (page.ids() == painted).all()
    page.says("Saved")
    page.faults.clear()
    page.close()


def refused(path: str):
    return lambda answer: path in answer.url and answer.status == 403


def test_a_page_outlives_its_server(browser, demo, tmp_path, monkeypatch):
    with served(studio_of(demo, tmp_path / "koi.dmm")) as address:
        page, port = Page(browser, address), urlsplit(address).port
        page.until("proposals", "0")
    monkeypatch.setattr("helpers.served.make_server", lambda studio, host, _: make_server(studio, host, port))
    page.keyboard.press("b")
    page.stroke((20, 20), (60, 20))
    page.says("Not saved")
    painted = page.ids()
    with served(studio_of(demo, tmp_path / "koi.dmm")) as address:
        with page.expect_response(refused("mask?given")), page.expect_response(refused("/api/events")):
            page.evaluate("() => dispatchEvent(new Event('online'))")
        page.says("Not saved")
        other = page.context.new_page()
        other.goto(address)  # whose token both have then
        page.says("Saved")
        page.until("shown", "0")
        assert painted.any() and (page.ids() == painted).all()
        assert (read_mask(tmp_path / "koi.dmm/masks/00000.png") == painted).all()
        page.follow()  # it hears of the run

    page.evaluate("""() => {
      window.freed = 0;
      const { close } = ImageBitmap.prototype;
      ImageBitmap.prototype.close = function () { freed++; close.call(this); };
    }""")
    page.route("**/api/state", lambda route: route.abort())
    with served(studio_of(demo, tmp_path / "other.dmm")) as address:
        other.goto(address)
        page.stroke((20, 90), (60, 90))  # it does not know of the other project yet
        page.says("Not saved")
        assert not list((tmp_path / "other.dmm/masks").iterdir())
        page.unroute("**/api/state")
        page.wait_for_function("() => studio.folder.endsWith('other.dmm')")
        page.says("Saved")
        assert not page.ids().any() and not list((tmp_path / "other.dmm/masks").iterdir()) and page.evaluate("() => freed") > 0
    page.faults.clear()
    page.close()


def test_a_video_from_the_browser(browser, demo, tmp_path):
    with VideoWriter(tmp_path / "pond.mp4", SIZE, 25) as writer:
        writer.write(np.zeros((*SIZE, 3), np.uint8))
    with served(Studio(tmp_path / "pond.dmm", Settings(str(demo / "proposals/koi.json")))) as address:
        page, sent = browser.new_page(), []
        page.on("request", lambda request: "/api/clip" in request.url and sent.append(request.url))
        page.goto(address)
        page.wait_for_selector("#welcome:not([hidden])")
        assert page.locator(".actions").is_hidden()
        page.set_input_files("#file", tmp_path / "pond.mp4")
        page.wait_for_function("() => document.body.dataset.shown === '0'")
        assert page.locator(".actions").is_visible() and len(sent) == 1
        assert page.evaluate("""() => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(['x'], 'other.mp4'));
          return !dispatchEvent(new DragEvent('drop', { dataTransfer, cancelable: true }));
        }""")  # the browser does not show it either
        page.wait_for_timeout(200)
        assert len(sent) == 1
        page.close()


def test_a_tablet(browser, address, demo):
    page = Page(browser, address, has_touch=True)
    page.set_viewport_size({"width": 1024, "height": 700})
    page.until("proposals", "0")
    depth = ndimage.distance_transform_edt(truth(demo, 0) == 4)
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    with page.saving():
        page.touchscreen.tap(*page.at(x + 0.5, y + 0.5))
    assert page.ids()[y, x] == 1
    page.click("#take")
    with page.saving():
        page.touchscreen.tap(*page.at(x + 0.5, y + 0.5))
    assert page.ids()[y, x] == 0
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")  # nothing hangs out
    page.close()


def start(demo, project, port: int = 0) -> tuple[subprocess.Popen, str]:
    """The command itself, and the address that it prints."""
    words = [
        "app",
        demo / "JPEGImages/koi",
        "--project",
        project,
        "--proposals",
        demo / "proposals/koi.json",
        "--preset",
        "iou",
    ]
    command = [sys.executable, "-m", "dmm_fast", *map(str, words), "--no-browser", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=project.parent
    )
    for line in process.stdout:
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise AssertionError("the server did not start")


def test_a_killed_server_loses_nothing(browser, demo, tmp_path):
    project = tmp_path / "koi.dmm"
    process, address = start(demo, project)
    page = Page(browser, address)
    page.until("proposals", "0")
    page.pick(truth(demo, 0) == 4)
    given = page.ids()
    page.click("#run")
    page.wait_for_function("() => document.querySelector('#progress-bar').value >= 3", timeout=60_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    page.context.close()

    process, address = start(demo, project)
    page = Page(browser, address)
    assert (page.ids() == given).all() and page.inner_text("#frame-status") == "given"
    done = page.evaluate("() => Number(document.querySelector('#progress-bar').value)")
    assert done >= 3
    if done < LENGTH:
        assert page.inner_text("#run") == "Run on"
        page.follow()
    assert len(list((project / "results").glob("0*.png"))) == LENGTH
    page.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (0, -signal.SIGINT, 130)
    assert (project / "results/report.json").exists()


def test_a_stream_from_the_first_look_to_an_export(browser, demo, tmp_path, monkeypatch):
    images, project = demo / "JPEGImages/koi", tmp_path / "pond.dmm"
    propose = knows(images, demo / "Annotations/koi")
    monkeypatch.setattr(proposing, "open_proposer", lambda *_, **__: propose)
    studio = Studio(project, Settings(model={"preset": "iou"}))
    with senders(images) as start:
        url = start("tcp", fps=10, count=4000)
        patiently(lambda: studio.watch(url))
        with served(studio) as address:
            page = Page(browser, address, first="picture")
            assert page.inner_text("#clip-name") == url and "320 × 180" in page.inner_text("#live-facts")
            before = int(page.evaluate("() => document.body.dataset.picture"))
            page.wait_for_function(f"() => document.body.dataset.picture > {before + 3}")  # it goes on
            page.keyboard.press("t")
            page.until("live", "taken")
            page.until("proposals", "0")
            page.keyboard.press("t")
            page.until("live", "watching")
            assert not project.exists()
            page.click("#run")
            page.until("live", "taken")
            page.until("proposals", "0")
            assert page.is_disabled("#run") and page.inner_text("#run") == "Follow live"
            wanted = propose(studio.project.clip.frame(0)).masks.numpy()
            page.pick(wanted[0])
            assert overlap(page.ids() == 1, wanted[0]) > 0.75 and page.is_disabled("#live-back")
            page.keyboard.press("n")
            page.wait_for_function("() => studio.current === 2")
            page.keyboard.press("b")
            y, x = np.argwhere(wanted[1] & ~wanted[0]).mean(0)
            page.drag((x - 8, y), (x + 8, y))
            given = page.ids()
            assert set(np.unique(given)) == {0, 1, 2} and (read_mask(project / "masks/000000.png") == given).all()

            page.click("#run")
            page.until("live", "following")
            page.wait_for_function(
                "() => parseInt(document.querySelector('#live-facts').textContent.split('dropped · ')[1]) >= 6"
            )
            assert re.search(r"[\d.]+ FPS · latency \d+ ms, on average \d+ ms · \d+ dropped", page.inner_text("#live-facts"))
            assert page.inner_text("#live-objects").startswith("1 · Object 1")
            other = Page(browser, address, first="picture")  # it joins in
            assert other.inner_text("#live-state") == "Following"
            page.keyboard.press("r")
            for each in (page, other):
                each.until("live", "")
                each.until("shown", "0")
            other.close()
            count = len(list((project / "recording").iterdir()))
            assert count >= 6 and page.inner_text("#progress-text") == f"All {count} frames done"
            assert (page.ids() == given).all()

            page.keyboard.press("End")  # scrub
            page.until("shown", str(count - 1))
            assert (page.ids() == read_mask(project / f"results/{count - 1:06d}.png")).all()
            page.keyboard.press("2")  # correct one, and follow again
            page.keyboard.press("ArrowLeft")
            page.until("shown", str(count - 2))
            page.drag((20, 20), (60, 20))
            page.follow()
            page.click("#export-open")
            row = page.locator("#exports li[data-kind=masks]")
            row.get_by_role("button").click()
            with page.expect_download() as coming:
                row.get_by_role("link", name="Download").click(timeout=20_000)
            with zipfile.ZipFile(coming.value.path()) as archive:
                assert len(archive.namelist()) == count and coming.value.suggested_filename == "pond-masks.zip"
            page.close()

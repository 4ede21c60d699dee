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
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.served import served
from helpers.sources import knows, patiently, senders
from PIL import Image
from scipy import ndimage

from dmm_fast.app.server import Studio
from dmm_fast.app.worker import Settings
from dmm_fast.data.masks import read_mask
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


@pytest.fixture
def address(demo, tmp_path):
    studio = Studio(None, Settings(str(demo / "proposals/koi.json"), model={"preset": "iou"}))
    studio.open(tmp_path / "koi.dmm", demo / "JPEGImages/koi")
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

    def drag(self, *points: tuple[float, float]) -> None:
        self.page.mouse.move(*self.at(*points[0]))
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*self.at(*point), steps=3)
        with self.saving():
            self.page.mouse.up()

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


def test_from_a_raw_clip_to_exports(browser, address, demo, tmp_path):
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
    page.locator("#objects").get_by_role("button", name="Remove").click()
    page.locator("#confirm").get_by_role("button", name="Remove").click()
    page.wait_for_function("() => studio.objects.length === 1")
    assert 2 not in read_mask(project / "results/00004.png") and 2 not in read_mask(project / "masks/00000.png")
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
    page, said = Page(browser, address), "() => document.querySelector('#saved').textContent === "
    page.until("proposals", "0")
    page.keyboard.press("b")
    page.route("**/api/frames/0/mask?given=*", lambda route: route.abort())
    page.mouse.move(*page.at(20, 20))
    page.mouse.down()
    page.mouse.move(*page.at(60, 20), steps=3)
    page.mouse.up()
    page.wait_for_function(f"{said}'Not saved'")
    painted = page.ids()
    page.keyboard.press("End")  # it is not lost with another frame
    page.until("shown", str(LENGTH - 1))
    assert page.evaluate("() => !dispatchEvent(new Event('beforeunload', { cancelable: true }))")  # it would warn
    page.keyboard.press("Home")
    page.until("shown", "0")
    assert (page.ids() == painted).all() and painted.any() and page.inner_text("#saved") == "Not saved"
    page.unroute("**/api/frames/0/mask?given=*")
    page.wait_for_function(f"{said}'Saved'")
    assert (read_mask(tmp_path / "koi.dmm/masks/00000.png") == painted).all()
    assert any("Not saved" in fault for fault in page.faults)
    page.faults.clear()
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

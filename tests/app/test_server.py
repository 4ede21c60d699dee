"""The server, without a browser: who may talk to it, what it refuses, and that nothing outside the project is read or written."""

from __future__ import annotations

import io
import json
import queue
from urllib.parse import urlsplit

import numpy as np
import pytest
from helpers.served import raw, served
from PIL import Image
from starlette.testclient import TestClient

from dmm_fast.app import runs
from dmm_fast.app.exports import EXPORTS
from dmm_fast.app.server import SMALL_BODY, Feed, Studio, create_app, make_server, serve
from dmm_fast.app.worker import Settings
from dmm_fast.commands.main import main
from dmm_fast.data.masks import read_mask
from dmm_fast.data.video import VideoWriter
from dmm_fast.inference.demo import make_clip

SIZE, LENGTH, PORT, TOKEN = (48, 80), 5, 8765, "correct-horse"
OWN = {"origin": f"http://127.0.0.1:{PORT}"}


@pytest.fixture
def studio(demo, tmp_path):
    made = Studio(tmp_path / "koi.dmm", Settings(str(demo / "proposals/koi.json"), model={"preset": "iou"}))
    made.open(tmp_path / "koi.dmm", demo / "JPEGImages/koi")
    yield made
    made.close()


def client(studio, **headers) -> TestClient:
    app = create_app(studio, TOKEN, PORT)
    return TestClient(app, base_url=f"http://127.0.0.1:{PORT}", headers=headers, raise_server_exceptions=False)


@pytest.fixture
def page(studio):
    """As the page itself, with its cookie and origin."""
    made = client(studio, **OWN)
    assert made.get(f"/?token={TOKEN}").status_code == 200
    return made


def square(label: int = 1) -> bytes:
    ids = np.zeros(SIZE, np.uint8)
    ids[10:30, 20:50] = label
    return runs.encode(ids)


def test_the_page_comes_with_a_cookie_and_a_policy(studio):
    answer = client(studio).get(f"/?token={TOKEN}")
    assert answer.status_code == 200 and "<title>" in answer.text
    cookie = answer.headers["set-cookie"]
    assert f"dmm_fast_{PORT}={TOKEN}" in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
    assert "style=" not in answer.text and "onclick=" not in answer.text  # which the policy would not run


def test_the_browser_is_given_a_token_that_is_good_once(studio, capsys, monkeypatch):
    """Every user of the machine can read what a browser was started with."""
    opened, answers = queue.Queue(), []

    def visit(server, sockets):
        origin, told = opened.get(timeout=5).split("/?")
        one, other = (TestClient(server.config.app, base_url=origin) for _ in range(2))
        answers.extend([one.get(f"/?{told}"), other.get(f"/?{told}"), one.get(f"/?{told}"), other.get("/?token=")])
        assert told not in capsys.readouterr().out

    monkeypatch.setattr("webbrowser.open", opened.put)
    monkeypatch.setattr("uvicorn.Server.run", visit)
    serve(studio, "127.0.0.1", 0, browser=True)
    assert [answer.status_code for answer in answers] == [200, 403, 200, 403]


@pytest.mark.parametrize(
    "path", ["/", "/?token=wrong", "/?token=", "/static/main.js", "/api/state", "/api/frames/0/picture", "/api/events"]
)
def test_without_the_token_nothing_is_told(studio, path):
    answer = client(studio).get(path)
    assert answer.status_code == 403 and "token" in answer.json()["error"] and "set-cookie" not in answer.headers


@pytest.mark.parametrize("cookie", [f"dmm_fast_{PORT}=wrong", f"dmm_fast_1={TOKEN}", "dmm_fast_8765", "=;=;\\x00", "a" * 5000])
def test_a_wrong_cookie_does_not_open(studio, cookie):
    assert client(studio, cookie=cookie).get("/api/state").status_code == 403


def test_a_program_may_send_the_token_as_a_bearer(studio):
    program = client(studio, authorization=f"Bearer {TOKEN}")
    assert program.get("/api/state").status_code == 200
    assert program.post("/api/objects", json={}).status_code == 200
    assert client(studio, authorization=f"Basic {TOKEN}").get("/api/state").status_code == 403


@pytest.mark.parametrize("host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1.evil.example", "", "[", "localhost.evil"])
def test_another_host_name_is_refused(page, host):
    answer = page.get("/api/state", headers={"host": host})
    assert answer.status_code in (400, 421)


@pytest.mark.parametrize("host", [f"localhost:{PORT}", f"127.0.0.1:{PORT}", f"[::1]:{PORT}"])
def test_its_own_names_are_taken(page, host):
    assert page.get("/api/state", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": f"https://127.0.0.1:{PORT}"},
        {"origin": "http://127.0.0.1:9999"},
        {**OWN, "sec-fetch-site": "cross-site"},
        {**OWN, "sec-fetch-site": "same-site"},
    ],
)
def test_a_page_of_another_origin_changes_and_reads_nothing(page, studio, headers):
    for method, path in (
        ("POST", "/api/run"),
        ("POST", "/api/objects"),
        ("PUT", "/api/frames/0/mask?given=1"),
        ("GET", "/api/state"),
    ):
        assert page.request(method, path, headers=headers, content=square() if method == "PUT" else None).status_code == 403
    assert list(studio.project.names) == [1] and not list(studio.project.masks.iterdir())


def test_a_change_without_an_origin_needs_the_bearer(studio):
    program = client(studio, cookie=f"dmm_fast_{PORT}={TOKEN}")
    assert program.get("/api/state").status_code == 200 and program.post("/api/run").status_code == 403


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2fserver.py", "/static/%2e%2e%2f%2e%2e%2fpyproject.toml", "/static/", "/static/.htaccess", "/etc/passwd",
        "/api/frames/-1/mask", "/api/frames/5/mask", "/api/frames/1e3/mask", "/api/frames/..%2f0/mask",
        "/api/exports/..%2fproject.json", "/api/exports/masks", "/api/exports/%2Fetc%2Fpasswd",
    ],
)  # fmt: skip
def test_no_path_leads_out(page, path):
    answer = page.get(path)
    assert answer.status_code == 404 and "def " not in answer.text and "root:" not in answer.text


def test_no_path_leads_out_that_no_client_would_send(studio):
    with served(studio) as address:
        token, port = address.split("=")[1], urlsplit(address).port
        paths = (
            "/static/../server.py",
            "/static/../../../pyproject.toml",
            "//etc/passwd",
            "/static//etc/passwd",
            "/..",
            "/static/\x00",
        )
        for path in paths:
            answer = raw(
                address,
                f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n",
            )
            assert answer.split()[1] in ("400", "404") and "def " not in answer and "root:" not in answer, path
        answer = raw(address, f"GET /api/state HTTP/1.1\r\nHost: evil.example:{port}\r\nConnection: close\r\n\r\n")
        assert answer.split()[1] == "421"


def test_large_and_broken_bodies_are_refused_and_change_nothing(page, studio):
    limit = 4 * SIZE[0] * SIZE[1]
    tries = [
        (page.put("/api/frames/0/mask?given=1", content=bytes(limit + 4)), 413),
        (page.put("/api/frames/0/mask?given=1", content=iter([bytes(limit)] * 3)), 413),  # which does not say how long it is
        (page.put("/api/frames/0/mask?given=1", content=b"abc"), 400),
        (page.put("/api/frames/0/mask?given=1", content=square()[:-4]), 400),
        (page.put("/api/frames/0/mask?given=9", content=square(9)), 400),
        (page.put("/api/frames/0/mask?given=0", content=square()), 400),
        (page.put("/api/frames/0/mask?given=../1", content=square()), 400),
        (page.put("/api/frames/9/mask?given=1", content=square()), 404),
        (page.post("/api/objects", content=b"x" * (SMALL_BODY + 1)), 413),
        (page.post("/api/objects", content=b"{"), 400),
        (page.post("/api/objects", json=["a"]), 400),
        (page.post("/api/objects", json={"name": 3}), 400),
        (page.patch("/api/objects/1", json={"name": "x" * 61}), 400),
        (page.patch("/api/objects/7", json={"name": "x"}), 400),
        (page.delete("/api/objects/7"), 400),
        (page.get("/api/frames/0/picture?width=100000"), 400),
        (page.get("/api/frames/0/proposals/999"), 404),
        (page.get("/api/events?since=x"), 400),
        (page.post("/api/exports/everything"), 404),
        (page.post("/api/clip?name=a.mp4", content=b"0"), 409),
        (page.post("/api/run"), 400),  # no mask yet
        (page.delete("/api/state"), 405),
    ]
    assert [answer.status_code for answer, _ in tries] == [expected for _, expected in tries]
    assert all(answer.json()["error"] for answer, expected in tries if expected != 405)
    assert list(studio.project.names) == [1] and not list(studio.project.masks.iterdir())


def test_a_stroke_is_saved_at_once_and_comes_back(page, studio):
    answer = page.put("/api/frames/2/mask?given=1", content=square())
    assert answer.json() == {"frame": 2, "status": 0, "given": [1], "ends": [], "objects": []}
    assert (read_mask(studio.project.folder / "masks/00002.png") == runs.decode(square(), SIZE)).all()
    again = page.get("/api/frames/2/mask")
    assert again.content == square() and json.loads(again.headers["x-frame"])["given"] == [1]
    page.put("/api/frames/2/mask", content=runs.encode(np.zeros(SIZE, np.uint8)))
    assert not list(studio.project.masks.glob("*.png"))


def test_pictures_and_proposals(page, studio, demo):
    answer = page.get("/api/frames/1/picture?width=1280")
    assert answer.headers["content-type"] == "image/jpeg"
    found = page.get("/api/frames/1/proposals").json()
    truth = read_mask(demo / "Annotations/koi/00001.png")
    best = {}
    for item in found["items"]:
        mask = runs.decode(page.get(f"/api/frames/1/proposals/{item['number']}").content, SIZE) > 0
        bits = np.repeat(np.arange(len(item["mask"])) % 2 == 1, item["mask"]).reshape(found["height"], found["width"])
        assert (bits == mask).all() and bits.sum() == item["area"]  # the clip is small: it is shown whole
        for label in np.unique(truth[truth > 0]):
            own = truth == label
            best[label] = max(best.get(label, 0), (mask & own).sum() / (mask | own).sum())
    assert min(best.values()) > 0.6


def test_the_packaged_detector_proposes(tmp_path):
    make_clip(tmp_path / "larger", seed=7, frames=1, size=(240, 432))
    studio = Studio(None, Settings())
    studio.open(tmp_path / "koi.dmm", tmp_path / "larger/JPEGImages/koi")
    page = client(studio, **OWN)
    page.get(f"/?token={TOKEN}")
    found = page.get("/api/frames/0/proposals").json()
    fish = read_mask(tmp_path / "larger/Annotations/koi/00000.png") > 0
    inside = [np.repeat(np.arange(len(item["mask"])) % 2 == 1, item["mask"]).reshape(240, 432) for item in found["items"]]
    assert (found["height"], found["width"]) == (240, 432) and 3 <= len(inside) <= 40
    assert max((mask & fish).sum() / mask.sum() for mask in inside) > 0.8  # one of them lies on a fish
    first = page.get(f"/api/frames/0/proposals/{found['items'][0]['number']}").content
    assert ((runs.decode(first, (240, 432)) > 0) == inside[0]).all()
    studio.close()


def test_a_run_and_an_export_by_http_alone(page, studio):
    page.put("/api/frames/0/mask?given=1", content=square())
    assert page.post("/api/run").json()["running"]
    studio.worker._thread.join()
    state = page.get("/api/state").json()
    assert state["run"]["message"] == "done" and state["timeline"]["status"] == [1] * LENGTH
    page.post("/api/exports/masks")
    studio._export.join()
    answer = page.get("/api/exports/masks")
    assert answer.content[:2] == b"PK" and "koi-masks.zip" in answer.headers["content-disposition"]
    kinds = [json.loads(text)["kind"] for _, text in studio.feed.since(0)]
    assert kinds.count("frame") == LENGTH and "export" in kinds


def test_an_export_from_before_a_change_says_so(page, studio, monkeypatch):
    write, name = EXPORTS["masks"]

    def paint(index: int) -> None:
        studio.project.paint(index, runs.decode(square(), SIZE), [1])

    def export() -> dict:
        page.post("/api/exports/masks")
        studio._export.join()
        return page.get("/api/state").json()["exports"]

    paint(0)
    assert page.get("/api/state").json()["exports"] == {} and export() == {"masks": False}
    paint(1)
    assert page.get("/api/state").json()["exports"] == {"masks": True} and export() == {"masks": False}
    meanwhile = (lambda project, path, _: write(project, path, lambda done: done == 2 and paint(2)), name)
    monkeypatch.setitem(EXPORTS, "masks", meanwhile)
    assert export() == {"masks": True}


def test_a_page_of_another_clip_changes_and_reads_nothing(page, studio):
    requests = (
        ("GET", "/api/frames/0/picture?"), ("GET", "/api/frames/0/mask?"), ("PUT", "/api/frames/0/mask?given=1&"),
        ("POST", "/api/objects?"), ("DELETE", "/api/objects/1?"), ("POST", "/api/exports/masks?"), ("POST", "/api/run?"),
    )  # fmt: skip
    for method, path in requests:
        answer = page.request(method, f"{path}of=before", content=square() if method == "PUT" else None)
        assert answer.status_code == 410 and answer.json()["error"] == "another clip, or a new server, is here now"
    assert list(studio.project.names) == [1] and not list(studio.project.masks.iterdir()) and studio._export is None
    of = page.get("/api/state").json()["clip"]["opened"]
    assert page.put(f"/api/frames/0/mask?given=1&of={of}", content=square()).status_code == 200


def test_painting_stops_a_run_which_then_goes_on_from_there(page, studio):
    page.put("/api/frames/0/mask?given=1", content=square())
    page.post("/api/run")
    assert page.put("/api/frames/3/mask?given=1", content=square()).status_code == 200
    assert not studio.worker.running and page.get("/api/state").json()["run"]["message"] == ""
    page.post("/api/run")
    studio.worker._thread.join()
    assert page.get("/api/state").json()["run"]["done"] == LENGTH
    assert page.get("/api/frames/3/mask").content == square()
    objects = json.loads(page.get("/api/frames/3/mask").headers["x-frame"])["objects"]
    assert objects == [{"id": 1, "given": True}]


def test_a_fault_of_a_run_is_told(page, studio, monkeypatch):
    page.put("/api/frames/0/mask?given=1", content=square())
    monkeypatch.setattr(studio.project.clip, "read", lambda start=0: (_ for _ in ()).throw(ValueError("frame 0 is damaged")))
    page.post("/api/run")
    studio.worker._thread.join()
    run = page.get("/api/state").json()["run"]
    assert run["error"] == "frame 0 is damaged" and not run["running"]
    monkeypatch.undo()
    page.post("/api/run")
    studio.worker._thread.join()
    assert page.get("/api/state").json()["run"]["done"] == LENGTH


def test_the_feed_keeps_one_timeline_of_each_page():
    feed = Feed()
    for k in range(3):
        feed.put({"kind": "changed", "by": "a", "timeline": k})
        feed.put({"kind": "changed", "by": "b", "timeline": k})
        feed.put({"kind": "run"})
    assert [count for count, _ in feed.since(0)] == [3, 6, 7, 8, 9] and json.loads(feed.since(7)[0][1])["timeline"] == 2
    for _ in range(5000):
        feed.put({"kind": "run"})
    assert len(feed.since(0)) == 4096


def short_video(folder) -> bytes:
    with VideoWriter(folder / "pond.mp4", SIZE, 25) as writer:
        for k in range(3):
            writer.write(np.full((*SIZE, 3), 60 * k, np.uint8))
    return (folder / "pond.mp4").read_bytes()


def test_a_page_hears_that_a_result_is_damaged(page, studio):
    page.put("/api/frames/0/mask?given=1", content=square())
    page.post("/api/run")
    studio.worker._thread.join()
    studio.project.result_file(3).write_bytes(b"")
    assert json.loads(page.get("/api/frames/3/mask").headers["x-frame"])["status"] == 0
    event = json.loads(studio.feed.since(0)[-1][1])
    assert event["kind"] == "changed" and event["timeline"]["status"] == [1, 1, 1, 0, 1]


def test_an_upload_after_one_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video, folder = short_video(tmp_path), tmp_path / "pond.dmm"
    folder.mkdir()
    for name in (".lock", ".pond.mp4.77.tmp"):
        (folder / name).write_bytes(b"")
    made = Studio(None, Settings())
    page = client(made, authorization=f"Bearer {TOKEN}")
    assert page.post("/api/clip?name=pond.mp4", content=video[:500]).status_code == 400
    assert folder.exists() and not list(folder.iterdir())  # it was there, and empty
    (folder / "pond.mp4").write_bytes(b"half")
    told = page.post("/api/clip?name=pond.mp4", content=video).json()["error"]
    assert told == "pond.dmm: exists and is not a project; choose another --project"
    (folder / "pond.mp4").rename(folder / ".pond.mp4.77.tmp")
    assert page.post("/api/clip?name=pond.mp4", content=video).status_code == 200
    assert len(made.project.clip) == 3 and not list(folder.glob(".*.tmp"))
    made.close()
    again = client(Studio(None, Settings()), authorization=f"Bearer {TOKEN}")
    told = again.post("/api/clip?name=pond.mp4", content=video).json()["error"]
    assert told.startswith("pond.dmm: is a project already: dmm-fast app --project pond.dmm opens it")


def test_an_upload_that_is_cut_off_leaves_no_video(tmp_path):
    """Until all of it has come, it has another name, and no other clip is taken."""
    made, seen, refused = Studio(tmp_path / "new.dmm", Settings()), [], []
    page, other = (client(made, authorization=f"Bearer {TOKEN}") for _ in range(2))

    def parts():
        for _ in range(2):
            yield b"half"
            seen.extend(path.name for path in (tmp_path / "new.dmm").glob("*.mp4"))
            refused.append(other.post("/api/clip?name=river.mp4", content=b"whole").json()["error"])

    page.post("/api/clip?name=pond.mp4", content=parts())
    assert not seen and not (tmp_path / "new.dmm").exists()
    assert len(refused) == 2 and refused[0].startswith("another clip is being uploaded; wait for it")


def test_an_upload_becomes_a_project(tmp_path):
    video = short_video(tmp_path)
    made = Studio(tmp_path / "new.dmm", Settings(), upload_limit=len(video))
    page = client(made, **OWN)
    page.get(f"/?token={TOKEN}")
    assert page.get("/api/state").json()["clip"] is None and page.get("/api/frames/0/mask").status_code == 409
    assert page.post("/api/clip?name=pond.mp4", content=video + b"0").status_code == 413
    assert page.post("/api/clip?name=pond.mp4", content=video[:500]).status_code == 400
    assert page.post("/api/clip?name=../../x.png", content=video).status_code == 400
    assert page.post("/api/clip?name=../../pond.mp4", content=video).status_code == 200
    assert made.project.folder == tmp_path / "new.dmm" and page.get("/api/state").json()["clip"]["frames"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"pond.mp4", "new.dmm"}
    made.close()


def test_it_listens_at_this_machine_only_and_says_where_a_port_is_taken():
    server, listener, address = make_server(Studio(None, Settings()), "127.0.0.1", 0)
    host, port = listener.getsockname()
    assert host == "127.0.0.1" and address.startswith(f"http://127.0.0.1:{port}/?token=") and len(address.split("=")[1]) >= 32
    with pytest.raises(OSError, match=f"127.0.0.1:{port} cannot be listened at"):
        make_server(Studio(None, Settings()), "127.0.0.1", port)
    listener.close()


def test_the_command_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, told in (
        (["nothing.mp4"], "no such directory or video file"),
        (["clip.mp4", "--proposals", "p.json"], "no such proposals file"),
        (["--device", "nowhere"], "nowhere"),
    ):
        assert main(["app", *words]) == 2
        assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["app", "--help"])
    assert "PROJECT/masks" in capsys.readouterr().out


def test_a_picture_of_a_small_clip_is_not_enlarged(page):
    assert Image.open(io.BytesIO(page.get("/api/frames/0/picture?width=1280").content)).size == SIZE[::-1]

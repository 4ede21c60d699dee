"""docs/benchmarks.md is what benchmarks/page.py writes from the stored measurements, and names every peer that is faster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = ("given", "live", "detail given", "detail live")  # ways of ours, as benchmarks/page_text.py has them
STORED = ROOT / "docs" / "benchmarks"


def run(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / "page.py", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)


def written(stored: Path, page: Path) -> str:
    result = run("write", "--stored", stored, "--page", page)
    assert result.returncode == 0, result.stderr
    return page.read_text()


def test_the_page_is_what_is_stored(tmp_path):
    message = "docs/benchmarks.md is not what is stored: python benchmarks/page.py write"
    assert written(STORED, tmp_path / "page.md") == (ROOT / "docs" / "benchmarks.md").read_text(), message


@pytest.mark.parametrize("path", sorted(STORED.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_stored_says_how_it_came_about(path):
    stored = json.loads(path.read_text())
    assert {"date", "command", "machine", "versions"} <= stored.keys()
    assert {"dmm_fast", "commit"} <= stored["machine"].keys() and stored["machine"].keys() & {"CPU", "GPU"}
    assert "--quick" not in stored["command"]
    assert not re.search(r'["= ]/\w', path.read_text()), "a path of the machine"


def test_a_section_is_measured_and_written(tmp_path):
    result = run("measure", "assignment", "--quick", "--rounds", "1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "assignment.json").read_text())
    row = next(row for row in stored["rows"] if row["peer"] == "scipy")
    assert row["ratio"] == pytest.approx(row["peer us per problem"] / row["us per problem"], rel=1e-2)
    page = written(tmp_path, tmp_path / "page.md")
    assert stored["command"] in page and stored["machine"]["commit"] in page and f"scipy {stored['versions']['scipy']}" in page
    assert "| 5 x 50, 1024" in page
    assert "Not measured yet: `python benchmarks/page.py measure layer`" in page


def test_a_run_on_a_gpu_is_stored(tmp_path):
    machine = {"table": "machine", "dmm_fast": "1", "commit": "0123456789", "GPU": "H", "torch": "2"}
    layer = {"table": "match", "case": "c", "batch": 1, "n": 5, "m": 50, "n_grad": 40, "backward": False, "kernel": 1, "call": 1,
             "peers": {}, "skipped": {}}  # fmt: skip
    suite = [
        {
            "table": "vision",
            "complete": complete,
            "text": f"| head |\n| --- |\n| mask_iou, cuda | {us} | peer | 9 | 1x | - | - |",
        }
        for complete, us in ((False, 3), (True, 4))
    ]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in (machine, layer, *suite)))
    assert run("gpu", results, "--out", tmp_path).returncode == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["us per problem"] for row in stored["vision"]] == [4] and stored["machine"]["commit"] == "0123456789"
    with results.open("a") as file:
        file.write(json.dumps(machine | {"commit": "another"}) + "\n")
    result = run("gpu", results, "--out", tmp_path)
    assert result.returncode == 1 and "rows of 2 commits" in result.stderr


def test_the_study_of_clusters_deletes_and_compares_its_own_alone(tmp_path):
    for name in ("mine/notes.txt", "out/clip/frame_7.png", "out/clip/contact-sheet.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    command = [sys.executable, ROOT / "benchmarks" / "cluster.py", tmp_path / "data", "--work", tmp_path / "mine"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 1 and "was not made by this script" in result.stderr and (tmp_path / "mine/notes.txt").exists()
    code = f"from pathlib import Path; import cluster; print(*cluster.masks(Path({str(tmp_path / 'out')!r})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "benchmarks")
    assert result.stdout == "clip/frame_7.png\n", result.stderr


@pytest.mark.parametrize("section", ["layer", "assignment", "vision"])
def test_a_faster_peer_is_named(section, tmp_path):
    shutil.copy(STORED / f"{section}.json", tmp_path)
    stored = json.loads((tmp_path / f"{section}.json").read_text())
    row = next(row for row in stored["rows"] if not row["case"].startswith("match_prices"))
    row["ratio"] = 0.5
    (tmp_path / f"{section}.json").write_text(json.dumps(stored))
    assert " is faster: " in (page := written(tmp_path, tmp_path / "page.md")) and "(0.50x)" in page


def test_a_more_accurate_method_is_named():
    rows = json.loads((STORED / "accuracy.json").read_text())["rows"]
    closing = (ROOT / "docs" / "benchmarks.md").read_text().rpartition("**What is slower or worse.**")[2]
    ways = {f"dmm_fast, {way}" for way in OWN}
    own: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["way"] in ways:
            own.setdefault((row["set"], row["video"]), []).append(row["J"])
    others = [row for row in rows if row["way"] not in ways]
    assert {row["way"] for row in others} >= {"OSVOS", "RGMP", "STM"}
    for row in others:
        better = row["J"] > min(own[row["set"], row["video"]])
        assert (f"{row['way']} on {row['video']} (" in closing) == better


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("measure", "speed"), "'speed': must be one of layer, assignment, vision, segmenter, accuracy"),
        (("measure", "accuracy"), "accuracy needs --data FOLDER"),
        (("measure", "accuracy", "--data", "nowhere"), "nowhere/davis16-train/JPEGImages/breakdance-flare"),
        (("measure", "segmenter", "--peer", "cutie=nowhere"), "a clone of https://github.com/hkchengrex/Cutie"),
        (("gpu", "nowhere.jsonl"), "no such file: nowhere.jsonl"),
        (("gpu", STORED / "layer.json"), "is it results.jsonl of gpu_report.py?"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_measured(words, said, tmp_path):
    result = run(*words, "--out", tmp_path)
    assert result.returncode not in (0, None) and said in result.stderr, result.stderr
    assert not list(tmp_path.iterdir())

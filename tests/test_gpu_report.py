"""gpu_report.py without a GPU: it ends with its tables, and a second call goes on where the first was cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_report.py"
STAGES = ("tests", "steps", "parts", "videos", "sanitizer", "decisions", "layer", "vision")
TITLES = (
    "A frame of",
    "Videos at once",
    "A live frame",
    "Decisions, 5x50",
    "Ours at 2x2",
    "Forward, us per call",
    "Peak memory",
    "Mask IoU",
)


def report(out: Path, *options: str) -> subprocess.CompletedProcess:
    # The report runs pytest itself; pytest-benchmark refuses to measure where it sees that a worker started it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def names(rows: list[dict]) -> Counter:
    return Counter(str([row.get(key) for key in ("table", "name", "case", "batch")]) for row in rows)


def test_a_second_call_measures_what_is_missing(tmp_path):
    out, options = tmp_path / "report", ("--dry-run", "--quick", "--minutes", "12")
    first = report(out, *options)
    assert first.returncode == 0 and "FAILED" not in first.stdout, first.stdout + first.stderr
    assert all(title in first.stdout for title in TITLES), first.stdout
    assert (out / "performance_gpu.md").read_text() in first.stdout
    assert all(f"\n{stage:10} " in first.stdout for stage in STAGES)

    rows = rows_of(out)
    kept = [row for row in rows if not (row["table"] == "match" and row["batch"] == 4)]
    assert len(rows) - len(kept) == 2  # forward and backward
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"table": "mat')  # killed here
    second = report(out, *options)
    assert second.returncode == 0 and all(f"{name} before" in second.stdout for name in ("passed", "measured")), second.stdout
    assert any("match, assign" in row["seconds"] for row in rows if row["table"] == "decisions")
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines[: len(kept)]] == kept
    assert names([*kept, *map(json.loads, lines[len(kept) + 1 :])]) == names(rows)


def test_a_call_at_another_commit_is_refused(tmp_path):
    """A row does not say of which commit it is: the folder's machine line does."""
    before = '{"table": "machine", "commit": "0123456789"}\n'
    (tmp_path / "results.jsonl").write_text(before)
    result = report(tmp_path, "--dry-run", "--quick")
    assert result.returncode == 1 and "its rows are of commit 0123456789" in result.stderr, result.stderr
    assert (tmp_path / "results.jsonl").read_text() == before


def test_the_plot_leaves_out_a_row_that_was_cut(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import plots

    (tmp_path / "results.jsonl").write_text('{"table": "machine", "commit": "0123456789"}\n{"table": "mat')  # killed here
    assert plots.read_gpu(tmp_path / "results.jsonl") == {"machine": {"commit": "0123456789"}, "unit": "s", "rows": []}


@pytest.mark.parametrize("name", ["CMakeLists.txt", "pyproject.toml", "setup.py"])
def test_what_passed_counts_for_the_same_build_alone(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_report

    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    for each in ("CMakeLists.txt", "pyproject.toml", "setup.py"):
        (tmp_path / each).touch()
    before = gpu_report.sources()
    (tmp_path / name).write_text("changed")
    assert gpu_report.sources() != before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine could build and measure")
def test_tables_come_also_where_nothing_can_be_built(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"table": "decisions", "batch": 1, "seconds": {"greedy": 1e-06}}\n')
    result = report(tmp_path, "--minutes", "1")
    assert result.returncode == 1 and "no GPU" in result.stderr
    assert "Decisions, 5x50" in result.stdout and "Traceback" not in result.stderr

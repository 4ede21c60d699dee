"""dmm-fast bench: every stage of every runtime is timed, and the report says what it belongs to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmm_fast.commands.main import main


def test_bench_times_every_stage(tmp_path, capsys):
    words = ["bench", "--preset", "iou", "--objects", "1,3", "--frames", "4", "--size", "96x128", "--proposals", "8"]
    words += ["--runtimes", "eager,torchscript,c++ torchscript", "--out", str(tmp_path), "--threads", "1"]
    assert main(words) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    told = capsys.readouterr().out
    assert report["machine"]["CPU"] in told and "its own time is not included" in told
    stages = {"eager": ["decode", "features", "proposals", "matching", "refinement", "step", "write"]}
    for runtime in ("eager", "torchscript", "c++ torchscript"):
        for objects in (1, 3):
            rows = [row for row in report["rows"] if (row["runtime"], row["objects"]) == (runtime, objects)]
            assert [row["stage"] for row in rows] == stages.get(runtime, ["decode", "proposals", "step", "write"])
            assert all(0 < row["p50"] <= row["p99"] for row in rows)
    assert "<svg" in (tmp_path / "bench.svg").read_text()


def test_bench_by_frame_size(tmp_path, capsys):
    words = ["bench", "--preset", "iou", "--objects", "2", "--frames", "3", "--proposals", "8", "--threads", "1"]
    assert main([*words, "--frame-size", "64x96,96x128", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "frame_sizes.json").read_text())["rows"]
    assert [row["size"] for row in rows] == [[64, 96], [96, 128]] and all(row["step"] > 0 for row in rows)
    told = capsys.readouterr().out
    assert "96x64" in told and "128x96" in told and "step, ratio" in told


def test_bench_with_a_live_detector(capsys):
    words = ["bench", "--preset", "iou", "--objects", "1", "--frames", "1", "--size", "96x128", "--threads", "1"]
    assert main([*words, "--runtimes", "eager,c++ torchscript", "--detector", "small"]) == 0
    assert "by small, included" in capsys.readouterr().out
    assert main([*words, "--runtimes", "torchscript", "--detector", "none.safetensors"]) == 2
    assert "no such file of detector weights" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "--runtimes", "tensorrt"])


def test_bench_refuses_a_precision_that_a_runtime_would_not_have(capsys):
    words = ["bench", "--preset", "iou", "--objects", "1", "--frames", "1", "--size", "96x128", "--threads", "1"]
    assert main([*words, "--precision", "bfloat16"]) == 2
    assert "precision bfloat16 is of the runtime eager alone" in capsys.readouterr().err
    assert main([*words, "--precision", "bfloat16", "--runtimes", "eager"]) == 0


def test_bench_refuses_more_proposals_than_the_network_takes(capsys):
    for more in (["--objects", "1"], ["--frame-size", "96x128"]):
        assert main(["bench", "--preset", "iou", "--frames", "1", "--runtimes", "eager", "--proposals", "51", *more]) == 2
        assert "takes at most 50 proposals a frame, got 51" in capsys.readouterr().err


def test_the_benchmark_of_a_step_runs():
    """As in `make bench`; pytest-benchmark refuses to measure where it sees that a worker of xdist started it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    words = "-m pytest -p no:cacheprovider --benchmark-only benchmarks/bench_segment.py::bench_step[1]"
    command, root = [sys.executable, *words.split()], Path(__file__).resolve().parents[2]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert result.returncode == 0 and "step, 1 objects" in result.stdout, result.stdout + result.stderr

"""gpu_report.py without a GPU: it ends with its tables, and a second call goes on where the first was cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu_report.py"


def report(out: Path, minutes: float) -> tuple[str, list[dict]]:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--quick", "--minutes", str(minutes), "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_second_call_measures_what_is_missing(tmp_path):
    out = tmp_path / "report"
    text, rows = report(out, 1)
    for title in ("A frame of the packaged network", "Decisions, 5x50", "Ours at 40x2", "Forward, us per call", "Peak memory"):
        assert title in text, text
    assert (out / "performance_gpu.md").read_text() in text and "FAILED" not in text
    kept = [row for row in rows if row["table"] != "match" and not (row["table"] == "decisions" and row["batch"] == 64)]
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))  # as if it had been cut off there
    _, again = report(out, 1)
    assert again[: len(kept)] == kept
    count = Counter(json.dumps([row["table"], row.get("case"), row.get("batch"), row.get("proposals")]) for row in rows)
    assert (
        Counter(json.dumps([row["table"], row.get("case"), row.get("batch"), row.get("proposals")]) for row in again) == count
    )

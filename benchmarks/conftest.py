"""Lets the suites import the shared core, gives pytest-benchmark its clock, and closes a run with the ratios."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import core  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    for item in items:
        if "benchmark" in item.fixturenames:
            options = {**getattr(item.get_closest_marker("benchmark"), "kwargs", {}), "timer": core.clock}
            item.add_marker(pytest.mark.benchmark(**options), append=False)


def pytest_terminal_summary(terminalreporter):
    rows = [row for row in core.ROWS if "ratio" in row]
    if not rows:
        return
    terminalreporter.section("ratios to peers in the same run")
    facts = rows[0]["machine"]
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in facts.items()))
    header = ["case", "us per problem", "peer", "its us", "ratio", "limit us", "share of limit"]
    cells = [
        [
            row["case"],
            f"{row['us per problem']:.2f}",
            row["peer"],
            f"{row['peer us per problem']:,.1f}",
            f"{row['ratio']:,.0f}x",
            "-" if row["limit us per problem"] is None else f"{row['limit us per problem']:.2f}",
            "-" if row["share of limit"] is None else f"{row['share of limit']:.0%}",
        ]
        for row in rows
    ]
    terminalreporter.write_line(core.table(header, cells))

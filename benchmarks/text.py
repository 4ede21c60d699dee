"""How figures are written: microseconds, Markdown tables, the commit they are of. Needs nothing that must be installed."""

from __future__ import annotations

import subprocess
from pathlib import Path


def microseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    us = seconds * 1e6
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 1000 else f"{us:,.0f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, aligned so that a terminal shows it well too."""
    widths = [max(3, *(len(line[i]) for line in [header, *rows])) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return "| " + " | ".join(aligned) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])


def commit(folder: Path = Path(__file__).parent.parent) -> str:
    """The commit, with a + where files that git knows differ from it (docs/ aside); "unknown" outside a clone."""
    git = ["git", "-C", str(folder)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"]
        return name + "+" * bool(subprocess.run(changed, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

"""``dmm-fast doctor``: what is installed, what is missing, and how to fix it."""

from __future__ import annotations

import argparse
from typing import Any

from dmm_fast.commands.options import add_command


def add(commands: Any) -> None:
    add_command(
        commands, "doctor", run, "show what is installed, what is missing, and how to fix it",
        "Show which versions and backends are installed and usable, which GPU, what is missing, and how to fix it.",
        ("dmm-fast doctor", "its output belongs in a bug report"),
    )  # fmt: skip


def run(a: argparse.Namespace) -> int:
    from dmm_fast.ops.info import doctor

    text, healthy = doctor()
    print(text)
    return 0 if healthy else 1

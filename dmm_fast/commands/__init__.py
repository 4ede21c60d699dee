"""Subcommands of ``dmm-fast``, one module each: `add(commands)` describes it, `run(arguments)` does it.

Describing must stay cheap: a module imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)


def examples(*lines: tuple[str, str]) -> str:
    return "examples:\n" + "\n".join(f"  {command}\n      {what}" for command, what in lines)


def add_command(
    commands: Any, name: str, run: Callable, summary: str, text: str, *lines: tuple[str, str]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=text, epilog=examples(*lines), formatter_class=Help)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def count(text: str, least: int = 1) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def check_device(name: str) -> None:
    """Refuse a device that torch cannot use here, before anything is read."""
    from dmm_fast.device import open_device

    open_device(name)

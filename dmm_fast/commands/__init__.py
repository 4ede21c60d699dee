"""Subcommands of ``dmm-fast``, one module each: `add(commands)` describes it, `run(arguments)` does it.

Describing must stay cheap: a module imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any


SETTING = re.compile(r"[A-Za-z_][\w.]*=")


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)


class Parser(argparse.ArgumentParser):
    """A parser whose KEY=VALUE words may stand anywhere, also after options; see `add_settings`."""

    settings: str | None = None

    def add_settings(self, name: str, **options: Any) -> None:
        """A positional argument that takes the KEY=VALUE words of a command line."""
        self.settings = name
        self.add_argument(name, nargs="*", **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.settings is None:
            return super().parse_known_args(args, namespace)
        settings, others = [], []
        for word in sys.argv[1:] if args is None else args:
            before = self._option_string_actions.get(others[-1]) if others else None
            is_value = before is not None and before.nargs is None  # as in --out a=b
            (settings if SETTING.match(word) and not is_value else others).append(word)
        namespace, unknown = super().parse_known_args(others, namespace)
        setattr(namespace, self.settings, settings)
        return namespace, unknown


def examples(*lines: tuple[str, str]) -> str:
    return "examples:\n" + "\n".join(f"  {command}\n      {what}" for command, what in lines)


def add_command(
    commands: Any, name: str, run: Callable, summary: str, text: str, *lines: tuple[str, str]
) -> Parser:
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

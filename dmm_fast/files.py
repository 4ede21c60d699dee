"""Files that appear whole or not at all, whether they have changed, and lists of them in messages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path`, to be written; it takes `path`'s place only if the block ends without error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(*paths: Path) -> str:
    """What tells whether the contents of these files, one after the other, are the same later."""
    found = blake2b(digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                found.update(block)
    return found.hexdigest()


def listed(names: Sequence, most: int = 6) -> str:
    """ "a, b, c", of many the first ones and the last."""
    return ", ".join(map(str, names[:most])) + (f", ... {names[-1]}" if len(names) > most else "")

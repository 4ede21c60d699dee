"""Id maps as the page sends and gets them: runs along the rows, each a little-endian uint32, length << 8 | id."""

from __future__ import annotations

import numpy as np

LONGEST = (1 << 24) - 1


def encode(ids: np.ndarray) -> bytes:
    """uint8 [H, W] -> runs."""
    flat = ids.ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=np.uint8(~flat[0]) if flat.size else 0))
    lengths = np.diff(starts, append=flat.size)
    values = flat[starts]
    if lengths.size and lengths.max() > LONGEST:  # frames beyond 16 million pixels
        pieces = -(-lengths // LONGEST)
        values, last = np.repeat(values, pieces), np.cumsum(pieces) - 1
        rest = lengths - (pieces - 1) * LONGEST
        lengths = np.full(values.size, LONGEST)
        lengths[last] = rest
    return (lengths.astype(np.uint32) << 8 | values).astype("<u4").tobytes()


def decode(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Runs -> uint8 [H, W]; ValueError where they do not fill a frame of this size."""
    if len(data) % 4:
        raise ValueError(f"a mask is a list of 4-byte runs, got {len(data)} bytes")
    codes = np.frombuffer(data, "<u4")
    lengths = codes >> 8
    if int(lengths.sum(dtype=np.int64)) != size[0] * size[1]:
        total = int(lengths.sum(dtype=np.int64))
        raise ValueError(f"a mask of this clip has {size[0] * size[1]} pixels ({size[1]}x{size[0]}), got {total}")
    return np.repeat((codes & 255).astype(np.uint8), lengths).reshape(size)

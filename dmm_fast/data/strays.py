"""Ids that no one drew: what anti-aliasing, interpolation, dithering and lossy compression leave in an id map.

A paint program smooths an outline by blending two colours, a resize blends two ids. Stored as ids, each blend is an object
of its own: a pixel or two wide, along the outline between two others, in many pieces. Small objects are not like that:
they lie inside one area, or they are few pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

REACH = 7  # pixels: the window in which both sides of an outline are looked for
PIECES, PIECE = 32, 4.0  # so many pieces of stray ids, of so few pixels each, are no objects
LINED = 0.35  # of the outlines' pixels; fewer are pieces of objects behind others


@dataclass(frozen=True)
class Strays:
    """Stray ids, and the pixels bool [H, W] of them and of other ids' stray pieces."""

    ids: list[int]
    pixels: np.ndarray
    smoothed: bool  # whether they are more than objects that are hardly seen
    dithered: bool  # whether areas are patterns of several ids, so that no one can tell which is meant

    def __str__(self) -> str:
        y, x = np.argwhere(self.pixels)[0]
        listed = ", ".join(map(str, self.ids[:8])) + (", ..." if len(self.ids) > 8 else "")
        count, pixels = len(self.ids), np.count_nonzero(self.pixels)
        return f"{count} stray id{'s' * (count != 1)} ({listed}): {pixels} pixels, e.g. at x={x}, y={y}"


def find_strays(ids: np.ndarray) -> Strays:
    """Look for stray ids in an id map, uint8 [H, W]."""
    area, labels = np.bincount(ids.ravel(), minlength=256), np.arange(256)
    between, ordered = _between(ids)
    count = np.count_nonzero(between)
    stray = np.bincount(ids[between], minlength=256) >= 0.7 * area
    stray = (stray | _speckled(ids)) & (area > 0) & (labels > 0)
    pixels = between | stray[ids]
    pieces = sum(ndimage.label(ids == label, np.ones((3, 3)))[1] for label in np.flatnonzero(stray))
    scattered = pieces >= PIECES and area[stray].sum() <= PIECE * pieces
    # An interpolated id lies between those of the two sides, which that of an object behind others does by chance.
    lined = count >= max(16, LINED * _outline(np.where(pixels, 0, ids))) and np.count_nonzero(ordered) >= 0.8 * count
    mixed = _mixed(ids)
    dithered = bool(2 * np.count_nonzero(mixed) > area[1:].sum() > 64)
    if dithered:
        pixels = mixed
    named = np.flatnonzero(stray) if stray.any() and not dithered else np.unique(ids[pixels & (ids > 0)])
    return Strays(named.tolist(), pixels, bool(scattered or lined or dithered), dithered)


def remove_strays(ids: np.ndarray, strays: Strays) -> np.ndarray:
    """Stray pixels get the nearest id that was drawn: an outline then runs through the middle of what was smoothed."""
    y, x = ndimage.distance_transform_edt(strays.pixels, return_distances=False, return_indices=True)
    return ids[y, x]


def _in_blocks(ids: np.ndarray, size: int) -> np.ndarray:
    """Pixels [H, W] bool that lie in a size x size block of one id."""
    one = ndimage.minimum_filter(ids, size, mode="nearest") == ndimage.maximum_filter(ids, size, mode="nearest")
    return ndimage.maximum_filter(one, size, origin=-1 if size % 2 == 0 else 0)


def _between(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thin pieces [H, W] bool near two areas that are not their own id's, and those of them with an id between the two."""
    thin = ~_in_blocks(ids, 3)
    low = ndimage.minimum_filter(np.where(thin, np.int16(256), ids), REACH)
    high = ndimage.maximum_filter(np.where(thin, np.int16(-1), ids), REACH)
    between = thin & (low < high) & (low != ids) & (high != ids)
    return between, between & (low < ids) & (ids < high)


def _speckled(ids: np.ndarray) -> np.ndarray:
    """Ids [256] bool that are scattered in specks."""
    loose = ~_in_blocks(ids, 2)
    area, alone = (np.bincount(part.ravel(), minlength=256) for part in (ids, ids[loose]))
    found = np.zeros(256, bool)
    for label in np.flatnonzero((alone >= 16) & (2 * alone > area)):
        pieces = ndimage.label(ids == label, np.ones((3, 3)))[1]
        found[label] = pieces >= 8 and area[label] <= 8 * pieces
    return found


def _mixed(ids: np.ndarray) -> np.ndarray:
    """Pixels of objects that belong to no area, beside pixels of another object."""
    other = ndimage.maximum_filter(ids, 3) != ids
    other |= ndimage.minimum_filter(np.where(ids == 0, np.uint8(255), ids), 3) != ids
    return (ids > 0) & ~_in_blocks(ids, 2) & other


def _outline(ids: np.ndarray) -> int:
    """Pairs of neighbours between whose ids there is another."""
    far = (np.abs(np.diff(ids.astype(np.int16), axis=axis)) > 1 for axis in (0, 1))
    return int(sum(map(np.count_nonzero, far)))

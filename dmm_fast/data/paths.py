"""Paths of pasted objects through a clip's T frames: [T, 2] x, y in pixels; a reach is half of an object's box, x and y."""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray


def drifting(rng: np.random.Generator, length: int, size: tuple[int, int]) -> Array:
    """A slow way that starts inside a frame of a size (H, W)."""
    height, width = size
    time = np.arange(length)[:, None]
    step = rng.uniform(-1, 1, 2) * time + 0.1 * rng.normal(size=2) * time**2
    return rng.uniform(0.2, 0.8, 2) * (width, height) + min(height, width) * step * (0.06, 0.02)


def passing(rng: np.random.Generator, length: int, near: Array) -> Array:
    """One object's way relative to another's: they meet about the middle of the clip, and are beside each other before and after.

    near: the sum of their reaches.
    """
    when = rng.uniform(0.35, 0.65) * (length - 1)
    heading = rng.normal(0, 0.3) + (math.pi if rng.random() < 0.5 else 0)  # mostly sideways, as things move on the ground
    ahead = np.array([math.cos(heading), math.sin(heading)])
    clear = min(near / np.maximum(np.abs(ahead), 1e-3))  # so far ahead the boxes are apart
    speed = rng.uniform(0.85, 1.15) * clear / min(when, length - 1 - when)
    aside = rng.normal(0, 0.08) * near[1] * np.array([-ahead[1], ahead[0]])
    return aside + speed * ahead * (np.arange(length)[:, None] - when)


def covering(rng: np.random.Generator, length: int, reach: Array) -> tuple[Array, Array]:
    """The way of something relative to an object that it covers for one frame or several of 1 .. T - 2, and the reach it needs.

    Most of the object shows in the first and in the last frame.
    """
    hidden = int(rng.integers(1, max((length - 1) // 2, 1) + 1))
    first = int(rng.integers(1, length - hidden))
    middle, half = first + (hidden - 1) / 2, (hidden - 1) / 2
    heading = rng.choice([-1, 1]) * np.array([1, rng.normal(0, 0.2)])
    speed = rng.uniform(1.7, 2.1) * reach[0] / (min(middle, length - 1 - middle) - half)
    way = speed * heading * (np.arange(length)[:, None] - middle)
    return way, 1.05 * reach + speed * half * np.abs(heading) + 2


def leaving(rng: np.random.Generator, length: int, size: tuple[int, int], reach: Array) -> Array:
    """Out of the frame (H, W) through one side, gone for one frame or several of 1 .. T - 2, and in again at another place."""
    height, width = size
    gone = int(rng.integers(1, max((length - 1) // 2, 1) + 1))
    first = int(rng.integers(1, length - gone))
    out, back = rng.integers(2, size=2)  # 0: by the left side
    outside = [-reach[0] - 2, width + reach[0] + 2]
    inside = rng.uniform(0.1, 0.3, 2) * width
    start, end = (width - x if side else x for side, x in zip((out, back), inside))
    rows = rng.uniform(0.25, 0.75, 2) * height
    time = np.arange(length)
    places = np.where(
        time < first + gone,
        np.interp(time, [0, first], [start, outside[out]]),
        np.interp(time, [first + gone - 1, length - 1], [outside[back], end]),
    )
    return np.stack([places, np.where(time < first + gone, rows[0], rows[1])], 1)

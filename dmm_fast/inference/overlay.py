"""Masks drawn on frames: a colour overlay with contours and ids, and a contact sheet of a whole video."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from dmm_fast.data.masks import PALETTE
from dmm_fast.files import whole_file

_COLOURS = np.frombuffer(bytes(PALETTE), np.uint8).reshape(256, 3)
INK, PAPER, FAINT = (238, 238, 234), (24, 25, 28), (150, 150, 146)


def object_colours() -> np.ndarray:
    """The palette made fit for drawing on video: dark colours lifted so that they show, uint8 [256, 3]."""
    colours = _COLOURS.astype(np.float32)
    peak = colours.max(1, keepdims=True)
    lifted = np.where(peak > 0, colours * np.maximum(1, 210 / np.maximum(peak, 1)), 160)
    return np.clip(lifted + 30, 0, 255).astype(np.uint8)


def overlay(frame: np.ndarray, ids: np.ndarray, alpha: float = 0.45, names: bool = True) -> np.ndarray:
    """frame uint8 [H, W, 3] and ids uint8 [H, W] -> uint8 [H, W, 3]: objects tinted, outlined, with their ids."""
    if frame.shape[:2] != ids.shape:
        raise ValueError(f"frame {frame.shape[:2]} and ids {ids.shape} must have the same size")
    out = frame.copy()
    if not ids.any():
        return out
    width = max(1, round(min(ids.shape) / 360))
    window = tuple(_reach(np.any(ids, axis), width) for axis in (1, 0))  # the objects and their outlines, nothing else
    _tint(out[window], ids[window], alpha, width)
    return _write_names(out, ids) if names else out


def _reach(occupied: np.ndarray, margin: int) -> slice:
    """From the first to the last True, and the margin around them."""
    first, last = np.flatnonzero(occupied)[[0, -1]]
    return slice(max(first - margin, 0), last + margin + 1)


def _tint(image: np.ndarray, ids: np.ndarray, alpha: float, width: int) -> None:
    """Colour the objects in place, their edges strongly, and darken what lies around them."""
    colours, inside = object_colours(), ids > 0
    image[inside] = ((1 - alpha) * image[inside] + alpha * colours[ids[inside]]).astype(np.uint8)
    inner = inside & (ndimage.grey_erosion(ids, size=2 * width + 1, mode="nearest") != ids)
    inner |= inside & (ndimage.grey_dilation(ids, size=2 * width + 1, mode="nearest") != ids)
    halo = ~inside & ndimage.binary_dilation(inside, iterations=width)
    image[inner] = colours[ids[inner]]
    image[halo] = (image[halo] * 0.35).astype(np.uint8)


def _write_names(image: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Each object's id at the point of it that is farthest from its edge."""
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    size = max(10, min(ids.shape) // 24)
    font = ImageFont.load_default(size)
    for label, box in enumerate(ndimage.find_objects(ids), 1):
        if box is None:
            continue
        depth = ndimage.distance_transform_edt(np.pad(ids[box] == label, 1))
        if depth.max() < 0.4 * size:  # too thin to hold a figure
            continue
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        place = (int(x) - 1 + box[1].start, int(y) - 1 + box[0].start)
        draw.text(place, str(label), INK, font, anchor="mm", stroke_width=max(1, size // 8), stroke_fill=PAPER)
    return np.asarray(picture)


class ContactSheet:
    """Evenly spaced frames with their overlays on one page. ``wanted`` says which frames to add, in order."""

    def __init__(self, length: int, size: tuple[int, int], title: str, pictures: int = 12, width: int = 1600):
        count = min(pictures, length)
        self.wanted = set(np.linspace(0, length - 1, count).round().astype(int).tolist())
        columns = _columns(len(self.wanted), size)
        self._gap = 12
        cell = (width - self._gap) // columns - self._gap
        self._cell = (cell, round(cell * size[0] / size[1]))
        self._small, self._large = ImageFont.load_default(18), ImageFont.load_default(26)
        self._head, self._caption = 52, 28
        rows = -(-len(self.wanted) // columns)
        height = self._head + rows * (self._cell[1] + self._caption + self._gap) + self._gap // 2
        self._page = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self._page)
        self._draw.text((self._gap, self._head // 2), title, INK, self._large, anchor="lm")
        self._columns, self._filled = columns, 0

    def add(self, frame: np.ndarray, ids: np.ndarray, caption: str, remark: str = "", shorter: str = "") -> None:
        """One more picture: the frame's overlay, a caption below at the left and a remark at the right, the shorter one where
        that has no room."""
        row, column = divmod(self._filled, self._columns)
        self._filled += 1
        x = self._gap + column * (self._cell[0] + self._gap)
        y = self._head + row * (self._cell[1] + self._caption + self._gap)
        small = np.asarray(Image.fromarray(frame).resize(self._cell, Image.Resampling.LANCZOS))
        small_ids = np.asarray(Image.fromarray(ids).resize(self._cell, Image.Resampling.NEAREST))
        self._page.paste(Image.fromarray(overlay(small, small_ids)), (x, y))
        below = y + self._cell[1] + self._caption // 2 + 1
        self._draw.text((x + 2, below), caption, INK, self._small, anchor="lm")
        room = self._cell[0] - self._gap - self._small.getlength(caption)
        remark = remark if self._small.getlength(remark) <= room else shorter or remark
        self._draw.text((x + self._cell[0] - 2, below), remark, FAINT, self._small, anchor="rm")

    def save(self, path: str | os.PathLike) -> None:
        with whole_file(path) as part:
            self._page.save(part, format="PNG")


def _columns(count: int, size: tuple[int, int]) -> int:
    """Columns that bring a page of count pictures near 4:3."""
    shape = size[1] / size[0]
    return min(range(1, count + 1), key=lambda columns: abs(np.log(columns * shape / (-(-count // columns)) / (4 / 3))))

"""Ids that smoothing leaves in masks: refused or cleaned; small, thin and many objects are neither."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dmm_fast.data.masks import PALETTE, MaskError, read_first_masks, read_ids, write_mask
from dmm_fast.data.strays import find_strays, remove_strays

SIZE = (120, 216)
COLOURS = np.frombuffer(PALETTE, np.uint8).reshape(256, 3)


def drawing(number=4) -> np.ndarray:
    """Ellipses that partly hide each other, ids 1..number."""
    ids, (y, x) = np.zeros(SIZE, np.uint8), np.ogrid[: SIZE[0], : SIZE[1]]
    for label in range(1, number + 1):
        turn = 0.7 * label
        u, v = x - 36 * label, y - 45 - 9 * label
        along, across = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
        ids[(along / 32) ** 2 + (across / 17) ** 2 < 1] = label
    return ids


def painted(ids: np.ndarray) -> Image.Image:
    """As a paint program draws it: palette colours with smooth edges."""
    large = Image.fromarray(COLOURS[ids]).resize((4 * SIZE[1], 4 * SIZE[0]), Image.Resampling.NEAREST)
    return large.rotate(3, Image.Resampling.BICUBIC).resize(SIZE[::-1], Image.Resampling.LANCZOS)


def resized(ids: np.ndarray, scale: float, how: str) -> np.ndarray:
    size = (round(scale * SIZE[1]), round(scale * SIZE[0]))
    return np.asarray(Image.fromarray(ids).resize(size, Image.Resampling[how]))


def compressed(ids: np.ndarray, step: int, quality: int, folder) -> np.ndarray:
    Image.fromarray(ids * np.uint8(step)).save(folder / "mask.jpg", quality=quality)
    return np.asarray(Image.open(folder / "mask.jpg"))


SMOOTH = {
    "256 colours": lambda folder: painted(drawing()).quantize(255),
    "8 colours": lambda folder: painted(drawing()).quantize(8),
    "32 colours": lambda folder: painted(drawing()).quantize(32),
    "the web's colours, dithered": lambda folder: painted(drawing()).convert("P"),
    "the web's colours": lambda folder: painted(drawing()).convert("P", dither=0),
    "the palette of masks": lambda folder: painted(drawing()).quantize(palette=palette_image(), dither=0),
    "reduced": lambda folder: resized(drawing(), 0.5, "BILINEAR"),
    "enlarged": lambda folder: resized(drawing(), 2, "BILINEAR"),
    "enlarged a little": lambda folder: resized(drawing(), 1.37, "BICUBIC"),
    "two objects, enlarged": lambda folder: resized(drawing(2), 1.5, "BILINEAR"),
    "one object of id 3": lambda folder: resized(3 * (drawing() == 2).astype(np.uint8), 1.5, "BILINEAR"),
    "compressed": lambda folder: compressed(drawing(), 10, 75, folder),
    "compressed, spread": lambda folder: compressed(drawing(), 30, 90, folder),
}


def palette_image() -> Image.Image:
    image = Image.new("P", (1, 1))
    image.putpalette(PALETTE)
    return image


@pytest.mark.parametrize("name", SMOOTH)
def test_smoothed_pictures_are_refused(tmp_path, name):
    ids = np.asarray(SMOOTH[name](tmp_path))
    write_mask(tmp_path / "mask.png", np.where(ids == 255, 254, ids))
    with pytest.raises(MaskError, match=r"mask\.png: .*\d+ stray ids? \([\d, .]+\): \d+ pixels, e\.g\. at x=\d+, y=\d+"):
        read_first_masks(tmp_path / "mask.png")


@pytest.mark.parametrize("scale, how", [(2, "BILINEAR"), (1.37, "BICUBIC"), (2, "LANCZOS")])
def test_cleaning_gives_back_what_was_drawn(tmp_path, scale, how):
    smooth, crisp = resized(drawing(), scale, how), resized(drawing(), scale, "NEAREST")
    write_mask(tmp_path / "mask.png", smooth)
    ids, notes = read_first_masks(tmp_path / "mask.png", clean=True)
    assert np.unique(ids).tolist() == [0, 1, 2, 3, 4] and (ids != crisp).mean() < 0.006
    assert (smooth != crisp).mean() > 1.5 * (ids != crisp).mean()
    assert len(notes) == 1 and notes[0].startswith("cleaned: ") and "given to the nearest other id" in notes[0]


def test_cleaning_says_which_ids_are_gone(tmp_path):
    ids = np.asarray(painted(drawing()).quantize(32))
    write_mask(tmp_path / "mask.png", ids)
    cleaned, notes = read_first_masks(tmp_path / "mask.png", clean=True)
    assert len(np.unique(cleaned)) < len(np.unique(ids)) / 2 and "are gone" in notes[0]


def test_what_is_dithered_cannot_be_cleaned(tmp_path):
    write_mask(tmp_path / "mask.png", np.asarray(painted(drawing()).convert("P")))
    with pytest.raises(MaskError, match="patterns of several ids .*, so which is meant is unknown"):
        read_first_masks(tmp_path / "mask.png", clean=True)


def crowd(seed: int) -> np.ndarray:
    """A hundred objects of all sizes, the smallest of a pixel, many half hidden."""
    rng, ids = np.random.default_rng(seed), np.zeros((240, 432), np.uint8)
    y, x = np.ogrid[:240, :432]
    centres = rng.normal((120, 216), (25, 40), (100, 2)) if seed % 2 else rng.uniform((0, 0), (240, 432), (100, 2))
    for label, (cy, cx) in enumerate(centres, 1):
        ids[((y - cy) / rng.uniform(0.3, 2)) ** 2 + (x - cx) ** 2 <= rng.uniform(0.5, (3, 6, 15)[seed % 3]) ** 2] = label
    return ids


def leash() -> np.ndarray:
    """Thin objects: a line over two others and the background, a frame around one."""
    ids = drawing(2)
    along = np.arange(20, 180)
    ids[20 + along // 2, along] = 3
    ids[30:90, 150] = ids[30:90, 200] = ids[30, 150:200] = ids[90, 150:200] = 4
    return ids


@pytest.mark.parametrize("ids", [drawing(), leash(), *(crowd(seed) for seed in range(12))])
def test_small_thin_and_many_objects_are_read(tmp_path, ids):
    write_mask(tmp_path / "mask.png", ids)
    assert (read_first_masks(tmp_path / "mask.png")[0] == ids).all()


def test_real_masks_have_no_strays(data):
    files = [*(data / "stills/Annotations").glob("*.png"), *sorted((data / "clips/Annotations").rglob("*.png"))[::10]]
    assert len(files) > 30
    for file in files:
        ids = read_ids(file)
        assert not find_strays(np.where(ids == 255, np.uint8(0), ids)).smoothed, file


def test_nothing_is_changed_where_there_is_nothing():
    for ids in (drawing(), np.zeros(SIZE, np.uint8), np.full(SIZE, 7, np.uint8)):
        strays = find_strays(ids)
        assert not strays.smoothed and not strays.dithered
    smooth = resized(drawing(), 2, "BILINEAR")
    cleaned = remove_strays(smooth, strays := find_strays(smooth))
    assert (cleaned == smooth)[~strays.pixels].all()

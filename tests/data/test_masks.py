"""Mask files as users have them: what is read, what is noted, what is refused and in which words."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmm_fast.data.masks import (
    PALETTE,
    MaskError,
    MaskWarning,
    ids_to_masks,
    masks_to_ids,
    read_binary,
    read_first_masks,
    read_ids,
    read_mask,
    write_mask,
)
from dmm_fast.files import whole_file

SIZE = (48, 64)
COLOURS = np.frombuffer(PALETTE, np.uint8).reshape(256, 3)


def two_objects(first: int = 1, second: int = 2) -> np.ndarray:
    ids = np.zeros(SIZE, np.uint8)
    ids[8:24, 8:30] = first
    ids[20:40, 34:60] = second
    return ids


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def smoothed(pixels: np.ndarray) -> np.ndarray:
    """Anti-aliased as a paint program or a resize does it."""
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((23, 17), Image.BILINEAR).resize(SIZE[::-1], Image.BILINEAR))


def noted(path: Path) -> tuple[np.ndarray, list[str]]:
    """`read_mask` and its warnings' texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = read_mask(path)
    assert all(issubclass(warning.category, MaskWarning) for warning in caught)
    return ids, [str(warning.message) for warning in caught]


# ------------------------------------------------------------------------------------------------------------- palette


def test_palette_is_pascals():
    assert len(PALETTE) == 768 and len(np.unique(COLOURS, axis=0)) == 256
    assert COLOURS[[0, 1, 2, 3, 4, 7, 8, 9, 21, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
        [128, 128, 128],
        [64, 0, 0],
        [192, 0, 0],
        [128, 64, 128],
        [224, 224, 192],
    ]


def test_palette_is_the_data_sets(data: Path):
    with Image.open(data / "clips/Annotations/puma-chair/frame_000000.png") as image:
        assert bytes(image.getpalette()) == PALETTE


# ----------------------------------------------------------------------------------------------- what is read as it is


@pytest.mark.parametrize(
    "ids",
    [
        two_objects(),
        two_objects(3, 200),
        np.zeros(SIZE, np.uint8),
        np.arange(255, dtype=np.uint8).reshape(5, 51).repeat(4, 0).repeat(4, 1),
    ],
)
def test_write_and_read(tmp_path: Path, ids: np.ndarray):
    path = tmp_path / "00000.png"
    write_mask(path, ids)
    with Image.open(path) as image:
        assert image.mode == "P" and bytes(image.getpalette()) == PALETTE and image.format == "PNG"
    read, notes = noted(path)
    assert read.dtype == np.uint8 and (read == ids).all() and not notes
    assert (read_ids(path) == ids).all()
    assert os.listdir(tmp_path) == ["00000.png"]


def test_grey_ids_are_ids(tmp_path: Path):
    for name, pixels in (("8", two_objects()), ("16", two_objects().astype(np.uint16))):
        ids, notes = noted(save(tmp_path / f"{name}.png", pixels))
        assert (ids == two_objects()).all() and not notes


def test_real_masks_need_no_notes(data: Path):
    for path in [*sorted((data / "stills/Annotations").glob("*.png")), data / "clips/Annotations_first/bmx-trees"]:
        ids, notes = read_first_masks(path)
        assert ids.max() >= 1 and not notes, path


# -------------------------------------------------------------------------------------------------- what is converted


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA"])
def test_black_and_white_is_one_object(tmp_path: Path, mode: str):
    path = save(tmp_path / "mask.png", (two_objects() > 0).astype(np.uint8) * 255, mode)
    ids, notes = read_first_masks(path)
    assert (ids == (two_objects() > 0)).all()
    assert notes == ([] if mode == "1" else ["0/255 mask: 255 read as the object"])
    assert read_ids(path).max() == (1 if mode == "1" else 255)  # evaluation sees what is stored


def test_palette_colours_are_ids(tmp_path: Path):
    ids = two_objects(2, 9)
    davis = np.where(COLOURS == 192, 191, COLOURS)  # DAVIS's own files
    for name, palette in (("pascal", COLOURS), ("davis", davis)):
        path = save(tmp_path / f"{name}.png", palette[ids].astype(np.uint8))
        read, notes = noted(path)
        assert (read == ids).all() and len(notes) == 1 and "RGB instead of indexed PNG: every colour is" in notes[0]
        assert str(path) in notes[0] and (read_ids(path) == ids).all()


def test_void_becomes_background(tmp_path: Path):
    ids = two_objects()
    ids[:2] = 255
    write_mask(tmp_path / "indexed.png", ids)
    save(tmp_path / "grey.png", ids)
    save(tmp_path / "rgb.png", COLOURS[ids])
    for name in ("indexed", "grey", "rgb"):
        read, notes = noted(tmp_path / f"{name}.png")
        assert (read == two_objects()).all() and "128 void pixels (255) read as background" in notes[-1]
        assert (read_ids(tmp_path / f"{name}.png") == ids).all()


def test_flat_colours_of_a_first_mask_are_numbered(tmp_path: Path):
    red_below_blue = np.array([[0, 0, 0], [0, 0, 255], [255, 0, 0]], np.uint8)[two_objects()]
    path = save(tmp_path / "mask.png", red_below_blue)
    ids, notes = read_first_masks(path)
    assert (ids == two_objects()).all()
    assert notes == ["RGB instead of indexed PNG: colours on black numbered in reading order: #0000ff -> 1, #ff0000 -> 2"]
    with pytest.raises(MaskError, match="colours that are not the DAVIS palette's"):
        read_mask(path)  # in another frame the same colours could come in another order


def test_first_mask_notes(tmp_path: Path):
    path = tmp_path / "mask.png"
    write_mask(path, two_objects(3, 7))
    assert read_first_masks(path)[1] == ["gaps in the object ids: 3, 7; kept as they are"]
    ids = two_objects()
    ids[44, 5:20], ids[2, 40] = 3, 4
    write_mask(path, ids)
    assert read_first_masks(path)[1] == ["ids 3, 4 occur only as specks or thin lines: was the mask interpolated?"]
    ids = two_objects(1, 6)
    for x, number in enumerate((2, 3, 4, 5)):
        ids[20:40, 33 - x] = number  # as bilinear resizing of an id map leaves it
    write_mask(path, ids)
    with pytest.raises(MaskError, match=r"anti-aliased or interpolated picture: \d stray ids .*\(--clean-masks\)"):
        read_first_masks(path)


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name, pixels, message",
    [
        (
            "anti-aliased grey",
            smoothed((two_objects() > 0).astype(np.uint8) * 255),
            r"grey levels, most of them only along edges: anti-aliased or interpolated.*indexed PNG",
        ),
        (
            "anti-aliased grey as RGB",
            smoothed((two_objects() > 0).astype(np.uint8)[..., None].repeat(3, -1) * 255),
            r"RGB instead of indexed PNG, with anti-aliased edges",
        ),
        (
            "anti-aliased colours",
            smoothed(COLOURS[two_objects()]),
            r"RGB instead of indexed PNG, with anti-aliased edges \(\d+ pixels, e.g. \(\d+, \d+, \d+\) at x=\d+, y",
        ),
        ("photograph", np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8), "RGB instead of indexed PNG"),
        (
            "colours without black",
            np.where(two_objects()[..., None] > 0, np.uint8([255, 0, 0]), np.uint8([0, 255, 0])),
            r"colours that are not the DAVIS palette's \(3072 pixels, e.g. \(0, 255, 0\) at x=0, y=0\)",
        ),
        (
            "grey levels with 255",
            np.uint8([0, 128, 255])[two_objects()],
            r"grey values 128, 255 may be object ids with void or several grey levels",
        ),
        (
            "transparent",
            np.uint8([[0, 0, 0, 0], [255, 255, 255, 255], [255, 255, 255, 128]])[two_objects()],
            "has transparent pixels; a mask must be an indexed PNG",
        ),
        ("16-bit", two_objects().astype(np.uint16) * 1000, r"16-bit values up to 2000; object ids must fit 0..254"),
        ("empty", np.zeros(SIZE, np.uint8), "no object: every pixel is background$"),
    ],
)
def test_refused(tmp_path: Path, name: str, pixels: np.ndarray, message: str):
    path = save(tmp_path / "mask.png", pixels)
    with pytest.raises(MaskError, match=f"mask.png: .*{message}|mask.png: {message}"):
        read_first_masks(path)


def test_refused_files(tmp_path: Path):
    jpeg = tmp_path / "mask.jpg"
    save(jpeg, two_objects() * 100)
    with pytest.raises(MaskError, match="mask.jpg: a JPEG file smears object ids"):
        read_mask(jpeg)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(MaskError, match="text.png: not an image"):
        read_mask(tmp_path / "text.png")
    write_mask(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 9, (200, 200), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    with pytest.raises(MaskError, match="cut.png: the image is damaged or cut short"):
        read_mask(tmp_path / "cut.png")
    with pytest.raises(FileNotFoundError, match="absent.png"):
        read_mask(tmp_path / "absent.png")
    save(tmp_path / "cmyk.tif", np.zeros((*SIZE, 4), np.uint8), "CMYK")
    with pytest.raises(MaskError, match="cmyk.tif: has pixel mode CMYK"):
        read_mask(tmp_path / "cmyk.tif")


def test_wrong_size(tmp_path: Path):
    path = tmp_path / "mask.png"
    write_mask(path, two_objects())
    assert (read_mask(path, SIZE) == two_objects()).all()
    for read in (read_mask, read_first_masks):
        with pytest.raises(MaskError, match=r"wrong size: the mask is 64x48, the frames are 854x480 \(width x"):
            read(path, (480, 854))


def test_only_void_is_no_object(tmp_path: Path):
    write_mask(tmp_path / "mask.png", (two_objects() > 0).astype(np.uint8) * 255)
    with pytest.raises(MaskError, match=r"no object: every pixel is background \(\d+ void pixels \(255\) read as"):
        read_first_masks(tmp_path / "mask.png")


# --------------------------------------------------------------------------------------------------------- directories


def test_one_file_per_object(tmp_path: Path):
    for name, number in (("10", 2), ("2", 1)):
        save(tmp_path / f"{name}.png", (two_objects() == number).astype(np.uint8) * 255)
    ids, notes = read_first_masks(tmp_path, SIZE)
    assert (ids == two_objects(2, 10)).all()
    assert notes[0] == "one object per file: 2.png -> 2, 10.png -> 10" and len(notes) == 3
    (tmp_path / "10.png").rename(tmp_path / "horse.png")
    (tmp_path / "2.png").rename(tmp_path / "rider.png")
    ids, notes = read_first_masks(tmp_path, SIZE)
    assert (ids == two_objects(2, 1)).all() and notes[0] == "one object per file: horse.png -> 1, rider.png -> 2"


def test_directory_of_one_id_map(tmp_path: Path):
    write_mask(tmp_path / "00000.png", two_objects())
    assert (read_first_masks(tmp_path)[0] == two_objects()).all()


def test_refused_directories(tmp_path: Path):
    with pytest.raises(MaskError, match="no mask: the directory holds no PNG file"):
        read_first_masks(tmp_path)
    for t in range(2):  # a clip's annotations in place of the first
        write_mask(tmp_path / f"{t:05d}.png", (two_objects() > 0).astype(np.uint8))
    with pytest.raises(MaskError, match="00001.png: overlaps 00000.png at .*give the first frame's file instead"):
        read_first_masks(tmp_path)
    write_mask(tmp_path / "00001.png", two_objects())
    with pytest.raises(MaskError, match="00001.png: object ids 1, 2 in a directory of 2 files"):
        read_first_masks(tmp_path)
    write_mask(tmp_path / "00001.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(MaskError, match="00001.png: no object"):
        read_first_masks(tmp_path)
    write_mask(tmp_path / "00001.png", np.ones((3, 3), np.uint8))
    with pytest.raises(MaskError, match="00001.png: wrong size: the mask is 3x3, the frames are 64x48"):
        read_first_masks(tmp_path)


# ------------------------------------------------------------------------------------------------------ binary masks


def test_binary_masks(tmp_path: Path):
    """SegTrack's ground truth: any format, RGB, grey edges."""
    truth = two_objects() > 0
    edges = truth * np.uint8(255)
    edges[8, 8:30], edges[24, 8:30] = 200, 60
    for name, pixels in (
        ("crisp.bmp", truth * np.uint8(255)),
        ("one.png", truth.astype(np.uint8)),
        ("grey.png", edges),
        ("rgb.png", edges[..., None].repeat(3, -1)),
        ("bit.png", truth),
    ):
        assert (read_binary(save(tmp_path / name, pixels)) == truth).all(), name
    write_mask(tmp_path / "ids.png", truth.astype(np.uint8) * 3)
    assert (read_binary(tmp_path / "ids.png") == truth).all()
    write_mask(tmp_path / "ids.png", two_objects())
    with pytest.raises(MaskError, match="ids 1, 2 in the mask of one object"):
        read_binary(tmp_path / "ids.png")
    with pytest.raises(MaskError, match="grey levels up to 2 are not"):
        read_binary(save(tmp_path / "dark.png", two_objects()))
    with pytest.raises(MaskError, match="colours in the mask of one object"):
        read_binary(save(tmp_path / "colour.png", COLOURS[two_objects()]))


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "ids, found",
    [
        (np.zeros(SIZE, np.int64), r"int64 \[48, 64\]"),
        (np.zeros((2, *SIZE), np.uint8), r"uint8 \[2, 48, 64\]"),
        ([[0]], "list"),
    ],
)
def test_write_refuses(tmp_path: Path, ids, found: str):
    with pytest.raises(MaskError, match=f"ids must be a uint8 array .*, got {found}"):
        write_mask(tmp_path / "mask.png", ids)
    assert not os.listdir(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "mask.png"
    write_mask(path, two_objects())
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert (read_mask(path) == two_objects()).all() and os.listdir(tmp_path) == ["mask.png"]


def test_a_killed_write_leaves_no_mask(tmp_path: Path):
    """What a process leaves that dies while writing is not named as a mask."""
    script = (
        "import os, sys; from dmm_fast.data.masks import whole_file\n"
        "with whole_file(sys.argv[1]) as path: path.write_bytes(b'half'); os._exit(1)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "mask.png")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".mask.png.") and left.suffix == ".tmp"


# ------------------------------------------------------------------------------------------- id maps and mask stacks


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_ids_and_masks(kind):
    ids = kind(two_objects(2, 7))
    objects, masks = ids_to_masks(ids)
    assert objects == [2, 7] and tuple(masks.shape) == (2, *SIZE) and type(masks) is type(ids)
    assert (masks[1] == (ids == 7)).all()
    back = masks_to_ids(masks, objects)
    assert type(back) is type(ids) and back.dtype == ids.dtype and (back == ids).all()
    objects, masks = ids_to_masks(ids * 0)
    assert objects == [] and tuple(masks.shape) == (0, *SIZE) and not masks_to_ids(masks, []).any()


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_overlaps(kind):
    scores = kind(np.array([[[0.9, 0.6, 0.8, 0.5]], [[0.2, 0.7, 0.8, 0.4]]], np.float32))
    assert masks_to_ids(scores, [4, 2]).tolist() == [[4, 2, 4, 0]]
    assert masks_to_ids(scores, [4, 2], threshold=0.75).tolist() == [[4, 0, 4, 0]]
    assert masks_to_ids(scores > 0.55, [4, 2]).tolist() == [[4, 4, 4, 0]]
    for wrong in ([1], [0, 1], [1, 255]):
        with pytest.raises(MaskError, match="2 masks need 2 object ids in 1..254"):
            masks_to_ids(scores, wrong)

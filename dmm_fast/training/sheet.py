"""A contact sheet of training clips: what the network learns from, to look at."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from tqdm import tqdm

from dmm_fast.data.augment import Clip, size_of
from dmm_fast.files import whole_file
from dmm_fast.inference.overlay import FAINT, INK, PAPER, overlay
from dmm_fast.training.config import ConfigError, TrainConfig
from dmm_fast.training.data import open_data

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
GAP, CAPTION = 6, 24


def write_sheet(
    path: str | os.PathLike, config: TrainConfig, count: int = 8, *, width: int = 1600, progress: bool = False
) -> None:
    """Write the first ``count`` clips of the configuration's sources, each a row of its frames.

    Objects are tinted, with their numbers; what only has an outline is a proposal. A caption has the source's kind, the
    video (with "+n" for n things pasted) and the number of objects. path: a .jpg or .png. width: of the picture, pixels.
    """
    kind = FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise ConfigError(f"{path}: a sheet is a .jpg or .png file")
    if not Path(path).resolve().parent.is_dir():
        raise ConfigError(f"{path}: there is no directory {Path(path).parent}")
    if count < 1:
        raise ConfigError(f"train: a sheet shows at least one clip, got {count}")
    clips, _ = open_data(config)
    rows = []
    for index in tqdm(range(min(count, len(clips))), "clips", disable=not progress):
        clip, source = clips[index], config.data.sources[clips.source_of(index)]
        rows.append(_row(clip, source.get("kind", "clips"), width))
    page = Image.new("RGB", (width, sum(row.height for row in rows)), PAPER)
    y = 0
    for row in rows:
        page.paste(row, (0, y))
        y += row.height
    with whole_file(path) as part:
        page.save(part, format=kind, quality=80)


def _row(clip: Clip, kind: str, width: int) -> Image.Image:
    length, (height, wide) = len(clip.frames), size_of(clip)
    cell = (width - GAP) // length - GAP
    size = cell, round(cell * height / wide)  # width, height
    row = Image.new("RGB", (width, CAPTION + size[1] + GAP), PAPER)
    draw, font = ImageDraw.Draw(row), ImageFont.load_default(14)
    objects = clip.masks.size(1)
    draw.text((GAP, CAPTION // 2), f"{kind}  {clip.name}", INK, font, anchor="lm")
    draw.text((width - GAP, CAPTION // 2), f"{objects} object{'s' * (objects != 1)}", FAINT, font, anchor="rm")
    numbers = torch.arange(1, objects + 1, dtype=torch.uint8)[:, None, None]
    for place, (frame, masks, found) in enumerate(zip(clip.frames, clip.masks, clip.proposals)):
        ids = (masks * numbers).amax(0).numpy()
        picture = np.array(Image.fromarray(frame.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS))
        for mask in found.masks.numpy():
            inner = _enlarged(mask, size).astype(bool)
            edge = inner & ~ndimage.binary_erosion(inner)
            picture[edge] = picture[edge] // 2 + 110
        row.paste(Image.fromarray(overlay(picture, _enlarged(ids, size))), (GAP + place * (cell + GAP), CAPTION))
    return row


def _enlarged(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(ids.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))

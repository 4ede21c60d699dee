"""Training clips as a data set of plain folders: to train a detector on them, to evaluate on them, or to look closer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from dmm_fast.data.augment import Clip, size_of
from dmm_fast.data.masks import write_mask
from dmm_fast.proposals.coco import CocoWriter
from dmm_fast.training.config import ConfigError, TrainConfig
from dmm_fast.training.data import open_data


def write_clips(out: str | os.PathLike, config: TrainConfig, count: int = 8, *, progress: bool = False) -> list[str]:
    """Write the first `count` clips of the configuration's sources; returns their names, NUMBER-KIND.

    OUT/JPEGImages/NAME/FRAME.jpg, OUT/Annotations/NAME/FRAME.png (ids from 1) and OUT/proposals/NAME.json. OUT is a new folder, and
    there only when it is whole.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out}: is there already; clips are written to a new folder")
    if count < 1:
        raise ConfigError(f"train: at least one clip can be written, got {count}")
    if not out.resolve().parent.is_dir():
        raise ConfigError(f"{out}: there is no directory {out.parent}")
    clips, _ = open_data(config)
    names: list[str] = []
    part = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        for index in tqdm(range(min(count, len(clips))), "clips", disable=not progress):
            kind = config.data.sources[clips.source_of(index)].get("kind", "clips")
            names.append(f"{index:05d}-{kind}")
            _write(clips[index], names[-1], part)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return names


def _write(clip: Clip, name: str, out: Path) -> None:
    frames, masks, found = (out / kind for kind in ("JPEGImages", "Annotations", "proposals"))
    for folder in (frames / name, masks / name, found):
        folder.mkdir(parents=True, exist_ok=True)
    numbers = torch.arange(1, clip.masks.size(1) + 1, dtype=torch.uint8)[:, None, None]
    with CocoWriter(found / f"{name}.json", size_of(clip)) as writer:
        for index, (frame, objects, proposals) in enumerate(zip(clip.frames, clip.masks, clip.proposals)):
            Image.fromarray(frame.permute(1, 2, 0).numpy()).save(frames / name / f"{index:05d}.jpg", quality=95)
            write_mask(masks / name / f"{index:05d}.png", (objects * numbers).amax(0).numpy())
            writer.add(f"{index:05d}", proposals)

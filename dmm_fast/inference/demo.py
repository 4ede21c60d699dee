"""The demo: a made clip, segmented by the code that ``dmm-fast segment`` runs, and scored against its exact masks."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dmm_fast.data.masks import write_mask
from dmm_fast.data.synthetic import Scene
from dmm_fast.evaluation import Report, evaluate
from dmm_fast.inference.run import segment
from dmm_fast.model import Proposals
from dmm_fast.model.masks import mask_boxes
from dmm_fast.proposals.coco import CocoWriter

CLIP, MARK = "koi", "demo.json"


class DemoError(ValueError):
    """The demo cannot be put where it was asked to go."""


@dataclass(frozen=True)
class DemoResult:
    report: dict[str, Any]  # of the segmentation
    scores: Report
    folder: Path  # of the masks
    overlay: Path


def run_demo(
    out: Path,
    *,
    seed: int = 7,
    frames: int = 60,
    size: tuple[int, int] = (240, 432),
    progress: bool = False,
    **settings,
) -> DemoResult:
    """Make the clip of a seed in OUT, segment and score it; settings: further arguments of `segment`."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARK).exists())):
        raise DemoError(f"{out}: exists and is not an earlier demo; choose another --out")
    make_clip(out, seed, frames, size, progress)
    overlay = out / "overlay.mp4"
    report = segment(
        out / "JPEGImages" / CLIP, out / "Annotations" / CLIP / "00000.png", out / "results" / CLIP,
        proposals=out / "proposals" / f"{CLIP}.json", video=overlay, overwrite=True, progress=progress, **settings,
    )  # fmt: skip
    return DemoResult(report, evaluate(out / "Annotations", out / "results", "davis"), out / "results" / CLIP, overlay)


def make_clip(out: Path, seed: int, frames: int, size: tuple[int, int], progress: bool = False) -> None:
    """Write frames, exact masks and proposals in DAVIS's layout, in place of an earlier demo's."""
    scene = Scene(seed, size=size)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text(json.dumps({"seed": seed, "frames": frames, "size": size}) + "\n")
    images, annotations = out / "JPEGImages" / CLIP, out / "Annotations" / CLIP
    for folder in (images, annotations, out / "proposals"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    with CocoWriter(out / "proposals" / f"{CLIP}.json", size, fresh=True) as writer:
        for time in tqdm(range(frames), desc="making the clip", unit=" frames", disable=None if progress else True):
            stem = f"{time:05d}"
            frame, ids = scene.render(time)
            Image.fromarray(frame).save(images / f"{stem}.jpg", quality=94)
            write_mask(annotations / f"{stem}.png", ids)
            masks, scores = (torch.from_numpy(array) for array in scene.proposals(time))
            writer.add(stem, Proposals(mask_boxes(masks), scores, masks))

"""What the page exports: a project's masks as files that other programs read."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmm_fast.app.project import Project
from dmm_fast.data.masks import PALETTE
from dmm_fast.data.video import VideoWriter, prefetch
from dmm_fast.files import whole_file
from dmm_fast.inference.overlay import overlay

Progress = Callable[[int], None]  # frames done; what it raises ends the export


def masks(project: Project, path: Path, progress: Progress) -> None:
    """One indexed PNG per frame, the ids of the project, in a zip."""
    with whole_file(path) as part, zipfile.ZipFile(part, "w") as archive:
        for index, stem in enumerate(project.clip.stems):
            image = Image.fromarray(project.ids(index))
            image.putpalette(PALETTE)
            archive.writestr(f"{stem}.png", _png(image))
            progress(index + 1)


def overlay_video(project: Project, path: Path, progress: Progress) -> None:
    """The clip with its masks drawn on it, with the times, the shape of pixels and the sound of the clip."""
    with VideoWriter(path, project.clip.size, project.clip.fps or 24, like=project.clip.frames) as writer:
        for index, frame, ids in _frames(project):
            writer.write(overlay(frame, ids))
            progress(index + 1)


def cutouts(project: Project, path: Path, progress: Progress) -> None:
    """Each object alone on a transparent ground: RGBA PNGs of the frame's size, a folder per object, in a zip."""
    folders = {label: f"{label} {_plain(name)}" for label, name in project.names.items()}
    with whole_file(path) as part, zipfile.ZipFile(part, "w") as archive:
        for index, frame, ids in _frames(project):
            for label in np.unique(ids[ids > 0]).tolist():
                alpha = np.where(ids == label, np.uint8(255), np.uint8(0))
                pixels = np.dstack([np.where(alpha[..., None] > 0, frame, np.uint8(0)), alpha])
                archive.writestr(f"{folders[label]}/{project.clip.stems[index]}.png", _png(Image.fromarray(pixels)))
            progress(index + 1)


def tracks(project: Project, path: Path, progress: Progress) -> None:
    """YouTube-VIS JSON: per object a list of COCO run-length codes, null in frames where it is not seen."""
    from pycocotools import mask as coco

    height, width = project.clip.size
    found: dict[int, dict[str, list[Any]]] = {
        label: {"segmentations": [], "bboxes": [], "areas": []} for label in project.names
    }
    for index in range(len(project.clip)):
        ids = project.ids(index)
        for label, lists in found.items():
            mask = ids == label
            code = coco.encode(np.asfortranarray(mask, np.uint8)) if mask.any() else None
            lists["segmentations"].append(code and {"size": code["size"], "counts": code["counts"].decode()})
            lists["bboxes"].append(code and coco.toBbox(code).tolist())
            lists["areas"].append(code and int(mask.sum()))
        progress(index + 1)
    video = {
        "id": 1, "width": width, "height": height, "length": len(project.clip), "fps": project.clip.fps,
        "name": project.clip.path.name, "file_names": project.clip.stems,
    }  # fmt: skip
    annotations = [
        {"id": label, "video_id": 1, "category_id": label, "iscrowd": 0, "width": width, "height": height, **lists}
        for label, lists in found.items()
    ]
    categories = [{"id": label, "name": name} for label, name in sorted(project.names.items())]
    with whole_file(path) as part:
        part.write_text(json.dumps({"videos": [video], "categories": categories, "annotations": annotations}) + "\n")


EXPORTS: dict[str, tuple[Callable[[Project, Path, Progress], None], str]] = {
    "masks": (masks, "masks.zip"),
    "overlay": (overlay_video, "overlay.mp4"),
    "cutouts": (cutouts, "cut-outs.zip"),
    "tracks": (tracks, "tracks.json"),
}


def _frames(project: Project) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for index, frame in prefetch(project.clip.read()):
        yield index, frame, project.ids(index)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _plain(name: str) -> str:
    """A name as part of a path in an archive."""
    return "".join(c if c.isalnum() or c in " -_" else "_" for c in name)

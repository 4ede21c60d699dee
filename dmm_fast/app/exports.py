"""What the page exports: a project's masks as files that other programs read."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dmm_fast.app.project import Project
from dmm_fast.data.masks import PALETTE
from dmm_fast.data.video import VideoWriter, prefetch
from dmm_fast.files import whole_file
from dmm_fast.inference.overlay import overlay
from dmm_fast.inference.report import by_object
from dmm_fast.inference.results import Tracks

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
    folders: dict[int, str] = {}
    with whole_file(path) as part, zipfile.ZipFile(part, "w") as archive:
        for index, frame, ids in _frames(project):
            for label in np.unique(ids[ids > 0]).tolist():
                alpha = np.where(ids == label, np.uint8(255), np.uint8(0))
                pixels = np.dstack([np.where(alpha[..., None] > 0, frame, np.uint8(0)), alpha])
                folder = folders.setdefault(label, f"{label} {_plain(project.names.get(label, f'Object {label}'))}")
                archive.writestr(f"{folder}/{project.clip.stems[index]}.png", _png(Image.fromarray(pixels)))
            progress(index + 1)


def tracks(project: Project, path: Path, progress: Progress) -> None:
    """YouTube-VIS JSON as of `dmm-fast segment --save tracks`, with each object as a category of its own."""
    with project.lock:
        names = dict(sorted(project.names.items()))
        rows = [{"frame": stem, "objects": project.rows.get(index, [])} for index, stem in enumerate(project.clip.stems)]
    found = by_object(rows)
    objects = {label: found.get(str(label), {"mean_score": None}) for label in names}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        result = Tracks(project.clip.frames, Path(folder), {"frames": rows, "objects": objects}, names)
        with result:
            for index, row in enumerate(rows):
                result.add(index, None, project.ids(index), row)
                progress(index + 1)
        os.replace(result.youtube_vis, path)


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

"""Zips for the servers that score results without ground truth: what each accepts, and checks before one is written.

Sources: DAVIS's and MOSE's servers want the videos' folders in the zip's root ("the folders of the sequences have to be placed
directly inside the zip. Inside every folder there must be an indexed PNG for every frame", evaluation_codalab.py of DAVIS's toolkit);
YouTube-VOS's and LVOS's want them in a folder ``Annotations``. So Cutie (hkchengrex/Cutie, results_utils.make_zip) makes the zips
with which it was scored on all four. YouTube-VOS wants the frames that its meta.json lists, every fifth; the others all.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dmm_fast.data.annotated import Video
from dmm_fast.data.datasets import VideoDataset
from dmm_fast.files import listed, whole_file

ROOTS = {"davis": "", "mose": "", "youtube-vos": "Annotations/", "lvos": "Annotations/"}


class SubmissionError(ValueError):
    """Results that a server would not accept; the message names the video and the rule."""


def check_layout(dataset: VideoDataset) -> str:
    """The folder of the zip in which videos lie; SubmissionError where no server takes such a data set."""
    if dataset.layout not in ROOTS:
        raise SubmissionError(
            f"{dataset.path}: no server takes results of the {dataset.layout} layout; those of {', '.join(ROOTS)} do"
        )
    return ROOTS[dataset.layout]


def write_submission(dataset: VideoDataset, results: Path, path: Path, progress: bool = False) -> int:
    """Write the zip of masks ``results/VIDEO/FRAME.png`` for the server of a data set; -> how many are in it.

    Every mask is checked first: it is there for each frame that the server wants, an indexed PNG of the frame's size, and has no id but those
    of objects that were given in this frame or before. Raises SubmissionError, and leaves a zip that was there as it is.
    """
    root, count = check_layout(dataset), 0
    with whole_file(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:  # PNGs are packed already
        for name in tqdm(dataset.names, desc=path.name, unit=" videos", disable=None if progress else True):
            for mask in _checked(dataset.video(name), results / name):
                entry = zipfile.ZipInfo(f"{root}{name}/{mask.name}")  # of a fixed date: the same masks give the same zip
                entry.external_attr = 0o644 << 16
                file.writestr(entry, mask.read_bytes())
                count += 1
    return count


def _checked(video: Video, folder: Path) -> Iterator[Path]:
    wanted = set(video.stems if video.scored is None else video.scored)
    first = {number: index for index, ids in video.first_masks().items() for number in np.unique(ids).tolist()}
    if missing := [stem for stem in video.stems if stem in wanted and not (folder / f"{stem}.png").is_file()]:
        raise SubmissionError(f"{folder}: {len(missing)} of {len(wanted)} masks are missing: {listed(missing)}")
    for index, stem in enumerate(video.stems):
        if stem not in wanted:
            continue
        path = folder / f"{stem}.png"
        with Image.open(path) as image:
            kind, mode, size = image.format, image.mode, image.size
            ids = np.unique(np.asarray(image)).tolist() if mode == "P" else []
        if (kind, mode) != ("PNG", "P"):
            raise SubmissionError(f"{path}: must be an indexed PNG, is {kind} with pixels of mode {mode}")
        if size != video.size[::-1]:
            raise SubmissionError(
                f"{path}: the mask is {size[0]}x{size[1]}, the frame {video.size[1]}x{video.size[0]} (width x height)"
            )
        if strange := [number for number in ids if number and first.get(number, len(video)) > index]:
            raise SubmissionError(f"{path}: object {listed([str(n) for n in strange])} was not given up to this frame; "
                                  f"given are {listed([str(n) for n in sorted(first) if n])}")  # fmt: skip
        yield path

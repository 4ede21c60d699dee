"""Where the objects of a run come from."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path

import numpy as np

from dmm_fast.data.masks import MaskWarning, read_first_masks, read_mask, without_strays
from dmm_fast.data.video import ImageFrames, VideoFrames
from dmm_fast.files import digest, listed
from dmm_fast.inference.folder import RunError

MASK_SUFFIXES = (".png", ".bmp")


class GivenMasks:
    """Where objects come from.

    A file gives the objects of the first frame, or of the frame of that name. A directory gives, by frame name,
    masks of any frames: an object goes on from each mask that it has, and 0 says nothing of objects given elsewhere. A
    directory of which no file has the name of a frame holds the first frame's masks, one file per object. clean: stray ids of
    smoothed masks are given to their neighbours, not refused.
    """

    def __init__(self, path: Path, frames: ImageFrames | VideoFrames, clean: bool = False):
        self.path, self.size, self.clean = path, frames.size, clean
        self.notes: list[str] = []
        if not path.exists():
            raise RunError(f"{path}: no such mask file or directory")
        files = [path]
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix.lower() in MASK_SUFFIXES and file.name[0] != "."]
        by_stem, stems = {file.stem: file for file in files}, set(frames.stems)
        if twice := [file for file in sorted(files) if by_stem[file.stem] != file and file.stem in stems]:
            raise RunError(f"{path}: {twice[0].name} and {by_stem[twice[0].stem].name} are masks of one frame; leave one out")
        self._files = {stem: file for stem, file in by_stem.items() if stem in stems}
        if not self._files:
            self._files = {frames.stems[0]: path}
        elif extra := sorted(file.name for stem, file in by_stem.items() if stem not in stems):
            self.notes.append(f"{path}: {len(extra)} of {len(by_stem)} masks do not have the name of a frame, such as "
                              f"{frames.stems[0]}, and are not used: {listed(extra)}")  # fmt: skip
        elif path.is_file() and path.stem != frames.stems[0]:
            self.notes.append(f"{path.name}: the mask of frame {path.stem}, whose name it has")
        self._stems = frames.stems
        self._there = [index for index, stem in enumerate(frames.stems) if stem in self._files]
        self.first = self._there[0]  # the number of the first frame that has masks
        self.read(frames.stems[self.first])  # so that a bad mask is reported at once, not after the model has loaded

    @cached_property
    def places(self) -> dict[int, list[int]]:
        """Per object the numbers of the frames in which it is given, rising; reads all masks."""
        found: dict[int, list[int]] = {}
        for index in self._there:
            for label in np.unique(self.read(self._stems[index])[0]).tolist():
                found.setdefault(label, []).append(index)
        return {label: places for label, places in sorted(found.items()) if label}

    @property
    def digests(self) -> dict[str, str]:
        """For each frame with masks, by name: what tells whether they are the same later."""
        return {self._stems[index]: _digest(self._files[self._stems[index]]) for index in self._there}

    def __contains__(self, stem: str) -> bool:
        return stem in self._files

    def read(self, stem: str) -> tuple[np.ndarray, list[str]]:
        """-> ids uint8 [H, W] and notes; in the first masks there must be an object."""
        if stem == self._stems[self.first]:
            return read_first_masks(self._files[stem], self.size, self.clean)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MaskWarning)
            ids = read_mask(self._files[stem], self.size)
        ids, cleaned = without_strays(self._files[stem], ids, self.clean)
        return ids, [*(str(warning.message) for warning in caught), *cleaned]


def _digest(path: Path) -> str:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in MASK_SUFFIXES) if path.is_dir() else [path]
    return digest(*files)


def span(stems: list[str]) -> str:
    """Frames of one stretch, for a message: "frame 00003", "frames 00000 to 00005 (6 frames)"."""
    return f"frame {stems[0]}" if len(stems) == 1 else f"frames {stems[0]} to {stems[-1]} ({len(stems)} frames)"

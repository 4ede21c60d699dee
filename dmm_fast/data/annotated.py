"""One annotated video: frames, object ids and proposals by index."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dmm_fast.data.masks import VOID, MaskWarning, check_size, read_binary, read_ids, read_mask
from dmm_fast.data.mined import SCORE, Track, mine
from dmm_fast.data.video import ImageFrames, VideoFrames, image_size
from dmm_fast.files import listed
from dmm_fast.model import Proposals
from dmm_fast.proposals.base import TOP
from dmm_fast.proposals.coco import ProposalFile, read_aligned


class DataError(ValueError):
    """A data set that is incomplete or not in its layout; the message names the file and the rule."""


class VideoObject(NamedTuple):
    """An object of a video."""

    id: int  # 1..254, its value in the id maps
    first: int  # index of the frame in which it first occurs
    category: str | None  # where the data set has categories


class Video:
    """One video: ``stems`` (the frames' names), ``size`` (H, W), frames, ids and proposals by index.

    files: the annotation files of a frame by its stem: one id map or, binary, the masks of the objects 1, 2, ..
    merge: every object counts as object 1, as DAVIS 2016 has it.
    strict: 255 is always void. Otherwise a mask of 0 and 255 alone is one object.
    dense: every visible object is in every annotation, so 0 is background. YouTube-VOS's validation split is not.
    late: objects may come later than the first frame. In DAVIS they do not: there the first mask has all that count.
    scored: the names of the frames that a server wants of a result; None for all.
    """

    def __init__(
        self,
        name: str,
        source: ImageFrames | VideoFrames,
        files: dict[str, Sequence[Path]],
        *,
        merge: bool = False,
        strict: bool = False,
        binary: bool = False,
        dense: bool = True,
        late: bool = True,
        proposals: Path | None = None,
        top: int = TOP,
    ):
        self.name, self.source, self.dense, self.late = name, source, dense, late
        self.scored: list[str] | None = None
        self.stems, self.size = list(source.stems), source.size
        self._files, self._merge, self._strict, self._binary = files, merge, strict, binary
        self._proposals, self._top = proposals, top
        if unknown := sorted(set(files) - set(self.stems)):
            raise DataError(f"{files[unknown[0]][0]}: an annotation of no frame: {source.path} has no {unknown[0]}")

    def __len__(self) -> int:
        return len(self.stems)

    def frame(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB."""
        return self.frames([index])[0]

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Several frames, in the order asked for; a video file is decoded once for all of them."""
        within = {index for index in indices if 0 <= index < len(self)}
        found = {index: frame for index, _, frame in self.source.pick(within)}
        if missing := set(indices) - set(found):  # a damaged video file may end early
            raise DataError(f"{self.source.path}: frame {min(missing)} is not there; the video has {len(self)}")
        return [found[index] for index in indices]

    @cached_property
    def annotated(self) -> list[int]:
        """Indices of the frames that have an annotation."""
        return [index for index, stem in enumerate(self.stems) if stem in self._files]

    def ids(self, index: int) -> np.ndarray | None:
        """Object ids, uint8 [H, W], 0 background, without void; None where the frame is not annotated."""
        files = self._files.get(self.stems[index])
        if files is None:
            return None
        ids = self._stack(files) if self._binary else self._read(files[0])
        return (ids > 0).astype(np.uint8) if self._merge else ids

    def truth(self, index: int) -> np.ndarray:
        """`ids` of a frame that must be annotated; DataError where it is not."""
        ids = self.ids(index)
        if ids is None:
            raise DataError(f"{self.name}: frame {self.stems[index]} is not annotated")
        return ids

    def _read(self, file: Path) -> np.ndarray:
        if self._strict:
            ids = read_ids(file)
            check_size(file, ids, self.size)
            return np.where(ids == VOID, np.uint8(0), ids)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaskWarning)  # 0/255 masks are common here, and said once in the docs
            return read_mask(file, self.size)

    def _stack(self, files: Sequence[Path]) -> np.ndarray:
        """One mask per object; where two overlap the later object is in front."""
        ids = np.zeros(self.size, np.uint8)
        for number, file in enumerate(files, 1):
            mask = read_binary(file)
            check_size(file, mask, self.size)
            ids[mask] = number
        return ids

    @cached_property
    def objects(self) -> list[VideoObject]:
        """Every object, by id; read from all annotations unless the data set lists them."""
        first: dict[int, int] = {}
        for index in self.annotated:
            for number in np.unique(self.truth(index)).tolist():
                first.setdefault(number, index)
        return [VideoObject(number, first[number], None) for number in sorted(first) if number]

    def check_first_mask(self) -> None:
        """Raise DataError where there is no mask to start from; reads none."""
        if not self.annotated:
            raise DataError(f"{self.name}: no masks; a video needs at least those of its first frame")
        if not self.late and self.annotated[0] != 0:
            raise DataError(
                f"{self.name}: no mask of the first frame, {self.stems[0]}; the first is that of {self.stems[self.annotated[0]]}"
            )

    def first_masks(self) -> dict[int, np.ndarray]:
        """What a semi-supervised run is given: by frame the ids, uint8 [H, W], of the objects that first occur there, and of no other.

        An object that is missing in the frame where the data set has it begin is taken from the first mask after that.
        Raises DataError where there is no first mask, or no object in it.
        """
        self.check_first_mask()
        if self.late:
            begin = {number: first for number, first, _ in self.objects}
        else:
            begin = {int(number): 0 for number in np.unique(self.truth(0)) if number}
        given: dict[int, np.ndarray] = {}
        waiting = dict(sorted(begin.items()))
        for index in self.annotated:
            due = [number for number, first in waiting.items() if first <= index]
            if due:
                ids = self.truth(index)
                if there := [number for number in due if (ids == number).any()]:
                    given[index] = np.where(np.isin(ids, there), ids, np.uint8(0))
                    waiting = {number: first for number, first in waiting.items() if number not in there}
        if waiting:
            raise DataError(f"{self.name}: object{'s' * (len(waiting) > 1)} {listed([*waiting])} in none of its masks")
        if not given:
            raise DataError(f"{self.name}: no object in its masks")
        return given

    @property
    def has_proposals(self) -> bool:
        return self._proposals is not None

    @cached_property
    def _coco(self) -> ProposalFile:
        if self._proposals is None:
            raise DataError(f"{self.name}: the data set was opened without proposals; name their folder (proposals=DIR)")
        return read_aligned(self._proposals, self.stems, self._top)

    def proposals(self, index: int, top: int | None = None) -> Proposals:
        """The best proposals of a frame, ``top`` at most, masks bool [M, H, W] decoded on the spot.

        Image ids as `read_aligned` takes them.
        """
        return self._coco.frame(self.stems[index], self.size, top)

    @cached_property
    def tracks(self) -> list[Track]:
        """What the proposals follow besides the annotated objects, longest first; found when first asked for."""
        file = self._coco
        least = SCORE * file.best
        found = [file.runs(stem, self.size, least) for stem in self.stems]
        return mine(found, map(self.ids, range(len(self))), self.size, file.best)


class StillFrame(ImageFrames):
    """One image as a video of one frame."""

    def __init__(self, path: Path):
        self.path, self.files, self.stems, self.size = path, [path], [path.stem], image_size(path)

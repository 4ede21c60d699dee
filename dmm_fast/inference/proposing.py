"""Where a run's proposals come from: a file or a live detector; and how a detector's are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dmm_fast.data.video import ImageFrames, VideoFrames, prefetch
from dmm_fast.inference.folder import RunError, make_out
from dmm_fast.model import Proposals, load_weights, read_weights
from dmm_fast.model.weights import write_tensors
from dmm_fast.proposals.base import TOP, merge
from dmm_fast.proposals.coco import PART, CocoWriter, ProposalFile, read_coco
from dmm_fast.proposals.sources import open_proposer, propose_all, split

DETECTOR = "detector.txt"  # in a folder of proposals: whose they are


class Live:
    """A live detector as a source of proposals; a class-agnostic one can learn the objects of the first frame."""

    def __init__(self, proposer: Callable):
        self.proposer: Any = proposer
        self.learns = getattr(proposer, "class_agnostic", False)

    def __call__(self, stem: str, frame: np.ndarray) -> Proposals:
        return self.proposer(frame)

    def tune(self, frame: np.ndarray, objects: dict[int, np.ndarray], **budget: Any) -> None:
        from dmm_fast.learning.online import tune_proposer  # training is not needed otherwise

        masks = torch.from_numpy(np.stack(list(objects.values())))
        tune_proposer(self.proposer, torch.from_numpy(frame).permute(2, 0, 1), masks, **budget)

    def save(self, path: Path) -> None:
        """What `tune` has changed."""
        write_tensors(path, self.proposer.model.roi_heads.state_dict(), {"kind": "online"})

    def load(self, path: Path) -> None:
        load_weights(self.proposer.model.roi_heads, read_weights(path), str(path))


def proposal_source(
    proposals: str | os.PathLike,
    weights: str | os.PathLike,
    offset: int | None,
    frames: ImageFrames | VideoFrames,
    device: str,
    opened: Callable[..., Callable] | None = None,
    precision: str = "float32",
) -> tuple[Callable, list[str]]:
    """(stem, frame) -> Proposals, and what the user should know of them. opened: what gives a detector in place of `open_proposer`."""
    detector, paths = split(proposals)
    live = Live((opened or open_proposer)(detector, weights, device=device, precision=precision)) if detector else None
    files, notes = open_files(paths, frames, offset)
    if live is not None and not files:
        return live, notes
    if live is None and len(files) == 1:
        return lambda stem, frame: files[0].runs(stem, frame.shape[:2]), notes

    def merged(stem: str, frame: np.ndarray) -> Proposals:
        return _with_files([live(stem, frame)] if live else [], files, stem, frame.shape[:2])

    return merged, notes


def open_files(
    paths: Sequence[str | os.PathLike], frames: ImageFrames | VideoFrames, offset: int | None = None, top: int = TOP
) -> tuple[list[ProposalFile], list[str]]:
    """Proposals files of a clip, the `top` best of a frame each, and what the user should know of them."""
    files = [read_coco(path, top) for path in paths]
    notes = [note for file in files for note in file.align(frames.stems, offset)]
    for file in files:
        file.check(frames.stems, frames.size)
    return files, notes


def _with_files(
    found: list[Proposals], files: Sequence[ProposalFile], stem: str, size: tuple[int, int], top: int = TOP
) -> Proposals:
    return merge([*found, *(file.runs(stem, size) for file in files)], size, top)


def save_proposals(
    path: Path,
    frames: ImageFrames | VideoFrames,
    propose: Callable | None,
    *,
    fresh: bool = False,
    progress: bool = False,
    label: str | None = None,
    apart: Path | None = None,
    batch: int | None = None,
    files: Sequence[str | os.PathLike] = (),
    top: int = TOP,
    whose: str = "",
) -> None:
    """Write a detector's proposals of every frame to a COCO results file, or go on where an earlier call was cut short.

    fresh: start again. label: what stands before the progress bar. apart: a path on the same storage where the file is made before it
    takes its place, for two processes that may have the same video; nothing goes on then. batch: frames that the detector has at once,
    if it can; None: 8 on a GPU, else 1. files: proposals files of the same clip, merged with the detector's, if there is one, to `top`
    a frame. whose: says what detector this is; it goes on only from one of which the same was said, on the same frames.
    """
    batch = batch or (8 if getattr(getattr(propose, "device", None), "type", "cpu") == "cuda" else 1)
    opened, notes = open_files(files, frames, top=top)
    with CocoWriter(apart or path, frames.size, fresh, f"{frames.path.resolve()}, {whose}") as writer:
        todo = [index for index, stem in enumerate(frames.stems) if stem not in writer.done]
        if writer.done and progress:
            notes.insert(0, f"going on from a run that was cut short: {len(writer.done)} frames of {path} are done")
        for note in notes if progress else []:
            tqdm.write(note)
        with tqdm(total=len(todo), desc=label, unit=" frames", disable=None if progress else True) as bar:
            coming = iter(prefetch(frames.pick(todo)))
            while some := list(islice(coming, batch)):
                found = (
                    [[each] for each in propose_all(propose, [frame for *_, frame in some])] if propose else [[]] * len(some)
                )
                for (_, stem, frame), parts in zip(some, found):
                    writer.add(stem, _with_files(parts, opened, stem, frame.shape[:2], top) if opened else parts[0])
                bar.update(len(some))
    if apart is not None:
        apart.replace(path)


def named_detector(detector: str, weights: str | os.PathLike, **how: Any) -> str:
    """A detector and its settings as a text; those that are None are its own."""
    return " ".join([detector, *([str(weights)] if weights != "DEFAULT" else []),
                     *(f"{name.replace('_', '-')} {value}" for name, value in how.items() if value is not None)])  # fmt: skip


def unusual(precision: str) -> str | None:
    """A precision, if it must be told."""
    return precision if precision != "float32" else None


def mark_detector(folder: Path, whose: str, names: Sequence[str], overwrite: bool) -> None:
    """Make a folder of proposals that says whose they are (`named_detector`); RunError where they are another detector's.

    names: of the videos whose proposals are to come. overwrite: another detector's of these are removed; none may be left of others.
    """
    mark = make_out(folder) / DETECTOR
    if mark.exists() and (before := mark.read_text().strip()) != whose:
        if not overwrite:
            raise RunError(f"{folder}: holds proposals of the detector {before}, not {whose}; --overwrite replaces them")
        ours = {f"{name}.json{part}" for name in names for part in ("", PART)}
        there = sorted(file.name for file in folder.iterdir() if file.name.endswith((".json", f".json{PART}")))
        if others := [name for name in there if name not in ours]:
            raise RunError(f"{folder}: holds proposals of the detector {before}, not {whose}, also {', '.join(others[:3])}"
                           f"{', ..' * (len(others) > 3)}, which would not be replaced; choose another --out")  # fmt: skip
        for name in there:
            (folder / name).unlink()
    mark.write_text(f"{whose}\n")

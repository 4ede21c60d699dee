"""Where a run's proposals come from: a file or a live detector; and how a detector's are kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dmm_fast.data.video import ImageFrames, VideoFrames, prefetch
from dmm_fast.model import Proposals, load_weights, read_weights
from dmm_fast.model.weights import write_tensors
from dmm_fast.proposals.coco import CocoWriter, read_coco
from dmm_fast.proposals.sources import is_detector, open_proposer


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
) -> tuple[Callable, list[str]]:
    """(stem, frame) -> Proposals, and what the user should know of them. opened: what gives a detector in place of `open_proposer`."""
    if is_detector(proposals):
        return Live((opened or open_proposer)(proposals, weights, device=device)), []
    file = read_coco(proposals)
    notes = file.align(frames.stems, offset)
    return lambda stem, frame: file.runs(stem, frame.shape[:2]), notes


def save_proposals(
    path: Path,
    frames: ImageFrames | VideoFrames,
    propose: Callable,
    *,
    fresh: bool = False,
    progress: bool = False,
    label: str | None = None,
) -> None:
    """Write a detector's proposals of every frame to a COCO results file, or go on where an earlier call was cut short.

    fresh: start again. label: what stands before the progress bar.
    """
    with CocoWriter(path, frames.size, fresh=fresh) as writer:
        todo = [index for index, stem in enumerate(frames.stems) if stem not in writer.done]
        if writer.done and progress:
            tqdm.write(f"going on from a run that was cut short: {len(writer.done)} frames of {path} are done")
        with tqdm(total=len(todo), desc=label, unit=" frames", disable=None if progress else True) as bar:
            for _, stem, frame in prefetch(frames.pick(todo)):
                writer.add(stem, propose(frame))
                bar.update()

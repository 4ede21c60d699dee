"""Where a run's proposals come from: a file or a live detector."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmm_fast.data.video import ImageFrames, VideoFrames
from dmm_fast.model import Proposals, load_weights, read_weights
from dmm_fast.model.weights import write_tensors
from dmm_fast.proposals.coco import read_coco
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
) -> tuple[Callable, list[str]]:
    """(stem, frame) -> Proposals, and what the user should know of them."""
    if is_detector(proposals):
        return Live(open_proposer(proposals, weights, device=device)), []
    file = read_coco(proposals)
    notes = file.align(frames.stems, offset)
    return lambda stem, frame: file.runs(stem, frame.shape[:2]), notes

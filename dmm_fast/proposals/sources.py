"""Proposers by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmm_fast.model import Proposals
from dmm_fast.proposals.base import TOP, ProposalError


def is_detector(name: str | os.PathLike) -> bool:
    """Whether `name` is one that `open_proposer` knows, rather than a proposals file."""
    return str(name) in ("small", "torchvision") or str(name).startswith("detectron2:") or Path(name).suffix == ".safetensors"


def open_proposer(
    name: str | os.PathLike,
    weights: str | os.PathLike = "DEFAULT",
    *,
    top: int = TOP,
    short_side: int | None = None,
    device: str | torch.device = "cpu",
) -> Callable[[np.ndarray | Tensor], Proposals]:
    """The live detector called `name`: "small" (the one in the package), "torchvision" (with `weights`), a FILE.safetensors
    of `dmm-fast train-proposals`, or "detectron2:CONFIG[:WEIGHTS]". short_side: of the frames inside it, None for its own.
    """
    name = str(name)
    if name == "torchvision":
        from dmm_fast.proposals.mask_rcnn import TorchvisionProposer

        return TorchvisionProposer(weights, top=top, short_side=short_side or 800, device=device)
    if name.startswith("detectron2:"):
        from dmm_fast.proposals.detectron2 import Detectron2Proposer

        _, config, *given = name.split(":", 2)
        return Detectron2Proposer(config, given[0] if given else None, top=top, short_side=short_side, device=device)
    if is_detector(name):
        from dmm_fast.proposals.detector import Detector, packaged_detector

        if name == "small":
            return packaged_detector(top=top, short_side=short_side, device=device)
        return Detector(name, top=top, short_side=short_side, device=device)
    raise ProposalError(f"a detector is small, torchvision, FILE.safetensors or detectron2:CONFIG[:WEIGHTS], got {name!r}")

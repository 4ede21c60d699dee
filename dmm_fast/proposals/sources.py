"""Sources of proposals by name: live detectors, files, and several of them together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmm_fast.model import Proposals
from dmm_fast.proposals.base import TOP, ProposalError, merge

PREFIXES = ("hf:", "detectron2:")
DETECTORS = "small, torchvision, FILE.safetensors, hf:MODEL or detectron2:CONFIG[:WEIGHTS]"


def sources(names: str | os.PathLike) -> list[str]:
    """The names in a list with commas. A file or folder that is there may have commas in its name: the longest name counts."""
    parts, found = str(names).split(","), list[str]()
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if _exists(",".join(parts[:n]))), 1)
        found.append(",".join(parts[:count]))
        parts = parts[count:]
    return found


def _exists(name: str) -> bool:
    """Whether a name is that of a file or folder, or of a detector with one."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return all(os.path.exists(path) for path in name.removeprefix(prefix).split(":" if prefix else "\0"))


def split(names: str | os.PathLike) -> tuple[str, list[str]]:
    """The live detectors among the sources, as one name ("" for none), and the files."""
    parts = sources(names)
    return ",".join(filter(_is_detector, parts)), [part for part in parts if not _is_detector(part)]


def is_detector(name: str | os.PathLike) -> bool:
    """Whether `name` is one that `open_proposer` knows, or several, rather than a proposals file."""
    return all(map(_is_detector, sources(name)))


def _is_detector(name: str) -> bool:
    return name in ("small", "torchvision") or name.startswith(PREFIXES) or Path(name).suffix == ".safetensors"


def renamed(names: str | os.PathLike, rename: Callable[[str], str | Path]) -> str:
    """The sources with another name for each file."""
    return ",".join(part if _is_detector(part) else str(rename(part)) for part in sources(names))


def open_proposer(
    name: str | os.PathLike,
    weights: str | os.PathLike = "DEFAULT",
    *,
    top: int = TOP,
    short_side: int | None = None,
    device: str | torch.device = "cpu",
    precision: str = "float32",
) -> Callable[[np.ndarray | Tensor], Proposals]:
    """The live detector called `name`: "small" (the one in the package), "torchvision" (with `weights`), a FILE.safetensors
    of `dmm-fast train-proposals`, "hf:MODEL" of the Hugging Face hub, "detectron2:CONFIG[:WEIGHTS]", or several, with commas.

    short_side: of the frames inside it, None for its own. precision: float32 or bfloat16, of the last two kinds.
    """
    if files := split(name)[1]:
        raise ProposalError(f"a detector is {DETECTORS}, got {files[0]!r}")
    if len(names := sources(name)) > 1:
        parts = [
            open_proposer(part, weights, top=top, short_side=short_side, device=device, precision=precision) for part in names
        ]
        return Merged(parts, top)
    name = str(name)
    if name == "torchvision":
        from dmm_fast.proposals.mask_rcnn import TorchvisionProposer

        return TorchvisionProposer(weights, top=top, short_side=short_side or 800, device=device)
    if name.startswith("hf:"):
        from dmm_fast.proposals.hub import HubProposer

        return HubProposer(name.removeprefix("hf:"), top=top, short_side=short_side, device=device, precision=precision)
    if name.startswith("detectron2:"):
        from dmm_fast.proposals.detectron2 import Detectron2Proposer

        _, config, *given = name.split(":", 2)
        return Detectron2Proposer(
            config, given[0] if given else None, top=top, short_side=short_side, device=device, precision=precision
        )
    from dmm_fast.proposals.detector import Detector, packaged_detector

    if name == "small":
        return packaged_detector(top=top, short_side=short_side, device=device)
    return Detector(name, top=top, short_side=short_side, device=device)


class Merged:
    """Several detectors as one; see `merge`."""

    def __init__(self, proposers: Sequence[Callable], top: int = TOP):
        self.proposers, self.top = proposers, top

    def __call__(self, frame: np.ndarray | Tensor) -> Proposals:
        return self.batch([frame])[0]

    def batch(self, frames: Sequence[np.ndarray | Tensor]) -> list[Proposals]:
        """The proposals of each frame."""
        found = zip(*(propose_all(propose, frames) for propose in self.proposers))
        merged = []
        for frame, parts in zip(frames, found):
            height, width = frame.shape[:2] if isinstance(frame, np.ndarray) else frame.shape[1:]
            merged.append(merge(parts, (height, width), self.top))
        return merged


def propose_all(propose: Callable, frames: Sequence[np.ndarray | Tensor]) -> list[Proposals]:
    """The proposals of frames of one size, by a detector that takes several at once (it has `batch`) or by any other."""
    return propose.batch(frames) if hasattr(propose, "batch") else [propose(frame) for frame in frames]

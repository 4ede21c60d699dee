"""dmm_fast: a differentiable assignment layer and a real-time video object segmenter (DMM-Net) for PyTorch.

    X = dmm_fast.match(cost)                      # the layer: cost [N, M] or [B, N, M]
    segmenter = dmm_fast.Segmenter(); segmenter.start(frame, masks); segmenter.step(frame, proposals)

Importing the package loads the matching op (``torch.ops.dmm.match``) and nothing heavy, and never initialises CUDA.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmm_fast.evaluation import evaluate
    from dmm_fast.inference.segmenter import Segmenter
    from dmm_fast.ops import (
        assign,
        decode_runs,
        feasibility,
        greedy,
        hungarian,
        linear_assignment,
        mask_confident,
        mask_iou,
        match,
        match_prices,
        match_tracks,
        paste_combine,
        paste_masks,
        reference,
        sinkhorn,
        upsample_argmax,
    )
    from dmm_fast.ops.info import build_info

__version__ = "0.2.0"

_OPS = (
    "assign", "decode_runs", "feasibility", "greedy", "hungarian", "linear_assignment", "mask_confident", "mask_iou", "match",
    "match_prices", "match_tracks", "paste_combine", "paste_masks", "sinkhorn", "upsample_argmax",
)  # fmt: skip
# Loaded when first asked for: their dependencies (torchvision, timm, Pillow ...) are not those of the layer.
_LAZY = {
    **dict.fromkeys(_OPS, "ops"),
    "Segmenter": "inference.segmenter",
    "build_info": "ops.info",
    "evaluate": "evaluation",
}

__all__ = [
    "Segmenter", "assign", "build_info", "decode_runs", "evaluate", "feasibility", "greedy", "hungarian", "linear_assignment",
    "mask_confident", "mask_iou", "match", "match_prices", "match_tracks", "paste_combine", "paste_masks", "reference", "sinkhorn",
    "upsample_argmax",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "reference":
        return importlib.import_module("dmm_fast.ops.reference")
    if name in _LAZY:
        value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
        globals()[name] = value  # asked for once
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# The command imports what it needs itself: `dmm-fast --help` and `python -m dmm_fast --help` must not wait for torch.
if os.path.basename(sys.argv[0] if sys.argv else "") not in ("dmm-fast", "-m"):
    from dmm_fast.ops import *  # noqa: F403
    from dmm_fast.ops import reference  # noqa: F401

"""dmm_fast: a differentiable assignment layer and a real-time video object segmenter (DMM-Net) for PyTorch.

    X = dmm_fast.match(cost)                      # the layer: cost [N, M] or [B, N, M]
    segmenter = dmm_fast.Segmenter(); segmenter.start(frame, masks); segmenter.step(frame, proposals)

Importing the package loads the matching op (``torch.ops.dmm.match``) and nothing heavy, and never initialises CUDA.
"""

from __future__ import annotations

import importlib

from .ops import match, match_prices
from .reference import assign, feasibility, greedy, hungarian, mask_confident, sinkhorn
from .vision import mask_iou, paste_combine

__version__ = "0.1.0"

# Loaded when first asked for: their dependencies (torchvision, timm, Pillow ...) are not those of the layer.
_LAZY = {
    "Segmenter": "segmenter",
    "build_info": "info",
    "evaluate": "evaluation",
}

__all__ = [
    "assign", "feasibility", "greedy", "hungarian", "mask_confident", "mask_iou", "match", "match_prices",
    "paste_combine", "sinkhorn", *_LAZY,
]  # fmt: skip


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

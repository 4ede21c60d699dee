"""What the proposal network learns from."""

from __future__ import annotations

import torch
from torch import Tensor

from dmm_fast.model.masks import mask_boxes

LEAST = 32  # pixels of a mask worth learning


def target(masks: Tensor) -> dict[str, Tensor]:
    """What torchvision's detectors learn from, for objects bool [N, H, W]."""
    masks = masks[masks.sum((1, 2)) >= LEAST]
    boxes = mask_boxes(masks)
    keep = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= 2
    return {
        "boxes": boxes[keep],
        "labels": torch.ones(int(keep.sum()), dtype=torch.int64),
        "masks": masks[keep].to(torch.uint8),
    }

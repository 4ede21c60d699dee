"""What every source of proposals shares: its error, how many are kept, and masks of the frame's size."""

from __future__ import annotations

import torch
from torch import Tensor

from dmm_fast.model import Proposals
from dmm_fast.ops.vision import paste_combine

TOP = 50  # proposals kept per frame, Section 3 of the paper


class ProposalError(ValueError):
    """A proposals file or a detector that cannot be used; the message says why."""


def full_masks(proposals: Proposals, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals with masks bool [M, H, W]; soft masks inside boxes are pasted and cut at 0.5."""
    boxes, scores, masks = (part.cpu() for part in proposals)
    if masks.dtype == torch.bool:
        if len(masks) and tuple(masks.shape[1:]) != size:
            raise ProposalError(f"masks [M, H, W] must have the frame's size {size}, got {tuple(masks.shape)}")
    else:
        each = torch.eye(len(masks), dtype=masks.dtype)  # [M, M]
        masks = paste_combine(each, masks, boxes, size) > 0.5  # [M, H, W]
    return boxes, scores, masks

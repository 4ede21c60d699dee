"""What every source of proposals shares: its error, how many are kept, and masks of the frame's size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.model import Proposals
from dmm_fast.ops.vision import NO_RUN, decode_runs, paste_combine

TOP = 50
"""Proposals kept per frame (Section 3 of the paper)."""


class ProposalError(ValueError):
    """A proposals file or a detector that cannot be used; the message says why."""


def real(boxes: Tensor, scores: Tensor, masks: Tensor) -> Proposals:
    """Proposals without the padding behind them, which has scores of -inf."""
    count = int(torch.isfinite(scores).sum())
    return Proposals(boxes[:count], scores[:count], masks[:count])


def encode_runs(masks: Tensor) -> Tensor:
    """Masks [M, H, W] bool as run-length codes [M, R] int32, which `dmm_fast.decode_runs` decodes."""
    down = masks.transpose(1, 2).flatten(1)  # column by column
    mask, place = (down != F.pad(down[:, :-1], (1, 0))).nonzero().unbind(1)  # where it changes
    counts = mask.bincount(minlength=len(masks))
    runs = torch.full((len(masks), int(counts.max()) if len(masks) else 0), NO_RUN, dtype=torch.int32, device=masks.device)
    runs[mask, torch.arange(len(mask), device=masks.device) - (counts.cumsum(0) - counts)[mask]] = place.to(torch.int32)
    return runs


def full_masks(proposals: Proposals, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals with masks bool [M, H, W]; soft masks inside boxes are pasted and cut at 0.5, run-length codes decoded."""
    boxes, scores, masks = (part.cpu() for part in proposals)
    if masks.dtype == torch.bool:
        if len(masks) and tuple(masks.shape[1:]) != size:
            raise ProposalError(f"masks [M, H, W] must have the frame's size {size}, got {tuple(masks.shape)}")
    elif masks.dtype == torch.int32:
        masks = decode_runs(masks, *size, *size) > 0.5
    else:
        each = torch.eye(len(masks), dtype=masks.dtype)  # [M, M]
        masks = paste_combine(each, masks, boxes, size) > 0.5  # [M, H, W]
    return boxes, scores, masks

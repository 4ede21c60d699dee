"""Boxes of masks, and one label per pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of masks [N, H, W] bool: [N, 4] float x0 y0 x1 y1, ends exclusive; zeros for an empty mask."""
    rows, columns = masks.any(2).to(torch.uint8), masks.any(1).to(torch.uint8)  # [N, H], [N, W]
    x0, y0 = columns.argmax(1), rows.argmax(1)
    x1 = columns.size(1) - columns.flip(1).argmax(1)
    y1 = rows.size(1) - rows.flip(1).argmax(1)
    filled = rows.amax(1).to(torch.int64)
    return (torch.stack([x0, y0, x1, y1], 1) * filled[:, None]).to(torch.float32)


def label_map(masks: Tensor, rank: Tensor) -> Tensor:
    """One label per pixel from masks [N, H, W], N <= 255: [H, W] uint8, 0 for background, else slot + 1.

    Masks are bool, or float in [0, 1]: the highest value above 0.5 wins; between equal values the higher `rank` [N] (a
    permutation of 0..N-1) does.
    """
    if masks.size(0) == 0:
        return torch.zeros(masks.shape[1:], dtype=torch.uint8, device=masks.device)
    if masks.dtype == torch.bool:
        masks = masks.to(torch.uint8)
    highest = masks.amax(0)  # [H, W]
    place = (rank + 1).to(torch.uint8)[:, None, None]
    winner = ((masks == highest).to(torch.uint8) * place).amax(0)  # [H, W], the winner's rank + 1
    slots = F.pad(torch.argsort(rank) + 1, [1, 0]).to(torch.uint8)  # [N + 1], by rank + 1
    return slots.index_select(0, winner.flatten().to(torch.int32)).view_as(winner) * (highest > 0.5)

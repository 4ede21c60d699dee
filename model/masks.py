"""Masks: boxes of masks, pasting, and one label per pixel."""

import torch
from torch import Tensor


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes of masks [N, H, W] bool: [N, 4] float x0 y0 x1 y1, ends exclusive; zeros for an empty mask."""
    rows, columns = masks.any(2).to(torch.uint8), masks.any(1).to(torch.uint8)  # [N, H], [N, W]
    x0, y0 = columns.argmax(1), rows.argmax(1)
    x1 = columns.size(1) - columns.flip(1).argmax(1)
    y1 = rows.size(1) - rows.flip(1).argmax(1)
    filled = rows.amax(1).to(torch.int64)
    return (torch.stack([x0, y0, x1, y1], 1) * filled[:, None]).to(torch.float32)


def paste_weights(low: Tensor, high: Tensor, samples: int, size: int) -> Tensor:
    """Bilinear weights [M, size, samples] that stretch `samples` mask cells over pixels [low, high), both [M].

    Pixel centres at + 0.5, tents of width 1 around the mask's cell centres, nothing outside.
    """
    centres = torch.arange(size, dtype=low.dtype, device=low.device) + 0.5
    at = (centres - low[:, None]) / (high - low).clamp(min=1e-6)[:, None] * samples - 0.5  # [M, size]
    cells = torch.arange(samples, dtype=low.dtype, device=low.device)
    return (1.0 - (at[:, :, None] - cells).abs()).clamp(min=0.0)


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Masks [M, S, S] stretched into their boxes [M, 4]: [M, height, width], each Ay M Ax^T."""
    ay = paste_weights(boxes[:, 1], boxes[:, 3], masks.size(1), height).to(masks.dtype)  # [M, H, S]
    ax = paste_weights(boxes[:, 0], boxes[:, 2], masks.size(2), width).to(masks.dtype)  # [M, W, S]
    return ay @ masks @ ax.transpose(1, 2)


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every pair of masks a [N, H, W] and b [M, H, W], bool: [N, M] float32; 0 where the union is empty."""
    a, b = a.flatten(1).to(torch.float32), b.flatten(1).to(torch.float32)
    both = a @ b.t()
    either = a.sum(1)[:, None] + b.sum(1) - both
    return both / either.clamp(min=1.0)


def label_map(masks: Tensor, rank: Tensor) -> Tensor:
    """One label per pixel from masks [N, H, W] in [0, 1]: [H, W] uint8, 0 for background, else slot + 1.

    The highest value above 0.5 wins; between equal values the higher `rank` [N] (a permutation of 0..N-1) does.
    """
    if masks.size(0) == 0:
        return torch.zeros(masks.shape[1:], dtype=torch.uint8, device=masks.device)
    # 1e-4 is far below what separates two soft masks, and enough to order values that are exactly equal.
    keyed = (masks + rank.to(masks.dtype)[:, None, None] * 1e-4) * (masks > 0.5).to(masks.dtype)
    value, slot = keyed.max(0)  # [H, W]
    return torch.where(value > 0, slot + 1, 0).to(torch.uint8)

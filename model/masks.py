"""Boxes of masks, and masks on the grid: how much of each cell a mask covers."""

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


def cover(masks: Tensor, rows: int, columns: int) -> Tensor:
    """The share of each cell that masks [N, H, W] bool cover: [N, rows, columns] float."""
    return F.adaptive_avg_pool2d(masks.to(torch.float32)[None], [rows, columns])[0]


def shared(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Cells that each pair of a [N, h, w] and b [M, h, w] has in common, and those of either, [N, M]: the smaller and the larger
    cover of each cell, summed."""
    a, b = a.flatten(1), b.flatten(1)
    total = a.sum(1)[:, None] + b.sum(1)
    apart = torch.cdist(a, b, p=1.0)  # larger minus smaller
    common = 0.5 * (total - apart)
    return common, total - common


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """IoU of each pair of masks on the grid, [N, M] in [0, 1].

    Masks that only touch share cells without overlapping: where there is no cell that both of them fill for the most part, an IoU
    below 0.1 counts as 0. Objects smaller than a cell have more.
    """
    common, either = shared(a, b)
    iou = (common / either.clamp(min=1e-12)).clamp(0.0, 1.0)
    filled = a.flatten(1).round() @ b.flatten(1).round().t()  # cells
    return torch.where(filled > 0.5, iou, F.threshold(iou, 0.1, 0.0))


def moved(masks: Tensor, motion: Tensor) -> Tensor:
    """Masks [N, h, w] moved by `motion` [N, 2], x y in cells, with bilinear weights; what leaves the grid is gone."""
    wide, tall = shift(masks.size(2), motion[:, 0]), shift(masks.size(1), motion[:, 1])
    return tall @ masks @ wide.transpose(1, 2)


def shift(cells: int, by: Tensor) -> Tensor:
    """For each `by` [N] the matrix that moves `cells` values in a column by so many: [N, cells, cells]."""
    place = torch.arange(cells, dtype=by.dtype, device=by.device)
    return (1.0 - (place[:, None] - place - by[:, None, None]).abs()).clamp(min=0.0)


def velocity(before: Tensor, after: Tensor, motion: Tensor, kept: float) -> Tensor:
    """`motion` [N, 2] after masks [N, h, w] have gone from `before` to `after`: `kept` of what it was, the rest of how far their
    centres went. A mask that appears, vanishes or changes its size (hidden in part, or taken for another) says nothing of motion."""
    seen = torch.stack([before, after])  # [2, N, h, w]
    across, down = seen.sum(2), seen.sum(3)
    x = torch.arange(seen.size(3), dtype=seen.dtype, device=seen.device)
    y = torch.arange(seen.size(2), dtype=seen.dtype, device=seen.device)
    area = down.sum(2)  # [2, N]
    # Not by matrix products: autocast would take them in bfloat16, off by up to half a cell.
    centre = torch.stack([(across * x).sum(2), (down * y).sum(2)], 2) / area.clamp(min=1e-6)[:, :, None]  # [2, N, 2]
    steady = area.amin(0) > (0.7 * area.amax(0)).clamp(min=3.0)
    return torch.where(steady[:, None], torch.lerp(centre[1] - centre[0], motion, kept), motion)


def scaled(boxes: Tensor, wide: float, tall: float) -> Tensor:
    """Boxes [R, 4] x0 y0 x1 y1 with x times `wide` and y times `tall`."""
    return torch.stack([boxes[:, ::2] * wide, boxes[:, 1::2] * tall], 2).flatten(1)

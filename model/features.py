"""Features of objects: means over their boxes (RoIAlign) or their masks, as one matrix product per level."""

import torch
import torch.nn.functional as F
from torch import Tensor


def roi_means(levels: list[Tensor], strides: list[int], boxes: Tensor) -> Tensor:
    """Mean RoIAlign features of `boxes`, the levels side by side.

    levels: each [1, C_l, h_l, w_l]; strides: pixels per cell; boxes: [R, 4] x0 y0 x1 y1 in pixels. Returns
    [R, sum C_l], equal to `roi_align(level, boxes, 14, 1 / stride, sampling_ratio=2).mean((2, 3))` per level:
    f[r, c] = sum_y sum_x wy[r, y] F[c, y, x] wx[r, x], since the samples lie on a grid and bilinear weights factor. Same rules
    as torchvision's `roi_align(aligned=False)`: an RoI is at least one cell wide, samples more than one cell outside count as 0,
    others are clamped to the border. What is small is done for all levels and both axes at once: on a GPU an operation costs the same.
    """
    if len(levels) == 0:
        return boxes.new_zeros((boxes.size(0), 0))
    samples = 28  # an axis: 14 bins of 2
    steps = (torch.arange(samples, dtype=boxes.dtype, device=boxes.device) + 0.5) / samples  # [S]
    scaled = torch.stack([boxes * (1.0 / stride) for stride in strides]).view(len(levels), -1, 2, 2)  # [L, R, corner, axis]
    low, high = scaled[:, :, 0], scaled[:, :, 1]
    at = low[..., None] + (high - low).clamp(min=1.0)[..., None] * steps  # [L, R, axis, S]
    ends: list[Tensor] = []
    cells = 0
    for level in levels:
        ends += [boxes.new_full((1,), level.size(3) - 1.0), boxes.new_full((1,), level.size(2) - 1.0)]
        cells = max(cells, level.size(2), level.size(3))
    border = torch.minimum(at.clamp(min=0.0), torch.cat(ends).view(-1, 1, 2, 1))
    at = torch.where((at - border).abs() <= 1.0, border, torch.full_like(at, -2.0))  # no cell is near -2
    cell = torch.arange(cells, dtype=boxes.dtype, device=boxes.device)
    means: list[Tensor] = []
    for number, level in enumerate(levels):
        wide = cell[: max(level.size(2), level.size(3))]
        weights = (1.0 - (at[number, ..., None] - wide).abs()).clamp(min=0.0).mean(2).to(level.dtype)  # [R, axis, cells]
        # One product over all pixels beats one per axis (no [C, h, R] between them): 1.7x forward, 3x backward on a CPU.
        window = (weights[:, 1, : level.size(2), None] * weights[:, 0, None, : level.size(3)]).flatten(1)  # [R, h w]
        means.append(window @ level[0].flatten(1).t())  # [R, C]
    return torch.cat(means, 1)


def mask_means(levels: list[Tensor], cover: Tensor) -> Tensor:
    """Mean features of the cells that masks cover, the levels side by side: [R, sum C_l]; zeros for an empty mask.

    levels: each [1, C_l, h_l, w_l], fine to coarse; cover: [R, h, w] in [0, 1], the share of each cell of any grid.
    """
    if len(levels) == 0:
        return cover.new_zeros((cover.size(0), 0))
    sums: list[Tensor] = []
    areas: list[Tensor] = []
    for level in levels:
        cover = F.adaptive_avg_pool2d(cover[:, None], [level.size(2), level.size(3)])[:, 0]
        weight = cover.flatten(1).to(level.dtype)  # [R, h w]
        sums.append(weight @ level[0].flatten(1).t())  # [R, C]
        areas.append(weight.sum(1, keepdim=True).expand_as(sums[-1]))
    return torch.cat(sums, 1) / torch.cat(areas, 1).clamp(min=1e-6)

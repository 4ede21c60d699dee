"""Inputs of paste_masks, decode_runs and upsample_argmax, and what their results must be on every backend.

A threshold turns the last bit into another answer: where the references say that a point nearly ties, both are right.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.ops import reference
from dmm_fast.ops.vision import NO_RUN

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- paste_masks ----

BOXES = [
    [0, 0, 0, 5], [5, 5, 1, 1], [3, 3, 3, 3],  # no width, turned round, a point
    [-100, -100, -50, -50], [1e3, 1e3, 2e3, 2e3], [-1e5, -1e5, 1e5, 1e5], [-1e30, -1e30, 1e30, 1e30],  # outside, huge
    [NAN, 0, 5, 5], [0, 0, INF, 5], [-INF, 0, INF, 5], [0, INF, 9, INF],
    [2.5, 2.5, 3.5, 3.5], [-5, -6, 4, 3], [14, 30, 20, 40], [1, 2, 12, 30],  # one cell, over two corners, most of it
]  # fmt: skip
PASTES = {  # name: M, S, rows, columns, samples
    "video": (30, 28, 24, 43, 2),
    "strange boxes": (len(BOXES), 7, 33, 17, 2),
    "one sample": (9, 14, 30, 21, 1),
    "three samples": (9, 5, 13, 37, 3),
    "one cell of a mask": (4, 1, 9, 8, 2),
    "one cell of the grid": (9, 7, 1, 1, 5),
    "one row": (5, 65, 1, 70, 2),
    "no masks": (0, 7, 5, 6, 2),
    "no cells of a mask": (3, 0, 5, 6, 2),
    "no rows": (3, 7, 0, 6, 2),
    "no columns": (3, 7, 5, 0, 2),
}


def paste_inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int, int, int]:
    """masks [M, S, S], boxes [M, 4], rows, columns, samples."""
    generator = torch.Generator().manual_seed(0)
    M, S, rows, columns, samples = PASTES[name]
    centre, extent = torch.rand(2, M, 2, generator=generator).double()
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], 1) * torch.tensor([columns, rows] * 2)
    if name == "strange boxes":
        boxes = torch.tensor(BOXES)
    masks = torch.rand(M, S, S, generator=generator)
    return masks.to(dtype), boxes.to(compute(dtype)), rows, columns, samples


def check_cover(cover: Tensor, masks: Tensor, boxes: Tensor, rows: int, columns: int, samples: int) -> None:
    """Every cell has the points that are clearly above 0.5, and none that is clearly below."""
    assert cover.shape == (len(masks), rows, columns) and cover.dtype == masks.dtype
    slack = 1e-9 if masks.dtype == torch.float64 else 1e-4
    rounding = 0.0 if masks.dtype == compute(masks.dtype) else torch.finfo(masks.dtype).eps  # Triton's interpreter cuts off
    pasted = reference.paste(masks.double(), boxes.double() * samples, (rows * samples, columns * samples))

    def share(above: Tensor) -> Tensor:
        return above.view(len(masks), rows, samples, columns, samples).double().mean((2, 4)).to(cover.dtype)

    least, most = share(pasted > 0.5 + slack), share(pasted > 0.5 - slack)
    assert_all((least - rounding <= cover) & (cover <= most + rounding))
    if cover.numel() > 0:
        assert float((least != most).double().mean()) < 1e-2  # nearly every cell is certain
        expected = reference.paste_masks(masks.double(), boxes.double(), rows, columns, samples).to(cover.dtype)
        assert float(((cover - expected).abs() > rounding).double().mean()) < 1e-2


# ---- decode_runs ----

RUNS = {  # name: M, R, height, width, rows, columns
    "video": (20, 60, 48, 85, 12, 22),
    "itself": (9, 40, 30, 50, 30, 50),
    "many runs": (3, 400, 30, 50, 7, 9),
    "finer": (6, 9, 5, 7, 13, 16),
    "finer down, coarser across": (6, 31, 5, 40, 12, 7),
    "coprime": (6, 17, 31, 37, 30, 36),
    "one cell": (6, 9, 37, 53, 1, 1),
    "one pixel": (4, 3, 1, 1, 1, 1),
    "one pixel, many cells": (4, 3, 1, 1, 5, 40),
    "one row": (4, 9, 1, 90, 1, 13),
    "one column": (4, 9, 90, 1, 13, 1),
    "no masks": (0, 4, 20, 20, 10, 10),
    "no places": (3, 0, 20, 20, 10, 10),
    "no rows": (3, 4, 20, 20, 0, 10),
    "no columns": (3, 4, 20, 20, 10, 0),
}


def run_inputs(name: str) -> tuple[Tensor, int, int, int, int]:
    """runs [M, R], height, width, rows, columns. The last masks are nothing, everything, and a run without an end."""
    generator = torch.Generator().manual_seed(0)
    M, R, height, width, rows, columns = RUNS[name]
    places = torch.randint(0, height * width + 1, (M, R), generator=generator).sort(1).values
    count = torch.randint(0, R + 1, (M, 1), generator=generator)
    count[: M // 2] = R
    runs = torch.where(torch.arange(R) < count, places, NO_RUN)
    if M > 3 and R > 0:
        runs[-3:] = NO_RUN
        runs[-2, 0] = 0
        runs[-1, 0] = height * width // 3
    return runs.int(), height, width, rows, columns


def full_masks(runs: Tensor, height: int, width: int) -> Tensor:
    """The masks themselves, [M, height, width] bool, position by position."""
    masks = torch.zeros(len(runs), height * width, dtype=torch.bool)
    for mask, places in zip(masks, runs.tolist()):
        for place in places:
            if place < height * width:
                mask[place:] ^= True
    return masks.view(-1, width, height).mT


def check_decoded(share: Tensor, runs: Tensor, height: int, width: int, rows: int, columns: int) -> None:
    assert share.dtype == torch.float32 and share.is_contiguous()
    expected = reference.decode_runs(runs, height, width, rows, columns)
    torch.testing.assert_close(share, expected, rtol=0, atol=1.2e-7)
    if (rows, columns) == (height, width):
        assert torch.equal(share, full_masks(runs.cpu(), height, width).float().to(share.device))
    if len(runs) > 3 and share.numel() > 0 and runs.shape[1] > 0:
        assert bool((share[-3] == 0).all()) and bool((share[-2] == 1).all())


# ---- upsample_argmax ----

LABELS = {  # name: N, h, w, height, width
    "video": (4, 24, 43, 96, 171),
    "whole factor": (3, 9, 16, 144, 128),
    "same size": (4, 10, 11, 10, 11),
    "shrink": (5, 40, 33, 13, 9),
    "shrink down, enlarge across": (5, 40, 7, 9, 70),
    "many": (255, 3, 4, 9, 11),
    "one value": (2, 1, 1, 7, 5),
    "one row": (3, 1, 9, 1, 70),
    "one pixel": (3, 9, 8, 1, 1),
    "no logits": (0, 3, 3, 5, 6),
    "no pixels": (3, 3, 3, 0, 6),
}


def label_inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int, int]:
    """logits [N, h, w], rank [N], height, width. The first and the last logits are equal; the second is never above 0."""
    generator = torch.Generator().manual_seed(0)
    N, h, w, height, width = LABELS[name]
    logits = torch.randn(N, h, w, generator=generator) - 0.5
    logits[:, : h // 4] = -1  # rows without anything
    if N > 2:
        logits[1] = -logits[1].abs()
        logits[-1] = logits[0]
    return logits.to(dtype), torch.randperm(N, generator=generator), height, width


def check_labels(labels: Tensor, logits: Tensor, rank: Tensor, height: int, width: int) -> None:
    """No label's value is clearly below the highest; exact ties go by rank."""
    assert labels.shape == (height, width) and labels.dtype == torch.uint8
    if labels.numel() == 0 or len(logits) == 0:
        return assert_all(labels == 0)
    full = F.interpolate(logits.double()[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    full = F.pad(full, (0, 0, 0, 0, 1, 0))  # [N + 1, height, width]: label 0 has value 0
    value = full.gather(0, labels[None].long())[0]
    slack = 1e-12 if logits.dtype == torch.float64 else 1e-5
    assert_all(value >= full.amax(0) - slack)
    certain = full.topk(2, 0).values.diff(dim=0)[0] < -slack
    assert_all((labels == reference.upsample_argmax(logits.double(), rank, height, width))[certain])
    if len(logits) > 2:
        lower = 0 if rank[0] < rank[-1] else len(logits) - 1
        assert_all(labels != lower + 1)
        assert_all(labels != 2)


def assert_all(condition: Tensor) -> None:
    assert bool(condition.all()), f"fails in {int((~condition).sum())} of {condition.numel()} places"

"""What every source of proposals shares: its error, how many are kept, which are the same, and masks of the frame's size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.model import Proposals
from dmm_fast.model.masks import cover, mask_boxes, scaled
from dmm_fast.ops.vision import NO_RUN, decode_runs, mask_iou, paste_combine, paste_masks

TOP = 50
"""Proposals kept per frame (Section 3 of the paper)."""
SAME = 0.7  # IoU above which two masks of one model are one proposal
TWICE = 0.9  # and of several sources: the better of two masks is often not that of the higher score
COMPARED = 240  # masks are compared with this many pixels on the frame's short side at most
AT_ONCE = 8  # masks of the frame's size at a time


class ProposalError(ValueError):
    """A proposals file or a detector that cannot be used; the message says why."""


class ProposalWarning(UserWarning):
    """Proposals that are used, but not as the file says."""


def channels_first(frame: np.ndarray | Tensor) -> Tensor:
    """A frame uint8 [H, W, 3] (array) or [3, H, W] (tensor) as the latter; ValueError for anything else."""
    given = frame if isinstance(frame, Tensor) else torch.from_numpy(np.ascontiguousarray(frame))
    tensor = given if given is frame or given.ndim != 3 else given.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.size(0) != 3 or tensor.dtype != torch.uint8:
        rule = "[3, H, W]" if given is frame else "[H, W, 3]"
        raise ValueError(f"a detector takes frames uint8 {rule}, got {given.dtype} {list(given.shape)}")
    return tensor


def checked(proposals: Proposals, size: tuple[int, int]) -> Proposals:
    """Anybody's proposals of a frame of a size (H, W), arrays or tensors, in the dtypes of `Proposals`; padding is kept.

    Raises ProposalError for shapes, dtypes and sizes that are none of those, and for what is not finite.
    """
    boxes, scores, masks = (torch.as_tensor(part) for part in proposals)
    count, runs = scores.numel(), masks.dtype == torch.int32 and masks.ndim == 2
    if scores.ndim != 1 or tuple(boxes.shape) != (count, 4) or not (masks.ndim == 3 or runs) or masks.size(0) != count:
        shapes = [list(part.shape) for part in (boxes, scores, masks)]
        raise ProposalError(f"proposals must be boxes [M, 4], scores [M] and masks [M, ., .] or [M, .], got {shapes}")
    if not (torch.isfinite(boxes).all() and (scores < torch.inf).all()):  # NaN is not less
        raise ProposalError("proposals must have finite boxes and scores")
    whole, soft = tuple(masks.shape[1:]) == size, masks.is_floating_point()
    if count and masks.dtype == torch.bool and not whole:
        raise ProposalError(f"bool proposal masks must have the frame's size {size}, got {tuple(masks.shape[1:])}")
    if count and soft and whole:
        raise ProposalError("proposal masks of the frame's size must be bool, as masks > 0.5; float ones lie in their boxes")
    if count and not (runs or masks.dtype == torch.bool or (soft and masks.size(1) == masks.size(2))):
        raise ProposalError(
            "proposal masks must be bool [M, H, W] of the frame's size, float [M, S, S] in their boxes, or int32 "
            f"[M, R] run-length codes, got {masks.dtype} {list(masks.shape)}"
        )
    return Proposals(boxes.float(), scores.float(), masks.float() if soft else masks)


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


def suppress(masks: Tensor, scores: Tensor, top: int = TOP, overlap: float = SAME) -> Tensor:
    """Indices of at most `top` masks [M, H, W] bool, best score first, none with an IoU above `overlap` with a better one."""
    order = scores.argsort(descending=True, stable=True)
    same = (mask_iou(masks[order].contiguous(), masks[order].contiguous()) > overlap).cpu().numpy()  # [M, M]
    kept: list[int] = []
    gone = np.zeros(len(same), bool)  # [M]
    for index in range(len(same)):
        if not gone[index] and len(kept) < top:
            kept.append(index)
            gone |= same[index]
    return order[kept]


def merge(found: Sequence[Proposals], size: tuple[int, int], top: int = TOP, overlap: float = TWICE) -> Proposals:
    """The `top` best proposals of several sources for a frame of `size` (H, W), best first, each mask once.

    One source's .9 is another's .5, so proposals compete by their rank in their own source; they keep their scores. The result has
    run-length codes for masks, on the device of the first source that is not on the CPU.
    """
    given = [torch.as_tensor(part.scores).device for part in found]
    device = next((each for each in given if each.type != "cpu"), torch.device("cpu"))
    found = [Proposals(*(tensor.to(device) for tensor in real(*checked(part, size)))) for part in found]
    found = [part for part in found if len(part.scores)]
    if not found:
        return Proposals(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 1, dtype=torch.int32))
    shrink = max(1.0, min(size) / COMPARED)
    grid = round(size[0] / shrink), round(size[1] / shrink)
    ranks = torch.cat([part.scores.argsort(descending=True, stable=True).argsort() for part in found])
    cells = torch.cat([_on_grid(part, size, grid) for part in found])
    kept = suppress(cells > 0.5 * cells.amax((1, 2), keepdim=True), -ranks, top, overlap)  # of what fills no cell, the fullest
    runs, first = [], 0
    for part in found:
        mine = kept[(first <= kept) & (kept < first + len(part.scores))] - first
        runs.append(as_runs(Proposals(*(tensor[mine] for tensor in part)), size))
        first += len(part.scores)
    boxes, scores = torch.cat([part.boxes for part in runs]), torch.cat([part.scores for part in runs])
    best = scores.argsort(descending=True, stable=True)
    return Proposals(boxes[best], scores[best], stack_runs([part.masks for part in runs])[best])


def _on_grid(proposals: Proposals, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """How much of each cell the masks cover, [M, *grid]."""
    boxes, _, masks = proposals
    if masks.dtype == torch.bool:
        return cover(masks, *grid)
    if masks.dtype == torch.int32:
        return decode_runs(masks, *size, *grid)
    return paste_masks(masks, scaled(boxes, grid[1] / size[1], grid[0] / size[0]), *grid)


def as_runs(proposals: Proposals, size: tuple[int, int]) -> Proposals:
    """The same with run-length codes [M, R] int32 for masks, a few at a time."""
    boxes, scores, masks = proposals
    if masks.dtype != torch.int32:
        parts = [encode_runs(_binary(*part, size)) for part in zip(masks.split(AT_ONCE), boxes.split(AT_ONCE))]
        masks = stack_runs(parts)
    return Proposals(boxes, scores, masks)


def from_logits(
    logits: Tensor, scores: Tensor, size: tuple[int, int], padded: tuple[int, int], inside: tuple[int, int]
) -> Proposals:
    """Proposals of a frame of `size` from a network's mask logits [M, h, w], enlarged bilinearly and cut at 0, a few at a time.

    padded: the image that the network saw, of which the frame is the upper left part `inside`, (H, W) each. Empty masks are left out.
    """
    boxes, runs = [torch.zeros((0, 4), device=logits.device)], [torch.zeros((0, 1), dtype=torch.int32, device=logits.device)]
    for part in logits.split(AT_ONCE):
        part = part.float()[None]
        if inside != padded:
            part = F.interpolate(part, padded, mode="bilinear")[..., : inside[0], : inside[1]]
        masks = F.interpolate(part, size, mode="bilinear")[0] > 0  # [m, H, W]
        boxes.append(mask_boxes(masks))
        runs.append(encode_runs(masks))
    real = torch.cat(boxes).any(1)
    return Proposals(torch.cat(boxes)[real], scores[real].float(), stack_runs(runs)[real])


def stack_runs(parts: Sequence[Tensor]) -> Tensor:
    """Run-length codes [M, R] of several lengths R as one [sum of M, longest R]."""
    longest = max((part.shape[1] for part in parts), default=1)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=NO_RUN) for part in parts])


def full_masks(proposals: Proposals, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals with masks bool [M, H, W]; soft masks inside boxes are pasted and cut at 0.5, run-length codes decoded."""
    boxes, scores, masks = (part.cpu() for part in proposals)
    if masks.dtype == torch.int32:
        return boxes, scores, decode_runs(masks, *size, *size) > 0.5
    return boxes, scores, _binary(masks, boxes, size)


def _binary(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of the frame's size, or soft ones inside their boxes, as bool [M, H, W]."""
    if masks.dtype == torch.bool:
        if len(masks) and tuple(masks.shape[1:]) != size:
            raise ProposalError(f"masks [M, H, W] must have the frame's size {size}, got {tuple(masks.shape)}")
        return masks
    each = torch.eye(len(masks), dtype=masks.dtype, device=masks.device)  # [M, M]
    return paste_combine(each, masks, boxes, size) > 0.5

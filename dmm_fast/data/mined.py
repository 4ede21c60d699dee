"""Further objects of a video: proposals linked over time into tracks of what is not annotated.

Videos with one annotated object often show others, which a detector finds in frame after frame. A track of such proposals is an object
to learn from, with masks as good as the detector's. What is absent from the proposals may still be there, so a track ends where
a link is missing, and says nothing about the frames outside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.model import Proposals
from dmm_fast.ops.assignment import linear_assignment
from dmm_fast.ops.vision import decode_runs

CELLS = 96  # of the longer side of the grid on which masks are compared
SCORE = 0.14  # of a linked proposal at least, of the video's best: detectors have scales of their own
MEAN_SCORE = 0.38  # of a track on average
AREA = 0.004, 0.3  # of the frame: less is hard to tell from clutter, more is the scene
LINK = 0.4  # IoU of a track's neighbours in time at least
APART = 0.15  # of the smaller mask, that two objects may have in common
LENGTH = 10  # frames


Chain = list[tuple[int, int]]  # of (frame, candidate), frame after frame


class Track(NamedTuple):
    """An object that the proposals follow without a gap: in frame ``first + i`` it is the frame's proposal ``links[i]``."""

    first: int
    links: tuple[int, ...]
    score: float  # mean of its proposals'

    def covers(self, frames: Sequence[int]) -> bool:
        return self.first <= min(frames) and max(frames) < self.first + len(self.links)

    def proposal(self, frame: int) -> int:
        return self.links[frame - self.first]


class _Frame(NamedTuple):
    rows: Tensor  # [M] which of the frame's proposals
    scores: Tensor  # [M]
    masks: Tensor  # [M, cells] 0 or 1


def mine(proposals: Iterable[Proposals], truth: Iterable[np.ndarray | None], size: tuple[int, int], best: float) -> list[Track]:
    """Tracks through a video's frames (H, W), the longest first, no two of which overlap.

    proposals: of each frame, best first, masks as run-length codes. truth: ids of each frame, None where it is not annotated: what
    overlaps an annotated object is left out. best: the highest score in the video.
    """
    scale = CELLS / max(size)
    grid = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    frames = [_candidates(found, ids, SCORE * best, size, grid) for found, ids in zip(proposals, truth, strict=True)]
    chains: list[Chain] = []
    alive: list[Chain] = []
    for number, frame in enumerate(frames):
        links = _links(frames[number - 1], frame) if alive else torch.full((0,), -1)
        # alive[i] is the chain that ends in the last frame's candidate i.
        following: list[Chain] = [[(number, i)] for i in range(len(frame.rows))]
        for chain, link in zip(alive, links.tolist()):
            if link < 0:
                chains.append(chain)
            else:
                following[link] = [*chain, (number, link)]
        alive = following
    tracks: list[Track] = []
    kept: list[Chain] = []
    for whole in sorted(chains + alive, key=len, reverse=True):
        chain = _longest([link for link in whole if not _collides(link, kept, frames)])
        if len(chain) < LENGTH:
            continue
        score = float(np.mean([float(frames[number].scores[i]) for number, i in chain]))
        if score >= MEAN_SCORE * best:
            kept.append(chain)
            tracks.append(Track(chain[0][0], tuple(int(frames[number].rows[i]) for number, i in chain), score))
    return sorted(tracks, key=lambda track: -len(track.links))


def _candidates(found: Proposals, ids: np.ndarray | None, least: float, size: tuple[int, int], grid: tuple[int, int]) -> _Frame:
    """Well-scored proposals of a good size that don't overlap the annotated objects; of alike ones the best."""
    rows = torch.nonzero(found.scores >= least)[:, 0]
    masks = (decode_runs(found.masks[rows], *size, *grid) > 0.5).float().flatten(1)  # [M, cells]
    area = masks.sum(1)
    keep = (area >= AREA[0] * masks.size(1)) & (area <= AREA[1] * masks.size(1))
    if ids is not None:
        annotated = F.adaptive_avg_pool2d(torch.from_numpy(ids > 0).float()[None], grid).flatten()
        keep &= masks @ (annotated > 0.5).float() <= APART * area
    rows, masks = rows[keep], masks[keep]
    chosen: list[int] = []
    shared = _shared(masks, masks)
    for i in range(len(rows)):  # best first
        if not chosen or float(shared[i, chosen].max()) <= 0.5:
            chosen.append(i)
    return _Frame(rows[chosen], found.scores[rows[chosen]], masks[chosen])


def _shared(a: Tensor, b: Tensor) -> Tensor:
    """What masks [N, cells] and [M, cells] have in common, as shares of the smaller: [N, M]."""
    return a @ b.T / torch.minimum(a.sum(1)[:, None], b.sum(1)).clamp(min=1)


def _links(one: _Frame, other: _Frame) -> Tensor:
    """For each candidate of a frame the next frame's that goes on with it, -1 for none: [M]."""
    if not len(one.rows) or not len(other.rows):
        return torch.full((len(one.rows),), -1)
    common = one.masks @ other.masks.T
    iou = common / (one.masks.sum(1)[:, None] + other.masks.sum(1) - common).clamp(min=1)
    choice: Tensor = linear_assignment(1 - iou, unmatched_cost=1 - LINK)  # type: ignore[assignment]
    return choice


def _collides(link: tuple[int, int], kept: Sequence[Chain], frames: Sequence[_Frame]) -> bool:
    """Whether a frame's candidate overlaps one of a track that is kept."""
    number, i = link
    others = [chain[number - chain[0][0]][1] for chain in kept if chain[0][0] <= number <= chain[-1][0]]
    masks = frames[number].masks
    return bool(others) and float(_shared(masks[[i]], masks[others]).max()) > APART


def _longest(links: Chain) -> Chain:
    """The longest part of a chain without a gap."""
    best: Chain = []
    start = 0
    for end in range(1, len(links) + 1):
        if end == len(links) or links[end][0] != links[end - 1][0] + 1:
            best, start = max(best, links[start:end], key=len), end
    return best

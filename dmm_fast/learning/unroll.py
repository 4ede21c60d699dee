"""A clip followed as in use, and what it costs: what training and online learning minimise."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dmm_fast.data.augment import Clip, size_of
from dmm_fast.learning.losses import TERMS, Loss, step_losses
from dmm_fast.model import DMMNet, Proposals
from dmm_fast.ops import hungarian


class How(Protocol):
    """What unrolling asks of a configuration: an `Unrolling`, or a `TrainConfig`, which has all of it too."""

    @property
    def loss(self) -> Loss: ...
    @property
    def freeze(self) -> bool: ...
    @property
    def assignment(self) -> str: ...
    @property
    def amp(self) -> bool: ...


@dataclass(frozen=True)
class Unrolling:
    """How a clip is followed and what counts.

    freeze: no gradient for the backbone. assignment: "layer", or "detached": the Hungarian assignment of the detached cost in
    its place. amp: the layers compute in bfloat16.
    """

    loss: Loss
    freeze: bool = False
    assignment: str = "layer"
    amp: bool = False


def unroll_all(net: DMMNet, clips: Sequence[Clip], how: How) -> Tensor:
    """The weighted loss and its terms of each clip: [clips, 1 + terms]."""
    weights = [getattr(how.loss, term) * (term != "refined" or net.config.refine != "none") for term in TERMS]
    rows = []
    for clip, levels in zip(clips, encode_all(net, clips, how)):
        terms = unroll(net, clip, levels, how)  # [terms]
        total = sum(weight * term for weight, term in zip(weights, terms))
        rows.append(torch.cat([total[None], terms]))
    return torch.stack(rows)


def encode_all(net: DMMNet, clips: Sequence[Clip], how: How) -> list[list[Tensor]]:
    """Features of each clip, levels [T, C_l, h_l, w_l]; all frames of one size go through the backbone together."""
    found: dict[int, list[Tensor]] = {}
    for size in dict.fromkeys(clip.frames.shape[2:] for clip in clips):
        group = [i for i, clip in enumerate(clips) if clip.frames.shape[2:] == size]
        frames = torch.cat([clips[i].frames for i in group])
        with torch.set_grad_enabled(not how.freeze), mixed_precision(frames.device, how):
            levels = net.encode(frames)
        counts = [len(clips[i].frames) for i in group]
        for i, *parts in zip(group, *(level.float().split(counts) for level in levels)):
            found[i] = parts
    return [found[i] for i in range(len(clips))]


def unroll(net: DMMNet, clip: Clip, levels: list[Tensor], how: How) -> Tensor:
    """The loss terms of a clip, means over its steps: [terms]."""
    valid = torch.ones(clip.masks.size(1), dtype=torch.bool, device=clip.masks.device)
    state = net.begin([level[:1] for level in levels], clip.masks[0], valid)
    steps = []
    for t in range(1, len(clip.frames)):
        features = [level[t : t + 1] for level in levels]
        candidates = net.prepare(clip.proposals[t], state, *size_of(clip))
        affinity = net.compare(features, candidates, state)
        cost = net.cost(affinity)  # [N, M]
        if how.assignment == "layer":
            assignment = net.match(cost, candidates.scores, valid)
        else:
            assignment = hungarian(cost.detach())
        with mixed_precision(cost.device, how):
            output, state = net.decide(features, candidates, affinity, assignment, state)
        losses = step_losses(output, affinity, candidates, clip.masks[t], match_iou=how.loss.match_iou, together=net.together)
        steps.append(torch.stack([losses[term] for term in TERMS]))
    return torch.stack(steps).mean(0)


def mixed_precision(device: torch.device, how: How) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if how.amp else contextlib.nullcontext()


def to_device(clip: Clip, device: torch.device) -> Clip:
    proposals = [Proposals(*(part.to(device) for part in frame)) for frame in clip.proposals]
    return clip._replace(frames=clip.frames.to(device), masks=clip.masks.to(device), proposals=proposals)

"""What goes in and out of a step: tuples of tensors only, so that a step can be scripted, exported and captured."""

from typing import NamedTuple

import torch
from torch import Tensor


class Proposals(NamedTuple):
    """Mask proposals of one frame. A score of -inf marks padding, which must follow the real proposals."""

    boxes: Tensor  # [M, 4] float, x0 y0 x1 y1 in pixels of the frame
    scores: Tensor  # [M] float
    masks: Tensor  # [M, H, W] bool, the size of the frame; or [M, S, S] float in [0, 1], inside the boxes


class State(NamedTuple):
    """All that is carried from frame to frame, for N object slots; its size does not depend on the video's length."""

    valid: Tensor  # [N] bool, the slots in use
    features: Tensor  # [N, C] float, RoI features of the templates (C = 0 without a backbone)
    templates: Tensor  # [N, H, W] bool, masks of the frame in which each object was given
    masks: Tensor  # [N, H, W] bool, last matched masks (refined ones with follow = refined)
    hidden: list[Tensor]  # refinement's temporal state, each [N, ...]; empty when refine = none


class Affinity(NamedTuple):
    """What a template and a proposal have in common: the two terms of Eq. 1."""

    cosine: Tensor  # [N, M] in [-1, 1], 0 without a backbone
    iou: Tensor  # [N, M] in [0, 1], with the object's last matched mask


class Output(NamedTuple):
    """A frame's result, one row per object slot."""

    masks: Tensor  # [N, H, W] float in [0, 1], the frame's masks (refined, or `matched` when refine = none)
    matched: Tensor  # [N, H, W] float in [0, 1], P^ of Eq. 8; the last mask where the object is lost
    labels: Tensor  # [H, W] uint8, 0 background, else slot + 1
    proposal: Tensor  # [N] int64, the matched proposal, -1 where lost or not valid
    score: Tensor  # [N] float, minus its cost (Eq. 1), 0 where lost
    runner_up: Tensor  # [N] float, the highest such score among the other proposals, 0 where there is none
    lost: Tensor  # [N] bool
    parts: Tensor  # [N, M] in [0, 1], how much of each proposal is the object's (heavy refinement; else [N, 0])


def merge(new: Tensor, state: State, other: State) -> State:
    """`other` in the slots where `new` [N] is set, `state` elsewhere."""
    hidden: list[Tensor] = []
    for mine, theirs in zip(state.hidden, other.hidden):
        hidden.append(torch.where(new[:, None, None, None], theirs, mine))
    return State(
        torch.where(new, other.valid, state.valid),
        torch.where(new[:, None], other.features, state.features),
        torch.where(new[:, None, None], other.templates, state.templates),
        torch.where(new[:, None, None], other.masks, state.masks),
        hidden,
    )


def empty_like(state: State) -> State:
    """A state of the same layout with no valid slot."""
    return State(
        torch.zeros_like(state.valid),
        torch.zeros_like(state.features),
        torch.zeros_like(state.templates),
        torch.zeros_like(state.masks),
        [torch.zeros_like(h) for h in state.hidden],
    )


def grow(state: State, slots: int) -> State:
    """The state with free slots appended until there are `slots`."""
    extra = slots - state.valid.size(0)
    tensors = [torch.cat([t, t.new_zeros((extra,) + t.shape[1:])]) for t in state[:4]]
    return State(*tensors, [torch.cat([t, t.new_zeros((extra,) + t.shape[1:])]) for t in state.hidden])

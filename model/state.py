"""What goes in and out of a step: tuples of tensors only, so that a step can be scripted, exported and captured."""

from typing import NamedTuple

import torch
from torch import Tensor


class Proposals(NamedTuple):
    """Mask proposals of one frame. A score of -inf marks padding, which must follow the real proposals."""

    boxes: Tensor  # [M, 4] float, x0 y0 x1 y1 in pixels of the frame
    scores: Tensor  # [M] float
    masks: Tensor  # one of three kinds, by dtype:
    # float [M, S, S] in [0, 1], inside the boxes, as a detector gives them;
    # int32 [M, R], run-length codes: see `torch.ops.dmm.decode_runs`, padded with `NO_RUN`;
    # bool [M, H, W], the size of the frame


class Candidates(NamedTuple):
    """Proposals made ready for a frame of `height` x `width` pixels: all but the matched ones are looked at on the grid only."""

    boxes: Tensor  # [M, 4] float, x0 y0 x1 y1 in pixels of the frame
    scores: Tensor  # [M] float
    masks: Tensor  # as given
    cover: Tensor  # [M, h, w] float, the share of each cell of the grid that the mask covers
    height: int
    width: int


class State(NamedTuple):
    """All that is carried from frame to frame, for N object slots; its size does not depend on the video's length."""

    valid: Tensor  # [N] bool, the slots in use
    features: Tensor  # [N, C] float, unit features of the templates (C = 0 without a backbone)
    templates: Tensor  # [N, h, w] float, masks of the frame in which each object was given, on the grid (`DMMNet.grid`)
    masks: Tensor  # [N, h, w] float, last matched masks (refined ones with follow = refined), on the grid
    motion: Tensor  # [N, 2] float, x y, cells of the grid by which `masks` move from frame to frame
    full: Tensor  # [N, H, W] bool, the last masks at the frame's size; [N, 0, 0] where refine = heavy, which needs none
    hidden: list[Tensor]  # refinement's temporal state, each [N, ...]; empty when refine = none


class Affinity(NamedTuple):
    """What a template and a proposal have in common: the two terms of Eq. 1."""

    cosine: Tensor  # [N, M] in [-1, 1], 0 without a backbone
    iou: Tensor  # [N, M] in [0, 1], with the object's last mask, where it should be by now
    features: Tensor  # [M, C] float, unit features of the proposals


class Output(NamedTuple):
    """A frame's result, one row per object slot."""

    logits: Tensor  # [N, h, w] float, of the frame's masks (refined, or `matched`): on the grid where refine = heavy, else [N, H, W]
    matched: Tensor  # float in [0, 1], P^ of Eq. 8; the last mask where the object is lost. The size of `logits`
    labels: Tensor  # [H, W] uint8, 0 background, else slot + 1; without objects of less than `min_certainty`
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
        torch.where(new[:, None], other.motion, state.motion),
        torch.where(new[:, None, None], other.full, state.full),
        hidden,
    )


def empty_like(state: State) -> State:
    """A state of the same layout with no valid slot."""
    return State(
        torch.zeros_like(state.valid),
        torch.zeros_like(state.features),
        torch.zeros_like(state.templates),
        torch.zeros_like(state.masks),
        torch.zeros_like(state.motion),
        torch.zeros_like(state.full),
        [torch.zeros_like(h) for h in state.hidden],
    )


def grow(state: State, slots: int) -> State:
    """The state with free slots appended until there are `slots`."""
    extra = slots - state.valid.size(0)
    tensors = [torch.cat([t, t.new_zeros((extra,) + t.shape[1:])]) for t in state[:-1]]
    return State(*tensors, [torch.cat([t, t.new_zeros((extra,) + t.shape[1:])]) for t in state.hidden])

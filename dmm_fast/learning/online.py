"""Online learning: before a video is segmented, the network is fitted to its first frame."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dmm_fast.data.augment import MIN_SHARE, Augment, Clip, areas, tight
from dmm_fast.data.clips import noisy_proposals, nothing
from dmm_fast.learning.average import Average
from dmm_fast.learning.losses import Loss
from dmm_fast.learning.targets import target
from dmm_fast.learning.unroll import Unrolling, to_device, unroll_all
from dmm_fast.model import DMMNet, Proposals
from dmm_fast.proposals.base import full_masks
from dmm_fast.proposals.detector import Detector

LOSS = Loss(refined=1.0, matched=0.5, cosine=0.5, parts=0.5, bce=2.0)  # as in training/small.yaml
EPOCH = 8  # steps: there is one image, so an epoch is a round number of views of it


@torch.enable_grad()
def tune(
    net: DMMNet,
    frame: Tensor,
    masks: Tensor,
    proposals: Proposals | None = None,
    *,
    seconds: float | None = None,
    epochs: int | None = None,
    rate: float = 3e-4,
    share: float = 0.5,
    frames: int = 3,
    seed: int = 0,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Fit `net` in place to a first frame [3, H, W] uint8 with objects `masks` [N, H, W] bool; returns the steps taken.

    Each step unrolls a clip of `frames` views of that frame, turned, bent, recoloured and shifted from one to the next, as
    `StillClips` are, with its `proposals`, or at times simulated ones; without `proposals` always. Everything but the
    backbone learns. The result lies a `share` of the way from the weights before to the average of those over the last steps: half
    the way brings most of the gain, and less harm where the object will look different (docs/model.md). It ends after so many
    `seconds`, or `epochs` of 8 steps; one of them must be given; or before that, once `stop()` is true. A call that raises leaves
    `net` as it was.
    """
    _check(masks, seconds, epochs)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"online learning: share must be in (0, 1], got {share!r}")
    how = Unrolling(LOSS, freeze=True)
    learned = {name: p for name, p in net.named_parameters() if not name.startswith("backbone.")}
    if not learned:
        raise ValueError("online learning: this network has nothing to learn but its backbone")
    clip = Clip(frame[None].cpu(), masks[None].cpu(), [_whole(proposals, tuple(masks.shape[1:]))], "first frame")
    views = Views(clip, net.resized(*frame.shape[1:]), frames, seed)
    kept = {name: p.detach().clone() for name, p in learned.items()}
    flags = [p.requires_grad for p in net.parameters()]
    for name, p in net.named_parameters():
        p.requires_grad_(name in learned)
    optimizer = torch.optim.AdamW(learned.values(), lr=rate, weight_decay=0.0)
    average = Average(net, 0.95)
    began, step = time.monotonic(), 0
    total = epochs * EPOCH if epochs else None
    try:
        with tqdm(total=total, desc="learning the first frame", unit=" steps", disable=None if progress else True) as bar:
            while not stop() and (step < total if total else step == 0 or time.monotonic() - began < seconds):
                loss = unroll_all(net, [to_device(views(step), frame.device)], how)[0, 0]
                value = _finite(loss, step, rate)
                loss.backward()
                nn.utils.clip_grad_norm_(learned.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                average.update(step)
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                bar.update()
        kept = {name: torch.lerp(before, average.shadow[name], share) for name, before in kept.items()}
    finally:
        net.load_state_dict({**net.state_dict(), **kept})
        for p, flag in zip(net.parameters(), flags):
            p.requires_grad_(flag)
    return step


@torch.enable_grad()
def tune_proposer(
    proposer: Detector,
    frame: Tensor,
    masks: Tensor,
    *,
    seconds: float | None = None,
    epochs: int | None = None,
    rate: float = 5e-4,
    seed: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Fit the heads of a class-agnostic proposal network in place to a first frame, arguments as for `tune`.

    Only what lies behind the regions learns (scores, boxes, masks), on views of the frame with its objects as the truth. A call
    that raises leaves the network as it was.
    """
    _check(masks, seconds, epochs)
    net = proposer.model
    if not getattr(proposer, "class_agnostic", False):
        raise ValueError("online learning: this detector tells classes apart; only class-agnostic ones can learn an object")
    learned = list(net.roi_heads.parameters())
    before = [p.detach().clone() for p in learned]
    clip = Clip(frame[None].cpu(), masks[None].cpu(), [nothing(masks.shape[1:])], "first frame")
    views = Views(clip, tuple(masks.shape[1:]), 1, seed, objects_only=True)
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    began, step = time.monotonic(), 0
    total = epochs * EPOCH if epochs else None
    net.train()
    net.roi_heads.requires_grad_(True)
    try:
        while not stop() and (step < total if total else step == 0 or time.monotonic() - began < seconds):
            torch.manual_seed(seed + step)  # torchvision samples regions at random
            view = views(step)
            truth = {name: value.to(proposer.device) for name, value in target(view.masks[0]).items()}
            losses = net([view.frames[0].to(proposer.device) / 255.0], [truth])
            loss = sum(value for name, value in losses.items() if "rpn" not in name and name != "loss_objectness")
            _finite(loss, step, rate)
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 5.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    except BaseException:
        with torch.no_grad():
            for p, was in zip(learned, before):
                p.copy_(was)
        raise
    finally:
        net.eval().requires_grad_(False)
    return step


def _check(masks: Tensor, seconds: float | None, epochs: int | None) -> None:
    if (seconds is None) == (epochs is None) or not (epochs if seconds is None else seconds) > 0:
        raise ValueError(f"online learning needs seconds or epochs above 0, got {seconds} and {epochs}")
    if masks.dtype != torch.bool or masks.ndim != 3 or not len(masks) or not masks.flatten(1).any(1).all():
        raise ValueError("online learning needs masks [N, H, W] bool of one object or more, none of them empty")


def _finite(loss: Tensor, step: int, rate: float) -> float:
    """The loss of a step, from 0."""
    value = loss.item()
    if not math.isfinite(value):
        raise RuntimeError(f"online learning: the loss is {value} at step {step + 1}; try a rate below {rate:g}")
    return value


class Views:
    """Clips made of one frame: `views(step)` depends on the seed and the step alone."""

    def __init__(self, clip: Clip, size: tuple[int, int], frames: int, seed: int, objects_only: bool = False):
        self.clip = clip._replace(
            frames=clip.frames.repeat(frames, 1, 1, 1), masks=clip.masks.repeat(frames, 1, 1, 1),
            proposals=clip.proposals * frames,
        )  # fmt: skip
        smallest = int(areas(clip.masks[0]).min()) / clip.masks[0, 0].numel()
        self.augment = Augment(
            size, zoom=(0.8, 1.35), rotate=15, warp=0.05, shift=0.12, jitter=0.5, least=min(MIN_SHARE, smallest / 3)
        )
        self.seed, self.objects_only = seed, objects_only

    def __call__(self, step: int) -> Clip:
        rng = np.random.default_rng([self.seed, step])
        clip = self.augment(self.clip, rng)
        if self.objects_only:
            return clip
        if not len(self.clip.proposals[0].scores) or rng.random() < 0.2:
            clip = clip._replace(proposals=[noisy_proposals(masks, rng) for masks in clip.masks])
        return clip


def _whole(proposals: Proposals | None, size: tuple[int, int]) -> Proposals:
    """Proposals on the CPU, with masks of the frame's size; padding is left out."""
    if proposals is None:
        return nothing(size)
    _, scores, masks = full_masks(proposals, size)
    return tight(masks, scores)

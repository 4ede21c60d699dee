"""Clips with several objects, made by pasting objects of some videos into others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.data.augment import Augment, Clip, affine_grid, areas, seen, size_of, tight, tight_boxes, to_uint8
from dmm_fast.data.clips import TOP, UNFOUND, ClipDataset, Clips, StillClips, noisy_proposals, overlooked
from dmm_fast.data.datasets import StillsDataset, VideoDataset
from dmm_fast.model import Proposals


class Layer(NamedTuple):
    """Something to paste: where in the frame, and RGB and opacity in [0, 1], float [T, 4, h, w]."""

    window: tuple[slice, slice]  # rows, columns
    pixels: Tensor
    wanted: bool = True  # an object of the clip, with a mask; else nobody's
    proposed: bool = True  # a detector may find it


class Path(NamedTuple):
    """How a pasted object moves through T frames."""

    places: np.ndarray  # [T, 2] x, y in pixels of the frame: where the object's origin is
    scale: np.ndarray  # [T] pixels of the frame per pixel of the source
    angle: np.ndarray  # [T] radians
    mirrored: bool = False


class PasteClips(Clips):
    """Multi-object clips: objects of some videos pasted into others, along smooth paths, before and behind each other.

    videos: where backgrounds (with their own objects and proposals) come from. donors: where objects come from; default
    the same. pasted: how many, from .. to. same: chance that an object is pasted into the video it was cut from.
    scale: of a pasted object. unfound: chance that a pasted object is missed in most frames (`overlooked`). Ground truth is exact:
    what is covered is not in a mask. Proposals are the background's, less what is now covered, and noisy ones of what was
    pasted. settings: of the clips that are cut (`ClipDataset`).
    """

    def __init__(
        self,
        videos: VideoDataset,
        frames: int = 2,
        *,
        size: tuple[int, int] = (240, 427),
        donors: VideoDataset | None = None,
        pasted: tuple[int, int] = (1, 4),
        same: float = 0.15,
        scale: tuple[float, float] = (0.5, 1.5),
        unfound: float = UNFOUND,
        top: int = TOP,
        augment: Augment | None = None,
        length: int | None = None,
        seed: int = 0,
        **settings,
    ):
        super().__init__(length or len(videos), augment or Augment(size), seed, top=top)
        if not 1 <= pasted[0] <= pasted[1] or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"pasted and scale must be ranges above 0, got {pasted} and {scale}")
        if not 0 <= unfound <= 1:
            raise ValueError(f"unfound is a chance, from 0 to 1, got {unfound}")
        self.pasted, self.same, self.scale, self.unfound = pasted, same, scale, unfound
        self.grounds = cut(videos, frames, size, top=top, **settings)
        self.donors = cut(donors or videos, frames, size, top=0, **settings)

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        ground = self.grounds.draw(index, rng)
        count = rng.integers(self.pasted[0], self.pasted[1] + 1)
        layers = [self._layer(index if rng.random() < self.same else None, rng) for _ in range(count)]
        return seen(composite(ground, layers, rng, self.top, unfound=self.unfound))

    def _layer(self, index: int | None, rng: np.random.Generator) -> Layer:
        """An object of some video on its way."""
        clip = self.donors.draw(int(rng.integers(len(self.donors))) if index is None else index, rng)
        mask = clip.masks[:, rng.integers(clip.masks.size(1))]  # [T, H, W]
        path, origin = _drift(mask, rng, self.scale)
        return painted(clip.frames.float(), mask, origin, path, size_of(clip))


def cut(videos: VideoDataset, frames: int, size: tuple[int, int], **settings) -> Clips:
    """Clips of a size to paste from and to; stills move."""
    if isinstance(videos, StillsDataset):
        return StillClips(videos, frames, motion=0.6, augment=Augment(size, 0, hue=0, grey=0, blur=0), **settings)
    return ClipDataset(videos, frames, augment=Augment.none(size), **settings)


def _drift(mask: Tensor, rng: np.random.Generator, scales: tuple[float, float]) -> tuple[Path, np.ndarray]:
    """A smooth path for the object of mask [T, H, W] in frames of its size, and the object's origin [2], x and y.

    The object starts inside the frame, then moves, turns and grows steadily, besides its motion in its own video.
    """
    length, height, width = mask.shape
    x0, y0, x1, y1 = tight_boxes(mask[:1])[0].tolist()
    fits = 0.8 * min(width / (x1 - x0), height / (y1 - y0))
    log_scale = math.log(min(math.exp(rng.uniform(*np.log(scales))), fits)) + rng.normal(0, 0.03) * np.arange(length)
    angle = rng.normal(0, 0.15) + rng.normal(0, 0.05) * np.arange(length)
    time = np.arange(length)[:, None]  # [T, 1]
    step = min(height, width) * (rng.uniform(-0.08, 0.08, 2) * time + rng.normal(0, 0.01, 2) * time**2)
    places = rng.uniform(0.15, 0.85, 2) * (width, height) + step
    return Path(places, np.exp(log_scale), angle, rng.choice([-1, 1]) < 0), np.array([x0 + x1, y0 + y1]) / 2


def painted(
    frames: Tensor, mask: Tensor, origin: np.ndarray, path: Path, size: tuple[int, int], rim: int = 1, **role: bool
) -> Layer:
    """The object of mask [T, h, w] bool in frames [T, 3, h, w] float on its path through frames of a size (H, W).

    origin: [2] or [T, 2], the point of the source that is on the path. rim: pixels that the object loses all around, or it
    would bring an edge of its old background along. role: the layer's.
    """
    height, width = size
    cos, sin = np.cos(path.angle) / path.scale, np.sin(path.angle) / path.scale
    mirror = -1 if path.mirrored else 1
    linear = np.stack([mirror * cos, -mirror * sin, sin, cos], 1).reshape(len(mask), 2, 2)  # a step in the source
    x0, y0, x1, y1 = tight_boxes(mask.any(0, keepdim=True))[0].tolist()
    corners = np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) - np.broadcast_to(origin, (len(mask), 2))[:, None]
    places = path.places[:, None] + corners @ np.linalg.inv(linear).transpose(0, 2, 1)  # [T, 4, 2]
    low = np.clip(places.min((0, 1)).astype(int) - 1, 0, (width - 1, height - 1))
    high = np.clip(places.max((0, 1)).astype(int) + 2, low + 1, (width, height))
    source = origin + (linear @ ((low + high) / 2 - path.places)[:, :, None])[..., 0]
    window = slice(low[1], high[1]), slice(low[0], high[0])
    grid = affine_grid(linear, source, (mask.shape[1], mask.shape[2]), (int(high[1] - low[1]), int(high[0] - low[0])))
    inner = mask[:, None].float()
    if rim:
        inner = 1 - F.max_pool2d(1 - inner, 2 * rim + 1, 1, rim)
    return Layer(window, F.grid_sample(torch.cat([frames, inner], 1), grid, align_corners=False), **role)


def composite(
    ground: Clip,
    layers: Sequence[Layer],
    rng: np.random.Generator,
    top: int = TOP,
    behind: int | None = None,
    unfound: float = UNFOUND,
) -> Clip:
    """Paint layers over a clip, back to front; ``behind`` of them lie behind the clip's own objects, by default a random number.

    The masks are the ground's and then the wanted layers', in order, of what is seen of them. unfound: chance
    that a proposed layer is missed in most frames.
    """
    own = ground.masks.any(1)  # [T, H, W]
    if behind is None:
        behind = int(rng.integers(len(layers) + 1)) if rng.random() < 0.5 else 0
    frames, cover = ground.frames.float(), torch.zeros(own.shape, dtype=torch.int16)  # the pasted layer on top, from 1
    for number, (window, pixels, *_) in enumerate(layers, 1):
        alpha, part = pixels[:, 3], frames[(..., *window)]  # [T, h, w], [T, 3, h, w]
        if number <= behind:
            alpha = alpha * ~own[(..., *window)]
        part += alpha[:, None] * (pixels[:, :3] - part)
        cover[(..., *window)][alpha > 0.5] = number
    pasted = cover[:, None] == torch.arange(1, len(layers) + 1)[:, None, None]  # [T, K, H, W]
    open_ = cover == 0
    wanted, proposed = ([getattr(layer, role) for layer in layers] for role in ("wanted", "proposed"))
    masks = torch.cat([ground.masks & open_[:, None], pasted[:, wanted]], 1)
    miss = overlooked(sum(proposed), rng, unfound)
    proposals = [
        _merge(_uncovered(given, clear), noisy_proposals(new, rng, top=top, miss=miss, clutter=2), top)
        for given, clear, new in zip(ground.proposals, open_, pasted[:, proposed])
    ]
    return Clip(to_uint8(frames), masks, proposals, f"{ground.name}+{len(layers)}")


def _uncovered(given: Proposals, clear: Tensor) -> Proposals:
    """What a detector would still find where only ``clear`` [H, W] is left of the frame."""
    left = given.masks & clear
    keep = areas(left) > 0.3 * areas(given.masks)
    return tight(left[keep], given.scores[keep])


def _merge(one: Proposals, other: Proposals, top: int) -> Proposals:
    """Both, best first, at most ``top``."""
    boxes, scores, masks = (torch.cat(parts) for parts in zip(one, other))
    best = scores.argsort(descending=True)[:top]
    return Proposals(boxes[best], scores[best], masks[best])

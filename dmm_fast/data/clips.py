"""Training clips: cut from videos, made from stills, pasted together, or drawn.

Every source is a map-style data set of `Clip`s. ``clips[i]`` depends on (seed, epoch, i) and on nothing else: not on the
order, the number of workers or what was asked before, so training resumes anywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from dmm_fast.data.annotated import DataError, Video
from dmm_fast.data.augment import MIN_AREA, MIN_SHARE, Augment, Clip, affine_grid, areas, seen, tight, tight_boxes, to_uint8
from dmm_fast.data.datasets import StillsDataset, VideoDataset
from dmm_fast.data.synthetic import Scene
from dmm_fast.model import Proposals
from dmm_fast.ops.vision import paste_combine

__all__ = [
    "Augment", "Clip", "ClipDataset", "Clips", "Mixture", "PasteClips", "StillClips", "SyntheticClips", "noisy_proposals",
]  # fmt: skip

TOP = 20  # proposals of a frame that training sees


# ----------------------------------------------------------------------------------------------------- detector noise


def noisy_proposals(
    masks: Tensor,
    rng: np.random.Generator,
    *,
    top: int = TOP,
    miss: float = 0.08,
    twice: float = 0.5,
    part: float = 0.35,
    merge: float = 0.25,
    clutter: int = 6,
    noise: float = 0.6,
) -> Proposals:
    """What a detector might find of true masks [N, H, W] bool: at most ``top`` proposals, best first.

    Each seen object is found unless missed, at times twice, as a part of it, or merged with another, and there is
    clutter: pieces of nothing. All go through what a mask head does, 28 x 28 values inside a box that is a little
    off, with errors that are smooth over the mask: outlines are dilated here and eroded there. noise: how strong; at the
    default the best proposal's IoU has about the median, .82, of a COCO-trained segmenter on DAVIS 2016's training videos.
    """
    there = masks[areas(masks) >= MIN_AREA]
    found: list[tuple[Tensor, float, float]] = []  # mask, strength of its noise, score
    for index, mask in enumerate(there):
        if rng.random() >= miss:
            found.append((mask, noise * rng.uniform(0.3, 1), rng.uniform(0.6, 0.99)))
        if rng.random() < twice:
            found.append((mask, noise * rng.uniform(1, 2.5), rng.uniform(0.2, 0.8)))
        if rng.random() < part:
            found.append((_part(mask, rng), noise, rng.uniform(0.1, 0.7)))
        if len(there) > 1 and rng.random() < merge:
            other = (index + rng.integers(1, len(there))) % len(there)
            found.append((mask | there[other], noise, rng.uniform(0.1, 0.6)))
    found += [(_blob(masks.shape[1:], rng), 3 * noise, rng.uniform(0.02, 0.5)) for _ in range(rng.poisson(clutter))]
    found = sorted((item for item in found if item[0].any()), key=lambda item: -item[2])[:top]
    if not found:
        return nothing(masks.shape[1:])
    stack, strength, scores = zip(*found)
    return tight(_mask_head(torch.stack(stack), np.array(strength), rng), torch.tensor(scores, dtype=torch.float32))


def nothing(size: Sequence[int]) -> Proposals:
    """No proposals for a frame of a size (H, W)."""
    return Proposals(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, *size, dtype=torch.bool))


def _mask_head(masks: Tensor, strength: np.ndarray, rng: np.random.Generator, cells: int = 28) -> Tensor:
    """masks [M, H, W] bool as a mask head would give them, with smooth noise of strength [M]."""
    count, size = len(masks), (masks.size(1), masks.size(2))
    boxes = tight_boxes(masks)  # [M, 4]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    amount = torch.from_numpy(strength).float()
    boxes = boxes + 0.1 * amount[:, None] * sides * torch.from_numpy(rng.normal(size=(count, 4))).float()
    boxes = torch.cat([boxes[:, :2] - 1, torch.maximum(boxes[:, 2:], boxes[:, :2] + 4) + 1], 1)
    # Each box's own mask: the index in front of a box names its image.
    soft = roi_align(masks[:, None].float(), torch.cat([torch.arange(count)[:, None], boxes], 1), cells, aligned=True)[:, 0]
    waves = torch.from_numpy(rng.normal(size=(count, 1, 5, 5))).float()
    waves = F.interpolate(waves, (cells, cells), mode="bicubic", align_corners=True)[:, 0]  # [M, 28, 28]
    # Outlines only move where the mask has a slope, so it gets one: a box blur of three cells.
    slope = F.avg_pool2d(soft[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    cut = (slope + 0.5 * amount[:, None, None] * waves).clamp(0, 1)
    return paste_combine(torch.eye(count), cut, boxes, size) > 0.5


def _part(mask: Tensor, rng: np.random.Generator) -> Tensor:
    """What lies on one side of a line through the mask, near its middle."""
    y, x = torch.nonzero(mask, as_tuple=True)
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    side = along > torch.quantile(along[:: max(len(along) // 1000, 1)], rng.uniform(0.3, 0.7))
    out = torch.zeros_like(mask)
    out[y[side], x[side]] = True
    return out


def _blob(size: Sequence[int], rng: np.random.Generator) -> Tensor:
    height, width = size
    radii = rng.uniform(0.04, 0.3, 2) * min(size)
    y = torch.arange(height)[:, None] - rng.uniform(0, height)
    x = torch.arange(width)[None] - rng.uniform(0, width)
    return (x / radii[0]) ** 2 + (y / radii[1]) ** 2 < 1


# ------------------------------------------------------------------------------------------------------ clips by index


class Clips(Dataset):
    """An epoch of ``length`` clips; a source defines ``make(index, rng)``, and ``augment`` comes after it.

    noisy: share of clips whose proposals are then simulated from the masks (`noisy_proposals`), ``top`` at most.
    The epoch lies in shared memory, so workers that outlive an epoch know of the next.
    """

    def __init__(self, length: int, augment: Augment | None = None, seed: int = 0, noisy: float = 0.0, top: int = TOP):
        if length < 1:
            raise ValueError(f"an epoch needs at least one clip, got {length}")
        self.length, self.augment, self.seed, self.noisy, self.top = length, augment, seed, noisy, top
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of {self.length}")
        return self.draw(index, np.random.default_rng([self.seed, self.epoch, index]))

    def draw(self, index: int, rng: np.random.Generator) -> Clip:
        """A clip from ``rng``; index says which video where there is a choice."""
        clip = self.make(index, rng)
        if self.augment:
            clip = self.augment(clip, rng)
        if rng.random() < self.noisy:
            clip = clip._replace(proposals=[noisy_proposals(masks, rng, top=self.top) for masks in clip.masks])
        return clip

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        raise NotImplementedError


class ClipDataset(Clips):
    """Clips of ``frames`` annotated frames from videos, in turn.

    skips: annotated frames from one to the next, drawn for each step. reverse: chance of a clip that runs backwards.
    objects: at most so many of a clip's, chosen at random. noisy: share of clips with simulated proposals; where the
    data set has no others, all. missed: share of frames, and in the others of proposals, that the detector is made to
    miss. top: proposals of a frame at most. length: clips in an epoch, default one per video.
    """

    def __init__(
        self,
        videos: VideoDataset,
        frames: int = 2,
        *,
        skips: tuple[int, int] = (1, 5),
        reverse: float = 0.5,
        objects: int = 8,
        top: int = TOP,
        noisy: float = 0.0,
        missed: float = 0.0,
        augment: Augment | None = None,
        length: int | None = None,
        seed: int = 0,
    ):
        super().__init__(length or len(videos), augment, seed, 1.0 if videos.proposals is None else noisy, top)
        self.missed = missed
        if frames < 1 or not 1 <= skips[0] <= skips[1]:
            raise ValueError(f"a clip needs frames >= 1 and skips 1 <= least <= most, got {frames} and {skips}")
        self.videos, self.frames, self.skips, self.reverse, self.objects = videos, frames, skips, reverse, objects

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        video = self.videos.video(self.videos.names[index % len(self.videos)])
        chosen, numbers = self._choose(video, rng)
        ids = np.stack([video.truth(i) for i in chosen])  # [T, H, W]
        masks = torch.from_numpy(ids[:, None] == numbers[:, None, None])  # [T, N, H, W]
        frames = torch.from_numpy(np.stack(video.frames(chosen))).permute(0, 3, 1, 2).contiguous()
        if video.has_proposals:
            found = [video.proposals(i) for i in chosen]
            proposals = [self._found(given, rng) for given in found]
        else:
            proposals = [nothing(video.size)] * self.frames
        return Clip(frames, masks, proposals, video.name)

    def _found(self, given: Proposals, rng: np.random.Generator) -> Proposals:
        best = given.scores[: self.top]
        keep = torch.from_numpy((rng.random(len(best)) >= self.missed) & (rng.random() >= self.missed))
        return tight(given.masks[: self.top][keep], best[keep])

    def _choose(self, video: Video, rng: np.random.Generator) -> tuple[list[int], np.ndarray]:
        """Frames of a clip and the objects of its first, ids [N] uint8."""
        known = video.annotated if video.dense else []
        if len(known) < self.frames:
            rule = "frames in which every object is annotated"
            raise DataError(f"{video.name}: {len(known)} {rule}, a clip needs {self.frames}; leave the video out")
        gaps = rng.integers(self.skips[0], self.skips[1] + 1, self.frames - 1)
        while gaps.sum() > len(known) - 1:
            gaps = np.maximum(gaps - 1, 1)
        span = np.concatenate([[0], gaps.cumsum()])
        backwards = rng.random() < self.reverse
        for start in rng.permutation(len(known) - span[-1]):
            places = start + span
            chosen = [known[place] for place in (places[::-1] if backwards else places)]
            ids = video.truth(chosen[0])
            counts = np.bincount(ids.ravel(), minlength=256)
            numbers = 1 + np.flatnonzero(counts[1:] >= MIN_SHARE * ids.size).astype(np.uint8)
            if len(numbers):
                return chosen, np.sort(rng.permutation(numbers)[: self.objects])
        raise DataError(f"{video.name}: no frame shows an object of {MIN_SHARE:.1%} of its pixels; leave the video out")


class StillClips(Clips):
    """Clips of ``frames`` from one frame each, moved and bent from frame to frame as RGMP trains on images.

    videos: stills or any annotated data set. size: (H, W) of the clips. motion: how far a clip drifts, as a share of the
    augmentation's ranges, in place of its jitter. settings: of `ClipDataset`.
    """

    def __init__(
        self,
        videos: VideoDataset,
        frames: int = 2,
        *,
        size: tuple[int, int] | None = None,
        motion: float = 1.0,
        augment: Augment | None = None,
        length: int | None = None,
        seed: int = 0,
        top: int = TOP,
        noisy: float = 0.0,
        **settings,
    ):
        augment = dataclasses.replace(augment or Augment(size, rotate=20, warp=0.05), jitter=motion)
        super().__init__(length or len(videos), augment, seed, 1.0 if videos.proposals is None else noisy, top)
        self.frames = frames
        self.stills = ClipDataset(videos, 1, top=top, length=len(videos), **settings)

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        still = self.stills.make(index, rng)
        frames, masks = (part.expand(self.frames, -1, -1, -1) for part in (still.frames, still.masks))
        return Clip(frames, masks, still.proposals * self.frames, still.name)


class SyntheticClips(Clips):
    """Clips from the demo's koi pond, of ``scenes`` scenes an epoch, new ones in every epoch.

    Making a scene takes as long as several frames, so clips share scenes, and an epoch's scenes are kept.
    """

    def __init__(
        self, length: int = 1000, frames: int = 2, *, size: tuple[int, int] = (240, 427), objects: tuple[int, int] = (1, 5),
        skips: tuple[int, int] = (1, 6), scenes: int = 12, augment: Augment | None = None, seed: int = 0, **config,
    ):  # fmt: skip
        super().__init__(length, augment, seed)
        self.frames, self.size, self.objects, self.skips, self.scenes = frames, size, objects, skips, scenes
        self.config = config
        self._kept: OrderedDict[int, Scene] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": OrderedDict()}

    def _scene(self, number: int) -> Scene:
        if number not in self._kept:
            objects = int(np.random.default_rng([self.seed, number]).integers(self.objects[0], self.objects[1] + 1))
            self._kept[number] = Scene(number, size=self.size, objects=objects, **self.config)
            if len(self._kept) > self.scenes:
                self._kept.popitem(last=False)
        return self._kept[number]

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        scene = self._scene(1000 * self.seed + self.epoch * self.scenes + index * self.scenes // self.length)
        while True:
            times = rng.integers(1000) + np.cumsum([0, *rng.integers(self.skips[0], self.skips[1] + 1, self.frames - 1)])
            frames, ids = (torch.from_numpy(np.stack(part)) for part in zip(*map(scene.render, times.tolist())))
            numbers = torch.arange(1, scene.config.objects + 1)
            masks = ids[:, None] == numbers[:, None, None]  # [T, N, H, W]
            found = [scene.proposals(time) for time in times.tolist()]
            proposals = [tight(*(torch.from_numpy(part[: self.top]) for part in frame)) for frame in found]
            clip = seen(Clip(frames.permute(0, 3, 1, 2).contiguous(), masks, proposals, f"koi-{scene.seed}"))
            if clip.masks.size(1):
                return clip


class Mixture(Clips):
    """Clips from several sources, each drawn with its weight; with their own augmentation."""

    def __init__(self, sources: Sequence[tuple[Clips, float]], length: int, *, seed: int = 0):
        super().__init__(length, None, seed)
        self.sources = [source for source, _ in sources]
        weights = np.array([weight for _, weight in sources], float)
        if not len(weights) or (weights < 0).any() or weights.sum() <= 0:
            raise ValueError(f"a mixture needs weights >= 0 that are not all 0, got {weights.tolist()}")
        self.weights = weights / weights.sum()

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        for source in self.sources:
            source.set_epoch(epoch)

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        source = self.sources[rng.choice(len(self.sources), p=self.weights)]
        return source.draw(int(rng.integers(len(source))), rng)


# ------------------------------------------------------------------------------------------------------------ pasting


class Layer(NamedTuple):
    """An object to paste: where in the frame, and RGB and opacity in [0, 1], float [T, 4, h, w]."""

    window: tuple[slice, slice]  # rows, columns
    pixels: Tensor


class PasteClips(Clips):
    """Multi-object clips: objects of some videos pasted into others, along smooth paths, before and behind each other.

    videos: where backgrounds (with their own objects and proposals) come from. donors: where objects come from; default
    the same. pasted: how many, from .. to. same: chance that an object is pasted into the video it was cut from.
    scale: of a pasted object. Ground truth is exact: what is hidden is not in a mask. Proposals are the background's,
    less what is now hidden, and noisy ones of what was pasted. settings: of the clips that are cut (`ClipDataset`).
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
        top: int = TOP,
        augment: Augment | None = None,
        length: int | None = None,
        seed: int = 0,
        **settings,
    ):
        super().__init__(length or len(videos), augment or Augment(size), seed, top=top)
        if not 1 <= pasted[0] <= pasted[1] or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"pasted and scale must be ranges above 0, got {pasted} and {scale}")
        self.pasted, self.same, self.scale = pasted, same, scale
        self.grounds = _cut(videos, frames, size, top=top, **settings)
        self.donors = _cut(donors or videos, frames, size, top=0, **settings)

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        ground = self.grounds.draw(index, rng)
        count = rng.integers(self.pasted[0], self.pasted[1] + 1)
        layers = [self._layer(index if rng.random() < self.same else None, rng) for _ in range(count)]
        return seen(composite(ground, layers, rng, self.top))

    def _layer(self, index: int | None, rng: np.random.Generator) -> Layer:
        """An object of some video on its way."""
        clip = self.donors.draw(int(rng.integers(len(self.donors))) if index is None else index, rng)
        mask = clip.masks[:, rng.integers(clip.masks.size(1))]  # [T, H, W]
        window, grid = _flight(mask, rng, self.scale)
        # Less a pixel all around, or the object brings a rim of its old background along.
        inner = 1 - F.max_pool2d(1 - mask[:, None].float(), 3, 1, 1)
        return Layer(window, F.grid_sample(torch.cat([clip.frames.float(), inner], 1), grid, align_corners=False))


def _cut(videos: VideoDataset, frames: int, size: tuple[int, int], **settings) -> Clips:
    """Clips of a size to paste from and to; stills move."""
    if isinstance(videos, StillsDataset):
        return StillClips(videos, frames, motion=0.6, augment=Augment(size, 0, hue=0, grey=0, blur=0), **settings)
    return ClipDataset(videos, frames, augment=Augment.none(size), **settings)


def _flight(mask: Tensor, rng: np.random.Generator, scales: tuple[float, float]) -> tuple[tuple[slice, slice], Tensor]:
    """A smooth path for the object of mask [T, H, W]: the window it stays in, and where each of the window's pixels comes
    from, [T, h, w, 2] for `grid_sample`.

    The object starts inside the frame, then moves, turns and grows steadily, besides its motion in its own video.
    """
    length, height, width = mask.shape
    x0, y0, x1, y1 = tight_boxes(mask[:1])[0].tolist()
    fits = 0.8 * min(width / (x1 - x0), height / (y1 - y0))
    log_scale = math.log(min(math.exp(rng.uniform(*np.log(scales))), fits)) + rng.normal(0, 0.03) * np.arange(length)
    angle = rng.normal(0, 0.15) + rng.normal(0, 0.05) * np.arange(length)
    time = np.arange(length)[:, None]  # [T, 1]
    step = min(height, width) * (rng.uniform(-0.08, 0.08, 2) * time + rng.normal(0, 0.01, 2) * time**2)
    target = rng.uniform(0.15, 0.85, 2) * (width, height) + step  # [T, 2] x, y
    mirror = rng.choice([-1, 1])
    cos, sin = np.cos(angle) * np.exp(-log_scale), np.sin(angle) * np.exp(-log_scale)
    linear = np.stack([mirror * cos, -mirror * sin, sin, cos], 1).reshape(length, 2, 2)
    middle = np.array([x0 + x1, y0 + y1]) / 2
    x0, y0, x1, y1 = tight_boxes(mask.any(0, keepdim=True))[0].tolist()
    corners = np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) - middle
    places = target[:, None] + corners @ np.linalg.inv(linear).transpose(0, 2, 1)  # [T, 4, 2]
    low = np.clip(places.min((0, 1)).astype(int) - 1, 0, (width - 1, height - 1))
    high = np.clip(places.max((0, 1)).astype(int) + 2, low + 1, (width, height))
    source = middle + (linear @ ((low + high) / 2 - target)[:, :, None])[..., 0]
    window = slice(low[1], high[1]), slice(low[0], high[0])
    return window, affine_grid(linear, source, (height, width), (int(high[1] - low[1]), int(high[0] - low[0])))


def composite(ground: Clip, layers: Sequence[Layer], rng: np.random.Generator, top: int = TOP) -> Clip:
    """Paint layers over a clip, back to front; some may be behind the clip's own objects."""
    own = ground.masks.any(1)  # [T, H, W]
    behind = rng.integers(len(layers) + 1) if rng.random() < 0.5 else 0  # so many layers
    frames, cover = ground.frames.float(), torch.zeros(own.shape, dtype=torch.int16)  # the pasted object on top, from 1
    for number, (window, pixels) in enumerate(layers, 1):
        alpha, part = pixels[:, 3], frames[(..., *window)]  # [T, h, w], [T, 3, h, w]
        if number <= behind:
            alpha = alpha * ~own[(..., *window)]
        part += alpha[:, None] * (pixels[:, :3] - part)
        cover[(..., *window)][alpha > 0.5] = number
    pasted = cover[:, None] == torch.arange(1, len(layers) + 1)[:, None, None]  # [T, K, H, W]
    open_ = cover == 0
    masks = torch.cat([ground.masks & open_[:, None], pasted], 1)
    proposals = [
        _merge(_uncovered(given, clear), noisy_proposals(new, rng, top=top, clutter=2), top)
        for given, clear, new in zip(ground.proposals, open_, pasted)
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

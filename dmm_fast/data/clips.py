"""Training clips: cut from videos, made from stills, or drawn; `paste` and `alike` put several together.

Every source is a map-style data set of `Clip`s. ``clips[i]`` depends on (seed, epoch, i) and on nothing else: not on the
order, the number of workers or what was asked before, so training resumes anywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from dmm_fast.data.annotated import DataError, Video
from dmm_fast.data.augment import MIN_AREA, MIN_SHARE, Augment, Clip, areas, seen, tight, tight_boxes
from dmm_fast.data.datasets import VideoDataset
from dmm_fast.data.mined import Track
from dmm_fast.data.synthetic import Scene
from dmm_fast.model import Proposals
from dmm_fast.ops.vision import paste_combine

__all__ = [
    "Augment", "Clip", "ClipDataset", "Clips", "Mixture", "StillClips", "SyntheticClips", "noisy_proposals",
]  # fmt: skip

TOP = 20  # proposals of a frame that training sees
UNFOUND = 0.2  # chance that an object is one that a detector misses in most frames
TRIES = 20  # clips in a row of which no object is left, after which it is an error
HARD = 0.5  # chance of being missed, from which on an object that is missed isn't found in other ways either


# ----------------------------------------------------------------------------------------------------- detector noise


def noisy_proposals(
    masks: Tensor,
    rng: np.random.Generator,
    *,
    top: int = TOP,
    miss: float | Sequence[float] | np.ndarray = 0.08,
    twice: float = 0.5,
    part: float = 0.35,
    merge: float = 0.25,
    clutter: int = 6,
    noise: float = 0.6,
) -> Proposals:
    """What a detector might find of true masks [N, H, W] bool: at most ``top`` proposals, best first.

    Each seen object is found unless missed (one chance for all, or one each: see `overlooked`), at times twice, as a part of it, or
    merged with another, and there is clutter: pieces of nothing. All go through what a mask head does, 28 x 28 values inside a box that is a little
    off, with errors that are smooth over the mask: outlines are dilated here and eroded there. noise: how strong; at the
    default the best proposal's IoU has about the median, .82, of a COCO-trained segmenter on DAVIS 2016's training videos.
    """
    seen = areas(masks) >= MIN_AREA
    there = masks[seen]
    chances = np.broadcast_to(miss, len(masks))[seen.numpy()]
    found: list[tuple[Tensor, float, float]] = []  # mask, strength of its noise, score
    for index, (mask, chance) in enumerate(zip(there, chances)):
        missed = rng.random() < chance
        unseen = missed and chance >= HARD
        if not missed:
            found.append((mask, noise * rng.uniform(0.3, 1), rng.uniform(0.6, 0.99)))
        if rng.random() < twice and not unseen:
            found.append((mask, noise * rng.uniform(1, 2.5), rng.uniform(0.2, 0.8)))
        if rng.random() < part and not unseen:
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


def overlooked(count: int, rng: np.random.Generator, share: float = UNFOUND) -> np.ndarray:
    """Chances [count] with which a detector misses each of a clip's objects in a frame: a `share` of them it misses in most frames."""
    return np.where(rng.random(count) < share, rng.uniform(HARD, 1.0, count), 0.08)


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
        """Other clips from now on, also in processes that have been started."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch that clips are made for."""
        return int(self._epoch)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.length:
            raise IndexError(f"clip {index} of {self.length}")
        return self.draw(index, self.rng(index))

    def rng(self, index: int) -> np.random.Generator:
        """Random numbers of clip `index`, which depend on the seed, the epoch and nothing else."""
        return np.random.default_rng([self.seed, self.epoch, index])

    def draw(self, index: int, rng: np.random.Generator) -> Clip:
        """A clip from ``rng``; index says which video where there is a choice, unless no object is left of that one's."""

        def draw(index: int) -> Clip:
            clip = self.make(index, rng)
            return seen(self.augment(clip, rng)) if self.augment else clip

        clip = with_objects(draw, index, self.length, rng)
        if rng.random() < self.noisy:
            miss = overlooked(clip.masks.size(1), rng)
            clip = clip._replace(proposals=[noisy_proposals(masks, rng, top=self.top, miss=miss) for masks in clip.masks])
        return clip

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        """Clip `index` before `augment` and simulated proposals; every source defines it."""
        raise NotImplementedError


def with_objects(draw: Callable[[int], Clip], index: int, length: int, rng: np.random.Generator) -> Clip:
    """``draw(index)``, or of another index below ``length`` where no object is left in the first frame."""
    for _ in range(TRIES):
        clip = draw(index)
        if clip.masks.size(1):
            return clip
        index = int(rng.integers(length))
    raise DataError(f"{clip.name}: no object is left in its first frame, nor in {TRIES - 1} other clips; "
                    "are all objects too thin for the size of the clips?")  # fmt: skip


class ClipDataset(Clips):
    """Clips of ``frames`` annotated frames from videos, in turn.

    skips: annotated frames from one to the next, drawn for each step. reverse: chance of a clip that runs backwards.
    objects: at most so many of a clip's, chosen at random. mined: share of clips that show, besides annotated objects, others
    that the proposals follow (`dmm_fast.data.mined`), as far as there are any, ``objects`` in all. noisy: share of clips with simulated proposals; where the
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
        mined: float = 0.0,
        top: int = TOP,
        noisy: float = 0.0,
        missed: float = 0.0,
        augment: Augment | None = None,
        length: int | None = None,
        seed: int = 0,
    ):
        super().__init__(length or len(videos), augment, seed, 1.0 if videos.proposals is None else noisy, top)
        self.missed, self.mined = missed, mined
        if not 0 <= mined <= 1 or (mined and videos.proposals is None):
            raise ValueError(f"mined is a share in [0, 1] of clips from videos with proposals, got {mined} of {videos!r}")
        if frames < 1 or not 1 <= skips[0] <= skips[1]:
            raise ValueError(f"a clip needs frames >= 1 and skips 1 <= least <= most, got {frames} and {skips}")
        self.videos, self.frames, self.skips, self.reverse, self.objects = videos, frames, skips, reverse, objects

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        video = self.videos.video(self.videos.names[index % len(self.videos)])
        tracks = video.tracks if self.mined and rng.random() < self.mined else []
        chosen, numbers = self._choose(video, rng, tracks)
        ids = np.stack([video.truth(i) for i in chosen])  # [T, H, W]
        masks = torch.from_numpy(ids[:, None] == numbers[:, None, None])  # [T, N, H, W]
        frames = torch.from_numpy(np.stack(video.frames(chosen))).permute(0, 3, 1, 2).contiguous()
        there = [track for track in tracks if track.covers(chosen)]
        there = [there[i] for i in rng.permutation(len(there))[: self.objects - len(numbers)]] if there else []
        if video.has_proposals and (self.top or there):
            found = [video.proposals(i, max(self.top, *(1 + track.proposal(i) for track in there), 0)) for i in chosen]
            if there:
                found, further = self._further(there, chosen, found, torch.from_numpy(ids > 0), rng)
                masks = torch.cat([masks, further], 1)
            proposals = [self._found(given, rng) for given in found]
        else:
            proposals = [nothing(video.size)] * self.frames
        return seen(Clip(frames, masks, proposals, video.name))

    @staticmethod
    def _further(
        tracks: Sequence[Track], chosen: Sequence[int], found: Sequence[Proposals], taken: Tensor, rng: np.random.Generator
    ) -> tuple[list[Proposals], Tensor]:
        """The proposals and masks [T, K, H, W] of mined objects, less what is taken [T, H, W] or another's.

        A linked proposal is its object's truth, so what training sees of it is made as imperfect as others are.
        """
        proposals, further = [], []
        for frame, given, other in zip(chosen, found, taken):
            rows = [track.proposal(frame) for track in tracks]
            masks = given.masks[rows]
            others = torch.cat([other[None], masks[:-1]]).cumsum(0).bool()
            further.append(masks & ~others)
            rough = given.masks.clone()
            rough[rows] = _mask_head(masks, rng.uniform(0.2, 0.6, len(rows)), rng)
            proposals.append(given._replace(masks=rough))
        return proposals, torch.stack(further)

    def _found(self, given: Proposals, rng: np.random.Generator) -> Proposals:
        best = given.scores[: self.top]
        keep = torch.from_numpy((rng.random(len(best)) >= self.missed) & (rng.random() >= self.missed))
        return tight(given.masks[: self.top][keep], best[keep])

    def _choose(self, video: Video, rng: np.random.Generator, tracks: Sequence[Track]) -> tuple[list[int], np.ndarray]:
        """Frames of a clip, some that a track covers if there are any, and the annotated objects of the first, ids [N] uint8."""
        known = video.annotated if video.dense else []
        if len(known) < self.frames:
            rule = "frames in which every object is annotated"
            raise DataError(f"{video.name}: {len(known)} {rule}, a clip needs {self.frames}; leave the video out")
        gaps = rng.integers(self.skips[0], self.skips[1] + 1, self.frames - 1)
        while gaps.sum() > len(known) - 1:
            gaps = np.maximum(gaps - 1, 1)
        span = np.concatenate([[0], gaps.cumsum()])
        backwards = rng.random() < self.reverse
        starts = rng.permutation(len(known) - span[-1])
        if tracks:
            covered = [any(track.covers([known[i] for i in start + span]) for track in tracks) for start in starts]
            starts = starts[np.argsort(np.logical_not(covered), kind="stable")]
        ways = [backwards, not backwards] if 0 < self.reverse < 1 else [backwards]  # objects may be at one end only
        for backwards, start in product(ways, starts):
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
        source = self.sources[self._pick(rng)]
        return source.draw(int(rng.integers(len(source))), rng)

    def source_of(self, index: int) -> int:
        """Which source a clip comes from."""
        return self._pick(self.rng(index))

    def _pick(self, rng: np.random.Generator) -> int:
        return int(rng.choice(len(self.sources), p=self.weights))

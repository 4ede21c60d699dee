"""Clips that are hard on identity: alike objects whose paths cross, full occlusions, exits and returns, and things that are nobody's."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.data.augment import MIN_AREA, Augment, Clip, areas, seen, shrink, size_of, tight_boxes, tint
from dmm_fast.data.clips import TOP, ClipDataset, Clips, with_objects
from dmm_fast.data.datasets import StillsDataset, VideoDataset
from dmm_fast.data.paste import Layer, Path, composite, cut, painted
from dmm_fast.data.paths import covering, drifting, leaving, passing

SMALLEST = 0.006  # of the frame: a pasted object's area at least


class Cutout(NamedTuple):
    """An object and what is around it, cut from a clip of T or more frames."""

    pixels: Tensor  # [T, 3, h, w] float
    mask: Tensor  # [T, h, w] bool
    origin: np.ndarray  # [T, 2] x, y: its middle, which moves steadily
    reach: np.ndarray  # [2] how far it extends from there in any frame
    corner: np.ndarray  # [2] of the window in its clip

    def take(self, frames: slice | list[int]) -> Cutout:
        return self._replace(pixels=self.pixels[frames], mask=self.mask[frames], origin=self.origin[frames])


@dataclass
class Actor:
    """One that takes part: a cutout that will be pasted, or an object of the ground, which is there already."""

    cutout: Cutout
    scale: float = 1.0
    mirrored: bool = False
    wanted: bool = True  # an object; else nobody's
    proposed: bool = True
    depth: float = 0.0  # the higher is in front
    places: np.ndarray | None = None  # [T, 2] once its path is known
    given: bool = False  # the ground's own

    @property
    def reach(self) -> np.ndarray:
        return self.scale * self.cutout.reach


class AlikeClips(Clips):
    """Clips in which it is hard to tell who is who: objects of videos pasted into others, as `PasteClips` does, but several of them alike.

    videos: where the grounds come from, with their own objects and proposals. donors: where objects come from; default the same.
    layers: how many objects are pasted, from .. to. Each of the following is the chance of an event in a clip:

    twins: the same object twice or three times, or with as many `copies` as the clip has room for: an object of the ground or a pasted one, and copies that are plain, mirrored, at another
    time, or recoloured, a little or much. crossings: two of them (twins if there are any) meet and pass, one in front. covers: something
    covers an object fully for one frame or several: a piece of another picture, or a larger object. exits: of each other pasted
    object, that it leaves the frame and comes back at another place. strangers: of each pasted object but the first, that it is nobody's:
    in the pixels and proposals, in no mask.

    scale: of a pasted object. Ground truth is exact: what is hidden is in no mask, so an object may have an empty one, but not in
    the first frame. settings: of the clips that are cut (`ClipDataset`).
    """

    def __init__(
        self,
        videos: VideoDataset,
        frames: int = 6,
        *,
        size: tuple[int, int] = (240, 427),
        donors: VideoDataset | None = None,
        layers: tuple[int, int] = (1, 3),
        twins: float = 0.8,
        copies: int = 0,
        crossings: float = 0.7,
        covers: float = 0.5,
        exits: float = 0.15,
        strangers: float = 0.3,
        scale: tuple[float, float] = (0.6, 1.3),
        top: int = TOP,
        augment: Augment | None = None,
        length: int | None = None,
        seed: int = 0,
        **settings,
    ):
        augment = augment or Augment(size)
        super().__init__(length or len(videos), dataclasses.replace(augment, size=augment.size or size), seed, top=top)
        if copies < 0:
            raise ValueError(f"alike: copies must be 0 (one or two) or more, got {copies}")
        if frames < 3:
            raise ValueError(f"alike: objects meet and part in 3 frames or more, got frames={frames}")
        if not 1 <= layers[0] <= layers[1] or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"alike: layers and scale must be ranges above 0, got {layers} and {scale}")
        chances = {"twins": twins, "crossings": crossings, "covers": covers, "exits": exits, "strangers": strangers}
        for name, chance in chances.items():
            if not 0 <= chance <= 1:
                raise ValueError(f"alike: {name} is a chance in [0, 1], got {chance}")
        self.frames, self.layers, self.copies, self.scale = frames, layers, copies, scale
        self.twins, self.crossings, self.covers, self.exits, self.strangers = twins, crossings, covers, exits, strangers
        self.videos, self.size = videos, size
        self.grounds = _clips(videos, frames, size, top=top, **settings)
        self.donors = _clips(donors or videos, frames, size, top=0, **settings)
        # A few frames more, for twins that are seen at another time.
        self.longer = _clips(donors or videos, frames + frames // 2, size, top=0, **settings)

    def make(self, index: int, rng: np.random.Generator) -> Clip:
        ground = self._drawn(self.grounds, index, rng)
        size = size_of(ground)
        cast = self._cast(ground, rng)
        self._plan(cast, size, rng)
        if rng.random() < self.covers:
            cast += self._cover(cast, ground, rng)
        own = rng.choice([0.0, 0.35])  # depth of the ground's objects
        pasted = sorted((actor for actor in cast if not actor.given), key=lambda actor: actor.depth)
        behind = sum(actor.depth < own for actor in pasted)
        clip = composite(ground, [_paint(actor, size) for actor in pasted], rng, self.top, behind)
        clip = seen(_without_specks(clip))
        return clip if clip.masks.size(1) else ground

    def _drawn(self, clips: Clips, index: int, rng: np.random.Generator) -> Clip:
        """A clip of about the size that clips have, with objects."""
        return with_objects(lambda index: seen(shrink(clips.draw(index, rng), self.size)), index, len(clips), rng)

    # ---- who takes part ----

    def _cast(self, ground: Clip, rng: np.random.Generator) -> list[Actor]:
        """The actors, twins first; the first may be an object of the ground."""
        size, count = size_of(ground), int(rng.integers(self.layers[0], self.layers[1] + 1))
        cast: list[Actor] = []
        if rng.random() < self.twins:
            copies = self.copies or (1 if rng.random() < 0.75 else 2)
            own = _own(ground, rng) if rng.random() < 0.5 or count == 1 else None
            first = Actor(own, given=True) if own else self._actor(self.longer, size, rng)
            cast = [first, *(_twin(first, self.frames, size, rng) for _ in range(min(copies, count - 1 + bool(own))))]
        while sum(not actor.given for actor in cast) < count:
            cast.append(self._actor(self.donors, size, rng))
        for actor in cast:
            actor.depth = rng.random()
            if not actor.given:
                actor.cutout = actor.cutout.take(slice(self.frames))
                actor.wanted = actor is cast[0] or rng.random() >= self.strangers
        return cast

    def _actor(self, donors: Clips, size: tuple[int, int], rng: np.random.Generator) -> Actor:
        """An object of some video."""
        clip = self._drawn(donors, int(rng.integers(len(donors))), rng)
        cutout = _cutout(clip, int(rng.integers(clip.masks.size(1))))
        factor = size[0] / clip.frames.size(2) * math.exp(rng.uniform(*np.log(self.scale)))
        return Actor(cutout, _fitting(cutout, factor, size))

    # ---- what they do ----

    def _plan(self, cast: list[Actor], size: tuple[int, int], rng: np.random.Generator) -> None:
        """A path for each."""
        length = self.frames
        for actor in cast:
            if actor.given:
                actor.places = actor.cutout.origin + actor.cutout.corner
            elif rng.random() < self.exits:
                actor.places = leaving(rng, length, size, actor.reach)
            else:
                actor.places = drifting(rng, length, size)
        if len(cast) < 2 or rng.random() >= self.crossings:
            return
        one, other = cast[:2]
        way = passing(rng, length, one.reach + other.reach)
        if one.given:
            other.places = one.places + way
        else:
            # Both move, about a point near the middle that itself moves a little.
            middle = drifting(rng, length, size)
            middle += (rng.uniform(0.35, 0.65, 2) - 0.5) * size[::-1] + np.array(size[::-1]) / 2 - middle.mean(0)
            share = rng.uniform(0.25, 0.75)
            one.places, other.places = middle - share * way, middle + (1 - share) * way

    def _cover(self, cast: list[Actor], ground: Clip, rng: np.random.Generator) -> list[Actor]:
        """Something that covers an object for a while: returns it, or sends one of the cast."""
        room = np.array(size_of(ground)[::-1]) / 5
        objects = [actor for actor in cast if actor.wanted and (actor.reach < room).all()]
        if not objects and (own := _own(ground, rng)):
            objects = [Actor(own, given=True, places=own.origin + own.corner)]
        if not objects:
            return []
        hidden = objects[rng.integers(len(objects))]
        way, reach = covering(rng, self.frames, hidden.reach)
        # An object that does the same should be larger all around, but not by far.
        others = [
            actor for actor in cast[2:] if actor is not hidden and (1.2 * max(reach / actor.reach) * actor.reach < room).all()
        ]
        if others and rng.random() < 0.5:
            front, new = others[rng.integers(len(others))], []
            front.scale *= 1.2 * float(max(reach / front.reach))
        else:
            front = Actor(self._patch(reach, rng), wanted=False, proposed=False)
            new = [front]
        front.places, front.depth = hidden.places + way, 2.0
        return new

    def _patch(self, reach: np.ndarray, rng: np.random.Generator) -> Cutout:
        """A still piece of some picture that covers a reach: a rectangle, or rounder."""
        video = self.videos.video(self.videos.names[rng.integers(len(self.videos))])
        picture = torch.from_numpy(video.frame(int(rng.integers(len(video))))).permute(2, 0, 1)[None].float()
        power = float(rng.choice([3, 6, 40]))
        reach = reach * 2 ** (1 / power)  # so that its box is covered to the corners
        width, height = (2 * math.ceil(half) for half in reach)
        share = rng.uniform(0.1, 0.5)  # enlarged: a texture, seldom a whole object
        rows, columns = (max(2, int(share * side)) for side in picture.shape[2:])
        top, left = (int(rng.integers(side - inner + 1)) for side, inner in zip(picture.shape[2:], (rows, columns)))
        piece = F.interpolate(picture[:, :, top : top + rows, left : left + columns], (height, width), mode="bilinear")
        y = ((torch.arange(height) + 0.5) / height * 2 - 1).abs()[:, None]
        x = ((torch.arange(width) + 0.5) / width * 2 - 1).abs()
        mask = (x**power + y**power <= 1)[None]
        origin = np.tile([width / 2, height / 2], (self.frames, 1))
        length = self.frames
        return Cutout(piece.expand(length, -1, -1, -1), mask.expand(length, -1, -1), origin, reach, np.zeros(2))


def _clips(videos: VideoDataset, frames: int, size: tuple[int, int], **settings) -> Clips:
    """Clips to paste from and to, of any size: only the finished clip is brought to its own."""
    if isinstance(videos, StillsDataset):
        return cut(videos, frames, size, **settings)
    return ClipDataset(videos, frames, **settings)


def _cutout(clip: Clip, number: int) -> Cutout:
    """Object ``number`` of a clip."""
    masks = clip.masks[:, number]
    x0, y0, x1, y1 = (int(end) for end in tight_boxes(masks.any(0, keepdim=True))[0].tolist())
    x0, y0, x1, y1 = max(x0 - 2, 0), max(y0 - 2, 0), min(x1 + 2, masks.size(2)), min(y1 + 2, masks.size(1))
    mask = masks[:, y0:y1, x0:x1]
    there = np.flatnonzero(areas(mask).numpy())
    boxes = tight_boxes(mask[there]).numpy()
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    # A line through the middles: an arm that is stretched out must not push the body aside.
    line = np.polyfit(there, middles, 1) if len(there) > 1 else np.stack([0 * middles[0], middles[0]])
    origin = np.arange(len(mask))[:, None] * line[0] + line[1]
    reach = np.maximum(origin[there] - boxes[:, :2], boxes[:, 2:] - origin[there]).max(0)
    return Cutout(clip.frames[:, :, y0:y1, x0:x1].float(), mask, origin, reach, np.array([x0, y0]))


def _own(ground: Clip, rng: np.random.Generator) -> Cutout | None:
    """One of the ground's objects that leaves room for another, if there is one."""
    height, width = size_of(ground)
    for number in rng.permutation(ground.masks.size(1)):
        cutout = _cutout(ground, int(number))
        if (2 * cutout.reach < (0.6 * width, 0.9 * height)).all() and int(areas(cutout.mask).min()) >= MIN_AREA:
            return cutout
    return None


def _fitting(cutout: Cutout, factor: float, size: tuple[int, int]) -> float:
    """The factor, or what keeps the object from filling the frame or from being a speck."""
    height, width = size
    largest = float(min(np.array([0.4 * width, 0.65 * height]) / (2 * cutout.reach)))
    area = max(int(areas(cutout.mask).max()), 1)
    return min(max(factor, math.sqrt(SMALLEST * height * width / area)), largest)


def _twin(first: Actor, length: int, size: tuple[int, int], rng: np.random.Generator) -> Actor:
    """The same object again: often as it is, else mirrored, at another time, of another size or colour."""
    cutout = first.cutout
    later = len(cutout.mask) - length
    kind = rng.random()
    if kind < 0.25 and later:
        cutout = cutout.take(slice(later, None))
    elif kind < 0.4:
        cutout = cutout.take(list(range(length))[::-1])
    if int(areas(cutout.mask[:1])) < MIN_AREA:
        cutout = first.cutout
    scale = first.scale * (1 if rng.random() < 0.5 else math.exp(rng.uniform(-0.25, 0.25)))
    colours = rng.random()
    if colours > 0.5:
        cutout = _recoloured(cutout, rng, 1.0 if colours > 0.75 else 0.25)
    mirrored = first.mirrored ^ bool(rng.random() < 0.4)
    return Actor(cutout, _fitting(cutout, scale, size), mirrored)


def _recoloured(cutout: Cutout, rng: np.random.Generator, strength: float) -> Cutout:
    """In another hue and brightness; strength: 1 much, 0.25 a little."""
    angle, bright = strength * rng.uniform(-math.pi, math.pi), math.exp(strength * rng.uniform(-0.6, 0.4))
    matrix = torch.from_numpy(bright * tint(1 + strength * rng.uniform(-0.4, 0.6), angle)).float()
    pixels = (matrix @ cutout.pixels.flatten(2)).view_as(cutout.pixels).clamp(0, 255)
    return cutout._replace(pixels=pixels)


def _paint(actor: Actor, size: tuple[int, int]) -> Layer:
    cutout, length = actor.cutout, len(actor.cutout.mask)
    assert actor.places is not None, "every actor has a path before it is painted"
    path = Path(actor.places, np.full(length, actor.scale), np.zeros(length), actor.mirrored)
    rim = int(actor.proposed)
    return painted(cutout.pixels, cutout.mask, cutout.origin, path, size, rim, wanted=actor.wanted, proposed=actor.proposed)


def _without_specks(clip: Clip) -> Clip:
    """What is left of an object that is all but hidden is no mask to learn."""
    keep = torch.stack([areas(masks) for masks in clip.masks]) >= MIN_AREA  # [T, N]
    return clip if bool(keep.all()) else clip._replace(masks=clip.masks & keep[:, :, None, None])

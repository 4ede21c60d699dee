"""Clips for training, and one random transform for all that belongs to a clip: frames, masks, proposals."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.model import Proposals

MIN_AREA = 16  # pixels; a smaller proposal is no proposal
MIN_SHARE = 1e-3  # of the frame's pixels; an object that shows less in the first frame is no template


class Clip(NamedTuple):
    """T frames of a video with N objects, every one of which is seen in the first frame."""

    frames: Tensor  # [T, 3, H, W] uint8, RGB
    masks: Tensor  # [T, N, H, W] bool
    proposals: list[Proposals]  # T of them, masks [M, H, W] bool, boxes tight
    name: str


def tight(masks: Tensor, scores: Tensor) -> Proposals:
    """Proposals of masks [M, H, W] bool with scores [M]: tight boxes, without those that are hardly there."""
    keep = areas(masks) >= MIN_AREA
    if not keep.all():
        masks, scores = masks[keep], scores[keep]
    return Proposals(tight_boxes(masks), scores, masks)


def tight_boxes(masks: Tensor) -> Tensor:
    """What `mask_boxes` gives for masks [M, H, W] bool on the CPU, none of them empty, in a tenth of the time."""
    if not len(masks):
        return torch.zeros(0, 4)
    array = masks.numpy()
    rows, columns = np.any(array, 2), np.any(array, 1)  # [M, H], [M, W]
    ends = array.shape[2] - columns[:, ::-1].argmax(1), array.shape[1] - rows[:, ::-1].argmax(1)
    return torch.from_numpy(np.stack([columns.argmax(1), rows.argmax(1), *ends], 1)).float()


def areas(masks: Tensor) -> Tensor:
    """Pixels of masks [M, H, W] bool: [M] int64."""
    return torch.tensor([np.count_nonzero(mask) for mask in masks.numpy()], dtype=torch.int64)


def size_of(clip: Clip) -> tuple[int, int]:
    """Height and width of the frames."""
    return clip.frames.shape[2], clip.frames.shape[3]


def seen(clip: Clip, least: float = MIN_SHARE) -> Clip:
    """Without the objects that the first frame does not show, in a share of its pixels; there may be none left."""
    keep = areas(clip.masks[0]) >= least * clip.masks[0, 0].numel() if clip.masks.size(1) else torch.ones(0).bool()
    return clip if bool(keep.all()) else clip._replace(masks=clip.masks[:, keep])


@dataclass(frozen=True)
class Augment:
    """A random transform of clips; ``augment(clip, rng)`` gives a clip of ``size``.

    Geometry and colour are drawn once for the clip and drift from frame to frame by the share ``jitter`` of their
    ranges, along lines with a little noise. What lies outside the source gets the clip's mean colour and no mask.
    Everything is one resampling: `warp`, whose cost does not depend on how many transforms there are.
    """

    size: tuple[int, int] | None = None  # (H, W) of what comes out; None: as it came
    flip: float = 0.5  # chance of a mirror image
    rotate: float = 12.0  # up to so many degrees
    shear: float = 8.0  # degrees
    zoom: tuple[float, float] = (0.9, 1.5)  # 1: the source just covers the frame
    crop: float = 1.0  # where a larger source is cut: 1 anywhere, 0 in the middle
    shift: float = 0.08  # of the frame's sides, beyond the source's edge if need be
    warp: float = 0.03  # displacement of the elastic grid's knots, of the shorter side
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.3
    hue: float = 12.0  # degrees
    grey: float = 0.03  # chance of a clip without colour
    blur: float = 0.1  # chance of a soft picture
    jitter: float = 0.15
    least: float = MIN_SHARE  # an object that shows less in the first frame is lost

    def __post_init__(self) -> None:
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom must be a range of positive factors, got {self.zoom}")

    @classmethod
    def none(cls, size: tuple[int, int]) -> Augment:
        """Only bring clips to a size: the largest view of its shape from the middle."""
        still: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(cls)}
        return cls(**still | {"size": size, "zoom": (1, 1)})

    def __call__(self, clip: Clip, rng: np.random.Generator) -> Clip:
        """The transformed clip. Draws again, more gently each time, where the first frame would lose all objects.

        Objects that it loses even so, as what is too thin for ``size``, stay with what is left of them.
        """
        if self == Augment.none(size_of(clip)):
            return clip
        for strength in (1.0, 0.5, 0.25):
            found = seen(self._apply(clip, self._scaled(strength), rng), self.least)
            if found.masks.size(1):
                return found
        size = self._size(clip)
        return self._apply(_towards(clip, size), Augment.none(size), rng)

    def _size(self, clip: Clip) -> tuple[int, int]:
        return self.size or size_of(clip)

    def _scaled(self, strength: float) -> Augment:
        zoom = tuple(factor**strength for factor in self.zoom)
        ranges = {name: strength * getattr(self, name) for name in ("rotate", "shear", "shift", "warp")}
        return dataclasses.replace(self, zoom=zoom, **ranges)

    @staticmethod
    def _apply(clip: Clip, ranges: Augment, rng: np.random.Generator) -> Clip:
        length, size = len(clip.frames), ranges._size(clip)
        clip = shrink(clip, size)
        grid = ranges.grids(rng, length, size_of(clip), size)
        matrix, offset = ranges.colours(rng, clip.frames)
        warped = warp(clip, grid, matrix, offset)
        if rng.random() < ranges.blur:
            from torchvision.transforms.v2.functional import gaussian_blur

            warped = warped._replace(frames=gaussian_blur(warped.frames, [5, 5], [rng.uniform(0.4, 1.4)]))
        return warped

    def grids(self, rng: np.random.Generator, length: int, source: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Where each pixel of each frame comes from, [T, H, W, 2] float, x and y in [-1, 1] as `grid_sample` has them."""
        path = _paths(rng, length, 5, self.jitter)  # [T, 5] in about [-1, 1]
        angle, shear = np.radians(self.rotate) * path[:, 0], np.tan(np.radians(self.shear) * path[:, 1])
        low, high = np.log(self.zoom)
        scale = np.exp(-(low + high) / 2 - (high - low) / 2 * path[:, 2])
        scale *= min(source[0] / size[0], source[1] / size[1])  # pixels of the source per pixel
        mirror = -1 if rng.random() < self.flip else 1
        cos, sin = np.cos(angle), np.sin(angle)
        linear = scale * np.stack([mirror * cos, shear * cos - sin, mirror * sin, shear * sin + cos])  # [4, T]
        linear = linear.T.reshape(length, 2, 2)
        view = np.outer(scale, size[::-1])  # [T, 2] x, y
        slack = np.maximum(np.array(source[::-1]) - view, 0) / 2
        # Where a clip is cut from a larger source is drawn once; only the shift drifts.
        middle = np.array(source[::-1]) / 2 + self.crop * slack * rng.uniform(-1, 1, 2) + self.shift * view * path[:, 3:5]
        bend = self.warp * min(source) * _paths(rng, length, 2 * 4 * 6, self.jitter).reshape(length, 2, 4, 6)
        return affine_grid(linear, middle, source, size, bend if self.warp else None)

    def colours(self, rng: np.random.Generator, frames: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Brightness, contrast, saturation and hue as one affine map of RGB per frame: [T, 3, 3] and [T, 3]; or none."""
        path = _paths(rng, len(frames), 4, self.jitter)  # [T, 4]
        grey = rng.random() < self.grey
        if not (self.brightness or self.contrast or self.saturation or self.hue or grey):
            return None, None
        brightness, contrast, saturation = 1 + path[:, :3].T * [[self.brightness], [self.contrast], [self.saturation]]
        level = float(frames[..., ::4, ::4].float().mean())
        matrices = np.stack([tint(0.0 if grey else s, h) for s, h in zip(saturation, np.radians(self.hue) * path[:, 3])])
        matrix = (brightness * contrast)[:, None, None] * matrices
        offset = np.repeat((brightness * (1 - contrast) * level)[:, None], 3, 1)
        return torch.from_numpy(matrix).float(), torch.from_numpy(offset).float()


def _towards(clip: Clip, size: tuple[int, int]) -> Clip:
    """The largest view of the shape of ``size`` whose middle is as near as can be to that of the first frame's largest object."""
    if not clip.masks.size(1):
        return clip
    source = np.array(size_of(clip))
    view = np.maximum(np.floor(np.array(size) * min(source / size)).astype(int), 1)
    box = tight_boxes(clip.masks[:1, int(areas(clip.masks[0]).argmax())])[0].numpy()
    low = np.clip((box[[1, 0]] + box[[3, 2]] - view) / 2, 0, source - view).astype(int)
    rows, columns = (slice(start, start + side) for start, side in zip(low.tolist(), view.tolist()))
    cut = [tight(given.masks[:, rows, columns], given.scores) for given in clip.proposals]
    return clip._replace(frames=clip.frames[..., rows, columns], masks=clip.masks[..., rows, columns], proposals=cut)


def _paths(rng: np.random.Generator, length: int, count: int, jitter: float) -> np.ndarray:
    """``count`` values in about [-1, 1] that drift over the frames, [T, count]."""
    start, drift = rng.uniform(-1, 1, (2, count))
    noise = rng.normal(size=(length, count))
    time = np.linspace(0, 1, length)[:, None]
    return start + jitter * (time * drift + 0.1 * noise)


LUMA = np.array([0.299, 0.587, 0.114])


def tint(saturation: float, angle: float) -> np.ndarray:
    """[3, 3] map of RGB that keeps grey and luma, scales colour by ``saturation`` and turns it by ``angle``."""
    chroma = np.eye(3) - LUMA  # colour less its luma
    axis = np.ones(3) / math.sqrt(3)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) * math.cos(angle) + math.sin(angle) * cross + (1 - math.cos(angle)) * np.outer(axis, axis)
    turned = turn @ chroma
    return np.tile(LUMA, (3, 1)) + saturation * (turned - LUMA @ turned)


def affine_grid(
    linear: np.ndarray, middle: np.ndarray, source: tuple[int, int], size: tuple[int, int], bend: np.ndarray | None = None
) -> Tensor:
    """A grid [T, H, W, 2] for `grid_sample`, from pixels to pixels, x first: the frame's middle comes from ``middle`` [T, 2]
    of the source, a step d of the frame is a step ``linear`` [T, 2, 2] d of the source, and knots ``bend`` [T, 2, h, w] are
    added, spread over the frame.
    """
    scale = 2 / torch.tensor(source[::-1], dtype=torch.float32)  # x, y
    matrix, centre = torch.from_numpy(linear).float(), torch.from_numpy(middle).float()
    half = torch.tensor(size[::-1], dtype=torch.float32) / 2
    x = (torch.arange(size[1]) + 0.5 - half[0])[:, None] * (matrix[:, :, 0] * scale)[:, None]  # [T, W, 2]
    y = (torch.arange(size[0]) + 0.5 - half[1])[:, None] * (matrix[:, :, 1] * scale)[:, None]  # [T, H, 2]
    grid = y[:, :, None] + x[:, None] + (centre * scale - 1)[:, None, None]
    if bend is not None:  # a bicubic surface through a few knots: smooth, and it folds nowhere at this strength
        knots = torch.from_numpy(bend).float() * scale[:, None, None]
        rows, columns = _bicubic(bend.shape[2], size[0]), _bicubic(bend.shape[3], size[1])  # [H, h], [W, w]
        grid += (rows @ (columns @ knots.permute(0, 2, 3, 1)).flatten(2)).view_as(grid)
    return grid


@lru_cache(maxsize=16)
def _bicubic(knots: int, length: int) -> Tensor:
    """How much each knot weighs at each of ``length`` points, [length, knots]: `F.interpolate`, for many surfaces at once."""
    eye = torch.eye(knots)[None, None]
    return F.interpolate(eye, (length, knots), mode="bicubic", align_corners=True)[0, 0]


def warp(clip: Clip, grid: Tensor, matrix: Tensor | None = None, offset: Tensor | None = None) -> Clip:
    """Resample a clip at grid [T, H, W, 2]; colours go through matrix [T, 3, 3] and offset [T, 3].

    Masks are cut at 0.5 of their bilinear values. Objects stay in place even when nothing of them is left; proposals
    do not.
    """
    frames = clip.frames.float()
    mean = frames[..., ::4, ::4].mean((0, 2, 3), keepdim=True)
    frames = F.grid_sample(frames - mean, grid, align_corners=False).add_(mean)
    if matrix is not None and offset is not None:
        frames = (matrix @ frames.flatten(2)).add_(offset[:, :, None]).view_as(frames)
    masks, proposals = [], []
    for mask, given, place in zip(clip.masks, clip.proposals, grid):
        moved = move_masks(torch.cat([mask, given.masks]), place)
        masks.append(moved[: len(mask)])
        proposals.append(tight(moved[len(mask) :], given.scores))
    return clip._replace(frames=to_uint8(frames), masks=torch.stack(masks), proposals=proposals)


def to_uint8(frames: Tensor) -> Tensor:
    return frames.clamp_(0, 255).round_().to(torch.uint8)


def move_masks(masks: Tensor, grid: Tensor) -> Tensor:
    """masks [M, h, w] bool at grid [H, W, 2] -> [M, H, W] bool: where bilinear values, 0 outside, are above 0.5.

    What `grid_sample` would give, in half the time. A pixel is a vote of its four neighbours with the bilinear weights, and who
    wins together is the same for all masks: so masks are bits, and one pass of logic decides eight of them.
    """
    count, height, width = masks.shape
    planes = np.zeros((-(-count // 8), height + 2, width + 2), np.uint8)  # an empty pixel all around
    for i, mask in enumerate(masks.view(torch.uint8).numpy()):
        planes[i // 8, 1:-1, 1:-1] |= mask << i % 8
    x, y = (((grid[..., i] + 1) * side - 1).mul_(0.5).clamp_(-1, side) for i, side in enumerate((width, height)))
    left, top = x.floor().clamp_(max=width - 1), y.floor().clamp_(max=height - 1)
    right, low = x.sub_(left), y.sub_(top)  # the weights of the further neighbours
    corner = ((top.long() + 1) * (width + 2) + left.long() + 1).numpy()

    def every(condition: Tensor) -> np.ndarray:
        """All eight bits."""
        return -condition.view(torch.uint8).numpy()

    lower, further, weight = every(low > 0.5), every(right > 0.5), torch.maximum(low, 1 - low) * torch.maximum(right, 1 - right)
    across, alone = every(1 - right - low + 2 * right * low > 0.5), every(weight > 0.5)
    moved = np.empty((count, *grid.shape[:2]), np.uint8)
    for group, plane in enumerate(planes):
        a, b, c, d = (plane.ravel()[step:].take(corner) for step in (0, 1, width + 2, width + 3))
        ab, cd, ac, bd = a & b, c & d, a & c, b & d
        # Any three win, and of each two pairs the heavier; but a neighbour with more than half of all decides.
        won = ab & (c | d) | cd & (a | b) | _choose(lower, cd, ab) | _choose(further, bd, ac) | _choose(across, a & d, b & c)
        won = _choose(alone, _choose(lower, _choose(further, d, c), _choose(further, b, a)), won)
        for i in range(8 * group, min(8 * group + 8, count)):
            np.not_equal(won & np.uint8(1 << i % 8), 0, out=moved[i].view(bool))
    return torch.from_numpy(moved.view(bool))


def _choose(where: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bits of one where they are set in ``where``, else of the other."""
    return other ^ ((other ^ one) & where)


def shrink(clip: Clip, size: tuple[int, int]) -> Clip:
    """Halve (or third, ..) a clip that is at least twice ``size``: averaged colours, and less to resample."""
    factor = min(clip.frames.size(2) // size[0], clip.frames.size(3) // size[1], 11)  # 2 * 11 * 11 fits a byte
    if factor < 2:
        return clip
    height, width = (side // factor * factor for side in clip.frames.shape[2:])
    frames = F.avg_pool2d(clip.frames[..., :height, :width].float(), factor)

    def fewer(masks: Tensor) -> Tensor:
        """A block that is more than half full is full; of two halves the one with the corner is, so none is full twice."""
        inner = masks[..., :height, :width].view(torch.uint8)
        cells = [inner[..., row::factor, column::factor] for row in range(factor) for column in range(factor)]
        return 2 * sum(cells) + cells[0] > factor * factor

    proposals = [tight(fewer(given.masks), given.scores) for given in clip.proposals]
    return clip._replace(frames=to_uint8(frames), masks=fewer(clip.masks), proposals=proposals)

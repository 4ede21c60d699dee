"""The proposal network as a function that can be scripted and traced: frame in, proposals out, with ops of torch alone.

torchvision's `nms` and `roi_align` live in a library that only Python loads, so this holds them written in torch.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmm_fast.proposals.base import ProposalError
from dmm_fast.proposals.layers import BOX_CELLS, MASK_CELLS, STRIDES, cell_anchors

ROUNDS = 24  # of suppression where their number must be fixed


class ProposalNetwork(nn.Module):
    """frame [3, H, W] uint8 -> boxes [M, 4], scores [M], masks [M, 28, 28], as the `Detector` it is made of.

    Every stage looks at a fixed number of boxes and gives those that are none a score of -inf. A script cuts them off where it
    can; a traced program, whose sizes are fixed, carries them to the end: M is then always the detector's `top`. So does
    `fixed`, which also never makes the host wait for the device, as a CUDA graph asks.
    """

    def __init__(self, detector: Any, fixed: bool = False) -> None:
        super().__init__()
        self.rounds = ROUNDS if fixed else 0  # of suppression, 0: until nothing changes
        layers = getattr(detector, "layers", None)
        if layers is None:
            raise ProposalError("export: the proposal network must be one of dmm-fast train-proposals on a timm backbone")
        config, backbone, heads = detector.config, layers.backbone, layers.roi_heads
        self.body, self.fpn = backbone.body, backbone.fpn
        self.lags = any(type(module).__name__ == "Conv2dSame" for module in self.body.modules())  # see `lags`
        self.rpn_head, self.rpn_weights = layers.rpn.head, [1.0, 1.0, 1.0, 1.0]  # the weights of offsets are torchvision's
        self.box_head, self.box_predictor, self.box_weights = heads.box_head, heads.box_predictor, [10.0, 10.0, 5.0, 5.0]
        self.mask_head, self.mask_predictor = heads.mask_head, heads.mask_predictor
        self.box_cells, self.mask_cells = BOX_CELLS, MASK_CELLS
        self.short_side, self.long_side, self.multiple = config.short_side, config.long_side, 32
        self.candidates, self.regions = 2 * config.regions, config.regions
        self.rpn_nms, self.nms = 0.7, config.nms
        self.top, self.threshold = min(detector.top, self.regions), float(detector.threshold)
        self.strides = list(STRIDES)
        self.register_buffer("anchors", cell_anchors(config))  # [levels, A, 4]
        self.register_buffer("mean", torch.tensor(backbone.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(backbone.std)[:, None, None])

    def in_precision(self, dtype: torch.dtype) -> ProposalNetwork:
        """The same with a copy of the pyramid and of what convolves on it, regions and masks, in `dtype`."""
        if dtype == torch.float32:
            return self
        twin = copy.copy(self)
        heads = ("fpn", "rpn_head", "mask_head", "mask_predictor")
        twin._modules = {**self._modules, **{name: copy.deepcopy(self._modules[name]).to(dtype) for name in heads}}
        return twin

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, size = self.resized((frame.float() / 255 - self.mean) / self.std)
        return self.find(self.body(image), (image.size(2), image.size(3)), size, (frame.size(1), frame.size(2)))

    @torch.jit.export
    def find(
        self, levels: list[Tensor], image: tuple[int, int], size: tuple[int, int], frame: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `forward` gives, from the body's four levels. Heights and widths: of the image that the body saw, of the frame in it
        (the rest is padding), and of the frame itself."""
        down, right = lags(image[0], self.lags), lags(image[1], self.lags)
        dtype = self.mask_predictor.mask_fcn_logits.weight.dtype
        features = self.pyramid([level.to(dtype) for level in levels], down, right)  # [1, C, h, w] of stride 4, 8, 16, 32
        coarsest = F.max_pool2d(features[3], 1, 2)
        regions, likely = self.propose(features[1:] + [coarsest], down[1:] + down[3:], right[1:] + right[3:], size)
        boxes, scores = self.detect(features, regions, likely, down, right, size)
        pooled = pool_regions(features, boxes, self.mask_cells, down, right)
        masks = self.mask_predictor(self.mask_head(pooled.to(dtype))).to(boxes.dtype)
        wide, tall = frame[1] / size[1], frame[0] / size[0]
        boxes = torch.stack([boxes[:, 0] * wide, boxes[:, 1] * tall, boxes[:, 2] * wide, boxes[:, 3] * tall], 1)
        return boxes, scores, masks[:, 1].sigmoid()

    def pyramid(self, levels: list[Tensor], down: list[int], right: list[int]) -> list[Tensor]:
        """torchvision's FeaturePyramidNetwork, each cell with the coarser one that it lies in."""
        merged: list[Tensor] = []
        for index, block in enumerate(self.fpn.inner_blocks):
            merged.append(block(levels[index]))
        for index in range(2, -1, -1):
            fine, stride = merged[index], 4 << index
            y, x = (down[index + 1] - down[index]) // stride, (right[index + 1] - right[index]) // stride  # 0 or 1
            coarse = F.interpolate(merged[index + 1], scale_factor=2.0, mode="nearest")
            below, beside = y + fine.size(2) - coarse.size(2), x + fine.size(3) - coarse.size(3)
            if below > 0 or beside > 0:  # where strides round down, the last cells lie in none: take the nearest
                coarse = F.pad(coarse, [0, max(beside, 0), 0, max(below, 0)], mode="replicate")
            merged[index] = fine + coarse[:, :, y : y + fine.size(2), x : x + fine.size(3)]
        features: list[Tensor] = []
        for index, block in enumerate(self.fpn.layer_blocks):
            features.append(block(merged[index]))
        return features

    def resized(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """-> the image [1, 3, h, w] with zeros to its right and below, and its own height and width in there."""
        height, width = image.shape[1], image.shape[2]
        scale = min(self.short_side / min(height, width), self.long_side / max(height, width))
        height, width = int(height * scale), int(width * scale)
        image = F.interpolate(image[None], size=[height, width], mode="bilinear", align_corners=False)
        return F.pad(image, [0, -width % self.multiple, 0, -height % self.multiple]), (height, width)

    def propose(
        self, features: list[Tensor], down: list[int], right: list[int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The region proposals [R, 4] and their logits [R], best first: the best anchors of each level, without those much
        like a better one."""
        scores, boxes = torch.jit.annotate(list[Tensor], []), torch.jit.annotate(list[Tensor], [])
        of_level = self.rpn_head(features)
        for feature, stride, below, beside, logits, offsets, anchors in zip(
            features, self.strides, down, right, of_level[0], of_level[1], self.anchors
        ):
            h, w = feature.shape[2], feature.shape[3]
            y = torch.arange(h, device=feature.device) * stride - below
            x = torch.arange(w, device=feature.device) * stride - beside
            corner = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], 2)  # [h, w, 2]
            anchors = (torch.cat([corner, corner], 2)[:, :, None] + anchors).flatten(0, 2)  # [h * w * A, 4]
            level = logits.float().permute(0, 2, 3, 1).flatten()  # [h * w * A]
            deltas = offsets.float().view(-1, 4, h, w).permute(2, 3, 0, 1).reshape(-1, 4)  # [h * w * A, 4]
            # As many candidates on every level, so that their number does not follow from the frame's size.
            best, index = F.pad(level, [0, self.candidates], value=float("-inf")).topk(self.candidates)
            index = index.clamp(max=level.shape[0] - 1)
            found = inside(decode(deltas[index], anchors[index], self.rpn_weights), size)
            scores.append(best)
            boxes.append(found)
        likely = suppress(
            torch.stack(boxes), torch.stack(scores), 1e-3, self.rpn_nms, self.rounds
        ).flatten()  # [levels * candidates]
        likely, order = likely.topk(self.regions)
        return cut(torch.cat(boxes)[order], likely, self.rounds > 0)

    def detect(
        self, features: list[Tensor], regions: Tensor, likely: Tensor, down: list[int], right: list[int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Boxes [M, 4] in the resized image and their scores [M], best first."""
        pooled = pool_regions(features, regions, self.box_cells, down, right)
        logits, offsets = self.box_predictor(self.box_head(pooled))
        scores = logits.softmax(-1)[:, 1]
        scores = torch.where((likely > float("-inf")) & (scores > self.threshold), scores, float("-inf"))
        scores, order = scores.sort(descending=True, stable=True)
        boxes = inside(decode(offsets[:, 4:], regions, self.box_weights)[order], size)
        scores = suppress(boxes[None], scores[None], 1e-2, self.nms, self.rounds)[0]
        scores, order = scores.topk(min(self.top, scores.shape[0]))
        return cut(boxes[order], scores, self.rounds > 0)


def lags(side: int, same: bool) -> list[int]:
    """How many pixels before their place the cells of stride 4, 8, 16 and 32 lie along a side of an image.

    Their place is where they are in images that 32 divides. Convolutions that pad as TensorFlow does ("same") and halve an odd side
    put every cell half a step earlier than those that halve an even one.
    """
    found: list[int] = []
    lag, stride = 0, 1
    for halving in range(5):
        if same and side % 2 == 1:
            lag += stride
        side, stride = (side + 1) // 2, 2 * stride
        if halving > 0:
            found.append(lag)
    return found


def decode(deltas: Tensor, boxes: Tensor, weights: list[float]) -> Tensor:
    """Boxes [R, 4] moved by deltas [R, 4], as torchvision's `BoxCoder.decode_single` (which makes constants on the host)."""
    size, shift, scale = boxes[:, 2:] - boxes[:, :2], deltas[:, :2], deltas[:, 2:]
    center = boxes[:, :2] + 0.5 * size
    center = center + torch.stack([shift[:, 0] / weights[0], shift[:, 1] / weights[1]], 1) * size
    scale = torch.stack([scale[:, 0] / weights[2], scale[:, 1] / weights[3]], 1).clamp(max=math.log(1000 / 16))
    half = 0.5 * (scale.exp() * size)
    return torch.cat([center - half, center + half], 1)


def inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [R, 4] cut off at the borders of an image of this height and width."""
    x, y = boxes[:, 0::2].clamp(min=0, max=size[1]), boxes[:, 1::2].clamp(min=0, max=size[0])
    return torch.stack([x, y], 2).flatten(1)


def cut(boxes: Tensor, scores: Tensor, fixed: bool) -> tuple[Tensor, Tensor]:
    """Without the last ones, which have a score of -inf; a traced program keeps them."""
    if fixed:
        return boxes, scores
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return boxes, scores
    count = int((scores > float("-inf")).sum())
    return boxes[:count], scores[:count]


def suppress(boxes: Tensor, scores: Tensor, least: float, threshold: float, rounds: int = 0) -> Tensor:
    """Scores [L, R] of boxes [L, R, 4], best first, with -inf for those with a side below `least` and those that a better one
    which stays covers with an IoU above `threshold`.

    Whether a box stays follows from those before it, so repeating the rule for all at once settles on the one answer, in as
    many rounds as the longest chain of boxes that decide about each other, some ten; or in `rounds`, if given, without asking the device.
    """
    left, top, right, bottom = boxes.unbind(2)  # [L, R] each
    wide = torch.minimum(right[:, :, None], right[:, None]) - torch.maximum(left[:, :, None], left[:, None])
    tall = torch.minimum(bottom[:, :, None], bottom[:, None]) - torch.maximum(top[:, :, None], top[:, None])
    shared = wide.clamp(min=0) * tall.clamp(min=0)  # [L, R, R]
    sides = boxes[:, :, 2:] - boxes[:, :, :2]
    areas = sides[:, :, 0] * sides[:, :, 1]
    real = (scores > float("-inf")) & (sides >= least).all(2)  # [L, R]
    alike = shared / (areas[:, :, None] + areas[:, None] - shared) > threshold
    covers = (alike & real[:, :, None]).to(boxes.dtype).triu(1)  # row before column
    stays = real.float()
    if rounds > 0:
        for _ in range(rounds):
            stays = settle_once(stays, covers) * real
        return torch.where(stays > 0, scores, float("-inf"))
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return torch.where(_settle(stays, covers) > 0, scores, float("-inf"))
    before = torch.zeros_like(stays)
    while not torch.equal(stays, before):
        before = stays
        stays = settle_once(stays, covers) * real
    return torch.where(stays > 0, scores, float("-inf"))


def settle_once(stays: Tensor, covers: Tensor) -> Tensor:
    """[L, R] of 0 and 1: whether none of those that stay covers it."""
    return ((stays[:, None] @ covers)[:, 0] == 0).float()


def _settle(real: Tensor, covers: Tensor) -> Tensor:
    """The rounds of `suppress` as a loop that torch.export keeps as one."""
    from torch._higher_order_ops import while_loop

    def differ(stays: Tensor, before: Tensor) -> Tensor:
        return (stays != before).any()

    def again(stays: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        return settle_once(stays, covers) * real, stays.clone()

    return while_loop(differ, again, (real.clone(), torch.zeros_like(real)))[0]


def pool_regions(features: list[Tensor], boxes: Tensor, cells: int, down: list[int], right: list[int]) -> Tensor:
    """The features [1, C, h, w], stride 4 doubling, in each of the boxes [R, 4], pixels: [R, C, cells, cells]. down, right: the
    levels' `lags`.

    As torchvision's MultiScaleRoIAlign: a box's level follows from its area; four samples to a cell, each from four neighbours.
    With the levels one behind the other that is a weighted sum of 16 rows of one table, whichever level a box is on.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = (4 + torch.log2(area.sqrt() / 224) + 1e-6).floor().clamp(2, 1 + len(features)) - 2  # [R]
    height, width, first = torch.zeros_like(level), torch.zeros_like(level), torch.zeros_like(level)
    below, beside = torch.zeros_like(level), torch.zeros_like(level)
    done = 0
    for i, feature in enumerate(features):
        h, w = feature.shape[2], feature.shape[3]
        mine = level == i
        height, width = torch.where(mine, h, height), torch.where(mine, w, width)
        first = torch.where(mine, done, first)
        below, beside = torch.where(mine, down[i], below), torch.where(mine, right[i], beside)
        done += h * w
    scaled = (boxes + torch.stack([beside, below, beside, below], 1)) / (4 * 2**level)[:, None]
    y, of_y = neighbours(scaled[:, 1], scaled[:, 3], height, cells)  # [R, cells, 4]
    x, of_x = neighbours(scaled[:, 0], scaled[:, 2], width, cells)
    rows = (first[:, None, None] + y * width[:, None, None]).long()
    index = (rows[:, :, None, :, None] + x.long()[:, None, :, None]).flatten(3)  # [R, cells, cells, 16]
    weight = (of_y[:, :, None, :, None] * of_x[:, None, :, None]).flatten(3)
    table = torch.cat([feature[0].flatten(1) for feature in features], 1).t().contiguous()  # [all cells of all levels, C]
    table = table.to(weight.dtype)
    pooled = F.embedding_bag(index.flatten(0, 2), table, per_sample_weights=weight.flatten(0, 2), mode="sum")
    return pooled.view(-1, cells, cells, table.shape[1]).permute(0, 3, 1, 2)


def neighbours(low: Tensor, high: Tensor, size: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Where a mean of two samples in each of `cells` parts of [low, high), both [R], takes its values from along an axis of
    `size` [R] values, and with what weight: [R, cells, 4] each."""
    steps = (torch.arange(2 * cells, device=low.device) + 0.5) / (2 * cells)
    at = low[:, None] + (high - low).clamp(min=1)[:, None] * steps  # [R, 2 * cells]
    last = size[:, None] - 1
    at = torch.minimum(at.clamp(min=0), last)
    before = at.floor()
    share = at - before
    index = torch.stack([before, torch.minimum(before + 1, last)], 2)
    weight = torch.stack([1 - share, share], 2) / 2
    return index.view(-1, cells, 4), weight.view(-1, cells, 4)

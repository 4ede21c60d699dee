"""What the class-agnostic proposal network learns, and its files, in torch alone: torchvision takes longer to import than torch.

``Layers(DetectorConfig.preset("small"))`` has the names and the initial values of torchvision's Mask R-CNN.
`dmm_fast.proposals.network` trains it inside that one; `dmm_fast.proposals.traceable` runs it.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from dmm_fast.model.network import make_backbone
from dmm_fast.model.weights import read_weights
from dmm_fast.proposals.base import ProposalError

FORMAT = 1
RATIOS = (0.5, 1.0, 2.0)
STRIDES = (8, 16, 32, 64)  # of the pyramid's levels that have anchors
BOX_CELLS, MASK_CELLS = 7, 14  # along a side of a region, for the box and the mask head
RESNETS = (  # torchvision's, which keep its own pyramid and heads
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
    "wide_resnet50_2", "wide_resnet101_2",
)  # fmt: skip


@dataclass(frozen=True)
class DetectorConfig:
    """Settings of the proposal network.

    backbone: a ResNet of torchvision (with its own pyramid and full-size heads), or any timm backbone with four levels
    of stride 4 to 32, which `fpn` (channels of pyramid, region and mask heads), `box` (units of the box head) and
    `masks` (convolutions of the mask head) make small or large.
    short_side: frames are resized to it, long side at most `long_side`. smallest: side of the smallest anchors in pixels
    there; every level doubles it. regions: how many of the region proposals the box head sees. nms: IoU above which a
    proposal gives way to a better one. frozen: the backbone keeps its ImageNet weights.
    """

    backbone: str = "tf_efficientnet_lite0"
    frozen: bool = True
    fpn: int = 96
    box: int = 256
    masks: int = 4
    short_side: int = 240
    long_side: int = 1333
    smallest: int = 20
    regions: int = 200
    nms: float = 0.5

    def __post_init__(self) -> None:
        for name in ("fpn", "box", "masks", "short_side", "long_side", "smallest", "regions"):
            if getattr(self, name) < 1:
                raise ValueError(f"DetectorConfig: {name} must be at least 1, got {getattr(self, name)!r}")
        if not 0.0 < self.nms <= 1.0:
            raise ValueError(f"DetectorConfig: nms must be in (0, 1], got {self.nms!r}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DetectorConfig:
        """The settings called `name` (see `PRESETS`), with `changes` on top."""
        if name not in PRESETS:
            raise ValueError(f"DetectorConfig: preset must be one of {tuple(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DetectorConfig:
        """The inverse of `to_dict`; a name that is not a field is an error, not ignored."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"DetectorConfig: unknown settings {unknown}")
        return cls(**values)


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "resnet50": {"backbone": "resnet50", "frozen": False, "short_side": 800, "smallest": 32, "regions": 1000},
    "resnext101": {"backbone": "resnext101_32x8d", "frozen": False, "short_side": 800, "smallest": 32, "regions": 1000},
}


def anchor_sizes(config: DetectorConfig) -> list[tuple[int, ...]]:
    """Two sizes a level, half an octave apart, on all levels but the finest, where they would cost the most."""
    return [tuple(round(config.smallest * 2 ** (level + half)) for half in (0, 0.5)) for level in range(len(STRIDES))]


def cell_anchors(config: DetectorConfig) -> Tensor:
    """Boxes around the middle of a cell, [levels, A, 4], as torchvision's AnchorGenerator makes them."""
    tall = torch.tensor(RATIOS).sqrt()[:, None]
    sides = [
        torch.stack([(1 / tall * torch.tensor(sizes)), tall * torch.tensor(sizes)], 2).flatten(0, 1)
        for sizes in anchor_sizes(config)
    ]
    return torch.stack([torch.cat([-side, side], 1) / 2 for side in sides]).round()


class Layers(nn.Module):
    """The layers of a network on a timm backbone; `config` tells the sizes. pretrained: the backbone has its ImageNet weights."""

    def __init__(self, config: DetectorConfig, pretrained: bool = False):
        super().__init__()
        width = config.fpn
        self.backbone = PyramidBackbone(config, pretrained)
        self.rpn, self.roi_heads = nn.Module(), nn.Module()
        self.rpn.head = RegionHead(width, 2 * len(RATIOS))
        self.roi_heads.box_head = BoxHead(width * BOX_CELLS**2, config.box)
        self.roi_heads.box_predictor = BoxPredictor(config.box)
        self.roi_heads.mask_head = mask_head(width, config.masks)
        self.roi_heads.mask_predictor = mask_predictor(width)


class PyramidBackbone(nn.Module):
    """A timm backbone and a feature pyramid on it: levels "0" to "3" (stride 4 to 32) and "pool" (64)."""

    def __init__(self, config: DetectorConfig, pretrained: bool):
        super().__init__()
        self.body, channels, strides, self.mean, self.std = make_backbone(config.backbone, pretrained)
        if strides != [4, 8, 16, 32]:
            raise ValueError(f"DetectorConfig: backbone needs levels of stride 4 to 32, {config.backbone!r} has {strides}")
        self.fpn = Pyramid(channels, config.fpn)
        self.out_channels = config.fpn
        self.frozen = config.frozen
        self.body.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> PyramidBackbone:
        """A frozen body stays in evaluation mode: its batch norms neither use nor move batch statistics."""
        super().train(mode)
        self.body.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            levels = self.body(images)
        return named_levels(self.fpn(levels))


def named_levels(levels: list[Tensor]) -> OrderedDict[str, Tensor]:
    """A pyramid's four levels and a coarser one, as torchvision calls them."""
    return OrderedDict(zip(("0", "1", "2", "3", "pool"), [*levels, F.max_pool2d(levels[3], 1, 2)]))


def convolution(inputs: int, outputs: int, kernel: int, *after: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), *after)


def initialise(block: nn.Module, draw: Callable[[Tensor], Any]) -> None:
    """Draw the weights of its convolutions; biases 0."""
    for layer in block.modules():
        if isinstance(layer, nn.Conv2d):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Pyramid(nn.Module):
    """torchvision's FeaturePyramidNetwork: the body's levels, finest first -> as many with equal channels."""

    def __init__(self, channels: list[int], width: int):
        super().__init__()
        self.inner_blocks, self.layer_blocks = nn.ModuleList(), nn.ModuleList()
        for inputs in channels:
            self.inner_blocks.append(convolution(inputs, width, 1))
            self.layer_blocks.append(convolution(width, width, 3))
        initialise(self, partial(nn.init.kaiming_uniform_, a=1))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        merged: list[Tensor] = []
        for index, block in enumerate(self.inner_blocks):
            merged.append(block(levels[index]))
        for index in range(len(merged) - 2, -1, -1):
            merged[index] = merged[index] + F.interpolate(merged[index + 1], size=merged[index].shape[-2:], mode="nearest")
        features: list[Tensor] = []
        for index, block in enumerate(self.layer_blocks):
            features.append(block(merged[index]))
        return features


class RegionHead(nn.Module):
    """Features of each level -> logits [B, A, h, w] and offsets [B, 4 A, h, w] of its anchors."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.conv = nn.Sequential(convolution(width, width, 3, nn.ReLU(inplace=True)))
        self.cls_logits, self.bbox_pred = nn.Conv2d(width, count, 1), nn.Conv2d(width, 4 * count, 1)
        initialise(self, partial(nn.init.normal_, std=0.01))

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits: list[Tensor] = []
        offsets: list[Tensor] = []
        for level in levels:
            seen = self.conv(level)
            logits.append(self.cls_logits(seen))
            offsets.append(self.bbox_pred(seen))
        return logits, offsets


class BoxHead(nn.Module):
    """Pooled regions [R, C, 7, 7] -> [R, units]."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.fc6, self.fc7 = nn.Linear(inputs, units), nn.Linear(units, units)

    def forward(self, pooled: Tensor) -> Tensor:
        return F.relu(self.fc7(F.relu(self.fc6(pooled.flatten(1)))))


class BoxPredictor(nn.Module):
    """[R, units] -> logits [R, 2] of background and object, offsets [R, 8] of their boxes."""

    def __init__(self, units: int):
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(units, 2), nn.Linear(units, 8)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(regions), self.bbox_pred(regions)


def mask_head(width: int, count: int) -> nn.Sequential:
    """Pooled regions [R, C, 14, 14] -> the same shape."""
    head = nn.Sequential(*(convolution(width, width, 3, nn.ReLU(inplace=True)) for _ in range(count)))
    initialise(head, partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"))
    return head


def mask_predictor(width: int) -> nn.Sequential:
    """[R, C, 14, 14] -> logits [R, 2, 28, 28] of background and object."""
    up, out = nn.ConvTranspose2d(width, width, 2, 2), nn.Conv2d(width, 2, 1)
    for layer in (up, out):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv5_mask=up, relu=nn.ReLU(inplace=True), mask_fcn_logits=out))


def about(config: DetectorConfig) -> dict[str, Any]:
    """What a detector's file says of itself."""
    return {"format": FORMAT, "kind": "detector", "config": config.to_dict()}


def read_detector(path: str | os.PathLike, body: dict[str, Tensor] | None = None) -> tuple[dict[str, Tensor], DetectorConfig]:
    """The tensors in a file of `dmm_fast.proposals.network.save_detector`, any float type, as float32, and the settings.

    body: tensors of a frozen backbone that the file leaves out because another one has them (named as in timm).
    Raises ProposalError for a file of another kind.
    """
    config = DetectorConfig.from_dict(_header(Path(path))["config"])
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read_weights(path).items()}
    tensors.update({f"backbone.body.{name}": tensor for name, tensor in (body or {}).items()})
    return tensors, config


def _header(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ProposalError(f"{path}: no such file of detector weights")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("dmm_fast", "{}"))
    except Exception as error:  # safetensors raises its own type, and others for a file that is cut
        raise ProposalError(f"{path}: not a safetensors file ({error})") from None
    if header.get("kind") != "detector" or header.get("format") != FORMAT:
        raise ProposalError(f"{path}: not detector weights of format {FORMAT} (dmm-fast train-proposals makes them)")
    return header

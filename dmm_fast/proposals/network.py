"""The class-agnostic proposal network: torchvision's Mask R-CNN with one class, "object", on a choice of backbones.

``build(DetectorConfig.preset("small"))`` is the shipped one: a frozen ImageNet backbone with slim pyramid and heads, for
a few frames per second on a CPU. "resnet50" and "resnext101" have torchvision's own sizes (Section 4.1 of the paper).
`dmm_fast.proposals.detector` runs trained weights on frames.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torchvision.models import get_model_weights, resnet
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dmm_fast.model.network import make_backbone
from dmm_fast.model.weights import load_weights, read_weights, save_weights
from dmm_fast.proposals.base import TOP, ProposalError

FORMAT = 1
RATIOS = (0.5, 1.0, 2.0)
STRIDES = (8, 16, 32, 64)  # of the pyramid's levels that have anchors


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


# ----------------------------------------------------------------------------------------------------------- the net


def build(config: DetectorConfig, pretrained: bool = False) -> MaskRCNN:
    """The untrained network; pretrained: its backbone has the ImageNet weights that torchvision or timm provide."""
    if config.backbone in resnet.__all__:
        return _resnet(config, pretrained)
    backbone = TimmPyramid(config, pretrained)
    width, levels = config.fpn, ["0", "1", "2", "3"]
    net = MaskRCNN(
        backbone, **_settings(config, backbone.mean, backbone.std),
        rpn_head=RPNHead(width, 2 * len(RATIOS)),
        box_head=TwoMLPHead(width * 7**2, config.box), box_predictor=FastRCNNPredictor(config.box, 2),
        mask_roi_pool=MultiScaleRoIAlign(levels, 14, 2), mask_head=MaskRCNNHeads(width, [width] * config.masks, 1),
        mask_predictor=MaskRCNNPredictor(width, width, 2),
    )  # fmt: skip
    # Two anchor sizes a level, half an octave apart, on all levels but the finest, where they would cost the most.
    sizes = [tuple(round(config.smallest * 2 ** (level + half)) for half in (0, 0.5)) for level in range(4)]
    net.rpn.__class__ = _CoarseRegions
    net.rpn.anchor_generator = _Anchors(sizes, [RATIOS] * len(sizes))
    return net


def _resnet(config: DetectorConfig, pretrained: bool) -> MaskRCNN:
    weights = get_model_weights(config.backbone).DEFAULT if pretrained else None
    layers = 0 if config.frozen else 3 if pretrained else 5
    backbone = resnet_fpn_backbone(backbone_name=config.backbone, weights=weights, trainable_layers=layers)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    sizes = [(config.smallest * 2**level,) for level in range(5)]
    return MaskRCNN(
        backbone, rpn_anchor_generator=AnchorGenerator(sizes, [RATIOS] * 5), num_classes=2, **_settings(config, mean, std)
    )


def _settings(config: DetectorConfig, mean: Any, std: Any) -> dict[str, Any]:
    return {
        "min_size": config.short_side, "max_size": config.long_side, "image_mean": list(mean), "image_std": list(std),
        "rpn_pre_nms_top_n_train": 2 * config.regions, "rpn_post_nms_top_n_train": config.regions,
        "rpn_pre_nms_top_n_test": 2 * config.regions, "rpn_post_nms_top_n_test": config.regions,
        "box_score_thresh": 0.0, "box_nms_thresh": config.nms, "box_detections_per_img": TOP,
    }  # fmt: skip


class TimmPyramid(nn.Module):
    """A timm backbone and a feature pyramid on it: levels "0" to "3" (stride 4 to 32) and "pool" (64)."""

    def __init__(self, config: DetectorConfig, pretrained: bool):
        super().__init__()
        self.body, channels, strides, self.mean, self.std = make_backbone(config.backbone, pretrained)
        if strides != [4, 8, 16, 32]:
            raise ValueError(f"DetectorConfig: backbone needs levels of stride 4 to 32, {config.backbone!r} has {strides}")
        self.fpn = FeaturePyramidNetwork(channels, config.fpn, LastLevelMaxPool())
        self.out_channels = config.fpn
        self.frozen = config.frozen
        self.body.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> TimmPyramid:
        """A frozen body stays in evaluation mode: its batch norms neither use nor move batch statistics."""
        super().train(mode)
        self.body.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            levels = self.body(images)
        return self.fpn(OrderedDict((str(index), level) for index, level in enumerate(levels)))


class _CoarseRegions(RegionProposalNetwork):
    """A region proposal network that leaves the finest level to the box and mask heads."""

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        return super().forward(images, {name: level for name, level in features.items() if name != "0"}, targets)


class _Anchors(AnchorGenerator):
    """Anchors at the pyramid's strides; torchvision divides the image's size by the level's, which is off where that rounds."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        sizes = [list(level.shape[-2:]) for level in feature_maps]
        device = feature_maps[0].device
        self.set_cell_anchors(feature_maps[0].dtype, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in STRIDES]
        return [torch.cat(self.grid_anchors(sizes, strides)) for _ in image_list.image_sizes]


# -------------------------------------------------------------------------------------------------- weights and frames


def save_detector(net: MaskRCNN, config: DetectorConfig, path: str | os.PathLike, notes: dict[str, Any] | None = None) -> None:
    """Write weights and settings (and `notes`, anything JSON) as one safetensors file, whole or not at all."""
    header = {"format": FORMAT, "kind": "detector", "config": config.to_dict(), **(notes or {})}
    save_weights(net, path, header)


def load_detector(path: str | os.PathLike, body: dict[str, Tensor] | None = None) -> tuple[MaskRCNN, DetectorConfig]:
    """The network in a file of `save_detector`, any float type, and its settings.

    body: tensors of a frozen backbone that the file leaves out because another one has them (named as in timm).
    Raises ProposalError for a file of another kind, ValueError listing the keys that do not fit.
    """
    config = DetectorConfig.from_dict(_header(Path(path))["config"])
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in read_weights(path).items()}
    tensors.update({f"backbone.body.{name}": tensor for name, tensor in (body or {}).items()})
    net = build(config)
    load_weights(net, tensors, str(path))
    return net, config


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

"""The class-agnostic proposal network: torchvision's Mask R-CNN with one class, "object", on a choice of backbones.

``build(DetectorConfig.preset("small"))`` is the shipped one: a frozen ImageNet backbone with slim pyramid and heads, for
a few frames per second on a CPU. "resnet50" and "resnext101" have torchvision's own sizes (Section 4.1 of the paper).
`dmm_fast.proposals.detector` runs trained weights on frames.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from dmm_fast.model.weights import load_weights, save_weights
from dmm_fast.proposals.base import TOP
from dmm_fast.proposals.layers import (
    BOX_CELLS,
    MASK_CELLS,
    RATIOS,
    RESNETS,
    STRIDES,
    DetectorConfig,
    Layers,
    about,
    anchor_sizes,
    read_detector,
)  # fmt: skip


def build(config: DetectorConfig, pretrained: bool = False) -> MaskRCNN:
    """The untrained network; pretrained: its backbone has the ImageNet weights that torchvision or timm provide."""
    return _resnet(config, pretrained) if config.backbone in RESNETS else around(Layers(config, pretrained), config)


def around(layers: Layers, config: DetectorConfig) -> MaskRCNN:
    """torchvision's Mask R-CNN with these layers (not copies) in it."""
    heads, levels = layers.roi_heads, ["0", "1", "2", "3"]
    net = MaskRCNN(
        layers.backbone, **_settings(config, layers.backbone.mean, layers.backbone.std), rpn_head=layers.rpn.head,
        box_roi_pool=MultiScaleRoIAlign(levels, BOX_CELLS, 2), box_head=heads.box_head, box_predictor=heads.box_predictor,
        mask_roi_pool=MultiScaleRoIAlign(levels, MASK_CELLS, 2), mask_head=heads.mask_head, mask_predictor=heads.mask_predictor,
    )  # fmt: skip
    sizes = anchor_sizes(config)
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
    save_weights(net, path, {**about(config), **(notes or {})})


def load_detector(path: str | os.PathLike, body: dict[str, Tensor] | None = None) -> tuple[MaskRCNN, DetectorConfig]:
    """The network in a file of `save_detector`, and its settings; body as for `read_detector`.

    Raises ProposalError for a file of another kind, ValueError listing the keys that do not fit.
    """
    tensors, config = read_detector(path, body)
    net = build(config)
    load_weights(net, tensors, str(path))
    return net, config

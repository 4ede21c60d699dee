"""Trained proposal networks at work on frames."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dmm_fast.model import Proposals, digest
from dmm_fast.model.inference import fold
from dmm_fast.model.weights import load_weights, packaged, read_weights
from dmm_fast.ops.device import open_device
from dmm_fast.proposals.base import TOP, channels_first, real
from dmm_fast.proposals.layers import RESNETS, Layers, read_detector
from dmm_fast.proposals.mask_rcnn import MaskRCNNProposer
from dmm_fast.proposals.traceable import ProposalNetwork


class Detector:
    """A trained proposal network: frame, uint8 [H, W, 3] or [3, H, W] -> Proposals, best first, soft 28 x 28 masks.

    short_side: frames are resized to it, by default to the trained one. body: see `read_detector`.
    """

    class_agnostic = True

    def __init__(
        self,
        weights: str | os.PathLike,
        top: int = TOP,
        threshold: float = 0.0,
        short_side: int | None = None,
        device: str | torch.device = "cpu",
        body: dict[str, Tensor] | None = None,
    ):
        self.top, self.threshold, self.device = top, threshold, open_device(device)
        tensors, self.config = read_detector(weights, body)
        if short_side is not None:
            self.config = replace(self.config, short_side=short_side)
        self.layers: Layers | None = None
        self.network: ProposalNetwork | None = None
        if self.config.backbone in RESNETS:
            load_weights(self.model, tensors, str(weights))
            return
        layers = Layers(self.config).eval()
        load_weights(layers, tensors, str(weights))
        self.body_digest = digest(layers.backbone.body)  # of the weights as they are in files: folding changes them
        fold(layers.backbone.body)
        self.layers = layers.to(memory_format=torch.channels_last).to(self.device).requires_grad_(False)
        # The layers at work in scripts and graphs: on a CPU its pooling takes half the time of torchvision's, on a GPU nothing of it waits.
        self.network = ProposalNetwork(self, fixed=self.device.type == "cuda").eval().to(self.device)

    @cached_property
    def model(self) -> nn.Module:
        """torchvision's Mask R-CNN with these layers in it, to be trained."""
        from dmm_fast.proposals.network import around, build

        net = build(self.config) if self.layers is None else around(self.layers, self.config)
        return net.to(memory_format=torch.channels_last).to(self.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray | Tensor) -> Proposals:
        if self.network is None:
            return MaskRCNNProposer(self.model, self.top, self.threshold, self.device)(frame)
        return real(*self.network(channels_first(frame).to(self.device)))


def packaged_detector(**options: Any) -> Detector:
    """The small detector in the package."""
    return Detector(packaged("small-proposals"), body=shared_body(), **options)


def shared_body(weights: str | os.PathLike | None = None) -> dict[str, Tensor]:
    """The weights of a segmentation network's backbone, as a detector takes them. By default those of the packaged network, which the small
    detector shares: they are stored once."""
    return {
        name.removeprefix("backbone."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in read_weights(weights or packaged("small")).items()
        if name.startswith("backbone.")
    }

"""Trained proposal networks at work on frames."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm_fast.model import Proposals, digest
from dmm_fast.model.inference import folded
from dmm_fast.model.weights import packaged, read_weights
from dmm_fast.proposals.base import TOP, real
from dmm_fast.proposals.mask_rcnn import MaskRCNNProposer
from dmm_fast.proposals.network import TimmPyramid, load_detector
from dmm_fast.proposals.traceable import ProposalNetwork


class Detector(MaskRCNNProposer):
    """A trained proposal network: frame, uint8 [H, W, 3] or [3, H, W] -> Proposals, best first, soft 28 x 28 masks.

    short_side: frames are resized to it, by default to the trained one. body: see `load_detector`.
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
        net, self.config = load_detector(weights, body)
        if short_side is not None:
            net.transform.min_size = (short_side,)
        timm = isinstance(net.backbone, TimmPyramid)
        if timm:
            self.body_digest = digest(net.backbone.body)  # of the weights as they are in files: folding changes them
            net.backbone.body = folded(net.backbone.body)
        super().__init__(net.to(memory_format=torch.channels_last), top, threshold, device)
        # The same modules written for scripts and graphs: on a CPU its pooling takes half the time of torchvision's, on a GPU
        # nothing of it waits.
        self.network = ProposalNetwork(self, fixed=self.device.type == "cuda").eval().to(self.device) if timm else None

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray | Tensor) -> Proposals:
        if self.network is None:
            return super().__call__(frame)
        return real(*self.network(self._tensor(frame)))


def packaged_detector(**options: Any) -> Detector:
    """The small detector in the package, whose backbone is that of the packaged network (both frozen, stored once)."""
    shared = {
        name.removeprefix("backbone."): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in read_weights(packaged("small")).items()
        if name.startswith("backbone.")
    }
    return Detector(packaged("small-proposals"), body=shared, **options)

"""Live torchvision Mask R-CNNs as class-agnostic proposers."""

from __future__ import annotations

import os
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor, nn

from dmm_fast.model import Proposals
from dmm_fast.model.weights import load_weights
from dmm_fast.ops.device import open_device
from dmm_fast.proposals.base import TOP, ProposalError, channels_first
from dmm_fast.proposals.coco import _short


class MaskRCNNProposer:
    """A torchvision Mask R-CNN as a class-agnostic proposer (Section 4.1 of the paper).

    Every region keeps its best foreground class, regions then compete across classes, and the ``top`` best above
    ``threshold`` are kept.
    """

    def __init__(self, model: nn.Module, top: int = TOP, threshold: float = 0.0, device: str | torch.device = "cpu"):
        self.top, self.threshold, self.device = top, threshold, open_device(device)
        self.model = model.eval().requires_grad_(False).to(self.device)

    @torch.inference_mode()
    def __call__(self, frame: np.ndarray | Tensor) -> Proposals:
        """frame uint8 [H, W, 3] RGB (array) or [3, H, W] (tensor) -> at most ``top`` proposals, best first."""
        image = channels_first(frame).to(self.device).float() / 255  # [3, H, W]
        images, _ = self.model.transform([image])
        inner = images.image_sizes[0]
        features = self.model.backbone(images.tensors)
        regions, _ = self.model.rpn(images, features)
        boxes, scores, labels = self._detect(features, regions, inner)
        masks = self._masks(features, boxes, labels, inner)  # [M, 28, 28]
        height, width = image.shape[1:]
        boxes = boxes * boxes.new_tensor([width / inner[1], height / inner[0]] * 2)
        return Proposals(boxes, scores, masks)

    def _detect(
        self, features: dict[str, Tensor], regions: list[Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> boxes [M, 4], scores [M], labels [M], suppressed across classes."""
        from torchvision.ops import clip_boxes_to_image, nms, remove_small_boxes

        heads = self.model.roi_heads
        logits, offsets = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, regions, [size])))
        scores, labels = logits.softmax(-1)[:, 1:].max(-1)  # [R]
        labels = labels + 1  # class 0 is the background
        boxes = heads.box_coder.decode(offsets, regions)  # [R, classes, 4]
        boxes = clip_boxes_to_image(boxes[torch.arange(len(boxes)), labels], size)  # [R, 4]
        keep = torch.nonzero(scores > self.threshold).squeeze(1)
        keep = keep[remove_small_boxes(boxes[keep], min_size=1e-2)]
        keep = keep[nms(boxes[keep], scores[keep], heads.nms_thresh)[: self.top]]
        return boxes[keep], scores[keep], labels[keep]

    def _masks(self, features: dict[str, Tensor], boxes: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """The mask head's own output for each box and its class, before it is pasted into the image: [M, 28, 28]."""
        heads = self.model.roi_heads
        logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, [boxes], [size])))
        return logits[torch.arange(len(labels)), labels].sigmoid()  # [M, 28, 28]


class TorchvisionProposer(MaskRCNNProposer):
    """torchvision's own Mask R-CNN (R50-FPN v2, the classes of COCO).

    weights: "DEFAULT" (COCO, downloaded on first use), a local file (.pth or .safetensors), or None for random weights.
    Frames are resized so that their short side is ``short_side`` (long side <= 1333).

    Raises ProposalError when the weights are neither present nor downloadable, or do not fit.
    """

    def __init__(
        self,
        weights: str | os.PathLike | None = "DEFAULT",
        top: int = TOP,
        threshold: float = 0.0,
        short_side: int = 800,
        device: str | torch.device = "cpu",
    ):
        from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

        state = detector_weights(weights) if weights is not None else None
        model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, min_size=short_side, max_size=1333)
        if state is not None:
            try:
                load_weights(model, state, str(weights))
            except ValueError as error:
                raise ProposalError(f"{weights}: not the weights of torchvision's maskrcnn_resnet50_fpn_v2: {error}") from None
        super().__init__(model, top, threshold, device)


def detector_weights(weights: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors of COCO's Mask R-CNN ("DEFAULT") or of a .safetensors or .pth file; the latter is never unpickled freely."""
    if weights == "DEFAULT":
        return _coco_weights()
    path = Path(weights)
    if not path.is_file():
        raise ProposalError(
            f"{path}: no such file of detector weights; without --detector-weights COCO's are downloaded, and --proposals small "
            "is a detector in the package"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise half a dozen unrelated types for a bad file
        raise ProposalError(f"{path}: cannot be read as detector weights: {_short(str(error))}") from None


def _coco_weights() -> dict[str, Tensor]:
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

    url = MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url
    wanted = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:  # no network, a wrong hash, a file cut short
        state = f"at {wanted} are damaged; delete that file" if wanted.exists() else "are not here and cannot be downloaded"
        raise ProposalError(
            f"Mask R-CNN's COCO weights {state} ({_short(str(error))}). Put {url} at {wanted}, "
            "or name a local copy with --detector-weights FILE, use the packaged detector with --proposals small, "
            "or bring another detector's masks with --proposals FILE.json"
        ) from None

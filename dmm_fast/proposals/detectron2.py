"""Any instance segmenter of detectron2 as a proposer. detectron2 is imported only when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from dmm_fast.model import Proposals
from dmm_fast.ops.device import open_device
from dmm_fast.proposals.base import TOP, ProposalError

INSTALL = (
    "pip install 'setuptools<81' && pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
)
OTHERS = "--proposals small (in the package), torchvision, or FILE.json with another detector's masks"


def _ways(config: str) -> str:
    return f"Give a local copy with --proposals detectron2:{config}:FILE, or another detector: {OTHERS}"


class Detectron2Proposer:
    """A detectron2 model with masks; its classes compete, so that the proposals are class-agnostic.

    config: a file, or a name of detectron2's model zoo such as COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml.
    weights: a file (.pkl, .pth) or address; by default the zoo's, or those that the file names. precision: "float32" or
    "bfloat16", of its matrix products.

    Raises ProposalError where detectron2 is missing, does not know the config, its weights are neither here nor to be had, or
    the model gives no masks.
    """

    def __init__(
        self,
        config: str,
        weights: str | None = None,
        top: int = TOP,
        threshold: float = 0.0,
        short_side: int | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
    ):
        self.device, self.precision = open_device(device), getattr(torch, precision)
        try:
            from detectron2 import model_zoo
            from detectron2.config import get_cfg
            from detectron2.engine import DefaultPredictor
        except ImportError as error:
            raise ProposalError(
                f"detectron2 cannot be imported ({error}). It is built from source: {INSTALL}. Without it: {OTHERS}"
            ) from None
        cfg = get_cfg()
        if Path(config).is_file():
            try:
                cfg.merge_from_file(config)
            except OSError as error:
                raise ProposalError(f"{config}: a file that it is based on cannot be read ({error})") from None
        else:
            try:
                cfg.merge_from_file(model_zoo.get_config_file(config))
                weights = weights or model_zoo.get_checkpoint_url(config)
            except RuntimeError as error:
                raise ProposalError(f"{config}: neither a file nor in detectron2's model zoo ({error}); names there are such as "
                                    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml") from None  # fmt: skip
        if weights is not None:
            cfg.MODEL.WEIGHTS = weights
        cfg.MODEL.DEVICE = str(self.device)
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
        cfg.TEST.DETECTIONS_PER_IMAGE = 2 * top  # the same region may come once for each of two classes
        if short_side is not None:
            cfg.INPUT.MIN_SIZE_TEST = short_side
        if not cfg.MODEL.WEIGHTS:
            raise ProposalError(f"{config}: names no weights, so the model would be random; {_ways(config)}")
        try:
            self.predictor = DefaultPredictor(cfg)
        except (OSError, AssertionError) as error:  # of a download, of a missing file
            file = cfg.MODEL.WEIGHTS
            raise ProposalError(
                f"detectron2's weights {file} are not here and cannot be downloaded ({error}). {_ways(config)}"
            ) from None
        self.top, self.overlap = top, cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST

    def __call__(self, frame: np.ndarray | Tensor) -> Proposals:
        """frame uint8 [H, W, 3] RGB (array) or [3, H, W] (tensor) -> at most ``top`` proposals, best first."""
        return self.batch([frame])[0]

    @torch.inference_mode()
    def batch(self, frames: Sequence[np.ndarray | Tensor]) -> list[Proposals]:
        """The proposals of each of some frames."""
        inputs = [self._input(frame) for frame in frames]
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            outputs = self.predictor.model(inputs)
        return [self._proposals(output["instances"].to("cpu")) for output in outputs]

    def _input(self, frame: np.ndarray | Tensor) -> dict[str, Any]:
        """What `DefaultPredictor` gives the model for one frame: it takes one at a time."""
        if isinstance(frame, Tensor):
            frame = frame.permute(1, 2, 0).cpu().numpy()
        height, width = frame.shape[:2]
        if self.predictor.input_format == "BGR":
            frame = frame[:, :, ::-1]
        frame = np.ascontiguousarray(frame)
        image = self.predictor.aug.get_transform(frame).apply_image(frame)
        return {"image": torch.as_tensor(image.astype("float32").transpose(2, 0, 1)), "height": height, "width": width}

    def _proposals(self, found: Any) -> Proposals:
        if not found.has("pred_masks"):
            raise ProposalError("the detectron2 model finds boxes only; proposals need masks (an instance segmenter)")
        boxes, scores, masks = found.pred_boxes.tensor.float(), found.scores.float(), found.pred_masks  # masks [M, H, W] bool
        keep = nms(boxes, scores, self.overlap)[: self.top]
        return Proposals(boxes[keep], scores[keep], masks[keep])

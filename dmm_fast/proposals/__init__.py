"""Mask proposals: COCO results files written by any detector, and live detectors.

Both give `dmm_fast.model.Proposals`: boxes [M, 4] (xyxy, pixels of the frame), scores [M], and masks that are either whole
frames (bool [M, H, W], from a file) or soft masks inside their boxes (float32 [M, 28, 28], from a detector), so that Eq. 8 of
the paper needs no M x H x W array.
"""

from dmm_fast.proposals.base import TOP, ProposalError, full_masks
from dmm_fast.proposals.coco import CocoWriter, ProposalFile, read_coco, write_coco
from dmm_fast.proposals.mask_rcnn import MaskRCNNProposer, TorchvisionProposer, detector_weights
from dmm_fast.proposals.sources import is_detector, open_proposer

__all__ = [
    "TOP", "CocoWriter", "MaskRCNNProposer", "ProposalError", "ProposalFile", "TorchvisionProposer", "detector_weights",
    "full_masks", "is_detector", "open_proposer", "read_coco", "write_coco",
]  # fmt: skip

"""The proposal network as TorchScript: frame in, proposals out, with ops of torch alone.

torchvision's `nms` and `roi_align` live in a library that only Python loads, so this holds them written in torch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.boxes import box_area, clip_boxes_to_image, remove_small_boxes

from dmm_fast.detector import TimmPyramid
from dmm_fast.proposals import MaskRCNNProposer, ProposalError


class ProposalNetwork(nn.Module):
    """frame [3, H, W] uint8 -> boxes [M, 4], scores [M], masks [M, 28, 28], as the `Detector` it is made of."""

    def __init__(self, detector: MaskRCNNProposer) -> None:
        super().__init__()
        model = detector.model
        if not isinstance(model.backbone, TimmPyramid) or model.roi_heads.box_predictor.cls_score.out_features != 2:
            raise ProposalError("export: the proposal network must be one of dmm-fast train-proposals on a timm backbone")
        rpn, heads, size = model.rpn, model.roi_heads, model.transform
        self.body, self.fpn = model.backbone.body, model.backbone.fpn
        self.rpn_head, self.anchors, self.rpn_coder = rpn.head, rpn.anchor_generator, rpn.box_coder
        self.box_head, self.box_predictor, self.box_coder = heads.box_head, heads.box_predictor, heads.box_coder
        self.mask_head, self.mask_predictor = heads.mask_head, heads.mask_predictor
        self.box_cells, self.mask_cells = int(heads.box_roi_pool.output_size[0]), int(heads.mask_roi_pool.output_size[0])
        self.short_side, self.long_side, self.multiple = int(size.min_size[-1]), int(size.max_size), int(size.size_divisible)
        self.candidates, self.regions = int(rpn.pre_nms_top_n()), int(rpn.post_nms_top_n())
        self.rpn_nms, self.nms = float(rpn.nms_thresh), float(heads.nms_thresh)
        self.top, self.threshold = int(detector.top), float(detector.threshold)
        self.register_buffer("mean", torch.tensor(size.image_mean)[:, None, None])
        self.register_buffer("std", torch.tensor(size.image_std)[:, None, None])

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, (height, width) = self.resized((frame.float() / 255 - self.mean) / self.std)
        levels = self.body(image)
        pyramid = self.fpn({"0": levels[0], "1": levels[1], "2": levels[2], "3": levels[3]})
        features = [pyramid["0"], pyramid["1"], pyramid["2"], pyramid["3"]]  # [1, C, h, w] of stride 4, 8, 16, 32
        regions = self.propose(image, features[1:] + [pyramid["pool"]], (height, width))
        boxes, scores = self.detect(features, regions, (height, width))
        masks = self.mask_predictor(self.mask_head(pool_regions(features, boxes, self.mask_cells)))
        scale = [frame.shape[2] / width, frame.shape[1] / height]
        return boxes * torch.tensor(scale + scale, device=boxes.device), scores, masks[:, 1].sigmoid()

    def resized(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """-> the image [1, 3, h, w] with zeros to its right and below, and its own height and width in there."""
        height, width = image.shape[1], image.shape[2]
        scale = min(self.short_side / min(height, width), self.long_side / max(height, width))
        height, width = math.floor(height * scale), math.floor(width * scale)
        image = F.interpolate(image[None], size=[height, width], mode="bilinear", align_corners=False)
        return F.pad(image, [0, -width % self.multiple, 0, -height % self.multiple]), (height, width)

    def propose(self, image: Tensor, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        """The region proposals [R, 4], best first: the best anchors of each level, without those much like a better one."""
        anchors = self.anchors(ImageList(image, [size]), features)[0]
        scores, boxes = torch.jit.annotate(list[Tensor], []), torch.jit.annotate(list[Tensor], [])
        logits, offsets = self.rpn_head(features)
        done = 0
        for i in range(len(features)):
            h, w = features[i].shape[2], features[i].shape[3]
            level = logits[i].permute(0, 2, 3, 1).flatten()  # [h * w * A]
            deltas = offsets[i].view(-1, 4, h, w).permute(2, 3, 0, 1).reshape(-1, 4)  # [h * w * A, 4]
            best, index = level.topk(min(self.candidates, level.numel()))
            found = self.rpn_coder.decode_single(deltas[index], anchors[done + index])
            found = clip_boxes_to_image(found, size)
            keep = remove_small_boxes(found, 1e-3)
            keep = keep[suppress(found[keep], self.rpn_nms)]
            scores.append(best[keep])
            boxes.append(found[keep])
            done += level.numel()
        order = torch.cat(scores).argsort(descending=True, stable=True)
        return torch.cat(boxes)[order[: self.regions]]

    def detect(self, features: list[Tensor], regions: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes [M, 4] in the resized image and their scores [M], best first."""
        logits, offsets = self.box_predictor(self.box_head(pool_regions(features, regions, self.box_cells)))
        scores, order = logits.softmax(-1)[:, 1].sort(descending=True, stable=True)
        boxes = clip_boxes_to_image(self.box_coder.decode_single(offsets[:, 4:], regions)[order], size)
        keep = torch.nonzero(scores > self.threshold).squeeze(1)
        keep = keep[remove_small_boxes(boxes[keep], 1e-2)]
        keep = keep[suppress(boxes[keep], self.nms)[: self.top]]
        return boxes[keep], scores[keep]


def suppress(boxes: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes [R, 4], best first, that no better box which stays covers with an IoU above `threshold`.

    Whether a box stays follows from those before it, so repeating the rule for all at once settles on the one answer, in as
    many rounds as the longest chain of boxes that decide about each other.
    """
    shared = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])  # [R, R, 2]
    both, areas = shared.clamp(min=0).prod(2), box_area(boxes)
    covers = (both / (areas[:, None] + areas - both) > threshold).float().triu(1)  # [R, R], row before column
    stays = torch.ones(boxes.shape[0], device=boxes.device)
    before = torch.zeros_like(stays)
    while not torch.equal(stays, before):
        before = stays
        stays = (before @ covers == 0).float()
    return stays.nonzero().squeeze(1)


def pool_regions(features: list[Tensor], boxes: Tensor, cells: int) -> Tensor:
    """The features [1, C, h, w], stride 4 doubling, in each of the boxes [R, 4], pixels: [R, C, cells, cells].

    As torchvision's MultiScaleRoIAlign: a box's level follows from its area; four samples to a cell.
    """
    level = (4 + torch.log2(box_area(boxes).sqrt() / 224) + 1e-6).floor().clamp(2, 1 + len(features)).long() - 2  # [R]
    result = torch.zeros((boxes.shape[0], features[0].shape[1], cells, cells), device=boxes.device)
    steps = (torch.arange(2 * cells, device=boxes.device) + 0.5) / (2 * cells)
    for i, feature in enumerate(features):
        mine = torch.nonzero(level == i).squeeze(1)
        if mine.numel() > 0:
            corner, far = boxes[mine, :2] / 2 ** (2 + i), boxes[mine, 2:] / 2 ** (2 + i)
            at = corner[:, None] + (far - corner).clamp(min=1)[:, None] * steps[:, None]  # [r, 2 * cells, 2], x and y
            last = torch.tensor([feature.shape[3] - 1, feature.shape[2] - 1], device=boxes.device).clamp(min=1)
            at = 2 * at / last - 1
            x, y = at[:, None, :, 0].expand(-1, 2 * cells, -1), at[:, :, None, 1].expand(-1, -1, 2 * cells)
            grid = torch.stack([x, y], 3).flatten(0, 1)[None]  # [1, r * 2 * cells, 2 * cells, 2]
            samples = F.grid_sample(feature, grid, "bilinear", "border", align_corners=True)[0]  # [C, r * 2 * cells, 2 * cells]
            result[mine] = F.avg_pool2d(samples, 2).unflatten(1, [-1, cells]).transpose(0, 1)
    return result

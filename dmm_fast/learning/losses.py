"""Losses of one unrolled step: of the refined masks, of the matched masks, and of the similarities that match them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.model import Affinity, Candidates, Output
from dmm_fast.model.masks import cover as on_grid
from dmm_fast.model.masks import overlap, shared
from dmm_fast.model.refinement import among
from dmm_fast.ops import reference

TERMS = ("refined", "matched", "cosine", "parts", "bce")


@dataclass(frozen=True)
class Loss:
    """Weights of the terms of `dmm_fast.learning.losses`; match_iou: what counts as a proposal of an object."""

    refined: float = 1.0
    matched: float = 1.0
    cosine: float = 1.0
    parts: float = 1.0
    bce: float = 0.0
    match_iou: float = 0.3


def step_losses(
    output: Output, affinity: Affinity, candidates: Candidates, masks: Tensor, *, match_iou: float = 0.3, together: bool = False
) -> dict[str, Tensor]:
    """The loss terms of one frame, each a scalar >= 0; masks [N, H, W] bool is the ground truth.

    refined, matched: 1 - soft IoU of `output.logits`, enlarged to the frame, and of `output.matched`, on the grid. cosine, parts:
    see `cosine_loss` and `parts_loss`. bce: binary cross entropy of the enlarged logits; it alone also asks for an empty mask
    where an object is hidden. together: the logits compete, as `Config.objects` says.
    """
    truth = on_grid(masks, candidates.cover.size(1), candidates.cover.size(2))  # [N, h, w]
    logits = enlarged(output.logits.float(), masks.size(1), masks.size(2))
    refined = among(logits, torch.ones_like(logits[:, 0, 0], dtype=torch.bool)) if together else torch.sigmoid(logits)
    return {
        "refined": soft_iou_loss(refined, masks),
        "matched": soft_iou_loss(output.matched, truth if output.matched.shape == truth.shape else masks),
        "cosine": cosine_loss(affinity.cosine, candidates.cover, truth, match_iou),
        "parts": parts_loss(output.parts, candidates.cover, truth),
        "bce": bce_loss(refined, masks),
    }


def enlarged(logits: Tensor, height: int, width: int) -> Tensor:
    """Logits [N, h, w] at the frame's size, as `torch.ops.dmm.upsample_argmax` sees them, with a gradient."""
    return F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def soft_iou_loss(pred: Tensor, masks: Tensor) -> Tensor:
    """1 - sum(p t) / sum(p + t - p t), the mean over the objects that are seen; both [N, H, W] in [0, 1].

    0 where no object is seen: the soft IoU with an empty mask is 0 whatever is predicted.
    """
    p, t = pred.float().flatten(1), masks.flatten(1).float()  # [N, H W]
    both = (p * t).sum(1)
    iou = both / (p.sum(1) + t.sum(1) - both).clamp(min=1e-6)  # [N]
    seen = t.sum(1) > 0
    return ((1.0 - iou) * seen).sum() / seen.sum().clamp(min=1)


def cosine_loss(cosine: Tensor, cover: Tensor, masks: Tensor, match_iou: float = 0.3) -> Tensor:
    """Mean squared difference of cosine [N, M] to `greedy_target`; 0 without proposals."""
    if cosine.numel() == 0:
        return cosine.sum()
    return F.mse_loss(cosine.float(), greedy_target(cover, masks, match_iou))


def greedy_target(cover: Tensor, masks: Tensor, match_iou: float = 0.3) -> Tensor:
    """The greedy one-to-one assignment of proposals [M, h, w] to the ground truth [N, h, w] by IoU, where that is above match_iou: [N, M] of 0 and 1."""
    iou = overlap(masks, cover)  # [N, M]
    return reference.greedy(-iou) * (iou > match_iou)


def parts_loss(parts: Tensor, cover: Tensor, masks: Tensor) -> Tensor:
    """Binary cross entropy of parts [N, M] to the share of each proposal [M, h, w] that lies on the object [N, h, w]; 0 where there are
    none."""
    if parts.numel() == 0:
        return parts.sum()
    share = shared(masks, cover)[0] / cover.flatten(1).sum(1).clamp(min=1e-3)  # [N, M]
    return bce_loss(parts, share.clamp(0.0, 1.0))


def bce_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross entropy of probabilities to targets of the same shape, in float32.

    Not torch's own: on a GPU that ends the process where a prediction is NaN, before anyone can tell why.
    """
    p, t = pred.float().clamp(1e-6, 1 - 1e-6), target.float()
    return -(t * p.log() + (1 - t) * (1 - p).log()).mean()

"""The ops: `torch.ops.dmm.*` and the functions over them. Importing this registers all of them."""

from dmm_fast.ops.assignment import assign, hungarian, linear_assignment
from dmm_fast.ops.match import match, match_prices
from dmm_fast.ops.reference import feasibility, greedy, mask_confident, sinkhorn
from dmm_fast.ops.tracks import match_tracks
from dmm_fast.ops.vision import decode_runs, mask_iou, paste_combine, paste_masks, upsample_argmax

__all__ = [
    "assign", "decode_runs", "feasibility", "greedy", "hungarian", "linear_assignment", "mask_confident", "mask_iou", "match",
    "match_prices", "match_tracks", "paste_combine", "paste_masks", "sinkhorn", "upsample_argmax",
]  # fmt: skip

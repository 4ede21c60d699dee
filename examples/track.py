"""A multi-object tracker: learned appearance, exact decisions, and tracks that may stay unmatched.

    python examples/track.py FRAMES PROPOSALS --out DIR [--gt DIR]

FRAMES is a folder of images or a video, PROPOSALS a COCO results file by any detector. DIR gets a palette PNG of track ids for every
frame. With --gt (palette PNGs of object ids) it prints how often tracks are mixed up, also without `unmatched_cost` and on overlap
alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import dmm_fast
from dmm_fast.data.masks import ids_to_masks, masks_to_ids, read_mask, write_mask
from dmm_fast.data.video import open_frames
from dmm_fast.proposals.coco import ProposalFile, read_coco


@dataclass
class Seen:
    """The proposals of a frame that are worth a look, best first."""

    scores: Tensor  # [M]
    masks: Tensor  # [M, H, W] bool
    looks: Tensor  # [M, C], of length 1: what the network sees inside the masks


@torch.no_grad()
def look(frames, proposals: ProposalFile, lowest: float = 0.1) -> Iterator[tuple[str, Seen]]:
    """Every frame's name and proposals. Of those with a mask IoU above 0.6 the best stays."""
    net = dmm_fast.Segmenter().net  # the packaged network
    height, width = frames.size
    for stem, frame in frames.read():
        boxes, scores, runs = proposals.runs(stem, frames.size)
        masks = dmm_fast.decode_runs(runs, height, width, height, width) > 0.5
        double = (dmm_fast.mask_iou(masks, masks) > 0.6).tril(-1)  # [M, M]: with a better one
        kept: list[int] = []
        for number in (scores >= lowest).nonzero()[:, 0].tolist():
            if not double[number, kept].any():
                kept.append(number)
        features = net.encode(torch.from_numpy(frame).permute(2, 0, 1)[None])
        looks = F.normalize(net.describe(features, boxes[kept], masks[kept].float(), height, width), dim=1)
        yield stem, Seen(scores[kept], masks[kept], looks)


@dataclass
class Track:
    id: int
    mask: Tensor  # [H, W] bool, where it was last seen
    look: Tensor  # [C], a running mean
    unseen: int = 0  # frames


@dataclass
class Tracker:
    """`step` takes the proposals of a frame and gives the id map of the tracks seen in it."""

    unmatched_cost: float | None = 0.75  # of a track that takes no proposal; None: it takes one if there is any
    appearance: float = 0.3  # its weight; the rest is that of the overlap with the last mask
    birth: float = 0.5  # the score from which a proposal that no track takes starts a track
    patience: int = 20  # frames that a track may be unseen

    def __post_init__(self) -> None:
        self.tracks: list[Track] = []
        self.started = self.last = 0  # how many tracks, and the id of the last

    def step(self, seen: Seen) -> np.ndarray:
        choice = self.decide(seen)
        for track, number in zip(self.tracks, choice):
            track.unseen += 1
            if number >= 0:
                track.mask, track.unseen = seen.masks[number], 0
                track.look = F.normalize(0.9 * track.look + 0.1 * seen.looks[number], dim=0)
        taken = seen.masks[[number for number in choice if number >= 0]].any(0)  # [H, W]
        for number, (score, mask, appearance) in enumerate(zip(seen.scores, seen.masks, seen.looks)):
            new = number not in choice and score >= self.birth
            if new and (mask & taken).sum() < 0.5 * mask.sum():  # else a part of what is known, or a group
                live = {track.id for track in self.tracks}
                following = (id for id in (*range(self.last + 1, 255), *range(1, self.last + 1)) if id not in live)
                if (free := next(following, None)) is None:  # an id map holds 254
                    break
                self.started, self.last = self.started + 1, free
                self.tracks.append(Track(free, mask, appearance))
                taken = taken | mask
        self.tracks = [track for track in self.tracks if track.unseen <= self.patience]
        now = sorted((track for track in self.tracks if track.unseen == 0), key=lambda track: int(track.mask.sum()))
        masks = torch.stack([track.mask for track in now]) if now else seen.masks.new_zeros(0, *seen.masks.shape[1:])
        return masks_to_ids(masks, [track.id for track in now]).numpy()  # a smaller mask lies on a larger one

    def decide(self, seen: Seen) -> list[int]:
        """The proposal of each track, or -1."""
        if not self.tracks:
            return []
        cosine = torch.stack([track.look for track in self.tracks]) @ seen.looks.T  # [N, M]
        iou = dmm_fast.mask_iou(torch.stack([track.mask for track in self.tracks]), seen.masks)
        cost = 1 - self.appearance * cosine - (1 - self.appearance) * iou
        return dmm_fast.linear_assignment(cost, unmatched_cost=self.unmatched_cost).tolist()


def score(truth: list[np.ndarray], found: list[np.ndarray]) -> dict[str, float]:
    """An object is covered by the track that has a mask IoU above 0.5 with it. A switch: it is covered by another one than last."""
    last: dict[int, int] = {}
    together = torch.zeros(256, 256)  # frames in which an object is covered by a track
    switches, entries, ious = 0, 0, []
    for true, ids in zip(truth, found):
        (objects, masks), (tracks, tracked) = ids_to_masks(true), ids_to_masks(ids)
        entries += len(objects) + len(tracks)
        iou = dmm_fast.mask_iou(torch.from_numpy(masks), torch.from_numpy(tracked))
        for row, column in (iou > 0.5).nonzero().tolist():  # masks of an id map are disjoint: one at most in a row or column
            switches += last.get(objects[row], tracks[column]) != tracks[column]
            last[objects[row]] = tracks[column]
            together[objects[row], tracks[column]] += 1
            ious.append(float(iou[row, column]))
    own = dmm_fast.linear_assignment(-together)  # one track for each object and video, as IDF1 wants
    covered = len(ious) / max(sum(len(ids_to_masks(true)[0]) for true in truth), 1)
    idf1 = float(2 * together.gather(1, own[:, None]).sum() / max(entries, 1))
    return {"switches": switches, "covered": covered, "mean IoU": float(np.mean(ious or [0])), "IDF1": idf1}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path)
    parser.add_argument("proposals", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gt", type=Path)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    tracker, seen, found = Tracker(), {}, []
    for stem, seen[stem] in look(open_frames(options.frames), read_coco(options.proposals)):
        found.append(tracker.step(seen[stem]))
        write_mask(options.out / f"{stem}.png", found[-1])
    print(f"{len(found)} frames, {tracker.started} tracks: {options.out}")
    if options.gt:
        truth = [read_mask(options.gt / f"{stem}.png", ids.shape) for stem, ids in zip(seen, found)]
        forced, overlap = Tracker(unmatched_cost=None), Tracker(unmatched_cost=0.9, appearance=0)
        for name, other in (("this tracker", None), ("matches forced", forced), ("overlap alone", overlap)):
            figures = score(truth, [other.step(each) for each in seen.values()] if other else found)
            print(f"{name:14}", ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()

"""Whole videos, segmented with the weights so far and scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmm_fast.data.annotated import Video
from dmm_fast.data.datasets import VideoDataset
from dmm_fast.evaluation import ABSENT, score_ids
from dmm_fast.inference.overlay import overlay
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.training.config import ConfigError, TrainConfig
from dmm_fast.training.team import Team


@torch.no_grad()
def validate(weights: Path, config: TrainConfig, videos: VideoDataset, team: Team) -> dict[str, Any]:
    """Segment whole videos with a file of weights, as `Segmenter` does: J and F of every object, and pictures.

    As DAVIS scores: an object counts after the frame in which it is given, and the last frame does not count.
    """
    segmenter = Segmenter(config.model, weights=weights, device=team.device)
    rows, pictures = [], {}
    for name in videos.names[team.rank :: team.size]:
        video = videos.video(name)
        scores: dict[int, list[tuple[float, float]]] = {}
        frames = list(follow(segmenter, video, config.data.val_stride))
        for number, (frame, ids, truth, given) in enumerate(frames):
            if truth is not None:
                found = score_ids(ids, truth)
                for i in given:
                    scores.setdefault(i, []).append(found.get(i, ABSENT)[:2])
            if number == len(frames) // 2:
                pictures[name] = overlay(frame, ids)
        rows += [(f"{name}/{i}", *np.mean(values, 0).tolist()) for i, values in scores.items()]
    rows, pictures = team.gather(rows), dict(team.gather(list(pictures.items())))
    if not rows:
        raise ConfigError("train: validation: no frame to score; data.val_stride skips them all")
    return {"objects": {name: (j, f) for name, j, f in sorted(rows)}, "pictures": pictures}


def follow(segmenter: Segmenter, video: Video, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray, Any, list[int]]]:
    """(frame, its ids, its true ids or None, the objects given before it) of every frame after the first, but the last."""
    known: list[int] = []
    for index in range(0, len(video) - 1, stride):
        frame, truth = video.frame(index), video.ids(index)
        if known:
            yield frame, segmenter.step(frame, video.proposals(index)).ids, truth, list(known)
        new = [] if truth is None else [i for i in np.unique(truth).tolist() if i and i not in known]
        if new:
            masks = {i: truth == i for i in new}
            if known:
                segmenter.add(masks)
            else:
                segmenter.start(frame, masks)
            known += new

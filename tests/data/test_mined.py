"""Tracks mined from proposals: real objects that nobody annotated, and no others."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from dmm_fast.model import Proposals
from PIL import Image

from dmm_fast.data.clips import ClipDataset
from dmm_fast.data.datasets import open_dataset
from dmm_fast.data.masks import write_mask
from dmm_fast.data.mined import LENGTH, mine
from dmm_fast.data.paste import PasteClips
from dmm_fast.proposals.base import encode_runs
from dmm_fast.proposals.coco import write_coco

SIZE = (60, 100)
FRAMES = 30


def box(y, x, height=16, width=16):
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[max(y, 0) : y + height, max(x, 0) : x + width] = True
    return mask


def found(*items):
    """Proposals of (mask, score), best first, and masks as run-length codes."""
    items = sorted(items, key=lambda item: -item[1])
    masks = torch.stack([mask for mask, _ in items]) if items else torch.zeros(0, *SIZE, dtype=torch.bool)
    return Proposals(torch.zeros(len(items), 4), torch.tensor([score for _, score in items]), encode_runs(masks))


def truth(mask=None):
    return np.zeros(SIZE, np.uint8) if mask is None else mask.numpy().astype(np.uint8)


def test_two_that_pass_each_other_keep_their_identities():
    """One goes right, one left, a row apart, so that they only touch; which comes first in a frame's list changes all the time."""
    right = [box(8, 2 + 2 * t) for t in range(FRAMES)]
    left = [box(26, 70 - 2 * t) for t in range(FRAMES)]
    frames = [found((a, 0.9 - 0.1 * (t % 2)), (b, 0.85)) for t, (a, b) in enumerate(zip(right, left))]
    tracks = mine(frames, itertools.repeat(truth(), FRAMES), SIZE, 0.9)
    assert [(track.first, len(track.links)) for track in tracks] == [(0, FRAMES)] * 2
    expected = [tuple(t % 2 for t in range(FRAMES)), tuple(1 - t % 2 for t in range(FRAMES))]
    assert {track.links for track in tracks} == set(expected)
    assert tracks[0].covers([3, FRAMES - 1]) and not tracks[0].covers([3, FRAMES])


def test_a_track_ends_where_another_covers_it_and_takes_nothing_over():
    front = [(box(20, 2 + 2 * t), 0.9) for t in range(FRAMES)]
    behind = [(box(20, 62 - 2 * t), 0.6) for t in range(FRAMES)]
    tracks = mine([found(*pair) for pair in zip(front, behind)], [None] * FRAMES, SIZE, 0.9)
    assert tracks[0].first == 0 and tracks[0].links == (0,) * FRAMES  # the one that scores best, throughout
    parts = [(track.first, track.first + len(track.links)) for track in tracks[1:]]
    assert all(set(track.links) == {1} and len(track.links) >= LENGTH for track in tracks[1:])
    meeting = [t for t in range(FRAMES) if abs(60 - 4 * t) < 12]
    assert len(parts) == 2 and not any(first <= t < end for first, end in parts for t in meeting)


def test_what_is_no_track():
    lasting = [(box(4, 4), 0.9)] * FRAMES
    short = [(box(4, 60), 0.9) if t < LENGTH - 1 else None for t in range(FRAMES)]
    annotated = [(box(34, 10), 0.9)] * FRAMES  # the truth is a larger box around it
    faint = [(box(34, 60), 0.2)] * FRAMES
    jumping = [(box(36, 40 if t % 2 else 80), 0.9) for t in range(FRAMES)]
    frames = [found(*filter(None, items)) for items in zip(lasting, short, annotated, faint, jumping)]
    ids = truth(box(30, 6, 24, 24))
    tracks = mine(frames, [ids] * FRAMES, SIZE, 0.9)
    assert len(tracks) == 1 and tracks[0].covers(range(FRAMES))
    assert tracks[0].score == pytest.approx(0.9)
    assert len(mine(frames, [None] * FRAMES, SIZE, 0.9)) == 2  # without truth that object is as good as any
    assert mine([found()] * FRAMES, [None] * FRAMES, SIZE, 0.0) == []


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """One annotated square, and another that is not, found in frames 5 .. 24."""
    root = tmp_path_factory.mktemp("mined")
    for part in ("JPEGImages/a", "Annotations/a", "proposals"):
        (root / part).mkdir(parents=True)
    proposals = {}
    for t in range(FRAMES):
        one, other = box(4, 2 + 2 * t), box(34, 70 - 2 * t)
        frame = np.full((*SIZE, 3), 70, np.uint8)
        frame[one.numpy()], frame[other.numpy()] = (220, 30, 30), (30, 30, 220)
        Image.fromarray(frame).save(root / f"JPEGImages/a/{t:05d}.png")
        write_mask(root / f"Annotations/a/{t:05d}.png", truth(one))
        masks = torch.stack([one, other] if 5 <= t < 25 else [one])
        proposals[f"{t:05d}"] = Proposals(torch.zeros(len(masks), 4), torch.tensor([0.9, 0.8][: len(masks)]), masks)
    write_coco(root / "proposals/a.json", proposals, SIZE)
    return open_dataset(root, proposals=root / "proposals")


def test_clips_with_mined_objects(videos):
    clips = ClipDataset(videos, 4, skips=(1, 3), mined=1.0, length=20)
    best = []
    for clip in map(clips.__getitem__, range(20)):
        assert clip.masks.shape[:2] == (4, 2)  # such clips lie where the track does
        for frame, (one, other), given in zip(clip.frames, clip.masks, clip.proposals):
            assert torch.equal(one, frame[0] == 220) and torch.equal(other, frame[2] == 220)
            best.append(max(float((other & mask).sum() / (other | mask).sum()) for mask in given.masks))
    assert min(best) > 0.5 and np.mean(np.array(best) < 1) > 0.5  # what training sees is as imperfect as other proposals
    some = ClipDataset(videos, 4, skips=(1, 3), mined=0.5, length=40)
    counts = [some[index].masks.size(1) for index in range(40)]
    assert 8 < counts.count(2) < 32
    one = ClipDataset(videos, 4, mined=1.0, objects=1, length=3)
    assert one[0].masks.size(1) == 1


def test_mined_objects_can_be_pasted(videos):
    pasted = PasteClips(videos, 2, size=SIZE, pasted=(3, 3), mined=1.0, length=6)
    assert max(pasted[index].masks.size(1) for index in range(6)) >= 4


def test_mining_needs_proposals(videos):
    bare = open_dataset(videos.path)
    for dataset, share in ((bare, 0.5), (videos, 1.5), (videos, -0.1)):
        with pytest.raises(ValueError, match="mined is a share in \\[0, 1\\] of clips from videos with proposals, got"):
            ClipDataset(dataset, 2, mined=share)

"""Training clips: repeatable, exact where they are made, and as noisy as a detector where they are meant to be."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from dmm_fast.model.masks import mask_boxes
from PIL import Image
from torch.utils.data import DataLoader

import dmm_fast
from dmm_fast.data.alike import AlikeClips
from dmm_fast.data.annotated import DataError
from dmm_fast.data.augment import MIN_SHARE, Augment, Clip, areas, tight
from dmm_fast.data.clips import HARD, ClipDataset, Mixture, StillClips, SyntheticClips, noisy_proposals, overlooked
from dmm_fast.data.datasets import open_dataset
from dmm_fast.data.masks import write_mask
from dmm_fast.data.paste import Layer, PasteClips, composite
from dmm_fast.proposals.coco import write_coco

SIZE = (60, 100)
LENGTH = 12
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def scene(name, time, late=8):
    """Frame and ids: a square of the video's colour that moves a step of 4 per frame, and a bar that comes late."""
    frame, ids = np.full((*SIZE, 3), 70, np.uint8), np.zeros(SIZE, np.uint8)
    ids[20:40, 4 + 4 * time : 24 + 4 * time] = 1
    if time >= late:
        ids[48:56, 10:90] = 3
    frame[ids == 1], frame[ids == 3] = COLOURS[name], (200, 200, 200)
    frame[0, :, 0] = 5 * time  # says which frame it is
    return frame, ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    (root / "proposals").mkdir()
    for name in COLOURS:
        for part in ("JPEGImages", "Annotations"):
            (root / part / name).mkdir(parents=True)
        found = {}
        for time in range(LENGTH):
            frame, ids = scene(name, time)
            Image.fromarray(frame).save(root / "JPEGImages" / name / f"{time:05d}.png")
            write_mask(root / "Annotations" / name / f"{time:05d}.png", ids)
            masks = torch.from_numpy(np.stack([ids == 1, ids > 0, np.roll(ids == 1, 30, 1)]))
            found[f"{time:05d}"] = tight(masks, torch.tensor([0.9, 0.6, 0.3]))
        write_coco(root / "proposals" / f"{name}.json", found, SIZE)
    return root


@pytest.fixture
def videos(folder):
    return open_dataset(folder, proposals=folder / "proposals")


@pytest.fixture
def bare(folder):
    return open_dataset(folder)


@pytest.fixture(scope="module")
def stills(tmp_path_factory):
    root = tmp_path_factory.mktemp("stills")
    for part in ("JPEGImages", "Annotations"):
        (root / part).mkdir()
    for name in COLOURS:
        frame, ids = scene(name, 9)
        Image.fromarray(frame).save(root / "JPEGImages" / f"{name}.png")
        write_mask(root / "Annotations" / f"{name}.png", ids)
    return open_dataset(root)


def same(one: Clip, other: Clip) -> bool:
    parts = zip(itertools.chain(*one.proposals), itertools.chain(*other.proposals))
    return one.name == other.name and torch.equal(one.frames, other.frames) and torch.equal(one.masks, other.masks) \
        and all(torch.equal(a, b) for a, b in parts)  # fmt: skip


def check(clip: Clip, length: int, size=SIZE) -> None:
    """What every clip keeps to."""
    count = clip.masks.size(1)
    assert clip.frames.shape == (length, 3, *size) and clip.frames.dtype == torch.uint8 and clip.frames.is_contiguous()
    assert clip.masks.shape == (length, count, *size) and clip.masks.dtype == torch.bool and count >= 1
    assert (areas(clip.masks[0]) >= MIN_SHARE * size[0] * size[1]).all()
    assert clip.masks.sum(1).max() <= 1  # a pixel belongs to one object
    assert len(clip.proposals) == length
    for found in clip.proposals:
        assert found.masks.shape[1:] == size and found.masks.dtype == torch.bool and found.masks.is_contiguous()
        assert (found.boxes == mask_boxes(found.masks)).all() and (found.scores.diff() <= 0).all()
        assert found.masks.flatten(1).any(1).all()


def overlaps(masks, others):
    """IoU [N, M]."""
    a, b = masks.flatten(1).float(), others.flatten(1).float()
    both = a @ b.T
    return both / (a.sum(1)[:, None] + b.sum(1) - both).clamp(min=1)


# -------------------------------------------------------------------------------------------------------- clips of video


def test_clips_are_frames_of_one_video(videos):
    dataset = ClipDataset(videos, 3, skips=(1, 4), length=60)
    gaps, starts = set(), set()
    for index in range(60):
        clip = dataset[index]
        check(clip, 3)
        assert clip.name == videos.names[index % 3]
        times = [int(frame[0, 0, 0]) // 5 for frame in clip.frames]
        for time, frame, masks, found in zip(times, clip.frames, clip.masks, clip.proposals):
            image, ids = scene(clip.name, time)
            assert (frame.permute(1, 2, 0).numpy() == image).all() and (masks[0].numpy() == (ids == 1)).all()
            assert torch.equal(found.masks[0], masks[0]) and found.scores[0] == pytest.approx(0.9)
        # An object that is not in the first frame is none of the clip's.
        assert clip.masks.size(1) == (2 if times[0] >= 8 else 1)
        starts.add(times[0])
        gaps |= {b - a for a, b in itertools.pairwise(times)}
    assert gaps == {1, 2, 3, 4, -1, -2, -3, -4} and len(starts) == LENGTH


def test_a_clip_depends_on_seed_epoch_and_index_alone(videos):
    dataset = ClipDataset(videos, 2, augment=Augment(), length=6, seed=3)
    clips = [dataset[index] for index in range(6)]
    again = ClipDataset(videos.subset(videos.names), 2, augment=Augment(), length=6, seed=3)
    assert all(same(again[index], clips[index]) for index in (5, 0, 3))
    assert not same(ClipDataset(videos, 2, augment=Augment(), length=6, seed=4)[0], clips[0])
    dataset.set_epoch(1)
    assert dataset.epoch == 1 and not same(dataset[0], clips[0])
    dataset.set_epoch(0)
    assert same(dataset[0], clips[0])
    with pytest.raises(IndexError, match="clip 6 of 6"):
        dataset[6]


def test_workers_give_the_same_clips_and_hear_of_the_epoch(videos):
    dataset = Mixture([(ClipDataset(videos, 2, augment=Augment()), 1), (PasteClips(videos, 2, size=SIZE), 1)], 5)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        expected = [dataset[index] for index in range(5)]
        for clip, other in zip(loader, expected):
            assert same(Clip(*clip), other)


def test_what_cannot_be_cut(videos, stills):
    with pytest.raises(DataError, match="red: 12 frames in which every object is annotated, a clip needs 13"):
        ClipDataset(videos.subset(["red"]), 13)[0]
    assert len(ClipDataset(videos, 12, skips=(3, 5))[0].frames) == 12  # gaps shrink where a video is short
    with pytest.raises(DataError, match="blue: 1 frames"):
        ClipDataset(stills, 2)[0]
    sparse = videos.subset(["red"])
    sparse.video("red").dense = False
    with pytest.raises(DataError, match="red: 0 frames in which every object"):
        ClipDataset(sparse, 2)[0]
    with pytest.raises(ValueError, match="skips 1 <= least <= most"):
        ClipDataset(videos, 2, skips=(0, 3))
    with pytest.raises(ValueError, match="at least one clip"):
        ClipDataset(videos, 2, length=-1)


def test_a_video_without_objects(tmp_path):
    for part in ("JPEGImages/a", "Annotations/a"):
        (tmp_path / part).mkdir(parents=True)
    for time in range(3):
        Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / f"JPEGImages/a/{time}.png")
        write_mask(tmp_path / f"Annotations/a/{time}.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DataError, match="a: no frame shows an object of 0.1% of its pixels"):
        ClipDataset(open_dataset(tmp_path), 2)[0]


def test_an_object_at_one_end_only(tmp_path):
    """A clip that begins where nothing is goes the other way."""
    for part in ("JPEGImages", "Annotations"):
        (tmp_path / part / "red").mkdir(parents=True)
    for time in range(3):
        frame, ids = scene("red", time)
        Image.fromarray(frame).save(tmp_path / f"JPEGImages/red/{time:05d}.png")
        write_mask(tmp_path / f"Annotations/red/{time:05d}.png", ids * (time == 0))
    clips = ClipDataset(open_dataset(tmp_path), 3, skips=(1, 1), length=20)
    assert all(clips[index].masks[0].any() and not clips[index].masks[1].any() for index in range(20))
    with pytest.raises(DataError, match="red: no frame shows an object"):
        ClipDataset(open_dataset(tmp_path), 3, skips=(1, 1), reverse=1.0)[0]


def test_objects_and_proposals_are_limited(videos):
    late = ClipDataset(videos, 1, objects=1, top=2, length=40)
    clips = [late[index] for index in range(40)]
    assert {clip.masks.size(1) for clip in clips} == {1} and {len(clip.proposals[0].scores) for clip in clips} == {2}
    chosen = [clip for clip in clips if int(clip.frames[0, 0, 0, 0]) // 5 >= 8]
    assert len({tuple(tight(clip.masks[0], torch.ones(1)).boxes[0, 1:2].tolist()) for clip in chosen}) == 2  # either object


def test_proposals_are_simulated_where_there_are_none(bare, videos):
    clip = ClipDataset(bare, 2, augment=Augment((30, 50)), length=8)[1]
    check(clip, 2, (30, 50))
    half = ClipDataset(videos, 1, noisy=0.5, length=60)
    exact = sum(torch.equal(half[index].proposals[0].masks[:1], half[index].masks[0][:1]) for index in range(60))
    assert 15 < exact < 45


# --------------------------------------------------------------------------------------------------------- noisy masks


def shapes(size=(120, 200)):
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    disc = (y - 40) ** 2 + (x - 50) ** 2 < 900
    bar = (y > 60) & (y < 110) & (x > 120) & (x < 150)
    return torch.stack([disc, bar])


def test_objects_that_a_detector_overlooks():
    """Some of a clip's objects are hardly ever found, in any way; the others are."""
    chances = overlooked(2000, np.random.default_rng(0))
    assert 0.15 < (chances >= HARD).mean() < 0.25 and set(chances[chances < HARD]) == {0.08}
    masks = shapes()
    for seed in range(20):
        found = noisy_proposals(masks, np.random.default_rng(seed), miss=[1.0, 0.0], merge=0, clutter=0)
        iou = dmm_fast.mask_iou(masks, found.masks)
        assert not iou[0].any() and iou[1].amax() > 0.3


def test_noisy_proposals_are_what_a_detector_might_give():
    masks = shapes()
    best, missed, extra, parts, merged = [], 0, [], 0, 0
    for seed in range(100):
        found = noisy_proposals(masks, np.random.default_rng(seed))
        assert (found.boxes == mask_boxes(found.masks)).all() and (found.scores.diff() <= 0).all()
        assert found.masks.shape[1:] == (120, 200) and found.scores.min() > 0 and found.scores.max() < 1
        iou = overlaps(masks, found.masks)
        best += iou.amax(1).tolist()
        missed += int((iou.amax(1) < 0.6).sum())
        extra.append(int((iou.amax(0) < 0.2).sum()))
        inside = (masks[:, None] & found.masks).flatten(2).sum(2) / areas(found.masks)
        parts += bool(((inside.amax(0) > 0.9) & (iou.amax(0) < 0.75)).any())
        merged += bool((overlaps(masks.any(0, keepdim=True), found.masks) > 0.75).any())
    best = torch.tensor(best)
    assert 0.8 < best.median() < 0.99 and (best == 1).sum() == 0  # good, and never exact
    assert 0 < missed < 40 and 3 < np.mean(extra) < 9 and parts > 30 and merged > 15


def test_noise_grows_and_vanishes():
    masks = shapes()
    means = []
    for noise in (0.1, 0.6, 1.5):
        draws = [noisy_proposals(masks, np.random.default_rng(seed), miss=0, noise=noise) for seed in range(30)]
        means.append(torch.stack([overlaps(masks, found.masks).amax(1) for found in draws]).mean())
    assert means[0] > means[1] > means[2] and means[0] > 0.95


def test_noise_of_nothing_of_specks_and_on_the_edge():
    empty = torch.zeros(2, 60, 100, dtype=torch.bool)
    for masks in (empty, empty[:0]):
        found = noisy_proposals(masks, np.random.default_rng(0), clutter=0)
        assert found.masks.shape == (0, 60, 100) and found.boxes.shape == (0, 4) and found.scores.shape == (0,)
    assert len(noisy_proposals(empty[:0], np.random.default_rng(0)).scores) > 0  # clutter
    edge = empty.clone()
    edge[0, :5, :4] = True
    edge[1, 30:, 90:] = True
    for seed in range(20):
        found = noisy_proposals(edge, np.random.default_rng(seed), top=3)
        assert len(found.scores) <= 3 and torch.isfinite(found.boxes).all()


def test_noise_is_repeatable():
    one, other = (noisy_proposals(shapes(), np.random.default_rng(1)) for _ in range(2))
    assert all(map(torch.equal, one, other))


# ------------------------------------------------------------------------------------------- stills, ponds and mixtures


def test_stills_move(stills):
    dataset = StillClips(stills, 3, length=12)
    overlap = []
    for index in range(12):
        clip = dataset[index]
        check(clip, 3)
        overlap.append(overlaps(clip.masks[0], clip.masks[2]).diagonal())
    overlap = torch.cat(overlap)
    assert (overlap < 1).all() and 0.2 < overlap.median() < 0.97
    assert (StillClips(stills, 2, motion=0, augment=Augment(blur=0))[0].frames.diff(dim=0) == 0).all()


@pytest.fixture
def portraits(tmp_path):
    """Upright pictures whose object lies at the upper edge, where a view of a wide shape from the middle does not come."""
    for part in ("JPEGImages", "Annotations"):
        (tmp_path / part).mkdir()
    for number in range(2):
        ids = np.zeros((200, 120), np.uint8)
        ids[2:14, 10 + 40 * number : 40 + 40 * number] = 1
        Image.fromarray(np.repeat(ids[..., None] * 200, 3, 2)).save(tmp_path / f"JPEGImages/{number}.png")
        write_mask(tmp_path / f"Annotations/{number}.png", ids)
    return open_dataset(tmp_path, "stills")


@pytest.mark.parametrize("kind", [StillClips, PasteClips, AlikeClips])
def test_no_clip_loses_its_objects(portraits, kind):
    clips = kind(portraits, 3, size=SIZE, length=30)
    for index in range(30):
        clip = clips[index]
        assert clip.masks.size(1) and (areas(clip.masks[0]) >= MIN_SHARE * clip.masks[0, 0].numel()).all()


def test_what_is_too_thin_for_the_size(tmp_path):
    for part in ("JPEGImages", "Annotations"):
        (tmp_path / part).mkdir()
    ids = np.zeros((400, 800), np.uint8)
    ids[37, :] = 1
    Image.fromarray(np.repeat(ids[..., None] * 200, 3, 2)).save(tmp_path / "JPEGImages/line.png")
    write_mask(tmp_path / "Annotations/line.png", ids)
    with pytest.raises(DataError, match="line: no object is left in its first frame, nor in 19 other clips"):
        StillClips(open_dataset(tmp_path, "stills"), 2, size=(50, 100))[0]


def test_proposals_are_aligned_with_the_frames(folder, tmp_path):
    """Image ids that count from 1 are read as `segment` reads them; those of another video are refused."""
    from dmm_fast.proposals.base import ProposalError, ProposalWarning

    shutil.copytree(folder / "proposals", tmp_path / "proposals")
    file = tmp_path / "proposals/red.json"
    entries = json.loads(file.read_text())
    given = open_dataset(folder, proposals=folder / "proposals").video("red").proposals(5)
    file.write_text(json.dumps([entry | {"image_id": int(entry["image_id"]) + 1} for entry in entries]))
    with pytest.warns(ProposalWarning, match="red.json: image ids do not count as the frames do; -1 is added to each"):
        moved = open_dataset(folder, proposals=tmp_path / "proposals").video("red").proposals(5)
    assert (moved.masks == given.masks).all() and (moved.scores == given.scores).all()
    file.write_text(json.dumps([entry | {"image_id": f"red/{entry['image_id']}"} for entry in entries]))
    with pytest.raises(ProposalError, match="no proposals for these frames"):
        open_dataset(folder, proposals=tmp_path / "proposals").video("red").proposals(5)
    file.write_text(json.dumps([entry | {"image_id": int(entry["image_id"]) + 4} for entry in entries]))  # some meet a frame
    moved = open_dataset(folder, proposals=tmp_path / "proposals").video("red")
    assert (moved.proposals(9).masks == given.masks).all() and not len(moved.proposals(0).scores)
    file.write_text("[]")
    assert len(open_dataset(folder, proposals=tmp_path / "proposals").video("red").proposals(5).scores) == 0


def test_ponds():
    dataset = SyntheticClips(8, 3, size=SIZE, objects=(2, 3), scenes=2, strangers=0)
    clips = [dataset[index] for index in range(8)]
    for clip in clips:
        check(clip, 3)
    assert len({clip.name for clip in clips}) == 2 and same(dataset[5], clips[5])
    dataset.set_epoch(1)
    assert dataset[0].name not in {clip.name for clip in clips}


def test_mixture(videos, stills):
    mixture = Mixture([(ClipDataset(videos, 2), 3), (StillClips(stills, 2), 1), (ClipDataset(videos, 1), 0)], 80, seed=1)
    clips = [mixture[index] for index in range(80)]
    still = sum((clip.frames[0] != clip.frames[1]).float().mean() > 0.3 for clip in clips)  # colours drift in these
    assert {len(clip.frames) for clip in clips} == {2} and 8 < still < 34
    mixture.set_epoch(4)
    assert [source.epoch for source in mixture.sources] == [4, 4, 4] and not same(mixture[0], clips[0])
    for weights in ((-1.0, 2.0), (0.0, 0.0)):
        with pytest.raises(ValueError, match="weights >= 0 that are not all 0"):
            Mixture([(mixture.sources[0], weights[0]), (mixture.sources[1], weights[1])], 3)


# -------------------------------------------------------------------------------------------------------------- pasting


def layer(box, colour, length=2):
    y0, x0, y1, x1 = box
    out = torch.ones(length, 4, y1 - y0 + 3, x1 - x0 + 3)
    out[:, :3] = torch.tensor(colour).float()[:, None, None]
    out[:, 3, -3:] = out[:, 3, :, -3:] = 0
    return Layer((slice(y0, y1 + 3), slice(x0, x1 + 3)), out)


def test_composite_knows_who_is_in_front():
    own = torch.zeros(2, 1, *SIZE, dtype=torch.bool)
    own[:, :, 10:50, 10:50] = True
    frames = torch.full((2, 3, *SIZE), 70, dtype=torch.uint8)
    ground = Clip(frames, own, [tight(own[0], torch.tensor([0.8]))] * 2, "ground")
    layers = [layer((20, 30, 40, 70), COLOURS["red"]), layer((30, 40, 55, 90), COLOURS["blue"])]
    behind = 0
    for seed in range(40):
        clip = composite(ground, layers, np.random.default_rng(seed))
        check(clip, 2)
        assert clip.masks.shape[1] == 3 and ground.frames.max() == 70  # the clip it was given is as it was
        mine, red, blue = clip.masks[0]
        colours = clip.frames[0]
        assert (red == (colours == torch.tensor(COLOURS["red"])[:, None, None]).all(0)).all()
        assert (blue == (colours == torch.tensor(COLOURS["blue"])[:, None, None]).all(0)).all()
        assert blue[50, 80] and (red | blue)[35, 60] and not red[35, 60]  # the later layer hides the earlier
        assert (mine == own[0, 0] & ~red & ~blue).all()
        behind += bool(mine[25, 35])
        kept = overlaps(mine[None], clip.proposals[0].masks).amax()
        assert kept == 1  # the ground's proposal lost what is hidden, and no more
    assert 4 < behind < 36


def test_pasted_objects_are_where_their_masks_say(videos):
    """Each video has a colour of its own, so a pasted object is known by it."""
    dataset = PasteClips(videos, 3, size=SIZE, pasted=(2, 3), same=0, augment=Augment.none(SIZE), length=24)
    several = 0
    for index in range(24):
        clip = dataset[index]
        check(clip, 3)
        several += clip.masks.size(1) >= 3
        for frame, masks in zip(clip.frames, clip.masks):
            for mask in masks[areas(masks) > 60]:
                pixels = frame[:, mask].float()  # [3, P]
                middle = pixels.median(1).values
                assert middle.max() > 150  # an object's colour, never the ground's
                assert ((pixels - middle[:, None]).abs().amax(0) < 60).float().mean() > 0.8  # and little else
    assert several > 12


def test_pasted_objects_move_and_have_proposals(videos):
    dataset = PasteClips(videos, 2, size=SIZE, augment=Augment.none(SIZE), length=30, seed=2)
    best = []
    for clip in map(dataset.__getitem__, range(30)):
        for masks, found in zip(clip.masks, clip.proposals):
            large = masks[areas(masks) > 100]
            best += overlaps(large, found.masks).amax(1).tolist()
    assert np.median(best) > 0.75 and np.mean(np.array(best) > 0.5) > 0.8


def test_pasted_objects_may_be_missed_in_most_frames(videos):
    """`unfound`: with a chance of 1 far fewer of the pasted objects are found in a frame, with 0 nearly all."""
    shares = []
    for unfound in (0.0, 1.0):
        dataset = PasteClips(videos, 2, size=SIZE, unfound=unfound, augment=Augment.none(SIZE), length=20, seed=2)
        best = []
        for clip in map(dataset.__getitem__, range(20)):
            for masks, found in zip(clip.masks[:, 1:], clip.proposals):
                best += overlaps(masks[areas(masks) > 100], found.masks).amax(1).tolist()
        shares.append(np.mean(np.array(best) > 0.5))
    assert shares[0] > 0.9 and shares[1] < 0.6
    with pytest.raises(ValueError, match="unfound is a chance, from 0 to 1"):
        PasteClips(videos, 2, unfound=1.5)


def test_stills_take_part_in_pasting(stills, videos):
    for dataset in (PasteClips(stills, 2, size=SIZE), PasteClips(videos, 2, size=SIZE, donors=stills),
                    PasteClips(stills, 2, size=SIZE, donors=videos)):  # fmt: skip
        check(dataset[1], 2)
    with pytest.raises(ValueError, match="pasted and scale must be ranges above 0"):
        PasteClips(videos, 2, scale=(1.5, 0.5))


# ------------------------------------------------------------------------------------------------------------ real data


def test_real_clips(data):
    place = data / "davis16-train"
    videos = open_dataset(place, proposals=place / "proposals", names=["bear", "tennis", "bus"])
    size = (240, 427)
    for source in (ClipDataset(videos, 3, augment=Augment(size)), PasteClips(videos, 3),
                   StillClips(open_dataset(data / "stills"), 3, size=size)):  # fmt: skip
        for index in range(3):
            check(source[index], 3, size)

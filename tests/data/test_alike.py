"""Clips that are hard on identity: twins, crossings, full occlusions, exits, and things that are nobody's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from dmm_fast.model.masks import mask_boxes
from PIL import Image

from dmm_fast.data.alike import Actor, AlikeClips, _cutout, _paint, _recoloured, _twin
from dmm_fast.data.augment import MIN_SHARE, Augment, Clip, areas, tight
from dmm_fast.data.datasets import open_dataset
from dmm_fast.data.masks import write_mask
from dmm_fast.data.paste import Layer, composite
from dmm_fast.data.paths import covering, leaving, passing

SIZE = (72, 120)
LENGTH = 14
FRAMES = 6
COLOURS = {"red": (220, 40, 40), "green": (40, 220, 40), "blue": (40, 40, 220)}
STILL = {"twins": 0.0, "crossings": 0.0, "covers": 0.0, "exits": 0.0, "strangers": 0.0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """In each video a box of its colour, brighter at its left, walks to the right."""
    root = tmp_path_factory.mktemp("alike")
    noise = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for part in ("JPEGImages", "Annotations"):
            (root / part / name).mkdir(parents=True)
        for t in range(LENGTH):
            frame = noise.integers(60, 90, (*SIZE, 3)).astype(np.uint8)
            ids = np.zeros(SIZE, np.uint8)
            x = 20 + 3 * t
            ids[24:48, x : x + 16] = 1
            frame[24:48, x : x + 16] = colour
            frame[24:48, x : x + 5] = np.array(colour) // 2 + 110
            Image.fromarray(frame).save(root / "JPEGImages" / name / f"{t:05d}.png")
            write_mask(root / "Annotations" / name / f"{t:05d}.png", ids)
    return open_dataset(root)


def clips(videos, **settings):
    given = {"size": SIZE, "skips": (1, 2), "reverse": 0.0, "augment": Augment.none(SIZE), "length": 40} | STILL | settings
    return AlikeClips(videos, FRAMES, **given)


def same(one: Clip, other: Clip) -> bool:
    parts = zip(itertools.chain(*one.proposals), itertools.chain(*other.proposals))
    return (
        torch.equal(one.frames, other.frames)
        and torch.equal(one.masks, other.masks)
        and all(itertools.starmap(torch.equal, parts))
    )


def test_a_clip_depends_on_seed_epoch_and_index_alone(videos):
    dataset, again = (AlikeClips(part, FRAMES, size=SIZE, seed=3) for part in (videos, videos.subset(videos.names)))
    one = dataset[2]
    again[0]
    assert same(again[2], one)
    assert not same(AlikeClips(videos, FRAMES, size=SIZE, seed=4)[2], one)
    dataset.set_epoch(1)
    assert not same(dataset[2], one)


def test_what_every_clip_keeps_to(videos):
    dataset = AlikeClips(videos, FRAMES, size=SIZE, layers=(1, 4), covers=0.8, exits=0.4, length=12)
    hidden = several = 0
    for clip in map(dataset.__getitem__, range(12)):
        assert clip.frames.shape == (FRAMES, 3, *SIZE) and clip.frames.dtype == torch.uint8
        assert clip.masks.size(1) >= 1 and (areas(clip.masks[0]) >= MIN_SHARE * SIZE[0] * SIZE[1]).all()
        assert clip.masks.sum(1).max() <= 1 and len(clip.proposals) == FRAMES
        for found in clip.proposals:
            assert (found.boxes == mask_boxes(found.masks)).all() and (found.scores.diff() <= 0).all()
        hidden += bool((~clip.masks.flatten(2).any(2)).any())
        several += clip.masks.size(1) > 1
    assert hidden > 2 and several > 5


# ---------------------------------------------------------------------------------------------------------------- twins


def walker() -> Actor:
    """A box that moves, brighter at one end, in a clip with a few frames more."""
    frames, masks = torch.full((9, 3, *SIZE), 70, dtype=torch.uint8), torch.zeros(9, 1, *SIZE, dtype=torch.bool)
    for t in range(9):
        masks[t, 0, 20:40, 10 + 3 * t : 30 + 3 * t] = True
        frames[t, :, 20:40, 10 + 3 * t : 30 + 3 * t] = torch.tensor([200, 60, 60 + 10 * t])[:, None, None]
        frames[t, 1, 20:40, 10 + 3 * t : 16 + 3 * t] = 180
    return Actor(_cutout(Clip(frames, masks, [], ""), 0))


def painted(actor: Actor, x: float) -> torch.Tensor:
    """RGB and opacity of the actor at a place, [T, 4, h, w]."""
    actor.cutout, actor.places = actor.cutout.take(slice(FRAMES)), np.tile([x, 35.0], (FRAMES, 1))
    return _paint(actor, SIZE).pixels


def core(pixels: torch.Tensor) -> torch.Tensor:
    """RGB of what is opaque."""
    x0, y0, x1, y1 = mask_boxes(pixels[3:] > 0.99)[0].int().tolist()
    return pixels[:3, y0:y1, x0:x1]


def test_twins_are_alike():
    first = walker()
    kinds = set()
    for seed in range(80):
        twin = _twin(first, FRAMES, SIZE, np.random.default_rng(seed))
        one, other = painted(walker(), 40), painted(twin, 80)
        if twin.scale != first.scale:
            kinds.add("size")
            assert 0.7 < twin.scale < 1.4
            continue
        pairs = [(core(a), core(b.flip(2) if twin.mirrored else b)) for a, b in zip(one, other)]
        assert all(a.shape == b.shape and a.size(1) >= 16 and a.size(2) >= 16 for a, b in pairs)
        difference = torch.stack([(a - b).abs().amax() for a, b in pairs])
        if twin.cutout is first.cutout or torch.equal(twin.cutout.pixels[0], first.cutout.pixels[0]):
            kinds.add("mirrored" if twin.mirrored else "plain")
            assert difference.max() < 1  # of 255
        elif difference.max() <= 60:  # the walker's blue says which frame it is
            kinds.add("other time or colour")
        else:
            kinds.add("other colours")
    assert kinds == {"plain", "mirrored", "size", "other time or colour", "other colours"}


def test_recolouring_a_little_and_much():
    cutout = walker().cutout
    for strength, least, most in ((0.25, 0, 130), (1.0, 10, 255)):
        changes = []
        for seed in range(20):
            changed = _recoloured(cutout, np.random.default_rng(seed), strength)
            assert torch.equal(changed.mask, cutout.mask) and 0 <= changed.pixels.min() and changed.pixels.max() <= 255
            changes.append(float((changed.pixels - cutout.pixels).abs().amax()))
        assert least <= min(changes) and max(changes) <= most
    assert np.mean(changes) > 60


def test_a_twin_of_the_grounds_own_object(videos):
    for index in range(8):
        clip = clips(videos, twins=1.0, layers=(1, 1))[index]
        if clip.masks.size(1) < 2 or int(areas(clip.masks[0]).min()) < 150:
            continue
        sizes = areas(clip.masks[0]).double()
        assert clip.name.endswith("+1") and 0.3 < sizes[1] / sizes[0] < 2


def test_as_many_copies_as_asked_for(videos):
    dataset = clips(videos, twins=1.0, copies=4, layers=(4, 4))
    for index in range(4):
        rng = np.random.default_rng(index)
        first, *others = dataset._cast(dataset.grounds.draw(index, rng), rng)
        expected = 4 if first.given else 3
        assert len(others) == expected
        areas_of = [float(areas(actor.cutout.mask).max()) for actor in (first, *others)]
        assert max(areas_of) < 1.5 * min(areas_of)  # the same object, at other times


# ----------------------------------------------------------------------------------------------------------- who meets


def test_paths_that_pass():
    near = np.array([30.0, 24.0])
    for seed, length in itertools.product(range(30), (3, 6, 8)):
        way = passing(np.random.default_rng(seed), length, near)
        start, end = way[0], way[-1]
        assert start @ end < 0 and all((np.abs(place) > 0.8 * near).any() for place in (start, end))
        assert (np.abs(way) < 0.6 * near).all(1).any()  # they overlap in some frame


def test_twins_cross(videos):
    crossed = met = count = 0
    for clip in map(clips(videos, twins=1.0, crossings=1.0, layers=(2, 2), length=16).__getitem__, range(16)):
        if clip.masks.size(1) < 2:
            continue
        one, other = (clip.masks[:, -2], clip.masks[:, -1]) if clip.masks.size(1) > 2 else (clip.masks[:, 0], clip.masks[:, 1])
        if not (one[0].any() and one[-1].any() and other[0].any() and other[-1].any()):
            continue
        count += 1
        ahead = [float(mask_boxes(a[None])[0, [0, 2]].mean() - mask_boxes(b[None])[0, [0, 2]].mean())
                 for a, b in ((one[0], other[0]), (one[-1], other[-1]))]  # fmt: skip
        crossed += ahead[0] * ahead[1] < 0
        shown = torch.minimum(areas(one) / areas(one)[0], areas(other) / areas(other)[0])
        met += bool(shown[1:-1].min() < 0.6)  # one in front of the other
    assert count >= 5 and crossed >= 0.6 * count and met >= 0.6 * count


# -------------------------------------------------------------------------------------------- who is hidden, who leaves


def test_a_cover_covers_and_passes():
    reach = np.array([12.0, 20.0])
    spans = set()
    for seed, length in itertools.product(range(30), (3, 4, 6, 8)):
        way, size = covering(np.random.default_rng(seed), length, reach)
        covered = (np.abs(way) + reach <= size).all(1)
        hidden = np.flatnonzero(covered)
        assert len(hidden) and not covered[0] and not covered[-1] and len(hidden) == hidden[-1] - hidden[0] + 1
        for end in (0, -1):  # most of the object shows
            assert abs(way[end, 0]) - size[0] + reach[0] > 1.3 * reach[0]
        spans.add((length, len(hidden)))
    assert {(3, 1), (6, 1), (6, 2), (8, 3)} <= spans


def test_an_object_is_hidden_and_comes_back(videos):
    back = 0
    for clip in map(clips(videos, covers=1.0, layers=(1, 1), length=12).__getitem__, range(12)):
        there = clip.masks.flatten(2).any(2)  # [T, N]
        assert there[0].all()
        back += bool((~there[1:-1].all(0) & there[-1]).any())
    assert back >= 6


def test_paths_that_leave():
    reach = np.array([10.0, 12.0])
    returns = set()
    for seed, length in itertools.product(range(30), (3, 6, 8)):
        places = leaving(np.random.default_rng(seed), length, SIZE, reach)
        outside = (places[:, 0] < -reach[0]) | (places[:, 0] > SIZE[1] + reach[0])
        gone = np.flatnonzero(outside)
        assert len(gone) and not outside[0] and not outside[-1] and len(gone) == gone[-1] - gone[0] + 1
        assert 0 < places[0, 0] < SIZE[1] and 0 < places[-1, 0] < SIZE[1]
        returns.add(bool(places[0, 1] != places[-1, 1]))
    assert returns == {True}


# ------------------------------------------------------------------------------------------------------------- nobody's


def test_what_is_nobodys_is_in_no_mask():
    frames, own = torch.full((2, 3, *SIZE), 70, dtype=torch.uint8), torch.zeros(2, 1, *SIZE, dtype=torch.bool)
    own[:, :, 5:20, 5:25] = True
    ground = Clip(frames, own, [tight(mask, torch.tensor([0.9])) for mask in own], "ground")

    def block(x, **role):
        return Layer(
            (slice(30, 60), slice(x, x + 20)),
            torch.cat([torch.full((2, 3, 30, 20), 250.0), torch.ones(2, 1, 30, 20)], 1),
            **role,
        )

    layers = [block(10), block(45, wanted=False), block(80, wanted=False, proposed=False)]
    best = []
    for seed in range(20):
        clip = composite(ground, layers, np.random.default_rng(seed), behind=0)
        assert clip.masks.size(1) == 2 and (clip.frames[0, :, 45, [20, 55, 90]] == 250).all()
        assert clip.masks[0, 1, 45, 20] and not clip.masks[:, :, 30:60, 45:].any()
        shown = [torch.zeros(SIZE, dtype=torch.bool) for _ in layers]
        for mask, x in zip(shown, (10, 45, 80)):
            mask[30:60, x : x + 20] = True
        best.append(
            [max(float((mask & found).sum() / (mask | found).sum()) for found in clip.proposals[0].masks) for mask in shown]
        )
    object_, distractor, occluder = np.median(best, 0)
    assert object_ > 0.7 and distractor > 0.7 and occluder < 0.3


def test_strangers(videos):
    dataset = clips(videos, strangers=1.0, layers=(3, 3), length=5)
    counts = [dataset[index].masks.size(1) for index in range(5)]
    assert max(counts) <= 2  # the ground's object and the first that is pasted
    everyone = clips(videos, layers=(3, 3), length=5)
    assert max(everyone[index].masks.size(1) for index in range(5)) >= 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"twins": 1.5}, "alike: twins is a chance in \\[0, 1\\], got 1.5"), ({"covers": -1}, "alike: covers is a chance"),
     ({"frames": 2}, "3 frames or more, got frames=2"), ({"layers": (3, 1)}, "layers and scale must be ranges above 0, got \\(3, 1\\)"),
     ({"scale": (0, 1)}, "layers and scale"), ({"copies": -1}, "copies must be 0"), ({"skips": (0, 1)}, "skips 1 <= least <= most")],
)  # fmt: skip
def test_bad_settings(videos, settings, message):
    with pytest.raises(ValueError, match=message):
        AlikeClips(videos, **{"size": SIZE} | settings)


def test_real_clips(data):
    place = data / "davis16-train"
    videos = open_dataset(place, proposals=place / "proposals", names=["bear", "flamingo", "tennis"])
    dataset = AlikeClips(videos, 4, size=(120, 214), mined=1.0)
    for index in range(3):
        clip = dataset[index]
        assert clip.frames.shape == (4, 3, 120, 214) and clip.masks.sum(1).max() <= 1
    assert AlikeClips(open_dataset(data / "stills"), 3, size=(120, 214))[0].masks.size(1) >= 1

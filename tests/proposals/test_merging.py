"""Several sources of proposals together: their names, the merge, and runs with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dmm_fast.model import Proposals
from dmm_fast.model.masks import mask_boxes
from PIL import Image

from dmm_fast.commands.main import main
from dmm_fast.data.synthetic import Scene
from dmm_fast.ops.vision import mask_iou
from dmm_fast.proposals.base import ProposalError, as_runs, encode_runs, full_masks, merge, suppress
from dmm_fast.proposals.coco import read_coco, write_coco
from dmm_fast.proposals.sources import is_detector, open_proposer, renamed, sources, split

SIZE = (48, 80)


def rectangles(*corners: tuple[int, int, int, int], scores: list[float] | None = None, size=SIZE) -> Proposals:
    """x0, y0, x1, y1 of each."""
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, corners):
        mask[y0:y1, x0:x1] = True
    return Proposals(mask_boxes(masks), torch.tensor(scores or [1 - i / 100 for i in range(len(corners))]), masks)


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("p.json", "a,b.json", "c.yaml", "w,1.pkl"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "m,1").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "names, parts, files",
    [
        ("small", ["small"], []),
        ("p.json", ["p.json"], ["p.json"]),
        ("small,p.json", ["small", "p.json"], ["p.json"]),
        ("a,b.json", ["a,b.json"], ["a,b.json"]),
        ("p.json,a,b.json,small", ["p.json", "a,b.json", "small"], ["p.json", "a,b.json"]),
        ("small,torchvision,net.safetensors", ["small", "torchvision", "net.safetensors"], []),
        ("hf:m,1,small", ["hf:m,1", "small"], []),
        ("hf:facebook/sam2@main,x.json", ["hf:facebook/sam2@main", "x.json"], ["x.json"]),
        ("detectron2:c.yaml:w,1.pkl,small", ["detectron2:c.yaml:w,1.pkl", "small"], []),
        ("a,c.json", ["a", "c.json"], ["a", "c.json"]),
    ],
)
def test_names_in_a_list(folder, names, parts, files):
    assert sources(names) == parts and split(names)[1] == files
    assert is_detector(names) == (not files)
    full = renamed(names, lambda file: folder / file)
    assert split(full)[1] == [str(folder / file) for file in files] and split(full)[0] == split(names)[0]


def test_a_detector_alone_cannot_read_files(folder):
    with pytest.raises(ProposalError, match="a detector is small, .* got 'p.json'"):
        open_proposer("small,p.json")


# -------------------------------------------------------------------------------------------------------------- merging


def test_of_masks_that_are_the_same_the_best_is_kept():
    masks = rectangles((0, 0, 20, 20), (0, 0, 20, 19), (0, 0, 20, 10), (40, 0, 60, 20), scores=[0.2, 0.9, 0.3, 0.1])
    assert suppress(masks.masks, masks.scores).tolist() == [1, 2, 3]
    assert suppress(masks.masks, masks.scores, 2).tolist() == [1, 2]
    assert suppress(masks.masks, masks.scores, overlap=0.96).tolist() == [1, 2, 0, 3]
    assert suppress(masks.masks[:0], masks.scores[:0]).tolist() == []


def test_sources_meet_by_rank_and_keep_their_scores():
    """A source that is sure of everything does not push out one that is sure of nothing."""
    sure = rectangles(*((x, 0, x + 4, 4) for x in range(0, 40, 4)), scores=[0.99 - i / 1000 for i in range(10)])
    unsure = rectangles((0, 20, 30, 40), (0, 0, 4, 4), (40, 20, 70, 40), scores=[0.03, 0.02, 0.01])
    found = merge([sure, unsure], SIZE, top=4)
    boxes, scores, masks = full_masks(found, SIZE)
    assert scores.tolist() == pytest.approx([0.99, 0.989, 0.988, 0.03])
    assert boxes.tolist()[-1] == [0, 20, 30, 40] and torch.equal(masks[-1], unsure.masks[0])
    everything = merge([sure, unsure], SIZE, top=50)
    assert len(everything.scores) == 12, "the one that both have comes once"


def test_kinds_of_masks_meet_exactly():
    """Whole masks, run-length codes and soft masks inside boxes; and frames larger than the grid on which they are compared."""
    torch.manual_seed(0)
    for size in (SIZE, (1000, 700)):
        whole = rectangles((3, 5, 30, 40), (50, 7, 52, 9), size=size)
        soft = Proposals(torch.tensor([[10.0, 10, 60, 44]]), torch.tensor([0.7]), torch.rand(1, 28, 28))
        coded = Proposals(whole.boxes, whole.scores, encode_runs(whole.masks))
        boxes, scores, masks = full_masks(merge([whole, soft, coded], size), size)
        expected = torch.cat([whole.masks, full_masks(soft, size)[2]])
        assert len(masks) == 3 and mask_iou(masks, expected).amax(1).tolist() == [1, 1, 1]
        assert torch.equal(full_masks(as_runs(soft, size), size)[2], expected[2:])


def test_nothing_merged_is_nothing():
    nothing = Proposals(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 28, 28))
    for found in ([], [nothing], [nothing, nothing]):
        assert [len(part) for part in merge(found, SIZE)] == [0, 0, 0]
    one = rectangles((0, 0, 5, 5))
    assert torch.equal(full_masks(merge([nothing, one], SIZE), SIZE)[2], one.masks)


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Frames, first masks, and proposals of one of the two objects in each of two files."""
    folder = tmp_path_factory.mktemp("clip")
    scene = Scene(3, size=(96, 160), objects=2, strangers=0, length=(0.25, 0.35))
    (folder / "frames").mkdir()
    halves: list[dict] = [{}, {}]
    for index in range(4):
        frame, ids = scene.render(index)
        Image.fromarray(frame).save(folder / "frames" / f"{index:05d}.png")
        if index == 0:
            Image.fromarray(ids.astype(np.uint8)).save(folder / "first.png")
        for label, frames in enumerate(halves, 1):
            mask = torch.from_numpy(ids == label)[None]
            frames[f"{index:05d}"] = Proposals(mask_boxes(mask), torch.tensor([0.9 / label]), mask)
    for name, frames in zip("ab", halves):
        write_coco(folder / f"{name}.json", frames, (96, 160))
    return folder


def run(clip: Path, out: Path, proposals: str) -> dict:
    arguments = [
        "segment",
        str(clip / "frames"),
        "--masks",
        str(clip / "first.png"),
        "--out",
        str(out),
        "--preset",
        "iou",
        "--quiet",
    ]
    assert main([*arguments, "--proposals", proposals]) == 0
    return json.loads((out / "report.json").read_text())


def lost(report: dict) -> list[int]:
    return [row["lost"] for row in report["objects"].values()]


def test_a_run_with_two_files_follows_what_either_has(clip, tmp_path, capsys):
    assert max(lost(run(clip, tmp_path / "a", str(clip / "a.json")))) > 0
    both = f"{clip / 'a.json'},{clip / 'b.json'}"
    report = run(clip, tmp_path / "both", both)
    assert lost(report) == [0, 0] and report["settings"]["proposals"] == both
    arguments = [
        "segment",
        str(clip / "frames"),
        "--masks",
        str(clip / "first.png"),
        "--out",
        str(tmp_path / "both"),
        "--preset",
        "iou",
    ]
    assert main([*arguments, "--proposals", both, "--resume", "--quiet"]) == 0
    assert main([*arguments, "--proposals", f"{clip / 'a.json'},{clip / 'c.json'}", "--overwrite"]) == 2
    assert "c.json: no such proposals file" in capsys.readouterr().err


def test_a_detector_with_a_file_in_both_commands(clip, tmp_path):
    """Live and by way of a file, the same proposals."""
    names = f"small,{clip / 'a.json'}"
    live = run(clip, tmp_path / "live", names)
    assert main(["proposals", str(clip / "frames"), "--out", str(tmp_path / "p.json"), "--detector", names, "--quiet"]) == 0
    file = read_coco(tmp_path / "p.json").frame("00001", (96, 160))
    given = read_coco(clip / "a.json").frame("00001", (96, 160))
    small = full_masks(open_proposer("small")(np.array(Image.open(clip / "frames/00001.png"))), (96, 160))
    assert mask_iou(file.masks, given.masks).max() > 0.9 and len(file.scores) <= 50
    assert (mask_iou(small[2], file.masks).amax(1) > 0.85).float().mean() > 0.9
    assert lost(run(clip, tmp_path / "filed", str(tmp_path / "p.json"))) == lost(live)


def test_files_alone_can_be_merged_into_one(clip, tmp_path):
    both = f"{clip / 'a.json'},{clip / 'b.json'}"
    assert main(["proposals", str(clip / "frames"), "--out", str(tmp_path / "p.json"), "--detector", both, "--quiet"]) == 0
    assert [len(read_coco(tmp_path / "p.json").frame(f"{index:05d}", (96, 160)).scores) for index in range(4)] == [2, 2, 2, 2]


def test_why_a_run_with_several_sources_failed(clip, tmp_path):
    from dmm_fast.inference.explain import explain

    names = f"small,{clip / 'a.json'}"
    run(clip, tmp_path / "out", names)
    truth = tmp_path / "truth"
    truth.mkdir()
    scene = Scene(3, size=(96, 160), objects=2, strangers=0, length=(0.25, 0.35))
    for index in range(4):
        Image.fromarray(scene.render(index)[1].astype(np.uint8)).save(truth / f"{index:05d}.png")
    explanation = explain(tmp_path / "out", truth)
    assert explanation.proposals and len(explanation.tracks) == 2


def test_a_data_sets_folders_and_a_detector(clip, tmp_path):
    import shutil

    for name in "xy":
        shutil.copytree(clip / "frames", tmp_path / "set/JPEGImages" / name)
        (tmp_path / "set/Annotations" / name).mkdir(parents=True)
        shutil.copy(clip / "first.png", tmp_path / "set/Annotations" / name / "00000.png")
        (tmp_path / "given").mkdir(exist_ok=True)
        shutil.copy(clip / "a.json", tmp_path / f"given/{name}.json")
    arguments = ["segment", "--dataset", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--preset", "iou", "--quiet"]
    assert main([*arguments, "--proposals", f"small,{tmp_path / 'given'}"]) == 0
    for name in "xy":
        settings = json.loads((tmp_path / "out" / name / "report.json").read_text())["settings"]
        assert settings["proposals"] == f"small,{tmp_path / 'given' / name}.json"

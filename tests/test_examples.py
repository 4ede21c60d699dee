"""The examples in Python: imported by path, as the files that people copy."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dmm_fast.model import Proposals
from dmm_fast.model.masks import mask_boxes
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dmm_fast.data.masks import read_ids, write_mask
from dmm_fast.data.synthetic import Scene
from dmm_fast.data.video import open_frames
from dmm_fast.proposals.coco import read_coco, write_coco

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prediction():
    return load("set_prediction")


@pytest.fixture(scope="module")
def tracking():
    return load("track")


@pytest.fixture
def keypoints():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    yield load("keypoints")
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------- set_prediction


@pytest.mark.parametrize("batch, queries, most", [(4, 30, 12), (3, 5, 9), (2, 1, 1), (2, 7, 0)])
def test_the_pairs_are_those_of_scipy(prediction, batch, queries, most):
    matcher = prediction.HungarianMatcher()
    for _ in range(5):
        logits, boxes, targets = prediction.random_batch(batch, queries, most, classes=6)
        found, cost = matcher(logits, boxes, targets), matcher.cost(logits, boxes, targets)
        for (query, target), costs, wanted in zip(found, cost, targets):
            rows, columns = linear_sum_assignment(
                costs[: len(wanted["labels"])].T.numpy()
            )  # of queries and targets, as in DETR
            assert query.tolist() == rows.tolist() and target.tolist() == columns.tolist()
        usual = prediction.loop_over_scipy(matcher, logits, boxes, targets)
        assert all(torch.equal(a, b) for pairs in zip(found, usual) for a, b in zip(*pairs))


def test_generalized_iou_is_that_of_torchvision(prediction):
    ops = pytest.importorskip("torchvision.ops")
    a, b = torch.rand(9, 4) + 0.05, torch.rand(11, 4) + 0.05
    expected = ops.generalized_box_iou(*(ops.box_convert(boxes, "cxcywh", "xyxy") for boxes in (a, b)))
    torch.testing.assert_close(prediction.generalized_iou(a[:, None], b), expected)


def test_predictions_that_are_nan_still_have_pairs(prediction):
    logits, boxes, targets = prediction.random_batch(2, 9, 5, classes=3)
    (query, target), _ = prediction.HungarianMatcher()(torch.full_like(logits, torch.nan), boxes, targets)
    assert len(set(query.tolist())) == len(query) == len(targets[0]["labels"])
    assert all(q < 9 for q in query.tolist())


class ToTheDeviceOnly(TorchDispatchMode):
    """Raises where a fake tensor on the GPU is copied to the host; reading one raises by itself."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            assert not (args[0].is_cuda and result.device.type == "cpu"), "a copy to the host"
        return result


def test_nothing_is_copied_to_the_host(prediction):
    with FakeTensorMode(), ToTheDeviceOnly():
        logits, boxes = torch.empty(3, 20, 8, device="cuda"), torch.empty(3, 20, 4, device="cuda")
        targets = [
            {"labels": torch.empty(n, dtype=torch.int64, device="cuda"), "boxes": torch.empty(n, 4, device="cuda")}
            for n in (4, 0, 30)
        ]
        pairs = prediction.HungarianMatcher()(logits, boxes, targets)
        assert [len(query) for query, _ in pairs] == [4, 0, 20] and pairs[0][0].is_cuda
        with pytest.raises(AssertionError, match="to the host"):
            prediction.loop_over_scipy(prediction.HungarianMatcher(), logits, boxes, targets)


def test_the_toy_learns(prediction):
    losses, score = prediction.train(steps=60, batch=16)
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert 0 <= score <= 1


# ---------------------------------------------------------------------------------------------------------------- track


def write_clip(folder: Path, frames: list[np.ndarray], ids: list[np.ndarray], proposals: list) -> list[str]:
    """frames/, gt/ and proposals.json below `folder`; -> what `main` takes."""
    for name in ("frames", "gt"):
        (folder / name).mkdir()
    given = {}
    for time, (frame, labels, (masks, scores)) in enumerate(zip(frames, ids, proposals)):
        Image.fromarray(frame).save(folder / "frames" / f"{time:03}.png")
        write_mask(folder / "gt" / f"{time:03}.png", labels)
        stack = torch.from_numpy(masks)
        given[f"{time:03}"] = Proposals(mask_boxes(stack), torch.as_tensor(scores, dtype=torch.float32), stack)
    write_coco(folder / "proposals.json", given, ids[0].shape)
    words = (folder / "frames", folder / "proposals.json", "--out", folder / "out", "--gt", folder / "gt")
    return [str(word) for word in words]


def striped_and_plain(length: int = 24) -> tuple[list, list, list]:
    """A striped disc passes behind a plain one, is gone for nine frames, and returns on the other side; nothing else is proposed.

    Then a third, striped the other way, appears where the first vanished.
    """
    frames, ids, proposals = [], [], []
    y, x = np.mgrid[:96, :192]
    stripes = np.stack([((x // 4) % 2 * 200), (x // 4) % 2 * 160, 40 + 0 * x], -1)
    grating = np.stack([40 + 0 * x, (y // 3) % 2 * 120, (y // 3) % 2 * 220], -1)
    for time in range(length):
        frame, labels = np.full((96, 192, 3), 110, np.uint8), np.zeros((96, 192), np.uint8)
        discs = [(1, 20 + 6 * time, 44, stripes), (2, 150 - 3 * time, 52, np.full((96, 192, 3), (230, 60, 40)))]
        if 9 <= time < 18:
            discs = discs[1:]
        if time >= 10:
            discs.insert(0, (3, 76, 18, grating))
        for name, column, row, coat in discs:
            inside = (x - column) ** 2 + (y - row) ** 2 < 17**2
            frame[inside], labels[inside] = coat[inside], name
        frames.append(frame)
        ids.append(labels)
        visible = [labels == name for name in np.unique(labels)[1:] if (labels == name).sum() > 50]
        proposals.append((np.stack(visible), np.full(len(visible), 0.9, np.float32)))
    return frames, ids, proposals


def test_objects_that_cross_and_vanish_are_the_same_again(tracking, tmp_path):
    frames, ids, proposals = striped_and_plain()
    words = write_clip(tmp_path, frames, ids, proposals)
    seen = [each for _, each in tracking.look(open_frames(words[0]), read_coco(words[1]))]

    def switches(**settings) -> float:
        tracker = tracking.Tracker(**settings)
        return tracking.score(ids, [tracker.step(each) for each in seen])["switches"]

    assert switches() == 0
    assert switches(unmatched_cost=None) > 0  # the one that vanished takes the newcomer's proposal
    assert switches(unmatched_cost=0.9, appearance=0.0) > 0  # and overlap alone does not know it when it is back


def test_a_pond_on_disk(tracking, tmp_path, capsys):
    scene = Scene(3, size=(96, 160), objects=3, strangers=1, pads=1)
    rendered = [scene.render(time) for time in range(12)]
    proposals = [scene.proposals(time) for time in range(12)]
    proposals[5] = (np.zeros((0, 96, 160), bool), np.zeros(0))  # a frame without any
    words = write_clip(tmp_path, [frame for frame, _ in rendered], [ids for _, ids in rendered], proposals)
    tracking.main(words)
    said = capsys.readouterr().out
    assert "12 frames" in said and all(name in said for name in ("this tracker", "matches forced", "overlap alone"))
    found = [read_ids(tmp_path / "out" / f"{time:03}.png") for time in range(12)]
    assert not found[5].any() and set(np.unique(found[6])) & set(np.unique(found[4])) - {0}
    assert tracking.score([ids for _, ids in rendered], found)["covered"] > 0.7


def test_tracks_end_when_unseen_for_too_long(tracking):
    mask, look = torch.zeros(1, 8, 8, dtype=torch.bool), torch.eye(2)[:1]
    mask[:, :4] = True
    here = tracking.Seen(torch.ones(1), mask, look)
    nothing = tracking.Seen(torch.ones(0), mask[:0], look[:0])
    tracker = tracking.Tracker(patience=2)
    ids = [int(tracker.step(seen).max()) for seen in (here, nothing, nothing, here, nothing, nothing, nothing, here)]
    assert ids == [1, 0, 0, 1, 0, 0, 0, 2]


def test_no_two_live_tracks_have_one_id(tracking):
    """One object stays while 300 others come and go; then there are more than an id map has ids for."""
    masks = torch.eye(400, dtype=torch.bool)[:, None]  # [400, 1, 400]: a pixel each
    looks = torch.eye(400)
    tracker = tracking.Tracker(patience=0)
    for other in range(1, 300):
        both = [0, other]
        ids = tracker.step(tracking.Seen(torch.ones(2), masks[both], looks[both]))
        assert ids[0, 0] == 1 and ids[0, other] == (other - 1) % 253 + 2
    ids = tracker.step(tracking.Seen(torch.ones(400), masks, looks))
    assert len(np.unique(ids)) == 1 + 254 and len(tracker.tracks) == 254


def test_scores_count_switches_and_the_track_of_each_object(tracking):
    true = np.repeat(np.array([[1, 1, 2, 2]], np.uint8), 4, 0)
    swapped = np.repeat(np.array([[2, 2, 1, 1]], np.uint8), 4, 0)
    assert tracking.score([true] * 4, [true] * 4) == {"switches": 0, "covered": 1.0, "mean IoU": 1.0, "IDF1": 1.0}
    figures = tracking.score([true] * 4, [true, true, true, swapped])
    assert figures["switches"] == 2 and figures["IDF1"] == 0.75
    assert tracking.score([true], [np.zeros_like(true)]) == {"switches": 0, "covered": 0.0, "mean IoU": 0.0, "IDF1": 0.0}


def test_a_real_clip(tracking, data, tmp_path, capsys):
    clips = data / "clips"
    (tmp_path / "frames").mkdir()
    for file in sorted((clips / "JPEGImages" / "schoolgirls").iterdir())[:16]:
        shutil.copy(file, tmp_path / "frames")
    given = (tmp_path / "frames", clips / "proposals" / "schoolgirls.json", "--out", tmp_path / "out")
    tracking.main([str(word) for word in (*given, "--gt", clips / "Annotations" / "schoolgirls")])
    ours = capsys.readouterr().out.splitlines()[1]
    assert ours.startswith("this tracker") and int(ours.split("switches ")[1].split(",")[0]) <= 1
    assert float(ours.split("mean IoU ")[1].split(",")[0]) > 0.65


# ------------------------------------------------------------------------------------------------------------ keypoints


def test_views_share_some_of_their_points(keypoints):
    torch.manual_seed(0)
    views = keypoints.draw(64, points=16, noise=0.0)
    rows, columns = views.truth.sum(2), views.truth.sum(1)
    assert rows.max() == columns.max() == 1  # one-to-one
    counts = rows.sum(1)
    assert counts.min() >= 6 and counts.max() <= 14 and len(counts.unique()) > 3
    scene, left, right = views.truth.nonzero(as_tuple=True)
    torch.testing.assert_close(views.left[1][scene, left], views.right[1][scene, right])  # the same point, seen without noise


def test_figures_of_matches(keypoints):
    truth = torch.eye(4, dtype=torch.bool)[None].clone()
    truth[0, 3] = False  # the last has no partner
    assert keypoints.f1(torch.tensor([[0, 1, 2, -1]]), truth) == (1, 1, 1)
    precision, recall, _ = keypoints.f1(torch.tensor([[0, 2, -1, 3]]), truth)
    assert precision == pytest.approx(1 / 3) and recall == pytest.approx(1 / 3)
    assert keypoints.average_precision(truth.float(), truth)[0] == 1
    half = torch.tensor([[[0.9, 0.0], [0.0, 0.5]]])
    wrong = torch.tensor([[[False, False], [False, True]]])
    assert keypoints.average_precision(half, wrong)[0] == 0.5  # the one that is true comes second
    error, bins = keypoints.reliability(truth.float(), truth)
    assert error == 0 and bins == [(0, 0), (1, 1)]
    assert keypoints.reliability(torch.zeros(1, 4, 4), truth)[0] == 0.75  # all are said to be alone, three are not


def test_keypoints_learn_through_the_layer_by_the_squared_error(keypoints, monkeypatch):
    """The logarithm has no gradient at X = 0, nor where a row sum is above 1: docs/examples.md."""
    monkeypatch.setitem(keypoints.WAYS, "match, logarithm", ("match", keypoints.logarithm))
    results = keypoints.contest(["match, squared error", "match, logarithm"], seeds=1, steps=160, scenes=64)
    (square,), (logarithm,) = results.values()
    assert square["F1"] > 0.8 and square["AP"] > 0.9 and square["exact"]["F1"] > 0.75
    assert logarithm["F1"] < 0.7


def test_both_layers_are_compared_and_drawn(keypoints, tmp_path, capsys):
    results = keypoints.main(["--quick", "--seeds", "2", "--figure", str(tmp_path / "figure.svg")])
    said = capsys.readouterr().out
    assert list(results) == ["match, squared error", "sinkhorn, squared error"] and said.count("±") == 16
    assert "</svg>" in (tmp_path / "figure.svg").read_text()

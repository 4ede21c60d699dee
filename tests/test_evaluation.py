"""J, F and the protocols: odd cases by hand, random masks against the definition, real results against golden numbers.

The golden numbers were computed on the development data with the public DAVIS 2017 evaluator (`davis`) and the public
vos-benchmark (`vos`), unchanged.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import distance_transform_edt, gaussian_filter

from dmm_fast.data.masks import write_mask
from dmm_fast.evaluation import (
    EvaluationError,
    boundary_f,
    boundary_map,
    decay,
    evaluate,
    held,
    jaccard,
    score_ids,
    switches,
)

EXACT = dict(rel=0, abs=1e-9)


def ids(rows: str) -> np.ndarray:
    """An id map from digits, rows parted by spaces."""
    return np.array([[int(digit) for digit in row] for row in rows.split()], np.uint8)


def mask(rows: str) -> np.ndarray:
    return ids(rows) > 0


def write_sequence(folder: Path, maps: list[np.ndarray], first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(maps, start=first):
        write_mask(folder / f"{t:05d}.png", frame)
    return folder


def lagged(source: Path, target: Path, lag: int) -> Path:
    """A prediction from ground truth: every frame shows that of `lag` frames before, or the first."""
    files = sorted(source.glob("*.png"))
    target.mkdir(parents=True)
    for t, file in enumerate(files):
        (target / file.name).symlink_to(files[max(t - lag, 0)])
    return target


# ------------------------------------------------------------------------------------------------------------ identity


def test_held():
    """The true object with the highest IoU, from .3 on; background and void are nobody."""
    gt = ids("111220 111220 000333")
    assert held(gt, gt) == {1: 1, 2: 2, 3: 3}
    assert held(ids("222110 222110 000444"), gt) == {1: 2, 2: 1, 4: 3}  # 1 and 2 exchanged
    assert held(ids("111110 111110 000000"), gt) == {1: 1}  # both: more of the larger
    assert held(ids("100000 000000 000330"), gt) == {3: 3}  # 1/6 is too little, 2/3 is not
    assert held(ids("000000 000000 111000"), gt) == {}
    assert held(ids("110"), np.array([[255, 255, 0]], np.uint8)) == {}
    random = np.random.default_rng(0).integers(0, 5, (2, 40, 50)).astype(np.uint8)
    random[0, :30] = random[1, :30]  # so that some are alike
    for number, found in held(*random).items():
        overlaps = [jaccard(random[0] == number, random[1] == other) for other in range(1, 5)]
        assert max(overlaps) == overlaps[found - 1] >= 0.3


@pytest.mark.parametrize(
    "holds, count", [([1, 1, 1], 0), ([0, 0], 0), ([], 0), ([2], 1), ([1, 2, 0, 2, 1], 2), ([0, 3, 2, 3], 3), ([1, 0, 1], 0)]
)
def test_switches(holds, count):
    assert switches(1, np.array(holds, int)) == count


@pytest.mark.parametrize("protocol", ["davis", "vos"])
def test_switches_in_a_report(tmp_path, protocol):
    """Two objects that are taken for each other in the second half of the video."""
    truth = ids("110022 110022")
    swapped = np.array([0, 2, 1], np.uint8)[truth]
    write_sequence(tmp_path / "gt/video", [truth] * 8)
    write_sequence(tmp_path / "pred/video", [truth] * 4 + [swapped] * 4)
    report = evaluate(tmp_path / "gt", tmp_path / "pred", protocol)
    assert [row["switches"] for row in report.per_object] == [1, 1] and report.summary["switches"] == 1
    assert report.objects[0].holds.tolist() == [1, 1, 1, 2, 2, 2]
    assert report.table().splitlines()[0].split()[-1] == "switches"


# ------------------------------------------------------------------------------------------------------- J and F alone


def test_jaccard():
    assert jaccard(mask("0110"), mask("0011")) == 1 / 3
    assert jaccard(mask("1100"), mask("0011")) == 0
    assert jaccard(mask("0000"), mask("0000")) == 1  # empty union
    assert jaccard(mask("0000"), mask("0001")) == 0


@pytest.mark.parametrize(
    "image, edge",
    [
        ("000 010 000", "110 110 000"),  # an inner pixel: offset by half a pixel towards the origin
        ("111 111 111", "000 000 000"),  # the image's border is no boundary
        ("000 000 001", "000 011 010"),  # corner: neither the last row nor the last column reaches it
        ("000 000 010", "000 110 110"),  # last row: only the right neighbour
        ("000 001 000", "011 011 000"),  # last column: only the lower neighbour
        ("010", "110"),
        ("0 1 0", "1 1 0"),
        ("1", "0"),  # one row, one column, one pixel
    ],
)
def test_boundary_map(image: str, edge: str):
    assert boundary_map(mask(image)).tolist() == mask(edge).tolist()


def test_boundary_f_without_boundaries():
    empty, full, one = (np.zeros((9, 9), bool), np.ones((9, 9), bool), np.zeros((9, 9), bool))
    one[4, 4] = True
    assert boundary_f(empty, empty) == 1 and boundary_f(full, empty) == 1  # a full image has no boundary either
    assert boundary_f(one, empty) == 0 and boundary_f(empty, one) == 0


def test_boundary_f_radius():
    def square(x: int) -> np.ndarray:
        image = np.zeros((480, 854), bool)
        image[200:260, x : x + 60] = True
        return image

    assert boundary_f(square(108), square(100)) == 1  # 8 pixels at 480x854, inclusive
    assert boundary_f(square(109), square(100)) < 1
    assert boundary_f(square(103), square(100), bound_th=3) == 1
    assert boundary_f(square(400), square(100)) == 0  # boundaries on both sides, none matches
    for wrong in (1.5, -0.1):
        with pytest.raises(EvaluationError, match="bound_th"):
            boundary_f(square(1), square(1), bound_th=wrong)


def test_jaccard_and_boundary_f_refuse_bad_masks():
    with pytest.raises(EvaluationError, match=r"pred must be a bool array \[H, W\], got uint8 \[2, 2\]"):
        jaccard(np.zeros((2, 2), np.uint8), np.zeros((2, 2), bool))
    with pytest.raises(EvaluationError, match="one size"):
        boundary_f(np.zeros((2, 2), bool), np.zeros((2, 3), bool))


def literal_edge(image: np.ndarray) -> set[tuple[int, int]]:
    h, w = image.shape
    edge = set()
    for y in range(h):
        for x in range(w):
            near = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            near = [(a, b) for a, b in near if a < h and b < w]
            if any(image[p] != image[y, x] for p in near):
                edge.add((y, x))
    return edge


def literal_f(pred: np.ndarray, gt: np.ndarray, radius: int) -> float:
    """The definition, pixel by pixel."""
    a, b = literal_edge(pred), literal_edge(gt)
    if not a or not b:
        return float(len(a) == len(b))

    def share(points, targets):
        close = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in targets) for y, x in points]
        return sum(close) / len(points)

    precision, recall = share(a, b), share(b, a)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0


def random_ids(rng: np.random.Generator, h: int, w: int, objects: int) -> np.ndarray:
    scores = np.stack([gaussian_filter(rng.standard_normal((h, w)), rng.uniform(0.5, 4)) for _ in range(objects + 1)])
    scores /= scores.std((1, 2), keepdims=True) + 1e-9
    return scores.argmax(0).astype(np.uint8)


@pytest.mark.parametrize("seed", range(12))
def test_random_masks_against_the_definition(seed: int):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(1, 40, 2)
    pred, gt = random_ids(rng, h, w, 3), random_ids(rng, h, w, 3)
    radius = math.ceil(0.008 * math.hypot(h, w))
    scores = score_ids(pred, gt)
    assert set(scores) == (set(np.unique(pred)) | set(np.unique(gt))) - {0}
    for number, score in scores.items():
        a, b = pred == number, gt == number
        inter, union = sum((a & b).ravel().tolist()), sum((a | b).ravel().tolist())
        assert score[:4] == (
            pytest.approx(inter / union, **EXACT),
            pytest.approx(literal_f(a, b, radius), **EXACT),
            bool(b.any()),
            bool(a.any()),
        )
        for wide in (1, 3, 7):
            assert boundary_f(a, b, wide) == pytest.approx(literal_f(a, b, wide), **EXACT)


@pytest.mark.parametrize("seed", range(4))
def test_random_masks_against_the_distance_transform(seed: int):
    rng = np.random.default_rng(seed)
    h, w = rng.integers(100, 500, 2)
    pred, gt = (gaussian_filter(rng.standard_normal((h, w)), 9) > 0.02 for _ in range(2))
    radius = math.ceil(0.008 * math.hypot(h, w))
    a, b = boundary_map(pred), boundary_map(gt)
    precision = (distance_transform_edt(~b)[a] <= radius).mean()
    recall = (distance_transform_edt(~a)[b] <= radius).mean()
    assert boundary_f(pred, gt) == pytest.approx(2 * precision * recall / (precision + recall), **EXACT)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 10, 78, 256, 257, 300, 1000])
def test_decay_bins(length: int):
    """Four bins from rounded edges, sharing their edge frames; right beyond 256 frames too."""
    values = np.random.default_rng(length).random(length)
    edges = [math.floor(1 + i * (length - 1) / 4 + 0.5 + 1e-9) - 1 for i in range(5)]
    expected = np.mean(values[edges[0] : edges[1] + 1]) - np.mean(values[edges[3] : edges[4] + 1])
    assert decay(values) == pytest.approx(expected, **EXACT)


def test_decay_of_a_long_sequence():
    assert decay(np.repeat([1.0, 0.5, 0.5, 0.25], 100)) == pytest.approx(0.75, abs=0.01)


# ----------------------------------------------------------------------------------------------------------- protocols


def one_pixel(*numbers: int) -> np.ndarray:
    """An id map of one row; far enough apart for J to be told by eye."""
    return np.array([numbers], np.uint8)


def js(report) -> dict[tuple[str, int], list[float]]:
    return {(score.sequence, score.object): score.j.tolist() for score in report.objects}


def pair(tmp_path: Path, gt: list[np.ndarray], pred: list[np.ndarray], name: str = "s") -> tuple[Path, Path]:
    return write_sequence(tmp_path / "gt" / name, gt), write_sequence(tmp_path / "pred" / name, pred)


def test_davis_frames_and_objects(tmp_path: Path):
    """First and last frame are not scored (nor read), void is background, a missing object counts as empty."""
    gt = [one_pixel(1, 2, 0, 255), one_pixel(1, 2, 255, 255), one_pixel(0, 2, 2, 0), one_pixel(1, 1, 1, 1)]
    pred = [one_pixel(9, 9, 9, 9), one_pixel(1, 0, 1, 0), one_pixel(0, 0, 0, 0), one_pixel(9, 9, 9, 9)]
    report = evaluate(*pair(tmp_path, gt, pred))
    assert js(report) == {("s", 1): [0.5, 1.0], ("s", 2): [0.0, 0.0]}
    row = report.per_object[0]
    assert (row["frames"], row["J"], row["J_recall"]) == (2, 0.75, 0.5)
    (tmp_path / "pred/s/00000.png").unlink()
    (tmp_path / "pred/s/00003.png").unlink()
    assert js(evaluate(tmp_path / "gt", tmp_path / "pred")) == js(report)


def test_davis_counts_ids_up_to_the_first_frames_largest(tmp_path: Path):
    """A gap is an object that is never there; an id that comes later than the first frame is not scored."""
    gt, pred = [one_pixel(1, 3), one_pixel(1, 5), one_pixel(1, 3)], [one_pixel(1, 3)] * 3
    report = evaluate(*pair(tmp_path, gt, pred))
    assert js(report) == {("s", 1): [1.0], ("s", 2): [1.0], ("s", 3): [0.0]}
    assert "in no mask of these frames, so counted as J = F = 1: s 2\n" in report.table()


@pytest.mark.parametrize("wrong", [3, 255])
def test_davis_refuses_ids_above_the_largest(tmp_path: Path, wrong: int):
    gt = [one_pixel(1, 2)] * 4
    pred = [one_pixel(9, 9), one_pixel(1, 2), one_pixel(1, wrong), one_pixel(9, 9)]
    with pytest.raises(EvaluationError, match=f"00002.png: id {wrong} is above the largest id .* s, 2"):
        evaluate(*pair(tmp_path, gt, pred))


def test_data_set_mean_is_over_objects(tmp_path: Path):
    pair(tmp_path, [one_pixel(1, 2)] * 3, [one_pixel(1, 2)] * 3, "a")
    pair(tmp_path, [one_pixel(1, 0)] * 3, [one_pixel(0, 1)] * 3, "b")
    report = evaluate(tmp_path / "gt", tmp_path / "pred")
    assert [(row["sequence"], row["object"], row["J"]) for row in report.per_object] == [
        ("a", 1, 1.0),
        ("a", 2, 1.0),
        ("b", 1, 0.0),
    ]
    assert report.summary["J"] == pytest.approx(2 / 3)
    assert report.summary["G"] == (report.summary["J"] + report.summary["F"]) / 2


def test_a_sequence_counts_once_however_often_it_is_named(tmp_path: Path):
    one = pair(tmp_path, [one_pixel(1, 2)] * 3, [one_pixel(1, 2)] * 3, "a")
    pair(tmp_path, [one_pixel(1, 0)] * 3, [one_pixel(0, 1)] * 3, "b")
    (tmp_path / "list.txt").write_text("a\nb\n\nb\n")
    report = evaluate(tmp_path / "gt", tmp_path / "pred", sequences=tmp_path / "list.txt")
    assert report.summary["J"] == pytest.approx(2 / 3)
    assert len(evaluate(*one, sequences=["a", "a"]).objects) == 2
    for folders in (one, (tmp_path / "gt", tmp_path / "pred")):
        with pytest.raises(EvaluationError, match="names none to score"):
            evaluate(*folders, sequences=[])


def test_vos_objects(tmp_path: Path):
    """Ids from the ground truth, each from its first occurrence on either side; void is an id like any other."""
    gt = [one_pixel(8, 8), one_pixel(1, 0), one_pixel(1, 7), one_pixel(0, 255), one_pixel(1, 7), one_pixel(8, 8)]
    pred = [one_pixel(8, 8), one_pixel(1, 9), one_pixel(1, 0), one_pixel(255, 255), one_pixel(9, 7), one_pixel(8, 8)]
    assert js(evaluate(*pair(tmp_path, gt, pred), "vos")) == {
        ("s", 1): [1.0, 1.0, 1.0, 0.0],  # both empty in the third frame
        ("s", 7): [0.0, 1.0, 1.0],  # late
        ("s", 255): [0.5, 1.0],
    }  # 8 is only in frames that are not scored, 9 only in the prediction


def test_vos_counts_from_a_false_first_prediction(tmp_path: Path):
    gt, pred = [one_pixel(1, n) for n in (0, 0, 0, 2, 0)], [one_pixel(1, n) for n in (2, 0, 2, 2, 2)]
    assert js(evaluate(*pair(tmp_path, gt, pred), "vos"))["s", 2] == [0.0, 1.0]


def test_vos_frames(tmp_path: Path):
    where = pair(tmp_path, [one_pixel(1, 2)] * 4, [one_pixel(1, 2)] * 4)
    for frames, count in (("inner", 2), ("after-first", 3), ("all", 4)):
        assert evaluate(*where, "vos", frames=frames).per_object[0]["frames"] == count


def test_frames_are_in_natural_order(tmp_path: Path):
    """0.png, 1.png .. 11.png: the last one is 11, and 9 counts."""
    for name, sizes in (("gt", [2] * 12), ("pred", [2] * 9 + [0, 2, 0])):
        (tmp_path / name / "s").mkdir(parents=True)
        for index, size in enumerate(sizes):
            write_mask(tmp_path / name / "s" / f"{index}.png", one_pixel(1, size))
    assert js(evaluate(tmp_path / "gt", tmp_path / "pred", "davis"))["s", 2][-2:] == [0.0, 1.0]


def test_segtrack(tmp_path: Path):
    """mIoU* over instances per frame, then frames; mIoU† over frames with the instance, then instances."""
    pair(
        tmp_path,
        [one_pixel(1, 2), one_pixel(1, 2), one_pixel(1, 0), one_pixel(1, 0)],
        [one_pixel(0, 0), one_pixel(1, 0), one_pixel(1, 0), one_pixel(1, 2)],
        "a",
    )
    pair(tmp_path, [one_pixel(1, 1), one_pixel(1, 1)], [one_pixel(0, 0), one_pixel(1, 0)], "b")
    where = tmp_path / "gt", tmp_path / "pred", "segtrack"
    frames_a, frames_b = [(1 + 0) / 2, (1 + 1) / 2, (1 + 0) / 2], [0.5]
    report = evaluate(*where)
    assert report.summary["mIoU*"] == pytest.approx(np.mean(frames_a + frames_b))
    assert report.summary["mIoU†"] == pytest.approx(np.mean([1, 0, 0.5]))
    assert report.settings == {"protocol": "segtrack", "frames": "after-first", "foreground": False, "pool_frames": True}
    by_video = evaluate(*where, pool_frames=False).summary["mIoU*"]
    assert by_video == pytest.approx((np.mean(frames_a) + np.mean(frames_b)) / 2)
    with_first = evaluate(*where, frames="all").summary["mIoU†"]
    assert with_first == pytest.approx(np.mean([3 / 4, 0, 0.25]))
    assert "mIoU* = " in report.table() and "mIoU† = " in report.table()


def test_segtrack_as_distributed(tmp_path: Path):
    """One folder per instance, png and bmp mixed, RGB with grey edges; lists whose names start with a star."""
    edges = np.array([[0, 90, 200, 255, 255, 0, 0, 0]], np.uint8).repeat(4, 0)  # above 127: x = 2, 3, 4
    crisp = np.array([[0, 0, 0, 0, 0, 0, 255, 255]], np.uint8).repeat(4, 0)
    for t in range(3):
        for number, grey in ((1, edges), (2, crisp)):
            folder = tmp_path / "gt" / "v" / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.stack([grey] * 3, -1)).save(folder / f"{t:05d}.{'png' if t % 2 else 'bmp'}")
    write_sequence(tmp_path / "pred" / "v", [ids("00111022 " * 4)] * 2 + [ids("00110002 " * 4)])
    (tmp_path / "all.txt").write_text("*v\n")
    report = evaluate(tmp_path / "gt", tmp_path / "pred", "segtrack", sequences=tmp_path / "all.txt")
    assert js(report) == {("v", 1): [1.0, 2 / 3], ("v", 2): [1.0, 0.5]}
    assert js(evaluate(tmp_path / "gt/v", tmp_path / "pred/v", "segtrack")) == js(report)
    union = evaluate(tmp_path / "gt", tmp_path / "pred", "segtrack", foreground=True)
    assert js(union) == {("v", 1): [1.0, 3 / 5]}
    write_sequence(tmp_path / "pred" / "v", [ids("00111033 " * 4)] * 3)
    with pytest.raises(EvaluationError, match="id 3 is above the largest"):
        evaluate(tmp_path / "gt", tmp_path / "pred", "segtrack")


def test_foreground(tmp_path: Path):
    gt, pred = [one_pixel(0, 255, 255)] * 3, [one_pixel(3, 1, 2)] * 3
    where = pair(tmp_path, gt, pred)
    assert js(evaluate(*where, foreground=True)) == {("s", 1): [2 / 3]}
    with pytest.raises(EvaluationError, match=r"no object in the first frame but void \(255\).*foreground=True"):
        evaluate(*where)


# -------------------------------------------------------------------------------------------------------------- errors


def test_plain_errors(tmp_path: Path):
    gt, pred = pair(tmp_path, [one_pixel(1, 2)] * 5, [one_pixel(1, 2)] * 5, "a")
    pair(tmp_path, [one_pixel(1, 2)] * 5, [one_pixel(1, 2)] * 5, "b")

    def says(message: str, *args, **options):
        with pytest.raises(EvaluationError, match=message):
            evaluate(*(args or (tmp_path / "gt", tmp_path / "pred")), **options)

    says("protocol must be one of davis, vos, segtrack, got 'ytvos'", protocol="ytvos")
    says("frames must be one of inner, after-first, all, got 'some'", frames="some")
    says("workers must be 0", workers=-1)
    says("nowhere: no such directory", tmp_path / "nowhere", pred)
    says("no ground truth for c", sequences=["a", "c"])
    (tmp_path / "empty").mkdir()
    says("no ground truth: expected .*/<sequence>/", tmp_path / "empty", pred)
    (pred / "00001.png").unlink()
    (pred / "00003.png").unlink()
    says("a: 2 of 3 frames are missing: 00001.png, 00003.png")
    write_mask(pred / "00001.png", one_pixel(1, 2))
    write_mask(pred / "00003.png", one_pixel(1, 2, 0))
    says(r"00003.png: the prediction is 3x1, the ground truth .*00003.png is 2x1 \(width x height\)")
    (tmp_path / "pred" / "a").rename(tmp_path / "pred" / "x")
    says("no prediction for 1 of 2 sequences: a")
    assert len(evaluate(tmp_path / "gt", tmp_path / "pred", sequences=["b"]).objects) == 2
    says("2 ground-truth frames leave none to score", *pair(tmp_path, [one_pixel(1)] * 2, [one_pixel(1)] * 2, "short"))
    says("no object in the first frame", *pair(tmp_path, [one_pixel(0)] * 3, [one_pixel(0)] * 3, "none"))
    says("no object in the ground-truth frames", tmp_path / "gt/none", tmp_path / "pred/none", protocol="vos")


def test_a_folder_of_predictions_that_is_not_the_sequence(tmp_path: Path):
    """The message says what the folder holds, and names none that is not there."""
    gt, pred = pair(tmp_path, [one_pixel(1, 2)] * 4, [one_pixel(1, 2)] * 4, "gt6")
    assert evaluate(gt, tmp_path / "pred").objects[0].sequence == "gt6"  # a data set that has it
    pred.rename(tmp_path / "pred/sg")
    (tmp_path / "pred/extra").mkdir()
    with pytest.raises(EvaluationError) as error:
        evaluate(gt, tmp_path / "pred")
    assert str(error.value) == (
        f"{tmp_path}/pred: holds no PNGs but folders (extra, sg): is it a data set? then --gt must be one too; if not, give one of these"
    )
    with pytest.raises(EvaluationError, match="pred/extra: holds no PNGs$"):
        evaluate(gt, tmp_path / "pred/extra")


def test_predictions_with_other_names(tmp_path: Path):
    gt, pred = pair(tmp_path, [one_pixel(1, 2)] * 6, [one_pixel(1, 2)] * 6)
    for file in list(pred.iterdir()):
        file.rename(pred / f"frame_{file.name}")
    told = r"s: 4 of 4 frames are missing: 00001.png, .*, 00004.png \(the folder holds {}\)$"
    with pytest.raises(
        EvaluationError, match=told.format("frame_00000.png, frame_00001.png, frame_00002.png, ... frame_00005.png")
    ):
        evaluate(gt, pred)
    for file in list(pred.iterdir()):
        file.unlink()
    with pytest.raises(EvaluationError, match=told.format("no PNGs")):
        evaluate(tmp_path / "gt", tmp_path / "pred")


def test_predictions_without_ground_truth_are_named(tmp_path: Path):
    gt, pred = pair(tmp_path, [one_pixel(1, 2)] * 3, [one_pixel(1, 2)] * 3, "a")
    write_sequence(tmp_path / "pred/extra", [one_pixel(1, 2)] * 3)
    (tmp_path / "pred/logs").mkdir()
    report = evaluate(tmp_path / "gt", tmp_path / "pred")
    assert report.table().splitlines()[-2] == "not scored, no ground truth: extra" and report.unscored == ("extra",)
    for chosen in (evaluate(tmp_path / "gt", tmp_path / "pred", sequences=["a"]), evaluate(gt, tmp_path / "pred")):
        assert "not scored" not in chosen.table()


# -------------------------------------------------------------------------------------------------------------- report


def test_report_files(tmp_path: Path):
    rng = np.random.default_rng(0)
    frames = [random_ids(rng, 20, 30, 2) for _ in range(6)]
    report = evaluate(*pair(tmp_path, frames, [np.roll(frame, 1, 1) for frame in frames]))
    report.to_csv(tmp_path / "scores.csv")
    report.to_json(tmp_path / "scores.json")
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["J"]) for row in rows] == [score.j.mean() for score in report.objects]
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["summary"] == report.summary and content["per_object"] == report.per_object
    assert content["per_frame"][1]["F"] == report.objects[1].f.tolist()
    assert content["per_frame"][1]["frames"] == ["00001", "00002", "00003", "00004"]
    table = report.table().splitlines()
    assert table[0].split()[:4] == ["sequence", "object", "frames", "G"] and len({len(line) for line in table[:5]}) == 1
    assert f"{report.summary['J']:.3f}" in table[-2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gt", "pred", "scores.csv", "scores.json"]


def test_processes_give_the_same_report(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dmm_fast.evaluation.FRAMES_PER_PROCESS", 64)
    rng = np.random.default_rng(1)
    for name in "ab":
        frames = [random_ids(rng, 24, 32, 3) for _ in range(70)]
        pair(tmp_path, frames, frames[1:] + frames[:1], name)
    where = tmp_path / "gt", tmp_path / "pred", "vos"
    one, two = evaluate(*where), evaluate(*where, workers=2, progress=True)
    assert js(one) == js(two) and one.summary == two.summary
    assert "136/136" in capsys.readouterr().err
    write_mask(tmp_path / "pred/b/00030.png", np.zeros((24, 31), np.uint8))
    with pytest.raises(EvaluationError, match="00030.png: the prediction is 31x24"):
        evaluate(*where, workers=2)


# -------------------------------------------------------------------------------------------- golden numbers, real data

STATISTICS = ("J", "J_recall", "J_decay", "F", "F_recall", "F_decay")

FOREGROUND = {  # published results against the union of the objects, protocol davis
    ("osvos2016", "bmx-trees"): (
        0.5550951301189557,
        0.7435897435897436,
        0.30042273506882194,
        0.7360966102256513,
        0.9230769230769231,
        0.23164964866138416,
    ),
    ("osvos2016", "horsejump-high"): (
        0.7798669999439616,
        1.0,
        0.2585197383292096,
        0.8679502784955032,
        1.0,
        0.10936629658512675,
    ),
    ("rgmp2016", "bmx-trees"): (
        0.5262390816333621,
        0.5897435897435898,
        0.5584530878545453,
        0.7450358792663818,
        0.8333333333333334,
        0.4567381884130428,
    ),
    ("rgmp2016", "horsejump-high"): (
        0.8688055863906404,
        1.0,
        0.05017640493697151,
        0.9237538541632189,
        1.0,
        0.013182604705247014,
    ),
    ("stm2016", "bmx-trees"): (
        0.6647636786565965,
        0.8205128205128205,
        0.22455867737056012,
        0.9124123750381995,
        1.0,
        0.054950561993556746,
    ),
    ("stm2016", "horsejump-high"): (
        0.8968685572119481,
        1.0,
        0.04863891136081255,
        0.9595099876683485,
        1.0,
        -0.023617461852979527,
    ),
    ("osvos2017", "bmx-trees"): (
        0.5405311330912367,
        0.6538461538461539,
        0.256088316146415,
        0.7663408449507089,
        0.8974358974358975,
        0.2146414776018607,
    ),
    ("osvos2017", "horsejump-high"): (
        0.7743906157088828,
        1.0,
        0.2509165372665805,
        0.8723934655785391,
        1.0,
        0.08467975425840368,
    ),
    ("rvos20_proposals", "bmx-trees"): (
        0.2584225520489543,
        0.1794871794871795,
        0.0038366045558381745,
        0.47136420015581804,
        0.3974358974358974,
        0.050961819515550066,
    ),
    ("rvos20_proposals", "horsejump-high"): (
        0.5187760272462374,
        0.4791666666666667,
        -0.16556585214057823,
        0.6721297702588682,
        0.9791666666666666,
        -0.10974844469906586,
    ),
}


@pytest.mark.parametrize("system, sequence", FOREGROUND)
def test_golden_foreground(data: Path, system: str, sequence: str):
    report = evaluate(data / "clips/Annotations_union" / sequence, data / "clips/results" / system / sequence, foreground=True)
    (row,) = report.per_object
    assert [row[name] for name in STATISTICS] == pytest.approx(FOREGROUND[system, sequence], **EXACT)


LAGGED = {  # ground truth of `lag` frames before as the prediction, protocol davis, one line per object
    ("schoolgirls", 5): [
        (
            0.34964596819050553,
            0.21794871794871795,
            -0.026888913276076898,
            0.46035842319959425,
            0.34615384615384615,
            0.02403250684569036,
        ),
        (0.5360512681644364, 0.6282051282051282, 0.10983243147356625, 0.9270063351744255, 1.0, 0.16321455939328544),
        (0.8206875593037248, 0.9102564102564102, 0.2295682351474584, 0.9450067141983016, 1.0, 0.17766649658097344),
        (0.15394060731926498, 0.05128205128205128, 0.11084193912447227, 0.5359847957471531, 0.5, 0.2891411022709376),
        (
            0.43612672081329623,
            0.46153846153846156,
            0.4299153772753655,
            0.5915350954981263,
            0.6538461538461539,
            0.2601301314517005,
        ),
        (
            0.43807735182338275,
            0.4358974358974359,
            0.516132680989881,
            0.7805521793018123,
            0.8333333333333334,
            0.5561800662345043,
        ),
        (
            0.4601293678724032,
            0.4230769230769231,
            0.5828492411999002,
            0.7877672112719357,
            0.8589743589743589,
            0.5164165841550046,
        ),
    ],
    ("puma-chair", 5): [(0.6797158966718342, 1.0, -0.0023649950965509703, 0.8764312811392942, 1.0, -0.04053542508746055)],
    ("puma-chair", 10**6): [
        (0.517057366169351, 0.46551724137931033, -0.2069369409304057, 0.8222157883589291, 1.0, -0.10992333596267256)
    ],
}


@pytest.mark.parametrize("sequence, lag", LAGGED)
def test_golden_objects(data: Path, tmp_path: Path, sequence: str, lag: int):
    gt = data / "clips/Annotations" / sequence
    report = evaluate(gt, lagged(gt, tmp_path / "pred", lag))
    for row, expected in zip(report.per_object, LAGGED[sequence, lag], strict=True):
        assert [row[name] for name in STATISTICS] == pytest.approx(expected, **EXACT)


def test_golden_vos(data: Path, tmp_path: Path):
    """Sparse frames and a late object; more ids predicted than there are objects."""
    gt = data / "clips/Annotations/puma-caps"
    pred = lagged(gt, tmp_path / "puma-caps", 1)
    rows = evaluate(gt, pred, "vos").per_object
    assert [(row["frames"], row["J"]) for row in rows] == [(3, 0.0), (2, 0.0)]
    assert [row["F"] for row in rows] == pytest.approx([0.019267822736030827, 0.0], **EXACT)
    with pytest.raises(EvaluationError, match="id 2 is above the largest id .* puma-caps, 1; .* protocol vos"):
        evaluate(gt, pred)  # the first frame has one object
    results = data / "clips/results"
    report = evaluate(results / "osvos2017", results / "rvos20_proposals", "vos")
    assert [row["J"] for row in report.per_object] == pytest.approx(
        [0.12822353791340022, 0.012948858893957981, 0.6101778054384027, 0.05744548205797894], **EXACT
    )
    assert [row["F"] for row in report.per_object] == pytest.approx(
        [0.40784641887187756, 0.3404597298398705, 0.7413232085334579, 0.41497441773092075], **EXACT
    )


@pytest.mark.parametrize(
    "protocol, j, f, objects",
    [
        ("davis", 0.22923787563282444, 0.25807493065051884, 38),  # horsejump-high's first frame has ids up to 18
        ("vos", 0.24445366764057114, 0.27184886990738083, 40),
    ],
)
def test_golden_many_objects(data: Path, protocol: str, j: float, f: float, objects: int):
    """Up to 20 instances as the ground truth, two objects predicted: ids missing, late and in other orders."""
    results = data / "clips/results"
    report = evaluate(results / "rvos20_proposals", results / "osvos2017", protocol)
    assert len(report.objects) == objects
    assert (report.summary["J"], report.summary["F"]) == (pytest.approx(j, **EXACT), pytest.approx(f, **EXACT))

"""Region similarity J and boundary accuracy F of video object segmentation, as the public evaluators compute them.

- `davis`: DAVIS 2017 semi-supervised. Objects 1..K, K the largest id of the first ground-truth frame; the first and the
  last frame are not scored; void (255) is background; a prediction's id above K is an error, a missing object is empty.
- `vos`: the community benchmark. Objects are the ids of the scored ground truth, void included, each counted from the
  frame where it first occurs in ground truth or prediction; gaps and late objects are fine.
- `segtrack`: SegTrack v2. mIoU* averages over the instances of a frame, then over frames; mIoU† over the frames where
  an instance appears, then over instances.

Over a data set J and F are means over objects, not over sequences; G = (J + F) / 2. Recall is the share of frames
above 0.5; decay is the mean of the first quarter of the frames less that of the last. The public DAVIS tool keeps the
quarters' edges as uint8, so its decay is wrong for sequences of more than 256 scored frames; here it is right.

Identity: in every frame, the mask of an object lies on the true object with which its IoU is highest, if that is `HOLDS` or more. A switch
is counted where it lies on another one than it last did, beginning with its own: going astray and coming back are two.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import find_objects
from tqdm import tqdm

from dmm_fast.data.masks import VOID, is_indexed, read_binary, read_ids
from dmm_fast.data.video import natural_key
from dmm_fast.files import listed, whole_file

FRAMES = {"inner": slice(1, -1), "after-first": slice(1, None), "all": slice(None)}
PROTOCOLS = {"davis": "inner", "vos": "inner", "segtrack": "after-first"}  # and the frames each scores

HOLDS = 0.3  # IoU from which on a mask lies on an object

FRAMES_PER_PROCESS = 512  # about what takes as long to score as a process takes to start


class EvaluationError(ValueError):
    """Ground truth and prediction that cannot be scored as asked."""


# --------------------------------------------------------------------------------------------------- J and F of a frame


def _check_pair(pred: np.ndarray, gt: np.ndarray) -> None:
    for name, mask in (("pred", pred), ("gt", gt)):
        if mask.dtype != bool or mask.ndim != 2:
            raise EvaluationError(f"{name} must be a bool array [H, W], got {mask.dtype} {list(mask.shape)}")
    if pred.shape != gt.shape:
        raise EvaluationError(f"pred and gt must have one size, got {list(pred.shape)} and {list(gt.shape)}")


def jaccard(pred: np.ndarray, gt: np.ndarray) -> float:
    """Intersection over union of two masks, bool [H, W]; an empty union counts 1."""
    _check_pair(pred, gt)
    union = np.count_nonzero(pred | gt)
    return np.count_nonzero(pred & gt) / union if union else 1.0


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower-right neighbour, bool [H, W].

    In the last row only the right neighbour counts, in the last column only the lower one, in the corner none.
    """
    edge = np.zeros_like(mask)
    here = mask[:-1, :-1]
    edge[:-1, :-1] = (here ^ mask[:-1, 1:]) | (here ^ mask[1:, :-1]) | (here ^ mask[1:, 1:])
    edge[-1, :-1] = mask[-1, :-1] ^ mask[-1, 1:]
    edge[:-1, -1] = mask[:-1, -1] ^ mask[1:, -1]
    return edge


def boundary_f(pred: np.ndarray, gt: np.ndarray, bound_th: float = 0.008) -> float:
    """F-measure 2PR / (P + R) of two masks' boundaries, bool [H, W].

    Boundary pixels match within a disk: `bound_th` is its radius in pixels or, below 1, as a share of the diagonal,
    rounded up. Without any boundary on both sides F is 1, on one side 0.
    """
    _check_pair(pred, gt)
    return _boundary_f(pred, gt, _radius(gt.shape, bound_th))


def _radius(size: tuple[int, int], bound_th: float = 0.008) -> int:
    if bound_th >= 1 and bound_th != int(bound_th) or bound_th < 0:
        raise EvaluationError(f"bound_th must be a share in [0, 1) or whole pixels, got {bound_th}")
    return int(bound_th) if bound_th >= 1 else math.ceil(bound_th * math.sqrt(size[0] ** 2 + size[1] ** 2))


def _boundary_f(pred: np.ndarray, gt: np.ndarray, radius: int) -> float:
    pred_edge, gt_edge = boundary_map(pred), boundary_map(gt)
    num_pred, num_gt = np.count_nonzero(pred_edge), np.count_nonzero(gt_edge)
    if num_pred == 0 or num_gt == 0:
        return float(num_pred == num_gt)
    precision = _matches(pred_edge, gt_edge, radius) / num_pred
    recall = _matches(gt_edge, pred_edge, radius) / num_gt
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _matches(points: np.ndarray, targets: np.ndarray, radius: int) -> int:
    """How many of `points` have one of `targets` (both bool [H, W]) within `radius`.

    The same as dilating `targets` by a disk, but only where there are points: each row of the disk is one difference of
    running counts, and most points are done after the first.
    """
    height, width = targets.shape
    counts = np.zeros((height + 2 * radius, width + 1), np.int32)  # [radius + H + radius, 1 + W]
    np.cumsum(targets, axis=1, dtype=np.int32, out=counts[radius : radius + height, 1:])
    y, x = np.nonzero(points)
    total = len(y)
    for dy in sorted(range(-radius, radius + 1), key=abs):
        half = math.isqrt(radius * radius - dy * dy)
        row = y + (dy + radius)
        left = counts[row, np.maximum(x - half, 0)] == counts[row, np.minimum(x + half + 1, width)]
        y, x = y[left], x[left]
        if not len(y):
            break
    return total - len(y)


class FrameScore(NamedTuple):
    """J and F of one object in one frame, where it occurs there, and on which true object its mask lies, 0 for none."""

    j: float
    f: float
    in_gt: bool
    in_pred: bool
    holds: int = 0


ABSENT = FrameScore(1.0, 1.0, False, False)


def score_ids(pred: np.ndarray, gt: np.ndarray) -> dict[int, FrameScore]:
    """Score of every id above 0 that occurs in either of two id maps, uint8 [H, W]."""
    boxes = defaultdict(list)
    for ids in (gt, pred):
        for number, box in enumerate(find_objects(ids), start=1):
            if box is not None:
                boxes[number].append(box)
    radius, holds = _radius(gt.shape), held(pred, gt)
    scores = {}
    for number in sorted(boxes):
        window = _window(boxes[number])
        p, g = pred[window] == number, gt[window] == number
        j, f = jaccard(p, g), _boundary_f(p, g, radius)
        scores[number] = FrameScore(j, f, bool(g.any()), bool(p.any()), holds.get(number, 0))
    return scores


def held(pred: np.ndarray, gt: np.ndarray) -> dict[int, int]:
    """The true object on which each predicted mask lies, for those that lie on one; id maps, uint8 [H, W]. See `HOLDS`."""
    pairs = np.bincount(pred.ravel() * np.int32(256) + gt.ravel(), minlength=65536).reshape(256, 256)  # pixels
    either = pairs.sum(1)[:, None] + pairs.sum(0) - pairs
    iou = (pairs / np.maximum(either, 1))[:, 1:VOID]
    return {int(number): 1 + int(iou[number].argmax()) for number in np.flatnonzero(iou.max(1) >= HOLDS) if number}


def _window(boxes: list[tuple[slice, slice]]) -> tuple[slice, ...]:
    """The boxes' hull and one pixel around it, inside which an object's J and F are those of the whole image."""
    return tuple(
        slice(max(min(side.start for side in sides) - 1, 0), max(side.stop for side in sides) + 1) for sides in zip(*boxes)
    )


# ------------------------------------------------------------------------------------------------------ frames on disk


class _Frame(NamedTuple):
    """One frame's files. The ground truth is one id map or, `binary`, the masks of objects 1, 2, ..."""

    stem: str
    gt: tuple[Path, ...]
    pred: Path
    binary: bool
    foreground: bool


class _Sequence(NamedTuple):
    name: str
    frames: list[_Frame]
    largest_id: int | None  # that a prediction may have; None: any


def _score_frame(frame: _Frame) -> dict[int, FrameScore]:
    """Runs in the worker processes; knows nothing of protocols."""
    pred = read_ids(frame.pred)
    masks = [read_binary(file) if frame.binary else read_ids(file) for file in frame.gt]
    for file, mask in zip(frame.gt, masks):
        if mask.shape != pred.shape:
            raise EvaluationError(
                f"{frame.pred}: the prediction is {pred.shape[1]}x{pred.shape[0]}, the ground truth "
                f"{file} is {mask.shape[1]}x{mask.shape[0]} (width x height)"
            )
    if frame.foreground:
        return score_ids((pred > 0).astype(np.uint8), np.any(masks, axis=0).astype(np.uint8))
    if not frame.binary:
        return score_ids(pred, masks[0])
    scores = {int(number): ABSENT._replace(in_pred=True) for number in np.unique(pred) if number > len(masks)}
    for number, mask in enumerate(masks, start=1):
        mine = pred == number
        overlaps = [jaccard(mine, other) if mine.any() else 0.0 for other in masks]
        holds = 1 + int(np.argmax(overlaps)) if max(overlaps) >= HOLDS else 0
        scores[number] = FrameScore(jaccard(mine, mask), boundary_f(mine, mask), bool(mask.any()), bool(mine.any()), holds)
    return scores


def _images(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if file.suffix.lower() in (".png", ".bmp") and file.name[0] != ".")
    return sorted(files, key=lambda file: natural_key(file.name))


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _instance_folders(folder: Path) -> list[Path]:
    """SegTrack's <sequence>/1 .. <sequence>/n."""
    parts = [entry for entry in _folders(folder) if entry.name.isdecimal() and _images(entry)]
    return sorted(parts, key=lambda part: int(part.name))


def _ground_truth(folder: Path, protocol: str) -> list[tuple[Path, ...]]:
    """The ground-truth files of each frame, in order; several where SegTrack has one folder per instance."""
    if images := _images(folder):
        return [(file,) for file in images]
    parts = _instance_folders(folder) if protocol == "segtrack" else []
    if not parts:
        return []
    if [part.name for part in parts] != [str(i + 1) for i in range(len(parts))]:
        raise EvaluationError(f"{folder}: instance folders must be named 1..n, got {listed([p.name for p in parts])}")
    frames = [_images(part) for part in parts]
    if any([file.stem for file in part] != [file.stem for file in frames[0]] for part in frames):
        raise EvaluationError(f"{folder}: the instance folders hold different frames")
    return list(zip(*frames))


def _choose(sequences: Iterable[str] | str | os.PathLike | None, found: list[str], gt_dir: Path) -> list[str]:
    if sequences is None:
        return found
    if isinstance(sequences, (str, os.PathLike)):
        sequences = Path(sequences).read_text().splitlines()
    # each once, or it would count twice in the mean; SegTrack's lists start names with "*"
    names = list(dict.fromkeys(name for line in sequences if (name := line.strip().lstrip("*"))))
    if not names:
        raise EvaluationError("sequences names none to score")
    if unknown := sorted(set(names) - set(found)):
        raise EvaluationError(f"{gt_dir}: no ground truth for {listed(unknown)}")
    return names


def _find_sequences(
    gt_dir: Path, pred_dir: Path, sequences: Iterable[str] | str | os.PathLike | None, protocol: str
) -> list[tuple[str, Path, Path]]:
    """(name, ground-truth folder, prediction folder) of every sequence to score."""
    for folder in (gt_dir, pred_dir):
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: no such directory")
    if _ground_truth(gt_dir, protocol):
        (name,) = _choose(sequences, [gt_dir.resolve().name], gt_dir)
        pred = pred_dir if _images(pred_dir) else pred_dir / name
        if not pred.is_dir():
            folders = [folder.name for folder in _folders(pred_dir)]
            hint = f" but folders ({listed(folders)}): is it a data set? then --gt must be one too; if not, give one of these"
            raise EvaluationError(f"{pred_dir}: holds no PNGs{hint if folders else ''}")
        return [(name, gt_dir, pred)]
    found = [entry.name for entry in _folders(gt_dir) if _ground_truth(entry, protocol)]
    if not found:
        raise EvaluationError(f"{gt_dir}: no ground truth: expected {gt_dir}/<sequence>/*.png or {gt_dir}/*.png")
    names = _choose(sequences, found, gt_dir)
    if missing := [name for name in names if not (pred_dir / name).is_dir()]:
        raise EvaluationError(
            f"{pred_dir}: no prediction for {len(missing)} of {len(names)} sequences: "
            f"{listed(missing)}; name those to score to leave others out (sequences=, --sequences)"
        )
    return [(name, gt_dir / name, pred_dir / name) for name in names]


def _unscored(found: list[tuple[str, Path, Path]], gt_dir: Path, pred_dir: Path) -> list[str]:
    """Of a data set, the sequences with predictions but without ground truth."""
    names = {name for name, gt, _ in found if gt != gt_dir}
    return [folder.name for folder in _folders(pred_dir) if folder.name not in names and _images(folder)] if names else []


def _sequence(name: str, gt: Path, pred: Path, protocol: str, frames: str, foreground: bool) -> _Sequence:
    files = _ground_truth(gt, protocol)
    binary = protocol == "segtrack" and (len(files[0]) > 1 or not is_indexed(files[0][0]))
    scored = [
        _Frame(group[0].stem, group, pred / f"{group[0].stem}.png", binary, foreground) for group in files[FRAMES[frames]]
    ]
    if not scored:
        raise EvaluationError(f"{gt}: {len(files)} ground-truth frames leave none to score (frames={frames!r})")
    if missing := [frame.pred.name for frame in scored if not frame.pred.is_file()]:
        there = ""
        if len(missing) == len(scored):
            there = f" (the folder holds {listed([file.name for file in _images(pred)], 3) or 'no PNGs'})"
        raise EvaluationError(f"{pred}: {len(missing)} of {len(scored)} frames are missing: {listed(missing)}{there}")
    return _Sequence(name, scored, _largest_id(files, protocol, binary, foreground))


def _largest_id(files: list[tuple[Path, ...]], protocol: str, binary: bool, foreground: bool) -> int | None:
    """The largest id that a prediction may have: for DAVIS that of the first ground-truth frame, void aside."""
    if protocol == "vos":
        return None
    if protocol == "segtrack":
        return 1 if foreground else len(files[0]) if binary else max(int(read_ids(file).max()) for (file,) in files)
    ids = read_ids(files[0][0])
    objects = ids[(ids > 0) & (foreground | (ids != VOID))]
    if not objects.size:
        raise EvaluationError(
            f"{files[0][0]}: no object in the first frame" + (f" but void (255); {_HINT}" if ids.any() else "")
        )
    return 1 if foreground else int(objects.max())


_HINT = "where 255 is the one object, score with foreground=True (--foreground)"


# ----------------------------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class ObjectScore:
    """One object of one sequence: J and F, float64 [T], of the frames that count for it, and on which object its mask lies, int [T]."""

    sequence: str
    object: int
    frames: tuple[str, ...]
    j: np.ndarray
    f: np.ndarray
    holds: np.ndarray
    seen: bool = True  # in ground truth or in the prediction, in any of these frames

    @property
    def row(self) -> dict[str, Any]:
        """Means, recalls and decays, all in [0, 1] but decay in [-1, 1]; and identity switches."""
        row: dict[str, Any] = {"sequence": self.sequence, "object": self.object, "frames": len(self.frames), "G": 0.0}
        for name, values in (("J", self.j), ("F", self.f)):
            row |= {name: float(values.mean()), f"{name}_recall": float((values > 0.5).mean()), f"{name}_decay": decay(values)}
        return row | {"G": (row["J"] + row["F"]) / 2, "switches": switches(self.object, self.holds)}


def switches(object: int, holds: np.ndarray) -> int:
    """How often the mask of an object goes from one true object to another, its own at first; holds: [T], 0 for none."""
    path = np.concatenate([[object], holds[holds > 0]])
    return int(np.count_nonzero(path[1:] != path[:-1]))


def decay(values: np.ndarray) -> float:
    """Mean of the first quarter of the frames less the mean of the last; quarters share their edge frames."""
    edges = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    return float(values[edges[0] : edges[1] + 1].mean() - values[edges[3] : edges[4] + 1].mean())


def _object_scores(sequence: _Sequence, scores: list[dict[int, FrameScore]], protocol: str) -> list[ObjectScore]:
    """The objects that `protocol` scores in a sequence, over the frames that count for each."""
    in_gt = sorted({number for frame in scores for number, score in frame.items() if score.in_gt})
    if sequence.largest_id is not None:
        _check_ids(sequence, scores, sequence.largest_id)
    result = []
    for number in range(1, (sequence.largest_id or 0) + 1) if protocol == "davis" else in_gt:
        rows = [frame.get(number, ABSENT) for frame in scores]
        counted: Sequence[int] = range(len(rows))
        if protocol == "vos":
            counted = range(next(t for t, row in enumerate(rows) if row.in_gt or row.in_pred), len(rows))
        elif protocol == "segtrack":
            counted = [t for t, row in enumerate(rows) if row.in_gt]
        result.append(
            ObjectScore(
                sequence.name,
                number,
                tuple(sequence.frames[t].stem for t in counted),
                np.array([rows[t].j for t in counted]),
                np.array([rows[t].f for t in counted]),
                np.array([rows[t].holds for t in counted], int),
                any(rows[t].in_gt or rows[t].in_pred for t in counted),
            )
        )
    return result


def _check_ids(sequence: _Sequence, scores: list[dict[int, FrameScore]], largest: int) -> None:
    for frame, found in zip(sequence.frames, scores):
        if wrong := [number for number, score in found.items() if score.in_pred and number > largest]:
            hint = _HINT if VOID in wrong else "where objects come later than the first frame, score with protocol vos"
            raise EvaluationError(
                f"{frame.pred}: id {max(wrong)} is above the largest id of the ground truth of "
                f"{sequence.name}, {sequence.largest_id}; {hint}"
            )


def _frame_means(scores: list[dict[int, FrameScore]], objects: list[int]) -> np.ndarray:
    """Mean J over a sequence's instances, [T]; an instance that is in neither side of a frame counts 1 there."""
    return np.array([[frame.get(number, ABSENT).j for number in objects] for frame in scores]).mean(1)


def _summary(objects: list[ObjectScore]) -> dict[str, float]:
    rows = [score.row for score in objects]
    names = ("J", "J_recall", "J_decay", "F", "F_recall", "F_decay", "switches")
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    return {"G": (means["J"] + means["F"]) / 2, **means}


@dataclass(frozen=True)
class Report:
    """Scores of a data set. `summary` has the means over objects; `settings` say how they were made; `unscored` names the
    predicted sequences that have no ground truth."""

    settings: dict[str, object]
    summary: dict[str, float]
    objects: tuple[ObjectScore, ...]
    unscored: tuple[str, ...] = ()

    @property
    def per_object(self) -> list[dict[str, Any]]:
        """One row per object, with the columns of `table`."""
        return [score.row for score in self.objects]

    def to_csv(self, path: str | os.PathLike) -> None:
        """One line per object."""
        rows = self.per_object
        with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def to_json(self, path: str | os.PathLike) -> None:
        """Settings, summary, objects, and every frame's J and F."""
        frames = [
            {
                "sequence": score.sequence,
                "object": score.object,
                "frames": score.frames,
                "J": score.j.tolist(),
                "F": score.f.tolist(),
                "holds": score.holds.tolist(),
            }
            for score in self.objects
        ]
        content = {"settings": self.settings, "summary": self.summary, "per_object": self.per_object, "per_frame": frames}
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")

    def table(self) -> str:
        """Plain text: one line per object, then the data set's means, then what else the protocol reports."""
        rows = self.per_object
        mean = {"sequence": "mean", "object": "", "frames": sum(row["frames"] for row in rows), **self.summary}
        cells = [list(rows[0])] + [[_cell(row[name]) for name in rows[0]] for row in (*rows, mean)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = [
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths)))
            for line in cells
        ]
        lines.insert(-1, "-" * len(lines[0]))
        extra = [f"{name} = {value:.3f}" for name, value in self.summary.items() if name not in rows[0]]
        if unseen := [f"{score.sequence} {score.object}" for score in self.objects if not score.seen]:
            extra.append(f"in no mask of these frames, so counted as J = F = 1: {listed(unseen)}")
        if self.unscored:
            extra.append(f"not scored, no ground truth: {listed(self.unscored)}")
        how = ", ".join(f"{name}: {value}" for name, value in self.settings.items())
        return "\n".join([*lines, *extra, f"({how})"])


def _cell(value: str | int | float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def evaluate(
    gt_dir: str | os.PathLike,
    pred_dir: str | os.PathLike,
    protocol: str = "davis",
    *,
    sequences: Iterable[str] | str | os.PathLike | None = None,
    foreground: bool = False,
    frames: str | None = None,
    pool_frames: bool = True,
    workers: int = 1,
    progress: bool = False,
) -> Report:
    """Score predicted id maps against ground truth.

    gt_dir, pred_dir: both `<sequence>/*.png`, or two folders of one sequence. Predictions are named as the ground
        truth; what else they hold is not read. SegTrack's ground truth may be `<sequence>/<1..n>/*`, png or bmp, with
        grey edges.
    protocol: "davis", "vos" or "segtrack", see the module.
    sequences: names, or a text file with one a line; default all that have ground truth; the report names the others
        that have predictions.
    foreground: score everything above 0 as one object, on both sides, as DAVIS 2016 does (there 255 is the object).
    frames: "inner" (all but first and last), "after-first" or "all"; default "inner" for davis and vos, "after-first"
        for segtrack (the first mask is given).
    pool_frames: segtrack's mIoU* is the mean over all frames of the data set; False: over each video's, then over
        videos.
    workers: processes at most; 1 scores in this one, 0 takes one per core, none starts for less than 512 frames. A
        script that asks for more than one needs `if __name__ == "__main__":`, since none is a fork of it.

    Raises EvaluationError (missing sequences or frames, sizes, ids above the largest) and MaskError (unreadable masks).
    """
    if protocol not in PROTOCOLS:
        raise EvaluationError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    frames = PROTOCOLS[protocol] if frames is None else frames
    if frames not in FRAMES:
        raise EvaluationError(f"frames must be one of {', '.join(FRAMES)}, got {frames!r}")
    if workers < 0:
        raise EvaluationError(f"workers must be 0 (one per core) or more, got {workers}")
    found = _find_sequences(Path(gt_dir), Path(pred_dir), sequences, protocol)
    work = [_sequence(name, gt, pred, protocol, frames, foreground) for name, gt, pred in found]

    objects: list[ObjectScore] = []
    videos: list[np.ndarray] = []  # mean J over a video's instances, [T] each
    with closing(_scored([frame for sequence in work for frame in sequence.frames], workers, progress)) as scored:
        for sequence in work:
            scores = list(islice(scored, len(sequence.frames)))
            if mine := _object_scores(sequence, scores, protocol):
                objects += mine
                videos.append(_frame_means(scores, [score.object for score in mine]))
    if not objects:
        raise EvaluationError(f"{gt_dir}: no object in the ground-truth frames to score")

    settings = {"protocol": protocol, "frames": frames, "foreground": foreground}
    summary = _summary(objects)
    if protocol == "segtrack":
        settings["pool_frames"] = pool_frames
        star = np.concatenate(videos) if pool_frames else np.array([video.mean() for video in videos])
        summary |= {"mIoU*": float(star.mean()), "mIoU†": summary["J"]}
    unscored = _unscored(found, Path(gt_dir), Path(pred_dir)) if sequences is None else ()
    return Report(settings, summary, tuple(objects), tuple(unscored))


def _scored(frames: list[_Frame], workers: int, progress: bool) -> Generator[dict[int, FrameScore], None, None]:
    """Each frame's scores, in order."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(frames) // FRAMES_PER_PROCESS)
    with ExitStack() as stack:
        if workers <= 1:
            scores: Iterator[dict[int, FrameScore]] = map(_score_frame, frames)
        else:
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])  # imported (with torch) once, not once a process as spawn does
            processes = stack.enter_context(ProcessPoolExecutor(workers, context))
            scores = processes.map(_score_frame, frames, chunksize=8)
        bar = stack.enter_context(tqdm(total=len(frames), unit="frame", disable=not progress))
        for score in scores:
            bar.update()
            yield score

"""A forward and a backward pass made into one, object by object; frame by frame, so a clip may be long."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from dmm_fast.data.masks import read_ids, write_mask
from dmm_fast.inference.folder import RunFolder

APART = 0.5  # IoU; where two passes agree less than this at best, one of them is wrong


@dataclass(frozen=True)
class Join:
    """Between two frames in which an object was given: the forward pass's up to frame `at`, the backward pass's after it."""

    object: int
    given: list[str]  # the two frames in which it was given
    at: str
    iou: float  # of the two passes' masks there: the highest in between

    @property
    def note(self) -> str:
        """What to do about it; empty where the passes agree."""
        if self.iou >= APART:
            return ""
        return (f"object {self.object}: the passes forward and backward disagree between the frames {self.given[0]} and {self.given[1]} "
                f"(IoU {self.iou:.2f} at best, in {self.at}); a mask given in between would help")  # fmt: skip


def backward_from(given: dict[int, list[int]], direction: str) -> int:
    """The frame from which a pass backward is made: the last in which an object is given. Of both ways one from the first frame, whose
    masks are the forward pass's, is of no use: then -1, for none."""
    last = max(places[-1] for places in given.values())
    return last if last > 0 or direction == "backward" else -1


def join(
    stems: list[str], size: tuple[int, int], run: RunFolder, given: dict[int, list[int]], progress: bool = False
) -> tuple[list[dict[str, Any]], list[Join]]:
    """Write OUT's masks, of a size (H, W), from those of the passes; -> the rows of the report, and where objects were joined.

    An object comes from the backward pass before the frame in which it is given first, from the forward pass after the one
    in which it is given last, and in between from the forward pass up to the frame in which both agree best. Where objects of
    two passes overlap, the higher score is in front. given: per object the numbers of its frames, rising.
    """
    meetings = _meetings(stems, run, given, progress) if len(run.passes) == 2 else {}
    rows = {name: {row["frame"]: row for row in folder.rows()} for name, folder in run.passes.items()}
    joined = []
    for index, stem in enumerate(_told(stems, "joining", progress)):
        found = {name: rows[name][stem] for name in run.passes if stem in rows[name]}
        if len(found) == 1:  # one pass came here, so what it left is the result
            name, row = next(iter(found.items()))
            shutil.copyfile(run.passes[name].mask(stem), run.mask(stem))
            joined.append(row | {"objects": [_marked(entry, name) for entry in row["objects"]]})
            continue
        masks = {name: read_ids(run.passes[name].mask(stem)) for name in found}
        layers: list[tuple[float, np.ndarray, dict[str, Any]]] = []
        for label, places in given.items():
            name = _source(index, places, meetings.get(label, {}))
            for entry in found[name]["objects"] if found else ():
                if entry["id"] == label:
                    first = 2.0 if "given" in entry else entry["score"]
                    layers.append((first, masks[name] == label, _marked(entry, name)))
        ids = np.zeros(size, np.uint8)
        for _, mask, entry in sorted(layers, key=lambda layer: layer[0]):
            ids[mask] = entry["id"]
        write_mask(run.mask(stem), ids)
        row = {"frame": stem, "objects": [entry for *_, entry in layers]}
        joined.append(row | ({"picture": "missing"} if any("picture" in part for part in found.values()) else {}))
    joins = [
        Join(label, [stems[first], stems[last]], stems[at], round(iou, 4))
        for label, spans in meetings.items()
        for (first, last), (at, iou) in spans.items()
    ]
    return joined, joins


def _marked(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return entry | {"direction": name} if name == "backward" else entry


Spans = dict[tuple[int, int], tuple[int, float]]  # between two frames: where the passes meet, and their IoU there


def _source(index: int, places: list[int], spans: Spans) -> str:
    """The pass that an object of this frame comes from."""
    if index < places[0] or any(at < index < last for (_, last), (at, _) in spans.items()):
        return "backward"
    return "forward"


def _meetings(stems: list[str], run: RunFolder, given: dict[int, list[int]], progress: bool) -> dict[int, Spans]:
    """Per object and pair of frames in which it is given, one after the other: where the two passes agree best."""
    gaps = {label: [(a, b) for a, b in zip(places, places[1:]) if b > a + 1] for label, places in given.items()}
    best: dict[tuple[int, tuple[int, int]], tuple[float, float, int]] = {}
    inside = sorted({index for spans in gaps.values() for a, b in spans for index in range(a + 1, b)})
    for index in _told(inside, "comparing", progress):
        one, other = (read_ids(folder.mask(stems[index])) for folder in run.passes.values())
        for label, spans in gaps.items():
            for a, b in spans:
                if a < index < b:
                    both, either = ((one == label) & (other == label)).sum(), ((one == label) | (other == label)).sum()
                    iou = float(both / either) if either else 1.0  # neither sees it: a good place to change over
                    found = (iou, -abs(index - (a + b) / 2), index)  # of equals the one in the middle
                    best[label, (a, b)] = max(best.get((label, (a, b)), found), found)
    return {label: {gap: best[label, gap][::-2] for gap in spans} for label, spans in gaps.items()}


def _told(items: list[Any], what: str, progress: bool) -> Any:
    return tqdm(items, desc=what, unit=" frames", delay=1, disable=None if progress else True)

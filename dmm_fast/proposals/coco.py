"""Mask proposals: COCO results files, written by any detector, and a live torchvision Mask R-CNN.

Both give :class:`dmm_fast.model.Proposals`: boxes [M, 4] (xyxy, pixels of the frame), scores [M], and masks that are
run-length codes (int32 [M, R], from a file; or whole frames, bool [M, H, W]) or soft masks inside their boxes (float32
[M, 28, 28], from the detector), so that nothing needs an M x H x W array.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm_fast.files import whole_file
from dmm_fast.model import Proposals
from dmm_fast.ops.vision import NO_RUN
from dmm_fast.proposals.base import TOP, ProposalError, full_masks

# ---------------------------------------------------------------------------------------------- COCO results files


def read_coco(path: str | os.PathLike, top: int = TOP) -> ProposalFile:
    """Open a COCO results file: a JSON list of {image_id, score, segmentation, bbox?}, image_id = the frame's stem.

    Raises ProposalError for a file that is missing, cut short or not such a list.
    """
    return ProposalFile(path, top)


class ProposalFile:
    """Proposals by frame. Masks are decoded when a frame is asked for, the ``top`` best by score."""

    def __init__(self, path: str | os.PathLike, top: int = TOP):
        self.path, self.top = Path(path), top
        self._entries: dict[str, list[dict]] = {}
        for number, entry in enumerate(_load_results(self.path)):
            if not isinstance(entry, dict) or "image_id" not in entry or not _is_number(entry.get("score")):
                raise ProposalError(f"{path}: entry {number} needs image_id and a finite score, got {_short(entry)}")
            self._entries.setdefault(_key(entry["image_id"]), []).append(entry)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def image_ids(self) -> list[str]:
        return list(self._entries)

    @property
    def best(self) -> float:
        """The highest score of all."""
        return max((entry["score"] for entries in self._entries.values() for entry in entries), default=0.0)

    def covers(self, stems: Iterable[str]) -> int:
        """How many of these frames have at least one proposal."""
        return sum(_key(stem) in self._entries for stem in stems)

    def frame(self, stem: str, size: tuple[int, int] | None = None, top: int | None = None) -> Proposals:
        """Proposals of one frame, best first; none at all is an empty result, not an error.

        size is the frame's (H, W): masks of another size are refused, polygons need it. top: fewer than the file's.
        """
        entries, codes = self._read(stem, size, top)
        masks = [_fill_runs(lengths, *shape) for lengths, shape in codes]
        stack = torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, *(size or (0, 0)), dtype=torch.bool)
        boxes = self._boxes(entries, codes)
        return Proposals(boxes, _scores(entries), stack)

    def runs(self, stem: str, size: tuple[int, int] | None = None, least: float = -math.inf) -> Proposals:
        """As `frame`, with the masks as run-length codes int32 [M, R], which a network decodes where and as far as it needs.

        least: without those of lower scores.
        """
        entries, codes = self._read(stem, size, least=least)
        longest = max((len(lengths) for lengths, _ in codes), default=1)
        places = np.full((len(codes), longest), NO_RUN, np.int32)
        for row, (lengths, _) in zip(places, codes):
            row[: len(lengths)] = lengths.cumsum()
        return Proposals(self._boxes(entries, codes), _scores(entries), torch.from_numpy(places))

    def _read(
        self, stem: str, size: tuple[int, int] | None, top: int | None = None, least: float = -math.inf
    ) -> tuple[list[dict], list[tuple[np.ndarray, tuple[int, int]]]]:
        """The frame's entries, best first, and of each the run lengths and size of its mask."""
        entries = [entry for entry in self._entries.get(_key(stem), []) if entry["score"] >= least]
        entries = sorted(entries, key=lambda entry: -entry["score"])[: self.top if top is None else min(top, self.top)]
        codes: list[tuple[np.ndarray, tuple[int, int]]] = []
        for entry in entries:
            where = f"{self.path}, image_id {entry['image_id']!r}"
            codes.append(_run_lengths(entry.get("segmentation"), size, where))
            if codes[-1][1] != codes[0][1]:
                raise ProposalError(f"{where}: masks of different sizes, {codes[0][1]} and {codes[-1][1]}")
        return entries, codes

    def _boxes(self, entries: list[dict], codes: list[tuple[np.ndarray, tuple[int, int]]]) -> Tensor:
        """[M, 4]: those given, else tight ones."""
        boxes = torch.zeros(len(entries), 4)
        for index, (entry, (lengths, shape)) in enumerate(zip(entries, codes)):
            given = _xyxy(entry.get("bbox"), f"{self.path}, image_id {entry['image_id']!r}")
            boxes[index] = torch.tensor(_tight_box(lengths, shape[0]) if given is None else given)
        return boxes


def _scores(entries: list[dict]) -> Tensor:
    return torch.tensor([entry["score"] for entry in entries], dtype=torch.float32)  # [M]


def _load_results(path: Path) -> list:
    try:
        results = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ProposalError(f"{path}: no such proposals file") from None
    except IsADirectoryError:
        raise ProposalError(f"{path}: a directory; proposals are one COCO results file (JSON)") from None
    except UnicodeDecodeError:
        raise ProposalError(f"{path}: not a text file; proposals are a COCO results file (JSON)") from None
    except json.JSONDecodeError as error:
        cut = "" if error.doc.rstrip().endswith("]") else " (the file stops in the middle: was it written to the end?)"
        raise ProposalError(f"{path}: not valid JSON: {error}{cut}") from None
    if isinstance(results, dict) and "annotations" in results:
        raise ProposalError(f"{path}: a COCO data set with 'annotations'; proposals are a COCO results list with scores")
    if not isinstance(results, list):
        raise ProposalError(f"{path}: a COCO results file is a JSON list, got {_short(results)}")
    return results


def _key(image_id: Any) -> str:
    """Frame stems and image ids meet here: 7, "7" and "00007" name the same frame; so do "a.jpg" and "a"."""
    text = str(image_id)
    stem, dot, suffix = text.rpartition(".")
    if dot and suffix.lower() in ("jpg", "jpeg", "png", "bmp", "webp"):
        text = stem
    return str(int(text)) if text.isascii() and text.isdigit() else text


def _run_lengths(segmentation: Any, size: tuple[int, int] | None, where: str) -> tuple[np.ndarray, tuple[int, int]]:
    """RLE (compressed text or a list of run lengths) or polygons -> run lengths int64, of 0 and 1 in turn, and (H, W)."""
    if isinstance(segmentation, list) and segmentation:
        if size is None:
            raise ProposalError(f"{where}: polygons need the frame's size")
        return _polygon_runs(segmentation, size, where), size
    rle = segmentation if isinstance(segmentation, dict) else {}
    shape, counts = rle.get("size"), rle.get("counts")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 16 for n in shape)):
        raise ProposalError(f"{where}: needs a segmentation {{size: [H, W], counts}}, got {_short(segmentation)}")
    if size is not None and tuple(shape) != tuple(size):
        raise ProposalError(f"{where}: masks are {shape[1]}x{shape[0]}, the frames are {size[1]}x{size[0]}")
    if isinstance(counts, str):
        runs = _uncompress(counts.encode(errors="surrogatepass"))
    else:
        integers = isinstance(counts, list) and all(type(run) is int and abs(run) < 1 << 31 for run in counts)
        runs = np.array(counts, dtype=np.int64) if integers else None
    # Run lengths must add up: pycocotools leaves memory it never wrote in the mask when they fall short.
    if runs is None or (runs < 0).any() or runs.sum() != shape[0] * shape[1]:
        raise ProposalError(f"{where}: the run lengths do not fill a {shape[1]}x{shape[0]} mask; the file is damaged")
    return runs, (shape[0], shape[1])


def _tight_box(lengths: np.ndarray, height: int) -> tuple[int, int, int, int]:
    """What `mask_boxes` gives for the mask of these run lengths: x0, y0, x1, y1."""
    ends = lengths.cumsum()[1::2]  # of the runs of 1
    begins, lasts = (ends - lengths[1::2])[lengths[1::2] > 0], ends[lengths[1::2] > 0] - 1
    if not len(begins):
        return 0, 0, 0, 0
    one = begins // height == lasts // height  # column; else the run goes over the bottom and on from the top
    top, bottom = np.where(one, begins % height, 0), np.where(one, lasts % height, height - 1)
    return int(begins[0]) // height, int(top.min()), int(lasts[-1]) // height + 1, int(bottom.max()) + 1


def _fill_runs(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """Run lengths down columns, of 0 and 1 in turn -> bool [H, W]; only the columns that hold a 1 are touched."""
    mask = np.zeros((height, width), bool)
    ends = runs.cumsum()[1::2]  # of the runs of 1
    if len(ends):
        first, last = int(runs[0]) // height, -(-int(ends[-1]) // height)  # columns
        inner = np.append(runs[: 2 * len(ends)], last * height - ends[-1])
        inner[0] -= first * height
        mask[:, first:last] = np.repeat(np.arange(len(inner)) % 2 == 1, inner).reshape(-1, height).T
    return mask


def _uncompress(counts: bytes) -> np.ndarray | None:
    """COCO's compressed counts -> run lengths, int64. Five bits a character, low bits first, bit 5 says more follow,
    the last character's bit 4 is the sign; from the fourth run on, each is stored less the run two before it.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = (codes & 32) == 0
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes))))
    if shift.max() > 30:
        return None
    runs = np.add.reduceat((codes & 31) << shift, starts)
    runs -= np.where(codes[last] & 16, np.int64(32) << shift[last], 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def _polygon_runs(polygons: list, size: tuple[int, int], where: str) -> np.ndarray:
    from pycocotools import mask as coco

    for polygon in polygons:
        if not (isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_number, polygon))):
            raise ProposalError(f"{where}: a polygon is a list of x, y, x, y, ... of three points or more")
    runs = _uncompress(coco.merge(coco.frPyObjects(polygons, *size))["counts"])
    assert runs is not None, "pycocotools writes codes that can be read"
    return runs


def _xyxy(box: Any, where: str) -> list[float] | None:
    if box is None:
        return None
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise ProposalError(f"{where}: bbox must be [x, y, width, height], got {_short(box)}")
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ----------------------------------------------------------------------------------------------------------- writing


def write_coco(path: str | os.PathLike, frames: Mapping[str, Proposals], size: tuple[int, int]) -> None:
    """Write {stem: Proposals} of (H, W) frames as a COCO results file, at once or not at all."""
    with CocoWriter(path, size, fresh=True) as writer:
        for stem, proposals in frames.items():
            writer.add(stem, proposals)


class CocoWriter:
    """Writes a COCO results file frame by frame.

    Frames gather in PATH.part, one JSON line each, which becomes PATH when the writer closes without an error. After
    an interruption a writer for the same path goes on: ``writer.done`` holds the stems that need not be added again.
    """

    def __init__(self, path: str | os.PathLike, size: tuple[int, int], fresh: bool = False):
        self.path, self.size = Path(path), (size[0], size[1])
        self._part = self.path.with_name(self.path.name + ".part")
        lines = [] if fresh else list(self._finished_lines())
        self.done = {json.loads(line)["stem"] for line in lines}
        self._part.write_text("".join(lines))
        self._file = self._part.open("a")

    def _finished_lines(self) -> Iterator[str]:
        """The lines of an earlier part file, less a last one that was cut."""
        if self._part.exists():
            for line in self._part.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    if json.loads(line)["size"] != list(self.size):
                        raise ProposalError(f"{self._part}: left by a run on frames of another size; delete it first")
                    yield line

    def add(self, stem: str, proposals: Proposals) -> None:
        results = [_result(stem, *proposal) for proposal in zip(*full_masks(proposals, self.size))]
        self._file.write(json.dumps({"stem": stem, "size": self.size, "results": results}) + "\n")
        self._file.flush()
        self.done.add(stem)

    def __enter__(self) -> CocoWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if kind is not None:
            return
        with whole_file(self.path) as whole, whole.open("w") as file, self._part.open() as lines:
            results = (json.dumps(result) for line in lines for result in json.loads(line)["results"])
            file.write("[\n" + ",\n".join(results) + "\n]\n")
        self._part.unlink()


def _result(stem: str, box: Tensor, score: Tensor, mask: Tensor) -> dict:
    from pycocotools import mask as coco

    rle = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    x0, y0, x1, y1 = (round(float(value), 2) for value in box)
    segmentation = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    bbox = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
    return {"image_id": stem, "category_id": 1, "score": float(score), "bbox": bbox, "segmentation": segmentation}


# --------------------------------------------------------------------------------------------------- a live detector

"""Mask proposals in COCO's formats: results, written by any detector, or a data set.

They come as :class:`dmm_fast.model.Proposals`: boxes [M, 4] (xyxy, pixels of the frame), scores [M], and masks that are
run-length codes (int32 [M, R]; or whole frames, bool [M, H, W]), so that nothing needs an M x H x W array.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm_fast.files import listed, whole_file
from dmm_fast.model import Proposals
from dmm_fast.ops.vision import NO_RUN
from dmm_fast.proposals.base import TOP, ProposalError, ProposalWarning, checked, full_masks, real

FAR = 1 << 20  # pixels; a polygon's points lie nearer

# ---------------------------------------------------------------------------------------------- COCO results files


def read_coco(path: str | os.PathLike, top: int = TOP) -> ProposalFile:
    """Open a COCO file of masks, of which a frame has the `top` best at most, either

    results: a JSON list of {image_id, score, segmentation, bbox?}, image_id = the frame's stem or number; or
    a data set: {images, annotations}, where an image's file_name tells the frame and a missing score counts as 1.
    Segmentations are polygons or run-length codes, compressed or not.

    Raises ProposalError for a file that is missing, cut short or neither of these.
    """
    return ProposalFile(path, top)


def read_aligned(path: str | os.PathLike, stems: list[str], top: int = TOP) -> ProposalFile:
    """`read_coco` for the frames of these names; a file without proposals will do.

    Raises ProposalError for a file of which no image id is a frame's. One whose ids are off by a constant is read so, with a
    ProposalWarning (see `ProposalFile.align`); where some are frames' names by 1 or not at all: who asks cannot say which it is.
    """
    file = read_coco(path, top)
    named = not {_key(stem) for stem in stems}.isdisjoint(file._entries)
    try:
        notes = file.align(stems)
    except ProposalError:
        if named:
            return file
        raise
    moved = [(key, number) for key, number in file._of.items() if number]
    by_one = all(key.lstrip("-").isdigit() and abs(int(key) - int(number)) == 1 for key, number in moved)
    if named and moved and not by_one:
        file._of = {}
    elif moved:
        warnings.warn(f"{path}: {notes[0]}", ProposalWarning, stacklevel=2)
    return file


class ProposalFile:
    """Proposals by frame. Masks are decoded when a frame is asked for, the ``top`` best by score."""

    def __init__(self, path: str | os.PathLike, top: int = TOP):
        self.path, self.top = Path(path), top
        self._entries: dict[str, list[dict]] = {}
        self._of: dict[str, str] = {}  # frames whose entries have another image id; see `align`
        for number, entry in enumerate(_load(self.path)):
            if not isinstance(entry, dict) or "image_id" not in entry or not _is_number(entry.get("score")):
                raise ProposalError(f"{path}: entry {number} needs image_id and a finite score, got {_short(entry)}")
            self._entries.setdefault(_key(entry["image_id"]), []).append(entry)
        if self._entries and not any(entry.get("segmentation") for entries in self._entries.values() for entry in entries):
            raise ProposalError(f"{path}: none of its {sum(map(len, self._entries.values()))} entries has a segmentation, and boxes alone "
                                "are not enough: give polygons or run-length codes; a box is the polygon [[x, y, x+w, y, x+w, y+h, x, y+h]]")  # fmt: skip

    def check(self, stems: list[str], size: tuple[int, int]) -> None:
        """Before a run begins: that what it will read of these frames are masks of their size (H, W); ProposalError if not.

        Whether their codes can be read is found out when a frame is.
        """
        for stem in stems:
            for entry in self._best(stem):
                _check_mask(entry.get("segmentation"), size, f"{self.path}, image_id {entry['image_id']!r}")

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def image_ids(self) -> list[str]:
        """The image ids that have proposals, as text, in the file's order."""
        return list(self._entries)

    @property
    def best(self) -> float:
        """The highest score of all."""
        return max((entry["score"] for entries in self._entries.values() for entry in entries), default=0.0)

    def _name(self, stem: str) -> str:
        key = _key(stem)
        return self._of.get(key, key)

    def align(self, stems: list[str], offset: int | None = None) -> list[str]:
        """Find out which frames of a clip the image ids mean; -> what the user should know.

        Ids that are the frames' names are used as they are; those left over, and frames without proposals, are told. Where both
        are left, exporters have often counted from another number: if one constant, and no other, brings every id to a frame
        (by its number, or by its place in the clip), it is used, and said so. offset: that constant, 0 for none.

        Raises ProposalError where no id is a frame's, and where several constants would do.
        """
        if not len(self):
            return self._left(stems)
        keys = [_key(stem) for stem in stems]
        found = set(keys) & self._entries.keys()
        numbers = [int(key) for key in self._entries if key.lstrip("-").isdigit()]
        counted = [number for stem in stems if (number := _number(stem)) is not None]
        places = counted if len(set(counted)) == len(stems) else list(range(len(stems)))  # by name, or the place in the clip
        if offset is not None:
            return (
                self._shift(dict(zip(places, keys)), offset, stems, "as asked with --image-id-offset")
                if offset
                else self._left(stems)
            )
        stray = self._entries.keys() - set(keys)
        if len(found) == len(set(keys)) or (found and not stray) or len(numbers) < len(self._entries) or not numbers:
            if not found:
                raise ProposalError(f"{self.path}: no proposals for these frames: image_id must be a frame's name such as "
                                    f"{stems[0]!r}, the file holds {self.image_ids[0]!r}")  # fmt: skip
            return self._left(stems)
        for names, how in ((dict(zip(places, keys)), ""), (dict(enumerate(keys)), " by their place in the clip")):
            lowest, highest = min(numbers), max(numbers)
            last = max(names) - highest
            shifts = sorted(shift for name in names if (shift := name - lowest) <= last)
            fitting = [shift for shift in shifts if all(number + shift in names for number in numbers)]
            if len(fitting) == 1:
                return self._shift(names, fitting[0], stems, f"no other constant brings every id to a frame{how}")
            if fitting:
                raise ProposalError(
                    f"{self.path}: image ids {lowest} to {highest} for frames {stems[0]} to {stems[-1]}: they are off by a constant, "
                    f"but {listed(fitting)} would all do; --image-id-offset N of dmm-fast segment says which is added to them "
                    f"(-1 for ids that count from 1, 0 to take them as they are)"
                )
        if not found:
            raise ProposalError(f"{self.path}: no proposals for these frames: image ids {min(numbers)} to {max(numbers)}, frames "
                                f"{stems[0]} to {stems[-1]}; image_id must be a frame's name or number (--image-id-offset N of dmm-fast segment is added to them)")  # fmt: skip
        return [
            *self._left(stems),
            f"{self.path.name}: if image ids count from another number than the frames, --image-id-offset N of dmm-fast segment is added to them",
        ]

    def _shift(self, names: dict[Any, str], offset: int, stems: list[str], why: str) -> list[str]:
        """Read image id n as the frame numbered n + offset."""
        numbers = {int(key): key for key in self._entries if key.lstrip("-").isdigit()}
        self._of = {key: numbers.get(number - offset, "") for number, key in names.items()}
        first = next((key for key in map(_key, stems) if self._of.get(key)), None)
        if first is None:
            raise ProposalError(f"{self.path}: with --image-id-offset {offset} no image id is that of a frame")
        stem = next(stem for stem in stems if _key(stem) == first)
        return [f"{self.path.name}: image ids do not count as the frames do; {offset:+d} is added to each ({why}): image id "
                f"{self._of[first]} is frame {stem}", *self._left(stems)]  # fmt: skip

    def _left(self, stems: list[str]) -> list[str]:
        """Frames without proposals, and image ids without a frame."""
        empty = [stem for stem in stems if self._name(stem) not in self._entries]
        used = {self._name(stem) for stem in stems}
        stray = [key for key in self._entries if key not in used]
        told = []
        if empty:
            told.append(f"{self.path.name}: no proposals for {len(empty)} of {len(stems)} frames: {listed(empty)}")
        if empty and _key(empty[0]) == "0" and "1" in self._entries and len(self) > 1 and not self._of:
            told[-1] += "; if image ids count from 1, give --image-id-offset -1"
        if stray:
            told.append(f"{self.path.name}: {len(stray)} of {len(self)} image ids are not those of a frame: {listed(stray)}")
        return told

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

    def _best(self, stem: str, top: int | None = None) -> list[dict]:
        """The frame's entries, best first."""
        entries = sorted(self._entries.get(self._name(stem), []), key=lambda entry: -entry["score"])
        return entries[: self.top if top is None else min(top, self.top)]

    def _read(
        self, stem: str, size: tuple[int, int] | None, top: int | None = None, least: float = -math.inf
    ) -> tuple[list[dict], list[tuple[np.ndarray, tuple[int, int]]]]:
        """The frame's entries, best first, and of each the run lengths and size of its mask."""
        entries = [entry for entry in self._best(stem, top) if entry["score"] >= least]
        codes: list[tuple[np.ndarray, tuple[int, int]]] = []
        texts = [_text(entry.get("segmentation")) for entry in entries]
        for entry, uncompressed in zip(entries, _uncompress(texts)):
            where = f"{self.path}, image_id {entry['image_id']!r}"
            codes.append(_run_lengths(entry.get("segmentation"), uncompressed, size, where))
            if codes[-1][1] != codes[0][1]:
                raise ProposalError(f"{where}: masks of different sizes, {codes[0][1]} and {codes[-1][1]}")
        return entries, codes

    def _boxes(self, entries: list[dict], codes: list[tuple[np.ndarray, tuple[int, int]]]) -> Tensor:
        """[M, 4]: those given, else tight ones."""
        boxes: list[Sequence[float]] = []
        for entry, (lengths, shape) in zip(entries, codes):
            given = _xyxy(entry.get("bbox"), f"{self.path}, image_id {entry['image_id']!r}")
            boxes.append(_tight_box(lengths, shape[0]) if given is None else given)
        return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _scores(entries: list[dict]) -> Tensor:
    return torch.tensor([entry["score"] for entry in entries], dtype=torch.float32)  # [M]


def _load(path: Path) -> list:
    """The entries of a file, those of a data set as results: each with the frame's file name as its image_id, and a score."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ProposalError(f"{path}: no such proposals file") from None
    except IsADirectoryError:
        raise ProposalError(f"{path}: a directory; proposals are one COCO file (JSON)") from None
    except UnicodeDecodeError:
        raise ProposalError(f"{path}: not a text file; proposals are a COCO file (JSON)") from None
    except json.JSONDecodeError as error:
        cut = "" if error.doc.rstrip().endswith(("]", "}")) else " (the file stops in the middle: was it written to the end?)"
        raise ProposalError(f"{path}: not valid JSON: {error}{cut}") from None
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        return _results_of(path, content)
    if not isinstance(content, list):
        raise ProposalError(
            f"{path}: a COCO file is a list of results, or a data set with images and annotations, got {_short(content)}"
        )
    return content


def _results_of(path: Path, dataset: dict) -> list[dict]:
    images = dataset.get("images")
    if not isinstance(images, list):
        kind = "a YouTube-VIS file" if "videos" in dataset else "a COCO data set"
        raise ProposalError(f"{path}: {kind} without 'images', which tell the frames of its annotations")
    named: dict[Any, str] = {}
    paths: dict[str, str] = {}  # by the frame they name
    for number, image in enumerate(images):
        if not isinstance(image, dict) or type(image.get("id")) not in (int, str):
            raise ProposalError(f"{path}: image {number} needs an id, got {_short(image)}")
        file = str(image.get("file_name", image["id"])).replace("\\", "/")
        named[image["id"]] = name = file.rpartition("/")[2]
        if (other := paths.setdefault(_key(name), file)) != file:
            raise ProposalError(f"{path}: {other} and {file} are the same frame of two videos; give one file per video")
    results = []
    for number, entry in enumerate(dataset["annotations"]):
        if not isinstance(entry, dict) or entry.get("image_id") not in named:
            raise ProposalError(
                f"{path}: annotation {number} needs the image_id of one of {len(named)} images, got {_short(entry)}"
            )
        score = 1.0 if entry.get("score") is None else entry["score"]
        results.append({**entry, "image_id": named[entry["image_id"]], "score": score})
    return results


def _number(stem: str) -> int | None:
    """The last number in a frame's name."""
    found = re.findall(r"\d+", stem)
    return int(found[-1]) if found else None


def _key(image_id: Any) -> str:
    """Frame stems and image ids meet here: 7, "7" and "00007" name the same frame; so do "a.jpg" and "a"."""
    text = str(image_id)
    stem, dot, suffix = text.rpartition(".")
    if dot and suffix.lower() in ("jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "ppm"):
        text = stem
    return str(int(text)) if text.isascii() and text.isdigit() else text


def _text(segmentation: Any) -> bytes:
    """The counts of a compressed RLE; of anything else nothing."""
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    return counts.encode(errors="surrogatepass") if isinstance(counts, str) else b""


def _check_mask(segmentation: Any, size: tuple[int, int] | None, where: str) -> None:
    """That it is of a kind that can be read, and of the frame's size where that is known."""
    if isinstance(segmentation, list) and segmentation:
        return
    shape = segmentation.get("size") if isinstance(segmentation, dict) and "counts" in segmentation else None
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 16 for n in shape)):
        raise ProposalError(f"{where}: needs a segmentation, polygons or {{size: [H, W], counts}}, got {_short(segmentation)}")
    if size is not None and tuple(shape) != tuple(size):
        raise ProposalError(f"{where}: masks are {shape[1]}x{shape[0]}, the frames are {size[1]}x{size[0]}")


def _run_lengths(
    segmentation: Any, uncompressed: np.ndarray | None, size: tuple[int, int] | None, where: str
) -> tuple[np.ndarray, tuple[int, int]]:
    """RLE (compressed text or a list of run lengths) or polygons -> run lengths int64, of 0 and 1 in turn, and (H, W).

    uncompressed: what `_uncompress` makes of the text, if it is one.
    """
    _check_mask(segmentation, size, where)
    if isinstance(segmentation, list):
        if size is None:
            raise ProposalError(f"{where}: polygons need the frame's size")
        return _polygon_runs(segmentation, size, where), size
    shape, counts = segmentation["size"], segmentation["counts"]
    if isinstance(counts, str):
        runs = uncompressed
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


def _uncompress(texts: list[bytes]) -> list[np.ndarray | None]:
    """COCO's compressed counts, of many masks at once -> run lengths, int64; None for a text that is none. Five bits a character,
    low bits first, bit 5 says more follow, the last character's bit 4 is the sign; from the fourth run on, each is stored less the
    run two before it.
    """
    found: list[np.ndarray | None] = [None] * len(texts)
    there = [number for number, text in enumerate(texts) if text]
    if not there:
        return found
    codes = np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.int64) - 48
    ends = np.cumsum([len(texts[number]) for number in there])
    begins = np.concatenate([[0], ends[:-1]])
    last = (codes & 32) == 0
    bad = (codes < 0) | (codes > 63)
    bad[ends - 1] |= ~last[ends - 1]
    last[ends - 1] = True
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes))))
    bad |= shift > 30
    shift = shift.clip(max=30)
    runs = np.add.reduceat((codes & 31) << shift, starts)
    runs -= np.where(codes[last] & 16, np.int64(32) << shift[last], 0)
    each = np.split(runs, np.add.reduceat(last, begins, dtype=np.int64).cumsum()[:-1])
    for number, wrong, own in zip(there, np.logical_or.reduceat(bad, begins), each):
        if not wrong:
            own[1::2] = own[1::2].cumsum()
            own[2::2] = own[2::2].cumsum()
            found[number] = own
    return found


def _polygon_runs(polygons: list, size: tuple[int, int], where: str) -> np.ndarray:
    from pycocotools import mask as coco

    for polygon in polygons:
        if not (isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 and all(map(_is_number, polygon))):
            raise ProposalError(f"{where}: a polygon is a list of x, y, x, y, ... of three points or more")
        if max(map(abs, polygon)) > FAR:  # which pycocotools does not survive
            raise ProposalError(f"{where}: a polygon reaches {max(polygon, key=abs):g} pixels far, which is no frame's size")
    (runs,) = _uncompress([coco.merge(coco.frPyObjects(polygons, *size))["counts"]])
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


PART = ".part"  # of a file that is not whole yet


class CocoWriter:
    """Writes a COCO results file frame by frame.

    Frames gather in PATH.part, one JSON line each, which becomes PATH when the writer closes without an error. After
    an interruption a writer for the same path goes on: ``writer.done`` holds the stems that need not be added again.

    whose: a text that tells whose proposals these are; a writer goes on from one with the same.
    """

    def __init__(self, path: str | os.PathLike, size: tuple[int, int], fresh: bool = False, whose: str = ""):
        self.path, self.size, self.whose = Path(path), (size[0], size[1]), whose
        self._part = self.path.with_name(self.path.name + PART)
        lines = [] if fresh else list(self._finished_lines())
        self.done = {json.loads(line)["stem"] for line in lines}
        self._part.write_text("".join(lines))
        self._file = self._part.open("a")

    def _finished_lines(self) -> Iterator[str]:
        """The lines of an earlier part file, less a last one that was cut."""
        if self._part.exists():
            for line in self._part.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    left = json.loads(line)
                    if left["size"] != list(self.size):
                        raise ProposalError(f"{self._part}: left by a run on frames of another size; delete it first")
                    if left.get("whose", self.whose) != self.whose:
                        raise ProposalError(
                            f"{self._part}: left by a run of {left['whose']}, this one is of {self.whose}; delete it first"
                        )
                    yield line

    def add(self, stem: str, proposals: Proposals) -> None:
        """Write the proposals of the frame called `stem`."""
        found = real(*checked(proposals, self.size))
        results = [_result(stem, *proposal) for proposal in zip(*full_masks(found, self.size))]
        self._file.write(json.dumps({"stem": stem, "size": self.size, "whose": self.whose, "results": results}) + "\n")
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

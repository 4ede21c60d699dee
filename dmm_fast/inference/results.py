"""What a run leaves beside its masks, one class per kind: ``dmm-fast segment --save``, the overlay and the contact sheet.

All are made from the frames and the masks on disk, in one pass after the last frame: so a run that was killed and resumed
gives the same files, and a finished run can be asked for more. A result gets one frame at a time and keeps none.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from dmm_fast.data.masks import read_ids
from dmm_fast.data.video import Behind, ImageFrames, VideoFrames, VideoWriter, alpha_suffix, prefetch
from dmm_fast.files import whole_file
from dmm_fast.inference.folder import SHEET, RunError, RunFolder
from dmm_fast.inference.overlay import ContactSheet, overlay
from dmm_fast.inference.report import remark

Frames = ImageFrames | VideoFrames


class Result:
    """One kind of result. As a context it ends whole, or leaves no half file behind an error."""

    needs_frame = True  # False: the masks are enough
    notes: list[str]

    def __init__(self) -> None:
        self.notes = []

    def add(self, index: int, frame: np.ndarray, ids: np.ndarray, row: dict[str, Any]) -> None:
        """The next frame, uint8 [H, W, 3], its ids, uint8 [H, W], and its row of the report."""
        raise NotImplementedError

    def __enter__(self) -> Result:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None: ...


class Binary(Result):
    """A black and white PNG per object and frame, OUT/binary/ID/FRAME.png: 255 is the object."""

    needs_frame = False

    def __init__(self, frames: Frames, folder: Path, report: dict[str, Any]):
        super().__init__()
        self._folders = {int(label): folder / "binary" / label for label in report["objects"]}

    def add(self, index: int, frame: np.ndarray, ids: np.ndarray, row: dict[str, Any]) -> None:
        for label, folder in self._folders.items():
            _save(folder / f"{row['frame']}.png", (ids == label) * np.uint8(255))


class Cutout(Result):
    """The objects without their background, a PNG with alpha per frame: OUT/cutout/FRAME.png."""

    def __init__(self, frames: Frames, folder: Path, report: dict[str, Any]):
        super().__init__()
        self._folder = folder / "cutout"

    def add(self, index: int, frame: np.ndarray, ids: np.ndarray, row: dict[str, Any]) -> None:
        inside = (ids > 0)[..., None]
        _save(self._folder / f"{row['frame']}.png", np.concatenate([frame * inside, inside * np.uint8(255)], 2))


class AlphaVideo(Result):
    """The objects without their background as a video: OUT/alpha.mov (ProRes 4444), or alpha.webm (VP9)."""

    MARGIN = 9  # pixels around the objects that keep their colour, so that no dark seam is blended in

    def __init__(self, frames: Frames, folder: Path, report: dict[str, Any]):
        super().__init__()
        self._writer = VideoWriter(folder / f"alpha{alpha_suffix()}", frames.size, frames.fps or 24, like=frames, alpha=True)

    def add(self, index: int, frame: np.ndarray, ids: np.ndarray, row: dict[str, Any]) -> None:
        near = ndimage.maximum_filter(ids, self.MARGIN)[..., None] > 0
        self._writer.write(np.concatenate([frame * near, (ids > 0)[..., None] * np.uint8(255)], 2))

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._writer.__exit__(kind, *rest)
        self.notes = [f"alpha video: {note}" for note in self._writer.notes]


class Overlay(Result):
    """A video of the frames with the masks drawn on them."""

    def __init__(self, frames: Frames, path: Path):
        super().__init__()
        self._writer = VideoWriter(path, frames.size, frames.fps or 24, like=frames)

    def add(self, index: int, frame: np.ndarray, ids: np.ndarray, row: dict[str, Any]) -> None:
        self._writer.write(overlay(frame, ids))

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._writer.__exit__(kind, *rest)
        self.notes = [f"overlay: {note}" for note in self._writer.notes]


class Sheet(Result):
    """A page of evenly spaced frames."""

    def __init__(self, frames: Frames, folder: Path, report: dict[str, Any]):
        super().__init__()
        count, length = len(report["objects"]), len(report["frames"])
        title = f"{frames.path.name}: {length} frames, {count} object{'s' * (count != 1)}"
        self._sheet, self._path = ContactSheet(length, frames.size, title), folder / SHEET
        self.wanted = self._sheet.wanted

    def add(self, index: int, frame: np.ndarray, ids: np.ndarray, row: dict[str, Any]) -> None:
        if index in self.wanted:
            self._sheet.add(frame, ids, row["frame"], remark(row), remark(row, short=True))

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self._sheet.save(self._path)


class Tracks(Result):
    """Every object's masks as run-length codes: OUT/tracks.json, a COCO data set whose annotations have a `track_id`, and
    OUT/tracks-youtube-vis.json, one annotation per object with lists over the frames.

    names: of the objects, each of which is then a category of its own.
    """

    needs_frame = False

    def __init__(self, frames: Frames, folder: Path, report: dict[str, Any], names: dict[int, str] | None = None):
        super().__init__()
        height, width = frames.size
        files = [file.name for file in frames.files] if isinstance(frames, ImageFrames) else [f"{s}.png" for s in frames.stems]
        named = dict(zip(frames.stems, files))
        shape = {"width": width, "height": height}
        rows = report["frames"]
        self._files = [named[row["frame"]] for row in rows]
        self._video = {"id": 1, "name": frames.path.stem, **shape, "length": len(rows)}
        self._named = names is not None
        categories = [{"id": label, "name": name} for label, name in (names or {1: "object"}).items()]
        self._head = {"categories": categories, "videos": [self._video]}
        self._images = (
            {"id": number, "file_name": name, **shape, "video_id": 1, "frame_index": number - 1}
            for number, name in enumerate(self._files, 1)
        )
        self._coco, self.youtube_vis = folder / "tracks.json", folder / "tracks-youtube-vis.json"
        self._means = {int(label): entry["mean_score"] for label, entry in report["objects"].items()}
        self._open = ExitStack()
        self._all, *spools = (self._open.enter_context(_spool(folder)) for _ in range(1 + len(self._means)))
        self._each = dict(zip(self._means, spools))

    def add(self, index: int, frame: np.ndarray | None, ids: np.ndarray, row: dict[str, Any]) -> None:
        from pycocotools import mask as coco

        scores = {entry["id"]: entry.get("score", 1.0) for entry in row["objects"]}
        for label, spool in self._each.items():
            mask = ids == label
            if not mask.any():
                spool.write("null\n")
                continue
            code = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            area, box = int(mask.sum()), [float(side) for side in coco.toBbox(code)]
            segmentation = {"size": list(mask.shape), "counts": code["counts"].decode()}
            spool.write(json.dumps([segmentation, box, area]) + "\n")
            annotation = {"image_id": index + 1, "track_id": label, **self._kind(label)}
            measures = {"bbox": box, "area": area, "score": scores.get(label), "segmentation": segmentation}
            self._all.write(json.dumps({**annotation, **measures}) + "\n")

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        with self._open:
            if kind is None:
                with whole_file(self._coco) as part, part.open("w") as file:
                    file.write(json.dumps(self._head)[:-1] + ',\n"images": [\n')
                    _join(file, map(json.dumps, self._images))
                    file.write('\n],\n"annotations": [\n')
                    _join(file, (f'{{"id": {number}, {line[1:]}' for number, line in enumerate(_lines(self._all), 1)))
                    file.write("\n]}\n")
                with whole_file(self.youtube_vis) as part, part.open("w") as file:
                    videos = [{**self._video, "file_names": self._files}]
                    file.write(json.dumps({**self._head, "videos": videos})[:-1] + ',\n"annotations": [\n')
                    for label in self._each:
                        self._write_object(file, label, last=label == [*self._each][-1])
                    file.write("]}\n")

    def _kind(self, label: int) -> dict[str, int]:
        return {"video_id": 1, "category_id": label if self._named else 1, "iscrowd": 0}

    def _write_object(self, file: IO[str], label: int, last: bool) -> None:
        """One annotation with three lists over the frames, each of which is read again from what was spooled."""
        shape = {name: self._video[name] for name in ("width", "height", "length")}
        head = {"id": label, **self._kind(label), "score": self._means[label], **shape}
        file.write(json.dumps(head)[:-1])
        for place, name in enumerate(("segmentations", "bboxes", "areas")):
            file.write(f', "{name}": [')
            found = (json.loads(line) for line in _lines(self._each[label]))
            _join(file, (json.dumps(entry and entry[place]) for entry in found))
            file.write("]")
        file.write("}\n" if last else "},\n")


KINDS: dict[str, Any] = {"binary": Binary, "cutout": Cutout, "alpha-video": AlphaVideo, "tracks": Tracks}


def check_overlay(video: Path, replace: bool, source: Path | None = None) -> None:
    """An overlay must not take the place of the clip, nor without being asked to that of another file."""
    if video.exists():
        if source is not None and video.samefile(source):
            raise RunError(f"{video}: is the clip itself; choose another name for the overlay")
        if not replace:
            raise RunError(f"{video}: is there already; --overwrite replaces it")


def check_kinds(save: list[str]) -> list[str]:
    """The kinds of results beside the masks, which are always written. Raises RunError for one that is not known or that
    cannot be made here."""
    for kind in save:
        if kind not in ("masks", *KINDS):
            raise RunError(f"--save {kind}: the kinds are masks, {', '.join(KINDS)}")
    if "alpha-video" in save and alpha_suffix() is None:
        raise RunError("--save alpha-video: this FFmpeg can write neither ProRes 4444 nor VP9; cutout gives PNGs with alpha")
    return [kind for kind in KINDS if kind in save]


def result_files(out: Path, report: dict[str, Any]) -> dict[str, Path]:
    """Where a run's results are, by kind."""
    names = {
        "binary": "binary/*/*.png",
        "cutout": "cutout/*.png",
        "alpha-video": f"alpha{alpha_suffix()}",
        "tracks": "tracks*.json",
    }
    return {kind: out / names[kind] for kind in report["results"]}


def write_results(
    frames: Frames,
    folder: RunFolder,
    report: dict[str, Any],
    kinds: list[str],
    video: Path | None = None,
    progress: bool = False,
) -> list[str]:
    """Make the results of a run whose masks are on disk: `kinds` of KINDS, the contact sheet, the overlay at `video`.

    -> what the user should know of them. Raises FramesError where a frame or a video cannot be read or written.
    """
    with ExitStack() as stack:
        sheet = Sheet(frames, folder.path, report)
        stack.enter_context(sheet)
        results: list[Result] = [stack.enter_context(KINDS[kind](frames, folder.path, report)) for kind in kinds]
        if video is not None:
            results.append(stack.enter_context(Overlay(frames, video)))
        every = any(result.needs_frame for result in results)
        pictures = (frame for _, frame in frames.read()) if every else _some(frames, sheet.wanted, len(report["frames"]))
        named = ", ".join([*kinds, *(["overlay"] if video else [])])
        rows = tqdm(report["frames"], desc=named, unit=" frames", disable=None if progress and results else True)
        behind = stack.enter_context(Behind())
        for index, (row, frame) in enumerate(zip(rows, prefetch(pictures))):
            wanted = [*results, sheet] if index in sheet.wanted else results
            if wanted:
                ids = read_ids(folder.mask(row["frame"]))
                for result in wanted:
                    behind(result.add, index, frame, ids, row)
    return [note for result in results for note in result.notes]


def _some(frames: Frames, wanted: set[int], count: int) -> Iterator[np.ndarray | None]:
    """The frames at these indices, None for the others."""
    picked = frames.pick(wanted)
    for index in range(count):
        yield next(picked)[2] if index in wanted else None


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        Image.fromarray(pixels).save(part, format="PNG", compress_level=4)


def _spool(folder: Path) -> IO[str]:
    return tempfile.TemporaryFile("w+", dir=folder)


def _lines(spool: IO[str]) -> Iterator[str]:
    spool.seek(0)
    return (line.rstrip("\n") for line in spool)


def _join(file: IO[str], parts: Iterator[str]) -> None:
    for number, part in enumerate(parts):
        file.write(",\n" * (number > 0) + part)

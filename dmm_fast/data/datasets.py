"""Data sets of annotated video on disk: DAVIS 2016 and 2017, YouTube-VOS, MOSE, LVOS, SegTrack v2, plain folders, stills, video
files.

``open_dataset(path)`` finds the layout. A data set lists videos by name; a video gives frames, object ids and proposals
by frame. What is missing or contradicts its layout raises a `DataError` that names the file and the rule.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dmm_fast.data.annotated import DataError, StillFrame, Video, VideoObject
from dmm_fast.data.masks import VOID, is_indexed
from dmm_fast.data.video import SUFFIXES, VIDEO_SUFFIXES, ImageFrames, VideoFrames, open_frames
from dmm_fast.files import listed
from dmm_fast.proposals.base import TOP

MASK_SUFFIXES = (".png", ".bmp")
OPEN_VIDEOS = 64  # kept open per data set: listings and proposals, no pixels
SPLIT_COUNTS = (3000, 200)  # videos of YouTube-VOS's train-train and train-val (Section 4.2 of the paper)


class VideoDataset:
    """Videos by name: ``len(dataset)``, ``dataset.names``, ``dataset.video(name)``, and iteration over the videos.

    path: the data set's folder. names: the videos to list, all by default. proposals: a folder with a COCO results file
    NAME.json for each video, of which a frame keeps the ``top`` best. partial: videos that a split lists and that are not there
    are listed all the same, and raise when they are opened. A layout defines ``find`` and ``open``.
    """

    layout = ""
    split: str | None = None

    def __init__(
        self,
        path: str | os.PathLike,
        names: Iterable[str] | None = None,
        *,
        proposals: str | os.PathLike | None = None,
        top: int = TOP,
        partial: bool = False,
    ):
        self.path, self.top, self.partial = Path(path), top, partial
        self.proposals = None if proposals is None else _folder(Path(proposals), "proposals")
        found = self.find()
        self.names = found if names is None else list(dict.fromkeys(names))
        if not partial and (unknown := sorted(set(self.names) - set(found))):
            raise DataError(f"{self.path}: the {self.layout} layout has no video {listed(unknown)} here, of {len(found)}")
        if not self.names:
            raise DataError(f"{self.path}: no video in the {self.layout} layout")
        self._open: OrderedDict[str, Video] = OrderedDict()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self):
        return map(self.video, self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} videos)"

    def video(self, name: str) -> Video:
        """Open a video; the last ones opened are kept."""
        if name not in self._open:
            if name not in self.names:
                raise DataError(f"{self.path}: no video {name!r} in this data set")
            self._open[name] = self.open(name)
            if len(self._open) > OPEN_VIDEOS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]

    def subset(self, names: Iterable[str]) -> VideoDataset:
        """The same data set with these videos only, in this order."""
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__, names=list(names), _open=OrderedDict())
        if unknown := sorted(set(part.names) - set(self.names)):
            raise DataError(f"{self.path}: no video {listed(unknown)} in this data set")
        return part

    def find(self) -> list[str]:
        """Names of all videos of the layout, sorted."""
        raise NotImplementedError

    def truth(self) -> Path | None:
        """The folder with a folder of masks per video; None where masks are kept otherwise."""
        return None

    def open(self, name: str) -> Video:
        raise NotImplementedError

    def _video(self, name: str, source: ImageFrames | VideoFrames, files: dict, **settings) -> Video:
        proposals = self.proposals and self.proposals / f"{name}.json"
        if proposals and not proposals.is_file():
            raise DataError(f"{proposals}: no proposals for video {name}; each video needs NAME.json there")
        return Video(name, source, files, proposals=proposals, top=self.top, **settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # workers open their own


class FolderDataset(VideoDataset):
    """``JPEGImages/<video>/*.jpg`` and ``Annotations/<video>/*.png``, names of frames alike; unannotated frames may be."""

    layout = "folder"
    merge = strict = False
    complete = False  # whether every video must have annotations
    late = True  # whether objects may come later than the first frame

    @property
    def images(self) -> Path:
        return self.path / "JPEGImages"

    @property
    def annotations(self) -> Path:
        return self.path / "Annotations"

    def find(self) -> list[str]:
        return _folders(_folder(self.images, "frames"))

    def open(self, name: str) -> Video:
        source, files = open_frames(self.images / name), _masks(self.annotations / name)
        if self.complete and not files:
            raise DataError(f"{self.annotations / name}: no masks; the {self.layout} layout has at least the first frame's")
        return self._video(name, source, files, merge=self.merge, strict=self.strict, late=self.late)

    def truth(self) -> Path | None:
        return self.annotations


class DavisDataset(FolderDataset):
    """DAVIS: ``JPEGImages/<resolution>/<video>``, the same for Annotations, and ``ImageSets/<year>/<split>.txt``.

    year: "2017" has an id for each object, "2016" one object (255, or all of 2017's). split: train, val, test-dev, ..
    resolution: 480p or Full-Resolution; by default the first that is there.
    """

    layout = "davis"
    complete = True
    late = False

    def __init__(
        self, path: str | os.PathLike, names: Iterable[str] | None = None, *, year: str = "2017", split: str | None = None,
        resolution: str | None = None, **settings,
    ):  # fmt: skip
        if year not in ("2016", "2017"):
            raise DataError(f"DAVIS is of the year 2016 or 2017, got {year!r}")
        self.year, self.split = year, split
        self.merge, self.strict = year == "2016", year == "2017"
        root = _folder(Path(path) / "JPEGImages", "frames")
        there = [part for part in ("480p", "Full-Resolution") if (root / part).is_dir()]
        self.resolution = resolution or (there or ["480p"])[0]
        if self.resolution not in there:
            raise DataError(f"{root / self.resolution}: no such directory; DAVIS keeps its frames in JPEGImages/480p")
        if names is None and split is not None:
            names = self._split(Path(path) / "ImageSets", year, split)
        super().__init__(path, names, **settings)

    def _split(self, sets: Path, year: str, split: str) -> list[str]:
        """2017 lists videos; 2016 lists "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png" by frame."""
        files = [sets / part / f"{split}.txt" for part in (year, *(("480p", "1080p") if year == "2016" else ()))]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            there = sorted({found.stem for part in files for found in part.parent.glob("*.txt")})
            raise DataError(f"{files[0]}: no such list of videos; DAVIS keeps its splits in ImageSets/{year}, {_there(there)}")
        lines = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
        return list(dict.fromkeys(Path(line).parent.name if "/" in line else line for line in lines))

    @property
    def images(self) -> Path:
        return self.path / "JPEGImages" / self.resolution

    @property
    def annotations(self) -> Path:
        return self.path / "Annotations" / self.resolution


class YouTubeVOSDataset(VideoDataset):
    """YouTube-VOS 2018 and 2019: ``<split>/{JPEGImages,Annotations}/<video>`` and ``<split>/meta.json``.

    split: train or valid; with the suffix _all_frames frames come from ``<split>_all_frames/JPEGImages``, annotations
    and meta.json from the split itself. train-train, train-val and train-test are the paper's parts of train, see
    `split_names`; seed and counts choose them. Objects, their first frames and categories are those of meta.json.
    """

    layout = "youtube-vos"

    def __init__(
        self, path: str | os.PathLike, names: Iterable[str] | None = None, *, split: str | None = None, seed: int = 0,
        counts: tuple[int, int] = SPLIT_COUNTS, **settings,
    ):  # fmt: skip
        root = Path(path)
        inside = (root / "meta.json").is_file()  # .../train itself, not its parent
        self.split = split = split or (root.name if inside else "train")
        whole, _, part = split.partition("-")
        base = whole.removesuffix("_all_frames")
        parent = root.parent if inside and root.name == base else root
        if not (parent / whole).is_dir():
            raise DataError(f"{parent / whole}: no such split, {_there(_parts(parent))}")
        self.images = _folder(parent / whole / "JPEGImages", "frames")
        self.annotations = _folder(parent / base / "Annotations", "annotations")
        self.dense = base == "train"
        self._meta_file = parent / base / "meta.json"
        self._meta = _read_meta(self._meta_file)
        if part:
            chosen = split_names(self._meta, part, seed, counts)
            names = chosen if names is None else list(names)
            if unknown := sorted(set(names) - set(chosen)):
                raise DataError(f"{root}: no video {listed(unknown)} in {split}, of {len(chosen)}")
        super().__init__(root, names, **settings)

    def find(self) -> list[str]:
        there = set(_folders(self.images))
        if not self.partial and (missing := sorted(set(self._meta) - there)):
            what = f"meta.json lists {len(self._meta)} videos, {len(missing)} of them have no frames"
            raise DataError(f"{self.images / missing[0]}: no such directory: {what}")
        return sorted(self._meta)

    def open(self, name: str) -> Video:
        video = self._video(name, open_frames(self.images / name), _masks(self.annotations / name), strict=True,
                            dense=self.dense)  # fmt: skip
        index, annotated = {stem: i for i, stem in enumerate(video.stems)}, set(video.annotated)
        objects = []
        for number, entry in self._meta[name].items():
            where = f"{self._meta_file}: video {name}, object {number}"
            if not (number.isdecimal() and 0 < int(number) < VOID):
                raise DataError(f"{where}: an object's id is a number in 1..{VOID - 1}")
            frames = entry.get("frames") if isinstance(entry, dict) else None
            if not (isinstance(frames, list) and frames):
                raise DataError(f"{where}: needs frames, the list of the frames it is seen in")
            if missing := [stem for stem in frames if stem not in index]:
                raise DataError(f"{where}: frame {missing[0]} is not in {self.images / name}")
            if self.dense and (bare := [stem for stem in frames if index[stem] not in annotated]):
                raise DataError(f"{self.annotations / name / bare[0]}.png: no such mask, and {where} is seen in that frame")
            objects.append(VideoObject(int(number), min(index[stem] for stem in frames), entry.get("category")))
        video.objects = sorted(objects)
        wanted = {stem for entry in self._meta[name].values() for stem in entry["frames"]}
        video.scored = [stem for stem in video.stems if stem in wanted]
        return video

    def truth(self) -> Path | None:
        return self.annotations


class SplitsDataset(FolderDataset):
    """A folder per split, each with ``JPEGImages/<video>`` and ``Annotations/<video>``; the path of one, or of their parent.

    split: the name of the folder; it may be left out where there is one.
    """

    strict = complete = True

    def __init__(self, path: str | os.PathLike, names: Iterable[str] | None = None, *, split: str | None = None, **settings):
        root = Path(path)
        if (root / "JPEGImages").is_dir() and split in (None, root.name):
            root, split = root.parent, root.name
        parts = _parts(root)
        if split is None and len(parts) == 1:
            split = parts[0]
        if split not in parts:
            wrong = f"{root}: which split?" if split is None else f"{root / split}: no such split,"
            raise DataError(f"{wrong} {_there(parts)}")
        self.split = split
        super().__init__(root / split, names, **settings)


class MoseDataset(SplitsDataset):
    """MOSE: ``<split>/{JPEGImages,Annotations}/<video>``; of the splits valid and test the first masks alone."""

    layout = "mose"


class LvosDataset(SplitsDataset):
    """LVOS: ``<split>/{JPEGImages,Annotations}/<video>`` and ``<split>/<split>_meta.json`` or ``<split>/meta.json``, if any.

    Objects and their first frames are those of that file; without it all masks are read to find them.
    """

    layout = "lvos"

    def __init__(self, path: str | os.PathLike, names: Iterable[str] | None = None, **settings):
        self._meta: dict[str, dict[str, Any]] = {}
        super().__init__(path, names, **settings)
        if files := [file for file in _metas(self.path) if _has_ranges(file)]:
            self._meta_file = files[0]
            self._meta = _read_meta(files[0])

    def open(self, name: str) -> Video:
        video = super().open(name)
        if name in self._meta:
            index = {int(stem): i for i, stem in enumerate(video.stems) if stem.isdecimal()}
            objects = []
            for number, entry in self._meta[name].items():
                where = f"{self._meta_file}: video {name}, object {number}"
                if not (number.isdecimal() and 0 < int(number) < VOID):
                    raise DataError(f"{where}: an object's id is a number in 1..{VOID - 1}")
                try:
                    start = int(entry["frame_range"]["start"])
                except (KeyError, TypeError, ValueError):
                    raise DataError(f"{where}: needs frame_range with its start, the number of a frame") from None
                if start not in index:
                    raise DataError(f"{where}: frame {start} is not in {self.images / name}")
                objects.append(VideoObject(int(number), index[start], None))
            video.objects = sorted(objects)
        return video


def split_names(names: Iterable[str], part: str, seed: int = 0, counts: tuple[int, int] = SPLIT_COUNTS) -> list[str]:
    """The "train", "val" or "test" part of a training split: counts[0], counts[1] videos and the rest, sorted.

    Videos are ordered by a hash of seed and name, so the parts are the same with any release of Python and NumPy.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    train, val = counts
    if train + val > len(ordered):
        raise DataError(f"parts of {train} and {val} videos need {train + val}, the data set has {len(ordered)}; set counts")
    parts = {"val": ordered[:val], "train": ordered[val : val + train], "test": ordered[val + train :]}
    if part not in parts:
        raise DataError(f"the parts of train are train-train, train-val and train-test, got train-{part}")
    return sorted(parts[part])


def _metas(folder: Path) -> list[Path]:
    """``meta.json``, ``valid_meta.json``: files that list the objects of a split's videos."""
    return sorted(folder.glob("*meta.json")) if folder.is_dir() else []


def _has_ranges(file: Path) -> bool:
    """Whether a file of objects is LVOS's: it tells the range of frames in which each is seen, YouTube-VOS's lists the frames."""
    with file.open(errors="replace") as text:
        return "frame_range" in text.read(4096)


def _read_meta(file: Path) -> dict[str, dict[str, Any]]:
    """Objects of each video by id."""
    try:
        videos = json.loads(file.read_bytes())["videos"]
        return {name: video["objects"] for name, video in videos.items()}
    except FileNotFoundError:
        raise DataError(f"{file}: no such file; YouTube-VOS lists its videos and objects there") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: needs {{videos: {{NAME: {{objects: ..}}}}}} ({type(error).__name__}: {error})") from None


class SegTrackDataset(VideoDataset):
    """SegTrack v2: ``JPEGImages/<video>`` and ``GroundTruth/<video>``, or ``GroundTruth/<video>/<1..n>``; png, bmp or both.

    split: the name of a list ``ImageSets/<split>.txt`` (its names start with "*"); all videos by default.
    """

    layout = "segtrack"

    def __init__(self, path: str | os.PathLike, names: Iterable[str] | None = None, *, split: str | None = None, **settings):
        if names is None and split is not None:
            file = Path(path) / "ImageSets" / f"{split}.txt"
            if not file.is_file():
                raise DataError(
                    f"{file}: no such list of videos, {_there(sorted(one.stem for one in file.parent.glob('*.txt')))}"
                )
            self.split = split
            names = [name for line in file.read_text().splitlines() if (name := line.strip().lstrip("*"))]
        super().__init__(path, names, **settings)

    def find(self) -> list[str]:
        return _folders(_folder(self.path / "JPEGImages", "frames"))

    def truth(self) -> Path | None:
        return self.path / "GroundTruth"

    def open(self, name: str) -> Video:
        source = open_frames(self.path / "JPEGImages" / name)
        folder = _folder(self.path / "GroundTruth" / name, "masks")
        parts = sorted((part for part in _folders(folder) if part.isdecimal()), key=int)
        if not parts:
            files = _masks(folder)
            if files and is_indexed(next(iter(files.values()))[0]):
                return self._video(name, source, files)
            return self._video(name, source, files, binary=True)
        if parts != [str(number + 1) for number in range(len(parts))]:
            raise DataError(f"{folder}: instance folders are named 1..n, got {listed(parts)}")
        masks = [_masks(folder / part) for part in parts]
        for part, other in zip(parts, masks):
            if odd := sorted(set(other) ^ set(masks[0])):
                raise DataError(f"{folder / part}: frame {odd[0]} is in one of the folders 1 and {part} only; both need all")
        return self._video(name, source, {stem: [mask[stem][0] for mask in masks] for stem in masks[0]}, binary=True)


class StillsDataset(VideoDataset):
    """Images with masks, ``JPEGImages/*.jpg`` and ``Annotations/*.png``, as videos of one frame."""

    layout = "stills"

    def find(self) -> list[str]:
        self._images = _by_stem(_folder(self.path / "JPEGImages", "images"), SUFFIXES)
        return sorted(self._images)

    def open(self, name: str) -> Video:
        mask = _by_stem(self.path / "Annotations", MASK_SUFFIXES).get(name)
        if mask is None:
            raise DataError(f"{self.path / 'Annotations' / name}.png: no mask for {self._images[name]}")
        return self._video(name, StillFrame(self._images[name]), {name: [mask]})


class VideoFilesDataset(VideoDataset):
    """Video files ``<video>.mp4`` in a folder, or one file, with ``Annotations/<video>/00000.png`` beside them, if any."""

    layout = "video"

    def find(self) -> list[str]:
        self._files = {self.path.stem: [self.path]} if self.path.is_file() else _all_by_stem(self.path, VIDEO_SUFFIXES)
        return sorted(self._files)

    def truth(self) -> Path | None:
        return (self.path.parent if self.path.is_file() else self.path) / "Annotations"

    def open(self, name: str) -> Video:
        file, *others = self._files[name]
        if others:
            raise _same_name(others[0], file)
        return self._video(name, open_frames(file), _masks(file.parent / "Annotations" / name))


# ------------------------------------------------------------------------------------------------------- what is where

LAYOUTS = {
    "davis2016": DavisDataset, "davis2017": DavisDataset, "youtube-vos": YouTubeVOSDataset, "mose": MoseDataset,
    "lvos": LvosDataset, "segtrack": SegTrackDataset, "folder": FolderDataset, "stills": StillsDataset, "video": VideoFilesDataset,
}  # fmt: skip


def open_dataset(
    path: str | os.PathLike,
    layout: str = "auto",
    *,
    split: str | None = None,
    names: Iterable[str] | None = None,
    proposals: str | os.PathLike | None = None,
    top: int = TOP,
    **settings,
) -> VideoDataset:
    """Open a data set.

    layout: one of `LAYOUTS`, or "auto". split: the data set's own (train, val, valid, train-train, ..), where it has any.
    names: videos to list. proposals: a folder of NAME.json, COCO results. settings: further ones of the layout's class,
    such as DAVIS's resolution.

    Raises DataError where the path has none of the layouts, and whatever the layout checks.
    """
    path = Path(path)
    layout = find_layout(path) if layout == "auto" else layout
    if layout not in LAYOUTS:
        raise DataError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout.startswith("davis"):
        settings["year"] = layout.removeprefix("davis")
    if split is not None:
        if layout in ("folder", "stills", "video"):
            raise DataError(f"{path}: the {layout} layout has no splits, got {split!r}; choose videos with names=[..]")
        settings["split"] = split
    return LAYOUTS[layout](path, names, proposals=proposals, top=top, **settings)


def find_layout(path: Path) -> str:
    """The layout of a folder, by what lies in it."""
    images = path / "JPEGImages"
    if path.is_file() or (path.is_dir() and not images.is_dir() and _all_by_stem(path, VIDEO_SUFFIXES)):
        return "video"
    metas = [file for folder in (path, *(path / part for part in _parts(path))) for file in _metas(folder)]
    if any(file.name == "meta.json" and not _has_ranges(file) for file in metas):
        return "youtube-vos"
    if any(map(_has_ranges, metas)):
        return "lvos"
    if not images.is_dir() and _parts(path):
        return "mose"
    if (path / "GroundTruth").is_dir() and images.is_dir():
        return "segtrack"
    if (images / "480p").is_dir() or (images / "Full-Resolution").is_dir():
        return "davis2017" if (path / "ImageSets" / "2017").is_dir() else "davis2016"
    if images.is_dir():
        return "folder" if _folders(images) else "stills"
    if not path.exists():
        raise DataError(f"{path}: no such directory")
    inside = listed(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise DataError(f"{path}: no known layout: it holds {inside}; expected JPEGImages and Annotations, or video files")


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise DataError(f"{path}: no such directory; the {what} are expected there")
    return path


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != ".")


def _parts(path: Path) -> list[str]:
    """Folders that have frames in a folder of their own: splits."""
    return [name for name in _folders(path) if (path / name / "JPEGImages").is_dir()] if path.is_dir() else []


def _there(names: list[str]) -> str:
    return f"there: {listed(names)}" if names else "and there is none"


def _all_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Files by stem; none where there is no such folder."""
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix.lower() in suffixes and file.name[0] != ".":
            files.setdefault(file.stem, []).append(file)
    return files


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The same where no two may have one name."""
    files = _all_by_stem(folder, suffixes)
    for first, *others in files.values():
        if others:
            raise _same_name(others[0], first)
    return {stem: found[0] for stem, found in files.items()}


def _same_name(file: Path, other: Path) -> DataError:
    return DataError(f"{file}: the same name as {other.name}; one of them must go")


def _masks(folder: Path) -> dict[str, list[Path]]:
    return {stem: [file] for stem, file in _by_stem(folder, MASK_SUFFIXES).items()}

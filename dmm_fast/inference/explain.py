"""Why a run failed: for each object and frame, how far the proposals, the match and the refinement each miss the truth.

In a frame where an object is followed and visible, its loss 1 - J splits into three parts, with J the IoU of the result's mask:

- recall, 1 - best: no proposal is better than that; best is the highest IoU of a proposal with the truth
- matching, best - matched: another proposal was taken, or none; matched is the IoU of the one taken, 0 where the object was lost
- refinement, matched - J: what the refined mask loses against the proposal; negative where it gains

Frames in which an object was given say nothing of the run and are left out. Without ground truth there are the scores, the
spans in which an object was lost, and likely switches.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dmm_fast.data.masks import MaskWarning, read_ids, read_mask
from dmm_fast.data.video import FramesError, ImageFrames, VideoFrames, open_frames
from dmm_fast.evaluation import held, jaccard
from dmm_fast.files import digest, whole_file
from dmm_fast.inference.folder import FILES, REPORT, UNFINISHED
from dmm_fast.inference.proposing import Live, proposal_source
from dmm_fast.inference.report import sharing
from dmm_fast.inference.run import config_of
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.model import Proposals
from dmm_fast.ops.vision import mask_iou
from dmm_fast.proposals.base import full_masks
from dmm_fast.proposals.coco import read_coco
from dmm_fast.proposals.sources import open_proposer, split

GONE = 0.1  # J below which a visible object counts as lost, whatever the run believed
JUMP = 0.25  # IoU of a mask with that of the frame before, below which it may lie on another object: docs/explain.md says how often it does
COLUMNS = ("object", "frames", "J", "recall", "matching", "refinement", "switches", "likely switches", "lost", "not followed",
           "extra", "score", "margin")  # fmt: skip
LOSSES = ("recall", "matching", "refinement")  # the parts of 1 - J
RARE = ("not followed", "extra")  # left out where they are 0 for all objects
AT_ONCE = 8  # proposals that are held as whole masks

Propose = Callable[[str, Any], Proposals]  # of a frame by its name, and the frame where the source is a detector


class ExplainError(ValueError):
    """A run that cannot be explained as asked."""


class Span(NamedTuple):
    """Frames first to last, by index, both included."""

    first: int
    last: int


class Switch(NamedTuple):
    """In this frame, by index, the mask of an object went over to another object; 0: to which is not known."""

    frame: int
    to: int


@dataclass
class Track:
    """One object through the T frames of a run. Figures are NaN in frames where there is nothing to say.

    given, followed, lost, backward, shared: bool [T]. followed: matched in this frame, not given. shared: with the proposal of
    another object. score, runner_up: of the match. steady: IoU of the mask with that of the frame before. area, truth:
    pixels of the result's and of the true mask. best, matched, j: IoU with the truth, see the module. taken, choice: int [T], which
    proposal was matched, and which is the best, -1 for none. holds: int [T], on which true object the mask lies, 0 for none.
    """

    id: int
    given: np.ndarray
    followed: np.ndarray
    lost: np.ndarray
    backward: np.ndarray
    shared: np.ndarray
    score: np.ndarray
    runner_up: np.ndarray
    steady: np.ndarray
    area: np.ndarray
    truth: np.ndarray
    best: np.ndarray
    matched: np.ndarray
    j: np.ndarray
    taken: np.ndarray
    choice: np.ndarray
    holds: np.ndarray

    @classmethod
    def empty(cls, label: int, length: int) -> Track:
        def filled(names: str, value: float, kind: type) -> dict[str, np.ndarray]:
            return {name: np.full(length, value, kind) for name in names.split()}

        figures = filled("score runner_up steady area truth best matched j", np.nan, float)
        flags = filled("given followed lost backward shared", False, bool)
        return cls(label, **flags, **figures, **filled("taken choice", -1, int), **filled("holds", 0, int))

    @property
    def margin(self) -> np.ndarray:
        """By how much the match was better than the next proposal; negative where the layer decided against the row's best."""
        return self.score - self.runner_up

    @property
    def scored(self) -> np.ndarray:
        """Frames that count: followed, and visible in the truth."""
        return self.followed & (self.truth > 0)

    @property
    def split(self) -> dict[str, float]:
        """The mean loss 1 - J and its parts over the scored frames; without proposals the loss alone, without such frames nothing."""
        at = self.scored
        if not at.any():
            return {}
        parts = {
            "loss": 1 - self.j,
            "recall": 1 - self.best,
            "matching": self.best - self.matched,
            "refinement": self.matched - self.j,
        }
        return {name: float(part[at].mean()) for name, part in parts.items() if not np.isnan(part[at]).any()}

    @property
    def known(self) -> bool:
        """Whether there is any truth of it."""
        return bool(np.isfinite(self.truth).any())

    @property
    def switches(self) -> list[Switch]:
        """Where the mask goes from one true object to another, its own at first, as `evaluation.switches` counts them; a mask that
        is given puts it right."""
        found, on = [], self.id
        for frame in np.flatnonzero(self.given | (self.holds > 0)):
            if self.given[frame]:
                on = self.id
            elif self.holds[frame] != on:
                on = int(self.holds[frame])
                found.append(Switch(int(frame), on))
        return found

    @property
    def likely_switches(self) -> list[Switch]:
        """Where the mask may have gone over to something else, judged without the truth: in the first frame of each run in which it
        hardly overlaps the mask before (see `JUMP`), or is also that of another object."""
        with np.errstate(invalid="ignore"):
            jumps = self.followed & ~self.lost & ((self.steady < JUMP) | self.shared)
        return [Switch(span.first, 0) for span in spans(jumps)]

    @property
    def lost_spans(self) -> list[Span]:
        """Runs of frames in which nothing was matched, or in which the mask is off the visible object."""
        with np.errstate(invalid="ignore"):
            return spans(self.lost | (self.scored & (self.j < GONE)))

    @property
    def left(self) -> np.ndarray:
        """Frames in which the object is visible and the run does not follow it, bool [T]."""
        return (self.truth > 0) & ~self.followed & ~self.given

    @property
    def extra(self) -> np.ndarray:
        """Frames in which the object is not visible and the run has a mask of it, bool [T]."""
        return (self.truth == 0) & (self.area > 0) & self.followed

    @property
    def figures(self) -> dict[str, Any]:
        """What the table says of the object."""
        found = self.followed & ~self.lost
        named = {"switches": len(self.switches)} if self.known else {"likely switches": len(self.likely_switches)}
        return {
            "object": self.id,
            "frames": int((self.scored if self.known else self.followed).sum()),
            **({"J": 1 - self.split["loss"], **self.split} if self.split else {}),
            **named,
            "lost": sum(last - first + 1 for first, last in self.lost_spans),
            **({"not followed": int(self.left.sum()), "extra": int(self.extra.sum())} if self.known else {}),
            "score": float(self.score[found].mean()) if found.any() else None,
            "margin": float(self.margin[found].mean()) if found.any() else None,
        }


def spans(wanted: np.ndarray) -> list[Span]:
    """Runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wanted.astype(np.int8), [0]])))
    return [Span(int(first), int(end) - 1) for first, end in edges.reshape(-1, 2)]


@dataclass
class Explanation:
    """All figures of a run. compared: the frames that ground truth was there for, by index; proposals: whether those were read."""

    run: Path
    settings: dict[str, Any]
    stems: list[str]
    size: tuple[int, int]
    tracks: list[Track]
    joins: list[dict[str, Any]]
    compared: list[int] | None
    proposals: bool
    notes: list[str]
    source: Source = field(repr=False)

    def table(self) -> str:
        """Plain text: a line per object, then their means, and what the losses are."""
        rows = [track.figures for track in self.tracks]
        if len(rows) > 1 and self.means:
            rows.append({"object": "mean", **self.means})
        names = columns(rows)
        cells = [list(map(heading, names)), *([_cell(row.get(name)) for name in names] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
        if "recall" in names:
            lines.append("(recall, matching and refinement loss add up to 1 - J: less is better, below 0 is a gain)")
        return "\n".join(lines)

    @property
    def means(self) -> dict[str, float]:
        """J, its loss and the parts of that, as means over the objects that have them."""
        rows = [track.figures for track in self.tracks]
        names = ("J", "loss", "recall", "matching", "refinement")
        return {name: float(np.mean(values)) for name in names if (values := [row[name] for row in rows if name in row])}

    def to_json(self, path: str | os.PathLike, advice: Sequence[Any] = ()) -> None:
        """Everything: a row per object, and its figures of every frame, null where there is nothing to say; and the advice, dataclasses."""
        per_frame = []
        for track in self.tracks:
            lists = {name: _plain(getattr(track, name)) for name in (*Track.__dataclass_fields__, "margin") if name != "id"}
            marks = {
                "switches": [[self.stems[at], to] for at, to in track.switches],
                "likely_switches": [self.stems[at] for at, _ in track.likely_switches],
                "lost_spans": [[self.stems[first], self.stems[last]] for first, last in track.lost_spans],
            }
            per_frame.append({"object": track.id, **marks, **lists})
        content = {
            "run": str(self.run), "settings": self.settings, "notes": self.notes, "joins": self.joins,
            "compared": None if self.compared is None else [self.stems[at] for at in self.compared],
            "advice": [asdict(one) for one in advice], "mean": self.means,
            "per_object": [track.figures for track in self.tracks], "frames": self.stems, "per_frame": per_frame,
        }  # fmt: skip
        with whole_file(path) as part:
            part.write_text(json.dumps(content) + "\n")


def columns(rows: list[dict[str, Any]]) -> list[str]:
    """The columns of a table: those that say something of an object."""
    return [name for name in COLUMNS if any(row.get(name) is not None and (row[name] or name not in RARE) for row in rows)]


def heading(name: str) -> str:
    """What a table calls a column."""
    return f"{name} loss" if name in LOSSES else name


def _cell(value: Any) -> str:
    return "" if value is None else f"{round(value, 3) + 0.0:.3f}" if isinstance(value, float) else str(value)


def _plain(values: np.ndarray) -> list[Any]:
    if values.dtype != float:
        return values.tolist()
    return [None if np.isnan(value) else round(value, 6) for value in values.tolist()]


class Source:
    """What a run was made from, to be read again: frames, ground truth, results and proposals, a frame at a time."""

    def __init__(self, run: Path, report: dict[str, Any], gt: Path | None, frames: Path):
        self.run, self.size = run, (int(report["size"][0]), int(report["size"][1]))
        self.stems: list[str] = [row["frame"] for row in report["frames"]]
        self.place = {stem: index for index, stem in enumerate(self.stems)}
        self._frames = frames
        self._truth = {} if gt is None else {stem: file for stem, file in _pngs(gt).items() if stem in self.place}
        if gt is not None and not self._truth:
            raise ExplainError(f"{gt}: no PNG has the name of a frame of the run ({self.stems[0]}.png to {self.stems[-1]}.png); "
                               "ground truth is a folder of id maps named like the frames")  # fmt: skip
        self.propose: Propose | None = None
        self.live = False

    @cached_property
    def frames(self) -> ImageFrames | VideoFrames:
        path = self._frames
        try:
            frames = open_frames(path)
        except FramesError as error:
            raise ExplainError(f"the run's frames cannot be read ({error}); name them with --frames") from None
        if frames.size != self.size:
            width, height = frames.size[::-1]
            raise ExplainError(f"{path}: the frames are {width}x{height}, the run's were {self.size[1]}x{self.size[0]}")
        if missing := sorted(set(self.stems) - set(frames.stems)):
            raise ExplainError(
                f"{path}: {len(missing)} of the run's {len(self.stems)} frames are not there, the first is {missing[0]}"
            )
        return frames

    def pick(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """(index, frame), rising."""
        wanted = {self.stems[at]: at for at in indices}
        places = {place: wanted[stem] for place, stem in enumerate(self.frames.stems) if stem in wanted}
        for place, _, frame in self.frames.pick(places):
            yield places[place], frame

    @property
    def compared(self) -> list[int]:
        return sorted(self.place[stem] for stem in self._truth)

    def truth(self, index: int) -> np.ndarray | None:
        """Ids uint8 [H, W], void as background; None where there is no ground truth."""
        file = self._truth.get(self.stems[index])
        if file is None:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaskWarning)
            return read_mask(file, self.size)

    def result(self, index: int) -> np.ndarray:
        file = self.run / f"{self.stems[index]}.png"
        if not file.exists():
            raise ExplainError(f"{file}: the run's mask of this frame is gone; segment the clip again")
        return read_ids(file)

    def masks(self, index: int, frame: np.ndarray | None) -> Iterator[Tensor]:
        """The masks of a frame's proposals in the order in which the run had them, bool [up to AT_ONCE, H, W]."""
        assert self.propose is not None
        found = self.propose(self.stems[index], frame)
        for first in range(0, len(found.scores), AT_ONCE):
            yield full_masks(Proposals(*(part[first : first + AT_ONCE] for part in found)), self.size)[2]

    def some_masks(self, index: int, frame: np.ndarray, wanted: set[int]) -> dict[int, np.ndarray]:
        """These of a frame's proposals, bool [H, W] each, by their number."""
        found: dict[int, np.ndarray] = {}
        for part, masks in enumerate(self.masks(index, frame)):
            found |= {n: masks[n - part * AT_ONCE].numpy() for n in wanted if n // AT_ONCE == part}
        return found


def explain(
    run: str | os.PathLike,
    gt: str | os.PathLike | None = None,
    *,
    frames: str | os.PathLike | None = None,
    proposals: str | os.PathLike | None = None,
    use_proposals: bool = True,
    device: str = "cpu",
    progress: bool = False,
) -> Explanation:
    """Take a finished run apart.

    run: the folder of `segment`. gt: PNGs of ids, named like the frames; not every frame needs one. frames, proposals: where those of the
    run are now, if they were moved. use_proposals: False leaves out the split into recall and matching. A run with a live detector
    runs it again, on `device`, in the frames that have ground truth.

    Raises ExplainError, FramesError, MaskError or ProposalError for what cannot be used.
    """
    folder = Path(run)
    report = _report(folder)
    settings = report["settings"]
    source = Source(folder, report, None if gt is None else Path(gt), Path(frames or settings["frames"]))
    notes: list[str] = []
    if gt is not None and use_proposals:
        notes += _open_proposals(source, settings, proposals or settings["proposals"], device)
    tracks = [_told(int(label), report["frames"]) for label in report["objects"]]
    _look(source, tracks, progress)
    if gt is not None:
        notes += _check_objects(Path(gt), source, tracks)
    return Explanation(
        folder, settings, source.stems, source.size, tracks, report.get("joins", []),
        source.compared if gt is not None else None, source.propose is not None, notes, source,
    )  # fmt: skip


def _report(run: Path) -> dict[str, Any]:
    if (run / UNFINISHED).exists():
        raise ExplainError(f"{run}: the run is not finished; repeat its command with --resume")
    try:
        report = json.loads((run / REPORT).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ExplainError(f"{run}: no {REPORT} here; give the folder that dmm-fast segment has written (its --out)") from None
    except ValueError:
        report = None
    if not isinstance(report, dict) or not {"settings", "size", "objects", "frames"} <= report.keys() or not report["frames"]:
        raise ExplainError(f"{run / REPORT}: not the report of a run of dmm-fast segment")
    return report


def _pngs(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ExplainError(f"{folder}: no such directory; ground truth is a folder of PNGs named like the frames")
    return {file.stem: file for file in folder.iterdir() if file.suffix.lower() == ".png" and file.name[0] != "."}


def _open_proposals(source: Source, settings: dict[str, Any], where: str | os.PathLike, device: str) -> list[str]:
    """Open the run's proposals once more; -> what the user should know of them."""
    detector, files = split(where)
    was = settings.get(FILES, {})  # digests
    for file in files:
        if not Path(file).exists():
            raise ExplainError(
                f"{file}: the run's proposals are gone; name them with --proposals, or leave them out (--no-proposals)"
            )
    for file in [*files, *filter(None, (detector, detector and settings["weights"]))]:
        if was and Path(file).is_file() and digest(Path(file)) not in was.values():
            raise ExplainError(
                f"{file}: is not the file that this run read; give that one, or leave proposals out (--no-proposals)"
            )
    weights, precision = settings["detector_weights"] or "DEFAULT", settings["precision"]
    if not detector and len(files) == 1:
        opened = read_coco(files[0])
        source.propose = lambda stem, frame: opened.runs(stem, source.size)
        return opened.align(source.stems, settings["image_id_offset"])
    if files:
        source.propose, notes = proposal_source(
            where, weights, settings["image_id_offset"], source.frames, device, precision=precision
        )
        source.live = True
        return notes
    live = Live(open_proposer(where, weights, device=device, precision=precision))
    if settings["online"] and live.learns:
        return [f"the detector {where} learnt the first frame in this run (--online) and was not kept, so its proposals cannot be found "
                "again: the loss is not split"]  # fmt: skip
    segmenter = Segmenter(
        config_of(settings["preset"], settings["backbone"]), weights=settings["weights"],
        short_side=settings.get("short_side"), refine=settings["refine"], matcher=settings["matcher"], decision=settings["decision"],
        precision=settings["precision"], device=device, graph=False, proposer=live.proposer,
    )  # fmt: skip
    source.propose, source.live = lambda stem, frame: segmenter.propose(frame), True
    told = [
        f"the proposals are those that the detector {where} finds now, in the {len(source.compared)} frames with ground truth"
    ]
    if settings.get("device", device).split(":")[0] != device.split(":")[0]:
        told[0] += f"; the run's were found on {settings['device']} and may differ a little"
    return told


def _told(label: int, rows: list[dict[str, Any]]) -> Track:
    """What the report says of an object."""
    track = Track.empty(label, len(rows))
    for index, row in enumerate(rows):
        for entry in row["objects"]:
            if entry["id"] != label:
                continue
            track.given[index] = "given" in entry
            track.backward[index] = entry.get("direction") == "backward"
            if "given" not in entry:
                track.followed[index], track.lost[index] = True, entry["lost"]
                track.shared[index] = label in sharing(row)
                track.taken[index] = -1 if entry["proposal"] is None else entry["proposal"]
                if not entry["lost"]:
                    track.score[index], track.runner_up[index] = entry["score"], entry["runner_up"]
    return track


def _look(source: Source, tracks: list[Track], progress: bool) -> None:
    """Read every frame's masks, and where there is ground truth compare with it; one frame is held at a time."""
    frames = iter(source.pick(source.compared)) if source.live else iter(())
    before: np.ndarray | None = None
    bar = tqdm(range(len(source.stems)), desc="detecting" if source.live else "reading", unit=" frames", delay=1,
               disable=None if progress else True)  # fmt: skip
    for index in bar:
        ids = source.result(index)
        if ids.shape != source.size:
            raise ExplainError(f"{source.run / source.stems[index]}.png: not of the run's size; was it replaced?")
        for track in tracks:
            mask = ids == track.id
            track.area[index] = mask.sum()
            if before is not None and track.area[index]:
                track.steady[index] = jaccard(mask, before == track.id)
        before = ids
        truth = source.truth(index)
        if truth is not None:
            frame = next(frames)[1] if source.live else None
            _compare(source, tracks, index, ids, truth, frame)


def _compare(
    source: Source, tracks: list[Track], index: int, ids: np.ndarray, truth: np.ndarray, frame: np.ndarray | None
) -> None:
    """Fill in a frame's figures that need its truth."""
    true = np.stack([truth == track.id for track in tracks])  # [N, H, W]
    on = held(ids, truth)
    overlaps = None
    if source.propose is not None:
        parts = [mask_iou(torch.from_numpy(true), masks).numpy() for masks in source.masks(index, frame)]
        overlaps = np.concatenate([np.zeros((len(tracks), 0)), *parts], 1)  # [N, M]
    for number, (track, visible) in enumerate(zip(tracks, true)):
        track.truth[index] = int(visible.sum())
        track.holds[index] = on.get(track.id, 0)
        taken = int(track.taken[index])
        if not track.truth[index]:
            continue
        track.j[index] = jaccard(ids == track.id, visible)
        if overlaps is not None:
            if taken >= overlaps.shape[1]:
                raise ExplainError(f"frame {source.stems[index]}: the run matched proposal {taken}, but there are {overlaps.shape[1]} now; "
                                   "the proposals are not those of the run (--no-proposals leaves them out)")  # fmt: skip
            if track.followed[index]:
                track.matched[index] = overlaps[number, taken] if taken >= 0 else 0.0
            track.best[index] = overlaps[number].max(initial=0.0)
            track.choice[index] = overlaps[number].argmax() if overlaps.shape[1] else -1


def _check_objects(gt: Path, source: Source, tracks: list[Track]) -> list[str]:
    """What to say of objects that the truth does not have."""
    absent = [track.id for track in tracks if not np.nansum(track.truth)]
    if len(absent) == len(tracks):
        raise ExplainError(f"{gt}: none of the run's objects ({', '.join(map(str, absent))}) is in ground truth, which is there for "
                           f"{len(source.compared)} of {len(source.stems)} frames; its ids must be those of the run's masks")  # fmt: skip
    return [f"object {label} is in no frame of the ground truth: nothing is said of its loss" for label in absent]

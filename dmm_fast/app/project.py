"""A project on disk: the masks that were given, the results, and how far they hold. Every change is saved as it is made.

    PROJECT/project.json    the clip, the objects' names, where objects end, objects whose removal has begun
    PROJECT/masks/          what people gave: PNGs named like frames, as `dmm-fast segment --masks PROJECT/masks` reads them
    PROJECT/results/        one PNG per frame, as `dmm-fast segment --out PROJECT/results --resume` writes them and goes on from
    PROJECT/frames.jsonl    a journal: which frames are done, with each object's score
    PROJECT/states/         the segmenter after some frames, to follow again from there, and the settings it had
    PROJECT/exports/        what was exported
    PROJECT/recording/      frames that were taken from a camera or a stream, where the clip is such a recording

A given mask holds the objects that were touched in that frame; others are followed through it. A result is *stale* when a
correction before it has not been followed up to it, or what was given in it was let go.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import safe_open

from dmm_fast.app.clip import Clip
from dmm_fast.data.masks import MaskError, read_mask, write_mask
from dmm_fast.files import whole_file
from dmm_fast.inference.folder import GIVEN, RECORDING, REPORT, UNFINISHED, RunError, RunFolder, hold
from dmm_fast.inference.report import by_object

FORMAT = 1
LOCK = ".lock"
STATES = 2 << 30  # bytes of saved states, at most
OPEN, DONE, STALE = 0, 1, 2  # of a frame: not reached, holds, to be followed again
BINS = 2000  # of the timeline


class ProjectError(ValueError):
    """A project that cannot be opened or changed as asked."""


class BusyError(ProjectError):
    """`dmm-fast segment` is working in the project's results; later it can be changed."""


class Project:
    """One clip's masks. Methods may be called from several threads; a call that raises changes nothing, but for `remove`."""

    def __init__(self, folder: Path, clip: Clip):
        self.folder, self.clip = folder, clip
        self.masks, self.results, self.states = (folder / name for name in ("masks", "results", "states"))
        self.lock = threading.RLock()
        self._lock_file = _locked(folder)
        for path in (self.masks, self.results, self.states, folder / "exports"):
            path.mkdir(exist_ok=True)
        self._numbers = {stem: index for index, stem in enumerate(clip.stems)}
        stored = read_project(folder) or {"objects": [{"id": 1, "name": "Object 1"}], "ends": {}}
        self.recorded: dict[str, Any] = stored.get("recorded", {})  # how, where the clip is a recording
        self.clip.fps = self.recorded.get("fps", self.clip.fps)
        self.names: dict[int, str] = {entry["id"]: entry["name"] for entry in stored["objects"]}
        self.ends = {self._numbers[stem]: set(ids) for stem, ids in stored["ends"].items() if stem in self._numbers}
        self.removing: set[int] = set(stored.get("removing", ()))  # where a removal broke off
        self.given: dict[int, set[int]] = {}
        self._find_given()
        self.status = bytearray(len(clip))
        self.rows: dict[int, list[dict[str, Any]]] = {}
        self._read_journal()
        self._painted = False
        self._holders, self._held = 0, -1  # of results/
        self._save()
        self._damaged([index for index in self.rows if self.status[index] != OPEN and _empty(self.result_file(index))])
        for label in sorted(self.removing & self.names.keys()):
            with contextlib.suppress(ProjectError, MaskError, RunError, OSError, ValueError):  # then the next opening does it
                self.remove(label)

    # ------------------------------------------------------------------------------------------------------ on disk

    def _save(self) -> None:
        stored = {
            "format": FORMAT,
            "clip": str(self.clip.path.resolve()),
            "frames": len(self.clip),
            "size": list(self.clip.size),
            "objects": [{"id": label, "name": name} for label, name in sorted(self.names.items())],
            "ends": {self.clip.stems[index]: sorted(ids) for index, ids in sorted(self.ends.items())},
            **({"removing": sorted(self.removing)} if self.removing else {}),
            **({"recorded": self.recorded} if self.recorded else {}),
        }
        with whole_file(self.folder / "project.json") as part:
            part.write_text(json.dumps(stored, indent=1) + "\n")

    def _find_given(self) -> None:
        """The masks that are there, also those that another program has put there."""
        for file in self.masks.glob("*.png"):
            index = self._numbers.get(file.stem)
            if index is not None and file.name[0] != ".":
                self.given[index] = _labels(read_mask(file, self.clip.size))
                for label in self.given[index]:
                    self.names.setdefault(label, f"Object {label}")

    @property
    def _journal(self) -> Path:
        return self.folder / "frames.jsonl"

    def _read_journal(self) -> None:
        if self._journal.exists():
            for line in self._journal.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the power went
                    continue
                if "stale" in entry:
                    self._mark_stale(*entry["stale"])
                elif entry["frame"] < len(self.clip):
                    self.status[entry["frame"]], self.rows[entry["frame"]] = entry["status"], entry["objects"]
        self._take_over()
        there = {file.stem for file in self.results.glob("*.png")}  # a run that began again has removed those before
        for index in [index for index in self.rows if self.clip.stems[index] not in there]:
            self.status[index] = OPEN
            del self.rows[index]
        with whole_file(self._journal) as part, part.open("w") as out:  # one line a frame again
            for index in sorted(self.rows):
                out.write(_line(index, self.status[index], self.rows[index]))
        self._log = self._journal.open("a")

    def _take_over(self) -> None:
        """What `dmm-fast segment --resume` did in results/ since the page was last open."""
        report, work = self.results / REPORT, self.results / UNFINISHED
        before = self._journal.stat().st_mtime if self._journal.exists() else 0.0
        if report.exists() and not work.exists() and report.stat().st_mtime > before:
            rows = json.loads(report.read_text())["frames"]
        elif (work / "progress.json").exists() and (work / "progress.json").stat().st_mtime > before:
            count = json.loads((work / "progress.json").read_text())["next"]
            rows = [json.loads(line) for line in (work / "rows.jsonl").read_text().splitlines()[:count]]
        else:
            return
        status = DONE
        for row in rows:
            index = self._numbers.get(row["frame"])
            if index is not None:
                if self.ends.get(index, set()) & {entry["id"] for entry in row["objects"]}:
                    status = STALE  # `segment` follows an object on through the frame in which it ends
                elif self.status[index] == STALE and _changed(self.result_file(index)) <= before:
                    status = STALE  # the run has not made it again, and went on from it
                self.status[index], self.rows[index] = status, row["objects"]

    def _write(self, line: str) -> None:
        self._log.write(line)
        self._log.flush()

    @property
    def named_by(self) -> Path:
        """What its name is taken from: the clip, or the project's folder where the clip is its own recording."""
        return self.folder if self.clip.path == self.folder / RECORDING else self.clip.path

    def mask_file(self, index: int) -> Path:
        return self.masks / f"{self.clip.stems[index]}.png"

    def result_file(self, index: int) -> Path:
        return self.results / f"{self.clip.stems[index]}.png"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps `dmm-fast segment` from results/ meanwhile; BusyError where it is at work there. May be nested."""
        with self.lock:
            if not self._holders:
                try:
                    self._held = hold(self.results)
                except RunError:
                    raise BusyError(f"{self.results}: dmm-fast segment is working there; wait for it, or stop it") from None
            self._holders += 1
        try:
            yield
        finally:
            with self.lock:
                self._holders -= 1
                if not self._holders:
                    os.close(self._held)

    def close(self) -> None:
        if self._painted and self.next_open() is None and not (self.results / UNFINISHED).exists():
            with contextlib.suppress(BusyError), self.alone():
                self._hand_back(0)  # nothing is stale, but the report does not tell of what was painted
        self._log.close()
        self._lock_file.close()

    # ------------------------------------------------------------------------------------------------- what is shown

    def ids(self, index: int) -> np.ndarray:
        """The frame's masks as they stand, uint8 [H, W]: the result, and what was given drawn over it."""
        with self.lock:
            if self.status[index] != OPEN and self.result_file(index).exists():
                try:
                    return read_mask(self.result_file(index), self.clip.size)
                except MaskError:
                    self._damaged([index])
            return self.given_ids(index)

    def _damaged(self, frames: list[int]) -> None:
        """The results of these frames cannot be read: the next run makes them again, the page's or one of `dmm-fast segment`."""
        for index in frames:
            self._note(index, OPEN, [])
        if frames:
            with contextlib.suppress(BusyError), self.alone():
                self._hand_back(min(frames))

    def given_ids(self, index: int) -> np.ndarray:
        with self.lock:
            if index in self.given:
                return read_mask(self.mask_file(index), self.clip.size)
            return np.zeros(self.clip.size, np.uint8)

    def about(self, index: int) -> dict[str, Any]:
        """What the page shows beside a frame's masks."""
        with self.lock:
            return {
                "frame": index,
                "status": self.status[index],
                "given": sorted(self.given.get(index, ())),
                "ends": sorted(self.ends.get(index, ())),
                "objects": self.rows.get(index, []),
            }

    def timeline(self) -> dict[str, Any]:
        """Status, and each object's lowest score (0 where lost, null where it is not followed), in at most `BINS` bins.

        "lost": the first frames of the stretches in which an object is lost.
        """
        with self.lock:
            width = -(-len(self.clip) // BINS)
            count = -(-len(self.clip) // width)
            status = [_worst(self.status[k * width : (k + 1) * width]) for k in range(count)]
            scores: dict[int, list[float | None]] = {label: [None] * count for label in self.names}
            for index, row in self.rows.items():
                for entry in row:
                    if entry["id"] in scores:
                        line, k, value = scores[entry["id"]], index // width, _score(entry)
                        line[k] = value if line[k] is None else min(value, line[k])  # type: ignore[type-var]
            given = {index: sorted(ids) for index, ids in sorted(self.given.items())}
            ends = {index: sorted(ids) for index, ids in sorted(self.ends.items())}
            lost = {index: {entry["id"] for entry in row if entry.get("lost")} for index, row in self.rows.items()}
            first = sorted(index for index, ids in lost.items() if ids - lost.get(index - 1, set()))
            return {"width": width, "status": status, "scores": scores, "given": given, "ends": ends, "lost": first}

    # ------------------------------------------------------------------------------------------------ what people do

    def add_object(self, name: str | None = None) -> int:
        with self.lock:
            label = next((i for i in range(1, 255) if i not in self.names), None)
            if label is None:
                raise ProjectError("a clip has at most 254 objects")
            self.names[label] = _checked(name if name is not None else f"Object {label}")
            self._save()
            return label

    def rename(self, label: int, name: str) -> None:
        with self.lock:
            self._known([label])
            self.names[label] = _checked(name)
            self._save()

    def remove(self, label: int) -> None:
        """The object goes from all given masks and all results. One that breaks off is finished when the project is opened again."""
        with self.lock, self.alone():
            self._known([label])
            self.removing.add(label)
            self._save()
            for index in [index for index, ids in self.given.items() if label in ids]:
                ids = self.given_ids(index)
                self._write_given(index, np.where(ids == label, np.uint8(0), ids), self.given[index] - {label})
            for index, row in list(self.rows.items()):
                if any(entry["id"] == label for entry in row):
                    if self.result_file(index).exists():
                        ids = self.ids(index)
                        if self.status[index] == OPEN:  # it was damaged
                            continue
                        write_mask(self.result_file(index), np.where(ids == label, np.uint8(0), ids))
                    self._note(index, self.status[index], [entry for entry in row if entry["id"] != label])
            self._hand_back(0)
            self.ends = {index: left for index, ids in self.ends.items() if (left := ids - {label})}
            del self.names[label]
            self.removing.discard(label)
            self._save()

    def paint(self, index: int, ids: np.ndarray, given: Iterable[int], ends: Iterable[int] = ()) -> None:
        """A frame's masks as they were painted: `given` are the objects touched here, `ends` those that are not followed on.

        What depends on them becomes stale: until the next frame in which each of the changed objects was given. So does this frame
        where something that was given here, or ended, no longer is.
        """
        with self.lock, self.alone():
            given, ends = set(given), set(ends)
            self._known(given | ends | _labels(ids))
            if halved := sorted((given | ends) & self.removing):
                raise ProjectError(f"{self.names[halved[0]]} is half removed: remove it again")
            given &= _labels(ids)
            before, given_before, ends_before = self.ids(index), self.given.get(index, set()), self.ends.get(index, set())
            where = before != ids
            changed = _labels(before[where]) | _labels(ids[where]) | (given ^ given_before) | (ends ^ ends_before)
            if not changed:
                return
            self._painted = True
            let_go = (given_before | ends_before) - (given | ends)
            self._outdate(index, index if let_go else index + 1, self._until(index, changed))
            self._write_given(index, np.where(np.isin(ids, sorted(given)), ids, np.uint8(0)), given)
            if ends != ends_before:
                self.ends[index] = ends
                if not ends:
                    del self.ends[index]
                self._save()
            if self.status[index] != OPEN:
                write_mask(self.result_file(index), ids)
                kept = [e for e in self.rows.get(index, []) if e["id"] not in given | ends and "given" not in e]
                row = [*kept, *({"id": label, "given": True} for label in sorted(given))]
                self._note(index, self.status[index], row)

    def _write_given(self, index: int, ids: np.ndarray, given: set[int]) -> None:
        if given:
            write_mask(self.mask_file(index), ids)
            self.given[index] = given
        else:
            self.mask_file(index).unlink(missing_ok=True)
            self.given.pop(index, None)

    def _known(self, labels: Iterable[int]) -> None:
        if unknown := sorted(set(labels) - set(self.names)):
            raise ProjectError(f"no object {unknown[0]} in this project; its objects are {sorted(self.names)}")

    def _until(self, index: int, changed: set[int]) -> int:
        """The frame by which all the changed objects have been given again, or have ended; else the clip's length."""
        left = set(changed)
        for other in sorted({*self.given, *self.ends}):
            if other > index:
                left -= self.given.get(other, set()) | self.ends.get(other, set())
                if not left:
                    return other
        return len(self.clip)

    def _outdate(self, index: int, first: int, until: int) -> None:
        """Masks changed in frame `index`: those of [first, until) have to be followed again."""
        if any(status == DONE for status in self.status[first:until]):
            self._write(json.dumps({"stale": [first, until]}) + "\n")
            self._mark_stale(first, until)
        for at, file in self._states().items():
            if index <= at < until:
                file.unlink()
        if (self.results / UNFINISHED).exists() or self.next_open() is not None:
            self._hand_back(index)

    def _mark_stale(self, start: int, stop: int) -> None:
        for index in range(start, min(stop, len(self.status))):
            if self.status[index] == DONE:
                self.status[index] = STALE

    # ----------------------------------------------------------------------------------------------- what a run does

    def next_open(self) -> int | None:
        """The first frame that a run has to make."""
        with self.lock:
            return next((index for index, status in enumerate(self.status) if status != DONE), None)

    def record(self, index: int, ids: np.ndarray, objects: list[dict[str, Any]]) -> None:
        """A frame's result."""
        write_mask(self.result_file(index), ids)
        with self.lock:
            self._note(index, DONE, objects)

    def append(self, file: Path, ids: np.ndarray, objects: list[dict[str, Any]]) -> None:
        """One more frame of the recording, and its result."""
        with self.lock:
            index = len(self.clip)
            self.clip.append(file)
            self._numbers[file.stem] = index
            self.status.append(OPEN)
            self.record(index, ids, objects)

    def note_recorded(self, recorded: dict[str, Any]) -> None:
        """How the clip was recorded: "fps", which is the clip's from here on, and what else there is to know."""
        with self.lock:
            self.recorded, self.clip.fps = recorded, recorded.get("fps")
            self._save()

    def _note(self, index: int, status: int, objects: list[dict[str, Any]]) -> None:
        self.status[index], self.rows[index] = status, objects
        self._write(_line(index, status, objects))

    def state_file(self, index: int) -> Path:
        return self.states / f"{index}.safetensors"

    def _states(self) -> dict[int, Path]:
        return {int(file.stem): file for file in self.states.glob("*.safetensors") if file.stem.isdecimal()}

    def state_before(self, index: int) -> tuple[int, Path] | None:
        """The last saved state of a frame before this one."""
        with self.lock:
            return max(((at, file) for at, file in self._states().items() if at < index), default=None)

    def given_until(self, index: int) -> set[int]:
        """The objects that are given in this frame or before: no others can be followed there."""
        with self.lock:
            return {label for at, ids in self.given.items() if at <= index for label in ids}

    def thin_states(self, newest: int) -> None:
        """Keep the states within their room: dense near the newest, ever sparser away from it."""
        with self.lock:
            states = sorted(self._states())
            size = sum(self.state_file(at).stat().st_size for at in states)
            while size > STATES and len(states) > 3:
                spacing = [(states[k + 1] - states[k - 1]) / (abs(newest - states[k]) + 1) for k in range(1, len(states) - 1)]
                gone = states.pop(1 + int(np.argmin(spacing)))
                size -= self.state_file(gone).stat().st_size
                self.state_file(gone).unlink()

    def hand_over(self, settings: dict[str, Any], about: dict[str, Any]) -> None:
        """Leave results/ as `dmm-fast segment` leaves it: finished with a report, or unfinished with the last state that holds.

        settings: what the saved states were made with. about: what the report says besides the frames, without "frames".
        """
        with self.lock, self.alone():
            with whole_file(self._made_with) as part:
                part.write_text(json.dumps(settings) + "\n")
            if self.next_open() is not None:
                self._leave_unfinished(settings, about["speed"]["seconds"], about["notes"])
                return
            folder = RunFolder(self.results, settings)
            folder.reopen()
            folder.finish({**about, "overlays": folder.overlays, "frames": self._rows_of(len(self.clip))})

    def _hand_back(self, index: int) -> None:
        """Masks changed from this frame on: results/ again as `dmm-fast segment` leaves them, if that says that it is past it."""
        report, work = self.results / REPORT, self.results / UNFINISHED
        if work.exists():
            passes = {file.parent.name: json.loads(file.read_text()) for file in work.rglob("progress.json")}
            if all(name != "backward" and told["next"] <= index for name, told in passes.items()):
                return
            told, settings = passes.get(UNFINISHED, {}), json.loads((work / "settings.json").read_text())
            seconds, notes = told.get("seconds"), told.get("notes")
        elif report.exists():
            told = json.loads(report.read_text())
            settings, seconds, notes = told["settings"], told["speed"]["seconds"], told["notes"]
            settings.pop(GIVEN, None)  # digests of the masks before
            if self.next_open() is None:
                told.pop("results", None)  # what else was made of the masks
                rows = self._rows_of(len(self.clip))
                RunFolder(self.results, settings).write_report({**told, "objects": by_object(rows), "frames": rows})
                return
        else:
            return
        settings = {name: value for name, value in settings.items() if name not in ("device", "graph", GIVEN)}
        if settings["direction"] == "forward":
            self._leave_unfinished(settings, seconds, notes)
        else:  # it cannot go on from the states of this page, which follows forward: it begins again
            RunFolder(self.results, settings).reopen()

    def _leave_unfinished(self, settings: dict[str, Any], seconds: dict[str, float], notes: list[str]) -> None:
        end = self.next_open()
        found = self._state_for(settings, len(self.clip) if end is None else end)
        count = found[0] + 1 if found else 0
        progress = {"next": count, "seconds": seconds, "notes": notes, "started": count > 0}
        RunFolder(self.results, settings).adopt(self._rows_of(count), progress, found[1] if found else None)

    def _rows_of(self, count: int) -> list[dict[str, Any]]:
        return [{"frame": self.clip.stems[index], "objects": self.rows.get(index, [])} for index in range(count)]

    @property
    def _made_with(self) -> Path:
        return self.states / "settings.json"

    def _state_for(self, settings: dict[str, Any], end: int) -> tuple[int, Path] | None:
        """The last saved state before this frame that was made with these settings and holds no object that was removed."""
        if not self._made_with.exists() or json.loads(self._made_with.read_text()) != settings:
            return None
        states = sorted((at, file) for at, file in self._states().items() if at < end)
        return next(((at, file) for at, file in reversed(states) if _held(file) <= self.given_until(at)), None)


def read_project(folder: Path) -> dict[str, Any] | None:
    """project.json of a folder, or None where it holds no project."""
    file = folder / "project.json"
    if not file.exists():
        return None
    try:
        stored = json.loads(file.read_text())
        found = stored["format"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ProjectError(f"{file}: not the file of a project") from None
    if found != FORMAT:
        raise ProjectError(f"{file}: format {found}, this version of dmm-fast reads {FORMAT}")
    return stored


def check_free(folder: Path, clip: Path | None = None) -> None:
    """Raises ProjectError where no project can begin in this folder: it holds more than its clip and what a killed server left."""
    if not folder.exists():
        return
    if (folder / "project.json").exists():
        raise ProjectError(f"{folder}: is a project already: dmm-fast app --project {folder} opens it; "
                           "choose another --project for a new one")  # fmt: skip
    if not folder.is_dir() or any(file != clip and file.name != LOCK and not file.match(".*.tmp") for file in folder.iterdir()):
        raise ProjectError(f"{folder}: exists and is not a project; choose another --project")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[IO[str]]:
    """A folder to begin a project in, and its lock, to be closed when the project is opened. An error leaves it as it was found.

    Raises ProjectError where none can begin there.
    """
    check_free(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=not new)
    with _locked(folder) as lock:
        try:
            for torn in folder.glob(".*.tmp"):
                torn.unlink()
            yield lock
        except BaseException:
            for file in folder.iterdir():  # all of it was made in the block
                shutil.rmtree(file) if file.is_dir() else file.unlink()
            if new:
                folder.rmdir()
            raise


def open_project(folder: Path, clip: Path | None) -> Project:
    """The project in this folder; a new one of `clip` where there is none.

    Raises ProjectError where the folder holds something else, or the project of another clip.
    """
    stored = read_project(folder)
    if stored is None:
        if clip is None:
            raise ProjectError(f"{folder}: no project here; name the clip: dmm-fast app VIDEO --project {folder}")
        check_free(folder, clip)
    own = folder / RECORDING
    source = clip or (own if own.is_dir() else Path(stored["clip"]))  # type: ignore[index]
    if stored is not None and clip is None and not source.exists():
        raise ProjectError(
            f"{source}: the clip of the project {folder} has gone; say where it is: dmm-fast app VIDEO --project {folder}"
        )
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        opened = Clip(source)
    except BaseException:
        if new:
            shutil.rmtree(folder)
        raise
    if stored is not None and clip is not None and clip.resolve() != own.resolve():
        kept = Path(stored["clip"])
        if kept.exists() and kept.resolve() != clip.resolve():  # else it has moved
            raise ProjectError(f"{folder}: is the project of another clip, {kept}, not of {clip.resolve()}; "
                               "choose another --project")  # fmt: skip
    if stored is not None and source == own:  # which has grown, where the server was killed while it recorded
        stored["frames"] = max(len(opened), stored["frames"])
    if stored is not None and (len(opened), list(opened.size)) != (stored["frames"], stored["size"]):
        mine, theirs = (
            f"{count} frames of {w}x{h}" for count, (h, w) in ((len(opened), opened.size), (stored["frames"], stored["size"]))
        )
        raise ProjectError(f"{folder}: is the project of another clip, {stored['clip']}: {source} has {mine}, that one {theirs}; "
                           "choose another --project")  # fmt: skip
    return Project(folder, opened)


def _locked(folder: Path) -> IO[str]:
    """Keeps other servers from the folder while it is open."""
    file = (folder / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ProjectError(
            f"{folder}: is open in another dmm-fast app; close that one first, or choose another --project"
        ) from None
    return file


def _labels(ids: np.ndarray) -> set[int]:
    return set((np.flatnonzero(np.bincount(ids.ravel(), minlength=1)[1:]) + 1).tolist())


def _held(state: Path) -> set[int]:
    """The objects that a saved state follows."""
    with safe_open(state, "pt") as file:
        return set(json.loads(file.metadata()["dmm_fast"])["slot_ids"]) - {0}


def _changed(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0


def _empty(file: Path) -> bool:
    return file.exists() and not file.stat().st_size


def _line(index: int, status: int, objects: list[dict[str, Any]]) -> str:
    return json.dumps({"frame": index, "status": status, "objects": objects}) + "\n"


def _worst(statuses: bytearray) -> int:
    return STALE if STALE in statuses else OPEN if OPEN in statuses else DONE


def _score(entry: dict[str, Any]) -> float:
    return 1.0 if "given" in entry else 0.0 if entry["lost"] else max(round(entry["score"], 3), 0.001)


def _checked(name: str) -> str:
    name = " ".join(name.split())
    if not 0 < len(name) <= 60:
        raise ProjectError(f"a name has 1 to 60 characters, got {len(name)}")
    return name

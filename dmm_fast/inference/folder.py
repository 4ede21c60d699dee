"""The folder of a run on disk: what is there, whether it is finished, and how a run goes on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from dmm_fast.files import whole_file
from dmm_fast.inference.segmenter import Segmenter

REPORT, SHEET, UNFINISHED, RECORDING = "report.json", "contact-sheet.png", "unfinished", "recording"
EXPLAINED = "explain.html"
FILES = "files"  # among a run's settings: a digest of each file of weights or proposals that it reads, by path
GIVEN = "given"  # among a run's settings: a digest of the masks of each frame
RESULTS = (RECORDING, "binary", "cutout", "alpha.mov", "alpha.webm", "tracks.json", "tracks-youtube-vis.json", EXPLAINED)


class RunError(ValueError):
    """A run that cannot start or go on as asked."""


class PassFolder:
    """One pass over the frames on disk: where its masks are, a row per frame, and checkpoints to go on from."""

    def __init__(self, work: Path, masks: Path):
        self.work, self._masks = work, masks
        self._rows, self._progress = work / "rows.jsonl", work / "progress.json"

    def mask(self, stem: str) -> Path:
        return self._masks / f"{stem}.png"

    def state(self, index: int) -> Path:
        return self.work / f"state-{index}.safetensors"

    def checkpoint(self) -> dict[str, Any] | None:
        """What to go on from; None where nothing was saved."""
        return json.loads(self._progress.read_text()) if self._progress.exists() else None

    def begin(self) -> None:
        """Make ready to go on after the checkpoint, or from the start."""
        checkpoint = self.checkpoint()
        self.work.mkdir(parents=True, exist_ok=True)
        if checkpoint:
            os.truncate(self._rows, checkpoint["bytes"])  # rows after the checkpoint are made again
        else:
            self._rows.write_text("")
        for torn in self._masks.glob(".*.png.*.tmp"):
            torn.unlink()
        self._file = self._rows.open("a")

    def append(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")

    def save(self, progress: dict[str, Any], segmenter: Segmenter | None) -> None:
        """A checkpoint: first the state, then the file that names it, then the states before it go."""
        self._file.flush()
        state = self.state(progress["next"])
        if segmenter is not None:
            segmenter.save(state)
        _write_json(self._progress, {**progress, "bytes": self._file.tell()})
        for old in self.work.glob("state-*"):
            if old != state:
                old.unlink()

    def rows(self) -> list[dict[str, Any]]:
        lines = self._rows.read_text().splitlines(keepends=True) if self._rows.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a line

    def done(self) -> list[dict[str, Any]]:
        """The rows that a run would not make again."""
        return self.rows()[: (self.checkpoint() or {"next": 0})["next"]]

    def close(self) -> None:
        self._file.close()

    def adopt(self, rows: list[dict[str, Any]], progress: dict[str, Any], state: Path | None) -> None:
        """Take over rows whose masks are there, to go on from `state`."""
        self._rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if state is not None:
            shutil.copyfile(state, self.state(progress["next"]))
        _write_json(self._progress, {**progress, "bytes": self._rows.stat().st_size})


class RunFolder:
    """OUT on disk: what is there, whether it is finished, and how a run goes on.

    settings: what must be the same for a run to go on; "direction" among them. Of "given" (see `GivenMasks.digests`) what has been
    followed must be. A run forward writes its masks to OUT. One that goes
    backward, or both ways, keeps those of a pass in a folder of its own, and OUT is made of them at the end.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self._work = path / UNFINISHED
        self._settings, self._overlays = self._work / "settings.json", self._work / "overlays.txt"
        self._held: int | None = None  # a descriptor of OUT while this run works there
        direction = settings["direction"]
        self.passes: dict[str, PassFolder] = {}
        for name in ("forward", "backward") if direction == "both" else (direction,):
            own = self._work / name
            self.passes[name] = PassFolder(self._work, path) if direction == "forward" else PassFolder(own, own)

    def mask(self, stem: str) -> Path:
        return self.path / f"{stem}.png"

    @property
    def tuned(self) -> Path:
        """Weights after online learning."""
        return self._work / "online.safetensors"

    @property
    def tuned_proposer(self) -> Path:
        return self._work / "online-proposals.safetensors"

    @property
    def overlays(self) -> list[str]:
        """The overlays that the run there has written, or will: they are its own."""
        if self._overlays.exists():
            return self._overlays.read_text().splitlines()
        return self._report().get("overlays", []) if (self.path / REPORT).exists() else []

    def claim(self, *videos: str) -> None:
        """Keep in mind that these overlays are the unfinished run's own."""
        claimed = dict.fromkeys([*self.overlays, *videos])
        with whole_file(self._overlays) as part:
            part.write_text("".join(f"{video}\n" for video in claimed))

    @property
    def finished(self) -> bool:
        return (self.path / REPORT).exists() and not self._work.exists()

    def report(self) -> dict[str, Any]:
        """The report of a finished run with the same settings."""
        report = self._report()
        self._check_settings(report["settings"], "finished")
        self._check_given(report["settings"], {row["frame"] for row in report["frames"]})
        return report

    def _report(self) -> dict[str, Any]:
        try:
            report = json.loads((self.path / REPORT).read_text())
        except ValueError:
            report = None
        if not isinstance(report, dict) or not {"dmm_fast", "settings", "frames"} <= report.keys():
            raise RunError(f"{self.path}: holds a {REPORT} that no run has written; choose another --out")
        return report

    def find(self, stems: list[str], resume: bool, overwrite: bool) -> bool:
        """Whether there is an unfinished run to go on with; changes nothing."""
        if (self.path / REPORT).exists():
            report = self._report()
            if self.finished and not overwrite:
                whose = f"{report['settings'].get('frames')}, {len(report['frames'])} frames"
                raise RunError(f"{self.path}: holds a finished run ({whose}); --overwrite replaces it")
        elif not self._begun and (others := self._others(stems)):
            rest = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise RunError(f"{self.path}: holds {others[0]}{rest}, which no run has written; choose another --out")
        if overwrite:
            return False
        if not (done := sorted(self._work.rglob("progress.json"))):
            if (self.path / RECORDING).exists():  # of a stream, which nothing goes on from
                raise RunError(f"{self.path}: holds the {RECORDING} of a run that did not end; --overwrite replaces it")
            return False
        if not resume:
            frames = " and ".join(f"{json.loads(file.read_text())['next']} of {len(stems)} frames" for file in done)
            advice = "--resume continues it, --overwrite starts again"
            raise RunError(f"{self.path}: holds an unfinished run ({frames}); {advice}")
        before = json.loads(self._settings.read_text())
        self._check_settings(before, "unfinished")
        self._check_given(before, {row["frame"] for one in self.passes.values() for row in one.done()})
        return True

    @property
    def _begun(self) -> bool:
        """Whether `unfinished/` is a run's: empty, where that was killed at once."""
        return self._settings.exists() or (self._work.is_dir() and not any(self._work.iterdir()))

    def _others(self, stems: list[str]) -> list[str]:
        """What a run's results would replace or lie among: PNGs and results that are not a run's."""
        if not self.path.is_dir():
            return []
        masks = [name for name in (f"{stem}.png" for stem in stems) if (self.path / name).exists()]
        return list(dict.fromkeys([*masks, *sorted(file.name for file in self.path.glob("*.png")),
                                   *(name for name in (*RESULTS, UNFINISHED) if (self.path / name).exists())]))  # fmt: skip

    @property
    def started(self) -> bool:
        """Whether a saved pass has come to the first objects."""
        return any((one.checkpoint() or {}).get("started") for one in self.passes.values())

    def begin(self, stems: list[str], go_on: bool, resume: bool, overwrite: bool) -> None:
        """Make OUT ready for a run, and keep other runs from it until `release`. go_on: what `find` has said."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._held = hold(self.path)
        try:
            if self.find(stems, resume, overwrite) != go_on:
                raise RunError(f"{self.path}: another run has worked there just now; try again")
            if not go_on:
                self._clear(stems)
            _write_json(self._settings, self.settings)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let other runs have OUT."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _check_given(self, before: dict[str, Any], done: set[str]) -> None:
        """Masks that were given for frames that are done must be those of now; where masks went both ways, all."""
        if GIVEN not in before:  # the app's, which looks after that itself
            return
        was, now = before[GIVEN], self.settings.get(GIVEN, {})
        changed = sorted(stem for stem in was.keys() | now.keys() if was.get(stem) != now.get(stem))
        if hit := [stem for stem in changed if stem in done or self.settings["direction"] != "forward"]:
            rest = f" and of {len(hit) - 1} more" if len(hit) > 1 else ""
            raise RunError(f"{self.path}: the mask given for frame {hit[0]}{rest} is not the one that this run has followed; "
                           "--overwrite starts again")  # fmt: skip

    def _check_settings(self, before: dict[str, Any], kind: str) -> None:
        was = before.get(FILES, {})
        for file, digest in self.settings.get(FILES, {}).items():
            if was.get(file, digest) != digest:
                raise RunError(f"{self.path}: {file} is not what it was for the {kind} run there; --overwrite starts again")
        for name, value in self.settings.items():
            if name not in (FILES, GIVEN) and before.get(name) != value:
                differ = f"has {name} = {before.get(name)!r}, this one {value!r}"
                advice = "resume with the same settings, or --overwrite"
                raise RunError(f"{self.path}: the {kind} run there {differ}; {advice}")

    def _clear(self, stems: list[str]) -> None:
        """Remove what runs wrote, the report first: no moment shows a folder that looks finished with masks missing."""
        before = self._report()["frames"] if (self.path / REPORT).exists() else PassFolder(self._work, self.path).rows()
        (self.path / REPORT).unlink(missing_ok=True)
        self._work.mkdir(parents=True, exist_ok=True)
        masks = {self.mask(stem) for stem in [*stems, *(row["frame"] for row in before)]}  # an earlier run's may be more
        for file in [self.path / SHEET, *masks]:
            file.unlink(missing_ok=True)
        work = sorted(self._work.iterdir(), key=lambda file: file == self._settings)  # which tells whose it is, last
        for result in [*work, *(self.path / name for name in RESULTS)]:
            shutil.rmtree(result) if result.is_dir() else result.unlink(missing_ok=True)

    def reopen(self) -> None:
        """Make OUT an unfinished run, which begins again unless it is finished at once."""
        overlays = self.overlays
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        _write_json(self._settings, self.settings)
        self.claim(*overlays)
        (self.path / REPORT).unlink(missing_ok=True)

    def adopt(self, rows: list[dict[str, Any]], progress: dict[str, Any], state: Path | None) -> None:
        """Make OUT an unfinished run of these rows, whose masks are there, to go on from `state`."""
        self.reopen()
        self.passes["forward"].adopt(rows, progress, state)

    def finish(self, report: dict[str, Any]) -> None:
        self.write_report(report)
        shutil.rmtree(self._work)

    def discard(self, stems: list[str]) -> None:
        """Remove an unfinished run and all that it wrote."""
        self._clear(stems)
        shutil.rmtree(self._work)
        for torn in self.path.glob(".*.tmp"):
            torn.unlink()
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def write_report(self, report: dict[str, Any]) -> None:
        head = json.dumps({name: value for name, value in report.items() if name != "frames"}, indent=1)
        rows = ",\n".join(json.dumps(row) for row in report["frames"])  # one line a frame
        with whole_file(self.path / REPORT) as part:
            part.write_text(f'{head[:-2]},\n "frames": [\n{rows}\n]\n}}\n')


def hold(folder: Path) -> int:
    """Keep other runs from a folder: a descriptor, until it is closed. Raises RunError where one is working there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunError(f"{folder}: another run is working there; wait for it, or choose another --out") from None
    except OSError:  # a file system that does not lock folders, as NFS
        pass
    return descriptor


def make_out(path: Path) -> Path:
    """The folder of many results."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file; --out must be a directory")
    path.mkdir(parents=True, exist_ok=True)
    return path


def take(path: Path, apart: Path) -> bool:
    """Move a folder away, whole, to work on it; False where another process was first."""
    try:
        path.rename(apart)
    except FileNotFoundError:
        return False
    return True


def settle(apart: Path, path: Path) -> None:
    """Give a folder, whole, the place of what is there."""
    while True:
        old = apart.with_name(f"{apart.name}.{secrets.token_hex(4)}.old")
        take(path, old)
        try:
            apart.rename(path)
            break
        except OSError as error:  # another process was in between
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            shutil.rmtree(old, ignore_errors=True)


def direction_of(path: Path) -> str | None:
    """In which direction the run in this folder goes; None where there is none."""
    for file, key in ((path / UNFINISHED / "settings.json", None), (path / REPORT, "settings")):
        try:
            found = json.loads(file.read_text())
            return (found if key is None else found[key])["direction"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value) + "\n")

"""The folder of a run on disk: what is there, whether it is finished, and how a run goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from dmm_fast.files import whole_file
from dmm_fast.inference.segmenter import Segmenter

REPORT, SHEET, UNFINISHED = "report.json", "contact-sheet.png", "unfinished"


class RunError(ValueError):
    """A run that cannot start or go on as asked."""


class RunFolder:
    """OUT on disk: what is there, whether it is finished, and how a run goes on."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, settings
        self._work = path / UNFINISHED
        self._rows, self._progress, self._settings = (
            self._work / name for name in ("rows.jsonl", "progress.json", "settings.json")
        )

    def mask(self, stem: str) -> Path:
        return self.path / f"{stem}.png"

    def state(self, index: int) -> Path:
        return self._work / f"state-{index}.safetensors"

    @property
    def tuned(self) -> Path:
        """Weights after online learning."""
        return self._work / "online.safetensors"

    @property
    def tuned_proposer(self) -> Path:
        return self._work / "online-proposals.safetensors"

    @property
    def finished(self) -> bool:
        return (self.path / REPORT).exists() and not self._work.exists()

    def report(self) -> dict[str, Any]:
        """The report of a finished run with the same settings."""
        report = json.loads((self.path / REPORT).read_text())
        self._check_settings(report["settings"], "finished")
        return report

    def find(self, stems: list[str], resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None for a run from the start; changes nothing."""
        if self.finished and not overwrite:
            raise RunError(f"{self.path}: holds a finished run; --overwrite replaces it")
        if not (self.finished or self._work.exists()):
            if foreign := [stem for stem in stems if self.mask(stem).exists()]:
                raise RunError(f"{self.path}: holds {foreign[0]}.png, which no run has written; choose another --out")
        if overwrite or not self._progress.exists():
            return None
        checkpoint = json.loads(self._progress.read_text())
        if not resume:
            done = f"{checkpoint['next']} of {len(stems)} frames"
            advice = "--resume continues it, --overwrite starts again"
            raise RunError(f"{self.path}: holds an unfinished run ({done}); {advice}")
        self._check_settings(json.loads(self._settings.read_text()), "unfinished")
        return checkpoint

    def begin(self, stems: list[str], checkpoint: dict[str, Any] | None) -> None:
        """Make OUT ready for a run."""
        if checkpoint is None:
            self._clear(stems)
            _write_json(self._settings, self.settings)
        else:
            os.truncate(self._rows, checkpoint["bytes"])  # rows after the checkpoint are made again
        for torn in self.path.glob(".*.png.*.tmp"):
            torn.unlink()
        self._file = self._rows.open("a")

    def _check_settings(self, before: dict[str, Any], kind: str) -> None:
        for name, value in self.settings.items():
            if before.get(name) != value:
                differ = f"has {name} = {before.get(name)!r}, this one {value!r}"
                advice = "resume with the same settings, or --overwrite"
                raise RunError(f"{self.path}: the {kind} run there {differ}; {advice}")

    def _clear(self, stems: list[str]) -> None:
        """Remove what runs wrote, the report first: no moment shows a folder that looks finished with masks missing."""
        (self.path / REPORT).unlink(missing_ok=True)
        self._work.mkdir(parents=True, exist_ok=True)
        for file in [self.path / SHEET, *map(self.mask, stems), *self._work.iterdir()]:
            file.unlink(missing_ok=True)

    def adopt(self, rows: list[dict[str, Any]], progress: dict[str, Any] | None, state: Path | None) -> None:
        """Make OUT an unfinished run of these rows, whose masks are there: to go on from `state`, or to be finished."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        (self.path / REPORT).unlink(missing_ok=True)
        _write_json(self._settings, self.settings)
        self._rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if progress is not None:
            if state is not None:
                shutil.copyfile(state, self.state(progress["next"]))
            _write_json(self._progress, {**progress, "bytes": self._rows.stat().st_size})
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
        for old in self._work.glob("state-*"):
            if old != state:
                old.unlink()

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._rows.read_text().splitlines()]

    def finish(self, report: dict[str, Any]) -> None:
        self._file.close()
        head = json.dumps({name: value for name, value in report.items() if name != "frames"}, indent=1)
        rows = ",\n".join(json.dumps(row) for row in report["frames"])  # one line a frame
        with whole_file(self.path / REPORT) as part:
            part.write_text(f'{head[:-2]},\n "frames": [\n{rows}\n]\n}}\n')
        shutil.rmtree(self._work)


def _write_json(path: Path, value: Any) -> None:
    with whole_file(path) as part:
        part.write_text(json.dumps(value) + "\n")

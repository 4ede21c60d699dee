"""A data set segmented, scored and timed, as a row beside the paper's: ``dmm-fast benchmark``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmm_fast.data.annotated import DataError
from dmm_fast.data.datasets import VideoDataset
from dmm_fast.data.masks import VOID, read_ids
from dmm_fast.evaluation import Report, evaluate
from dmm_fast.files import listed, whole_file
from dmm_fast.inference.bench import machine
from dmm_fast.inference.engines import Engine
from dmm_fast.inference.sets import SetJob, segment_set
from dmm_fast.inference.videos import choose
from dmm_fast.ops.device import open_device
from dmm_fast.proposals.sources import is_detector

SOURCE = "Zeng et al., DMM-Net, ICCV 2019, arXiv:1909.12471"
OURS = "dmm_fast"


@dataclass(frozen=True)
class Table:
    """A table of the paper: its rows are (method, online learning, values), percent and frames/s as printed there."""

    number: int
    data: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, bool | None, tuple[float | None, ...]], ...]


TABLES = {
    1: Table(1, "the validation set of YouTube-VOS", ("J seen", "J unseen", "F seen", "F unseen", "G", "FPS"), (
        ("OSMN", False, (60.0, 40.6, 60.1, 44.0, 51.2, 8.0)),
        ("SiamMask", False, (60.2, 45.1, 58.2, 47.7, 52.8, 55)),
        ("RGMP", False, (59.5, None, 45.2, None, 53.8, 7)),
        ("OnAVOS", True, (60.1, 46.6, 62.7, 51.4, 55.2, None)),
        ("RVOS", False, (63.6, 45.5, 67.2, 51.0, 56.8, 24)),
        ("S2S", False, (66.7, 48.2, 65.5, 50.3, 57.7, 6)),
        ("OSVOS", True, (59.8, 54.2, 60.5, 60.7, 58.8, None)),
        ("S2S", True, (71.0, 55.5, 70.0, 61.2, 64.4, None)),
        ("DMM-Net", True, (59.2, 47.6, 62.6, 53.9, 55.8, None)),
        ("DMM-Net+", False, (58.3, 41.6, 60.7, 46.3, 51.7, 12)),
        ("DMM-Net+", True, (60.3, 50.6, 63.5, 57.4, 58.0, None)),
    )),
    2: Table(2, "the validation set of DAVIS 2017", ("J", "F", "G"), (
        ("MaskRNN", False, (45.5, None, None)),
        ("OSMN", False, (52.5, 57.1, 54.8)),
        ("FAVOS", False, (54.6, 61.8, 58.2)),
        ("VideoMatch", False, (56.5, None, None)),
        ("MSK", False, (63.3, 67.2, 65.3)),
        ("RGMP", False, (64.8, 68.6, 66.7)),
        ("FEELVOS", False, (65.9, 72.3, 69.1)),
        ("DyeNet", False, (67.3, 71.0, 69.1)),
        ("DMM-Net", False, (68.1, 73.3, 70.7)),
    )),
    3: Table(3, "SegTrack v2", ("mIoU*", "mIoU†"), (
        ("OSVOS", True, (61.9, 65.4)),
        ("OFL", True, (67.5, None)),
        ("MSK", True, (67.4, 70.3)),
        ("RGMP", False, (None, 71.1)),
        ("MaskRNN", None, (72.1, None)),
        ("LucidTracker", True, (None, 77.6)),
        ("DyeNet", False, (None, 78.3)),
        ("DyeNet", True, (None, 78.7)),
        ("DMM-Net", False, (76.8, 76.7)),
    )),
}  # fmt: skip
NEAREST = {"youtube-vos": 1, "davis": 2, "segtrack": 3}  # the table for a layout


def benchmark(
    job: SetJob,
    sequences: Sequence[str] | None = None,
    *,
    table: int | None = None,
    workers: int = 0,
    engine: Engine | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Segment the videos of a data set with ground truth, score them, and write OUT/benchmark.json and OUT/benchmark.md.

    table: 1, 2 or 3, whose rows stand beside the result; None: that of the layout, 0: none. workers: processes that score. Videos
    that are finished are not done again. Returns what benchmark.json holds: ``row``, ``data``, ``scores``, ``notes``, ``failed``,
    and ``markdown``. engine: as in `segment_set`; returns None where that does.

    Raises DataError before anything is computed where a video has no ground truth to score.
    """
    if engine is not None and not engine.first:
        return segment_set(job, sequences, engine=engine)
    dataset = job.open()
    names = choose(dataset, sequences)
    how = protocol_of(dataset, names)
    # With an engine the GPUs may be elsewhere.
    facts = machine(open_device(job.options.get("device", "cpu") if torch.cuda.is_available() else "cpu"))
    summary = segment_set(job, names, engine=engine, progress=progress)
    if summary is None:
        return None
    done = list(summary["videos"])
    if not done:
        name, why = next(iter(summary["failed"].items()))
        raise DataError(f"all {len(names)} videos failed; {name}: {why['error']}")
    scores = evaluate(how["truth"], job.out, how["protocol"], sequences=done, foreground=how["foreground"], workers=workers,
                      progress=progress and sys.stderr.isatty())  # fmt: skip
    number = NEAREST.get(dataset.layout, 0) if table is None else table
    result = {
        "row": {
            "method": _method(job),
            "online": job.options.get("online") is not None,
            **_values(scores),
            "FPS": summary["fps"],
        },
        "data": summary["dataset"] | {"segmented": len(done), "frames": summary["frames"], "objects": len(scores.objects)},
        "scores": {"settings": scores.settings, "summary": scores.summary, "per_object": scores.per_object},
        "seconds": summary["seconds"],
        "machine": facts,
        "notes": _notes(job, dataset, names, summary, number),
        "failed": summary["failed"],
    }
    result["markdown"] = _markdown(result, TABLES.get(number))
    for name, text in (("benchmark.json", json.dumps(result, indent=1) + "\n"), ("benchmark.md", result["markdown"])):
        with whole_file(Path(job.out) / name) as part:
            part.write_text(text)
    return result


def protocol_of(dataset: VideoDataset, names: list[str]) -> dict[str, Any]:
    """How a data set is scored: the folder of the ground truth, the protocol, and whether all that is not background is one object."""
    truth = dataset.truth()
    if truth is None or not truth.is_dir():
        raise DataError(f"{dataset.path}: there is no ground truth; dmm-fast segment --dataset segments without it")
    bare: list[str] = []
    single: list[str] = []  # masks of 0 and 255
    several: list[str] = []
    for name in names:
        try:
            video = dataset.video(name)
        except Exception:  # it will fail, and be reported then
            continue
        if not video.dense or len(video.annotated) < 3:
            bare.append(name)
        elif dataset.layout in ("folder", "video"):
            mask = truth / name / f"{video.stems[video.annotated[0]]}.png"
            (single if mask.is_file() and set(np.unique(read_ids(mask)).tolist()) <= {0, VOID} else several).append(name)
    if bare:
        raise DataError(
            f"{truth}: {len(bare)} of {len(names)} videos have no masks to score with but those of the first frames ({listed(bare)}); "
            f"dmm-fast segment --dataset --zip makes what their server scores"
        )
    if single and several:
        raise DataError(
            f"{truth}: masks of 0 and 255 ({listed(single)}) and id maps ({listed(several)}); score them apart, by --sequences"
        )
    protocol = {"davis": "davis", "segtrack": "segtrack"}.get(dataset.layout, "vos")
    foreground = bool(single) or getattr(dataset, "year", None) == "2016"
    return {"truth": truth, "protocol": protocol, "foreground": foreground}


def _values(scores: Report) -> dict[str, float]:
    names = ("mIoU*", "mIoU†") if "mIoU*" in scores.summary else ("J", "F", "G")
    return {name: round(100 * scores.summary[name], 2) for name in names}


def _method(job: SetJob) -> str:
    options = job.options
    network = Path(options["weights"]).stem if options.get("weights") else options.get("preset") or "small"
    changed = [f"{name} {value}" for name, usual in (("short_side", None), ("refine", None), ("matcher", "dmm"), ("decision", "confident"))
               if (value := options.get(name, usual)) != usual]  # fmt: skip
    return ", ".join([f"{OURS} {network}", *changed])


def _notes(job: SetJob, dataset: VideoDataset, names: list[str], summary: dict[str, Any], number: int) -> list[str]:
    live = is_detector(job.proposals) and not job.keep_proposals
    found = f"the detector {job.proposals}, live" if live else f"files ({job.proposals})"
    notes = [
        f"Proposals from {found}; FPS is from decoding to writing{'' if live else ', without the time it took to find proposals'}."
    ]
    if (processes := summary["processes"])["engine"] != "one process":
        notes.append(f"Segmented by many processes ({processes['engine']}): FPS is that of one while the others worked, the machine that "
                     "on which the command ran.")  # fmt: skip
    if failed := summary["failed"]:
        notes.append(f"{len(failed)} of {len(names)} videos failed and are not in the row: {listed(list(failed))}.")
    if len(names) < len(dataset):
        notes.append(f"{len(names)} of the data set's {len(dataset)} videos.")
    table = TABLES.get(number)
    same = {1: False, 2: (getattr(dataset, "year", None), dataset.split) == ("2017", "val"), 3: dataset.layout == "segtrack"}
    if table and (not same[number] or failed or len(names) < len(dataset)):
        notes.append(f"The paper's rows are of {table.data}: not of these videos, so they are not comparable with this row.")
    return notes


def _markdown(result: dict[str, Any], table: Table | None) -> str:
    """The rows, ours last."""
    row, data = result["row"], result["data"]
    own = {
        **row,
        "J seen": row.get("J"),
        "F seen": row.get("F"),
    }  # categories of a split with ground truth are those of training
    columns = list(table.columns) if table else [name for name in row if name not in ("method", "online", "FPS")]
    if table and not any(own.get(name) is not None for name in columns):  # of a table in other measures
        columns += [name for name in row if name not in ("method", "online", "FPS")]
    columns += ["FPS"] * ("FPS" not in columns)
    lines = [["method", "online", *columns], ["---", "---", *["--:"] * len(columns)]]
    for method, online, values in table.rows if table else ():
        cells = dict(zip(table.columns if table else (), values))
        lines.append([method, {True: "yes", False: "no", None: "-"}[online], *(_cell(cells.get(name)) for name in columns)])
    lines.append(
        [f"**{row['method']}**", "yes" if row["online"] else "no", *(f"**{_cell(own.get(name))}**" for name in columns)]
    )
    where = " ".join(str(part) for part in (data["layout"], data["split"]) if part)
    scored = ", ".join(f"{name}: {value}" for name, value in result["scores"]["settings"].items())
    facts = result["machine"]
    computer = facts.get("GPU") or f"{facts['CPU']}, {facts['threads']} threads, load {facts['load before']} before"
    told = [
        f"{row['method']}: {Path(data['path']).name} ({where}), {data['segmented']} videos, {data['objects']} objects, {data['frames']} "
        f"frames; {scored}; {computer}.",
        *result["notes"],
        *([f"The other rows: {SOURCE}, Table {table.number}, {table.data}."] if table else []),
    ]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", *(f"- {note}" for note in told), ""])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

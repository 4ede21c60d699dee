"""What a frame costs, stage by stage, by number of objects and by runtime: ``dmm-fast bench``.

Every runtime follows the same objects through the same clip, with the same files in and out, in turns. Times are wall-clock
milliseconds of one frame, one stage after the other; the first frames (compilation, caches) do not count.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dmm_fast import __version__
from dmm_fast.data.masks import read_mask, write_mask
from dmm_fast.data.synthetic import Scene
from dmm_fast.model import DMMNet, Proposals, inference
from dmm_fast.model.masks import mask_boxes
from dmm_fast.proposals.coco import CocoWriter, read_coco
from dmm_fast.proposals.live import Live, shares_backbone
from dmm_fast.proposals.sources import open_proposer

RUNTIMES = ("eager", "torchscript", "pt2", "onnx", "c++ torchscript", "c++ pt2")
STAGES = ("decode", "features", "proposals", "matching", "refinement", "step", "write")
WARM = 5  # frames that do not count
ROUNDS = 3  # runtimes take turns, as the machine's speed may drift

Times = dict[str, list[float]]  # by stage, milliseconds per frame
Stages = list[tuple[str, Callable[[dict[str, Any]], None]]]


def bench(
    net: DMMNet,
    *,
    objects: list[int],
    runtimes: list[str],
    size: tuple[int, int] = (255, 448),
    frames: int = 40,
    proposals: int = 50,
    detector: str | None = None,
    precision: str = "float32",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure; returns {"machine", "settings", "rows"}, one row per runtime, number of objects and stage.

    detector: a live one (see `open_proposer`) in place of proposals that are read from a file; exported along with the network, and
    part of the step: a backbone that both have runs once, in "features". precision: of the runtime "eager", see `Segmenter`; ValueError
    where another one is asked for too, which would run in float32 beside it.
    """
    if precision != "float32" and set(runtimes) != {"eager"}:
        raise ValueError(f"bench: precision {precision} is of the runtime eager alone: with it, --runtimes must be eager")
    _check_proposals(net, proposals)
    device = net.mean.device
    fast, stages_of_fast = _stages_of(net, detector, precision)
    source = (
        "read from a file, as any detector's: its own time is not included" if detector is None else f"by {detector}, included"
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dmm-bench-") as folder:
        exports = _Exports(net, Path(folder), size, detector, progress)
        for count in objects:
            clip = Path(folder) / f"clip-{count}"
            _make_clip(clip, count, 1 + WARM + math.ceil(frames / ROUNDS), size, proposals)
            turns: dict[str, Times] = {name: defaultdict(list) for name in runtimes}
            for name in runtimes * ROUNDS:
                if name == "eager":
                    found = _python(fast, stages_of_fast, clip, device, detector is None)
                else:
                    found = _exported(name, exports, clip, device, detector is not None)
                for stage, times in found.items():
                    turns[name][stage] += times[WARM:]
            for name, stages in turns.items():
                for stage in (stage for stage in STAGES if stage in stages):
                    counted = np.array(stages[stage])
                    p50, p99 = np.percentile(counted, (50, 99))
                    row = {"runtime": name, "objects": count, "stage": stage, "p50": p50, "p99": p99, "mean": counted.mean()}
                    rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
                progress(f"{count} objects, {name}: step {rows[-2]['p50']:.2f} ms")
    settings = {
        "config": net.config.to_dict(), "device": str(device), "size": list(size),
        "frames": ROUNDS * math.ceil(frames / ROUNDS),
        "proposals a frame": proposals, "proposals": source, "detector": detector, "precision": precision,
    }  # fmt: skip
    return {"machine": machine(device), "settings": settings, "rows": rows}


def _check_proposals(net: DMMNet, proposals: int) -> None:
    if proposals > net.config.top:
        raise ValueError(f"bench: this network takes at most {net.config.top} proposals a frame, got {proposals}")


def bench_frame_sizes(
    net: DMMNet,
    *,
    sizes: list[tuple[int, int]],
    objects: int = 3,
    frames: int = 15,
    proposals: int = 50,
    detector: str | None = None,
    precision: str = "float32",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """As `bench`, of the network in eager PyTorch alone, by the frames' size (height, width); the sizes take turns."""
    _check_proposals(net, proposals)
    device = net.mean.device
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dmm-bench-") as folder:
        clips = {size: Path(folder) / f"{size[0]}x{size[1]}" for size in sizes}
        for size, clip in clips.items():
            progress(f"making a clip of {size[1]}x{size[0]}")
            _make_clip(clip, objects, 1 + WARM + math.ceil(frames / ROUNDS), size, proposals)
        turns: dict[tuple[int, int], Times] = {size: defaultdict(list) for size in sizes}
        fast, stages_of_fast = _stages_of(net, detector, precision)
        for size in sizes * ROUNDS:
            for stage, times in _python(fast, stages_of_fast, clips[size], device, detector is None).items():
                turns[size][stage] += times[WARM:]
    for size, stages in turns.items():
        row = {"size": list(size), "objects": objects, **{stage: float(np.median(stages[stage])) for stage in STAGES}}
        rows.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    settings = {
        "config": net.config.to_dict(), "device": str(device), "proposals a frame": proposals, "detector": detector,
        "precision": precision,
    }  # fmt: skip
    return {"machine": machine(device), "settings": settings, "rows": rows}


def frame_size_table(report: dict[str, Any]) -> str:
    """Medians of every stage in milliseconds, one line per size, and the step against that of the first size."""
    lines = [", ".join(f"{key} {value}" for key, value in report["machine"].items())]
    rows = report["rows"]
    lines.append(f"{rows[0]['objects']} objects, medians in ms; {_what_a_step_is(report['settings']['detector'])}")
    lines.append(f"{'frame':>10}" + "".join(f"{stage:>12}" for stage in STAGES) + f"{'step, ratio':>14}")
    for row in rows:
        height, width = row["size"]
        cells = "".join(f"{row[stage]:12.1f}" for stage in STAGES)
        lines.append(f"{f'{width}x{height}':>10}{cells}{row['step'] / rows[0]['step']:14.2f}")
    return "\n".join(lines)


def _what_a_step_is(detector: str | None) -> str:
    return "step = features + matching + refinement" if detector is None else "step = features to refinement"


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    facts = {
        "dmm_fast": __version__, "torch": torch.__version__, "CPU": cpu or platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load before": round(os.getloadavg()[0], 1),
    }  # fmt: skip
    return {**facts, "GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else facts


def table(report: dict[str, Any]) -> str:
    """p50 / p99 of every stage, one line per runtime and number of objects."""
    cells: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for row in report["rows"]:
        cells[row["objects"], row["runtime"]][row["stage"]] = f"{row['p50']:.2f}/{row['p99']:.2f}"
    lines = [", ".join(f"{key} {value}" for key, value in report["machine"].items())]
    settings = report["settings"]
    lines.append(f"proposals: {settings['proposals']}; p50/p99 in ms; {_what_a_step_is(settings['detector'])}")
    lines.append(f"{'objects':>7}  {'runtime':16}" + "".join(f"{stage:>16}" for stage in STAGES))
    for (count, name), stages in cells.items():
        lines.append(f"{count:>7}  {name:16}" + "".join(f"{stages.get(stage, '-'):>16}" for stage in STAGES))
    return "\n".join(lines)


def plot(report: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Median milliseconds of a step against the number of objects, one line per runtime."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name in dict.fromkeys(row["runtime"] for row in report["rows"]):
        steps = [row for row in report["rows"] if row["runtime"] == name and row["stage"] == "step"]
        axes.plot([row["objects"] for row in steps], [row["p50"] for row in steps], "o-", label=name)
    height, width = report["settings"]["size"]
    facts = report["machine"]
    axes.set(xlabel="objects", ylabel="ms per step (median)", ylim=(0, None))
    axes.set_title(f"{width}x{height}, {facts.get('GPU', facts['CPU'])}", fontsize=9)
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------- what is measured


class _Exports:
    """Exports of one net, and its detector if any, for frames of one size; each made when first asked for."""

    def __init__(self, net: DMMNet, folder: Path, size: tuple[int, int], detector: str | None, progress: Callable[[str], None]):
        self.net, self.folder, self.size, self.detector, self.progress = net, folder, size, detector, progress

    def __call__(self, kind: str) -> Path:
        from dmm_fast.export import Sizes, export

        path = self.folder / kind
        if not path.exists():
            self.progress(f"exporting {kind}")
            device = self.net.mean.device
            options: dict[str, Any] = {} if kind == "torchscript" else {"sizes": Sizes(H=self.size[0], W=self.size[1])}
            detector: Any = None if self.detector is None else open_proposer(self.detector, device=device)
            export(kind, self.net, path, detector=detector, **options)
        return path


def _make_clip(folder: Path, objects: int, frames: int, size: tuple[int, int], proposals: int) -> None:
    """JPEG frames, first.png and proposals.json with exactly `proposals` a frame."""
    scene = Scene(3, size=size, objects=objects, strangers=0, length=(0.25, 0.35), clutter=proposals)
    (folder / "frames").mkdir(parents=True)
    with CocoWriter(folder / "proposals.json", size, fresh=True) as writer:
        for number in range(frames):
            frame, ids = scene.render(number)
            Image.fromarray(frame).save(folder / "frames" / f"{number:05d}.jpg", quality=94)
            if number == 0:
                write_mask(folder / "first.png", ids)
            masks, scores = (torch.from_numpy(array) for array in scene.proposals(number))
            best = scores.argsort(descending=True)[:proposals]
            writer.add(f"{number:05d}", Proposals(mask_boxes(masks[best]), scores[best], masks[best]))


def _exported(name: str, exports: _Exports, clip: Path, device: torch.device, live: bool) -> Times:
    if name.startswith("c++ "):
        return _cpp(exports(name.removeprefix("c++ ")), clip, device, live)
    from dmm_fast.export import load

    exported = load(exports(name), device=str(device))

    def step(kept: dict[str, Any]) -> None:
        if live:
            _, kept["output"], kept["state"] = exported.live(kept["frame"], kept["state"])
        else:
            kept["output"], kept["state"] = exported.step(kept["frame"], kept["proposals"], kept["state"])

    return _python(exported, [("step", step)], clip, device, not live)


def _stages_of(net: DMMNet, detector: str | None, precision: str) -> tuple[DMMNet, Stages]:
    """The network as it runs, and its step in parts, each from and to `kept`; with a detector, proposals are one of them."""
    dtype = getattr(torch, precision)
    fast = inference(net, dtype)

    def features(kept: dict[str, Any]) -> None:
        kept["features"] = fast.encode(kept["frame"][None])

    def matching(kept: dict[str, Any]) -> None:
        kept["candidates"] = fast.prepare(kept["proposals"], kept["state"], *kept["frame"].shape[1:])
        kept["affinity"] = fast.compare(kept["features"], kept["candidates"], kept["state"])
        kept["x"] = fast.match(fast.cost(kept["affinity"]), kept["candidates"].scores, kept["state"].valid)

    def refinement(kept: dict[str, Any]) -> None:
        given = (kept[name] for name in ("features", "candidates", "affinity", "x", "state"))
        kept["output"], kept["state"] = fast.decide(*given)

    rest = [("matching", matching), ("refinement", refinement)]
    if detector is None:
        return fast, [("features", features), *rest]
    proposer: Any = open_proposer(detector, device=net.mean.device)
    network = getattr(proposer, "network", None)
    live = None
    if network is not None:
        live = Live(fast, network.in_precision(dtype), shares_backbone(net, proposer)).eval()

    def proposals(kept: dict[str, Any]) -> None:
        kept["proposals"] = live.propose(kept["frame"], kept["features"]) if live else proposer(kept["frame"])

    return fast, [("features", features), ("proposals", proposals), *rest]


@torch.no_grad()
def _python(step: Any, stages: Stages, clip: Path, device: torch.device, from_file: bool) -> Times:
    """Follow the clip in Python. `step` has `start`; `stages` are its step, in parts that work on a dict."""
    times: Times = defaultdict(list)
    file = read_coco(clip / "proposals.json", top=1 << 20)  # all of them
    kept: dict[str, Any] = {}

    @contextlib.contextmanager
    def clock(stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times[stage].append(1e3 * (time.perf_counter() - begin))

    for path in sorted((clip / "frames").iterdir()):
        if not kept:
            image = np.array(Image.open(path))
            ids = torch.from_numpy(read_mask(clip / "first.png", image.shape[:2])).to(device)
            masks = torch.stack([ids == label for label in ids.unique() if label])
            frame = torch.from_numpy(image).to(device).permute(2, 0, 1).contiguous()
            kept["state"] = step.start(frame, masks, torch.ones(len(masks), dtype=torch.bool, device=device))
            continue
        with clock("decode"):
            image = np.array(Image.open(path))
            kept["frame"] = torch.from_numpy(image).to(device).permute(2, 0, 1).contiguous()
        if from_file:
            with clock("proposals"):
                kept["proposals"] = Proposals(*(part.to(device) for part in file.runs(path.stem, image.shape[:2])))
        for stage, work in stages:
            with clock(stage):
                work(kept)
        with clock("write"):
            write_mask(clip / "out.png", kept["output"].labels.cpu().numpy())
    if "step" not in times:
        times["step"] = [sum(parts) for parts in zip(*(times[stage] for stage, _ in stages))]
    return times


def _cpp(export: Path, clip: Path, device: torch.device, live: bool) -> Times:
    """Follow the clip with dmm-segment, which keeps the time itself. live: by the export's own proposals, not the file's."""
    from dmm_fast.runtime import PROGRAM

    report = clip / "report.json"
    given = {"model": export, "frames": clip / "frames", "masks": clip / "first.png"}
    if not live:
        given["proposals"] = clip / "proposals.json"
    how = {"out": clip / "masks", "report": report, "device": device, "threads": torch.get_num_threads()}
    words = [str(word) for name, value in {**given, **how}.items() for word in (f"--{name}", value)]
    result = subprocess.run([str(PROGRAM), *words, "--quiet", "--overwrite"], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"bench: {result.stderr.strip()}")
    times: Times = defaultdict(list)
    for row in json.loads(report.read_text())["frames"][1:]:  # the first is given
        for stage, milliseconds in row["ms"].items():
            times[stage].append(milliseconds)
    return times

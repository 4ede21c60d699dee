"""Follow objects in a camera's or a stream's frames as they come: what ``dmm-fast segment camera:0`` runs."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dmm_fast.data.masks import read_first_masks, write_mask
from dmm_fast.data.stream import Snapshot, Stream, public_name
from dmm_fast.data.video import Behind, ImageFrames, check_video_name
from dmm_fast.files import whole_file
from dmm_fast.inference.folder import RECORDING, RunError, RunFolder
from dmm_fast.inference.passes import stop_requested
from dmm_fast.inference.report import by_object, row_of, speed
from dmm_fast.inference.results import check_kinds, check_overlay, write_results
from dmm_fast.inference.run import run_settings
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.model import Proposals
from dmm_fast.proposals.base import full_masks
from dmm_fast.proposals.sources import is_detector, open_proposer

SURE = 0.5  # the least score of a proposal that becomes an object by itself
SAME = 0.5  # IoU above which two proposals are one object
QUALITY = 95  # of recorded JPEGs


class LiveFrame(NamedTuple):
    """A frame of a stream with its masks."""

    snapshot: Snapshot
    ids: np.ndarray  # uint8 [H, W]
    objects: list[dict[str, Any]]  # as in a report's row
    latency: float  # seconds from the decoded frame to its masks


def follow_stream(
    stream: Stream, segmenter: Segmenter, first: Callable[[np.ndarray], np.ndarray] | None, seconds: dict[str, float]
) -> Iterator[LiveFrame]:
    """Every frame that there is time for, from the first for which `first` gives ids uint8 [H, W] that are not all 0.

    first: None where the segmenter has been started already.
    seconds: where the time goes, added up: "wait", "step".
    """
    mark = time.perf_counter()
    for snapshot in stream:
        seconds["wait"] += time.perf_counter() - mark
        mark = time.perf_counter()
        if first is None:
            result = segmenter.step(snapshot.frame)
            ids, objects = result.ids, [row_of(entry) for entry in result.objects]
        else:
            ids, objects = first(snapshot.frame), []
            if ids.any():
                segmenter.start(snapshot.frame, ids)
                first = None
                objects = [{"id": label, "given": True} for label in segmenter.object_ids]
        seconds["step"] += time.perf_counter() - mark
        yield LiveFrame(snapshot, ids, objects, time.monotonic() - snapshot.arrived)
        mark = time.perf_counter()


def surest(proposals: Proposals, size: tuple[int, int], count: int) -> np.ndarray:
    """Up to `count` proposals as objects 1, 2, ..: the best by score, none that another has already. -> ids uint8 [H, W]."""
    _, scores, masks = full_masks(proposals, size)
    ids, kept = np.zeros(size, np.uint8), list[np.ndarray]()
    for score, mask in zip(scores.tolist(), masks.cpu().numpy()):
        if len(kept) == count or score < SURE:
            break
        alone = all((mask & other).sum() <= SAME * (mask | other).sum() for other in kept)
        if alone and (visible := mask & (ids == 0)).any():
            kept.append(mask)
            ids[visible] = len(kept)
    return ids


def first_masks(
    masks: str | os.PathLike, stream: Stream, proposer: Any
) -> tuple[Callable[[np.ndarray], np.ndarray], list[str]]:
    """frame -> ids, by a file or by the detector ("auto:3"), and notes."""
    if _surest_wanted(masks):
        text = str(masks).partition(":")[2] or "1"
        if not (text.isdecimal() and 0 < int(text) < 255):
            raise RunError(f"{masks}: say auto for the surest proposal as object 1, or auto:N for the N surest")
        count = int(text)
        return lambda frame: surest(proposer(frame), stream.size, count), []
    ids, notes = read_first_masks(masks, stream.size)
    return lambda frame: ids, notes


def _surest_wanted(masks: str | os.PathLike) -> bool:
    return str(masks).partition(":")[0] == "auto"


def segment_stream(
    source: str,
    masks: str | os.PathLike,
    out: str | os.PathLike,
    *,
    proposals: str | os.PathLike = "small",
    detector_weights: str | os.PathLike = "DEFAULT",
    record: bool = False,
    save: Sequence[str] = ("masks",),
    video: str | os.PathLike | None = None,
    seconds: float | None = None,
    patience: float = 5.0,
    overwrite: bool = False,
    progress: bool = False,
    device: str = "cpu",
    **model: Any,
) -> dict[str, Any]:
    """Follow objects in a stream until it ends, Ctrl-C, or for some seconds; returns the report that is also in OUT/report.json.

    source: see `dmm_fast.data.stream.is_stream`. The newest frame is taken each time; the report counts those that were dropped.
    masks: the first frame's masks, or "auto:N" for the N surest proposals of the first frame that has any. record: keep the frames
    that were taken, in OUT/recording, and their masks; `save` and `video` need it (see `run.segment`). patience: seconds without
    a frame after which the source counts as gone. model: preset, weights, short_side, refine, matcher, decision, graph, precision, as `Segmenter` takes them.

    Raises RunError, FramesError, MaskError or ProposalError for input that cannot be used.
    """
    kinds, out = check_kinds(list(save)), Path(out)
    if (kinds or video) and not record:
        raise RunError(
            f"{'an overlay' if video else ' and '.join(kinds)} of a stream is made of its recorded frames: add --record"
        )
    if video is not None:
        check_video_name(video, coming=out)
        check_overlay(Path(video), overwrite)
    if not is_detector(proposals):
        raise RunError(f"{proposals}: a stream needs a live detector for its proposals, not a file of them")
    preset, weights, graph = (model.pop(name, None) for name in ("preset", "weights", "graph"))
    settings = run_settings(out / RECORDING, Path(masks), proposals, detector_weights, weights, preset=preset, **model)
    settings["source"] = public_name(source)
    if not record:
        settings["frames"] = settings["source"]
    if _surest_wanted(masks):
        settings["masks"] = str(masks)
    folder = RunFolder(out, settings)
    folder.find([], False, overwrite)
    proposer = open_proposer(proposals, detector_weights, device=device, precision=model.get("precision", "float32"))
    segmenter = Segmenter(preset, weights=weights, graph=graph, device=device, proposer=proposer, **model)
    spent: dict[str, float] = defaultdict(float)
    latencies: list[float] = []
    stream = Stream(source, patience)
    warm_up(segmenter, stream.size)
    try:
        with stream, stop_requested("ending after this frame; press again to stop at once") as stop:
            first, notes = first_masks(masks, stream, proposer)
            folder.begin([], False, False, overwrite)
            kept = folder.passes["forward"]
            kept.begin()
            bar = tqdm(unit=" frames", disable=None if progress else True)
            begin = time.monotonic()
            with bar, Behind() as behind:
                for number, found in enumerate(follow_stream(stream, segmenter, first, spent)):
                    row = _row(number, found, begin)
                    mark = time.perf_counter()
                    behind(_keep, folder, row, found, record)
                    spent["write"] += time.perf_counter() - mark
                    if found.objects:
                        latencies.append(found.latency)
                    bar.update()
                    bar.set_postfix_str(f"latency {1000 * found.latency:.0f} ms, {stream.dropped} dropped", refresh=False)
                    if stop() or (seconds is not None and time.monotonic() - begin >= seconds):
                        stream.ended = "stopped" if stop() else f"after {seconds:g} s, as asked"
                        break
        kept.close()
        rows = kept.rows()
        if not latencies:
            raise RunError(f"{stream.name}: {stream.ended}; no object was found in {len(rows)} frames")
        if record and _surest_wanted(masks):
            settings["masks"] = str(folder.mask(next(row["frame"] for row in rows if row["objects"])).resolve())
        report: dict[str, Any] = {
            "dmm_fast": version("dmm_fast"),
            "settings": {**settings, "device": str(segmenter.device), "graph": segmenter.graph},
            "size": list(stream.size),
            "notes": [segmenter.note, *notes, f"the stream ended: {stream.ended}"],
            "speed": speed(len(rows), spent) | live_speed([row["time"] for row in rows], stream.dropped, latencies),
            "results": kinds,
            "objects": by_object(rows),
            "frames": rows,
        }
        if record:
            frames = ImageFrames(out / RECORDING)
            frames.fps = report["speed"]["fps"]
            report["notes"] += write_results(
                frames, folder, report, kinds, Path(video) if video is not None else None, progress
            )
        folder.finish(report)
    finally:
        folder.release()
    return report


def warm_up(segmenter: Segmenter, size: tuple[int, int]) -> None:
    """The first step is slow; so it is not one of the stream's."""
    frame = np.zeros((*size, 3), np.uint8)
    ids = np.zeros(size, np.uint8)
    ids[: size[0] // 2, : size[1] // 2] = 1
    segmenter.start(frame, ids)
    segmenter.step(frame)


def live_speed(times: list[float], dropped: int, latencies: list[float]) -> dict[str, Any]:
    """Frames taken per second, frames that were dropped, and how late masks are, in seconds. times: when each frame came in."""
    lasted = times[-1] - times[0]
    mean, high = float(np.mean(latencies)), float(np.percentile(latencies, 95))
    return {
        "fps": round((len(times) - 1) / lasted, 2) if lasted > 0 else None,
        "dropped": dropped,
        "latency": {"mean": round(mean, 4), "p95": round(high, 4), "max": round(max(latencies), 4)},
    }


def _row(number: int, found: LiveFrame, begin: float) -> dict[str, Any]:
    times = {"time": round(found.snapshot.arrived - begin, 4), "latency": round(found.latency, 4)}
    return {"frame": f"{number:06d}", "number": found.snapshot.number, **times, "objects": found.objects}


def _keep(folder: RunFolder, row: dict[str, Any], found: LiveFrame, record: bool) -> None:
    if record:
        (folder.path / RECORDING).mkdir(exist_ok=True)
        write_frame(folder.path / RECORDING / f"{row['frame']}.jpg", found.snapshot.frame)
        write_mask(folder.mask(row["frame"]), found.ids)
    folder.passes["forward"].append(row)


def write_frame(path: Path, frame: np.ndarray) -> None:
    """A frame of a recording."""
    with whole_file(path) as part:
        Image.fromarray(frame).save(part, "JPEG", quality=QUALITY)

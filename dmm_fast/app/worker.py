"""The thread that follows the objects: from the first frame that is open or stale, until none is."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np

from dmm_fast.app.project import DONE, Project
from dmm_fast.data.video import Behind, FramesError, prefetch
from dmm_fast.inference.proposing import Live, proposal_source
from dmm_fast.inference.report import by_object, row_of, speed
from dmm_fast.inference.run import config_of, run_settings
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.model import Proposals

SAVE_EVERY = 3.0  # seconds between saved states
HAND_OVER_EVERY = 30.0  # seconds between states of results/ that `dmm-fast segment --resume` can go on from
Notify = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """How objects are followed; the words are those of `dmm_fast.inference.run.segment`."""

    proposals: str = "small"
    detector_weights: str = "DEFAULT"
    weights: str | None = None
    device: str = "cpu"
    graph: bool | None = None
    model: dict[str, Any] = field(default_factory=dict)  # preset, backbone, short_side, refine, matcher, decision, precision

    def build(self, proposer: Any) -> Segmenter:
        model = dict(self.model)
        preset, backbone = model.pop("preset", None), model.pop("backbone", None)
        return Segmenter(
            config_of(preset, backbone), weights=self.weights, device=self.device, graph=self.graph, proposer=proposer, **model
        )


class Worker:
    """Runs in a thread of its own from `start` until `stop`, an error, or until every frame is done; says what it does to `notify`."""

    def __init__(self, project: Project, settings: Settings, notify: Notify = lambda event: None):
        self.project, self.settings, self.notify = project, settings, notify
        self.models = threading.Lock()  # one user of the networks at a time
        self._propose: Any = None
        self._segmenter: Segmenter | None = None
        self._shown: OrderedDict[int, Proposals] = OrderedDict()  # proposals of frames shown lately
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.seconds: dict[str, float] = defaultdict(float)  # where a run's time goes
        self._notes: list[str] = []
        self._following, self._handed = False, 0.0
        self.state: dict[str, Any] = {
            "done": project.status.count(DONE),
            "running": False,
            "message": "",
            "error": "",
            "fps": 0.0,
            "left": None,
        }

    # ------------------------------------------------------------------------------------------------- start and stop

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        if self.running:
            return
        if not self.project.given:
            raise ValueError("there is no mask yet: give an object its mask in any frame first")
        self._stop.clear()
        self._thread = threading.Thread(target=self._work, name="segmentation", daemon=True)
        self._say(running=True, message="loading the network", error="", fps=0.0, left=None)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the frame at hand is done and saved."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def changed(self, message: str = "") -> None:
        """The masks are no longer those of the last run."""
        self._say(message=message, left=None)

    def _say(self, **changes: Any) -> None:
        self.state = {**self.state, **changes, "done": self.project.status.count(DONE)}
        self.notify({"kind": "run", **self.state})

    def _work(self) -> None:
        message, error = "", ""
        try:
            with self.models:
                self.ready()
            done = self._follow()
            message = "done" if done else "stopped"
        except Exception as fault:  # whatever it is, the page has to say it
            traceback.print_exc()
            error = str(fault) or type(fault).__name__
        self._say(running=False, message=message, error=error, fps=0.0, left=None)

    # ----------------------------------------------------------------------------------------------------- proposals

    def _source(self) -> Any:
        if self._propose is None:
            s = self.settings
            frames = self.project.clip.frames
            self._propose, self._notes = proposal_source(s.proposals, s.detector_weights, None, frames, s.device)
        return self._propose

    def proposals(self, index: int) -> Proposals:
        """Of one frame, for people to choose from."""
        with self.models:
            if index not in self._shown:
                frame = self.project.clip.frame(index)
                self._shown[index] = Proposals(*(part.cpu() for part in self._source()(self.project.clip.stems[index], frame)))
                if len(self._shown) > 16:
                    self._shown.popitem(last=False)
            self._shown.move_to_end(index)
            return self._shown[index]

    # ------------------------------------------------------------------------------------------------------- the run

    def ready(self) -> Segmenter:
        """The segmenter, made when first asked for; call it with `models` held."""
        if self._segmenter is None:
            source = self._source()
            self._segmenter = self.settings.build(source.proposer if isinstance(source, Live) else None)
            self._notes = [self._segmenter.note, *self._notes]
        return self._segmenter

    def _follow(self) -> bool:
        """Span by span; returns whether every frame is done."""
        self._handed = time.monotonic()
        with self.project.alone():
            try:
                while not self._stop.is_set():
                    target = self.project.next_open()
                    if target is None:
                        return True
                    self._span(target)
                return False
            finally:
                self.hand_over()

    def _span(self, target: int) -> None:
        """From `target` up to the next frame that is done; from the last saved state before it, what is between is made again."""
        project = self.project
        first, end = min(project.given), self._end(target)
        for index in range(target, min(first, end)):  # there is nothing to follow yet
            if self._stop.is_set():
                return
            self._record(index, np.zeros(project.clip.size, np.uint8), [])
            self._say(message="empty frames before the first mask")
        target = max(target, first)
        if target >= end:
            return
        start, self._following = self._restore(target, first)
        saved, at, recent = time.monotonic(), start - 1, deque([time.monotonic()], maxlen=20)
        with Behind() as behind:
            for index, frame in prefetch(project.clip.read(start)):
                ids, objects = self._one(index, frame)
                at = index
                if index >= target:
                    behind(self._record, index, ids, objects)
                recent.append(time.monotonic())
                self._tell(index, target, (len(recent) - 1) / (recent[-1] - recent[0]))
                if index + 1 >= end or self._stop.is_set():
                    break
                if time.monotonic() - saved > SAVE_EVERY:
                    behind.wait()
                    self._save(at)
                    saved = time.monotonic()
        if at + 1 < end and not self._stop.is_set():
            raise FramesError(f"{project.clip.path}: frame {at + 1} cannot be decoded")
        self._save(at)

    def _end(self, target: int) -> int:
        done = self.project.status.find(DONE, target)
        return len(self.project.clip) if done < 0 else done

    def _restore(self, target: int, first: int) -> tuple[int, bool]:
        """Where to go on so as to come to `target`, and whether objects are followed there."""
        found = self.project.state_before(target)
        if found is None or found[0] < first:
            return first, False
        assert self._segmenter is not None
        with self.models:
            self._segmenter.restore(found[1])
            given = self.project.given_until(found[0])  # an object that was removed may have left its id to another
            if removed := [label for label in self._segmenter.object_ids if label not in given]:
                self._segmenter.drop(removed)
            return found[0] + 1, bool(self._segmenter.object_ids)

    def _one(self, index: int, frame: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """One frame: follow, let objects end, take in those that were given here."""
        project, segmenter, stem = self.project, self._segmenter, self.project.clip.stems[index]
        assert segmenter is not None
        given, ends = project.given.get(index, set()), project.ends.get(index, set())
        with self.models:
            ids, objects, stepped = np.zeros(frame.shape[:2], np.uint8), [], self._following
            if stepped:
                proposals = None  # a detector's are part of the step
                if not isinstance(self._propose, Live):
                    with self._clock("proposals"):
                        proposals = self._propose(stem, frame)
                with self._clock("step"):
                    result = segmenter.step(frame, proposals)
                ids, objects = np.array(result.ids), [row_of(e) for e in result.objects if e.id not in given | ends]
                if gone := [label for label in segmenter.object_ids if label in given | ends]:
                    ids[np.isin(ids, gone)] = 0
                    segmenter.drop(gone)
            if given:
                painted = project.given_ids(index)
                new = {label: painted == label for label in sorted(given)}
                with self._clock("step"):
                    segmenter.add(new) if stepped else segmenter.start(frame, new)
                ids = np.where(painted > 0, painted, ids)
                objects += [{"id": label, "given": True} for label in new]
            self._following = (stepped or bool(given)) and bool(segmenter.object_ids)
        return ids, objects

    def _record(self, index: int, ids: np.ndarray, objects: list[dict[str, Any]]) -> None:
        with self._clock("write"):
            self.project.record(index, ids, objects)
        self.notify({"kind": "frame", "frame": index, "objects": objects})

    def _tell(self, index: int, target: int, fps: float) -> None:
        left = len(self.project.clip) - self.project.status.count(DONE)
        message = "following" if index >= target else f"catching up to frame {target + 1}"
        self._say(message=message, fps=round(fps, 2), left=round((left + max(0, target - index)) / fps, 1))

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin

    def _save(self, index: int) -> None:
        """The state after this frame; now and then results/ is left as another program can go on from."""
        if index >= 0 and self._following:
            assert self._segmenter is not None
            self._segmenter.save(self.project.state_file(index))
            self.project.thin_states(index)
        if time.monotonic() - self._handed > HAND_OVER_EVERY:
            self.hand_over()

    def hand_over(self) -> None:
        """results/ as `dmm-fast segment` leaves it."""
        project, s = self.project, self.settings
        if self._segmenter is None or not project.rows:
            return
        settings = run_settings(project.clip.path, project.masks, s.proposals, s.detector_weights, s.weights, **s.model)
        rows = [{"frame": project.clip.stems[index], "objects": row} for index, row in sorted(project.rows.items())]
        about = {
            "dmm_fast": version("dmm_fast"),
            "settings": {**settings, "device": str(self._segmenter.device), "graph": self._segmenter.graph},
            "size": list(project.clip.size),
            "notes": self._notes,
            "speed": speed(len(rows), self.seconds),
            "objects": by_object(rows),
        }
        if project.recorded:
            about["recorded"] = project.recorded
        project.hand_over(settings, about)
        self._handed = time.monotonic()

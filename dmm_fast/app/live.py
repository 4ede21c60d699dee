"""A camera or a stream in the page: watched until a frame is taken, then followed from that frame's masks at its newest frame.

WATCHING   the newest frame is shown; there is no project yet
TAKEN      one frame is the clip of a new project, PROJECT/recording, and gets its masks like any other
FOLLOWING  the newest frames are followed, shown and (where that is on) appended to the clip
DONE       the project is that of an ordinary clip; the source is closed
"""

from __future__ import annotations

import re
import shutil
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dmm_fast.app.clip import jpeg, scaled
from dmm_fast.app.project import Project, ProjectError, check_free, new_folder
from dmm_fast.app.worker import SAVE_EVERY, Notify, Worker
from dmm_fast.data.stream import Stream, public_name
from dmm_fast.data.video import Behind, FramesError
from dmm_fast.inference.folder import RECORDING
from dmm_fast.inference.live import LiveFrame, follow_stream, live_speed, warm_up, write_frame
from dmm_fast.inference.overlay import overlay
from dmm_fast.inference.segmenter import Segmenter

WATCHING, TAKEN, FOLLOWING, DONE = "watching", "taken", "following", "done"
IDLE = 0.2  # seconds between looks at the source while a frame is painted
Open = Callable[[Path, Path], tuple[Project, Worker]]


class Live:
    """Reads the source in a thread of its own. `state` is what the page shows; changes of it that matter go to `notify`.

    folder: of the project, made when a frame is taken; None for one named by source and time. opened, closed: called to open and to leave a
    project. Methods may be called from several threads. Raises FramesError where the source cannot be opened.
    """

    def __init__(self, source: str, folder: Path | None, opened: Open, closed: Callable[[], None], notify: Notify):
        self.source, self.name, self.folder = source, public_name(source), folder or default_folder(source)
        check_free(self.folder)
        self._opened, self._closed, self.notify = opened, closed, notify
        self._project: Project | None = None
        self._worker: Worker | None = None
        self._lock = threading.RLock()  # of what people do
        self._go, self._stop, self._closing = threading.Event(), threading.Event(), False
        self.count = 0  # of frames shown
        self._shown: tuple[np.ndarray, np.ndarray | None] | None = None  # the newest frame, and its masks
        self._picture: tuple[tuple[int, int], bytes] = ((-1, 0), b"")
        self._recent: deque[float] = deque(maxlen=20)
        self._thread: threading.Thread | None = None
        self.state: dict[str, Any] = {
            "source": self.name, "phase": WATCHING, "ended": "", "size": (0, 0), "record": True, "message": "",
            "fps": 0.0, "frames": 0, "dropped": 0, "latency": None, "mean": None, "lost": [],
        }  # fmt: skip
        self.connect()

    @property
    def phase(self) -> str:
        return self.state["phase"]

    def _say(self, **changes: Any) -> None:
        self.state = {**self.state, **changes}
        self.notify({"kind": "live", **self.state})

    # ------------------------------------------------------------------------------------------------ what people do

    def connect(self) -> None:
        """Open the source, the first time or after it has ended."""
        with self._lock:
            if self._thread is not None and not self.state["ended"]:
                raise ProjectError(f"{self.name}: is open already")
            stream = Stream(self.source)
            if self._project is not None and stream.size != self._project.clip.size:
                with stream:  # which closes it
                    raise FramesError("{0}: the frames are {2}x{1} now, the one that was taken is {4}x{3}; go back to live"
                                      .format(self.name, *stream.size, *self._project.clip.size))  # fmt: skip
            self._go.clear()
            self._thread = threading.Thread(target=self._work, args=(stream,), name=f"live {self.name}", daemon=True)
            self._thread.start()
            self._say(ended="", size=stream.size)

    def take(self) -> None:
        """The newest frame becomes the clip of a project."""
        with self._lock:
            if self.phase != WATCHING:
                raise ProjectError("a frame has been taken already")
            if self._shown is None or self.state["ended"]:
                raise ProjectError(f"no frame can be taken: {self.state['ended'] or 'none has come yet'}")
            recording = self.folder / RECORDING
            with new_folder(self.folder) as lock:
                recording.mkdir()
                write_frame(recording / "000000.jpg", self._shown[0])
                lock.close()  # the project takes it
                self._project, self._worker = self._opened(self.folder, recording)
            self._say(phase=TAKEN)

    def back(self) -> None:
        """The frame that was taken is thrown away."""
        with self._lock:
            if self.phase != TAKEN or self._project is None:
                raise ProjectError("there is no taken frame to throw away")
            if self._project.given:
                raise ProjectError("this frame has masks: undo them first, or start dmm-fast app again")
            self._leave()
            self._say(phase=WATCHING)

    def _leave(self) -> None:
        self._closed()
        self._project = self._worker = None
        shutil.rmtree(self.folder)

    def follow(self, record: bool) -> None:
        """From the masks of the frame that was taken, on through the newest frames. record: keep them and their masks."""
        with self._lock:
            if self.phase != TAKEN or self._project is None or self._worker is None:
                raise ProjectError("take a frame first")
            if self.state["ended"]:
                raise ProjectError(f"{self.name}: {self.state['ended']}; connect again first")
            if not self._project.given:
                raise ProjectError("there is no mask yet: give an object its mask first")
            self._worker.stop()
            self._stop.clear()
            self._say(phase=FOLLOWING, record=record, message="Loading the network", frames=0, dropped=0, latency=None, lost=[])
            self._go.set()

    def stop(self) -> None:
        """Ends the following; the project is there when the thread has said so."""
        self._stop.set()

    def close(self) -> None:
        self._closing = True
        self._stop.set()
        self._go.set()
        if self._thread is not None:
            self._thread.join()
        if self.phase == TAKEN and self._project is not None and not self._project.given:
            self._leave()

    # ------------------------------------------------------------------------------------------------- what is shown

    def picture(self, width: int) -> tuple[int, bytes]:
        """The number of the newest frame, and it as JPEG at most `width` wide (0: as it is) with its masks drawn on it."""
        count, shown = self.count, self._shown
        assert shown is not None
        frame, ids = shown
        key, picture = self._picture
        if key != (count, width):
            if width and width < frame.shape[1]:
                size = scaled(frame.shape[:2], width)
                frame = np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BOX))
                if ids is not None:
                    ids = np.asarray(Image.fromarray(ids).resize(size[::-1], Image.Resampling.NEAREST))
            picture = jpeg(frame if ids is None else overlay(frame, ids))
            self._picture = ((count, width), picture)
        return count, picture

    def _show(self, frame: np.ndarray, ids: np.ndarray | None = None) -> None:
        self._shown = (frame, ids)
        self.count += 1
        self._recent.append(time.monotonic())
        if (lasted := self._recent[-1] - self._recent[0]) > 0:
            self.state["fps"] = round((len(self._recent) - 1) / lasted, 1)

    def _new_rate(self) -> None:
        """Frames per second are counted anew."""
        self._recent.clear()
        self.state["fps"] = 0.0

    # ---------------------------------------------------------------------------------------------------- the thread

    def _work(self, stream: Stream) -> None:
        try:
            with stream:
                while not stream.ended and not self._closing and self.phase != DONE:
                    self._new_rate()
                    for snapshot in stream:
                        if self._go.is_set():
                            break
                        self._show(snapshot.frame)
                        if self.phase == TAKEN:
                            self._new_rate()
                            self._go.wait(IDLE)
                    if self._go.is_set() and not self._closing:
                        self._go.clear()
                        self._follow(stream)
        except Exception as fault:  # whatever it is, the page has to say it
            stream.ended = _told(fault)
        if not self._closing and self.phase != DONE:
            self._rest(stream.ended)

    def _rest(self, ended: str) -> None:
        """Where it is when nothing is followed. ended: why the source is no longer read, "" where it is."""
        with self._lock:
            done = self._project is not None and len(self._project.clip) > 1
            self._say(phase=DONE if done else TAKEN if self._project is not None else WATCHING, ended=ended)

    def _follow(self, stream: Stream) -> None:
        """Until it is stopped or the source ends; then the project is that of an ordinary clip, if it was recorded."""
        project, worker, record = self._project, self._worker, self.state["record"]
        assert project is not None and worker is not None
        try:
            try:
                with worker.models:
                    segmenter = worker.ready()
                    warm_up(segmenter, stream.size)
                    ids = project.given_ids(0)
                    segmenter.start(project.clip.frame(0), ids)
                    if record:
                        project.record(0, ids, [{"id": label, "given": True} for label in segmenter.object_ids])
                    self._say(message="")
                    if not self._stop.is_set():
                        self._through(stream, segmenter, project, worker, record)
            finally:
                if len(project.clip) > 1:
                    why = stream.ended or ("stopped" if self._stop.is_set() else "an error")
                    project.note_recorded({**project.recorded, "ended": why})
                    worker.hand_over()
                    worker.changed("done")
        except Exception as fault:
            stream.ended = _told(fault)
        self._rest(stream.ended)

    def _through(self, stream: Stream, segmenter: Segmenter, project: Project, worker: Worker, record: bool) -> None:
        """The frames that there is time for."""
        times, latencies, late, before, saved = list[float](), list[float](), 0.0, 0, time.monotonic()

        def save() -> None:
            segmenter.save(project.state_file(len(times)))
            project.thin_states(len(times))
            project.note_recorded({"source": self.name, **live_speed(times, stream.dropped - before, latencies)})

        self._new_rate()
        with Behind() as behind:
            for number, found in enumerate(follow_stream(stream, segmenter, None, worker.seconds), 1):
                if number == 1:
                    before = stream.dropped  # while the frame was painted and the network loaded
                times.append(found.snapshot.arrived)
                latencies.append(found.latency)
                late += found.latency
                self.state.update(
                    frames=number, dropped=stream.dropped - before, latency=found.latency, mean=late / number,
                    lost=[entry["id"] for entry in found.objects if entry["lost"]],
                )  # fmt: skip
                self._show(found.snapshot.frame, found.ids)
                if record:
                    behind(_keep, project, number, found)
                if self._stop.is_set():
                    break
                if record and time.monotonic() - saved > SAVE_EVERY:
                    behind.wait()
                    save()
                    saved = time.monotonic()
            if record and times:
                behind.wait()
                save()


def _told(fault: Exception) -> str:
    traceback.print_exc()
    return str(fault) or type(fault).__name__


def _keep(project: Project, number: int, found: LiveFrame) -> None:
    file = project.clip.path / f"{number:06d}.jpg"
    write_frame(file, found.snapshot.frame)
    project.append(file, found.ids, found.objects)


def default_folder(source: str) -> Path:
    """Named by the source and the time, so that each recording has its own."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", public_name(source).split("://")[-1]).strip("-")[:40]
    return Path(f"{plain}-{time.strftime('%Y%m%d-%H%M%S')}.dmm")

"""One pass over the frames of a clip, forward or backward: match, refine, take in what is given, write, save."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from dmm_fast.data.masks import read_ids, write_mask
from dmm_fast.data.video import THREADS, Behind, ImageFrames, VideoFrames, prefetch
from dmm_fast.inference.folder import PassFolder, RunError, RunFolder
from dmm_fast.inference.given import GivenMasks
from dmm_fast.inference.proposing import Live
from dmm_fast.inference.report import row_of
from dmm_fast.inference.segmenter import Segmenter


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


class Pass:
    """The loop over the frames `order` (numbers, rising or falling), and what it counts.

    company: the pass before this one. What it follows in the first frame of this one is followed here too: without them as
    rivals, an object that has not appeared yet would be matched to one of their proposals. online: first fit the network to the first objects for so long.
    """

    def __init__(
        self,
        name: str,
        order: range,
        frames: ImageFrames | VideoFrames,
        given: GivenMasks,
        propose: Callable,
        segmenter: Segmenter,
        run: RunFolder,
    ):
        self.name, self.order, self.frames, self.given, self.propose = name, order, frames, given, propose
        self.segmenter, self.run = segmenter, run
        self.company: PassFolder | None = None
        self.online: dict[str, float] | None = None
        self.folder = run.passes[name]
        checkpoint = self.folder.checkpoint() or {"next": 0, "seconds": {}, "notes": [], "started": False}
        self.next: int = checkpoint["next"]  # place in the order
        self.seconds: dict[str, float] = defaultdict(float, checkpoint["seconds"])
        self.notes: list[str] = checkpoint["notes"]
        self.started: bool = checkpoint["started"]

    def follow(self, progress: bool, save_every: float, label: str | None = None) -> None:
        """Raises Interrupted after a signal, with all saved. label: what stands before the progress bar."""
        if self.next == len(self.order):
            return
        self.progress = progress
        self.folder.begin()
        if self.started:
            self.segmenter.restore(self.folder.state(self.next))
        bar = tqdm(total=len(self.order), initial=self.next, unit=" frames", disable=None if progress else True,
                   desc=self.name if len(self.run.passes) > 1 else label)  # fmt: skip
        number = self.order[self.next]
        source = iter(prefetch(self.frames.read(number) if self.order.step > 0 else self.frames.read_back(number)))
        saved = time.monotonic()
        with (
            bar,
            Behind(THREADS) as self.behind,
            stop_requested("finishing this frame, then saving; press again to stop at once") as stop,
        ):
            self.stop = stop
            while True:
                with self._clock("decode"):
                    item = next(source, None)
                if item is None:
                    break
                self._one(*item)
                self.next += 1
                bar.update()
                if stop() or time.monotonic() - saved >= save_every:
                    self._save()
                    saved = time.monotonic()
                self._end_if_asked()
            if not self.started:
                raise RunError(f"{self.given.path}: no frame was reached for which there is a mask")
            self._save()
            self._end_if_asked()  # while the last masks were written: what comes after this video would not be told
        self.folder.close()

    def _end_if_asked(self) -> None:
        if self.stop():
            which = f" of the pass {self.name}" if len(self.run.passes) > 1 else ""
            done = f"{self.next} of {len(self.order)} frames{which}"
            raise Interrupted(f"stopped after {done}; --resume continues from there")

    def _one(self, stem: str, frame: np.ndarray) -> None:
        """One frame: match and refine, take in the masks given for it, write."""
        ids, objects = np.zeros(frame.shape[:2], np.uint8), []
        if self.started:
            proposals = None  # a detector's are part of the step
            if not isinstance(self.propose, Live):
                with self._clock("proposals"):
                    proposals = self.propose(stem, frame)
            with self._clock("step"):
                result = self.segmenter.step(frame, proposals)
            ids = np.array(result.ids)
            objects = [row_of(entry) for entry in result.objects]
        if stem in self.given:
            objects = self._take_in(stem, frame, ids, objects)
        row: dict[str, Any] = {"frame": stem, "objects": objects}
        if self.order[self.next] in self.frames.missing:
            row["picture"] = "missing"  # it could not be decoded; another stands for it
        with self._clock("write"):  # what of it holds up the next frame
            self.behind(write_mask, self.folder.mask(stem), ids)
            self.folder.append(row)

    def _take_in(self, stem: str, frame: np.ndarray, ids: np.ndarray, objects: list[dict]) -> list[dict]:
        """Start with the masks given for this frame, or add them; an object that is followed goes on from its mask here.

        Draws them into `ids`; returns the frame's objects.
        """
        masks, notes = self.given.read(stem)
        self.notes += [f"{stem}: {note}" for note in notes if f"{stem}: {note}" not in self.notes]
        given = {int(label): masks == label for label in np.unique(masks) if label}
        followed = self.segmenter.object_ids if self.started else []
        if not self.started:
            if self.online:
                self._learn(stem, frame, given)
            with self._clock("step"):
                self.segmenter.start(frame, given | self._company(stem, given))
            self.started = True
        elif given:
            if again := [label for label in given if label in followed]:
                ids[np.isin(ids, again)] = 0
                self.segmenter.drop(again)
            with self._clock("step"):
                self.segmenter.add(given)
            if new := [label for label in given if label not in followed]:
                self.notes.append(f"{stem}: new object{'s' * (len(new) > 1)} {', '.join(map(str, new))}")
        for label, mask in given.items():
            ids[mask] = label
        return [e for e in objects if e["id"] not in given] + [{"id": label, "given": True} for label in given]

    def _company(self, stem: str, given: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        if self.company is None:
            return {}
        ids = read_ids(self.company.mask(stem))
        return {int(label): ids == label for label in np.unique(ids) if label and label not in given}

    def _learn(self, stem: str, frame: np.ndarray, objects: dict[int, np.ndarray]) -> None:
        """Online learning; what was learnt is kept beside the checkpoints, for --resume."""
        budget = dict(self.online or {})
        if isinstance(self.propose, Live) and self.propose.learns:
            with self._clock("online"):  # a third of the time: its steps are short
                share = {kind: amount / 3 if kind == "seconds" else amount for kind, amount in budget.items()}
                self.propose.tune(frame, objects, stop=self.stop, **share)
                self.propose.save(self.run.tuned_proposer)
            if "seconds" in budget:
                budget["seconds"] *= 2 / 3
        with self._clock("proposals"):
            proposals = self.propose(stem, frame)
        with self._clock("online"):
            steps = self.segmenter.tune(frame, objects, proposals, progress=self.progress, stop=self.stop, **budget)
        if self.stop():
            raise Interrupted("stopped while the first frame was learnt; --resume starts it again")
        self.segmenter.save_weights(self.run.tuned)
        self.notes.append(f"{stem}: the network was fitted to this frame, {steps} steps in {self.seconds['online']:.0f} s")

    def _save(self) -> None:
        with self._clock("write"):
            self.behind.wait()
        with self._clock("save"):
            state = {"next": self.next, "seconds": dict(self.seconds), "notes": self.notes, "started": self.started}
            self.folder.save(state, self.segmenter if self.started else None)

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin


@contextlib.contextmanager
def stop_requested(message: str) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C or SIGTERM came; the first says `message`, a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, stack: Any) -> None:
        asked.set()
        os.write(2, f"\n{message}\n".encode())
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

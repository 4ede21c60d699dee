"""What a run writes while it goes on: its curve, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dmm_fast.learning.losses import TERMS
from dmm_fast.training.checkpoint import CURVE, read_curve
from dmm_fast.training.config import TrainConfig


class Log:
    """The run's curve: a JSON line for each step and each validation, the same for TensorBoard, and a progress bar.

    curve.jsonl is cut back to the checkpoint when a run goes on.
    """

    def __init__(self, out: Path, config: TrainConfig, counters: dict[str, Any], first: bool, progress: bool, steps: int):
        self.curve = read_curve(out / CURVE, counters["step"], counters["epochs"])
        self.first, self.steps, self.beside = first, steps, config.detector is not None
        self.writer: Any = None
        if not first:
            return
        partial = out / f"{CURVE}.partial"
        partial.write_text("".join(json.dumps(line) + "\n" for line in self.curve))
        os.replace(partial, out / CURVE)
        self.file = open(out / CURVE, "a")
        self.quiet = not progress
        self.bar = tqdm(total=steps * config.epochs, initial=counters["step"], unit=" steps", disable=self.quiet or None)
        if config.tensorboard:
            self.writer = tensorboard(out, counters["step"])

    def step(self, step: int, epoch: int, values: list[float], optimizer: torch.optim.Optimizer, seconds: float) -> None:
        """values: loss, its terms, a detector's loss if one learns beside, the gradient's norm; seconds: of the run so far."""
        names = ["loss", *TERMS, *(["detector"] if self.beside else []), "norm"]
        line = {"step": step, "epoch": epoch, "seconds": round(seconds, 2), **dict(zip(names, values))}
        line |= {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
        self._write(line)
        if self.first:
            self.bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
            self.bar.update()

    def validation(self, counters: dict[str, Any], scores: dict[str, Any]) -> bool:
        """Log the scores of an epoch; True (and noted in the counters) where they are the best so far."""
        j, f = np.mean(list(scores["objects"].values()), 0).tolist()
        line = {"step": counters["step"], "epoch": counters["epochs"], "seconds": round(counters["seconds"], 2)}
        line |= {"J": j, "F": f, "G": (j + f) / 2}
        best = counters["best"] is None or line["G"] > counters["best"]["G"]
        if best:
            counters["best"] = line
        recent = [line["loss"] for line in self.curve if "loss" in line][-self.steps :]
        self._write({**line, "objects": scores["objects"]})
        if self.first and not self.quiet:
            told = f"epoch {line['epoch']}, step {line['step']}: loss {np.mean(recent):.4f}, J {j:.3f}, F {f:.3f}"
            tqdm.write(told + (" (best)" if best else ""))
        for name, picture in scores["pictures"].items() if self.writer else ():
            self.writer.add_image(name, picture, line["step"], dataformats="HWC")
        return best

    def _write(self, line: dict[str, Any]) -> None:
        self.curve.append(line)
        if not self.first:
            return
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in line.items() if self.writer else ():
            if isinstance(value, float):
                self.writer.add_scalar(f"{'val' if 'J' in line else 'train'}/{name}", value, line["step"])

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.first:
            self.bar.close()
            self.file.close()
        if self.writer:
            self.writer.close()


def tensorboard(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tqdm.write("no TensorBoard here, curve.jsonl has the scalars: pip install 'dmm_fast[train]', or tensorboard=false")
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

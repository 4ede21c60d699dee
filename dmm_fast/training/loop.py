"""Training of DMM-Net: one loop, `train`, and beside it what the loop is made of.

Clips are unrolled as in use: the first frame gives the objects, every further one is matched, refined and compared with
the ground truth. A run is a function of its configuration: clips depend on (seed, epoch, index), other randomness on
(seed, step, process), so a run that was killed goes on exactly where its last checkpoint was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmm_fast.training.config import ConfigError, TrainConfig
from dmm_fast.training.data import Loader, open_data
from dmm_fast.training.log import Log
from dmm_fast.training.run import BEST, LAST, Run, prepare
from dmm_fast.training.team import Clock, Team
from dmm_fast.training.validation import validate


@dataclass
class Result:
    """What a run came to. curve: a line for each step and each validation, as in curve.jsonl."""

    out: Path
    step: int
    stopped: str | None  # why it ended early: "time" or "interrupted"
    best: dict[str, Any] | None  # the best validation's line
    weights: Path  # best.safetensors, or last.safetensors without validation
    curve: list[dict[str, Any]] = field(repr=False)


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, minutes: float | None = None, progress: bool = True
) -> Result:
    """Train as `config` says; docs/training.md describes what is in `config.out` afterwards.

    resume: go on where a run in `config.out` stopped, if there is one. overwrite: replace it. minutes: save and stop
    after so long. Ctrl-C does the same. Under torchrun every process calls this; the first one writes.
    """
    team = Team(config.device)
    clock = Clock(team, config.save_seconds, minutes)
    out = Path(config.out)
    going_on = prepare(out, config, team, resume, overwrite)
    clips, videos = open_data(config)
    steps = len(clips) // config.batch  # of an epoch; clips that do not fill a batch are left out
    if steps == 0:
        raise ConfigError(f"train: an epoch of {len(clips)} clips holds no batch of {config.batch}; see data.clips, batch")
    run = Run(config, team, clock, steps, going_on, videos.names if videos is not None else ())
    loader = Loader(clips, config, team)
    counters = run.counters
    with Log(out, config, counters, team.first, progress, steps) as log, clock:
        for epoch in range(counters["epochs"], config.epochs):
            for batch in loader.epoch(epoch, counters["step"] - epoch * steps, steps):
                values = run.learn(batch)
                log.step(counters["step"], epoch, values, run.optimizer, run.seconds)
                clock.tick()
                if clock.stopped:
                    break
                if clock.due:
                    run.save()
            else:  # the epoch is whole
                counters["epochs"] = epoch + 1
                if videos is not None and ((epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs):
                    scores = validate(run.ship(LAST), config, videos, team)
                    if log.validation(counters, scores):
                        run.ship(BEST)
                run.save()
            if clock.stopped:
                run.save()
                break
    team.close()
    best = counters["best"]
    return Result(out, counters["step"], clock.stopped, best, out / (BEST if best else LAST), log.curve)

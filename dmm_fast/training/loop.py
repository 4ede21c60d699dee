"""Training of DMM-Net: one loop, `train`, and below it what the loop is made of.

Clips are unrolled as in use: the first frame gives the objects, every further one is matched, refined and compared with
the ground truth. A run is a function of its configuration: clips depend on (seed, epoch, index), other randomness on
(seed, step, process), so a run that was killed goes on exactly where its last checkpoint was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from dmm_fast.learning.average import Average, weights_of
from dmm_fast.learning.losses import TERMS
from dmm_fast.learning.unroll import to_device, unroll_all
from dmm_fast.training.checkpoint import CURVE, read_counters, read_state, write_state, write_weights
from dmm_fast.training.config import ConfigError, TrainConfig, from_dict
from dmm_fast.training.data import Loader, open_data, parts
from dmm_fast.training.log import Log
from dmm_fast.training.setup import build_net, make_optimizer, rate
from dmm_fast.training.team import Clock, Team
from dmm_fast.training.validation import validate

STATE, BEST, LAST, CONFIG = "state.safetensors", "best.safetensors", "last.safetensors", "config.yaml"
# Settings that may change when a run goes on: they do not touch what is computed.
FREE = ("out", "device", "compile", "save_seconds", "tensorboard", "data.path", "data.proposals", "data.val_proposals",
        "data.workers")  # fmt: skip


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
    """Train as `config` says; docs/training.md tells what lies in `config.out` afterwards.

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

    torch.manual_seed(config.seed)
    net, known = build_net(config)
    net.to(team.device)
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(net, known, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average = Average(net, config.ema)
    counters = {"kind": "training", "config": config.to_dict(), "step": 0, "epochs": 0, "seconds": 0.0, "best": None}
    if going_on:
        counters = read_state(out / STATE, net, average, optimizer)
    if config.compile:
        net.backbone.compile()
    loader = Loader(clips, config, team)
    before = counters["seconds"]

    def ship(name: str) -> Path:
        counters["seconds"] = before + clock.seconds()
        if team.first:
            write_weights(out / name, weights_of(net, average), config.model, **facts(counters))
        team.wait()
        return out / name

    def save() -> None:
        ship(LAST)
        if team.first:
            write_state(out / STATE, net, average, optimizer, counters)

    with Log(out, config, counters, team.first, progress, steps) as log, clock:
        for epoch in range(counters["epochs"], config.epochs):
            for batch in loader.epoch(epoch, counters["step"] - epoch * steps, steps):
                step = counters["step"]
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * rate(config, step, steps)
                torch.manual_seed(seed_of(config.seed, step, team.rank))
                optimizer.zero_grad()
                sums = torch.zeros(1 + len(TERMS), device=team.device)
                for part in parts(batch, config.accumulate):
                    losses = unroll_all(net, [to_device(clip, team.device) for clip in part], config)  # [clips, 1 + terms]
                    losses = losses.sum(0) / config.batch
                    losses[0].backward()
                    sums += losses.detach()
                team.sum_gradients(parameters)
                norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip or math.inf)
                values = torch.cat([team.sum(sums), norm.detach()[None]]).tolist()  # the one time that a step waits for a GPU
                if not all(map(math.isfinite, values)):
                    raise RuntimeError(f"train: the loss or its gradient is not finite at step {step + 1}; lower the rates")
                optimizer.step()
                average.update(step + 1)
                counters["step"] = step + 1
                log.step(step + 1, epoch, values, optimizer, before + clock.seconds())
                clock.tick()
                if clock.stopped:
                    break
                if clock.due:
                    save()
            else:  # the epoch is whole
                counters["epochs"] = epoch + 1
                if videos is not None and ((epoch + 1) % config.val_every == 0 or epoch + 1 == config.epochs):
                    scores = validate(ship(LAST), config, videos, team)
                    if log.validation(counters, scores):
                        ship(BEST)
                save()
            if clock.stopped:
                save()
                break
    team.close()
    best = counters["best"]
    return Result(out, counters["step"], clock.stopped, best, out / (BEST if best else LAST), log.curve)


def facts(counters: dict[str, Any]) -> dict[str, Any]:
    """What a weights file says of its training."""
    return {"kind": "dmm", "training": {name: value for name, value in counters.items() if name != "kind"}}


def prepare(out: Path, config: TrainConfig, team: Team, resume: bool, overwrite: bool) -> bool:
    """Make the run's folder; True where a run in it goes on."""
    there = (out / STATE).is_file()
    if there and not resume and not overwrite:
        raise ConfigError(f"{out}: holds a run already; --resume goes on with it, --overwrite replaces it")
    if there and resume:
        began = from_dict(read_counters(out / STATE)["config"])  # a setting younger than the run has its default
        old, new = flat(began.to_dict()), flat(config.to_dict())
        changed = sorted(key for key in {*old, *new} - set(FREE) if old.get(key) != new.get(key))
        if changed:
            told = ", ".join(f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in changed[:5])
            raise ConfigError(f"{out}: --resume needs the settings the run began with: {told}")
    team.wait()
    if team.first:
        out.mkdir(parents=True, exist_ok=True)
        if not (there and resume):
            for name in (STATE, BEST, LAST, CURVE):
                (out / name).unlink(missing_ok=True)
        (out / CONFIG).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    team.wait()
    return there and resume


def flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if not isinstance(values, dict) or not values:
        return {key: values}
    return {name: v for part, inner in values.items() for name, v in flat(inner, f"{key}.{part}" if key else part).items()}


# ---------------------------------------------------------------------------------------------- the net and its losses


# ------------------------------------------------------------------------------------------------------------ the data

# ---------------------------------------------------------------------------------------------------------- validation


# ------------------------------------------------------------------------------------- processes, time, what is written


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

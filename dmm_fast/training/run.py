"""A run: the net with all that learns beside it, its files, and one step."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from dmm_fast.data.augment import Clip
from dmm_fast.learning.average import Average, weights_of
from dmm_fast.learning.losses import TERMS
from dmm_fast.learning.unroll import to_device, unroll_all
from dmm_fast.training.beside import Companion, is_beside
from dmm_fast.training.checkpoint import CURVE, read_counters, read_state, write_state, write_weights
from dmm_fast.training.config import ConfigError, TrainConfig, from_dict
from dmm_fast.training.data import parts
from dmm_fast.training.setup import build_net, make_optimizer, rate
from dmm_fast.training.team import Clock, Team

STATE, BEST, LAST, CONFIG = "state.safetensors", "best.safetensors", "last.safetensors", "config.yaml"
# Settings that may change when a run goes on: they do not touch what is computed.
FREE = ("out", "device", "compile", "save_seconds", "tensorboard", "data.path", "data.proposals", "data.val_proposals",
        "data.workers")  # fmt: skip


class Run:
    """What one process holds of a run. steps: of an epoch. resume: go on from the state in the run's folder. held: names of the
    videos that validate."""

    def __init__(self, config: TrainConfig, team: Team, clock: Clock, steps: int, resume: bool, held: Collection[str] = ()):
        self.config, self.team, self.clock, self.steps, self.out = config, team, clock, steps, Path(config.out)
        torch.manual_seed(config.seed)
        self.net, known = build_net(config)
        self.companion = Companion(self.net, config.detector, config, team) if config.detector is not None else None
        self.net.to(team.device)
        if config.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.net, known, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = Average(self.net, config.ema)
        self.counters: dict[str, Any] = {
            "kind": "training",
            "config": config.to_dict(),
            "step": 0,
            "epochs": 0,
            "seconds": 0.0,
            "best": None,
        }
        if resume:
            self.counters = read_state(self.out / STATE, self.net, self.average, self.optimizer)
        if config.compile:
            self.net.backbone.compile()
        self.before: float = self.counters["seconds"]
        if self.companion is not None:
            self.pictures = self.companion.pictures(self.counters["step"], config.epochs * steps, held)

    @property
    def seconds(self) -> float:
        """Of the whole run, the parts before a stop included."""
        return self.before + self.clock.seconds()

    def learn(self, batch: list[Clip]) -> list[float]:
        """One step; returns the loss, its terms, that of a detector beside, and the gradient's norm, over all processes."""
        config, team, step = self.config, self.team, self.counters["step"]
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate(config, step, self.steps)
        if self.companion is not None:
            pictures = next(self.pictures)  # before the seed: making them may change the random numbers of a GPU
        torch.manual_seed(seed_of(config.seed, step, team.rank))
        self.optimizer.zero_grad()
        sums = torch.zeros(1 + len(TERMS) + (self.companion is not None), device=team.device)
        for part in parts(batch, config.accumulate):
            losses = unroll_all(self.net, [to_device(clip, team.device) for clip in part], config)  # [clips, 1 + terms]
            losses = losses.sum(0) / config.batch
            losses[0].backward()
            sums[: len(losses)] += losses.detach()
        if self.companion is not None:
            loss = self.companion.loss(self.net, pictures)
            (self.companion.beside.weight * loss).backward()
            sums[-1] += loss.detach()
        team.sum_gradients(self.parameters)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.optim.clip or math.inf)
        # Without a detector beside, the one time that a step waits for a GPU.
        values = torch.cat([team.sum(sums), norm.detach()[None]]).tolist()
        if not all(map(math.isfinite, values)):
            raise RuntimeError(f"train: the loss or its gradient is not finite at step {step + 1}; lower the rates")
        self.optimizer.step()
        self.average.update(step + 1)
        self.counters["step"] = step + 1
        return values

    def ship(self, name: str) -> Path:
        """Write the averaged weights to a file of the run's folder."""
        self.counters["seconds"] = self.seconds
        if self.team.first:
            tensors = weights_of(self.net, self.average)
            own = {name: tensor for name, tensor in tensors.items() if not is_beside(name)}
            write_weights(self.out / name, own, self.config.model, **facts(self.counters))
            if self.companion is not None:
                notes = {"training": facts(self.counters)["training"]}
                self.companion.write(self.out / detector_of(name), tensors, notes)
        self.team.wait()
        return self.out / name

    def save(self) -> None:
        """Write the weights, and the state from which the run goes on exactly."""
        self.ship(LAST)
        if self.team.first:
            write_state(self.out / STATE, self.net, self.average, self.optimizer, self.counters)


def detector_of(name: str) -> str:
    """The file of the detector that learnt beside the weights in file `name`."""
    return name.replace(".safetensors", "-proposals.safetensors")


def facts(counters: dict[str, Any]) -> dict[str, Any]:
    """What a weights file says of its training."""
    return {"kind": "dmm", "training": {name: value for name, value in counters.items() if name != "kind"}}


def prepare(out: Path, config: TrainConfig, team: Team, resume: bool, overwrite: bool) -> bool:
    """Make the run's folder; True where a run in it goes on."""
    there = (out / STATE).is_file()
    if there and not resume and not overwrite:
        raise ConfigError(f"{out}: holds a run already; --resume continues it, --overwrite replaces it")
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
            for name in (STATE, BEST, LAST, detector_of(BEST), detector_of(LAST), CURVE):
                (out / name).unlink(missing_ok=True)
        (out / CONFIG).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
    team.wait()
    return there and resume


def flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    if not isinstance(values, dict) or not values:
        return {key: values}
    return {name: v for part, inner in values.items() for name, v in flat(inner, f"{key}.{part}" if key else part).items()}


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

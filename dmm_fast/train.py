"""Training of DMM-Net: one loop, `train`, and below it what the loop is made of.

Clips are unrolled as in use: the first frame gives the objects, every further one is matched, refined and compared with
the ground truth. A run is a function of its configuration: clips depend on (seed, epoch, index), other randomness on
(seed, step, process), so a run that was killed goes on exactly where its last checkpoint was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from dmm_fast import reference
from dmm_fast.augment import Augment, Clip
from dmm_fast.checkpoint import Average, read_counters, read_state, weights_of, write_state, write_weights
from dmm_fast.clips import ClipDataset, Clips, Mixture, PasteClips, StillClips, SyntheticClips
from dmm_fast.configs import ConfigError, Data, TrainConfig, from_dict, nearest
from dmm_fast.datasets import Video, VideoDataset, open_dataset
from dmm_fast.device import open_device
from dmm_fast.evaluation import ABSENT, score_ids
from dmm_fast.imagenet import imagenet_weights
from dmm_fast.losses import TERMS, step_losses
from dmm_fast.model import DMMNet, Proposals, load_weights, read_weights
from dmm_fast.overlay import overlay
from dmm_fast.segmenter import Segmenter

STATE, BEST, LAST, CURVE, CONFIG = "state.safetensors", "best.safetensors", "last.safetensors", "curve.jsonl", "config.yaml"
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


def seed_of(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ---------------------------------------------------------------------------------------------- the net and its losses


def build_net(config: TrainConfig) -> tuple[DMMNet, set[str]]:
    """The net on the CPU, in training mode, and the names of the weights that are not new.

    Batch norm keeps its statistics: batches of a few clips would only spoil them, and so a step's result does not depend
    on how a batch is divided.
    """
    net = DMMNet(config.model)
    known: set[str] = set()
    if config.pretrained == "imagenet":
        load_weights(net.backbone, imagenet_weights(config.model.backbone), "ImageNet")
        known = {name for name in net.state_dict() if name.startswith("backbone.")}
    elif config.pretrained != "none":
        load_weights(net, read_weights(config.pretrained), config.pretrained)
        known = set(net.state_dict())
    net.train()
    net.backbone.requires_grad_(not config.freeze)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or (config.freeze and module is net.backbone):
            module.eval()
    return net, known


def make_optimizer(net: DMMNet, known: set[str], config: TrainConfig) -> torch.optim.Optimizer:
    """Adam(W) over two groups, pretrained and new; biases and gains are not decayed."""
    optim = config.optim
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("train: nothing to train: the backbone is frozen and there is no refinement")
    groups = []
    for label, base, new in (("pretrained", optim.lr_pretrained, False), ("new", optim.lr_new, True)):
        for decay in (True, False):
            chosen = [p for name, p in trained if (name not in known) == new and (p.ndim > 1) == decay]
            if chosen:
                weight_decay = optim.weight_decay if decay else 0.0
                groups.append({"params": chosen, "name": label, "base": base, "lr": base, "weight_decay": weight_decay})
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.name](groups)


def rate(config: TrainConfig, step: int, steps: int) -> float:
    """What the rates are multiplied by at a step, from 0; steps: of an epoch."""
    optim = config.optim
    warm = min(1.0, (step + 1) / (optim.warmup + 1))
    if optim.schedule == "cosine":
        done = min(max(step - optim.warmup, 0) / max(steps * config.epochs - optim.warmup, 1), 1.0)
        return warm * (optim.floor + (1 - optim.floor) * 0.5 * (1 + math.cos(math.pi * done)))
    if optim.schedule == "step":
        return warm * optim.gamma ** sum(step >= steps * epoch for epoch in optim.milestones)
    return warm


def unroll_all(net: DMMNet, clips: Sequence[Clip], config: TrainConfig) -> Tensor:
    """The weighted loss and its terms of each clip: [clips, 1 + terms]."""
    weights = [getattr(config.loss, term) * (term != "refined" or config.model.refine != "none") for term in TERMS]
    rows = []
    for clip, levels in zip(clips, encode_all(net, clips, config)):
        terms = unroll(net, clip, levels, config)  # [terms]
        total = sum(weight * term for weight, term in zip(weights, terms))
        rows.append(torch.cat([total[None], terms]))
    return torch.stack(rows)


def encode_all(net: DMMNet, clips: Sequence[Clip], config: TrainConfig) -> list[list[Tensor]]:
    """Features of each clip, levels [T, C_l, h_l, w_l]; all frames of one size go through the backbone together."""
    found: dict[int, list[Tensor]] = {}
    for size in dict.fromkeys(clip.frames.shape[2:] for clip in clips):
        group = [i for i, clip in enumerate(clips) if clip.frames.shape[2:] == size]
        frames = torch.cat([clips[i].frames for i in group])
        with torch.set_grad_enabled(not config.freeze), mixed_precision(frames.device, config):
            levels = net.encode(frames)
        counts = [len(clips[i].frames) for i in group]
        for i, *parts in zip(group, *(level.float().split(counts) for level in levels)):
            found[i] = parts
    return [found[i] for i in range(len(clips))]


def mixed_precision(device: torch.device, config: TrainConfig) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if config.amp else contextlib.nullcontext()


def unroll(net: DMMNet, clip: Clip, levels: list[Tensor], config: TrainConfig) -> Tensor:
    """The loss terms of a clip, means over its steps: [terms]."""
    valid = torch.ones(clip.masks.size(1), dtype=torch.bool, device=clip.masks.device)
    state = net.begin([level[:1] for level in levels], clip.masks[0], valid)
    steps = []
    for t in range(1, len(clip.frames)):
        features = [level[t : t + 1] for level in levels]
        proposals = net.prepare(clip.proposals[t], state)
        affinity = net.compare(features, proposals, state)
        cost = net.cost(affinity)  # [N, M]
        if config.assignment == "layer":
            assignment = net.match(cost, proposals.scores, valid)
        else:
            assignment = reference.hungarian(cost.detach())
        with mixed_precision(cost.device, config):
            output, state = net.decide(features, proposals, affinity, assignment, state)
        losses = step_losses(output, affinity, proposals, clip.masks[t], match_iou=config.loss.match_iou)
        steps.append(torch.stack([losses[term] for term in TERMS]))
    return torch.stack(steps).mean(0)


# ------------------------------------------------------------------------------------------------------------ the data

KINDS: dict[str, type[Clips]] = {
    "clips": ClipDataset, "paste": PasteClips, "stills": StillClips, "synthetic": SyntheticClips,
}  # fmt: skip
PLACE = ("path", "layout", "split", "names", "proposals")  # of a source: which videos


def open_data(config: TrainConfig) -> tuple[Clips, VideoDataset | None]:
    """The clips of the configuration's sources, and the videos that validate, if any."""
    data = config.data
    sources = [open_source(source, data, config.seed + number) for number, source in enumerate(data.sources)]
    length = data.clips or sum(len(clips) for clips, _ in sources)
    videos = None
    if data.val_split or data.held_out:
        place = {"split": data.val_split} if data.val_split else {"split": data.split, "names": list(data.held_out)}
        proposals = data.val_proposals or data.proposals
        if proposals is None:
            raise ConfigError("train: validation needs proposals; give data.proposals, or neither val_split nor held_out")
        videos = open_dataset(required_path(data), data.layout, proposals=proposals, top=config.model.top, **place)
    return Mixture(sources, length, seed=config.seed), videos


def open_source(source: dict[str, Any], data: Data, seed: int) -> tuple[Clips, float]:
    """One entry of `data.sources`: its clips and its weight in the mixture."""
    settings = dict(source)
    kind, weight = settings.pop("kind", "clips"), settings.pop("weight", 1.0)
    if kind not in KINDS:
        raise ConfigError(f"train: no kind of source {kind!r}{nearest(str(kind), KINDS)}")
    augment = {**data.augment, **settings.pop("augment", {})}
    place = {name: settings.pop(name, getattr(data, name, None)) for name in PLACE}
    arguments = {"frames": data.frames, "seed": seed, **tuples(settings)}
    try:
        if kind != "stills" or augment:  # which have their own default
            arguments["augment"] = Augment(**tuples(augment))
        if kind == "synthetic":
            return SyntheticClips(**arguments), weight
        path = place.pop("path") or required_path(data)
        videos = open_dataset(path, place.pop("layout"), **place)
        kept = [name for name in videos.names if name not in data.held_out]
        return KINDS[kind](videos.subset(kept), **arguments), weight
    except TypeError as error:  # an unknown setting
        raise ConfigError(f"train: a source of kind {kind}: {error}") from None


def required_path(data: Data) -> str:
    if data.path is None:
        raise ConfigError("train: data.path must name the folder of a data set, as in data.path=DAVIS")
    return data.path


def tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """YAML's lists as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def parts(batch: list[Clip], count: int) -> Iterator[list[Clip]]:
    size = len(batch) // count
    return (batch[i : i + size] for i in range(0, len(batch), size))


def to_device(clip: Clip, device: torch.device) -> Clip:
    proposals = [Proposals(*(part.to(device) for part in frame)) for frame in clip.proposals]
    return clip._replace(frames=clip.frames.to(device), masks=clip.masks.to(device), proposals=proposals)


class Order(Sampler):
    """One process's indices of an epoch from some step on; shuffled by (seed, epoch)."""

    def __init__(self, length: int, config: TrainConfig, team: Team):
        self.length, self.seed, self.batch, self.team = length, config.seed, config.batch, team
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        used = order[: self.length // self.batch * self.batch].reshape(-1, self.batch)  # [steps, batch]
        return iter(used[self.start :, self.team.rank :: self.team.size].flatten().tolist())


class Loader:
    """Batches of this process. Clips come one by one from the workers, which live as long as the run."""

    def __init__(self, clips: Clips, config: TrainConfig, team: Team):
        if config.batch % (team.size * config.accumulate):
            raise ConfigError(
                f"train: batch must be a multiple of accumulate times the processes, got {config.batch}, "
                f"{config.accumulate} and {team.size}"
            )
        self.clips, self.size = clips, config.batch // team.size
        self.order = Order(len(clips), config, team)
        workers = config.data.workers
        self.loader = DataLoader(
            clips, batch_size=None, sampler=self.order, num_workers=workers, collate_fn=as_is,
            worker_init_fn=leave_stopping_to_us, persistent_workers=workers > 0,
            prefetch_factor=max(2, -(-2 * self.size // workers)) if workers else None, generator=torch.Generator(),
        )  # fmt: skip

    def epoch(self, epoch: int, start: int, steps: int) -> Iterator[list[Clip]]:
        """The batches of an epoch from step `start` on."""
        if start >= steps:
            return
        self.clips.set_epoch(epoch)
        self.order.epoch, self.order.start = epoch, start
        batch: list[Clip] = []
        for clip in self.loader:
            batch.append(clip)
            if len(batch) == self.size:
                yield batch
                batch = []


def as_is(clip: Clip) -> Clip:
    return clip


def leave_stopping_to_us(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------- validation


@torch.no_grad()
def validate(weights: Path, config: TrainConfig, videos: VideoDataset, team: Team) -> dict[str, Any]:
    """Segment whole videos with a file of weights, as `Segmenter` does: J and F of every object, and pictures.

    As DAVIS scores: an object counts after the frame in which it is given, and the last frame does not count.
    """
    segmenter = Segmenter(config.model, weights=weights, device=team.device)
    rows, pictures = [], {}
    for name in videos.names[team.rank :: team.size]:
        video = videos.video(name)
        scores: dict[int, list[tuple[float, float]]] = {}
        frames = list(follow(segmenter, video, config.data.val_stride))
        for number, (frame, ids, truth, given) in enumerate(frames):
            if truth is not None:
                found = score_ids(ids, truth)
                for i in given:
                    scores.setdefault(i, []).append(found.get(i, ABSENT)[:2])
            if number == len(frames) // 2:
                pictures[name] = overlay(frame, ids)
        rows += [(f"{name}/{i}", *np.mean(values, 0).tolist()) for i, values in scores.items()]
    rows, pictures = team.gather(rows), dict(team.gather(list(pictures.items())))
    if not rows:
        raise ConfigError("train: validation: no frame to score; data.val_stride skips them all")
    return {"objects": {name: (j, f) for name, j, f in sorted(rows)}, "pictures": pictures}


def follow(segmenter: Segmenter, video: Video, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray, Any, list[int]]]:
    """(frame, its ids, its true ids or None, the objects given before it) of every frame after the first, but the last."""
    known: list[int] = []
    for index in range(0, len(video) - 1, stride):
        frame, truth = video.frame(index), video.ids(index)
        if known:
            yield frame, segmenter.step(frame, video.proposals(index)).ids, truth, list(known)
        new = [] if truth is None else [i for i in np.unique(truth).tolist() if i and i not in known]
        if new:
            (segmenter.add if known else segmenter.start)(*([] if known else [frame]), {i: truth == i for i in new})
            known += new


# ------------------------------------------------------------------------------------- processes, time, what is written


class Team:
    """The processes that train together: those of torchrun, or this one alone."""

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.first = self.rank == 0
        self.device = open_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.joined = self.size > 1 and not dist.is_initialized()
        if self.joined:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """For each flag: whether some process has it set."""
        return (self.sum(torch.tensor(flags, dtype=torch.float32, device=self.device)) > 0).tolist()

    def gather(self, items: list) -> list:
        """The lists of all processes, one after the other."""
        if self.size == 1:
            return items
        lists: list = [None] * self.size
        dist.all_gather_object(lists, items)
        return [item for each in lists for item in each]

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """All gradients in one sum. It runs after the backward, not beside it as DistributedDataParallel's: unrolled clips
        use the net's stages one by one and at times not at all, and the sum is short beside them.
        """
        if self.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = self.sum(torch.cat([g.flatten() for g in gradients]))
        for p, g in zip(parameters, total.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p)

    def close(self) -> None:
        if self.joined:
            dist.destroy_process_group()


class Clock:
    """When to save and when to stop: `stopped` is "time" after `minutes`, "interrupted" after Ctrl-C or SIGTERM.

    All processes agree. A second Ctrl-C ends at once.
    """

    def __init__(self, team: Team, save_seconds: float, minutes: float | None):
        self.team, self.save_seconds, self.minutes = team, save_seconds, minutes
        self.began = self.saved = time.monotonic()
        self.due, self.stopped, self.asked = False, None, False

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def tick(self) -> None:
        """After every step."""
        now = time.monotonic()
        late = self.minutes is not None and now - self.began >= 60 * self.minutes
        asked, late, self.due = self.team.any(self.asked, late, now - self.saved >= self.save_seconds)
        self.stopped = "interrupted" if asked else "time" if late else None
        if self.due:
            self.saved = now

    def __enter__(self) -> Clock:
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, _: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Log:
    """The run's curve: a JSON line for each step and each validation, the same for TensorBoard, and a progress bar.

    curve.jsonl is cut back to the checkpoint when a run goes on.
    """

    def __init__(self, out: Path, config: TrainConfig, counters: dict[str, Any], first: bool, progress: bool, steps: int):
        self.curve = read_curve(out / CURVE, counters["step"], counters["epochs"])
        self.first, self.steps, self.writer = first, steps, None
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
        """values: loss, its terms, the gradient's norm; seconds: of the run so far."""
        line = {"step": step, "epoch": epoch, "seconds": round(seconds, 2), **dict(zip(("loss", *TERMS, "norm"), values))}
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


def read_curve(path: Path, step: int, epochs: int) -> list[dict[str, Any]]:
    """The lines of a curve up to a checkpoint; a kill may have cut the last one short."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] <= step and ("loss" in line or line["epoch"] <= epochs):
            lines.append(line)
    return lines


def tensorboard(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        tqdm.write("no TensorBoard here, curve.jsonl has the scalars: pip install 'dmm_fast[train]', or tensorboard=false")
        return None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

"""From a configuration to batches of clips, and to the videos that validate."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from dmm_fast.data.alike import AlikeClips
from dmm_fast.data.annotated import DataError
from dmm_fast.data.augment import Augment, Clip
from dmm_fast.data.clips import ClipDataset, Clips, Mixture, StillClips, SyntheticClips
from dmm_fast.data.datasets import VideoDataset, open_dataset
from dmm_fast.data.paste import PasteClips
from dmm_fast.files import listed
from dmm_fast.training.config import ConfigError, Data, TrainConfig, nearest
from dmm_fast.training.team import Team

KINDS: dict[str, Callable[..., Clips]] = {
    "alike": AlikeClips, "clips": ClipDataset, "paste": PasteClips, "stills": StillClips, "synthetic": SyntheticClips,
}  # fmt: skip
PLACE = ("path", "layout", "split", "names", "proposals")  # of a source: which videos


def open_data(config: TrainConfig) -> tuple[Mixture, VideoDataset | None]:
    """The clips of the configuration's sources, and the videos that validate, if any."""
    data = config.data
    videos = None
    if data.val_split or data.held_out:
        path = required_path(data)
        proposals = data.val_proposals or data.proposals
        if proposals is None:
            without = "data.val_split=null" if data.val_split else "data.held_out='[]'"
            raise ConfigError(f"train: validation needs proposals; give data.proposals, or {without} for no validation")
        place = {"split": data.val_split or data.split, "proposals": proposals, "top": config.model.top}
        names = None if data.val_split else data.held_out
        hint = "Give data.held_out='[{last}]', or '[]' for no validation"
        videos = open_videos(names, "data.held_out", hint, path, data.layout, **place)
    sources = [open_source(source, data, config.seed + number, videos) for number, source in enumerate(data.sources)]
    length = data.clips or sum(len(clips) for clips, _ in sources)
    return Mixture(sources, length, seed=config.seed), videos


def open_source(source: dict[str, Any], data: Data, seed: int, validating: VideoDataset | None = None) -> tuple[Clips, float]:
    """One entry of `data.sources`: its clips, of none of the videos that validate, and its weight in the mixture."""
    settings = dict(source)
    kind, weight = settings.pop("kind", "clips"), settings.pop("weight", 1.0)
    if kind not in KINDS:
        raise ConfigError(f"train: no kind of source {kind!r}{nearest(str(kind), KINDS)}")
    augment = {**data.augment, **settings.pop("augment", {})}
    place = {name: settings.pop(name, getattr(data, name, None)) for name in PLACE}
    arguments: dict[str, Any] = {"frames": data.frames, "seed": seed, **tuples(settings)}
    try:
        if kind != "stills" or augment:  # which have their own default
            arguments["augment"] = Augment(**tuples(augment))
        if kind == "synthetic":
            return SyntheticClips(**arguments), weight
        path = place.pop("path") or required_path(data)
        names = place.pop("names")
        hint = "Give data.sources='[{{kind: clips}}]' for clips of all videos"
        videos = open_videos(names, f"a source of kind {kind}", hint, path, place.pop("layout"), **place)
        held = {*data.held_out}
        if validating is not None and videos.path.resolve() == validating.path.resolve():
            held.update(validating.names)
        kept = [name for name in videos.names if name not in held]
        if not kept:
            raise ConfigError(f"train: a source of kind {kind}: all of its {len(videos)} videos validate; see split, names")
        return KINDS[kind](videos.subset(kept), **arguments), weight
    except TypeError as error:  # an unknown setting
        raise ConfigError(f"train: a source of kind {kind}: {error}") from None


def open_videos(names: Sequence[str] | None, what: str, hint: str, path: str, layout: str, **place: Any) -> VideoDataset:
    """The videos that `what` names, all for None; where some are not there, `hint` says what to do."""
    try:
        return open_dataset(path, layout, names=names, **place)
    except DataError:
        there = open_dataset(path, layout, **place)
        if absent := [name for name in names or () if name not in there.names]:
            told = f"train: {what} names videos that {there.path} does not have: {listed(absent)}; {there.path} has {listed(there.names)}"
            raise ConfigError(f"{told}. {hint.format(last=there.names[-1])}") from None
        raise


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


def as_is(clip: Any) -> Any:
    return clip


def leave_stopping_to_us(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

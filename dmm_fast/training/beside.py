"""A proposal network that learns beside the segmenter, on the same backbone.

As long as the run lasts, its layers are a submodule of the segmenter, `DETECTOR`: so optimiser, average and checkpoint have them
too. Files for use are separate.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmm_fast.learning.unroll import mixed_precision
from dmm_fast.model import DMMNet
from dmm_fast.model.weights import write_tensors
from dmm_fast.proposals.layers import RESNETS, about, named_levels
from dmm_fast.training.config import Beside, ConfigError, TrainConfig
from dmm_fast.training.data import leave_stopping_to_us
from dmm_fast.training.detector import (
    Batch,
    Batches,
    Schedule,
    find_examples,
    left_in,
    make_ready,
    on_device,
    picture_size,
    start_from,
)
from dmm_fast.training.team import Team

DETECTOR = "detector"


class OnAnother(nn.Module):
    """A pyramid on the backbone of another network, whose weights are that network's alone."""

    def __init__(self, fpn: nn.Module, width: int, body: nn.Module):
        super().__init__()
        self.fpn, self.out_channels = fpn, width
        self._body = (body,)  # hidden: as a submodule its weights would be learnt, averaged and saved twice

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return named_levels(self.fpn(self._body[0](images)[-4:]))


class Share(torch.utils.data.Dataset):
    """One process's part of every batch. All of a batch is made, as what is pasted and how it is cut follow each other at random."""

    def __init__(self, batches: Batches, team: Team):
        self.batches, self.rank, self.size = batches, team.rank, team.size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> Batch:
        images, targets = self.batches[step]
        return images[self.rank :: self.size], targets[self.rank :: self.size]


class Companion:
    """The proposal network of a run: its layers in `net`, what they learn from, and their file."""

    def __init__(self, net: DMMNet, beside: Beside, run: TrainConfig, team: Team):
        self.beside, self.run, self.team = beside, run, team
        detector, self.config = start_from(beside.init)
        theirs, ours = self.config.backbone, net.config.backbone
        if theirs != ours:
            raise ConfigError(f"train: detector.init must have the segmenter's backbone, {ours}; {beside.init} has {theirs}")
        if theirs in RESNETS:
            raise ConfigError(
                f"train: detector.init must not have torchvision's ResNet, as {beside.init} does; its levels differ"
            )
        if net.config.input_size is not None or net.config.short_side != self.config.short_side:
            raise ConfigError(
                f"train: model.short_side must be {self.config.short_side}, at which detector.init sees frames, and model.input_size "
                "null, or the two cannot share a backbone in use"
            )
        detector.backbone = OnAnother(detector.get_submodule("backbone.fpn"), self.config.fpn, net.backbone)
        make_ready(detector, beside.rois)
        net.add_module(DETECTOR, detector.train())

    def pictures(self, start: int, steps: int, held: Collection[str]) -> Iterator[Batch]:
        """What this process learns from in the steps from `start` to `steps`; held: videos that validate, which it never sees."""
        beside, team = self.beside, self.team
        if beside.batch % team.size:
            raise ConfigError(f"train: detector.batch must be a multiple of the processes, got {beside.batch} and {team.size}")
        examples = left_in(find_examples(beside.data, beside.pseudo), beside.leave_out)
        examples = [example for example in examples if example.video.name not in held]
        schedule = Schedule(steps, beside.batch, score=beside.score, paste=beside.paste, seed=self.run.seed)
        batches = Share(Batches(examples, schedule, picture_size(self.config)), team)
        rest = torch.utils.data.Subset(batches, range(start, steps))
        workers = min(1, self.run.data.workers)  # pictures are made faster than clips
        return iter(
            torch.utils.data.DataLoader(rest, batch_size=None, num_workers=workers, worker_init_fn=leave_stopping_to_us)
        )

    def loss(self, net: DMMNet, batch: Batch) -> Tensor:
        """This process's share of the sum of torchvision's losses."""
        with mixed_precision(self.team.device, self.run):
            losses = net.get_submodule(DETECTOR)(*on_device(batch, self.team.device))
        return torch.stack(list(losses.values())).sum() / self.team.size

    def write(self, path: Path, tensors: Mapping[str, Tensor], notes: dict[str, Any]) -> None:
        """The detector as a file for use, whole. tensors: of the segmenter, with these layers in it."""
        whole = {}
        for name, tensor in tensors.items():
            if is_beside(name):
                whole[name.removeprefix(f"{DETECTOR}.")] = tensor
            elif name.startswith("backbone."):
                whole[name.replace("backbone.", "backbone.body.", 1)] = tensor
        write_tensors(path, whole, {**about(self.config), **notes})


def is_beside(name: str) -> bool:
    return name.startswith(f"{DETECTOR}.")

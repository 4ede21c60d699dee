"""The net and its optimiser as a configuration has them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dmm_fast.model import DMMNet, load_weights, read_weights
from dmm_fast.model.weights import weights_file
from dmm_fast.training.beside import is_beside
from dmm_fast.training.config import ConfigError, TrainConfig
from dmm_fast.training.imagenet import imagenet_weights


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
        load_weights(net, widened(read_weights(weights_file(config.pretrained)), net.state_dict()), config.pretrained)
        known = set(net.state_dict())
    net.train()
    net.backbone.requires_grad_(not config.freeze)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or (config.freeze and module is net.backbone):
            module.eval()
    return net, known


def widened(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` for a net whose weights are `own`, with further inputs, the last ones of its layers: their weights are 0, so that
    nothing changes at first.

    So objects that were decided apart (`Config.objects`) can learn to be decided together.
    """
    fitted = dict(tensors)
    for name, tensor in tensors.items():
        shape = own[name].shape if name in own else tensor.shape
        if tensor.ndim > 1 and len(shape) == tensor.ndim and shape[1] > tensor.size(1):
            more = tensor.new_zeros(tensor.size(0), shape[1] - tensor.size(1), *tensor.shape[2:])
            fitted[name] = torch.cat([tensor, more], 1)
    return fitted


def make_optimizer(net: DMMNet, known: set[str], config: TrainConfig) -> torch.optim.Optimizer:
    """Adam(W) over pretrained and new weights, the backbone's and a detector's apart if these have rates of their own.

    Biases and gains are not decayed.
    """
    optim = config.optim
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if not trained:
        raise ConfigError("train: nothing to train: the backbone is frozen and there is no refinement")

    def kind(name: str) -> str:
        if is_beside(name):
            return "detector"
        if name not in known:
            return "new"
        return "backbone" if optim.lr_backbone is not None and name.startswith("backbone.") else "pretrained"

    bases = {"backbone": optim.lr_backbone, "pretrained": optim.lr_pretrained, "new": optim.lr_new}
    if config.detector is not None:
        bases["detector"] = config.detector.rate
    groups = []
    for label, base in bases.items():
        for decay in (True, False):
            chosen = [p for name, p in trained if kind(name) == label and (p.ndim > 1) == decay]
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

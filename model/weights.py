"""Weights as safetensors, loaded strictly: a mismatch names its keys, and nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmm_fast.files import whole_file

from .config import Config

FORMAT = 1
PACKAGED = ("small", "detail")
"""Networks whose weights come with the package, by the names of their presets."""


def packaged(name: str) -> Path:
    """The file of the weights called `name` that come with the package."""
    return Path(str(resources.files("dmm_fast"))) / "weights" / f"{name}.safetensors"


def weights_file(name: str | os.PathLike[str]) -> Path:
    """The file of weights called `name`: of a packaged network, or a path."""
    return packaged(str(name)) if name in PACKAGED else Path(name)


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
    """Write a safetensors file with `about` as JSON in its metadata; it appears whole or not at all."""
    # Cloned where memory is shared (tied weights), which the format does not allow; contiguous, as channels-last is not.
    whole = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        save_file(whole, partial, {"dmm_fast": json.dumps(about)})
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # or a machine that loses power may keep the name and lose the bytes


def save_weights(net: nn.Module, path: str | os.PathLike[str], about: dict[str, Any] | None = None) -> None:
    """Write the state dict of `net` to `path`, and what there is to say `about` it."""
    write_tensors(path, net.state_dict(), about or {})


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a safetensors file says of its weights; {} for another project's."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("dmm_fast", "{}")
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is not a whole safetensors file ({error})") from error
    try:
        about = json.loads(text)
    except json.JSONDecodeError:
        about = None
    if not isinstance(about, dict):
        raise ValueError(f"weights: what {path} says of its weights cannot be read: {text[:60]!r}")
    return about


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name, and those that it shares with a packaged file, its `base`."""
    base = read_about(path).get("base")
    if base is not None and base not in PACKAGED:
        raise ValueError(f"weights: {path} needs weights called {base!r}, which this version of dmm_fast does not have")
    return (read_weights(packaged(base)) if base else {}) | load_file(path)


def read_config(path: str | os.PathLike[str]) -> Config:
    """The settings of the network whose weights are in a safetensors file."""
    about = read_about(path)
    if about.get("kind", "dmm") != "dmm":
        raise ValueError(f"weights: {path} holds no DMM-Net but a {about['kind']}")
    if about.get("format") != FORMAT or "config" not in about:
        raise ValueError(f"weights: {path} does not say what network it is for (format {FORMAT}); give a config or preset")
    return Config.from_dict(about["config"])


def load_weights(net: nn.Module, tensors: dict[str, Tensor], source: str = "weights") -> None:
    """Copy `tensors` into `net`; every name and shape must agree, else the error lists those that do not."""
    own = net.state_dict()
    problems = [f"missing {name}" for name in own if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in own]
    problems += [
        f"shape of {name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ValueError(f"weights: {source} does not fit the model:\n  " + "\n  ".join(shown))
    net.load_state_dict(tensors, strict=True)


def digest(net: nn.Module) -> str:
    """A hash of all weights: two nets with the same digest and config compute the same."""
    total = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()

"""What a training run leaves: weights to use, and one file from which it goes on as if it had never stopped.

Everything is safetensors, with JSON in the file's metadata; nothing is unpickled. A file appears whole or not at all, so
a run may be killed at any moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dmm_fast.learning.average import Average
from dmm_fast.model import Config
from dmm_fast.model.weights import write_tensors

FORMAT = 1
CURVE = "curve.jsonl"


def write_weights(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Config, **facts: Any) -> None:
    """A weights file of this project: what the net is lies in its metadata, beside `facts` of its training."""
    write_tensors(path, tensors, {"format": FORMAT, "config": config.to_dict(), **facts})


def write_state(
    path: str | os.PathLike[str], net: nn.Module, average: Average, optimizer: torch.optim.Optimizer, counters: dict[str, Any]
) -> None:
    """The whole state of a run: weights, their average, the optimiser's moments, and `counters`, which JSON can hold."""
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.shadow.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    write_tensors(path, tensors, {"format": FORMAT, **counters})


def read_state(
    path: str | os.PathLike[str], net: nn.Module, average: Average, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a run back into the state that `write_state` wrote; returns its counters."""
    counters, tensors = _read(path)
    parts: dict[str, dict[str, Tensor]] = {"net": {}, "average": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    net.load_state_dict(parts["net"], strict=True)
    if set(parts["average"]) != set(average.shadow):
        raise ValueError(f"checkpoint: {path} averages other parameters than this run")
    for name, tensor in parts["average"].items():
        average.shadow[name].copy_(tensor)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, rest = name.partition(".")
        moments.setdefault(int(index), {})[rest] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return counters


def read_counters(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The counters of a state file alone."""
    return _read(path, tensors=False)[0]


def _read(path: str | os.PathLike[str], tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: no such file: {path}")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("dmm_fast", "{}"))
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint: {path} is not a whole safetensors file ({error})") from error
    if facts.get("format") != FORMAT:
        raise ValueError(f"checkpoint: {path} is not of format {FORMAT}, but {facts.get('format')}")
    return facts, found


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

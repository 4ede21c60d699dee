"""TorchScript: one file, model.pt, with the methods start, step, add and drop; every size is open.

Deprecated upstream since torch 2.13, so all that uses it is here. It stays because it is the one format in which Python-free
programs get every size open, and CPU and CUDA, from one file.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dmm_fast.model import DMMNet, Proposals

from .loaded import Run
from .manifest import LIMITS, OPEN, Example, Manifest, flat, unflat

FILE = "model.pt"
FUNCTIONS = ("start", "step", "add", "drop")
# A script keeps both layers and both kinds of proposal masks: which of them runs is decided when it runs.
OPS = ("dmm::mask_iou", "dmm::match", "dmm::match_prices", "dmm::paste_combine")


@contextmanager
def _without_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.jit|TorchScript)")
        yield


def export(net: DMMNet, folder: Path) -> Manifest:
    """Script `net` (in eval mode) into `folder`; returns the manifest, not written yet."""
    example = Example(net, OPEN)
    with _without_warnings():
        torch.jit.script(net).save(folder / FILE)
    return Manifest(
        kind="torchscript",
        config=net.config.to_dict(),
        files=example.entries(dict.fromkeys(FUNCTIONS, FILE)),
        state=example.state_specs,
        dynamic={**LIMITS, "M": (0, LIMITS["M"][1])},
        ops=OPS,
        proposal_masks=("full", "soft"),
        notes=("TorchScript is deprecated in torch: where its limits do not matter, prefer pt2",),
    )


def load(folder: Path, manifest: Manifest, device: str) -> Run:
    with _without_warnings():
        net = torch.jit.load(folder / manifest.files["step"].file, map_location=device)

    @torch.no_grad()
    def run(name: str, tensors: list[Tensor]) -> list[Tensor]:
        if name == "start":
            return flat(net.start(*tensors))
        if name == "step":
            output, state = net.step(tensors[0], Proposals(*tensors[1:4]), unflat(tensors[4:]))
            return [*output, *flat(state)]
        leading = {"add": 3, "drop": 1}[name]  # tensors before the state's
        return flat(getattr(net, name)(*tensors[:leading], unflat(tensors[leading:])))

    return run

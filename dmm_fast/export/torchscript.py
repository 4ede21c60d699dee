"""TorchScript: one file, model.pt, with the methods start, step, add and drop; every size is open. A detector and a live step
with it are two more; so is the layer alone.

Deprecated upstream since torch 2.13, so all that uses it is here. It stays because it is the one format in which Python-free
programs get every size open, and CPU and CUDA, from one file.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmm_fast.model import DMMNet, Proposals

from .flat import Match, Progress
from .loaded import Run
from .manifest import LAYER_LIMITS, LIMITS, MASKS, OPEN, Example, Manifest, flat, unflat

if TYPE_CHECKING:
    from dmm_fast.proposals.live import Live

FILE, DETECTOR, LIVE, LAYER = "model.pt", "proposals.pt", "live.pt", "match.pt"
FUNCTIONS = ("start", "step", "add", "drop")
# A script keeps both layers and all kinds of proposal masks: which of them runs is decided when it runs.
OPS = ("dmm::decode_runs", "dmm::match", "dmm::match_prices", "dmm::paste_combine", "dmm::paste_masks", "dmm::upsample_argmax")


@contextmanager
def _without_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.jit|TorchScript)")
        yield


def export(net: DMMNet, folder: Path, live: Live | None = None, *, progress: Progress) -> Manifest:
    """Script `net` (in eval mode), and `live` with its detector where given, into `folder`; returns the manifest, not written yet."""
    example = Example(net, OPEN)
    files = dict.fromkeys(FUNCTIONS, FILE)
    with _without_warnings():
        progress("scripting start, step, add and drop")
        torch.jit.script(net).save(folder / FILE)
        if live is not None:
            progress("scripting proposals and live")
            files |= {"proposals": DETECTOR, "live": LIVE}
            script = torch.jit.script(live)
            script.save(folder / LIVE)
            torch.jit.script(live.detector).save(folder / DETECTOR)
            example.add_live(script, "M")
    return Manifest(
        kind="torchscript",
        config=net.config.to_dict(),
        files=example.entries(files),
        state=example.state_specs,
        dynamic={**LIMITS, "M": (0, LIMITS["M"][1]), "R": (0, LIMITS["R"][1])},
        ops=OPS,
        proposal_masks=MASKS,
        notes=(_DEPRECATED,),
    )


def export_layer(net: DMMNet, folder: Path, *, progress: Progress) -> Manifest:
    """The network's matching layer alone: a batch of ragged problems -> their assignments."""
    progress("scripting match")
    with _without_warnings():
        torch.jit.script(Match(net)).save(folder / LAYER)
    files = Example(net, OPEN).entries({"match": LAYER})
    return Manifest(
        kind="torchscript", config=net.config.to_dict(), files=files, dynamic=LAYER_LIMITS,
        ops=("dmm::match", "dmm::match_prices"), notes=(_DEPRECATED,),
    )  # fmt: skip


_DEPRECATED = "TorchScript is deprecated in torch: where its limits do not matter, prefer pt2"


def load(folder: Path, manifest: Manifest, device: str) -> Run:
    def opened(name: str) -> torch.jit.ScriptModule:
        return torch.jit.load(folder / manifest.files[name].file, map_location=device)

    with _without_warnings():
        scripts = {name: opened(name) for name in manifest.files if name not in FUNCTIONS}
        net = opened("step") if "step" in manifest.files else None

    @torch.no_grad()
    def run(name: str, tensors: list[Tensor]) -> list[Tensor]:
        if name == "live":
            proposals, output, state = scripts[name](tensors[0], unflat(tensors[1:]))
            return [*proposals, *output, *flat(state)]
        if name in scripts:
            results = scripts[name](*tensors)
            return [results] if isinstance(results, Tensor) else list(results)
        if name == "start":
            return flat(net.start(*tensors))
        if name == "step":
            output, state = net.step(tensors[0], Proposals(*tensors[1:4]), unflat(tensors[4:]))
            return [*output, *flat(state)]
        leading = {"add": 3, "drop": 1}[name]  # tensors before the state's
        return flat(getattr(net, name)(*tensors[:leading], unflat(tensors[leading:])))

    return run

"""TorchScript: one file, model.pt, with the methods start, step, add and drop; every size is open. A detector is a second one.

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
from dmm_fast.proposals import MaskRCNNProposer

from .loaded import Run
from .manifest import LIMITS, OPEN, Entry, Example, Manifest, Spec, flat, unflat

FILE, DETECTOR = "model.pt", "proposals.pt"
FUNCTIONS = ("start", "step", "add", "drop")
# A script keeps both layers and both kinds of proposal masks: which of them runs is decided when it runs.
OPS = ("dmm::mask_iou", "dmm::match", "dmm::match_prices", "dmm::paste_combine")


@contextmanager
def _without_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.jit|TorchScript)")
        yield


def export(net: DMMNet, folder: Path, detector: MaskRCNNProposer | None = None) -> Manifest:
    """Script `net` (in eval mode), and `detector` where given, into `folder`; returns the manifest, not written yet."""
    example = Example(net, OPEN)
    files = example.entries(dict.fromkeys(FUNCTIONS, FILE))
    with _without_warnings():
        torch.jit.script(net).save(folder / FILE)
        if detector is not None:
            files["proposals"] = _export_detector(detector, folder)
    return Manifest(
        kind="torchscript",
        config=net.config.to_dict(),
        files=files,
        state=example.state_specs,
        dynamic={**LIMITS, "M": (0, LIMITS["M"][1])},
        ops=OPS,
        proposal_masks=("full", "soft"),
        notes=("TorchScript is deprecated in torch: where its limits do not matter, prefer pt2",),
    )


def _export_detector(detector: MaskRCNNProposer, folder: Path) -> Entry:
    from .detector import ProposalNetwork

    script = torch.jit.script(ProposalNetwork(detector).eval())
    script.save(folder / DETECTOR)
    frame = torch.zeros((3, 96, 128), dtype=torch.uint8, device=detector.device)
    with torch.no_grad():
        boxes, scores, masks = script(frame)
    outputs = (
        Spec.of("proposals.boxes", boxes, ("M", 4)),
        Spec.of("proposals.scores", scores, ("M",)),
        Spec.of("proposals.masks", masks, ("M", *masks.shape[1:])),
    )
    return Entry(DETECTOR, (Spec.of("frame", frame, (3, "H", "W")),), outputs)


def load(folder: Path, manifest: Manifest, device: str) -> Run:
    def opened(name: str) -> torch.jit.ScriptModule:
        return torch.jit.load(folder / manifest.files[name].file, map_location=device)

    with _without_warnings():
        net = opened("step")
        detector = opened("proposals") if "proposals" in manifest.files else None

    @torch.no_grad()
    def run(name: str, tensors: list[Tensor]) -> list[Tensor]:
        if name == "proposals":
            return list(detector(*tensors))
        if name == "start":
            return flat(net.start(*tensors))
        if name == "step":
            output, state = net.step(tensors[0], Proposals(*tensors[1:4]), unflat(tensors[4:]))
            return [*output, *flat(state)]
        leading = {"add": 3, "drop": 1}[name]  # tensors before the state's
        return flat(getattr(net, name)(*tensors[:leading], unflat(tensors[leading:])))

    return run

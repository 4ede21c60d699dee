"""Exports of the whole step, for programs without Python: TorchScript, .pt2 (AOTInductor) and ONNX (docs/export.md).

dmm_fast.export.export("torchscript", net, "out")      # files and out/manifest.json
exported = dmm_fast.export.load("out")                 # checked, then start, step, add, drop as DMMNet has them
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dmm_fast.model import DMMNet, digest, inference
from dmm_fast.proposals.detector import Detector

from .loaded import Exported, verify
from .manifest import KINDS, NAME, OPEN, ExportError, Manifest, Sizes, config_of, read, require_ops

__all__ = ["KINDS", "ExportError", "Exported", "Manifest", "Sizes", "export", "load", "read"]


def export(
    kind: str, net: DMMNet, out: str | os.PathLike[str], *, detector: Detector | None = None, only: str | None = None,
    overwrite: bool = False, progress: Callable[[str], None] = lambda line: None, **options: Any,
) -> Manifest:  # fmt: skip
    """Write `net` to the folder `out` as one of `KINDS`; returns the manifest.

    detector: a `dmm_fast.proposals.detector.Detector`, which then proposes in the export, too. only: "match" writes the matching layer
    alone. progress: called with a line for each step, as pt2 takes minutes. options, for pt2 and onnx: sizes (a `Sizes`, None
    where a size may vary), masks (how proposals' masks come: "full", "runs" or "soft", see `dmm_fast.model.Proposals`; by default
    "soft" with a detector, else "runs" for pt2 and "full" for onnx). What these compute is compared with the
    networks, at other sizes than they were traced with. The manifest is written last: a folder without one is no export.

    Raises ExportError, and FileExistsError where `out` holds an export and `overwrite` is False.
    """
    if kind not in KINDS:
        raise ExportError(f"export: format must be one of {KINDS}, got {kind!r}")
    if only not in (None, "match"):
        raise ExportError(f"export: only must be None or 'match', got {only!r}")
    if only is not None and (detector is not None or options):
        raise ExportError(f"export: the layer alone takes no detector, sizes or masks, got {sorted(options) or 'a detector'}")
    if detector is not None:
        from dmm_fast.proposals.live import Live, shares_backbone  # torchvision is slow to import
        from dmm_fast.proposals.traceable import ProposalNetwork

        network = copy.deepcopy(ProposalNetwork(detector)).eval().to(net.mean.device)
        if network.top > net.config.top:  # a step would choose among fewer than the live step
            raise ExportError(f"export: the detector's top must be at most the network's, {net.config.top}, got {network.top}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / NAME).exists():
        if not overwrite:
            raise FileExistsError(f"{folder}: holds an export already; overwrite replaces it")
        (folder / NAME).unlink()
    modes = [(module, module.training) for module in net.modules()]  # some of a network in training are frozen
    try:
        if only is not None:
            manifest = _format(kind).export_layer(net.eval(), folder, progress=progress)
        else:
            frozen = inference(copy.deepcopy(net.eval()), fused=False)
            if detector is not None:
                options["live"] = Live(frozen, network, shares_backbone(net, detector)).eval()
            if kind != "torchscript":
                default = "soft" if detector is not None else "runs" if kind == "pt2" else "full"
                options["masks"] = options.get("masks") or default
                if detector is not None and options["masks"] != "soft":
                    raise ExportError(f"export: a detector's masks are soft, got masks {options['masks']!r}")
                # AOTInductor computes nonsense from weights that lie channels-last
                options.get("live", frozen).to(memory_format=torch.contiguous_format)
            manifest = _format(kind).export(frozen, folder, progress=progress, **options)
            if kind != "torchscript":  # a script is the network itself
                progress("comparing with the network")
                exported = Exported(manifest, _format(kind).load(folder, manifest, str(net.mean.device)))
                verify(exported, net, options.get("sizes", OPEN), options["masks"], options.get("live"))
    finally:
        for module, training in modes:
            module.training = training
    return replace(manifest, weights=digest(net)).write(folder)


def load(folder: str | os.PathLike[str], device: str = "cpu") -> Exported:
    """Check an exported folder and make it ready to run; nothing of it is opened before all of it is checked.

    What holds the matching layer alone has `match` and nothing else.

    A checksum tells damage, not malice: a model.pt or .pt2 is a program, so load what you would also run.
    Raises ExportError.
    """
    manifest = read(folder)
    require_ops(manifest.ops, str(folder))
    config_of(manifest)
    absent = [name for name in ("start", "step") if name not in manifest.files]
    if absent and "match" not in manifest.files:
        raise ExportError(f"{folder}: has no {' and no '.join(absent)}")
    if manifest.device not in ("any", device.partition(":")[0]):
        raise ExportError(f"{folder}: was exported for {manifest.device}, not for {device}")
    return Exported(manifest, _format(manifest.kind).load(Path(folder), manifest, device))


def _format(kind: str) -> Any:
    return importlib.import_module(f"{__name__}.{kind}")

"""``dmm-fast export``: the step as files that run without this package, or without Python."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

from dmm_fast.commands.options import add_command, add_network_options, check_device, check_packages, count

FORMATS = ("torchscript", "pt2", "onnx")
MASKS = ("soft", "runs", "full")


def add(commands: Any) -> None:
    parser = add_command(
        commands, "export", run, "write the step for programs without Python: TorchScript, .pt2, ONNX",
        "Write the segmenter's start and step and its proposal network, with weights, to a folder. manifest.json lists\n"
        "inputs and outputs, which sizes may vary, and the checksum of every file.\n\n"
        "torchscript  one file for C++ with libtorch; every size may vary; CPU and CUDA\n"
        "pt2          compiled for this kind of processor (AOTInductor), the fastest; the device is fixed at export\n"
        "onnx         for ONNX runtimes, without torch; matching is a function that a runtime may replace",
        ("dmm-fast export --format torchscript --out exported", "the trained networks in the package, proposals included"),
        ("dmm-fast export --format torchscript --preset iou --out exported", "matching on overlap alone"),
        ("dmm-fast export --format pt2 --preset youtube-vos --weights net.safetensors --out exported",
         "compiled; objects, proposals and the frame's size may vary"),
        ("dmm-fast export --format pt2 --height 480 --width 854 --out exported",
         "the packaged networks, compiled for frames of one size"),
        ("dmm-fast export --format pt2 --height 480 --width 854 --objects 5 --proposals 50 --out exported",
         "all sizes fixed: unused slots and proposals are padding"),
        ("dmm-fast export --format onnx --only match --out layer", "the matching layer alone, as a small file"),
    )  # fmt: skip
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in DIR")
    model = add_network_options(parser)
    model.add_argument(
        "--detector", metavar="small|FILE|none",
        help="the proposal network to export with the step: the packaged one (default with the packaged network), a file "
        "of dmm-fast train-proposals, or none; pt2 and onnx need --height and --width for it",
    )  # fmt: skip
    model.add_argument(
        "--device", default="cpu", help="pt2: where it will run, cpu (default) or cuda; the other formats run on both"
    )
    sizes = parser.add_argument_group("sizes", "A size that is not given may vary. In TorchScript all sizes may.")
    sizes.add_argument("--height", type=partial(count, least=32), metavar="H", help="of the frames, in pixels")
    sizes.add_argument("--width", type=partial(count, least=32), metavar="W", help="of the frames, in pixels")
    sizes.add_argument("--objects", type=count, metavar="N", help="object slots")
    sizes.add_argument("--proposals", type=count, metavar="M", help="proposals per frame")
    sizes.add_argument(
        "--masks", choices=MASKS,
        help="form of the proposals' masks: soft, in their boxes, as from Mask R-CNN (default with a detector); runs, "
        "run-length codes as in COCO's files (else default for pt2); full, of the frame's size (else default for onnx)",
    )  # fmt: skip
    sizes.add_argument("--only", choices=("match",), help="the matching layer alone, cost -> assignment")


def run(a: argparse.Namespace) -> int:
    from dmm_fast.export import ExportError, Sizes, export
    from dmm_fast.export.manifest import MEANING
    from dmm_fast.inference.segmenter import Segmenter
    from dmm_fast.model import Config, DMMNet

    check_device(a.device)
    if a.format == "onnx":
        check_packages("onnx", "onnxscript", *["onnxruntime"] * (a.only is None))  # which runs what was exported
    sizes = Sizes(N=a.objects, M=a.proposals, H=a.height, W=a.width)
    if a.format == "torchscript" and (sizes.varying != list("NMHW") or a.masks):
        raise ExportError("export: a TorchScript takes every size and all kinds of masks; leave those options out")
    if a.only is not None and (a.detector not in (None, "none") or a.masks or sizes.varying != list("NMHW")):
        raise ExportError(f"export: --only {a.only} takes every size, and no --detector; leave those options out")
    of_the_network = [name for name in ("backbone", "weights", "short_side", "refine") if getattr(a, name) is not None]
    if a.only is not None and of_the_network:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in of_the_network)
        raise ExportError(f"export: --only {a.only} is the layer of the --preset, without its network; leave out {named}")
    options: dict[str, Any] = {"only": a.only}
    if a.only is None:
        if a.format != "torchscript":
            options |= {"sizes": sizes, "masks": a.masks}
        config = Config.preset(a.preset or "davis", backbone=a.backbone) if a.backbone else a.preset
        net = Segmenter(config, weights=a.weights, short_side=a.short_side, refine=a.refine, device=a.device).net
        net.config = replace(net.config, top=max(net.config.top, a.proposals or 0))  # who runs the export keeps as many
        options["detector"] = _detector(a, net.config.top)
    else:
        config = Config.preset(a.preset or "small")
        settings = ("layer", "n_grad", "n_proj", "lr", "dykstra")
        net = DMMNet(Config(**{name: getattr(config, name) for name in settings})).to(a.device)  # no features, no weights
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {line}", file=sys.stderr, flush=True)

    manifest = export(a.format, net, a.out, overwrite=a.overwrite, progress=tell, **options)

    files = {entry.file: entry.bytes for entry in manifest.files.values()}
    for name, size in files.items():
        print(f"{a.out}/{name}  " + (f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.0f} kB"))
    ranges = ", ".join(f"{name} ({MEANING[name]}) {low}..{high}" for name, (low, high) in manifest.dynamic.items())
    print(f"sizes that may vary: {ranges or 'none'}")
    for note in manifest.notes:
        print(f"note: {note}")
    return 0


def _detector(a: argparse.Namespace, most: int) -> Any:
    """The proposal network to export, which finds at most so many, or None."""
    from dmm_fast.export import ExportError
    from dmm_fast.model import PACKAGED
    from dmm_fast.proposals.base import TOP
    from dmm_fast.proposals.sources import open_proposer

    own = a.weights is None and a.backbone is None and a.preset in (None, *PACKAGED)
    name = a.detector or ("small" if own else "none")
    if name not in ("small", "none") and not name.endswith(".safetensors"):
        raise ExportError(f"export: --detector must be small, none or FILE.safetensors, got {name!r}")
    return None if name == "none" else open_proposer(name, device=a.device, top=a.proposals or min(TOP, most))

"""ONNX: start and step for ONNX Runtime and its like. Mask IoU and pasting are plain ops; the matching layers are functions of
the model (`dmm::match`, `dmm::match_prices`), which a runtime may replace by kernels of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dmm_fast import reference
from dmm_fast.model import DMMNet

from .flat import FUNCTIONS, traced
from .loaded import Run
from .manifest import LIMITS, Example, ExportError, Manifest, Sizes, Spec


def export(
    net: DMMNet, folder: Path, sizes: Sizes = Sizes(), soft: bool = False, only: str | None = None
) -> Manifest:
    """Write `net` as ONNX into `folder`; returns the manifest, not written yet. only="match": its matching layer alone."""
    if only is not None:
        return _export_layer(net, folder)
    example = Example(net, sizes, soft)
    for name, program in traced(net, example, sizes).items():
        inputs, outputs = example.specs[name]
        _save(_convert(program, inputs, outputs), folder / f"{name}.onnx")
    return Manifest(
        kind="onnx",
        config=net.config.to_dict(),
        files=example.entries({name: f"{name}.onnx" for name in FUNCTIONS}),
        state=example.state_specs,
        dynamic={name: LIMITS[name] for name in sizes.varying},
        proposal_masks=("soft" if soft else "full",),
        notes=(*sizes.notes(), "add and drop: where(slots, start's or zero state, state), tensor by tensor"),
    )


def load(folder: Path, manifest: Manifest, device: str) -> Run:
    import onnxruntime

    wanted = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise ExportError(f"this onnxruntime has no {wanted}; it has {onnxruntime.get_available_providers()}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {
        name: onnxruntime.InferenceSession(folder / entry.file, options, providers=[wanted])
        for name, entry in manifest.files.items()
    }

    def run(name: str, tensors: list[Tensor]) -> list[Tensor]:
        session = sessions[name]
        used = {value.name for value in session.get_inputs()}
        specs = manifest.files[name].inputs
        feed = {spec.name: tensor.cpu().numpy() for spec, tensor in zip(specs, tensors) if spec.name in used}
        return [torch.from_numpy(array).to(device) for array in session.run(None, feed)]

    return run

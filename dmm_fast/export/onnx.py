"""ONNX: start and step for ONNX Runtime and its like. Masks are handled by plain ops; the matching layers are functions of
the model (`dmm::match`, `dmm::match_prices`, and `dmm::*_unmatched` of a call with unmatched_cost), which a runtime may replace by kernels of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmm_fast.model import DMMNet
from dmm_fast.ops import reference

from .flat import POOLING, Progress, Traced, traced, traced_layer
from .loaded import Run
from .manifest import LAYER_LIMITS, OPEN, Entry, Example, ExportError, Manifest, Sizes, Spec

if TYPE_CHECKING:
    from dmm_fast.proposals.live import Live

OPSET = 18
DOMAIN = "dmm"


def export(
    net: DMMNet, folder: Path, sizes: Sizes = OPEN, masks: str = "full", live: Live | None = None, *,
    progress: Progress,
) -> Manifest:  # fmt: skip
    """Write `net`, and `live` with its detector, as ONNX into `folder`; returns the manifest, not written yet."""
    if masks == "runs":
        raise ExportError("export: ONNX takes soft or full masks, not runs: it has no op to decode them")
    example = Example(net, sizes, masks)
    result = traced(net, example, sizes, ".onnx", _decompositions(), live)
    return Manifest(
        kind="onnx",
        config=net.config.to_dict(),
        files=_convert(result, folder, progress),
        state=example.state_specs,
        dynamic=example.dynamic,
        proposal_masks=(masks,),
        notes=(*sizes.notes(), "add and drop: where(slots, start's or zero state, state), tensor by tensor"),
    )


def export_layer(net: DMMNet, folder: Path, *, progress: Progress) -> Manifest:
    """The network's matching layer alone: a batch of ragged problems -> their assignments."""
    files = _convert(traced_layer(net, Example(net, OPEN), ".onnx", _decompositions()), folder, progress)
    return Manifest(kind="onnx", config=net.config.to_dict(), files=files, dynamic=LAYER_LIMITS)


def _decompositions() -> dict[Any, Any]:
    return {**torch.export.default_decompositions(), **POOLING, **_OPS}


def _convert(traced: Traced, folder: Path, progress: Progress) -> dict[str, Entry]:
    """Write the programs; returns their entries in the manifest, with names that are unique."""
    entries = {}
    for name, program in traced.programs.items():
        progress(f"converting {name}")
        entry = traced.entries[name]
        taken = {spec.name for spec in entry.inputs}  # ONNX has one space of names
        outputs = (replace(s, name=f"next.{s.name}" if s.name in taken else s.name) for s in entry.outputs)
        entries[name] = entry = replace(entry, outputs=tuple(outputs))
        converted: Any = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=[spec.name for spec in entry.inputs], output_names=[spec.name for spec in entry.outputs],
        )  # fmt: skip
        _save(converted.model_proto, entry.inputs + entry.outputs, folder / entry.file)
    return entries


def _save(model: Any, specs: Iterable[Spec], path: Path) -> None:
    """Add the functions that `model` calls, name its open sizes as the manifest does, check it and write it."""
    import onnx

    from . import onnx_functions

    calls = sorted({node.op_type for node in model.graph.node if node.domain == DOMAIN})
    functions = [getattr(onnx_functions, name).to_function_proto() for name in calls]
    for function in functions:
        _order_loops(function.node)
    model.functions.extend(functions)
    shapes = {spec.name: spec.shape for spec in specs}
    for value in (*model.graph.input, *model.graph.output):
        for dim, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            if isinstance(size, str):
                dim.dim_param = size
    del model.graph.value_info[:]  # shapes in other names; runtimes infer their own
    model.producer_name = "dmm_fast"
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _order_loops(nodes: Iterable[Any]) -> None:
    """Put the outputs of every Loop into the order of what its body carries.

    onnxscript takes the two orders from two sets of names, so whether they agree hangs on the process's hash seed. It names a
    variable's values x, x_26, x_64: the part before the number says which is which.
    """
    for node in nodes:
        for body in (attribute.g for attribute in node.attribute if attribute.name == "body"):
            variable = re.compile(r"_\d+$")
            outputs = {variable.sub("", name): name for name in node.output}
            node.output[:] = [outputs[variable.sub("", value.name)] for value in body.input[2:]]
            _order_loops(body.node)


# ---- our ops, and those that ONNX lacks, in the terms of torch.onnx ----


def _match(  # with the schema's defaults: torch.export leaves out arguments that equal them
    cost: Tensor, init: None = None, num_templates: Tensor | None = None, num_proposals: Tensor | None = None,
    lr_tensor: None = None, n_grad: int = 40, n_proj: int = 5, lr: float = 0.1, carry: bool = False, last: bool = False,
    unmatched_cost: Tensor | None = None,
) -> Tensor:  # fmt: skip
    attributes = {"n_grad": n_grad, "n_proj": n_proj, "lr": lr, "carry": int(carry), "last": int(last)}
    return _node("match", cost, num_templates, num_proposals, unmatched_cost, attributes)


def _match_prices(
    cost: Tensor, num_templates: Tensor | None = None, num_proposals: Tensor | None = None, lr_tensor: None = None,
    n_grad: int = 40, n_proj: int = 1, lr: float = 10.0, last: bool = True,
    unmatched_cost: Tensor | None = None,
) -> Tensor:  # fmt: skip
    attributes = {"n_grad": n_grad, "n_proj": n_proj, "lr": lr, "last": int(last)}
    return _node("match_prices", cost, num_templates, num_proposals, unmatched_cost, attributes)


def _node(
    name: str, cost: Tensor, num_templates: Tensor | None, num_proposals: Tensor | None, unmatched_cost: Tensor | None,
    attributes: dict[str, Any],
) -> Tensor:  # fmt: skip
    inputs = [cost, num_templates, num_proposals]
    if unmatched_cost is not None:
        name = f"{name}_unmatched"
        inputs.append(unmatched_cost)
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", inputs, attributes, dtype=cost.dtype, shape=cost.shape, version=1)


def _paste_combine(assignment: Tensor, masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    return reference.paste_combine(assignment, masks, boxes, (height, width))


def _paste_masks(masks: Tensor, boxes: Tensor, rows: int, columns: int, samples: int) -> Tensor:
    return reference.paste_masks(masks, boxes, rows, columns, samples)


def _upsample_argmax(logits: Tensor, rank: Tensor, height: int, width: int) -> Tensor:
    return reference.upsample_argmax(logits, rank, height, width)


def _cdist(a: Tensor, b: Tensor, p: float, mode: int | None) -> Tensor:
    return (a[:, None] - b).abs().sum(2)


def _exp2(x: Tensor) -> Tensor:
    """Runtimes have a fast Exp, and a slow Pow."""
    return torch.exp(x * math.log(2.0))


def _sort(x: Tensor, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """ONNX's TopK is stable: of equal values the one with the lower index comes first."""
    values, indices = torch.topk(x.float(), x.shape[dim], dim, largest=descending)
    return values.to(x.dtype), indices


def _resize(x: Tensor, size: list[int], align_corners: bool, *scales: Any) -> Tensor:
    """`F.interpolate(mode="bilinear", antialias=True)` as one matrix product per axis: runtimes resample a little differently."""

    def weights(cells: int, pixels: int) -> Tensor:
        scale = x.new_ones(pixels).sum() / cells  # pixels per cell
        centre = (torch.arange(cells, dtype=x.dtype, device=x.device) + 0.5) * scale
        pixel = torch.arange(pixels, dtype=x.dtype, device=x.device) + 0.5
        tent = (1.0 - (pixel - centre[:, None]).abs() / scale.clamp(min=1.0)).clamp(min=0.0)  # [cells, pixels]
        return tent / tent.sum(1, keepdim=True)

    return weights(size[0], x.shape[-2]) @ x @ weights(size[1], x.shape[-1]).t()


def _embedding_bag(table: Tensor, index: Tensor, offsets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted sums of rows of `table` by which the proposal network pools (`traceable.pool_regions`)."""
    bags = offsets.shape[0]  # all of one size
    return (rest[3].view(bags, 1, -1) @ table[index.view(bags, -1)])[:, 0], offsets, offsets, offsets


_OPS = {
    torch.ops.aten._embedding_bag_forward_only.default: _embedding_bag,
    torch.ops.dmm.match.default: _match,
    torch.ops.dmm.match_prices.default: _match_prices,
    torch.ops.dmm.paste_combine.default: _paste_combine,
    torch.ops.dmm.paste_masks.default: _paste_masks,
    torch.ops.dmm.upsample_argmax.default: _upsample_argmax,
    torch.ops.aten._cdist_forward.default: _cdist,
    torch.ops.aten.exp2.default: _exp2,
    torch.ops.aten.sort.stable: _sort,
    torch.ops.aten._upsample_bilinear2d_aa.default: _resize,
    torch.ops.aten._upsample_bilinear2d_aa.vec: _resize,
}


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

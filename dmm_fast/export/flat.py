"""A network's start and step on a flat list of tensors, as torch.export and ONNX want them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dmm_fast.model import DMMNet, Proposals

from .manifest import LIMITS, Example, ExportError, Sizes, Spec, flat, unflat


class Start(nn.Module):
    """(frame, masks, valid) -> the state's tensors."""

    def __init__(self, net: DMMNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in flat(self.net.start(*tensors)))  # two of them are the same tensor


class Step(nn.Module):
    """(frame, boxes, scores, masks, the state's tensors) -> the output's and the next state's tensors."""

    def __init__(self, net: DMMNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        output, state = self.net.step(tensors[0], Proposals(*tensors[1:4]), unflat(tensors[4:]))
        return tuple(tensor.clone() for tensor in (*output, *flat(state)))  # an input may pass through, or be given twice


FUNCTIONS = {"start": Start, "step": Step}


def traced(
    net: DMMNet, example: Example, sizes: Sizes, decompositions: dict[torch._ops.OpOverload, Callable]
) -> dict[str, torch.export.ExportedProgram]:
    """start and step by torch.export, with the sizes open that may vary; `decompositions` says what becomes other ops."""
    if sizes.H is None and net.config.backbone != "none" and net.config.input_size is None:
        raise ExportError(
            "export: give height and width. The features' sizes follow from the frame's here, by rounding that a traced "
            "program cannot repeat for other sizes; a config with input_size can leave them open"
        )
    dims = {name: torch.export.Dim(name, min=LIMITS[name][0], max=LIMITS[name][1]) for name in sizes.varying}

    def varying(spec: Spec) -> dict[int, torch.export.Dim]:
        return {i: dims[size] for i, size in enumerate(spec.shape) if isinstance(size, str)}

    programs = {}
    with torch.no_grad():
        for name, function in FUNCTIONS.items():
            inputs, _ = example.specs[name]
            shapes = (tuple(varying(spec) for spec in inputs),)
            program = torch.export.export(function(net), tuple(example.inputs[name]), dynamic_shapes=shapes, strict=False)
            programs[name] = program.run_decompositions(decompositions) if decompositions else program
    return programs


def pool(x: Tensor, size: list[int]) -> Tensor:
    """`F.adaptive_avg_pool2d` as one matrix product per axis: what follows it fixes its sizes, or has no such op."""

    def weights(cells: int, pixels: int) -> Tensor:
        cell, pixel = torch.arange(cells, device=x.device), torch.arange(pixels, device=x.device)
        first, end = cell * pixels // cells, ((cell + 1) * pixels + cells - 1) // cells
        inside = (pixel >= first[:, None]) & (pixel < end[:, None])  # [cells, pixels]
        return inside.to(x.dtype) / (end - first)[:, None].to(x.dtype)

    return weights(size[0], x.shape[-2]) @ x @ weights(size[1], x.shape[-1]).t()


POOLING = {torch.ops.aten.adaptive_avg_pool2d.default: pool, torch.ops.aten._adaptive_avg_pool2d.default: pool}

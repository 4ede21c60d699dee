"""A network's functions on flat lists of tensors, as torch.export and ONNX want them, and how they are traced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmm_fast.model import DMMNet, Proposals

from .manifest import LAYER_LIMITS, Entry, Example, ExportError, Sizes, Spec, flat, unflat

if TYPE_CHECKING:
    from dmm_fast.proposals.live import Live


Progress = Callable[[str], None]


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


class Propose(nn.Module):
    """frame -> boxes, scores and soft masks of as many proposals as the detector keeps, padding among them."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, masks = without_padding(Proposals(*self.detector(frame)))
        return boxes, scores, masks


class LiveStep(nn.Module):
    """(frame, the state's tensors) -> the tensors of the proposals, as `Propose` gives them, of the output and of the next state."""

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.live = live

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        proposals, output, state = self.live(tensors[0], unflat(tensors[1:]))
        return tuple(tensor.clone() for tensor in (*without_padding(proposals), *output, *flat(state)))


def without_padding(proposals: Proposals) -> Proposals:
    """The same with zeros in the boxes and masks that stand for none."""
    boxes, scores, masks = proposals
    real = scores > float("-inf")
    return Proposals(boxes * real[:, None], scores, masks * real[:, None, None])


class Match(nn.Module):
    """(cost, num_templates, num_proposals) -> assignment: the network's matching layer on a batch of ragged problems."""

    def __init__(self, net: DMMNet) -> None:
        super().__init__()
        self.prices, self.carry = net.prices, net.carry
        self.n_grad, self.n_proj, self.lr = net.n_grad, net.n_proj, net.lr

    def forward(self, cost: Tensor, num_templates: Tensor, num_proposals: Tensor) -> Tensor:
        if self.prices:
            return torch.ops.dmm.match_prices(cost, num_templates, num_proposals, None, self.n_grad, self.n_proj, self.lr)
        return torch.ops.dmm.match(
            cost, None, num_templates, num_proposals, None, self.n_grad, self.n_proj, self.lr, self.carry
        )


class Positional(nn.Module):
    """A function whose arguments are one list, however many it has."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...] | Tensor:
        return self.function(*tensors)


@dataclass
class Traced:
    """Programs by the manifest's names for them, and what it says of each."""

    programs: dict[str, torch.export.ExportedProgram]
    entries: dict[str, Entry]

    def ops(self) -> tuple[str, ...]:
        """The ops of the op library that the programs call."""
        targets = {node.target for program in self.programs.values() for node in program.graph.nodes}
        return tuple(sorted(target.name().partition(".")[0] for target in targets if str(target).startswith("dmm.")))


def traced(
    net: DMMNet, example: Example, sizes: Sizes, ending: str, decompositions: dict[torch._ops.OpOverload, Callable],
    live: Live | None = None,
) -> Traced:  # fmt: skip
    """start, step and, with a detector, proposals and live by torch.export, with the sizes open that may vary.

    Files will be called after them, with `ending`; `decompositions` says what becomes other ops.
    """
    kind = ending[1:]
    if sizes.H is None and net.config.backbone != "none" and net.config.input_size is None:
        raise ExportError(
            f"export: {kind} of this network needs --height H --width W: its features' sizes follow from the frame's, by rounding "
            "that a traced program cannot repeat for other sizes; a config with input_size can leave them open"
        )
    if sizes.H is None and live is not None:
        raise ExportError(f"export: {kind} with a detector needs --height H --width W, or --detector none")
    functions: dict[str, nn.Module] = {"start": Start(net), "step": Step(net)}
    if live is not None:
        functions |= {"proposals": Propose(live.detector), "live": LiveStep(live)}
        example.add_live(live, live.detector.top)
    return _traced(functions, example, example.dynamic, ending, decompositions)


def traced_layer(net: DMMNet, example: Example, ending: str, decompositions: dict[torch._ops.OpOverload, Callable]) -> Traced:
    """The matching layer alone."""
    return _traced({"match": Match(net)}, example, LAYER_LIMITS, ending, decompositions)


def _traced(
    functions: dict[str, nn.Module], example: Example, limits: dict[str, tuple[int, int]], ending: str,
    decompositions: dict[torch._ops.OpOverload, Callable],
) -> Traced:  # fmt: skip
    dims = {name: torch.export.Dim(name, min=low, max=high) for name, (low, high) in limits.items()}

    def varying(spec: Spec) -> dict[int, torch.export.Dim]:
        return {i: dims[size] for i, size in enumerate(spec.shape) if isinstance(size, str)}

    programs = {}
    with torch.no_grad():
        for name, function in functions.items():
            shapes = (tuple(varying(spec) for spec in example.specs[name][0]),)
            program = torch.export.export(
                Positional(function), tuple(example.inputs[name]), dynamic_shapes=shapes, strict=False
            )
            programs[name] = program.run_decompositions(decompositions) if decompositions else program
    return Traced(programs, example.entries({name: f"{name}{ending}" for name in functions}))


def pool(x: Tensor, size: list[int]) -> Tensor:
    """`F.adaptive_avg_pool2d` as one matrix product per axis: what follows it fixes its sizes, or has no such op."""

    def weights(cells: int, pixels: int) -> Tensor:
        cell, pixel = torch.arange(cells, device=x.device), torch.arange(pixels, device=x.device)
        first, end = cell * pixels // cells, ((cell + 1) * pixels + cells - 1) // cells
        inside = (pixel >= first[:, None]) & (pixel < end[:, None])  # [cells, pixels]
        return inside.to(x.dtype) / (end - first)[:, None].to(x.dtype)

    return weights(size[0], x.shape[-2]) @ x @ weights(size[1], x.shape[-1]).t()


POOLING = {torch.ops.aten.adaptive_avg_pool2d.default: pool, torch.ops.aten._adaptive_avg_pool2d.default: pool}

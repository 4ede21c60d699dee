"""The layers under test, and the sample inputs that feed every check of them. A new layer is one entry of LAYERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import dmm_fast
from dmm_fast.ops import reference

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass
class Sample:
    """One call: ``layer(cost, init, **options)``; init only where there is one."""

    name: str
    cost: Tensor
    init: Tensor | None = None
    options: dict = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.cost,) if self.init is None else (self.cost, self.init)

    def to(self, device, dtype) -> Sample:
        def move(value):
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return value.to(device)
            return value.to(device, torch.float64 if dtype == torch.float64 else torch.float32)

        options = {key: move(value) for key, value in self.options.items()}
        init = None if self.init is None else self.init.to(device, dtype)
        return Sample(self.name, self.cost.to(device, dtype), init, options)


def alone_samples(rand, generator, counts: dict) -> list[Sample]:
    """Templates that may stay alone; what some of them do at these costs."""
    ragged, own = rand(9, 6, 20), rand(9, 6) * 0.4
    ragged[:, 4:], own[:, 4:] = torch.nan, torch.nan  # padding may hold anything
    return [
        Sample("alone at a number", rand(3, 5, 20), options=dict(unmatched_cost=0.15)),
        Sample("alone at a negative number", rand(2, 9, 7) - 0.5, options=dict(unmatched_cost=-0.2)),
        Sample("alone in one problem", rand(7, 3), options=dict(unmatched_cost=rand(7) * 0.4)),
        Sample("alone lanes", rand(35, 5, 50), options=dict(n_grad=8, unmatched_cost=rand(5) * 0.1)),
        Sample("alone per problem", rand(3, 9, 12), options=dict(unmatched_cost=rand(3, 9) * 0.3)),
        Sample("alone, many rows", rand(18, 21, 40), options=dict(n_grad=4, unmatched_cost=rand(18, 21) * 0.2)),
        Sample("alone beyond the register path", rand(2, 20, 200), options=dict(n_grad=4, unmatched_cost=rand(20) * 0.1)),
        Sample("alone, 100 columns", rand(2, 16, 100), options=dict(n_grad=6, unmatched_cost=rand(16) * 0.1)),
        Sample("alone ragged", ragged, options=dict(unmatched_cost=own, **counts)),
        Sample(
            "alone ragged lanes",
            rand(37, 6, 20),
            options=dict(
                n_grad=5,
                num_templates=torch.randint(0, 7, (37,), generator=generator),
                num_proposals=torch.randint(0, 21, (37,), generator=generator),
                unmatched_cost=rand(37, 6) * 0.5,
            ),
        ),
    ]


def match_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(7)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    ties = rand(4, 5, 10)
    ties[:, :, 5:] = ties[:, :, :5]  # duplicate proposals
    ragged = rand(9, 6, 20)
    ragged[:, 4:] = torch.nan  # padding may hold anything
    samples = [
        Sample("paper", rand(5, 50)),
        Sample("batch", rand(3, 5, 50)),
        Sample("lanes", rand(35, 5, 50), options=dict(n_grad=8)),
        Sample("one row", rand(2, 1, 50)),
        Sample("one column", rand(2, 1, 1)),
        Sample("infeasible", rand(2, 7, 3)),
        Sample("one by many", rand(18, 3, 1)),
        Sample("63 columns", rand(2, 5, 63), options=dict(n_grad=6)),
        Sample("100 columns", rand(2, 16, 100), options=dict(n_grad=6)),
        Sample("many rows", rand(20, 21, 40), options=dict(n_grad=4)),
        Sample("beyond the register path", rand(2, 20, 200), options=dict(n_grad=4)),
        Sample("study setting", rand(1, 3, 8), options=dict(n_grad=50, n_proj=50, lr=0.01)),
        Sample("long: segments", rand(1, 20, 300), options=dict(n_grad=100, n_proj=8)),  # the backward's snapshots
        Sample("long: segments of lanes", rand(9, 8, 60), options=dict(n_grad=70, n_proj=16)),
        Sample("ties", ties),
        Sample("init", rand(3, 4, 12), init=rand(3, 4, 12) * 0.3),
        Sample("negative cost", rand(3, 4, 12) - 1),
        Sample("lr tensor", rand(3, 4, 12), options=dict(lr=torch.tensor(0.07, dtype=torch.float64))),
        Sample("lr per problem", rand(3, 4, 12), options=dict(lr=torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64))),
        Sample("one step", rand(2, 3, 4), options=dict(n_grad=1, n_proj=1)),
        Sample(
            "ragged",
            ragged,
            options=dict(
                num_templates=torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1]),
                num_proposals=torch.tensor([20, 20, 1, 0, 7, 13, 16, 17, 2]),
            ),
        ),
        Sample(
            "ragged lanes",
            rand(37, 6, 20),
            options=dict(
                n_grad=5,
                num_templates=torch.randint(0, 7, (37,), generator=generator),
                num_proposals=torch.randint(0, 21, (37,), generator=generator),
                lr=rand(37) * 0.2,
            ),
        ),
    ]
    samples += alone_samples(rand, generator, next(s.options for s in samples if s.name == "ragged"))
    samples.append(
        Sample("alone, long: segments", rand(1, 20, 300), options=dict(n_grad=100, n_proj=8, unmatched_cost=rand(20) * 0.1))
    )
    variants = [("reset", "average"), ("carry", "average"), ("reset", "last"), ("carry", "last")]
    return [
        Sample(f"{s.name}-{dykstra}-{output}", s.cost, s.init, {**s.options, "dykstra": dykstra, "output": output})
        for s in samples
        for dykstra, output in variants
    ]


def prices_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(7)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    ragged = rand(9, 6, 20)
    ragged[:, 4:] = torch.nan  # padding may hold anything
    samples = [
        Sample("paper", rand(5, 50)),
        Sample("batch", rand(3, 5, 50)),
        Sample("lanes", rand(35, 5, 50), options=dict(n_grad=8)),
        Sample("one row", rand(2, 1, 50)),
        Sample("one column", rand(2, 1, 1)),
        Sample("infeasible", rand(2, 7, 3), options=dict(n_grad=6)),
        Sample("one by many", rand(18, 3, 1), options=dict(n_grad=6)),
        Sample("63 columns", rand(2, 5, 63), options=dict(n_grad=6)),
        Sample("16 x 100", rand(2, 16, 100), options=dict(n_grad=20)),
        Sample("many rows", rand(20, 21, 40), options=dict(n_grad=10)),
        Sample("two rounds", rand(18, 4, 12), options=dict(n_proj=2)),
        Sample("three rounds", rand(3, 9, 30), options=dict(n_grad=7, n_proj=3, lr=4.0)),
        Sample("duplicates", rand(3, 5, 10).repeat(1, 1, 2), options=dict(n_grad=10)),
        Sample("negative cost", rand(3, 4, 12) - 1),
        Sample("one step", rand(2, 3, 4), options=dict(n_grad=1)),
        Sample("lr tensor", rand(3, 4, 12), options=dict(lr=torch.tensor(7.0, dtype=torch.float64))),
        Sample("lr per problem", rand(3, 4, 12), options=dict(lr=torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64))),
        Sample(
            "ragged",
            ragged,
            options=dict(
                num_templates=torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1]),
                num_proposals=torch.tensor([20, 20, 2, 0, 7, 13, 16, 17, 2]),
            ),
        ),
        Sample(
            "ragged lanes",
            rand(37, 6, 20),
            options=dict(
                n_grad=5,
                num_templates=torch.randint(0, 7, (37,), generator=generator),
                num_proposals=torch.randint(0, 21, (37,), generator=generator),
                lr=rand(37) * 9 + 1,
            ),
        ),
    ]
    samples += alone_samples(rand, generator, next(s.options for s in samples if s.name == "ragged"))
    return [
        Sample(f"{s.name}-{output}", s.cost, options={**s.options, "output": output})
        for s in samples
        for output in ("last", "average")
    ]


@dataclass(frozen=True)
class Layer:
    """A layer: its function, its reference, its op, and what its checks need to know."""

    name: str
    samples: list[Sample]
    tolerance: dict[torch.dtype, tuple[float, float]]  # (rtol, atol) of X against the float64 reference
    gradient: tuple[float, float]  # the same of gradients in float64
    soft: dict  # options with which X has a gradient that does not vanish
    quantile: tuple[float, float]  # float32: the median error of a gradient, and what 94 % stay below
    step: float  # a step size for gradcheck
    op_options: Callable[[Sample], dict]  # of the op, for opcheck
    starts: bool = False  # takes an init

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(dmm_fast, self.name)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return getattr(reference, self.name)

    @property
    def op(self):
        return getattr(torch.ops.dmm, self.name).default

    @property
    def backward_op(self):
        return getattr(torch.ops.dmm, f"{self.name}_backward").default

    @property
    def few(self) -> list[Sample]:
        """Those that differ in kind, not in size."""
        kinds = ("batch", "ragged", "ragged lanes", "init", "lr tensor", "lr per problem")
        kinds += ("alone lanes", "alone per problem", "alone ragged")
        return [sample for sample in self.samples if sample.name.split("-")[0] in kinds]

    def op_arguments(self, sample: Sample) -> tuple:
        """The op's tensors, by position."""
        init = (leaf(sample.init),) if self.starts else ()
        counts = sample.options.get("num_templates"), sample.options.get("num_proposals")
        lr = sample.options.get("lr")
        return leaf(sample.cost.nan_to_num(0.5)), *init, *counts, leaf(lr) if isinstance(lr, Tensor) else None


def alone(sample: Sample) -> dict[str, Tensor]:
    """``unmatched_cost``, where it is a tensor, as a leaf."""
    own = sample.options.get("unmatched_cost")
    return {"unmatched_cost": leaf(own.nan_to_num(0.3))} if isinstance(own, Tensor) else {}


def leaf(value):
    return value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def strided(tensor: Tensor) -> Tensor:
    """The same values behind strides no kernel would choose."""
    return torch.stack([tensor.mT, tensor.mT], -1)[..., 0].mT


def gradients(sample: Sample, function, grad: Tensor, wrap=lambda t: t) -> tuple[Tensor, ...]:
    """Those of <grad, X> in everything that is differentiable."""
    inputs, options = [leaf(t) for t in sample.inputs], {key: leaf(value) for key, value in sample.options.items()}
    leaves = inputs + [options[name] for name in ("lr", "unmatched_cost") if isinstance(options.get(name), Tensor)]
    x = function(*map(wrap, inputs), **options)
    return torch.autograd.grad(x, leaves, wrap(grad), allow_unused=True, materialize_grads=True)


MATCH = Layer(
    "match", match_samples(),
    # float32 sums of 50 terms over 200 rounds; half precision rounds its input
    tolerance={torch.float64: (1e-10, 1e-11), torch.float32: (1e-4, 2e-5), torch.bfloat16: (2e-2, 1e-2), torch.float16: (2e-3, 1e-3)},
    gradient=(1e-8, 1e-9), soft={}, quantile=(1e-5, 1e-3), step=0.13, starts=True,
    op_options=lambda s: dict(
        n_grad=4, n_proj=3, lr=0.1, carry=s.options["dykstra"] == "carry", last=s.options["output"] == "last", **alone(s)
    ),
)  # fmt: skip
MATCH_PRICES = Layer(
    "match_prices", prices_samples(),
    # X is p scaled up by t = n_grad lr = 400, and so is what half precision rounds off; gradients reach 1e2
    tolerance={torch.float64: (1e-9, 1e-10), torch.float32: (1e-4, 1e-4)},
    gradient=(1e-8, 1e-7), soft={"output": "average"}, quantile=(1e-4, 1e-2), step=1.3,
    op_options=lambda s: dict(n_grad=4, n_proj=2, lr=3.0, last=s.options["output"] == "last", **alone(s)),
)  # fmt: skip
LAYERS = [MATCH, MATCH_PRICES]

"""dmm_fast.match_prices: one set of sample inputs feeds every check, on every device and backend at hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import dmm_fast
from dmm_fast.ops import reference

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# (rtol, atol) of X against the float64 reference. X is p scaled up by t = n_grad lr = 400; half precision rounds its input.
TOLERANCE = {torch.float64: (1e-9, 1e-10), torch.float32: (1e-4, 1e-4)}


@dataclass
class Sample:
    """One call: ``match_prices(cost, **options)``."""

    name: str
    cost: Tensor
    options: dict = field(default_factory=dict)

    def to(self, device, dtype) -> Sample:
        def move(value):
            if isinstance(value, Tensor):
                return value.to(device, dtype) if value.is_floating_point() else value.to(device)
            return value

        return Sample(self.name, self.cost.to(device, dtype), {key: move(value) for key, value in self.options.items()})


def sample_inputs() -> list[Sample]:
    generator = torch.Generator().manual_seed(7)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    ragged = rand(9, 6, 20)
    ragged[:, 4:] = torch.nan  # padding may hold anything
    samples = [
        Sample("paper", rand(5, 50)),
        Sample("batch", rand(3, 5, 50)),
        Sample("lanes", rand(35, 5, 50), dict(n_grad=8)),
        Sample("one row", rand(2, 1, 50)),
        Sample("one column", rand(2, 1, 1)),
        Sample("infeasible", rand(2, 7, 3), dict(n_grad=6)),
        Sample("one by many", rand(18, 3, 1), dict(n_grad=6)),
        Sample("63 columns", rand(2, 5, 63), dict(n_grad=6)),
        Sample("16 x 100", rand(2, 16, 100), dict(n_grad=20)),
        Sample("many rows", rand(20, 21, 40), dict(n_grad=10)),
        Sample("two rounds", rand(18, 4, 12), dict(n_proj=2)),
        Sample("three rounds", rand(3, 9, 30), dict(n_grad=7, n_proj=3, lr=4.0)),
        Sample("duplicates", rand(3, 5, 10).repeat(1, 1, 2), dict(n_grad=10)),
        Sample("negative cost", rand(3, 4, 12) - 1),
        Sample("one step", rand(2, 3, 4), dict(n_grad=1)),
        Sample("lr tensor", rand(3, 4, 12), dict(lr=torch.tensor(7.0, dtype=torch.float64))),
        Sample("lr per problem", rand(3, 4, 12), dict(lr=torch.tensor([1.0, 4.0, 10.0], dtype=torch.float64))),
        Sample(
            "ragged",
            ragged,
            dict(
                num_templates=torch.tensor([0, 1, 2, 3, 4, 4, 3, 2, 1]),
                num_proposals=torch.tensor([20, 20, 2, 0, 7, 13, 16, 17, 2]),
            ),
        ),
        Sample(
            "ragged lanes",
            rand(37, 6, 20),
            dict(
                n_grad=5,
                num_templates=torch.randint(0, 7, (37,), generator=generator),
                num_proposals=torch.randint(0, 21, (37,), generator=generator),
                lr=rand(37) * 9 + 1,
            ),
        ),
    ]
    return [
        Sample(f"{s.name}-{output}", s.cost, {**s.options, "output": output})
        for s in samples
        for output in ("last", "average")
    ]


SAMPLES = sample_inputs()
FEW = [s for s in SAMPLES if s.name.split("-")[0] in ("batch", "ragged", "ragged lanes", "lr tensor", "lr per problem")]
by_name = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
few = pytest.mark.parametrize("sample", FEW, ids=lambda s: s.name)
on_devices = pytest.mark.parametrize("device", DEVICES)


def strided(tensor: Tensor) -> Tensor:
    """The same values behind strides no kernel would choose."""
    return torch.stack([tensor.mT, tensor.mT], -1)[..., 0].mT


def leaf(tensor):
    return tensor.detach().clone().requires_grad_() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


def gradients(sample: Sample, match, grad: Tensor, wrap=lambda t: t) -> tuple[Tensor, ...]:
    cost, options = leaf(sample.cost), {key: leaf(value) for key, value in sample.options.items()}
    leaves = [cost] + ([options["lr"]] if isinstance(options.get("lr"), Tensor) else [])
    return torch.autograd.grad(match(wrap(cost), **options), leaves, wrap(grad))


# ---- forward ----


@on_devices
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@by_name
def test_forward(sample, dtype, device):
    here = sample.to(device, dtype)
    rounded = here.to("cpu", torch.float64)
    x = dmm_fast.match_prices(here.cost, **here.options)
    assert x.dtype == dtype and x.shape == here.cost.shape and x.is_contiguous()
    expected = reference.match_prices(rounded.cost, **rounded.options)
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(x.double().cpu(), expected, rtol=rtol, atol=atol)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype, device):
    cost, grad = torch.rand(3, 5, 50, device=device).to(dtype), torch.rand(3, 5, 50, device=device).to(dtype)
    x = dmm_fast.match_prices(cost)
    assert x.dtype == dtype and torch.equal(x, dmm_fast.match_prices(cost.float()).to(dtype))
    ours = gradients(Sample("", cost, dict(output="average")), dmm_fast.match_prices, grad)[0]
    theirs = gradients(Sample("", cost.float(), dict(output="average")), dmm_fast.match_prices, grad.float())[0]
    assert torch.equal(ours, theirs.to(dtype))


@on_devices
@few
def test_strides(sample, device):
    here = sample.to(device, torch.float64)
    assert not strided(here.cost).is_contiguous()
    x = dmm_fast.match_prices(strided(here.cost), **here.options)
    assert torch.equal(x, dmm_fast.match_prices(here.cost, **here.options))
    grad = torch.randn_like(here.cost)
    for a, b in zip(gradients(here, dmm_fast.match_prices, grad), gradients(here, dmm_fast.match_prices, grad, strided)):
        assert torch.equal(a, b)


def contested(N: int, M: int, count: int) -> Tensor:
    """Random problems in which two templates have their cheapest proposal in common: ``[count, N, M]``."""
    cost = torch.rand(20 * count, N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    choice = cost.argmin(-1).sort(-1).values  # [B, N]
    return cost[(choice.diff() == 0).any(-1)][:count]


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("output, share", [("last", 0.97), ("average", 0.95)])
def test_decides_like_hungarian(output, share, dtype, device):
    """What this op is for; the paper's setting agrees in .04 of these problems."""
    cost = contested(5, 50, 200)
    x = dmm_fast.match_prices(cost.to(device, dtype), output=output).cpu().double()
    choice, best = x.argmax(-1), reference.hungarian(cost).argmax(-1)
    assert (choice == best).all(-1).double().mean() >= share
    assert (dmm_fast.match(cost).argmax(-1) == best).all(-1).double().mean() < 0.2
    if output == "last":
        residual = reference.feasibility(x)
        assert residual["rows"].median() < 1e-2 and residual["columns"].median() < 1e-2


@on_devices
@pytest.mark.parametrize("shape", [(0, 5, 50), (3, 0, 50), (3, 5, 0), (0, 50), (5, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(shape, device):
    cost = torch.rand(shape, device=device, requires_grad=True)
    x = dmm_fast.match_prices(cost)
    assert x.shape == shape
    x.sum().backward()
    assert cost.grad.shape == shape


LARGE = torch.rand(3, 6, 4, generator=torch.Generator().manual_seed(0)) * 3000


@on_devices
@pytest.mark.parametrize("cost", [torch.zeros(2, 4, 9), torch.ones(20, 4, 9) * 5000, LARGE], ids=["zero", "constant", "large"])
def test_constant_and_large_costs_stay_finite(cost, device):
    leaf_cost = cost.to(device).requires_grad_()
    x = dmm_fast.match_prices(leaf_cost, output="average")
    x.square().sum().backward()
    assert x.isfinite().all() and leaf_cost.grad.isfinite().all()


@on_devices
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch", [3, 40])
def test_a_non_finite_problem_is_nan_and_alone(batch, bad, device):
    torch.manual_seed(0)
    cost = torch.rand(batch, 4, 20, device=device)
    clean = dmm_fast.match_prices(cost)
    spoilt = cost.clone()
    spoilt[1, 2, 3] = bad
    spoilt.requires_grad_()
    x = dmm_fast.match_prices(spoilt)
    x.backward(torch.ones_like(cost))
    others = [b for b in range(batch) if b != 1]
    assert x[1].isnan().all() and spoilt.grad[1].isnan().all()
    assert torch.equal(x[others], clean[others]) and spoilt.grad[others].isfinite().all()


@on_devices
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bad", [0.0, -1.0, torch.nan, torch.inf])
def test_a_step_size_that_is_not_positive_is_nan_and_alone(bad, backend, device):
    cost = torch.rand(3, 4, 20, device=device)
    lr = torch.tensor([10, bad, 10], device=device)
    x = dmm_fast.match_prices(cost, lr=lr, backend=backend)
    assert x[1].isnan().all()
    torch.testing.assert_close(x[::2], dmm_fast.match_prices(cost, backend=backend)[::2])


@on_devices
@pytest.mark.parametrize("batch", [5, 50])
def test_repeatable_and_independent_of_place_and_neighbours(batch, device):
    torch.manual_seed(0)
    cost = torch.rand(batch, 5, 50, device=device)
    grad = torch.randn_like(cost)
    order = torch.randperm(batch, device=device)

    def run(c, g):
        c = c.clone().requires_grad_()
        x = dmm_fast.match_prices(c, output="average")
        return x.detach(), torch.autograd.grad(x, c, g)[0]

    x, dc = run(cost, grad)
    again, moved = run(cost, grad), run(cost[order], grad[order])
    assert torch.equal(x, again[0]) and torch.equal(dc, again[1])
    assert torch.equal(x[order], moved[0]) and torch.equal(dc[order], moved[1])
    neighbours = cost.clone()
    neighbours[1:] = torch.rand_like(neighbours[1:])
    assert torch.equal(run(neighbours, grad)[0][0], x[0])


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(capability):
    """The kernels are chosen once per process, so each choice gets its own; a wish beyond the machine falls back."""
    code = """
import torch, dmm_fast
from dmm_fast import reference
torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
    for shape in ((1, 5, 50), (37, 5, 50), (3, 9, 30), (40, 7, 9)):
        cost = torch.rand(shape, dtype=dtype).requires_grad_()
        x = dmm_fast.match_prices(cost, n_grad=8, output="average")
        y = reference.match_prices(cost, n_grad=8, output="average")
        share = 1 if dtype == torch.float64 else 0.9  # in float32 a mask bit can flip
        assert (x - y).abs().amax((1, 2)).quantile(share) < tolerance, (dtype, shape)
        if dtype == torch.float64:
            g = torch.randn_like(x)
            a, b = torch.autograd.grad(x, cost, g)[0], torch.autograd.grad(y, cost, g)[0]
            assert (a - b).abs().max() < 1e-9, shape
"""
    environment = {"DMM_CPU_CAPABILITY": capability, "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- backward ----


@on_devices
@by_name
def test_gradient_against_autograd_of_the_reference(sample, device):
    here = sample.to(device, torch.float64)
    torch.manual_seed(1)
    grad = torch.randn(here.cost.shape, dtype=torch.float64, device=device)
    ours, theirs = gradients(here, dmm_fast.match_prices, grad), gradients(here, reference.match_prices, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-7)  # gradients reach 1e2


@on_devices
def test_float32_gradient_by_quantile(device):
    """A mask bit can flip in float32, and then a problem's gradient differs: so quantiles (docs/matching.md)."""
    torch.manual_seed(0)
    cost = torch.rand(300, 5, 50, dtype=torch.float64, device=device)
    grad, options = torch.randn_like(cost), dict(output="average")
    a = gradients(Sample("", cost.float(), options), dmm_fast.match_prices, grad.float())[0].double()
    b = gradients(Sample("", cost, options), dmm_fast.match_prices, grad)[0]
    error = (a - b).norm(dim=(1, 2)) / b.norm(dim=(1, 2))
    assert error.median() < 1e-4
    assert (error > 1e-2).double().mean() < 0.06


@on_devices
@pytest.mark.parametrize("output", ["last", "average"])
def test_gradcheck(output, device):
    """In a small problem away from ties, against finite differences."""
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(3, 3, 5, dtype=torch.float64, generator=generator).to(device).requires_grad_()
    lr = torch.tensor([1.0, 1.3, 2.0], dtype=torch.float64, device=device, requires_grad=True)
    counts = torch.tensor([3, 2, 3], device=device), torch.tensor([5, 5, 4], device=device)

    def layer(c, a):
        return dmm_fast.match_prices(
            c, lr=a, n_grad=3, n_proj=2, output=output, num_templates=counts[0], num_proposals=counts[1]
        )

    assert torch.autograd.gradcheck(layer, (cost, lr))


def test_nothing_is_kept_but_the_inputs():
    cost = torch.rand(2, 4, 9, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dmm_fast.match_prices(cost)
    assert [t.data_ptr() for t in kept] == [cost.data_ptr()]


@pytest.mark.parametrize("path", ["layer", "op"])
def test_double_backward_is_refused_by_name(path):
    cost = torch.rand(2, 4, 9, dtype=torch.float64, requires_grad=True)
    x = dmm_fast.match_prices(cost) if path == "layer" else torch.ops.dmm.match_prices(cost)
    (grad,) = torch.autograd.grad(x.square().sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="dmm::match_prices_backward: .* differentiable once"):
        grad.sum().backward()


# ---- the rest of torch ----


@few
def test_opcheck(sample):
    here = sample.to("cpu", torch.float64)
    counts = here.options.get("num_templates"), here.options.get("num_proposals")
    lr = here.options.get("lr")
    cost, options = here.cost.nan_to_num(0.5), dict(n_grad=4, n_proj=2, lr=3.0, last=here.options["output"] == "last")
    torch.library.opcheck(torch.ops.dmm.match_prices.default, (leaf(cost), *counts, leaf(lr)), options)
    torch.library.opcheck(torch.ops.dmm.match_prices_backward.default, (torch.randn_like(cost), cost, *counts, lr), options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def loss(cost):
        return (dmm_fast.match_prices(cost * 2, n_grad=4, output="average") * cost).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 5, 50), (4, 6, 30)):
        a = torch.rand(shape).requires_grad_()
        b = a.detach().clone().requires_grad_()
        compiled(a).backward()
        loss(b).backward()
        torch.testing.assert_close(a.grad, b.grad)


class Decide(torch.nn.Module):
    def forward(self, cost: Tensor, num_proposals: Tensor) -> Tensor:
        return torch.ops.dmm.match_prices(cost, None, num_proposals, n_grad=8)


def test_export(tmp_path):
    cost, counts = torch.rand(3, 5, 20), torch.tensor([20, 7, 1])
    B, M = torch.export.Dim("B"), torch.export.Dim("M")
    program = torch.export.export(Decide(), (cost, counts), dynamic_shapes=({0: B, 2: M}, {0: B}))
    torch.export.save(program, tmp_path / "decide.pt2")
    loaded = torch.export.load(tmp_path / "decide.pt2").module()
    for shape in ((3, 5, 20), (6, 5, 33)):
        cost, counts = torch.rand(shape), torch.randint(0, shape[2], shape[:1])
        assert torch.equal(loaded(cost, counts), Decide()(cost, counts))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script(tmp_path):
    scripted = torch.jit.script(Decide())
    scripted.save(tmp_path / "decide.pt")
    loaded = torch.jit.load(tmp_path / "decide.pt")
    cost, counts = torch.rand(3, 5, 20, requires_grad=True), torch.tensor([20, 7, 1])
    x = loaded(cost, counts)
    assert torch.equal(x, Decide()(cost, counts))
    x.square().sum().backward()
    expected = torch.autograd.grad(Decide()(cost, counts).square().sum(), cost)[0]
    assert torch.equal(cost.grad, expected)


def test_autocast_computes_in_float32():
    cost = torch.rand(3, 5, 20).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = dmm_fast.match_prices(cost @ torch.eye(20), output="average")  # the product is bfloat16 here
    assert x.dtype == torch.float32
    x.square().sum().backward()
    assert cost.grad.abs().sum() > 0


def test_vmap_and_per_sample_gradients():
    cost, lr, counts = torch.rand(6, 4, 9), torch.rand(6) * 9 + 1, torch.randint(0, 10, (6, 1))
    x = torch.func.vmap(lambda c, a, k: dmm_fast.match_prices(c, lr=a, num_proposals=k))(cost, lr, counts)
    torch.testing.assert_close(x, dmm_fast.match_prices(cost, lr=lr, num_proposals=counts[:, 0]))
    x = torch.func.vmap(dmm_fast.match_prices)(cost.reshape(2, 3, 4, 9))  # batches inside
    torch.testing.assert_close(x, dmm_fast.match_prices(cost).reshape(2, 3, 4, 9))

    def loss(c):
        return dmm_fast.match_prices(c, lr=2.0, output="average").square().sum()

    cost = cost.double()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(cost), torch.func.grad(loss)(cost))


# ---- bad input: an error with words ----

layer = dmm_fast.match_prices
COST = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer(torch.rand(4)), r"dmm::match_prices: cost must have shape \[B, N, M\] or \[N, M\], got \[4\]"),
        (lambda: layer(COST.int()), r"cost must be float32, float64, float16 or bfloat16, got Int"),
        (lambda: layer(COST, num_templates=torch.tensor([1, 9])), r"num_templates must be in \[0, 3\], got 9 at 1"),
        (lambda: layer(COST, num_proposals=torch.tensor([1])), r"num_proposals must have shape \[2\], got \[1\]"),
        (lambda: layer(COST, lr=torch.tensor([0.1])), r"lr_tensor must have shape \[\] or \[2\], got \[1\]"),
        (lambda: layer(COST, lr=torch.tensor(0.1, dtype=torch.float64)), r"lr_tensor must be Float, got Double"),
        (lambda: layer(COST, lr=0.0), r"dmm::match_prices: lr must be positive and finite, got 0"),
        (lambda: layer(COST, lr=-2.0), r"lr must be positive and finite, got -2"),
        (lambda: layer(COST, n_grad=0), r"n_grad must be at least 1, got 0"),
        (lambda: layer(COST, n_proj=0), r"n_proj must be at least 1, got 0"),
        (lambda: torch.ops.dmm.match_prices_backward(COST[0], COST, None, None, None, n_grad=1, n_proj=1, lr=1.0, last=True),
         r"dmm::match_prices_backward: grad must have the shape"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_option(backend):
    with pytest.raises(ValueError, match="match_prices: output must be"):
        dmm_fast.match_prices(COST, output="mean", backend=backend)
    with pytest.raises(ValueError, match="match_prices: backend must be"):
        dmm_fast.match_prices(COST, backend="cuda")

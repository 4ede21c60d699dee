"""Every matching layer: one set of sample inputs feeds every check, on every device and backend at hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.layers import DEVICES, LAYERS, Sample, alone, gradients, leaf, strided
from torch import Tensor
from torch.autograd import forward_ad

import dmm_fast
from dmm_fast.ops import reference

on_devices = pytest.mark.parametrize("device", DEVICES)
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)


def pairs(chosen) -> pytest.MarkDecorator:
    """(layer, sample) for the chosen samples of each layer."""
    found = [pytest.param(layer, sample, id=f"{layer.name}-{sample.name}") for layer in LAYERS for sample in chosen(layer)]
    return pytest.mark.parametrize("layer, sample", found)


every_sample = pairs(lambda layer: layer.samples)
few = pairs(lambda layer: layer.few)

# ---- forward ----


@on_devices
@pytest.mark.parametrize(
    "layer, sample, dtype",  # half precision differs in loads and stores only
    [
        pytest.param(layer, sample, dtype, id=f"{layer.name}-{sample.name}-{dtype}")
        for layer in LAYERS
        for dtype in layer.tolerance
        for sample in (layer.samples if dtype.itemsize >= 4 else layer.few)
    ],
)
def test_forward(layer, sample, dtype, device):
    here = sample.to(device, dtype)
    exact = here.to("cpu", torch.float64)
    x = layer.function(*here.inputs, **here.options)
    assert x.dtype == dtype and x.shape == here.cost.shape and x.is_contiguous()
    rtol, atol = layer.tolerance[dtype]
    torch.testing.assert_close(x.double().cpu(), layer.reference(*exact.inputs, **exact.options), rtol=rtol, atol=atol)


@on_devices
@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(layer, dtype, device):
    cost, grad = torch.rand(3, 5, 50, device=device).to(dtype), torch.rand(3, 5, 50, device=device).to(dtype)
    x = layer.function(cost)
    assert x.dtype == dtype and torch.equal(x, layer.function(cost.float()).to(dtype))
    ours = gradients(Sample("", cost, options=layer.soft), layer.function, grad)[0]
    theirs = gradients(Sample("", cost.float(), options=layer.soft), layer.function, grad.float())[0]
    assert torch.equal(ours, theirs.to(dtype))


@on_devices
@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unmatched_cost_learns_from_half_precision_in_float32(layer, dtype, device):
    cost, grad = torch.rand(8, 5, 50, device=device).to(dtype), torch.rand(8, 5, 50, device=device).to(dtype)
    for own in (torch.rand(5, device=device) * 0.1, torch.rand(8, 5, device=device) * 0.1):
        options = dict(layer.soft, lr=torch.tensor(layer.step, device=device), unmatched_cost=own)
        ours = gradients(Sample("", cost, options=options), layer.function, grad)
        theirs = gradients(Sample("", cost.float(), options=options), layer.function, grad.float())
        for mine, other in zip(ours, (theirs[0].to(dtype), *theirs[1:]), strict=True):
            assert torch.equal(mine, other)


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_reference_computes_half_precision_in_float32(layer, dtype):
    cost = torch.rand(5, 50).to(dtype) + 300  # float16 cannot hold the sum
    starts = [torch.rand(5, 50).to(dtype)] if layer.starts else []
    x = layer.function(cost, *starts, backend="reference")
    expected = layer.reference(cost.float(), *(start.float() for start in starts))
    assert x.dtype == dtype and x.isfinite().all() and torch.equal(x, expected.to(dtype))


@on_devices
@few
def test_strides(layer, sample, device):
    here = sample.to(device, torch.float64)
    assert not strided(here.cost).is_contiguous()
    x = layer.function(*map(strided, here.inputs), **here.options)
    assert torch.equal(x, layer.function(*here.inputs, **here.options))
    grad = torch.randn_like(here.cost)
    for a, b in zip(gradients(here, layer.function, grad), gradients(here, layer.function, grad, strided)):
        assert torch.equal(a, b)


@on_devices
@layers
def test_expanded_cost_and_gradient(layer, device):
    cost = torch.rand(1, 4, 9, dtype=torch.float64, device=device).expand(6, 4, 9).requires_grad_()
    x = layer.function(cost)
    assert torch.equal(x, layer.function(cost.detach().clone()))
    x.sum().backward()  # a gradient with zero strides
    other = leaf(cost)
    layer.function(other).backward(torch.ones(6, 4, 9, dtype=torch.float64, device=device))
    assert torch.equal(cost.grad, other.grad)


@on_devices
@layers
@pytest.mark.parametrize("shape", [(0, 5, 50), (3, 0, 50), (3, 5, 0), (0, 50), (5, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(layer, shape, device):
    cost = torch.rand(shape, device=device, requires_grad=True)
    x = layer.function(cost)
    assert x.shape == shape
    x.sum().backward()
    assert cost.grad.shape == shape


@on_devices
@layers
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch", [3, 40])
def test_a_non_finite_problem_is_nan_and_alone(layer, batch, bad, device):
    cost = torch.rand(batch, 4, 20, device=device)
    clean = layer.function(cost)
    spoilt = cost.clone()
    spoilt[1, 2, 3] = bad
    spoilt.requires_grad_()
    x = layer.function(spoilt)
    x.backward(torch.ones_like(cost))
    others = [b for b in range(batch) if b != 1]
    assert x[1].isnan().all() and spoilt.grad[1].isnan().all()
    assert torch.equal(x[others], clean[others]) and spoilt.grad[others].isfinite().all()


@on_devices
@layers
@pytest.mark.parametrize("batch", [5, 50])
def test_repeatable_and_independent_of_place_and_neighbours(layer, batch, device):
    cost = torch.rand(batch, 5, 50, device=device)
    grad = torch.randn_like(cost)
    order = torch.randperm(batch, device=device)

    def run(c, g):
        c = c.clone().requires_grad_()
        x = layer.function(c, **layer.soft)
        return x.detach(), torch.autograd.grad(x, c, g)[0]

    x, dc = run(cost, grad)
    again, moved = run(cost, grad), run(cost[order], grad[order])
    assert torch.equal(x, again[0]) and torch.equal(dc, again[1])
    assert torch.equal(x[order], moved[0]) and torch.equal(dc[order], moved[1])
    neighbours = cost.clone()
    neighbours[1:] = torch.rand_like(neighbours[1:])
    assert torch.equal(run(neighbours, grad)[0][0], x[0])


@layers
def test_threads_do_not_change_the_result(layer):
    cost = torch.rand(300, 5, 50)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = layer.function(cost)
        torch.set_num_threads(2)
        assert torch.equal(alone, layer.function(cost))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(capability):
    """The kernels are chosen once per process, so each choice gets its own; a wish beyond the machine falls back."""
    code = """
import torch
from helpers.layers import LAYERS
torch.manual_seed(0)
for layer in LAYERS:
    for dtype in (torch.float64, torch.float32):
        for shape in ((1, 5, 50), (37, 5, 50), (3, 9, 30), (40, 9, 7)):
            cost = torch.rand(shape, dtype=dtype).requires_grad_()
            x = layer.function(cost, n_grad=8, **layer.soft)
            y = layer.reference(cost, n_grad=8, **layer.soft)
            share = 1 if dtype == torch.float64 else 0.9  # in float32 a mask bit can flip
            assert (x - y).abs().amax((1, 2)).quantile(share) < layer.tolerance[dtype][0], (layer.name, dtype, shape)
            if dtype == torch.float64:
                g = torch.randn_like(x)
                a, b = torch.autograd.grad(x, cost, g)[0], torch.autograd.grad(y, cost, g)[0]
                assert (a - b).abs().max() < 1e-9, (layer.name, shape)
"""
    environment = {"DMM_CPU_CAPABILITY": capability, "PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- backward ----


@on_devices
@every_sample
def test_gradient_against_autograd_of_the_reference(layer, sample, device):
    here = sample.to(device, torch.float64)
    grad = torch.randn(here.cost.shape, dtype=torch.float64, device=device)
    rtol, atol = layer.gradient
    for ours, theirs in zip(gradients(here, layer.function, grad), gradients(here, layer.reference, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@on_devices
@layers
def test_float32_gradient_by_quantile(layer, device):
    """A mask bit can flip in float32, and then a problem's gradient differs: so quantiles (docs/matching.md)."""
    cost = torch.rand(500, 5, 50, dtype=torch.float64, device=device)
    grad = torch.randn_like(cost)
    a = gradients(Sample("", cost.float(), options=layer.soft), layer.function, grad.float())[0].double()
    b = gradients(Sample("", cost, options=layer.soft), layer.function, grad)[0]
    error = (a - b).norm(dim=(1, 2)) / b.norm(dim=(1, 2))
    assert error.median() < layer.quantile[0]
    assert (error > layer.quantile[1]).double().mean() < 0.06


@on_devices
@few
def test_gradcheck(layer, sample, device):
    """In a small problem away from ties, against finite differences."""
    here = sample.to(device, torch.float64)
    options = {k: v for k, v in here.options.items() if k != "lr"} | {"n_grad": 3, "n_proj": 3}
    cost = here.cost[:4, :3, :5].nan_to_num(0.5).contiguous().requires_grad_()
    options = {k: v[:4].clamp(max=3) if k.startswith("num") else v for k, v in options.items() if k != "unmatched_cost"}
    own = alone(here)
    own = {k: v.detach()[..., :3][:4].contiguous().requires_grad_() for k, v in own.items()}
    starts = [(torch.rand_like(cost) * 0.2).detach().requires_grad_()] if layer.starts else []
    lr = torch.tensor(layer.step, dtype=torch.float64, device=device, requires_grad=True)

    def solve(a, *inputs):
        left = {name: inputs[-1] for name in own}
        return layer.function(*inputs[: len(inputs) - len(own)], lr=a, **options, **left)

    assert torch.autograd.gradcheck(solve, (lr, cost, *starts, *own.values()))


@layers
def test_nothing_is_kept_but_the_inputs(layer):
    cost = torch.rand(2, 4, 9, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer.function(cost)
    assert [t.data_ptr() for t in kept] == [cost.data_ptr()]


@layers
@pytest.mark.parametrize("path", ["function", "op"])
def test_double_backward_is_refused_by_name(layer, path):
    cost = torch.rand(2, 4, 9, dtype=torch.float64, requires_grad=True)
    x = getattr(layer, path)(cost)
    (grad,) = torch.autograd.grad(x.square().sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match=f"dmm::{layer.name}_backward: .* differentiable once"):
        grad.sum().backward()


@layers
def test_forward_mode_is_refused(layer):
    """torch would take the derivative for zero."""
    cost, own, expected = torch.rand(2, 4, 9), torch.rand(2, 4), layer.function(COST)

    def scalar(c):
        return layer.function(c, **layer.soft).square().sum()

    def refused():
        return pytest.raises(RuntimeError, match=f"dmm::{layer.name}: has no derivative in forward mode")

    for call in (torch.func.jacfwd(layer.function), torch.func.hessian(scalar), torch.compile(torch.func.jacfwd(scalar))):
        with refused():
            call(cost)
    with refused():
        torch.func.jvp(torch.func.vmap(layer.function), (cost,), (cost,))
    with refused(), torch.autocast("cpu", torch.bfloat16):
        torch.func.jvp(lambda o: layer.function(cost, unmatched_cost=o), (own,), (own,))
    with forward_ad.dual_level():
        with refused():
            layer.function(forward_ad.make_dual(cost, cost))
        assert torch.equal(layer.function(COST), expected)  # no tangent here
        learnt = cost.clone().requires_grad_()
        after = forward_ad.make_dual(torch.ones_like(cost), cost)  # nor into the layer, but through its backward
        with refused():
            torch.autograd.grad((layer.function(learnt) * after).sum(), learnt)
        with torch.autocast("cpu", torch.bfloat16):
            soft = layer.function(learnt)
        with refused():
            torch.autograd.grad((soft * after).sum(), learnt)

    def exact(c):
        return layer.function(c, lr=layer.step, backend="reference", **layer.soft)

    torch.testing.assert_close(torch.func.jacfwd(exact)(cost.double()), torch.func.jacrev(exact)(cost.double()))


# ---- the rest of torch ----


@few
def test_opcheck(layer, sample):
    here = sample.to("cpu", torch.float64)
    args, options = layer.op_arguments(here), layer.op_options(here)
    torch.library.opcheck(layer.op, args, options)
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    options = {name: value.detach() if isinstance(value, Tensor) else value for name, value in options.items()}
    torch.library.opcheck(layer.backward_op, (torch.randn_like(args[0]), *args), options)


@layers
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("own", [{}, dict(unmatched_cost=0.3)], ids=["all", "alone"])
def test_compile_fullgraph(layer, dynamic, own):
    def loss(cost):
        x = layer.function(cost * 2, n_grad=4, **layer.soft, **own)
        if own:
            x = x * layer.function(cost, n_grad=4, unmatched_cost=cost.mean(2), **layer.soft)
        return (x * cost).sum()

    torch.compiler.reset()  # or its limit of compilations counts what other tests compiled
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 5, 50), (4, 6, 30)):
        a = torch.rand(shape).requires_grad_()
        b = leaf(a)
        compiled(a).backward()
        loss(b).backward()
        torch.testing.assert_close(a.grad, b.grad)


class Match(torch.nn.Module):
    def forward(self, cost: Tensor, num_proposals: Tensor) -> Tensor:
        return torch.ops.dmm.match(cost, None, None, num_proposals, n_grad=8)


class Prices(torch.nn.Module):
    def forward(self, cost: Tensor, num_proposals: Tensor) -> Tensor:
        return torch.ops.dmm.match_prices(cost, None, num_proposals, n_grad=8)


class MatchAlone(torch.nn.Module):
    def forward(self, cost: Tensor, num_proposals: Tensor) -> Tensor:
        return torch.ops.dmm.match(cost, None, None, num_proposals, n_grad=8, unmatched_cost=cost.mean(2))


class PricesAlone(torch.nn.Module):
    def forward(self, cost: Tensor, num_proposals: Tensor) -> Tensor:
        return torch.ops.dmm.match_prices(cost, None, num_proposals, n_grad=8, unmatched_cost=cost.mean(2)[0])


MODULES = [Match(), Prices(), MatchAlone(), PricesAlone()]  # a script knows no names
modules = pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)


@modules
def test_export(module, tmp_path):
    cost, counts = torch.rand(3, 5, 20), torch.tensor([20, 7, 1])
    B, M = torch.export.Dim("B"), torch.export.Dim("M")
    program = torch.export.export(module, (cost, counts), dynamic_shapes=({0: B, 2: M}, {0: B}))
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for shape in ((3, 5, 20), (6, 5, 33)):
        cost, counts = torch.rand(shape), torch.randint(0, shape[2], shape[:1])
        assert torch.equal(loaded(cost, counts), module(cost, counts))


@modules
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script(module, tmp_path):
    torch.jit.script(module).save(tmp_path / "layer.pt")
    loaded = torch.jit.load(tmp_path / "layer.pt")
    cost, counts = torch.rand(3, 5, 20, requires_grad=True), torch.tensor([20, 7, 1])
    x = loaded(cost, counts)
    assert torch.equal(x, module(cost, counts))
    x.square().sum().backward()
    assert torch.equal(cost.grad, torch.autograd.grad(module(cost, counts).square().sum(), cost)[0])


@layers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_computes_in_float32(layer, dtype):
    cost = torch.rand(3, 5, 20).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = layer.function(cost @ torch.eye(20, dtype=dtype), **layer.soft)  # the product is bfloat16 here
    assert x.dtype == torch.float32
    x.square().sum().backward()
    assert cost.grad.dtype == dtype and cost.grad.abs().sum() > 0


@layers
def test_vmap_over_the_batch(layer):
    cost, starts = torch.rand(6, 4, 9), [torch.rand(4, 9)] if layer.starts else []
    lr, counts = torch.rand(6) * layer.step + 0.01, torch.randint(0, 10, (6, 1))
    x = torch.func.vmap(lambda c, a, k: layer.function(c, *starts, lr=a, num_proposals=k))(cost, lr, counts)
    wide = [start.expand(6, 4, 9) for start in starts]
    torch.testing.assert_close(x, layer.function(cost, *wide, lr=lr, num_proposals=counts[:, 0]))
    twice = cost.reshape(2, 3, 4, 9)
    expected = layer.function(cost).reshape(2, 3, 4, 9)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(layer.function))(twice), expected)
    torch.testing.assert_close(torch.func.vmap(layer.function, in_dims=1, out_dims=1)(twice), expected)  # batches inside
    last = torch.func.vmap(layer.function, in_dims=3, out_dims=3)(twice.movedim(0, 3))
    torch.testing.assert_close(last.movedim(3, 0), expected)


@layers
def test_vmap_over_empty_batches(layer):
    cost = torch.rand(3, 0, 5, 50, requires_grad=True)
    x = torch.func.vmap(layer.function)(cost)
    assert x.shape == (3, 0, 5, 50)
    x.sum().backward()
    assert cost.grad.shape == cost.shape


@layers
def test_per_sample_gradients(layer):
    def loss(cost):
        return layer.function(cost, lr=layer.step, **layer.soft).square().sum()

    cost = torch.rand(6, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(cost), torch.func.grad(loss)(cost))


@layers
def test_vmap_with_unmatched_cost(layer):
    cost, own, shared = torch.rand(6, 2, 4, 9), torch.rand(6, 2, 4) * 0.4, torch.rand(4) * 0.4
    for given in (own, shared, 0.3):
        in_dims = (0, 0 if given is own else None)

        def solve(c, o):
            return layer.function(c, unmatched_cost=o, **layer.soft)

        flat = given.flatten(0, 1) if given is own else given
        expected = layer.function(cost.flatten(0, 1), unmatched_cost=flat, **layer.soft)
        torch.testing.assert_close(torch.func.vmap(solve, in_dims)(cost, given).flatten(0, 1), expected)
    single = torch.func.vmap(lambda c, o: layer.function(c, unmatched_cost=o), (0, 0))(cost[:, 0], own[:, 0])
    torch.testing.assert_close(single, layer.function(cost[:, 0], unmatched_cost=own[:, 0]))
    swept = torch.func.vmap(lambda o: layer.function(cost[0], unmatched_cost=o))(own)  # one cost, many ways to stay alone
    torch.testing.assert_close(swept[3], layer.function(cost[0], unmatched_cost=own[3]))

    def loss(c, o):
        return layer.function(c, unmatched_cost=o, lr=layer.step, **layer.soft).square().sum()

    each = torch.func.vmap(torch.func.grad(loss, 1))(cost.double(), own.double())
    torch.testing.assert_close(
        each, torch.func.grad(loss, 1)(cost.double().flatten(0, 1), own.double().flatten(0, 1)).view_as(own)
    )


@layers
def test_autocast_with_unmatched_cost(layer):
    cost, own = torch.rand(3, 5, 20).bfloat16(), torch.rand(3, 5).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = layer.function(cost, unmatched_cost=own, **layer.soft)
        assert layer.function(cost, unmatched_cost=0.3).dtype == torch.float32
    x.square().sum().backward()
    assert x.dtype == torch.float32 and own.grad.dtype == torch.bfloat16 and own.grad.abs().sum() > 0


# ---- templates that may stay alone ----


@on_devices
@layers
def test_unmatched_cost_decides_who_stays_alone(layer, device):
    """High: nobody; low: all; between: who costs more than that."""
    cost = torch.rand(20, 4, 9, dtype=torch.float64, device=device)
    options = dict(layer.soft, n_grad=400, n_proj=50) if layer.starts else dict(n_grad=80)
    never = layer.function(cost, **options)
    torch.testing.assert_close(layer.function(cost, unmatched_cost=1e3, **options), never, rtol=1e-5, atol=1e-5)
    assert layer.function(cost, unmatched_cost=-1.0, **options).eq(0).all()
    x = layer.function(cost, unmatched_cost=0.1, **options)
    best = dmm_fast.linear_assignment(cost, unmatched_cost=0.1)
    assert (best < 0).any() and (best >= 0).any()
    assert (dmm_fast.assign(x, unmatched=True) == best).all(1).double().mean() > (0.5 if layer.starts else 0.9)
    assert dmm_fast.feasibility(x, unmatched=True)["rows"].median() < 0.02


@layers
def test_only_unmatched_cost_learns(layer):
    cost, own = torch.rand(3, 5, 20), (torch.rand(3, 5) * 0.3).requires_grad_()
    x = layer.function(cost, unmatched_cost=own, **layer.soft)
    x.sum().backward()
    assert own.grad.sum() > 0 and cost.grad is None
    shared = own.detach()[0].requires_grad_()
    layer.function(cost, unmatched_cost=shared, **layer.soft).sum().backward()
    wide = shared.detach().expand(3, 5).clone().requires_grad_()
    layer.function(cost, unmatched_cost=wide, **layer.soft).sum().backward()
    torch.testing.assert_close(shared.grad, wide.grad.sum(0))


@on_devices
@layers
def test_a_problem_with_unmatched_cost_is_poisoned_alone(layer, device):
    cost, own = torch.rand(20, 4, 9, device=device), torch.rand(20, 4, device=device)
    clean = layer.function(cost, unmatched_cost=own)
    cost[3, 1, 2] = torch.nan
    own.requires_grad_()
    x = layer.function(cost, unmatched_cost=own)
    x.sum().backward()
    others = [b for b in range(20) if b != 3]
    assert x[3].isnan().all() and own.grad[3].isnan().all()
    assert torch.equal(x[others], clean[others]) and own.grad[others].isfinite().all()


@on_devices
@layers
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(3, 5, 12), (5, 12)], ids=str)
def test_one_unmatched_cost_for_all_templates(layer, shape, backend, device):
    """In a tensor [] it is as in [N], and its gradient is the sum."""
    cost, grad = (torch.rand(shape, dtype=torch.float64, device=device) for _ in range(2))
    one = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64, device=device))
    each = leaf(one.detach().expand(5))
    results = [layer.function(cost, unmatched_cost=own, backend=backend, **layer.soft) for own in (one, each)]
    assert torch.equal(*results)
    for x in results:
        x.backward(grad)
    torch.testing.assert_close(one.grad, each.grad.sum())
    assert one.grad != 0 and torch.equal(results[0], layer.function(cost, unmatched_cost=0.3, backend=backend, **layer.soft))


@layers
def test_one_unmatched_cost_in_a_compiled_graph_and_in_vmap(layer):
    costs, one = torch.rand(4, 2, 3, 9), torch.tensor(0.3)
    expected = layer.function(costs[0], unmatched_cost=0.3)
    compiled = torch.compile(lambda c, own: layer.function(c, unmatched_cost=own), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(costs[0], leaf(one)), expected)
    for own, dim in ((one, None), (one.expand(4), 0)):
        x = torch.func.vmap(lambda c, o: layer.function(c, unmatched_cost=o), (0, dim))(costs, own)
        torch.testing.assert_close(x[0], expected)


# ---- bad input: an error with a message, or the documented result ----

COST = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))


@layers
@pytest.mark.parametrize(
    "cost, options, message",
    [
        (torch.rand(4), {}, r"cost must have shape \[B, N, M\] or \[N, M\], got \[4\]"),
        (torch.rand(1, 2, 3, 4), {}, r"cost must have shape"),
        (COST.int(), {}, r"cost must be float32, float64, float16 or bfloat16, got Int"),
        (COST, dict(num_templates=torch.tensor([1, 9])), r"num_templates must be in \[0, 3\], got 9 at 1"),
        (COST, dict(num_proposals=torch.tensor([5, 1])), r"num_proposals must be in \[0, 4\], got 5 at 0"),
        (COST, dict(num_proposals=torch.tensor([-1, 1])), r".*got -1 at 0"),
        (COST, dict(num_proposals=torch.tensor([2**62, 1])), r"num_proposals must be in"),
        (COST, dict(num_proposals=torch.tensor([1])), r"num_proposals must have shape \[2\], got \[1\]"),
        (COST, dict(num_proposals=torch.tensor([1, 1], dtype=torch.int32)), r"num_proposals must be Long, got Int"),
        (COST, dict(lr=torch.tensor([0.1])), r"lr_tensor must have shape \[\] or \[2\], got \[1\]"),
        (COST, dict(lr=torch.tensor(0.1, dtype=torch.float64)), r"lr_tensor must be Float, got Double"),
        (COST, dict(lr=-0.1), r"lr must be positive and finite, got -0.1"),
        (COST, dict(lr=torch.nan), r"lr must be positive and finite, got nan"),
        (COST, dict(lr=torch.inf), r"lr must be positive and finite, got inf"),
        (COST, dict(lr=0.0), r"lr must be positive and finite, got 0"),
        (COST, dict(unmatched_cost=torch.rand(4)), r"unmatched_cost must have shape \[3\] or \[2, 3\], got \[4\]"),
        (COST, dict(unmatched_cost=torch.rand(2, 4)), r"unmatched_cost must have shape \[3\] or \[2, 3\], got \[2, 4\]"),
        (COST[0], dict(unmatched_cost=torch.rand(1, 3)), r"unmatched_cost must have shape \[3\] or \[1, 3\], got \[1, 3\]"),
        (COST, dict(unmatched_cost=torch.rand(3).double()), r"unmatched_cost must be Float, got Double"),
        (
            COST, dict(unmatched_cost=torch.tensor([[0, 1, 2], [3, torch.inf, 5]])),
            r"unmatched_cost must be finite, got inf for template 1 of problem 1",
        ),
        (COST, dict(n_grad=0), r"n_grad must be at least 1, got 0"),
        (COST, dict(n_proj=-3), r"n_proj must be at least 1, got -3"),
    ],
)  # fmt: skip
def test_bad_input(layer, cost, options, message):
    with pytest.raises(RuntimeError, match=f"dmm::{layer.name}: {message}"):
        layer.function(cost, **options)


@layers
def test_the_backward_checks_its_gradient(layer):
    args, options = layer.op_arguments(Sample("", COST)), layer.op_options(layer.samples[0])
    with pytest.raises(RuntimeError, match=f"dmm::{layer.name}_backward: grad must have the shape"):
        layer.backward_op(COST[0], *args, **options)


@layers
def test_the_reference_checks_the_step_size(layer):
    for lr in (0.0, -0.1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="lr must be positive and finite"):
            layer.function(COST, lr=lr, backend="reference")


@layers
def test_the_reference_checks_counts(layer):
    for counts, message in (
        ([1, 9], r"must be in \[0, 3\], got 9 at 1"),
        ([-1, 1], "got -1 at 0"),
        ([1], r"must have shape \[2\]"),
    ):
        with pytest.raises(RuntimeError, match=f"{layer.name}: num_templates .*{message}"):
            layer.function(COST, num_templates=torch.tensor(counts), backend="reference")


@layers
def test_a_number_as_unmatched_cost_is_finite(layer):
    for number in (torch.inf, torch.nan):
        for backend in ("auto", "reference"):
            with pytest.raises(ValueError, match=f"{layer.name}: unmatched_cost must be finite, got {number:g}"):
                layer.function(COST, unmatched_cost=number, backend=backend)
    with pytest.raises(ValueError, match=rf"{layer.name}: unmatched_cost must have shape \[3\] or \[2, 3\], got \[2\]"):
        layer.function(COST, unmatched_cost=torch.rand(2), backend="reference")
    with pytest.raises(RuntimeError, match=r"cost must have shape \[B, N, M\] or \[N, M\], got \[4\]"):
        layer.function(torch.rand(4), unmatched_cost=1.0)


@layers
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_counts_are_tensors(layer, backend):
    with pytest.raises(TypeError, match=rf"{layer.name}: num_templates takes an int64 tensor \[B\], got list"):
        layer.function(COST, num_templates=[2, 2], backend=backend)
    with pytest.raises(TypeError, match=rf"{layer.name}: num_proposals takes an int64 tensor \[B\], got int"):
        layer.function(COST[0], num_proposals=2, backend=backend)


@layers
@pytest.mark.parametrize(
    "option", [dict(output="mean"), dict(backend="cuda"), dict(output="mean", backend="reference")], ids=str
)
def test_bad_option(layer, option):
    with pytest.raises(ValueError, match=f"{layer.name}: .*must be"):
        layer.function(COST, **option)


@layers
def test_reference_backend_is_the_reference(layer):
    for output in reference.OUTPUT:
        options = dict(n_grad=5, output=output)
        assert torch.equal(layer.function(COST, backend="reference", **options), layer.reference(COST, **options))


@layers
@pytest.mark.gpu
def test_counts_out_of_range_are_nan_on_a_gpu(layer):
    x = layer.function(COST.cuda(), num_proposals=torch.tensor([9, 4]).cuda())
    assert x[0].isnan().all() and torch.equal(x[1].cpu().isnan(), torch.zeros(3, 4, dtype=torch.bool))


@layers
def test_triton_says_what_it_takes(layer, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton' takes CUDA tensors"):
        layer.function(COST, backend="triton")

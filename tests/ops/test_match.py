"""dmm_fast.match: one set of sample inputs feeds every check, on every device and backend at hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import dmm_fast
from dmm_fast.ops import reference

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# (rtol, atol) of X against the float64 reference. Float32 sums of 50 terms over 200 rounds; half precision rounds its input.
TOLERANCE = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (1e-4, 2e-5),
    torch.bfloat16: (2e-2, 1e-2),
    torch.float16: (2e-3, 1e-3),
}


@dataclass
class Sample:
    """One call: ``match(cost, init, **options)``."""

    name: str
    cost: Tensor
    init: Tensor | None = None
    options: dict = field(default_factory=dict)

    def to(self, device, dtype) -> Sample:
        def move(value):
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return value.to(device)
            return value.to(device, torch.float64 if dtype == torch.float64 else torch.float32)

        options = {key: move(value) for key, value in self.options.items()}
        return Sample(
            self.name, self.cost.to(device, dtype), None if self.init is None else self.init.to(device, dtype), options
        )


def sample_inputs() -> list[Sample]:
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
    variants = [("reset", "average"), ("carry", "average"), ("reset", "last"), ("carry", "last")]
    return [
        Sample(f"{s.name}-{dykstra}-{output}", s.cost, s.init, {**s.options, "dykstra": dykstra, "output": output})
        for s in samples
        for dykstra, output in variants
    ]


SAMPLES = sample_inputs()
FEW = [s for s in SAMPLES if s.name.split("-")[0] in ("batch", "ragged", "ragged lanes", "init", "lr tensor", "lr per problem")]
by_name = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)
few = pytest.mark.parametrize("sample", FEW, ids=lambda s: s.name)
on_devices = pytest.mark.parametrize("device", DEVICES)


def strided(tensor: Tensor) -> Tensor:
    """The same values behind strides no kernel would choose."""
    return torch.stack([tensor.mT, tensor.mT], -1)[..., 0].mT


def leaf(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach().clone().requires_grad_() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor


def gradients(sample: Sample, match, grad: Tensor, *, make_strided: bool = False) -> list[Tensor]:
    cost, init, lr = leaf(sample.cost), leaf(sample.init), leaf(sample.options.get("lr"))
    options = {**sample.options, **({"lr": lr} if isinstance(lr, Tensor) else {})}
    leaves = [t for t in (cost, init, lr) if isinstance(t, Tensor)]
    wrap = strided if make_strided else (lambda t: t)
    x = match(wrap(cost), None if init is None else wrap(init), **options)
    return torch.autograd.grad(x, leaves, wrap(grad), allow_unused=True, materialize_grads=True)


# ---- forward ----


@on_devices
@pytest.mark.parametrize(
    "sample, dtype",  # half precision differs in loads and stores only
    [(s, dtype) for dtype in TOLERANCE for s in (SAMPLES if dtype.itemsize >= 4 else FEW)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_forward(sample, dtype, device):
    here = sample.to(device, dtype)
    exact = here.to("cpu", torch.float64)
    expected = reference.match(exact.cost, exact.init, **exact.options)
    x = dmm_fast.match(here.cost, here.init, **here.options)
    assert x.dtype == dtype and x.shape == here.cost.shape and x.is_contiguous()
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(x.double().cpu(), expected, rtol=rtol, atol=atol)


@on_devices
@few
def test_strides(sample, device):
    here = sample.to(device, torch.float64)
    init = None if here.init is None else strided(here.init)
    assert not strided(here.cost).is_contiguous()
    x = dmm_fast.match(strided(here.cost), init, **here.options)
    assert torch.equal(x, dmm_fast.match(here.cost, here.init, **here.options))
    grad = torch.randn_like(here.cost)
    for a, b in zip(gradients(here, dmm_fast.match, grad), gradients(here, dmm_fast.match, grad, make_strided=True)):
        assert torch.equal(a, b)


@on_devices
def test_expanded_cost_and_gradient(device):
    cost = torch.rand(1, 4, 9, dtype=torch.float64, device=device).expand(6, 4, 9).requires_grad_()
    x = dmm_fast.match(cost)
    assert torch.equal(x, dmm_fast.match(cost.detach().clone()))
    x.sum().backward()  # a gradient with zero strides
    other = cost.detach().clone().requires_grad_()
    dmm_fast.match(other).backward(torch.ones(6, 4, 9, dtype=torch.float64, device=device))
    assert torch.equal(cost.grad, other.grad)


@on_devices
@pytest.mark.parametrize("shape", [(0, 5, 50), (3, 0, 50), (3, 5, 0), (0, 50), (5, 0), (0, 0, 0)], ids=str)
def test_zero_sizes(shape, device):
    cost = torch.rand(shape, device=device, requires_grad=True)
    x = dmm_fast.match(cost)
    assert x.shape == shape
    x.sum().backward()
    assert cost.grad.shape == shape


@on_devices
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("batch", [3, 40])
def test_a_non_finite_problem_is_nan_and_alone(batch, bad, device):
    torch.manual_seed(0)
    cost = torch.rand(batch, 4, 20, device=device)
    clean, clean_grad = dmm_fast.match(cost), torch.ones_like(cost)
    spoilt = cost.clone()
    spoilt[1, 2, 3] = bad
    spoilt.requires_grad_()
    x = dmm_fast.match(spoilt)
    x.backward(clean_grad)
    others = [b for b in range(batch) if b != 1]
    assert x[1].isnan().all() and spoilt.grad[1].isnan().all()
    assert torch.equal(x[others], clean[others]) and spoilt.grad[others].isfinite().all()


@on_devices
@pytest.mark.parametrize("batch", [5, 50])
def test_repeatable_and_independent_of_place_and_neighbours(batch, device):
    torch.manual_seed(0)
    cost = torch.rand(batch, 5, 50, device=device)
    grad = torch.randn_like(cost)
    order = torch.randperm(batch, device=device)

    def run(c, g):
        c = c.clone().requires_grad_()
        x = dmm_fast.match(c)
        return x.detach(), torch.autograd.grad(x, c, g)[0]

    x, dc = run(cost, grad)
    again = run(cost, grad)
    moved = run(cost[order], grad[order])
    assert torch.equal(x, again[0]) and torch.equal(dc, again[1])
    assert torch.equal(x[order], moved[0]) and torch.equal(dc[order], moved[1])
    neighbours = cost.clone()
    neighbours[1:] = torch.rand_like(neighbours[1:])
    assert torch.equal(run(neighbours, grad)[0][0], x[0])


def test_threads_do_not_change_the_result():
    cost = torch.rand(300, 5, 50)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = dmm_fast.match(cost)
        torch.set_num_threads(2)
        assert torch.equal(alone, dmm_fast.match(cost))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(capability):
    """The kernels are chosen once per process, so each choice gets its own; a wish beyond the machine falls back."""
    code = """
import torch, dmm_fast
from dmm_fast import reference
torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
    for shape in ((1, 5, 50), (37, 5, 50), (3, 9, 30), (40, 9, 7)):
        cost = torch.rand(shape, dtype=dtype).requires_grad_()
        x = dmm_fast.match(cost, n_grad=6)
        y = reference.match(cost, n_grad=6)
        assert (x - y).abs().max() < tolerance, (dtype, shape)
        if dtype == torch.float64:
            g = torch.randn_like(x)
            a, b = torch.autograd.grad(x, cost, g)[0], torch.autograd.grad(y, cost, g)[0]
            assert (a - b).abs().max() < 1e-9, shape
"""
    environment = {"DMM_CPU_CAPABILITY": capability}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- backward ----


@on_devices
@by_name
def test_gradient_against_autograd_of_the_reference(sample, device):
    here = sample.to(device, torch.float64)
    torch.manual_seed(1)
    grad = torch.randn(here.cost.shape, dtype=torch.float64, device=device)
    for ours, theirs in zip(gradients(here, dmm_fast.match, grad), gradients(here, reference.match, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@on_devices
def test_float32_gradient_by_quantile(device):
    """A mask bit can flip in float32, and then a problem's gradient differs: so quantiles (docs/matching.md)."""
    torch.manual_seed(0)
    cost = torch.rand(500, 5, 50, dtype=torch.float64, device=device)
    grad = torch.randn_like(cost)
    a = gradients(Sample("", cost.float()), dmm_fast.match, grad.float())[0].double()
    b = gradients(Sample("", cost), dmm_fast.match, grad)[0]
    error = (a - b).norm(dim=(1, 2)) / b.norm(dim=(1, 2))
    assert error.median() < 1e-5
    assert (error > 1e-3).double().mean() < 0.06


@on_devices
@few
def test_gradcheck(sample, device):
    """In a small problem away from ties, against finite differences."""
    here = sample.to(device, torch.float64)
    options = {k: v for k, v in here.options.items() if k != "lr"} | {"n_grad": 3, "n_proj": 3}
    cost = here.cost[:4, :3, :5].nan_to_num(0.5).contiguous().requires_grad_()
    options = {k: v[:4].clamp(max=3) if k.startswith("num") else v for k, v in options.items()}
    init = (torch.rand_like(cost) * 0.2).detach().requires_grad_()
    lr = torch.tensor(0.13, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, i, a: dmm_fast.match(c, i, lr=a, **options), (cost, init, lr))


def test_nothing_is_kept_but_the_inputs():
    cost = torch.rand(2, 4, 9, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dmm_fast.match(cost)
    assert [t.data_ptr() for t in kept] == [cost.data_ptr()]


@pytest.mark.parametrize("path", ["layer", "op"])
def test_double_backward_is_refused_by_name(path):
    cost = torch.rand(2, 4, 9, dtype=torch.float64, requires_grad=True)
    x = dmm_fast.match(cost) if path == "layer" else torch.ops.dmm.match(cost)
    (grad,) = torch.autograd.grad(x.square().sum(), cost, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_gradient_only_where_asked():
    cost, init = torch.rand(3, 4), torch.rand(3, 4, requires_grad=True)
    dmm_fast.match(cost, init).sum().backward()
    assert init.grad.abs().sum() > 0 and cost.grad is None
    assert not dmm_fast.match(cost).requires_grad
    with torch.no_grad():
        assert not dmm_fast.match(cost, init).requires_grad


# ---- the rest of torch ----


@few
def test_opcheck(sample):
    here = sample.to("cpu", torch.float64)
    lr = here.options.get("lr")
    args = (
        leaf(here.cost.nan_to_num(0.5)), leaf(here.init), here.options.get("num_templates"), here.options.get("num_proposals"),
        lr if isinstance(lr, Tensor) else None,
    )  # fmt: skip
    options = dict(n_grad=4, n_proj=3, lr=0.1, carry=here.options["dykstra"] == "carry", last=here.options["output"] == "last")
    torch.library.opcheck(torch.ops.dmm.match.default, args, options)
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    torch.library.opcheck(torch.ops.dmm.match_backward.default, (torch.randn_like(args[0]), *args), options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def loss(cost):
        return (dmm_fast.match(cost * 2, n_grad=4) * cost).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 5, 50), (4, 6, 30)):
        a, b = torch.rand(shape).requires_grad_(), None
        b = a.detach().clone().requires_grad_()
        compiled(a).backward()
        loss(b).backward()
        torch.testing.assert_close(a.grad, b.grad)


class Layer(torch.nn.Module):
    def forward(self, cost: Tensor, num_proposals: Tensor) -> Tensor:
        return torch.ops.dmm.match(cost, None, None, num_proposals, n_grad=8)


def test_export(tmp_path):
    cost, counts = torch.rand(3, 5, 20), torch.tensor([20, 7, 1])
    B, M = torch.export.Dim("B"), torch.export.Dim("M")
    program = torch.export.export(Layer(), (cost, counts), dynamic_shapes=({0: B, 2: M}, {0: B}))
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for shape in ((3, 5, 20), (6, 5, 33)):
        cost, counts = torch.rand(shape), torch.randint(0, shape[2], shape[:1])
        assert torch.equal(loaded(cost, counts), Layer()(cost, counts))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script(tmp_path):
    scripted = torch.jit.script(Layer())
    scripted.save(tmp_path / "layer.pt")
    loaded = torch.jit.load(tmp_path / "layer.pt")
    cost, counts = torch.rand(3, 5, 20, requires_grad=True), torch.tensor([20, 7, 1])
    x = loaded(cost, counts)
    assert torch.equal(x, Layer()(cost, counts))
    x.square().sum().backward()
    expected = torch.autograd.grad(Layer()(cost, counts).square().sum(), cost)[0]
    assert torch.equal(cost.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_computes_in_float32(dtype):
    cost = torch.rand(3, 5, 20).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = dmm_fast.match(cost @ torch.eye(20, dtype=dtype))  # the product is bfloat16 here
    assert x.dtype == torch.float32
    x.square().sum().backward()
    assert cost.grad.dtype == dtype and cost.grad.abs().sum() > 0


def test_vmap_over_the_batch():
    cost, init = torch.rand(6, 4, 9), torch.rand(4, 9)
    lr, counts = torch.rand(6) * 0.2, torch.randint(0, 10, (6, 1))
    x = torch.func.vmap(lambda c, a, k: dmm_fast.match(c, init, lr=a, num_proposals=k))(cost, lr, counts)
    y = dmm_fast.match(cost, init.expand(6, 4, 9), lr=lr, num_proposals=counts[:, 0])
    torch.testing.assert_close(x, y)
    twice = cost.reshape(2, 3, 4, 9)
    expected = dmm_fast.match(cost).reshape(2, 3, 4, 9)
    torch.testing.assert_close(torch.func.vmap(torch.func.vmap(dmm_fast.match))(twice), expected)
    torch.testing.assert_close(torch.func.vmap(dmm_fast.match, in_dims=1, out_dims=1)(twice), expected)  # batches inside
    last = torch.func.vmap(dmm_fast.match, in_dims=3, out_dims=3)(twice.movedim(0, 3))
    torch.testing.assert_close(last.movedim(3, 0), expected)


def test_per_sample_gradients():
    cost = torch.rand(6, 4, 9, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(lambda c: dmm_fast.match(c).square().sum()))(cost)
    expected = torch.func.grad(lambda c: dmm_fast.match(c).square().sum())(cost)
    torch.testing.assert_close(per_sample, expected)


# ---- bad input: an error with words, or the documented result ----

COST = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: dmm_fast.match(torch.rand(4)), r"dmm::match: cost must have shape \[B, N, M\] or \[N, M\], got \[4\]"),
        (lambda: dmm_fast.match(torch.rand(1, 2, 3, 4)), r"cost must have shape"),
        (lambda: dmm_fast.match(COST.int()), r"cost must be float32, float64, float16 or bfloat16, got Int"),
        (lambda: dmm_fast.match(COST, COST.double()), r"init must be Float, got Double"),
        (lambda: dmm_fast.match(COST, COST[0]), r"init must have the shape of cost \[2, 3, 4\], got \[3, 4\]"),
        (lambda: dmm_fast.match(COST, num_templates=torch.tensor([1, 9])), r"num_templates must be in \[0, 3\], got 9 at 1"),
        (lambda: dmm_fast.match(COST, num_proposals=torch.tensor([5, 1])), r"num_proposals must be in \[0, 4\], got 5 at 0"),
        (lambda: dmm_fast.match(COST, num_proposals=torch.tensor([-1, 1])), r"got -1 at 0"),
        (lambda: dmm_fast.match(COST, num_proposals=torch.tensor([2**62, 1])), r"num_proposals must be in"),
        (lambda: dmm_fast.match(COST, num_proposals=torch.tensor([1])), r"num_proposals must have shape \[2\], got \[1\]"),
        (lambda: dmm_fast.match(COST, num_proposals=torch.tensor([1, 1], dtype=torch.int32)), r"must be Long, got Int"),
        (lambda: dmm_fast.match(COST, lr=torch.tensor([0.1])), r"lr_tensor must have shape \[\] or \[2\], got \[1\]"),
        (lambda: dmm_fast.match(COST, lr=torch.tensor(0.1, dtype=torch.float64)), r"lr_tensor must be Float, got Double"),
        (lambda: dmm_fast.match(COST, lr=-0.1), r"dmm::match: lr must be positive and finite, got -0.1"),
        (lambda: dmm_fast.match(COST, lr=torch.nan), r"lr must be positive and finite, got nan"),
        (lambda: dmm_fast.match(COST, lr=torch.inf), r"lr must be positive and finite, got inf"),
        (lambda: dmm_fast.match(COST, lr=0.0), r"lr must be positive and finite, got 0"),
        (lambda: dmm_fast.match(COST, n_grad=0), r"n_grad must be at least 1, got 0"),
        (lambda: dmm_fast.match(COST, n_proj=-3), r"n_proj must be at least 1, got -3"),
        (lambda: torch.ops.dmm.match_backward(COST[0], COST, None, None, None, None, n_grad=1, n_proj=1, lr=0.1, carry=False,
                                              last=False), r"dmm::match_backward: grad must have the shape"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize("option", [dict(dykstra="nope"), dict(output="mean"), dict(backend="cuda"), dict(dykstra="released")])
def test_bad_option(option):
    with pytest.raises(ValueError, match="match: .* must be"):
        dmm_fast.match(COST, **option)


@pytest.mark.parametrize("name", ["match", "match_prices", "greedy", "hungarian", "sinkhorn", "assign", "mask_confident", "feasibility"])
def test_a_list_is_refused(name):
    with pytest.raises(TypeError, match=rf"{name}: takes a tensor \[N, M\] or \[B, N, M\], got list"):
        getattr(dmm_fast, name)([[0.1, 0.2], [0.3, 0.4]])


@pytest.mark.parametrize("name", ["match", "match_prices"])
def test_the_reference_checks_the_step_size(name):
    for lr in (0.0, -0.1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="lr must be positive and finite"):
            getattr(dmm_fast, name)(COST, lr=lr, backend="reference")


@pytest.mark.parametrize("name", ["greedy", "hungarian", "sinkhorn", "assign"])
def test_peers_check_the_shape(name):
    with pytest.raises(ValueError, match=rf"{name}: must have shape \[B, N, M\] or \[N, M\], got \[4\]"):
        getattr(dmm_fast, name)(torch.rand(4))


@pytest.mark.gpu
def test_devices_must_agree():
    with pytest.raises(RuntimeError, match="init must be on the device of cost"):
        dmm_fast.match(COST.cuda(), COST)


@pytest.mark.gpu
def test_counts_out_of_range_are_nan_on_a_gpu():
    x = dmm_fast.match(COST.cuda(), num_proposals=torch.tensor([5, 4], device="cuda"))
    assert x[0].isnan().all() and torch.equal(x[1].cpu().isnan(), torch.zeros(3, 4, dtype=torch.bool))


def test_reference_backend_is_the_reference():
    for dykstra, output in itertools.product(reference.DYKSTRA, reference.OUTPUT):
        options = dict(n_grad=5, dykstra=dykstra, output=output)
        assert torch.equal(dmm_fast.match(COST, backend="reference", **options), reference.match(COST, **options))


# ---- around the layer ----


def test_assign_and_feasibility_know_what_is_there():
    counts = dict(num_templates=torch.tensor([2, 3, 3]), num_proposals=torch.tensor([4, 1, 4]))
    cost = torch.rand(3, 3, 4)
    cost[2, 0, 0] = torch.nan
    x = dmm_fast.match(cost, **counts, n_grad=400, n_proj=50)
    choice = dmm_fast.assign(x, **counts)
    assert choice[0, 2] == -1 and len(set(choice[0, :2].tolist())) == 2  # no third template; one proposal each
    assert sorted(choice[1].tolist()) == [-1, -1, 0]  # one proposal for three
    assert choice[2].eq(-1).all()  # not finite, and alone in that
    residual = dmm_fast.feasibility(x, num_templates=counts["num_templates"])
    assert residual["rows"][0] < 0.05 and residual["columns"].shape == (3,) and residual["sign"][0] == 0
    assert dmm_fast.feasibility(torch.zeros(0, 4))["rows"] == 0


def test_peers_solve_what_they_should():
    from itertools import permutations

    torch.manual_seed(0)
    cost = torch.rand(20, 3, 5, dtype=torch.float64)
    best = torch.stack([cost[:, range(3), list(p)].sum(1) for p in permutations(range(5), 3)]).amin(0)  # [B]
    for solve, optimal in ((dmm_fast.hungarian, True), (dmm_fast.greedy, False)):
        x = solve(cost)
        assert x.sum(2).eq(1).all() and x.sum(1).le(1).all()
        gap = (x * cost).sum((1, 2)) - best
        assert gap.min() > -1e-12 and (gap.max() < 1e-12) == optimal
    soft = dmm_fast.sinkhorn(cost)
    assert (soft.sum(1) <= 1 + 1e-9).all() and ((soft * cost).sum((1, 2)) - best).min() > -0.05
    kept = dmm_fast.mask_confident(soft)
    assert torch.equal((kept > 0).sum(2), torch.ones(20, 3, dtype=torch.int64)) and torch.equal(kept.amax(2), soft.amax(2))


def test_peers_take_ragged_and_broken_batches():
    """Against one problem at a time; padding holds NaN, one problem does too."""
    from scipy.optimize import linear_sum_assignment

    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(40, 6, 7, generator=generator)
    n, m = torch.randint(0, 7, (40,), generator=generator), torch.randint(0, 8, (40,), generator=generator)
    n[3], m[3] = 4, 5
    for b in range(40):
        cost[b, n[b] :], cost[b, :, m[b] :] = torch.nan, torch.inf
    cost[3, 1, 2] = torch.nan
    optimal, near = (solve(cost, num_templates=n, num_proposals=m) for solve in (dmm_fast.hungarian, dmm_fast.greedy))
    choice = dmm_fast.assign(1 - cost, num_templates=n, num_proposals=m)
    for b in range(40):
        inner = cost[b, : n[b], : m[b]]
        for x in (optimal[b], near[b]):
            assert x[n[b] :].eq(0).all() and x[:, m[b] :].eq(0).all()
        if b == 3:
            assert optimal[b, :4, :5].isnan().all() and near[b, :4, :5].isnan().all() and choice[b].eq(-1).all()
            continue
        row, column = linear_sum_assignment(inner.numpy())
        assert optimal[b].nonzero().tolist() == [[i, j] for i, j in zip(row, column)]
        assert choice[b, row].tolist() == column.tolist() and (choice[b] >= 0).sum() == len(row)
        free, pairs = inner.clone(), set()
        for _ in range(min(inner.shape)):
            i, j = divmod(int(free.argmin()), inner.shape[1])
            free[i], free[:, j] = torch.inf, torch.inf
            pairs.add((i, j))
        assert {tuple(pair) for pair in near[b].nonzero().tolist()} == pairs


def test_triton_says_what_it_takes(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton' takes CUDA tensors"):
        dmm_fast.match(COST, backend="triton")

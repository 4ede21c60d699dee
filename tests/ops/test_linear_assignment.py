"""dmm_fast.linear_assignment: against scipy, by its own prices, and what torch asks of an op."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.assignments import check, samples
from helpers.layers import DEVICES, strided
from torch import Tensor

import dmm_fast
from dmm_fast.ops import library, reference

SAMPLES = samples()
on_devices = pytest.mark.parametrize("device", DEVICES)
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
few = pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.name in ("one problem", "5 x 50", "50 x 5", "ragged", "alone, per problem")],
    ids=lambda sample: sample.name,
)  # fmt: skip


@on_devices
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_sample
def test_optimal(sample, dtype, device):
    here = sample.to(device, dtype)
    choice, a, b = dmm_fast.linear_assignment(here.cost, **here.options, return_duals=True)
    assert choice.dtype == torch.int64 and choice.shape == a.shape == here.cost.shape[:-1] and choice.is_contiguous()
    assert a.dtype == b.dtype == dtype and b.shape == (*here.cost.shape[:-2], here.cost.shape[-1])
    assert choice.device == a.device == b.device == here.cost.device
    check(here, choice, a, b)
    assert torch.equal(choice, dmm_fast.linear_assignment(here.cost, **here.options))


@on_devices
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    cost, own = torch.rand(9, 6, 20, device=device).to(dtype), torch.rand(6, device=device)
    for options in ({}, {"unmatched_cost": own}):
        half = dmm_fast.linear_assignment(cost, **options, return_duals=True)
        full = dmm_fast.linear_assignment(cost.float(), **options, return_duals=True)
        assert all(torch.equal(a, b) for a, b in zip(half, full)) and half[1].dtype == torch.float32


@on_devices
def test_float32_sums_do_not_lose_the_optimum(device):
    """Float32 sums of 4096 and more cannot tell these apart."""
    cost = torch.full((2, 2), 4096.0, device=device)
    cost[0, 1] += 2**-11
    cost[1, 0] -= 2**-10
    assert dmm_fast.linear_assignment(cost).tolist() == [1, 0]


@on_devices
def test_a_tie_between_matched_and_alone_is_a_match(device):
    """Also where that takes another template's proposal, or leaves the costs as they are with one match more."""
    cost = torch.tensor([[0.0, 3.0], [1.0, 9.0]], device=device)
    assert dmm_fast.linear_assignment(cost, unmatched_cost=torch.tensor([2.0, 1.0], device=device)).tolist() == [0, -1]
    assert dmm_fast.linear_assignment(cost, unmatched_cost=torch.tensor([3.0, 4.0], device=device)).tolist() == [1, 0]
    assert dmm_fast.linear_assignment(cost, unmatched_cost=torch.tensor([2.9, 4.0], device=device)).tolist() == [-1, 0]
    assert dmm_fast.linear_assignment(torch.ones(3, 7, device=device), unmatched_cost=1).ge(0).all()
    assert dmm_fast.linear_assignment(torch.ones(7, 3, device=device), unmatched_cost=1).ge(0).sum() == 3


@on_devices
@every_sample
def test_repeats_and_does_not_depend_on_the_batch(sample, device):
    if sample.cost.dim() == 2:
        return
    here = sample.to(device, torch.float32)
    choice = dmm_fast.linear_assignment(here.cost, **here.options)
    assert torch.equal(choice, dmm_fast.linear_assignment(here.cost, **here.options))
    order = torch.randperm(here.cost.shape[0]).to(device)
    B = here.cost.shape[0]
    options = {k: v[order] if isinstance(v, Tensor) and v.shape[:1] == (B,) else v for k, v in here.options.items()}
    if isinstance(options.get("unmatched_cost"), Tensor) and options["unmatched_cost"].dim() == 1:
        options["unmatched_cost"] = here.options["unmatched_cost"]
    assert torch.equal(choice[order], dmm_fast.linear_assignment(here.cost[order], **options))


@on_devices
def test_any_strides(device):
    cost, own = torch.rand(4, 6, 9, device=device), torch.rand(4, 6, device=device)
    expected = dmm_fast.linear_assignment(cost, unmatched_cost=own)
    for view in (strided(cost), cost.mT.contiguous().mT):
        assert not view.is_contiguous() and torch.equal(dmm_fast.linear_assignment(view, unmatched_cost=strided(own)), expected)
    assert torch.equal(dmm_fast.linear_assignment(cost.mT), dmm_fast.linear_assignment(cost.mT.contiguous()))


def test_a_hundred_thousand_small_problems():
    """Against a loop over scipy."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.rand(100_000, 5, 8, dtype=torch.float64)
    begin = time.perf_counter()
    choice = dmm_fast.linear_assignment(cost)
    seconds = time.perf_counter() - begin
    assert choice.sort(1).values.diff(dim=1).gt(0).all()
    best = np.array([problem[linear_sum_assignment(problem)].sum() for problem in cost.numpy()])
    torch.testing.assert_close(cost.gather(2, choice[..., None]).sum((1, 2)), torch.from_numpy(best), rtol=1e-12, atol=1e-12)
    assert seconds < 2


@pytest.mark.parametrize("shape", [(300, 900), (900, 300), (400, 400)], ids=str)
@pytest.mark.parametrize("kind", ["random", "integer", "clustered", "product"])
def test_large_problems(kind, shape):
    n, m = shape
    if kind == "random":
        cost = torch.rand(shape)
    elif kind == "integer":
        cost = torch.randint(0, 10, shape).float()
    elif kind == "clustered":
        here, there = (torch.rand(20, 4).repeat(-(-size // 20), 1)[:size] for size in shape)
        cost = torch.cdist(here + 0.01 * torch.randn(n, 4), there + 0.01 * torch.randn(m, 4))
    else:
        cost = torch.arange(1.0, n + 1)[:, None] * torch.arange(1.0, m + 1)
    from scipy.optimize import linear_sum_assignment

    choice = dmm_fast.linear_assignment(cost)
    exact = cost.double()
    row, column = linear_sum_assignment(exact.numpy())
    taken = (choice >= 0).nonzero()[:, 0]
    assert taken.numel() == min(shape) == choice[taken].unique().numel()
    assert exact[taken, choice[taken]].sum() == pytest.approx(float(exact[row, column].sum()), rel=1e-13)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    cost = torch.rand(3000, 6, 9)
    expected = dmm_fast.linear_assignment(cost[:7]), dmm_fast.linear_assignment(cost[-7:])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        choice = dmm_fast.linear_assignment(cost)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(choice[:7], expected[0]) and torch.equal(choice[-7:], expected[1])


INSTRUCTIONS = """
import sys; sys.path[:0] = {path!r}
import hashlib, torch, dmm_fast
from helpers.assignments import samples
digest = hashlib.sha256()
for sample in samples():
    for dtype in (torch.float32, torch.float64):
        here = sample.to("cpu", dtype)
        for result in dmm_fast.linear_assignment(here.cost, **here.options, return_duals=True):
            digest.update(result.numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_decides_the_same():
    """To the bit, ties and prices too."""
    digests = set()
    for capability in ("portable", "avx2", "avx512"):
        environment = {**os.environ, "DMM_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", INSTRUCTIONS.format(path=sys.path)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(result.stdout.strip())
    assert len(digests) == 1


# ---- errors ----


def test_errors():
    cost = torch.rand(2, 3, 4)
    for op in (torch.ops.dmm.linear_assignment, torch.ops.dmm.linear_assignment_duals):
        name = f"dmm::{op.__name__}"

        def refused(message, *args, op=op, name=name):
            with pytest.raises(RuntimeError, match=f"{name}: {message}"):
                op(*args)

        refused(r"cost must have shape \[B, N, M\] or \[N, M\], got \[4\]", torch.rand(4))
        refused("cost must be float32, float64, float16 or bfloat16, got Long", cost.long())
        refused(r"unmatched_cost must have shape \[3\] or \[2, 3\], got \[4\]", cost, torch.rand(4))
        refused(r"unmatched_cost must have shape \[3\] or \[2, 3\], got \[2, 4\]", cost, torch.rand(2, 4))
        refused(r"unmatched_cost must have shape \[3\] or \[1, 3\], got \[1, 3\]", cost[0], torch.rand(1, 3))
        refused("unmatched_cost must be Float, got Double", cost, torch.rand(3).double())
        refused("unmatched_cost must be Float, got Half", cost.half(), torch.rand(3).half())
        own = torch.tensor([[0.0, 1.0, 2.0], [3.0, torch.inf, 5.0]])
        refused("unmatched_cost must be finite, got inf for template 1 of problem 1", cost, own)
        refused(r"num_templates must have shape \[2\], got \[3\]", cost, None, torch.tensor([1, 2, 3]))
        refused(r"num_templates must be in \[0, 3\], got 4 at 1", cost, None, torch.tensor([1, 4]))
        refused(r"num_proposals must be in \[0, 4\], got -1 at 0", cost, None, None, torch.tensor([-1, 4]))
        refused("num_proposals must be Long, got Int", cost, None, None, torch.tensor([1, 4], dtype=torch.int32))
        assert op(cost, own, torch.tensor([3, 1])) is not None  # padding may hold anything


def test_errors_of_the_function():
    with pytest.raises(TypeError, match=r"linear_assignment: takes a tensor \[N, M\] or \[B, N, M\], got list"):
        dmm_fast.linear_assignment([[0.1]])
    for number in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match=f"linear_assignment: unmatched_cost must be finite, got {number:g}"):
            dmm_fast.linear_assignment(torch.rand(2, 3), unmatched_cost=number)
    with pytest.raises(RuntimeError, match=r"cost must have shape \[B, N, M\] or \[N, M\], got \[4\]"):
        dmm_fast.linear_assignment(torch.rand(4), unmatched_cost=1.0)


@pytest.mark.skipif(library.CUDA_MISSING is None or torch.version.cuda is None, reason="the CUDA library is there")
def test_without_the_cuda_library_the_error_says_so(monkeypatch):
    refusals = {}
    monkeypatch.setattr(torch.library, "impl", lambda name, device, function: refusals.update({(name, device): function}))
    library.refuse_without_cuda("linear_assignment")
    with pytest.raises(
        RuntimeError, match=r"dmm::linear_assignment: the tensors are on a GPU, but the CUDA library is .*FORCE_CUDA=1"
    ):
        refusals["dmm::linear_assignment", "cuda"](torch.rand(2, 3))


# ---- the rest of torch ----


@few
def test_opcheck(sample):
    here = sample.to("cpu", torch.float32)
    args = here.cost.nan_to_num(), *(here.options.get(k) for k in ("unmatched_cost", "num_templates", "num_proposals"))
    for op in (torch.ops.dmm.linear_assignment, torch.ops.dmm.linear_assignment_duals):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def decide(cost):
        choice, a, b = dmm_fast.linear_assignment(cost * 2, unmatched_cost=0.7, return_duals=True)
        return choice + dmm_fast.linear_assignment(cost), a.sum() - b.sum()

    compiled = torch.compile(decide, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 5, 50), (4, 6, 30)):
        cost = torch.rand(shape)
        for result, expected in zip(compiled(cost), decide(cost)):
            torch.testing.assert_close(result, expected)


def test_a_cost_that_learns_passes_through():
    cost = torch.rand(3, 5, 8, requires_grad=True)
    choice, a, b = dmm_fast.linear_assignment(cost, return_duals=True)
    assert not choice.requires_grad and not a.requires_grad and not b.requires_grad
    cost.gather(2, choice[..., None]).sum().backward()
    assert cost.grad.sum() == 15


class Decide(torch.nn.Module):
    def forward(self, cost: Tensor, own: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        choice, a, b = torch.ops.dmm.linear_assignment_duals(cost, own, None, counts)
        return choice + torch.ops.dmm.linear_assignment(cost), a


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_and_export(tmp_path):
    given = torch.rand(3, 5, 20), torch.rand(3, 5), torch.tensor([20, 7, 1])
    torch.jit.script(Decide()).save(tmp_path / "decide.pt")
    B = torch.export.Dim("B")
    program = torch.export.export(Decide(), given, dynamic_shapes=({0: B}, {0: B}, {0: B}))
    torch.export.save(program, tmp_path / "decide.pt2")
    for loaded in (torch.jit.load(tmp_path / "decide.pt"), torch.export.load(tmp_path / "decide.pt2").module()):
        for result, expected in zip(loaded(*given), Decide()(*given)):
            assert torch.equal(result, expected)


def test_vmap():
    cost, own, counts = torch.rand(6, 3, 4, 9), torch.rand(4) * 0.3, torch.randint(0, 10, (6, 3))

    def decide(c, k):
        return dmm_fast.linear_assignment(c, unmatched_cost=own, num_proposals=k, return_duals=True)

    expected = decide(cost.flatten(0, 1), counts.flatten())
    for result, flat in zip(torch.vmap(decide)(cost, counts), expected):
        assert torch.equal(result.flatten(0, 1), flat)
    single = torch.vmap(dmm_fast.linear_assignment, in_dims=2)(cost[0].movedim(0, 2))
    assert torch.equal(single, dmm_fast.linear_assignment(cost[0]))
    results = torch.vmap(lambda c: dmm_fast.linear_assignment(c, return_duals=True))(torch.rand(3, 0, 4, 9))
    assert [result.shape for result in results] == [(3, 0, 4), (3, 0, 4), (3, 0, 9)]


def test_the_reference_is_exact_too():
    """By trying everything."""
    from itertools import permutations

    cost, own = torch.randint(0, 5, (60, 3, 4)).double(), torch.randint(0, 4, (60, 3)).double()
    for unmatched, width in ((None, 4), (own, 7)):
        wide = cost if unmatched is None else torch.cat([cost, unmatched[..., None].expand(60, 3, 3)], 2)
        best = torch.stack([wide[:, range(3), list(p)].sum(1) for p in permutations(range(width), 3)]).amin(0)
        choice = reference.linear_assignment(cost, unmatched_cost=unmatched)
        kept = wide.gather(2, choice.clamp(min=0)[..., None])[..., 0]
        assert torch.equal((kept if unmatched is None else kept.where(choice >= 0, unmatched)).sum(1), best)

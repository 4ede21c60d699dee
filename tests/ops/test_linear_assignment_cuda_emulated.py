"""The CUDA kernels of dmm::linear_assignment without a GPU, as test_match_cuda_emulated.py does it."""

from __future__ import annotations

import ctypes

import pytest
import torch
from helpers.assignments import check, samples
from helpers.emulated import ELEMENT, accumulate, address, build, random
from torch import Tensor

import dmm_fast

SAMPLES = samples()


class Device:
    """``linear_assignment(..., return_duals=True)`` on the emulated device."""

    def __init__(self, folder):
        self.library = build("linear_assignment", folder)

    def __call__(
        self, cost, *, unmatched_cost=None, num_templates=None, num_proposals=None, duals=True, processors=3,
        shared_bytes=99 << 10, last_thread_first=False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.library.set_device(processors, shared_bytes, int(last_thread_first))
        given, own = cost.contiguous(), unmatched_cost
        given = given if given.dim() == 3 else given[None]
        B, N, M = given.shape
        if isinstance(own, float):
            own = torch.full((N,), own, dtype=accumulate(cost))
        own = own if own is None else own.contiguous()
        guard = 64
        choice = torch.full((B * N + 2 * guard,), -77, dtype=torch.int64)
        a, b = (torch.full((B * size + 2 * guard,), -77, dtype=accumulate(cost)) for size in (N, M))
        inner = [memory[guard : memory.numel() - guard] for memory in (choice, a, b)]
        prices = [address(t) if duals and t.numel() else None for t in inner[1:]]
        self.library.linear_assignment(
            address(given), address(own), ctypes.c_int64(N if own is not None and own.dim() == 2 else 0), address(num_templates),
            address(num_proposals), (ctypes.c_int64 * 3)(B, N, M), ELEMENT[cost.dtype], address(inner[0]), *prices,
        )  # fmt: skip
        for memory in (choice, a, b):
            assert memory[:guard].eq(-77).all() and memory[-guard:].eq(-77).all()
        shapes = cost.shape[:-1], cost.shape[:-1], (*cost.shape[:-2], M)
        return tuple(memory.view(shape) for memory, shape in zip(inner, shapes))


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return Device(tmp_path_factory.mktemp("emulated"))


def few(sample):
    """Fibers are slow."""
    options = sample.options
    if sample.cost.dim() == 3 and sample.cost.shape[0] > 20:
        options = {k: v[:20] if isinstance(v, Tensor) and v.shape[0] == sample.cost.shape[0] else v for k, v in options.items()}
        sample = type(sample)(sample.name, sample.cost[:20], options)
    return sample


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.cost.shape[0]], ids=lambda sample: sample.name)
def test_a_warp_per_problem(device, sample, dtype):
    """Optimal, and to the bit what the CPU decides."""
    here = few(sample).to("cpu", dtype)
    results = device(here.cost, **here.options)
    check(here, *results)
    expected = dmm_fast.linear_assignment(here.cost, **here.options, return_duals=True)
    assert all(torch.equal(result, want) for result, want in zip(results, expected))
    assert torch.equal(device(here.cost, **here.options, duals=False)[0], results[0])


def tied(*shape, seed=0):
    return (random(*shape, seed=seed) * 6).floor()


@pytest.mark.parametrize("shape", [(2, 9, 140), (1, 150, 40), (1, 130, 130), (1, 70, 150), (1, 3, 530)], ids=str)
@pytest.mark.parametrize("kind", ["random", "tied", "holes", "alone"])
def test_a_block_per_problem(device, shape, kind):
    cost, options = random(*shape), {}
    if kind == "tied":
        cost = tied(*shape)
    elif kind == "holes":
        cost = tied(*shape).masked_fill(random(*shape, seed=1) < 0.97, torch.nan)
    elif kind == "alone":
        options["unmatched_cost"] = random(shape[1], seed=2) * 0.05
    results = device(cost, **options)
    expected = dmm_fast.linear_assignment(cost, **options, return_duals=True)
    assert all(torch.equal(result, want) for result, want in zip(results, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 50), (1, 5, 140)], ids=str)
def test_half_precision(device, shape, dtype):
    cost, own = random(*shape, dtype=dtype), random(shape[1]) * 0.1
    expected = dmm_fast.linear_assignment(cost, unmatched_cost=own, return_duals=True)
    assert all(torch.equal(result, want) for result, want in zip(device(cost, unmatched_cost=own), expected))


@pytest.mark.parametrize("shape", [(7, 6, 20), (3, 20, 6), (3, 9, 140), (3, 140, 9)], ids=str)
def test_arrays_that_do_not_fit_shared_memory(device, shape):
    """And blocks that take several problems in turn."""
    results = device(tied(*shape), shared_bytes=1 << 10, processors=1)
    expected = dmm_fast.linear_assignment(tied(*shape), return_duals=True)
    assert all(torch.equal(result, want) for result, want in zip(results, expected))


def test_static_shared_memory_counts(device):
    """A kernel must ask for more than 48 KiB, and has some before the launch adds any."""
    cost = random(1, 74, 74)
    assert torch.equal(device(cost, duals=False)[0], dmm_fast.linear_assignment(cost))


@pytest.mark.parametrize("shape", [(3, 12, 40), (1, 60, 140)], ids=str)
def test_the_order_of_threads_does_not_matter(device, shape):
    cost = tied(*shape)
    cost[0, :, 11:] = torch.inf  # more rows than columns
    first, last = (device(cost, last_thread_first=order) for order in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(first, last))


@pytest.mark.parametrize("shape", [(5, 3, 12), (5, 3, 140)], ids=str)
def test_what_is_out_of_range_is_unmatched_and_nan(device, shape):
    cost, M = random(*shape), shape[2]
    own = torch.ones(5, 3)
    own[4, 1] = torch.inf
    counts = dict(num_templates=torch.tensor([3, -1, 4, 3, 3]), num_proposals=torch.tensor([M, M, M, 1 << 40, M]))
    choice, a, b = device(cost, unmatched_cost=own, **counts)
    assert choice[0].ge(0).all() and choice[1:].eq(-1).all()
    assert not a[0].isnan().any() and not b[0].isnan().any() and a[1:].isnan().all() and b[1:].isnan().all()

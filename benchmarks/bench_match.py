"""The matching layer against its peers, on the CPU (one thread) and on a GPU.

    pytest benchmarks/bench_match.py            what this machine can run; a GPU adds its cases

Every case first compares X (and the gradient of the cost) with the reference in float64, and fails instead of reporting
when they differ. page.py runs ``measure_cpu``, gpu_report.py ``measure_gpu``.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import core
import pytest
import torch
from torch import Tensor

import dmm_fast
from dmm_fast.ops import reference

Solve = Callable[[Tensor], Tensor]  # cost [B, N, M] -> assignment [B, N, M]

SHAPES = [(1, 50), (5, 50), (10, 50), (16, 100), (5, 100)]  # (templates, proposals)
BATCHES = [1, 8, 64, 1024, 4096, 65536]
KNOWN = 2  # problems whose float64 solution every case is checked against


@dataclass(frozen=True)
class Case:
    batch: int
    n: int = 5
    m: int = 50
    n_grad: int = 40
    n_proj: int = 5
    backward: bool = False
    device: str = "cpu"

    @property
    def lr(self) -> float:
        return 0.1 if self.n_grad <= 40 else 0.01

    @property
    def rounds(self) -> int:
        return self.n_grad * self.n_proj

    @property
    def options(self) -> dict:
        return dict(n_grad=self.n_grad, n_proj=self.n_proj, lr=self.lr)

    @property
    def known(self) -> int:
        """How many known problems fit at each end of the batch."""
        return max(1, min(KNOWN, self.batch // 2))

    def __str__(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return f"{self.n}x{self.m} {self.n_grad}x{self.n_proj} B={self.batch} {direction}"

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Cost and the gradient of X, ``[B, N, M]`` float32. The known problems come first, and again last."""
        generator = torch.Generator(self.device).manual_seed(self.batch)
        cost, grad = torch.rand(2, self.batch, self.n, self.m, generator=generator, device=self.device)
        for tensor, source in zip((cost, grad), known_problems(self.n, self.m)):
            tensor[: self.known] = tensor[-self.known :] = source[: self.known]
        return cost, grad

    def call(self, solve: Solve) -> core.Function:
        """The call to time: X, or with backward the gradient of the cost."""
        cost, grad = self.inputs()
        if not self.backward:
            return lambda: solve(cost)
        cost.requires_grad_()
        return lambda: torch.autograd.grad(solve(cost), cost, grad)[0]


def known_problems(n: int, m: int) -> Tensor:
    """(cost, grad) of the known problems, ``[2, KNOWN, N, M]``."""
    return torch.rand(2, KNOWN, n, m, generator=torch.Generator().manual_seed(1000 * n + m))


@functools.cache
def known_solution(n: int, m: int, n_grad: int, n_proj: int, lr: float) -> tuple[Tensor, Tensor]:
    """X and dC of the known problems by plain autograd over the reference in float64 on the CPU."""
    cost, grad = known_problems(n, m).double()
    cost.requires_grad_()
    x = reference.match_batched(cost, n_grad=n_grad, n_proj=n_proj, lr=lr)
    return x.detach(), torch.autograd.grad(x, cost, grad)[0]


def validate(case: Case, solve: Solve) -> None:
    """Compare with the reference at both ends of the batch; AssertionError where it differs.

    A gradient in float32 may jump where a value is within rounding of 0 in one of the rounds: one known problem is held
    to 1e-3, all of them to a quarter.
    """
    x, dc = known_solution(case.n, case.m, case.n_grad, case.n_proj, case.lr)
    for direction, expected in ((False, x), (True, dc)):
        if direction and not case.backward:
            continue
        actual = replace(case, backward=direction).call(solve)().detach()
        for part in (actual[: case.known], actual[-case.known :]):
            error = part.cpu().double() - expected[: case.known]
            if not direction:
                assert error.abs().amax() < 1e-4, f"X differs from the reference by {error.abs().amax():.2g}"
            else:
                error = error.flatten(1).norm(dim=1) / expected[: case.known].flatten(1).norm(dim=1)
                assert error.min() < 1e-3 and error.max() < 0.25, f"the gradient is off by {error.tolist()}"


# ---- the contestants ----


def ours(case: Case, backend: str = "native") -> Solve:
    return functools.partial(dmm_fast.match, backend=backend, **case.options)


def batched(case: Case) -> Solve:
    """The batched eager version: one PyTorch call per step for the whole batch."""
    return functools.partial(reference.match_batched, **case.options)


def literal(case: Case) -> Solve:
    """Listing 1 as printed, which takes one problem."""

    def solve(cost: Tensor) -> Tensor:
        return reference.listing1(cost[0], torch.zeros_like(cost[0]), case.n_grad, case.n_proj, case.lr)[None]

    return solve


def compiled(case: Case) -> Solve:
    """The batched eager loop with each outer step (all its projections) under torch.compile."""
    step = compiled_step(case.n_proj, case.lr)

    def solve(cost: Tensor) -> Tensor:
        x = torch.zeros_like(cost)
        total = torch.zeros_like(cost)
        for _ in range(case.n_grad):
            x = step(x, cost)
            total = total + x
        return total / case.n_grad

    return solve


@functools.cache
def compiled_step(n_proj: int, lr: float) -> Callable[[Tensor, Tensor], Tensor]:
    order = reference._order("reset", reference.project_rows)

    def outer_step(x: Tensor, cost: Tensor) -> Tensor:
        return reference._dykstra(x - lr * cost, [torch.zeros_like(x)] * 3, order, n_proj)

    torch._dynamo.config.recompile_limit = 64  # one per batch size at worst
    return torch.compile(outer_step, fullgraph=True)


def prices(case: Case) -> Solve:
    """Newton prices at their defaults: another answer, decided better, from fewer rounds."""
    return dmm_fast.match_prices


def sinkhorn(case: Case) -> Solve:
    return functools.partial(reference.sinkhorn, rounds=50)


def linear_assignment(case: Case) -> Solve:
    """torch-linear-assignment: exact, batched on the GPU, no gradient."""
    from torch_linear_assignment import batch_linear_assignment

    return batch_linear_assignment


# ---- predicted limits (docs/performance.md derives them) ----


def limit(case: Case) -> float | None:
    """Seconds below which this case cannot be solved on this machine, for the larger of latency and throughput."""
    return cpu_limit(case) if case.device == "cpu" else gpu_limit(case)


def cpu_limit(case: Case) -> float | None:
    rates = core.cpu_rates()
    if rates is None:
        return None
    clock, vector = rates
    # forward: y0 - u - v, relu, two sums. backward: that again, its mask; h (two), its sums (two), dY.
    operations = 5 + (6 + 5 if case.backward else 0)
    throughput = case.batch * case.n * case.m * case.rounds * operations / vector
    # one problem, lanes across columns: the chain from row sums to row sums
    vectors = math.ceil(case.m / 16)
    chain = 38 + 2 * math.ceil(math.log2(case.n)) + 2 * vectors
    latency = case.rounds * chain * (3 if case.backward else 1) / clock
    return max(throughput, latency)


def gpu_limit(case: Case) -> float:
    properties, clock = torch.cuda.get_device_properties(), core.sm_clock()
    # forward: y0 - u, max with v, two sums. backward: that again, two to record; h, its mask, dY, two sums.
    instructions = 4 + (6 + 5 if case.backward else 0)
    lanes = properties.multi_processor_count * 128
    throughput = case.batch * case.n * case.m * case.rounds * instructions / lanes / clock
    # one problem in one warp: five exchange-and-add steps of 27 cycles, 25 for the duals, 15 for y0 - u, max and sums
    latency = case.rounds * (5 * 27 + 25 + 15) * (3 if case.backward else 1) / clock
    return max(throughput, latency)


# ---- CPU ----


def measure_cpu(case: Case, peers: list[str] | None = None, rounds: int = 9) -> tuple[dict[str, list[float]], list[dict]]:
    """(samples of each contestant, a row for each of `PEERS` that is named). One thread; None: what people have without this."""
    names = peers or ["Listing 1" if case.batch == 1 else "batched eager"]
    with core.one_thread():
        validate(case, ours(case))
        for name in names:
            if name in ("batched eager", "compiled"):  # others give another answer; Listing 1 carries its corrections over
                validate(case, PEERS[name](case))
        functions = {"ours": case.call(ours(case)), **{name: case.call(PEERS[name](case)) for name in names}}
        times = core.compare(functions, core.cpu_time, rounds=rounds)
    return times, core.rows_of(str(case), times, problems=case.batch, limit=limit(case))


def measure_prices_cpu(case: Case, rounds: int = 5) -> tuple[dict[str, list[float]], list[dict]]:
    """match_prices, which decides better (docs/variants.md), at its defaults; its peer is match at its own."""
    exact = reference.match_prices(known_problems(case.n, case.m)[0].double())
    with core.one_thread():
        part = prices(case)(case.inputs()[0])[: case.known].double()
        assert (part - exact[: case.known]).abs().amax() < 1e-4, "X differs from the reference"
        functions = {"ours": case.call(prices(case)), "match 40x5": case.call(ours(case))}
        times = core.compare(functions, core.cpu_time, rounds=rounds)
    name = f"match_prices {case.n}x{case.m} 40x1 B={case.batch} {'forward+backward' if case.backward else 'forward'}"
    return times, core.rows_of(name, times, problems=case.batch)


CPU_CASES = [Case(1), Case(1, backward=True), Case(1024), Case(1024, backward=True)]


@pytest.mark.benchmark(group="match, CPU")
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def bench_cpu(benchmark, case):
    times, rows = measure_cpu(case, rounds=9 if case.batch == 1 else 5)
    core.record(benchmark, times["ours"], *rows)


@pytest.mark.benchmark(group="match, CPU")
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def bench_prices_cpu(benchmark, case):
    times, rows = measure_prices_cpu(case)
    core.record(benchmark, times["ours"], *rows)


# ---- GPU ----

PEERS: dict[str, Callable[[Case], Solve]] = {
    "Listing 1": literal,
    "batched eager": batched,
    "batched eager, graph": batched,
    "compiled": compiled,
    "compiled, graph": compiled,
    "match_prices": prices,
    "sinkhorn": sinkhorn,
    "linear assignment": linear_assignment,
    "triton": functools.partial(ours, backend="triton"),
}


def why_not(name: str, case: Case) -> str | None:
    """Why a peer sits this case out; None where it takes part."""
    if name == "Listing 1" and case.batch > 1:
        return "takes one problem"
    if name == "linear assignment" and case.backward:
        return "has no gradient"
    if name == "linear assignment" and importlib.util.find_spec("torch_linear_assignment") is None:
        return "torch-linear-assignment is not installed"
    if name in ("match_prices", "sinkhorn", "linear assignment", "triton"):
        return None
    if case.n_grad > 40 and name not in ("Listing 1", "batched eager"):
        return "400x50 would be a graph of 280,000 kernels"
    # Batched eager runs 14 kernels a round, each over about three arrays, and keeps six arrays a round for autograd.
    array = case.batch * case.n * case.m * 4
    seconds = case.rounds * 14 * (3 if case.backward else 1) * max(5e-6, 3 * array / 2e12)
    if seconds > 10:
        return f"would take about {seconds:.0f} s"
    kept = case.rounds * 6 * max(array, 512) if case.backward else 0
    if kept > 20e9:
        return f"would need about {kept / 1e9:.0f} GB"
    return None


def measure_gpu(case: Case, peers: list[str], rounds: int = 5) -> dict:
    """The row of one case, in seconds: ``kernel`` (graph replay), ``call`` (eager, back to back), ``cold`` (graph
    replay after an L2 flush), ``limit``; each peer's time and ratio, or why it sat out."""
    solve = ours(case)
    validate(case, solve)
    call = case.call(solve)
    replays = 1 if limit(case) > 2e-3 else 10
    kernel, once = core.captured(call, replays), core.captured(call)
    own = core.medians(core.compare({"kernel": kernel, "call": call}, core.device_time, rounds=rounds, sample=0.01))
    row = {
        "case": str(case),
        **asdict(case),
        "kernel": own["kernel"] / replays,
        "call": own["call"],
        "cold": core.cold_device_time(once, 5),
        "limit": limit(case),
        "peers": {},
        "skipped": {},
    }
    del kernel
    for name in peers:
        if reason := why_not(name, case):
            row["skipped"][name] = reason
            continue
        try:
            row["peers"][name] = measure_peer(name, case, once if name.endswith("graph") else call, rounds)
        except torch.OutOfMemoryError as error:
            row["skipped"][name] = str(error).splitlines()[0]
        finally:
            torch.cuda.empty_cache()
    return row


def measure_peer(name: str, case: Case, call: core.Function, rounds: int) -> dict:
    """A peer's time, and its ratio to ours in turns: graph replay against graph replay, call against call."""
    if name == "triton":
        validate(case, PEERS[name](case))
    peer = case.call(PEERS[name](case))
    if name.endswith("graph"):
        peer = core.captured(peer)
    peer()  # compiles, where there is something to compile
    slow = core.device_time(peer, 1) > 0.2
    functions = {"ours": call, "peer": peer}
    times = core.medians(core.compare(functions, core.device_time, rounds=1 if slow else rounds, sample=0.01))
    return {"time": times["peer"], "ratio": times["peer"] / times["ours"]}


GPU_CASES = [
    Case(batch, n, m, n_grad, n_proj, backward, "cuda")
    for n_grad, n_proj in ((40, 5), (400, 50))
    for n, m in SHAPES
    for batch in BATCHES
    for backward in (False, True)
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.benchmark(group="match, GPU")
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def bench_gpu(benchmark, case):
    row = measure_gpu(case, list(PEERS))
    row["machine"] = core.machine("cuda")
    core.record(benchmark, [row["kernel"]], row)


def measure_memory(case: Case, names: dict[str, Solve]) -> dict:
    """Peak bytes of one call, beyond its inputs, and the least it could be: X, the gradient of the cost."""
    array = case.batch * case.n * case.m * 4
    return {"case": str(case), "outputs": (2 if case.backward else 1) * array} | {
        name: core.peak_memory(case.call(solve)) for name, solve in names.items()
    }


@needs_gpu
@pytest.mark.benchmark(group="match, GPU memory")
def bench_gpu_memory(benchmark):
    case = Case(4096, backward=True, device="cuda")
    row = measure_memory(case, {"ours": ours(case), "batched eager": batched(case)})
    core.record(benchmark, [0.0], row | {"machine": core.machine("cuda")})

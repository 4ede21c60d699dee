"""What every benchmark shares: clocks, warm-up, interleaving, machine facts, measured ceilings, tables.

Times are per call, in seconds. On the CPU a benchmark runs on one thread and is charged that thread's CPU time, so that
a busy machine does not count; on CUDA it is timed by events on the device. Whatever is compared is measured in turns in
the same run, and medians are compared.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from text import commit, microseconds, table  # noqa: F401  the suites take them from here

import dmm_fast
from dmm_fast.ops import library as _library

Function = Callable[[], object]
Name = TypeVar("Name")  # of a contestant
Timer = Callable[[Function, int], float]  # (function, calls) -> seconds per call

ROWS: list[dict] = []  # one per finished benchmark, for the table at the end of a run


# ---- clocks ----


def cpu_time(function: Function, calls: int) -> float:
    """CPU time of the calling thread; everything measured must run on it (``one_thread``)."""
    begin = time.thread_time_ns()
    for _ in range(calls):
        function()
    return (time.thread_time_ns() - begin) * 1e-9 / calls


def wall_time(function: Function, calls: int) -> float:
    """What a user waits for; other work on the machine counts."""
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def device_time(function: Function, calls: int) -> float:
    """Time between CUDA events around ``calls`` calls back to back: the pace of host or device, the slower."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def cold_device_time(function: Function, calls: int) -> float:
    """The same with the L2 cache flushed before each call, and the call alone between its events; give it a
    ``captured`` call where the host might be slower than the flush."""
    flush = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    events = []
    for _ in range(calls):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) * 1e-3


def captured(function: Function, calls: int = 1) -> Function:
    """``calls`` calls as one CUDA graph: replaying it costs the host one launch, which leaves the kernels' own time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function() for _ in range(calls)]  # every call's result stays allocated: no two calls share memory

    def replay():
        graph.replay()
        return kept[-1]

    return replay


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread, and a C library (glibc) that keeps freed memory unless DMM_BENCH_MALLOC=default.

    Page faults otherwise come and go with the history of the heap, for every contestant. Keeping memory favours those
    that allocate most: batched eager runs twice as fast.
    """
    trim_threshold, mmap_threshold = -1, -3
    if platform.libc_ver()[0] == "glibc" and os.environ.get("DMM_BENCH_MALLOC") != "default":
        ctypes.CDLL(None).mallopt(trim_threshold, 2**31 - 1)
        ctypes.CDLL(None).mallopt(mmap_threshold, 32 << 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- comparing ----


def compare(functions: dict[Name, Function], timer: Timer, *, rounds: int, sample: float = 0.03) -> dict[Name, list[float]]:
    """``rounds`` samples of each function, in turns. A sample is as many calls as fill ``sample`` seconds, after a call
    that pays for what the other contestant left in the caches and the allocator."""
    calls = {}
    for name, function in functions.items():
        function()  # lazy initialisation
        calls[name] = max(1, min(2000, int(sample / max(timer(function, 1), 1e-9))))
    times: dict[Name, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if calls[name] > 1:
                function()
            times[name].append(timer(function, calls[name]))
    return times


def medians(times: dict[Name, list[float]]) -> dict[Name, float]:
    return {name: statistics.median(samples) for name, samples in times.items()}


def rows_of(
    case: str, times: dict[str, list[float]], *, problems: int = 1, device: str = "cpu", limit: float | None = None
) -> list[dict]:
    """A row for each peer; ours comes first in `times`. A ratio is peer over ours. limit: seconds that a call must take."""
    (_, ours), *peers = medians(times).items()
    us = 1e6 / problems
    return [
        {
            "case": case,
            "machine": machine(device),
            "us per problem": ours * us,
            "peer": peer,
            "peer us per problem": seconds * us,
            "ratio": seconds / ours,
            "limit us per problem": None if limit is None else limit * us,
            "share of limit": None if limit is None else limit / ours,
        }
        for peer, seconds in peers
    ]


def peak_memory(function: Function) -> int:
    """Bytes that one call needs at its peak on the CUDA device, beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# ---- pytest-benchmark ----

_now = 0.0


def clock() -> float:
    """The timer given to pytest-benchmark: it moves only by what this core measured (``record``)."""
    return _now


def record(benchmark, samples: list[float], *rows: dict) -> None:
    """Hand samples measured here to pytest-benchmark, the first row to its ``extra_info``, and all to the closing table."""
    remaining = iter(samples)

    def advance():
        global _now
        _now += next(remaining)

    benchmark.extra_info.update(rows[0])
    ROWS.extend(rows)
    benchmark.pedantic(advance, rounds=len(samples))


# ---- the machine ----


@functools.cache
def machine(device: str) -> dict[str, str]:
    """What the figures belong to."""
    facts = {
        "dmm_fast": dmm_fast.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        facts["GPU"] = properties.name
        facts["multiprocessors"] = str(properties.multi_processor_count)
        facts["maximum clock"] = f"{sm_clock() * 1e-9:.3f} GHz"
        facts["CUDA"] = torch.version.cuda or "none"
        facts["CUDA library"] = _library.CUDA_MISSING or "loaded"
    else:
        facts["CPU"] = _cpu_model()
        facts["instructions"] = _library.cpu_capability()
    return facts


def _cpu_model() -> str:
    """Its name, and its family and model, as some names say little."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


@functools.cache
def sm_clock() -> float:
    """The highest clock of the GPU's multiprocessors in Hz, which a short kernel on an idle GPU runs at."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 1e6


_PROBE = """
#include <time.h>
static double now(void) {
  struct timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}
double clock_hz(void) {  /* a chain of additions, one per cycle */
  const long loops = 1000000; long x = 0; double begin = now();
  for (long i = 0; i < loops; ++i) __asm__ volatile(".rept 16\\n add $1, %0\\n .endr" : "+r"(x));
  return 16 * loops / (now() - begin);
}
double vector_hz(void) {  /* the forward's mix, subtract, subtract, maximum, two fused additions: nothing waits */
  const long loops = 1000000; double begin = now();
  for (long i = 0; i < loops; ++i) __asm__ volatile(MIX ::: CLOBBERS);
  return 15 * loops / (now() - begin);
}
"""


@functools.cache
def cpu_rates() -> tuple[float, float] | None:
    """Measured on one core: (clock in Hz, element operations per second at the forward's mix); or None."""
    width = {"avx512": ("zmm", 16, "-mavx512f"), "avx2": ("ymm", 8, "-mavx2")}.get(_library.cpu_capability())
    if width is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    register, lanes, flag = width
    mix = ["vsubps", "vsubps", "vmaxps", "vfmadd231ps", "vfmadd231ps"] * 3
    text = "\\n".join(f"{op} %%{register}15,%%{register}{15 if 'fma' in op else i},%%{register}{i}" for i, op in enumerate(mix))
    clobbers = ",".join(f'"xmm{i}"' for i in range(15))
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.c"), Path(folder, "probe.so")
        source.write_text(f'#define MIX "{text}"\n#define CLOBBERS {clobbers}\n{_PROBE}')
        command = ["cc", "-O2", "-shared", "-fPIC", flag, "-mfma", str(source), "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        probe = ctypes.CDLL(str(library))
    probe.clock_hz.restype = probe.vector_hz.restype = ctypes.c_double
    probe.clock_hz(), probe.vector_hz()
    return max(probe.clock_hz() for _ in range(5)), lanes * max(probe.vector_hz() for _ in range(5))

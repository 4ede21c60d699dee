"""The CUDA sources on the host: compiled with g++, threads as fibers (tests/emulated_cuda), called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

SOURCES = Path(__file__).resolve().parents[1] / "emulated_cuda"
ELEMENT = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def build(name: str, folder: Path) -> ctypes.CDLL:
    """tests/emulated_cuda/NAME.cpp as a library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library = folder / f"lib{name}.so"
    include = Path(torch.__path__[0]) / "include"
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{SOURCES}", "-isystem", str(include)]
    subprocess.run([compiler, *flags, str(SOURCES / f"{name}.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


class Result:
    """A tensor to be written, all NaN, between two stretches of memory that must stay as they are."""

    GUARD = 64

    def __init__(self, shape, dtype):
        numel = torch.Size(shape).numel()
        self.memory = torch.full((numel + 2 * self.GUARD,), torch.nan, dtype=dtype)
        self.tensor = self.memory[self.GUARD : self.GUARD + numel].view(shape)

    def take(self) -> Tensor:
        assert self.memory[: self.GUARD].isnan().all() and self.memory[-self.GUARD :].isnan().all()
        return self.tensor


class Given(ctypes.Structure):
    """`Given` of tests/emulated_cuda/layer.h."""

    _fields_ = [
        ("cost", ctypes.c_void_p), ("init", ctypes.c_void_p), ("num_templates", ctypes.c_void_p),
        ("num_proposals", ctypes.c_void_p), ("lr", ctypes.c_void_p), ("unmatched", ctypes.c_void_p), ("lr_stride", ctypes.c_int64),
        ("unmatched_stride", ctypes.c_int64), ("sizes", ctypes.c_int64 * 5),
        ("lr_value", ctypes.c_double), ("carry", ctypes.c_int), ("last", ctypes.c_int), ("element", ctypes.c_int),
    ]  # fmt: skip


class Device:
    """A matching layer on the emulated device. starts: it takes an init, and gives a gradient for it."""

    def __init__(self, name: str, folder: Path, starts: bool):
        self.library, self.starts = build(name, folder), starts
        self.resize()

    def resize(self, processors: int = 3, shared_bytes: int = 99 << 10, last_thread_first: bool = False) -> None:
        self.library.set_device(processors, shared_bytes, int(last_thread_first))

    def _given(
        self, cost, init=None, *, n_grad, n_proj, lr, last=False, carry=False, num_templates=None, num_proposals=None,
        unmatched_cost=None,
    ):  # fmt: skip
        rate = lr.to(accumulate(cost)) if isinstance(lr, Tensor) else None
        own = None if unmatched_cost is None else unmatched_cost.to(accumulate(cost)).contiguous()
        self.alive = (cost, init, num_templates, num_proposals, rate, own)
        return ctypes.byref(Given(
            *(None if tensor is None else tensor.data_ptr() for tensor in self.alive), 0 if rate is None else rate.dim(),
            cost.shape[1] if own is not None and own.dim() == 2 else 0,
            (ctypes.c_int64 * 5)(*cost.shape, n_grad, n_proj), 0.0 if rate is not None else lr, carry, last, ELEMENT[cost.dtype],
        ))  # fmt: skip

    def forward(self, cost: Tensor, init: Tensor | None = None, **options) -> Tensor:
        """X, [B, N, M]."""
        out = Result(cost.shape, cost.dtype)
        self.library.forward(self._given(cost, init, **options), address(out.tensor))
        return out.take()

    def backward(self, grad: Tensor, cost: Tensor, init: Tensor | None = None, **options) -> tuple[Tensor, ...]:
        """The gradients of <grad, X> in cost, in init if the layer starts from one, and in lr."""
        results = [Result(cost.shape, cost.dtype) for _ in range(1 + self.starts)]
        results.append(Result(cost.shape[:1], accumulate(cost)))
        self.library.backward(self._given(cost, init, **options), address(grad), *(address(r.tensor) for r in results))
        return tuple(result.take() for result in results)


def accumulate(cost: Tensor) -> torch.dtype:
    return torch.float64 if cost.dtype == torch.float64 else torch.float32


def random(*shape, dtype=torch.float32, seed=0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

"""Loads the native libraries into torch. Importing this never initialises CUDA."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "lib"
BACKENDS = ("auto", "native", "triton", "reference")
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def built_facts() -> dict:
    """What the build wrote down about itself: torch, nvcc (None: no CUDA kernels) and why, CUDA architectures."""
    path = FOLDER / "build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def load_cpu() -> None:
    """Load the schemas and the CPU kernels; without them there is no dmm_fast."""
    path = FOLDER / "libdmm_cpu.so"
    if not path.exists():
        found = sorted(p.name for p in FOLDER.glob("*")) if FOLDER.exists() else "no such folder"
        raise ImportError(
            f"dmm_fast was installed without its native library: {path} is missing (found there: {found}). "
            f"Rebuild it from the source folder with: {REBUILD}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"{path} does not load into torch {torch.__version__} (it needs torch >= 2.11; built against "
            f"{built_facts().get('torch', 'an unknown torch')}): {error}. Rebuild it with: {REBUILD}"
        ) from error


def cpu_capability() -> str:
    """The instruction set that the CPU kernels chose: "portable", "avx2" or "avx512"."""
    library = ctypes.CDLL(str(FOLDER / "libdmm_cpu.so"))
    library.dmm_cpu_capability.restype = ctypes.c_char_p
    return library.dmm_cpu_capability().decode()


def _older_driver() -> str | None:
    """Why the driver here cannot serve the CUDA that the kernels were built with, if so; without starting CUDA."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, built = ctypes.c_int(), str(built_facts().get("nvcc", ""))
    driver.cuDriverGetVersion(ctypes.byref(version))
    major, minor = divmod(version.value // 10, 100)
    if not 0 < major < int(built.partition(".")[0] or 0):
        return None
    return f"built with CUDA {built}; the driver here serves {major}.{minor}"


def load_cuda() -> str | None:
    """Load the CUDA kernels where torch has CUDA. Returns None if loaded, otherwise why not."""
    path = FOLDER / "libdmm_cuda.so"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if not path.exists():
        return f"not built: {built_facts().get('cuda_decision', 'the build left no record')}"
    if os.environ.get("DMM_CUDA") == "0":
        return "left out by DMM_CUDA=0"
    if older := _older_driver():
        return older
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def check_backend(name: str, tensor: torch.Tensor, backend: str) -> None:
    """A backend that does not exist, or can't serve this tensor, raises an error with a message."""
    if backend not in BACKENDS:
        raise ValueError(f"{name}: backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "native" and tensor.is_cuda and CUDA_MISSING is not None:
        raise RuntimeError(f"{name}: backend='native' on a CUDA tensor, but the CUDA library is {CUDA_MISSING}")
    if backend == "triton" and not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{name}: backend='triton' takes CUDA tensors, got one on {tensor.device}")


def let_triton_serve(*ops: str) -> None:
    """Where the CUDA library is absent, ``torch.ops.dmm.<op>`` on CUDA tensors goes to its Triton twin, ``dmm::<op>_triton``,
    so that models, scripts and exports need not know. ``ops[0]`` names the module of ``dmm_fast.kernels``.
    """
    if CUDA_MISSING is None or torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return
    for op in ops:

        def serve(*args, op=op):
            importlib.import_module(f"dmm_fast.kernels.{ops[0]}")
            arguments = getattr(torch.ops.dmm, op).default._schema.arguments
            left_out = [argument.default_value for argument in arguments[len(args) :]]  # by torch, at the end
            return getattr(torch.ops.dmm, f"{op}_triton")(*args, *left_out)

        torch.library.impl(f"dmm::{op}", "cuda", serve)


def refuse_without_cuda(*ops: str) -> None:
    """Where the CUDA library is absent, ``torch.ops.dmm.<op>``, which has no Triton twin, says so for CUDA tensors."""
    if CUDA_MISSING is None or torch.version.cuda is None:
        return
    for op in ops:

        def refuse(*args, op=op):
            raise RuntimeError(
                f"dmm::{op}: the tensors are on a GPU, but the CUDA library is {CUDA_MISSING}. Move them to the CPU, or build "
                f"it: FORCE_CUDA=1 {REBUILD}"
            )

        torch.library.impl(f"dmm::{op}", "cuda", refuse)


load_cpu()
CUDA_MISSING = load_cuda()

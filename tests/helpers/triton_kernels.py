"""Triton's kernels under test: on a GPU, or on CPU tensors in Triton's interpreter."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported
triton = pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernels(name: str):
    """The module of a layer's kernels; skips where triton was imported without its interpreter on a machine that needs it."""
    module = importlib.import_module(f"dmm_fast.kernels.{name}")
    if not torch.cuda.is_available() and isinstance(module._forward_kernel, triton.JITFunction):
        pytest.skip("triton was imported before, without its interpreter", allow_module_level=True)
    return module


def random(*shape, dtype=torch.float64, seed=0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)

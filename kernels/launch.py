"""What all Triton kernels share: how they are launched, and the dtype they compute in."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch a kernel on the device of its first argument, a tensor; Triton itself takes the current device."""
    launchable = wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel  # or the interpreter's
    device = arguments[0].device
    # Fake tensors may be on a GPU that is not there.
    enter = device.type == "cuda" and torch.cuda.is_initialized()
    with torch.cuda.device(device) if enter else nullcontext():
        launchable[grid](*arguments, **constants)


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that the elements of a tensor are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

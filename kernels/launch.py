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
    if any(isinstance(side, int) and side > 65535 for side in grid[1:]):
        raise RuntimeError(
            f"{kernel.__name__}: a GPU takes no grid of {grid} programs; give fewer masks, or smaller ones, at once"
        )
    # Fake tensors may be on a GPU that is not there.
    enter = device.type == "cuda" and torch.cuda.is_initialized()
    with torch.cuda.device(device) if enter else nullcontext():
        launchable[grid](*arguments, **constants)


def in_float32(op) -> None:
    """Inside autocast the op takes float32, as the native one does."""
    for device in ("cpu", "cuda"):
        op.register_autocast(device, torch.float32)


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that the elements of a tensor are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

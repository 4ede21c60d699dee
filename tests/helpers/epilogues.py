"""Inputs of bias_clamp, and what its result must be on every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmm_fast.ops import reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CASES = {  # shape, images of the residual (0: none), low, high
    "relu6": ((1, 32, 6, 7), 0, 0.0, 6.0),
    "carried": ((2, 24, 5, 5), 2, -math.inf, math.inf),
    "one for all, relu": ((3, 16, 4, 6), 1, 0.0, math.inf),
    "all for one": ((1, 16, 4, 6), 3, 0.0, math.inf),
    "odd": ((2, 5, 3, 7), 2, -0.5, 0.25),
    "one channel": ((4, 1, 3, 5), 1, 0.0, 6.0),
    "one pixel": ((2, 9, 1, 1), 2, 0.0, 1.0),
    "large": ((2, 40, 33, 61), 1, 0.0, 6.0),
    "no images": ((0, 3, 4, 4), 0, 0.0, 6.0),
    "no pixels": ((2, 3, 0, 4), 1, 0.0, 6.0),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def inputs(
    name: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> tuple[Tensor, Tensor, Tensor | None, float, float]:
    """x, bias, residual, low, high. The first element of x is NaN."""
    shape, images, low, high = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (4 * torch.randn(shape, generator=generator)).to(dtype)

    x = random(*shape)
    x.view(-1)[:1] = math.nan
    residual = random(images, *shape[1:]).contiguous(memory_format=LAYOUTS[layout]) if images else None
    return x.contiguous(memory_format=LAYOUTS[layout]), random(shape[1]), residual, low, high


def check(out: Tensor, x: Tensor, bias: Tensor, residual: Tensor | None, low: float, high: float) -> None:
    exact = reference.bias_clamp(x.double(), bias.double(), None if residual is None else residual.double(), low, high)
    assert out.dtype == x.dtype and out.shape == exact.shape
    torch.testing.assert_close(out, exact.to(x.dtype), equal_nan=True)

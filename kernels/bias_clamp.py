"""``bias_clamp`` in Triton: a program takes a stretch of memory, in whichever order the elements lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dmm_fast.kernels.gradient import bias_clamp_gradient, setup_bias_clamp
from dmm_fast.kernels.launch import launch
from torch import Tensor
from torch.library import triton_op

_BLOCK = 1024


@triton.jit
def _finish_kernel(
    x, bias, residual, out, numel, C, inner, taken, added,
    LOW: tl.constexpr, HIGH: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    value = tl.load(x + i % taken, mask=inside).to(COMPUTE) + tl.load(bias + i // inner % C, mask=inside).to(COMPUTE)
    if ADD:
        value += tl.load(residual + i % added, mask=inside).to(COMPUTE)
    low, high = tl.full([], LOW, COMPUTE), tl.full([], HIGH, COMPUTE)  # a number that is an argument would be float32
    value = tl.where(value < low, low, value)  # not max: NaN stays
    value = tl.where(value > high, high, value)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=inside)


@triton_op("dmm::bias_clamp_triton", mutates_args={})
def bias_clamp(x: Tensor, bias: Tensor, residual: Tensor | None, low: float, high: float) -> Tensor:
    """``dmm_fast.ops.vision.bias_clamp`` (shapes, errors and result are those of ``torch.ops.dmm.bias_clamp``)."""
    op = "dmm::bias_clamp"
    if x.dim() != 4:
        raise RuntimeError(f"{op}: x must have shape [N, C, H, W], got {list(x.shape)}")
    N, C, H, W = x.shape
    if bias.shape != (C,):
        raise RuntimeError(f"{op}: bias must have shape [C] with C = {C}, got {list(bias.shape)}")
    if x.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise RuntimeError(f"{op}: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if not low <= high:
        raise RuntimeError(f"{op}: low must be at most high, got {low} and {high}")
    if residual is not None and not (residual.shape[1:] == x.shape[1:] and (N == 1 or residual.shape[0] in (1, N))):
        raise RuntimeError(
            f"{op}: residual must have the shape of x, {list(x.shape)}, or one of the two a single image, got {list(residual.shape)}"
        )
    for name, other in (("bias", bias), ("residual", residual)):
        if other is not None and other.dtype != x.dtype:
            raise RuntimeError(f"{op}: {name} must be {x.dtype}, got {other.dtype}")
        if other is not None and other.device != x.device:
            raise RuntimeError(f"{op}: {name} must be on the device of x")
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    added = x if residual is None else residual.contiguous(memory_format=layout)
    out = torch.empty_like(added if N == 1 else x)
    if out.numel() > 0:
        launch(
            _finish_kernel, (triton.cdiv(out.numel(), _BLOCK),),
            x, bias.contiguous(), added, out, out.numel(), C, 1 if last else H * W, x.numel(), added.numel(),
            LOW=low, HIGH=high, ADD=residual is not None, BLOCK=_BLOCK, COMPUTE=tl.float64 if x.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return out


bias_clamp.register_autograd(bias_clamp_gradient, setup_context=setup_bias_clamp)

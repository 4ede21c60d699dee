"""What the Triton layers share: checks, launches, the gradient. A layer adds its two kernels and its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from dmm_fast.kernels.gradient import Gradient
from dmm_fast.kernels.launch import accumulate_dtype, in_float32, launch
from torch import Tensor

MAX_ELEMENTS = 1 << 16  # of a problem, padded: they live in registers
MAX_SCRATCH = 1 << 28  # bytes of a backward, for all programs together, as long as one program fits


@triton.jit
def less_unmatched(c, own, own_stride, b, rows, n, valid, UNMATCHED: tl.constexpr):
    """The costs of problem b, less what staying alone costs each row."""
    if UNMATCHED:
        alone = tl.load(own + b * own_stride + rows, mask=rows < n, other=0).to(c.dtype)
        c = tl.where(valid, c - alone[:, None], 0)
    return c


@triton.jit
def sizes_of(num_templates, num_proposals, b, N, M, RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr):
    """The n and m of problem b, 0 where one of them is 0 or out of range; and whether one is out of range."""
    n = tl.zeros([], tl.int64) + N
    m = tl.zeros([], tl.int64) + M
    if RAGGED_N:
        n = tl.load(num_templates + b)
    if RAGGED_M:
        m = tl.load(num_proposals + b)
    outside = (n < 0) | (n > N) | (m < 0) | (m > M)
    empty = outside | (n == 0) | (m == 0)
    return tl.where(empty, 0, n), tl.where(empty, 0, m), outside


def check(
    op: str, cost, init, num_templates, num_proposals, lr_tensor, n_grad: int, n_proj: int, lr: float, unmatched_cost
) -> None:
    """The checks and messages of csrc/match.h."""
    if cost.dim() not in (2, 3):
        raise RuntimeError(f"{op}: cost must have shape [B, N, M] or [N, M], got {list(cost.shape)}")
    if cost.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise RuntimeError(f"{op}: cost must be float32, float64, float16 or bfloat16, got {cost.dtype}")
    B = cost.shape[0] if cost.dim() == 3 else 1
    if init is not None and init.shape != cost.shape:
        raise RuntimeError(f"{op}: init must have the shape of cost {list(cost.shape)}, got {list(init.shape)}")
    for name, counts in (("num_templates", num_templates), ("num_proposals", num_proposals)):
        if counts is not None and tuple(counts.shape) != (B,):
            raise RuntimeError(f"{op}: {name} must have shape [{B}], got {list(counts.shape)}")
    if lr_tensor is not None and tuple(lr_tensor.shape) not in ((), (B,)):
        raise RuntimeError(f"{op}: lr_tensor must have shape [] or [{B}], got {list(lr_tensor.shape)}")
    N = cost.shape[-2]
    each = ((N,), (B, N)) if cost.dim() == 3 else ((N,),)
    if unmatched_cost is not None and tuple(unmatched_cost.shape) not in each:
        raise RuntimeError(f"{op}: unmatched_cost must have shape [{N}] or [{B}, {N}], got {list(unmatched_cost.shape)}")
    accumulate = accumulate_dtype(cost)
    given = {
        "init": (init, cost.dtype), "num_templates": (num_templates, torch.int64), "num_proposals": (num_proposals, torch.int64),
        "lr_tensor": (lr_tensor, accumulate), "unmatched_cost": (unmatched_cost, accumulate),
    }  # fmt: skip
    for name, (tensor, expected) in given.items():
        if tensor is not None and tensor.dtype != expected:
            raise RuntimeError(f"{op}: {name} must be {expected}, got {tensor.dtype}")
        if tensor is not None and tensor.device != cost.device:
            raise RuntimeError(f"{op}: {name} must be on the device of cost")
    if lr_tensor is None and not 0 < lr < math.inf:
        raise RuntimeError(f"{op}: lr must be positive and finite, got {lr:g}")
    for name, value in (("n_grad", n_grad), ("n_proj", n_proj)):
        if value < 1:
            raise RuntimeError(f"{op}: {name} must be at least 1, got {value}")
    block_n, block_m = _blocks(cost)
    if cost.numel() > 0 and block_n * block_m > MAX_ELEMENTS:
        raise RuntimeError(
            f"{op}: the Triton backend takes problems of up to {MAX_ELEMENTS} elements, N and M rounded up to powers "
            f"of two, got {list(cost.shape)}; the native backend takes any size"
        )


def _blocks(cost: Tensor) -> tuple[int, int]:
    return triton.next_power_of_2(max(cost.shape[-2], 1)), triton.next_power_of_2(max(cost.shape[-1], 1))


def _arguments(problem: tuple, starts: bool):
    """What a kernel takes: tensors (in place of an absent one any other, which is not read), sizes, constants."""
    cost, init, num_templates, num_proposals, lr_tensor, _, _, lr, own = problem
    cost = cost.contiguous()
    if lr_tensor is None:  # a float argument of a kernel would be rounded to single precision
        lr_tensor = torch.full((), lr, dtype=accumulate_dtype(cost), device=cost.device)
    tensors = (
        cost,
        *([cost if init is None else init.contiguous()] if starts else []),
        cost if num_templates is None else num_templates.contiguous(),
        cost if num_proposals is None else num_proposals.contiguous(),
        lr_tensor.contiguous(),
        lr_tensor.dim(),
        cost if own is None else own.contiguous(),
        cost.shape[-2] if own is not None and own.dim() == 2 else 0,
    )
    B = cost.shape[0] if cost.dim() == 3 else 1
    block_n, block_m = _blocks(cost)
    constants = dict(
        **({"HAS_INIT": init is not None} if starts else {}),
        RAGGED_N=num_templates is not None,
        RAGGED_M=num_proposals is not None,
        UNMATCHED=own is not None,
        DTYPE=tl.float64 if cost.dtype == torch.float64 else tl.float32,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        num_warps=min(16, max(1, block_n * block_m // 1024)),
    )
    return tensors, (B, *cost.shape[-2:]), constants


def forward(kernel, op: str, problem: tuple, options: dict[str, bool], starts: bool) -> Tensor:
    """X by ``kernel``. problem: cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, unmatched_cost.
    starts: the kernel takes an init."""
    check(op, *problem)
    cost, n_grad, n_proj = problem[0], *problem[5:7]
    out = torch.empty_like(cost, memory_format=torch.contiguous_format)
    if cost.numel() > 0:
        tensors, sizes, constants = _arguments(problem, starts)
        launch(kernel, (sizes[0],), *tensors, out, *sizes, n_grad, n_proj, **options, **constants)
    return out


def backward(
    kernel, op: str, grad: Tensor, problem: tuple, options: dict[str, bool], starts: bool,
    scratch: Callable[[int, int], int],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of cost, of init if there can be one, and of lr. scratch: elements that a program needs, by its padded sizes."""
    check(op, *problem)
    cost, n_grad, n_proj = problem[0], *problem[5:7]
    if grad.shape != cost.shape or grad.dtype != cost.dtype or grad.device != cost.device:
        raise RuntimeError(f"{op}: grad must have the shape, dtype and device of cost, got {list(grad.shape)}, {grad.dtype}")
    grads = [torch.empty_like(cost, memory_format=torch.contiguous_format) for _ in range(1 + starts)]
    dtype = accumulate_dtype(cost)
    grad_lr = cost.new_zeros(cost.shape[0] if cost.dim() == 3 else 1, dtype=dtype)
    if cost.numel() > 0:
        tensors, sizes, constants = _arguments(problem, starts)
        size = scratch(constants["BLOCK_N"], constants["BLOCK_M"])
        programs = min(sizes[0], max(1, MAX_SCRATCH // (size * dtype.itemsize)))
        memory = cost.new_empty(programs * size, dtype=dtype)
        launch(
            kernel, (programs,), grad.contiguous(), *tensors, *grads, grad_lr, memory, size, *sizes, n_grad, n_proj,
            **options, **constants,
        )  # fmt: skip
    return *grads, grad_lr


def make_differentiable(op, backward_op, gradient: Gradient) -> None:
    """Give ``op`` the gradient that ``backward_op(grad, *args of op)`` computes, once."""
    op.register_autograd(
        lambda ctx, grad: gradient.backward(lambda args: backward_op(*args), ctx, grad), setup_context=gradient.setup_context
    )
    backward_op.register_autograd(gradient.refuse_second)
    in_float32(op)

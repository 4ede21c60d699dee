"""The matching layer in Triton: one program per problem, all of it in registers (docs/matching.md derives it).

Serves CUDA tensors where the native CUDA library is not built; tensors of any device in Triton's interpreter.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_MAX_ELEMENTS = 1 << 16  # of a problem padded to powers of two: more would leave the registers for good
_MAX_SCRATCH = 1 << 28  # bytes, for the backward, as long as one program fits


@triton.jit
def _sizes(num_templates, num_proposals, b, N, M, RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr):
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


@triton.jit
def _project(x, y0, u, v, inv_n, inv_m, n):
    """One round of Dykstra's projections: x = relu(y0 - u - v). Absent rows and columns have an infinite dual."""
    d = (tl.sum(x, 1) - 1) * inv_m  # [N]; inv_m is 0 in absent rows
    s = tl.sum(x, 0) - tl.sum(d, 0) + n * v  # [M]
    u += d
    v = tl.maximum((s - 1) * inv_n, 0)
    return tl.maximum(y0 - u[:, None] - v[None, :], 0), u, v


@triton.jit
def _forward_kernel(
    cost, init, num_templates, num_proposals, lr, lr_stride, out, B, N, M, n_grad, n_proj,
    HAS_INIT: tl.constexpr, RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr, CARRY: tl.constexpr, LAST: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    n, m, outside = _sizes(num_templates, num_proposals, b, N, M, RAGGED_N, RAGGED_M)
    at = b * N * M + rows[:, None] * M + columns[None, :]
    valid = (rows < n)[:, None] & (columns < m)[None, :]
    rate = tl.load(lr + b * lr_stride)
    c = tl.load(cost + at, mask=valid, other=0).to(DTYPE)
    x = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
    if HAS_INIT:
        x = tl.load(init + at, mask=valid, other=0).to(DTYPE)
    poison = tl.sum(tl.sum(c * 0 + x * 0, 1), 0) + rate * 0
    poison = tl.where(outside, float("nan"), poison)
    step = c * rate
    inv_n = 1 / tl.maximum(n, 1).to(DTYPE)
    inv_m = tl.where(rows < n, 1 / tl.maximum(m, 1).to(DTYPE), 0)
    u_start = tl.where(rows < n, 0.0, float("inf")).to(DTYPE)
    v_start = tl.where(columns < m, 0.0, float("inf")).to(DTYPE)
    total = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
    count = tl.zeros([], DTYPE) + n_grad
    if CARRY:
        total += x
        count += 1
    y0 = x
    u = u_start
    v = v_start
    for _ in range(n_grad):
        x -= step
        if CARRY:
            y0 -= step
        else:
            y0 = x
            u = u_start
            v = v_start
        for _ in range(n_proj):
            x, u, v = _project(x, y0, u, v, inv_n, inv_m, n.to(DTYPE))
        total += x
    if LAST:
        total = x
    else:
        total = total / count
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    total = tl.where(valid | outside, total + poison, 0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, cost, init, num_templates, num_proposals, lr, lr_stride, grad_cost, grad_init, grad_lr, scratch, scratch_size,
    B, N, M, n_grad, n_proj,
    HAS_INIT: tl.constexpr, RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr, CARRY: tl.constexpr, LAST: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Forward, keeping y0, u and v of every outer step in scratch; then back, with the duals of one step's rounds."""
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    tile = rows[:, None] * BLOCK_M + columns[None, :]
    state: tl.constexpr = BLOCK_N * BLOCK_M + BLOCK_N + BLOCK_M  # y0, u, v
    duals: tl.constexpr = BLOCK_N + BLOCK_M
    mine = scratch + tl.program_id(0).to(tl.int64) * scratch_size
    zero = tl.zeros([], tl.int64)
    rounds = mine + (zero + n_grad) * state
    for problem in range(tl.program_id(0), B, tl.num_programs(0)):
        b = zero + problem
        n, m, outside = _sizes(num_templates, num_proposals, b, N, M, RAGGED_N, RAGGED_M)
        at = b * N * M + rows[:, None] * M + columns[None, :]
        valid = (rows < n)[:, None] & (columns < m)[None, :]
        rate = tl.load(lr + b * lr_stride)
        c = tl.load(cost + at, mask=valid, other=0).to(DTYPE)
        g = tl.load(grad + at, mask=valid, other=0).to(DTYPE)
        x = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
        if HAS_INIT:
            x = tl.load(init + at, mask=valid, other=0).to(DTYPE)
        poison = tl.sum(tl.sum(c * 0 + x * 0, 1), 0) + rate * 0
        poison = tl.where(outside, float("nan"), poison)
        step = c * rate
        inv_n = 1 / tl.maximum(n, 1).to(DTYPE)
        inv_m = tl.where(rows < n, 1 / tl.maximum(m, 1).to(DTYPE), 0)
        u_start = tl.where(rows < n, 0.0, float("inf")).to(DTYPE)
        v_start = tl.where(columns < m, 0.0, float("inf")).to(DTYPE)
        if not LAST:
            count = tl.zeros([], DTYPE) + n_grad
            if CARRY:
                count += 1
            g = g / count
        y0 = x
        u = u_start
        v = v_start
        for k in range(n_grad):
            x -= step
            if CARRY:
                y0 -= step
            else:
                y0 = x
                u = u_start
                v = v_start
            saved = mine + (zero + k) * state
            tl.store(saved + tile, y0)
            tl.store(saved + BLOCK_N * BLOCK_M + rows, u)
            tl.store(saved + BLOCK_N * BLOCK_M + BLOCK_N + columns, v)
            for _ in range(n_proj):
                x, u, v = _project(x, y0, u, v, inv_n, inv_m, n.to(DTYPE))

        dx = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
        dy = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
        dz_sum = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
        du = tl.zeros([BLOCK_N], DTYPE)
        dv = tl.zeros([BLOCK_M], DTYPE)
        for k_back in range(n_grad):
            k = n_grad - 1 - k_back
            saved = mine + (zero + k) * state
            tl.debug_barrier()  # what this program stored, other threads of it read
            y0 = tl.load(saved + tile)
            u = tl.load(saved + BLOCK_N * BLOCK_M + rows)
            v = tl.load(saved + BLOCK_N * BLOCK_M + BLOCK_N + columns)
            x = y0
            if CARRY:
                if k > 0:
                    x = tl.maximum(y0 + step - u[:, None] - v[None, :], 0) - step
            for p in range(n_proj):
                x, u, v = _project(x, y0, u, v, inv_n, inv_m, n.to(DTYPE))
                tl.store(rounds + (zero + p) * duals + rows, u)
                tl.store(rounds + (zero + p) * duals + BLOCK_N + columns, v)
            tl.debug_barrier()
            if LAST:
                if k_back == 0:
                    dx += g
            else:
                dx += g
            if not CARRY:
                dy = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
                du = tl.zeros([BLOCK_N], DTYPE)
                dv = tl.zeros([BLOCK_M], DTYPE)
            for p_back in range(n_proj):
                p = n_proj - 1 - p_back
                u = tl.load(rounds + (zero + p) * duals + rows)
                v = tl.load(rounds + (zero + p) * duals + BLOCK_N + columns)
                h = tl.where(y0 - u[:, None] - v[None, :] > 0, dx, 0)
                dy += h
                du -= tl.sum(h, 1)
                dv -= tl.sum(h, 0)
                dv = tl.where((v > 0) & (columns < m), dv, 0)
                ds = dv * inv_n
                dx = ((du - tl.sum(ds, 0)) * inv_m)[:, None] + ds[None, :]
            dz = tl.where(valid, dx + dy, 0)
            dz_sum += dz
            if not CARRY:
                dx = dz
            tl.debug_barrier()
        if CARRY:
            dx += dy
            if not LAST:
                dx += g
        dlr = tl.sum(tl.sum(dz_sum * c, 1), 0)
        inside = (rows < N)[:, None] & (columns < M)[None, :]
        keep = valid | outside
        grads = tl.where(keep, -rate * dz_sum + poison, 0)
        tl.store(grad_cost + at, grads.to(grad_cost.dtype.element_ty), mask=inside)
        tl.store(grad_init + at, tl.where(keep, dx + poison, 0).to(grad_init.dtype.element_ty), mask=inside)
        tl.store(grad_lr + b, tl.where((n > 0) | outside, poison - dlr, 0))
        tl.debug_barrier()


_launchable = (
    wrap_triton if isinstance(_forward_kernel, triton.JITFunction) else lambda kernel: kernel
)  # or the interpreter


def _check(op: str, cost, init, num_templates, num_proposals, lr_tensor, n_grad: int, n_proj: int, lr: float) -> None:
    """The checks and the words of csrc/match.h."""
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
    expected = dict(
        init=cost.dtype, num_templates=torch.int64, num_proposals=torch.int64, lr_tensor=_accumulate_dtype(cost)
    )
    given = dict(init=init, num_templates=num_templates, num_proposals=num_proposals, lr_tensor=lr_tensor)
    for name, tensor in given.items():
        if tensor is not None and tensor.dtype != expected[name]:
            raise RuntimeError(f"{op}: {name} must be {expected[name]}, got {tensor.dtype}")
        if tensor is not None and tensor.device != cost.device:
            raise RuntimeError(f"{op}: {name} must be on the device of cost")
    if lr_tensor is None and not 0 < lr < math.inf:
        raise RuntimeError(f"{op}: lr must be positive and finite, got {lr:g}")
    for name, value in (("n_grad", n_grad), ("n_proj", n_proj)):
        if value < 1:
            raise RuntimeError(f"{op}: {name} must be at least 1, got {value}")
    block_n, block_m = _blocks(cost)
    if block_n * block_m > _MAX_ELEMENTS:
        raise RuntimeError(
            f"{op}: the Triton backend takes problems of up to {_MAX_ELEMENTS} elements, N and M rounded up to powers "
            f"of two, got {list(cost.shape)}; the native backend takes any size"
        )


def _accumulate_dtype(cost: Tensor) -> torch.dtype:
    return torch.float64 if cost.dtype == torch.float64 else torch.float32


def _blocks(cost: Tensor) -> tuple[int, int]:
    return triton.next_power_of_2(max(cost.shape[-2], 1)), triton.next_power_of_2(max(cost.shape[-1], 1))


def _arguments(cost, init, num_templates, num_proposals, lr_tensor, lr):
    """What both kernels take: tensors (in place of an absent one any other, which is not read), sizes, constants."""
    cost = cost.contiguous()
    if lr_tensor is None:  # a float argument of a kernel would be rounded to single precision
        lr_tensor = torch.full((), lr, dtype=_accumulate_dtype(cost), device=cost.device)
    tensors = (
        cost,
        cost if init is None else init.contiguous(),
        cost if num_templates is None else num_templates.contiguous(),
        cost if num_proposals is None else num_proposals.contiguous(),
        lr_tensor.contiguous(),
        lr_tensor.dim(),
    )
    B = cost.shape[0] if cost.dim() == 3 else 1
    block_n, block_m = _blocks(cost)
    constants = dict(
        HAS_INIT=init is not None,
        RAGGED_N=num_templates is not None,
        RAGGED_M=num_proposals is not None,
        DTYPE=tl.float64 if cost.dtype == torch.float64 else tl.float32,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        num_warps=min(16, max(1, block_n * block_m // 1024)),
    )
    return tensors, (B, *cost.shape[-2:]), constants


@triton_op("dmm::match_triton", mutates_args={})
def _match(
    cost: Tensor,
    init: Tensor | None,
    num_templates: Tensor | None,
    num_proposals: Tensor | None,
    lr_tensor: Tensor | None,
    n_grad: int,
    n_proj: int,
    lr: float,
    carry: bool,
    last: bool,
) -> Tensor:
    _check("dmm::match", cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr)
    out = torch.empty_like(cost, memory_format=torch.contiguous_format)
    if cost.numel() > 0:
        tensors, sizes, constants = _arguments(cost, init, num_templates, num_proposals, lr_tensor, lr)
        _launchable(_forward_kernel)[(sizes[0],)](
            *tensors, out, *sizes, n_grad, n_proj, CARRY=carry, LAST=last, **constants
        )
    return out


@triton_op("dmm::match_backward_triton", mutates_args={})
def _match_backward(
    grad: Tensor,
    cost: Tensor,
    init: Tensor | None,
    num_templates: Tensor | None,
    num_proposals: Tensor | None,
    lr_tensor: Tensor | None,
    n_grad: int,
    n_proj: int,
    lr: float,
    carry: bool,
    last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "dmm::match_backward"
    _check(op, cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr)
    if grad.shape != cost.shape or grad.dtype != cost.dtype or grad.device != cost.device:
        raise RuntimeError(
            f"{op}: grad must have the shape, dtype and device of cost, got {list(grad.shape)}, {grad.dtype}"
        )
    grad_cost = torch.empty_like(cost, memory_format=torch.contiguous_format)
    grad_init = torch.empty_like(grad_cost)
    dtype = _accumulate_dtype(cost)
    grad_lr = cost.new_zeros(cost.shape[0] if cost.dim() == 3 else 1, dtype=dtype)
    if cost.numel() > 0:
        tensors, sizes, constants = _arguments(cost, init, num_templates, num_proposals, lr_tensor, lr)
        block_n, block_m = constants["BLOCK_N"], constants["BLOCK_M"]
        scratch_size = n_grad * (block_n * block_m + block_n + block_m) + n_proj * (block_n + block_m)
        programs = min(sizes[0], max(1, _MAX_SCRATCH // (scratch_size * dtype.itemsize)))
        scratch = cost.new_empty(programs * scratch_size, dtype=dtype)
        _launchable(_backward_kernel)[(programs,)](
            grad.contiguous(), *tensors, grad_cost, grad_init, grad_lr, scratch, scratch_size, *sizes, n_grad, n_proj,
            CARRY=carry, LAST=last, **constants,
        )  # fmt: skip
    return grad_cost, grad_init, grad_lr


def make_differentiable(op, backward_op, name: str, tensors: int, differentiable: tuple[int, ...]) -> None:
    """Give ``op`` the gradient that ``backward_op(grad, *args of op)`` computes, once.

    The first ``tensors`` arguments are tensors or None; ``backward_op`` returns the gradients of those in ``differentiable``,
    one number per problem for the step size (summed if it is a single one).
    """

    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = inputs[tensors:]

    def backward(ctx, grad: Tensor) -> tuple:
        saved = ctx.saved_tensors
        grads = [None] * (tensors + len(ctx.options))
        for i, g in zip(differentiable, backward_op(grad, *saved, *ctx.options), strict=True):
            if saved[i] is not None:
                grads[i] = g.sum() if saved[i].dim() == 0 else g
        return tuple(grads)

    def no_double_backward(ctx, *grads):
        raise RuntimeError(
            f"dmm::{name}_backward: the matching layer is differentiable once; a gradient of its gradient "
            f"(create_graph=True) is not available. Use dmm_fast.{name}(..., backend='reference') for that."
        )

    op.register_autograd(backward, setup_context=setup_context)
    backward_op.register_autograd(no_double_backward)


make_differentiable(_match, _match_backward, "match", tensors=5, differentiable=(0, 1, 4))


def match(
    cost: Tensor,
    init: Tensor | None = None,
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    n_grad: int = 40,
    n_proj: int = 5,
    lr: float = 0.1,
    carry: bool = False,
    last: bool = False,
) -> Tensor:
    """``torch.ops.dmm.match`` in Triton: same arguments, checks, result and gradients; up to 65,536 padded elements."""
    return _match(cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, carry, last)

"""The matching layer in Triton: one program per problem, all of it in registers (docs/matching.md derives it).

Serves CUDA tensors where the native CUDA library is not built; tensors of any device in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from dmm_fast.kernels import layer
from dmm_fast.kernels.gradient import Gradient
from dmm_fast.kernels.layer import less_unmatched, sizes_of
from torch import Tensor
from torch.library import triton_op


@triton.jit
def _project(x, y0, u, v, inv_n, inv_m, n, UNMATCHED: tl.constexpr):
    """One round of Dykstra's projections: x = relu(y0 - u - v). Absent rows and columns have an infinite dual."""
    d = (tl.sum(x, 1) - 1) * inv_m  # [N]; inv_m is 0 in absent rows
    if UNMATCHED:
        d = tl.maximum(d, -u)  # u stays >= 0
    s = tl.sum(x, 0) - tl.sum(d, 0) + n * v  # [M]
    u += d
    v = tl.maximum((s - 1) * inv_n, 0)
    return tl.maximum(y0 - u[:, None] - v[None, :], 0), u, v


@triton.jit
def _load(
    cost, init, num_templates, num_proposals, lr, lr_stride, own, own_stride, b, N, M, rows, columns,
    HAS_INIT: tl.constexpr, RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr, UNMATCHED: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Problem b: n, m, whether a count is out of range, its place and its mask, C, the start, lr C, lr, NaN or 0 for what is
    poisoned or not, 1/n, 1/m, and the duals to start from, infinite around the problem."""
    n, m, outside = sizes_of(num_templates, num_proposals, b, N, M, RAGGED_N, RAGGED_M)
    at = b * N * M + rows[:, None] * M + columns[None, :]
    valid = (rows < n)[:, None] & (columns < m)[None, :]
    rate = tl.load(lr + b * lr_stride)
    c = tl.load(cost + at, mask=valid, other=0).to(DTYPE)
    c = less_unmatched(c, own, own_stride, b, rows, n, valid, UNMATCHED)
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
    return n, m, outside, at, valid, c, x, step, rate, poison, inv_n, inv_m, u_start, v_start


@triton.jit
def _forward_kernel(
    cost, init, num_templates, num_proposals, lr, lr_stride, own, own_stride, out, B, N, M, n_grad, n_proj,
    HAS_INIT: tl.constexpr, RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr, UNMATCHED: tl.constexpr,
    CARRY: tl.constexpr, LAST: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    n, m, outside, at, valid, c, x, step, rate, poison, inv_n, inv_m, u_start, v_start = _load(
        cost, init, num_templates, num_proposals, lr, lr_stride, own, own_stride, b, N, M, rows, columns,
        HAS_INIT, RAGGED_N, RAGGED_M, UNMATCHED, DTYPE, BLOCK_N, BLOCK_M,
    )  # fmt: skip
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
            x, u, v = _project(x, y0, u, v, inv_n, inv_m, n.to(DTYPE), UNMATCHED)
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
    grad, cost, init, num_templates, num_proposals, lr, lr_stride, own, own_stride, grad_cost, grad_init, grad_lr, scratch, scratch_size,
    B, N, M, n_grad, n_proj,
    HAS_INIT: tl.constexpr, RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr, UNMATCHED: tl.constexpr,
    CARRY: tl.constexpr, LAST: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
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
        n, m, outside, at, valid, c, x, step, rate, poison, inv_n, inv_m, u_start, v_start = _load(
            cost, init, num_templates, num_proposals, lr, lr_stride, own, own_stride, b, N, M, rows, columns,
            HAS_INIT, RAGGED_N, RAGGED_M, UNMATCHED, DTYPE, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        g = tl.load(grad + at, mask=valid, other=0).to(DTYPE)
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
                x, u, v = _project(x, y0, u, v, inv_n, inv_m, n.to(DTYPE), UNMATCHED)

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
                x, u, v = _project(x, y0, u, v, inv_n, inv_m, n.to(DTYPE), UNMATCHED)
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
                if UNMATCHED:
                    du = tl.where(u > 0, du, tl.sum(ds, 0))
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
    unmatched_cost: Tensor | None = None,
) -> Tensor:
    problem = (cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, unmatched_cost)
    return layer.forward(_forward_kernel, "dmm::match", problem, dict(CARRY=carry, LAST=last), starts=True)


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
    unmatched_cost: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    def scratch(n: int, m: int) -> int:
        return n_grad * (n * m + n + m) + n_proj * (n + m)

    problem = (cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, unmatched_cost)
    options = dict(CARRY=carry, LAST=last)
    return layer.backward(_backward_kernel, "dmm::match_backward", grad, problem, options, True, scratch)


layer.make_differentiable(_match, _match_backward, Gradient("match", tensors=5, differentiable=(0, 1, 4)))


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
    unmatched_cost: Tensor | None = None,
) -> Tensor:
    """``torch.ops.dmm.match`` in Triton: same arguments, checks, result and gradients; up to 65,536 padded elements."""
    return _match(cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, carry, last, unmatched_cost)

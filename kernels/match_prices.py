"""The matching layer by Newton prices in Triton: one program per problem, all of it in registers (docs/variants.md,
"Newton prices, for a kernel", describes the algorithm; the names are the same).

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
def _sharpness(rate, step, n_grad, DTYPE: tl.constexpr):
    """t_k, k = 1 .. n_grad."""
    zero = tl.zeros([], DTYPE)
    share = (zero + step) / (zero + n_grad)
    return rate * ((zero + n_grad) * share * share * share)


@triton.jit
def _point(gain, a, b, DTYPE: tl.constexpr):
    """p = relu(-C - a - b), pos, and k_r and k_c, the numbers of entries in use, at least 1."""
    p = tl.maximum(gain - a[:, None] - b[None, :], 0)
    used = (p > 0).to(DTYPE)
    return p, p > 0, tl.maximum(tl.sum(used, 1), 1), tl.maximum(tl.sum(used, 0), 1)


@triton.jit
def _round(gain, a, b, e, UNMATCHED: tl.constexpr, DTYPE: tl.constexpr):
    """One Newton step for each price."""
    p, pos, row_count, column_count = _point(gain, a, b, DTYPE)
    d = (tl.sum(p, 1) - e) / row_count
    if UNMATCHED:
        d = tl.maximum(d, -a)  # a stays >= 0
    s = tl.sum(tl.where(pos, p - d[:, None], 0), 0)  # column sums after the row step
    return a + d, tl.maximum(b + (s - e) / column_count, 0)


@triton.jit
def _load(
    cost, own, own_stride, b, N, M, n, m, rate, outside, rows, columns, n_grad, UNMATCHED: tl.constexpr, DTYPE: tl.constexpr
):
    """C, -C with -infinity around the problem, row prices to begin with, and NaN for a poisoned problem, else 0."""
    valid = (rows < n)[:, None] & (columns < m)[None, :]
    c = tl.load(cost + b * N * M + rows[:, None] * M + columns[None, :], mask=valid, other=0).to(DTYPE)
    c = less_unmatched(c, own, own_stride, b, rows, n, valid, UNMATCHED)
    poison = tl.sum(tl.sum(c * 0, 1), 0) + rate * 0
    poison = tl.where(outside | (rate <= 0), float("nan"), poison)
    gain = tl.where(valid, -c, float("-inf"))
    best = tl.max(gain, 1)
    a = tl.where(best > float("-inf"), best, 0) - 1 / _sharpness(rate, 1, n_grad, DTYPE)  # every row buys
    if UNMATCHED:
        a = tl.maximum(a, 0)
    return c, gain, a, poison


@triton.jit
def _forward_kernel(
    cost, num_templates, num_proposals, lr, lr_stride, own, own_stride, out, B, N, M, n_grad, n_proj,
    RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr, UNMATCHED: tl.constexpr, LAST: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    n, m, outside = sizes_of(num_templates, num_proposals, problem, N, M, RAGGED_N, RAGGED_M)
    rate = tl.load(lr + problem * lr_stride)
    c, gain, a, poison = _load(  # the first step forgets a
        cost, own, own_stride, problem, N, M, n, m, rate, outside, rows, columns, n_grad, UNMATCHED, DTYPE
    )
    b = tl.zeros([BLOCK_M], DTYPE)
    total = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
    for k in range(n_grad):
        t = _sharpness(rate, k + 1, n_grad, DTYPE)
        for _ in range(n_proj):
            a, b = _round(gain, a, b, 1 / t, UNMATCHED, DTYPE)
        if not LAST:
            total += t * tl.maximum(gain - a[:, None] - b[None, :], 0)
    if LAST:
        total = _sharpness(rate, n_grad, n_grad, DTYPE) * tl.maximum(gain - a[:, None] - b[None, :], 0)
    else:
        total = total / (tl.zeros([], DTYPE) + n_grad)
    valid = (rows < n)[:, None] & (columns < m)[None, :]
    inside = (rows < N)[:, None] & (columns < M)[None, :]
    at = problem * N * M + rows[:, None] * M + columns[None, :]
    total = tl.where(valid | outside, total + poison, 0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, cost, num_templates, num_proposals, lr, lr_stride, own, own_stride, grad_cost, grad_lr, scratch, scratch_size,
    B, N, M, n_grad, n_proj,
    RAGGED_N: tl.constexpr, RAGGED_M: tl.constexpr, UNMATCHED: tl.constexpr, LAST: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Forward, keeping the prices before every round in scratch; then back: the prices give pos and col."""
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    prices: tl.constexpr = BLOCK_N + BLOCK_M  # a, b
    zero = tl.zeros([], tl.int64)
    mine = scratch + (zero + tl.program_id(0)) * scratch_size
    for which in range(tl.program_id(0), B, tl.num_programs(0)):
        problem = zero + which
        n, m, outside = sizes_of(num_templates, num_proposals, problem, N, M, RAGGED_N, RAGGED_M)
        rate = tl.load(lr + problem * lr_stride)
        c, gain, a, poison = _load(  # the first step forgets a
            cost, own, own_stride, problem, N, M, n, m, rate, outside, rows, columns, n_grad, UNMATCHED, DTYPE
        )
        b = tl.zeros([BLOCK_M], DTYPE)
        kept = mine
        for k in range(n_grad):
            e = 1 / _sharpness(rate, k + 1, n_grad, DTYPE)
            for _ in range(n_proj):
                tl.store(kept + rows, a)
                tl.store(kept + BLOCK_N + columns, b)
                kept += prices
                a, b = _round(gain, a, b, e, UNMATCHED, DTYPE)

        valid = (rows < n)[:, None] & (columns < m)[None, :]
        inside = (rows < N)[:, None] & (columns < M)[None, :]
        at = problem * N * M + rows[:, None] * M + columns[None, :]
        g = tl.load(grad + at, mask=valid, other=0).to(DTYPE)
        if not LAST:
            g = g / (tl.zeros([], DTYPE) + n_grad)
        tl.debug_barrier()  # what this program stored, other threads of it read
        after = gain - a[:, None] - b[None, :] > 0
        dcost = tl.zeros([BLOCK_N, BLOCK_M], DTYPE)
        da = tl.zeros([BLOCK_N], DTYPE)
        db = tl.zeros([BLOCK_M], DTYPE)
        for k_back in range(n_grad):
            weight = _sharpness(rate, n_grad - k_back, n_grad, DTYPE)
            if LAST:
                weight = tl.where(k_back == 0, weight, 0)
            h = tl.where(after, weight * g, 0)
            dcost -= h
            da -= tl.sum(h, 1)
            db -= tl.sum(h, 0)
            for _ in range(n_proj):
                row, col = a > 0, b > 0  # of the round that led to a and b
                kept -= prices
                a = tl.load(kept + rows)
                b = tl.load(kept + BLOCK_N + columns)
                p, after, row_count, column_count = _point(gain, a, b, DTYPE)
                db = tl.where(col, db, 0)
                ds = db / column_count
                through_columns = tl.sum(tl.where(after, ds[None, :], 0), 1)
                if UNMATCHED:
                    da = tl.where(row, da, through_columns)  # a price held at 0 forgets the one before
                dd = (da - through_columns) / row_count
                h = tl.where(after, ds[None, :] + dd[:, None], 0)
                dcost -= h
                da -= tl.sum(h, 1)
                db -= tl.sum(h, 0)
        dlr = tl.sum(tl.sum(dcost * c, 1), 0) / rate  # X depends on lr C alone
        dcost = tl.where(valid | outside, dcost + poison, 0)
        tl.store(grad_cost + at, dcost.to(grad_cost.dtype.element_ty), mask=inside)
        tl.store(grad_lr + problem, tl.where((n > 0) | outside, dlr + poison, 0))
        tl.debug_barrier()


@triton_op("dmm::match_prices_triton", mutates_args={})
def _match_prices(
    cost: Tensor,
    num_templates: Tensor | None,
    num_proposals: Tensor | None,
    lr_tensor: Tensor | None,
    n_grad: int,
    n_proj: int,
    lr: float,
    last: bool,
    unmatched_cost: Tensor | None = None,
) -> Tensor:
    problem = (cost, None, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, unmatched_cost)
    return layer.forward(_forward_kernel, "dmm::match_prices", problem, dict(LAST=last), starts=False)


@triton_op("dmm::match_prices_backward_triton", mutates_args={})
def _match_prices_backward(
    grad: Tensor,
    cost: Tensor,
    num_templates: Tensor | None,
    num_proposals: Tensor | None,
    lr_tensor: Tensor | None,
    n_grad: int,
    n_proj: int,
    lr: float,
    last: bool,
    unmatched_cost: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    def scratch(n: int, m: int) -> int:
        return n_grad * n_proj * (n + m)

    problem = (cost, None, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, unmatched_cost)
    return layer.backward(_backward_kernel, "dmm::match_prices_backward", grad, problem, dict(LAST=last), False, scratch)


layer.make_differentiable(_match_prices, _match_prices_backward, Gradient("match_prices", tensors=4, differentiable=(0, 3)))


def match_prices(
    cost: Tensor,
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    lr_tensor: Tensor | None = None,
    n_grad: int = 40,
    n_proj: int = 1,
    lr: float = 10.0,
    last: bool = True,
    unmatched_cost: Tensor | None = None,
) -> Tensor:
    """``torch.ops.dmm.match_prices`` in Triton: same arguments, checks, result and gradients; up to 65,536 padded
    elements."""
    return _match_prices(cost, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, last, unmatched_cost)

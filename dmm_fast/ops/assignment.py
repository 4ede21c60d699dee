"""``dmm_fast.linear_assignment``: exact decisions in batches, ``torch.ops.dmm.linear_assignment`` below it (docs/assignment.md);
and what decides by it: ``hungarian``, ``assign``."""

from __future__ import annotations

import torch
from torch import Tensor

from dmm_fast.ops import library, reference
from dmm_fast.ops.layer import _merge_batch, _split_batch

library.refuse_without_cuda("linear_assignment", "linear_assignment_duals")


def linear_assignment(
    cost: Tensor,
    *,
    unmatched_cost: float | Tensor | None = None,
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    return_duals: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The least-cost assignment of templates to proposals, exactly: minimise sum_ij C_ij X_ij over X in {0, 1}, rows <= 1,
    columns <= 1, with as many matches as there can be.

    Args:
        cost: C, ``[N, M]`` or ``[B, N, M]`` (N templates, M proposals), float32, float64, float16 or bfloat16, either side
            the longer one. Any strides. A pair whose cost is infinite or NaN is forbidden. Forbid with infinity, not with a huge
            number: float64 costs above 1e307 overflow where they are added up, and may then count as forbidden.
        unmatched_cost: c, a finite number, or a tensor ``[]``, ``[N]`` or ``[B, N]``, float32 (float64 for a float64 cost). Then any template may stay
            alone at this cost: minimise sum_ij C_ij X_ij + sum_i c_i (1 - sum_j X_ij). Of equally good decisions one
            with the most matches is taken. None: most matches first, then the least cost.
        num_templates, num_proposals: int64 ``[B]``: problem b is ``cost[b, :num_templates[b], :num_proposals[b]]``. Padding
            may hold anything.
        return_duals: also return prices, which prove the optimum.

    Returns:
        The proposal of each template, ``[N]`` or ``[B, N]`` int64; -1: unmatched, and in padding. No gradient: to learn through
        an assignment, take ``match``.
        With return_duals a tuple of that, a (prices of templates, ``[N]`` or ``[B, N]``) and b (prices of proposals, ``[M]`` or
        ``[B, M]``), float32 (float64 for a float64 cost), 0 in padding. Up to rounding, C_ij >= a_i + b_j, equal where i has j.
        Templates without a proposal all have the price that is the highest of a, proposals without a template that which is
        the highest of b. With unmatched_cost: a_i <= c_i, equal where i stays alone; b_j <= 0, equal where j is left.

    Sums of costs are formed in float64, whatever the dtype. The same input gives the same result; which of several equally
    good ones is not specified otherwise, and CPU and CUDA agree unless rounding decides. On CUDA the op does not wait for the
    device: counts out of range, or an unmatched_cost that is not finite, give -1 and prices NaN throughout the problem there.

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit; on the CPU also counts out of range and an unmatched_cost that
            is not finite. ValueError: a number as unmatched_cost that is not finite. TypeError: no tensor, or counts in a list.
    """
    reference.check_tensor("linear_assignment", cost)
    reference.check_counts("linear_assignment", num_templates, num_proposals)
    own = reference.unmatched_costs("linear_assignment", cost, unmatched_cost)
    op = torch.ops.dmm.linear_assignment_duals if return_duals else torch.ops.dmm.linear_assignment
    own = None if own is None else own.detach()
    return op(cost.detach(), own, num_templates, num_proposals)  # the prices have no gradient either


def hungarian(
    cost: Tensor,
    *,
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    unmatched_cost: float | Tensor | None = None,
) -> Tensor:
    """Optimal one-to-one assignment: ``linear_assignment`` as a matrix like ``cost``. 0/1, no gradient; a problem with a non-finite
    cost is NaN throughout, and on CUDA also one with a count out of range or an unmatched_cost that is not finite."""
    batched = reference._batched("hungarian", cost).detach()
    reference.check_counts("hungarian", num_templates, num_proposals)
    own = reference.unmatched_costs("hungarian", cost, unmatched_cost)
    choice, broken, valid = _decide(batched, own, num_templates, num_proposals)
    x = (choice[..., None] == torch.arange(cost.shape[-1], device=cost.device)).to(cost.dtype)  # [B, N, M]
    return x.masked_fill(broken & valid, torch.nan).reshape(cost.shape)


def assign(
    assignment: Tensor,
    *,
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    unmatched: bool = False,
) -> Tensor:
    """Round X to a decision: for each template the proposal that ``linear_assignment`` picks on -X; -1 where X is 0 there, where
    none is left, beyond ``num_templates``, and throughout a problem that is not finite.

    ``[N, M] -> [N]`` or ``[B, N, M] -> [B, N]``, int64. Decides better than the row argmax when proposals duplicate each other.
    unmatched: X comes from a layer with ``unmatched_cost``, so what a row lacks of 1 speaks for leaving its template alone.
    """
    batched = reference._batched("assign", assignment).detach()
    reference.check_counts("assign", num_templates, num_proposals)
    own = None
    if unmatched:
        real = batched.where(reference._valid("assign", batched, num_templates, num_proposals)[0], 0)
        lacking = (1 - real.sum(2, dtype=reference.accumulate_dtype(batched))).clamp(min=0)
        own = -lacking.nan_to_num(0, 0, 0)  # what is not finite is refused below
    choice, broken, _ = _decide(-batched, own, num_templates, num_proposals)
    if assignment.shape[-1]:
        value = batched.gather(2, choice.clamp(min=0)[..., None])[..., 0]  # [B, N]
        choice = choice.masked_fill(broken[..., 0] | ~(value > 0), -1)
    return choice.reshape(assignment.shape[:-1])


def _decide(
    cost: Tensor, own: Tensor | None, num_templates: Tensor | None, num_proposals: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The choice [B, N] for costs [B, N, M], ``own`` of staying alone; which problems are not finite, or have a count out of
    range, [B, 1, 1]; and what is not padding. Without the CUDA library the CPU decides for a GPU."""
    given: tuple[Tensor | None, ...] = (cost, None if own is None else own.detach(), num_templates, num_proposals)
    if cost.is_cuda and library.CUDA_MISSING is not None:
        given = tuple(None if tensor is None else tensor.cpu() for tensor in given)
    choice = torch.ops.dmm.linear_assignment(*given).to(cost.device)
    valid, broken = reference._valid("linear_assignment", cost, num_templates, num_proposals)
    broken = broken | (valid & ~cost.isfinite()).any(2, keepdim=True).any(1, keepdim=True)
    if own is not None:
        broken = broken | (valid.any(2, keepdim=True) & ~own.isfinite()[..., None]).any(1, keepdim=True)
    return choice, broken, valid


# ---- what torch needs to know ----


@torch.library.register_fake("dmm::linear_assignment")
def _choice(cost, unmatched_cost=None, num_templates=None, num_proposals=None):
    torch._check(
        cost.dim() in (2, 3), lambda: f"dmm::linear_assignment: cost must have shape [B, N, M] or [N, M], got {cost.shape}"
    )
    return cost.new_empty(cost.shape[:-1], dtype=torch.int64)


@torch.library.register_fake("dmm::linear_assignment_duals")
def _choice_and_prices(cost, unmatched_cost=None, num_templates=None, num_proposals=None):
    choice = _choice(cost)
    dtype = reference.accumulate_dtype(cost)
    return choice, cost.new_empty(choice.shape, dtype=dtype), cost.new_empty((*cost.shape[:-2], cost.shape[-1]), dtype=dtype)


def _vmap(op):
    def rule(info, in_dims, *args):
        tensors = (*args, *[None] * (4 - len(args)))
        merged, batch = _merge_batch(info, (*in_dims, *[None] * (4 - len(in_dims))), tensors, (2, 1, 0, 0))
        results = op(*merged)
        if isinstance(results, Tensor):
            return _split_batch(info, batch, results), 0
        return tuple(_split_batch(info, batch, result) for result in results), (0, 0, 0)

    return rule


for _name in ("linear_assignment", "linear_assignment_duals"):
    torch.library.register_vmap(f"dmm::{_name}", _vmap(getattr(torch.ops.dmm, _name).default))

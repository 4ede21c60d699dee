"""``dmm_fast.match`` and ``dmm_fast.match_prices``: the differentiable assignment layers, and ``torch.ops.dmm`` below them.

minimise Tr(C X^T) over row sums = 1, column sums <= 1, X >= 0 (Eq. 3): by projected gradient with Dykstra's projections
(Algorithm 1), in the dual form of docs/matching.md, or by the Newton prices of docs/variants.md.
"""

from __future__ import annotations

from torch import Tensor

from dmm_fast.ops import library, reference
from dmm_fast.ops.layer import Layer, refuse_forward_mode

_match = Layer("match", item_dims=(2, 2, 0, 0, 0), differentiable=(0, 1, 4))
_match_prices = Layer("match_prices", item_dims=(2, 0, 0, 0), differentiable=(0, 3))


def match(
    cost: Tensor,
    init: Tensor | None = None,
    *,
    n_grad: int = 40,
    n_proj: int = 5,
    lr: float | Tensor = 0.1,
    dykstra: str = "reset",
    output: str = "average",
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    unmatched_cost: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Assign templates to proposals: a differentiable, approximate solution of the linear assignment problem (Algorithm 1).

    Args:
        cost: C, ``[N, M]`` or ``[B, N, M]`` (N templates, M proposals), float32, float64, float16 or bfloat16 (half precision
            is computed in float32). Any strides.
        init: the start X^0, like ``cost``. None: zeros (the result equals that of the uniform start 1/M).
        n_grad: gradient steps, N_grad >= 1. The paper uses 40 on video and 400 in its study.
        n_proj: rounds of Dykstra's projections per step, N_proj >= 1 (5 and 50).
        lr: step size alpha, positive (0.1 and 0.01). A tensor ``[]`` or ``[B]`` in float32 (float64 for a float64 cost) gets a gradient.
        dykstra: "reset" is Algorithm 1, "carry" is Listing 1: Dykstra's corrections are carried from step to step, and the
            start counts in the average. "released" (the authors' code) exists with backend="reference" only.
        output: "average" of the iterates (the paper), or the "last" iterate, which is closer to the optimum.
        num_templates, num_proposals: int64 ``[B]``: problem b is ``cost[b, :num_templates[b], :num_proposals[b]]``. Padding
            may hold anything; X and gradients are 0 there.
        unmatched_cost: c, a finite number, or a tensor ``[]``, ``[N]`` or ``[B, N]`` in float32 (float64 for a float64 cost), which
            gets a gradient. Then template i may stay alone at cost c_i: minimise sum_ij C_ij X_ij + sum_i c_i (1 - sum_j X_ij) with row sums
            <= 1. None: every template takes a proposal.
        backend: "native" (C++/CUDA), "triton" (CUDA tensors), "reference" (plain PyTorch), or "auto": native, and Triton for
            CUDA tensors where the CUDA library is not built (``dmm_fast.build_info()`` tells).

    Returns:
        X, like ``cost``, contiguous. With n_proj = 5 it is not feasible yet: row sums reach 1.3 to 1.7 (``feasibility``
        measures it); use ``mask_confident`` for the paper's soft decision and ``assign`` for a hard one.
        A problem with anything non-finite in it is NaN throughout and leaves the others alone.

    Differentiable once in cost, init, lr and unmatched_cost, in reverse mode; nothing but the inputs is kept for the backward.

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit, counts out of range or an unmatched_cost that is not finite (on
            CUDA, where looking would cost a synchronisation, such a problem comes back as NaN instead), derivatives in forward
            mode (other than with backend="reference"). ValueError: an unknown option, or a number as unmatched_cost that is not
            finite. TypeError: no tensor, or counts in a list.
    """
    reference.check_tensor("match", cost)
    reference.check_counts("match", num_templates, num_proposals)
    if backend == "reference":
        return reference.match(
            cost, init, n_grad=n_grad, n_proj=n_proj, lr=lr, dykstra=dykstra, output=output, num_templates=num_templates,
            num_proposals=num_proposals, unmatched_cost=unmatched_cost,
        )  # fmt: skip
    if dykstra != "reset" and dykstra != "carry":
        raise ValueError(f'match: dykstra must be "reset" or "carry" (or "released" with backend="reference"), got {dykstra!r}')
    if output != "average" and output != "last":
        raise ValueError(f'match: output must be "average" or "last", got {output!r}')
    lr_tensor = lr if isinstance(lr, Tensor) else None
    rate = 0.0 if lr_tensor is not None else lr
    own = reference.unmatched_costs("match", cost, unmatched_cost)
    args = (
        cost,
        init,
        num_templates,
        num_proposals,
        lr_tensor,
        n_grad,
        n_proj,
        rate,
        dykstra == "carry",
        output == "last",
        own,
    )
    refuse_forward_mode("match", args)
    if backend != "auto":
        library.check_backend("match", cost, backend)
        if backend == "triton":
            from dmm_fast.kernels.match import match as match_triton

            return match_triton(*args)
    return _match(args)


def match_prices(
    cost: Tensor,
    *,
    n_grad: int = 40,
    n_proj: int = 1,
    lr: float | Tensor = 10.0,
    output: str = "last",
    num_templates: Tensor | None = None,
    num_proposals: Tensor | None = None,
    unmatched_cost: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Decide nearly like the Hungarian method at two fifths of ``match``'s work: Newton prices (docs/variants.md).

    A price per template and one per proposal, moved by Newton steps while the sharpness t_k = n_grad lr (k / n_grad)^3 grows;
    X^k = t_k relu(-C - a - b). Where templates compete for a proposal, the row argmax of the last iterate is the optimum in
    .99 of video-like problems (``match``: .3).

    Args:
        cost: C, ``[N, M]`` or ``[B, N, M]``, as for ``match``.
        n_grad: steps of sharpness. With as many templates as proposals take 80 or more.
        n_proj: Newton steps per step of sharpness; 1 is enough.
        lr: sharpness over n_grad, positive, in units of 1 / cost: 10 suits costs that span 1. Costs that differ by less than
            1 / (n_grad lr) are shared. A tensor ``[]`` or ``[B]`` in float32 (float64 for a float64 cost) gets a gradient.
        output: the "last" iterate, to decide: 0/1 almost everywhere, so hardly a gradient. The "average" has one: to learn
            through it, take lr 1 to 4.
        num_templates, num_proposals, unmatched_cost, backend: as for ``match``.

    Returns:
        X, like ``cost``, contiguous. A problem with anything non-finite in it, or an lr tensor that is not positive, is NaN
        throughout and leaves the others alone.

    Differentiable once in cost, lr and unmatched_cost, in reverse mode; nothing but the inputs is kept for the backward.

    Raises:
        RuntimeError, ValueError, TypeError: as ``match``.
    """
    reference.check_tensor("match_prices", cost)
    reference.check_counts("match_prices", num_templates, num_proposals)
    if backend == "reference":
        return reference.match_prices(
            cost, n_grad=n_grad, n_proj=n_proj, lr=lr, output=output, num_templates=num_templates,
            num_proposals=num_proposals, unmatched_cost=unmatched_cost,
        )  # fmt: skip
    if output != "average" and output != "last":
        raise ValueError(f'match_prices: output must be "average" or "last", got {output!r}')
    lr_tensor = lr if isinstance(lr, Tensor) else None
    rate = 0.0 if lr_tensor is not None else lr
    own = reference.unmatched_costs("match_prices", cost, unmatched_cost)
    args = (cost, num_templates, num_proposals, lr_tensor, n_grad, n_proj, rate, output == "last", own)
    refuse_forward_mode("match_prices", args)
    if backend != "auto":
        library.check_backend("match_prices", cost, backend)
        if backend == "triton":
            from dmm_fast.kernels.match_prices import match_prices as match_prices_triton

            return match_prices_triton(*args)
    return _match_prices(args)

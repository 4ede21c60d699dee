"""``dmm_fast.match``: the differentiable assignment layer, and ``torch.ops.dmm.match`` below it.

minimise Tr(C X^T) over row sums = 1, column sums <= 1, X >= 0 (Eq. 3), by projected gradient with Dykstra's projections
(Algorithm 1), in the dual form of docs/matching.md. The native libraries hold the kernels; this file teaches torch the rest:
shapes without data (fake kernels), the gradient, autocast and vmap.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _library, reference

_library.let_triton_serve("match", "match_backward")

_match = torch.ops.dmm.match.default
_match_backward = torch.ops.dmm.match_backward.default

_below_autograd = torch._C._AutoDispatchBelowAutograd
_in_functorch = torch._C._are_functorch_transforms_active
_in_autocast = torch.is_autocast_enabled
_is_compiling = torch.compiler.is_compiling

BACKENDS = ("auto", "native", "triton", "reference")


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
    backend: str = "auto",
) -> Tensor:
    """Assign templates to proposals: a differentiable, approximate solution of the linear assignment problem (Algorithm 1).

    Args:
        cost: C, ``[N, M]`` or ``[B, N, M]`` (N templates, M proposals), float32, float64, float16 or bfloat16 (half precision
            is computed in float32). Any strides.
        init: the start X^0, like ``cost``. None: zeros (the result equals that of the uniform start 1/M).
        n_grad: gradient steps, N_grad >= 1. The paper uses 40 on video and 400 in its study.
        n_proj: rounds of Dykstra's projections per step, N_proj >= 1 (5 and 50).
        lr: step size alpha (0.1 and 0.01). A tensor ``[]`` or ``[B]`` in float32 (float64 for a float64 cost) gets a gradient.
        dykstra: "reset" is Algorithm 1, "carry" is Listing 1: Dykstra's corrections are carried from step to step, and the
            start counts in the average. "released" (the authors' code) exists with backend="reference" only.
        output: "average" of the iterates (the paper), or the "last" iterate, which is closer to the optimum.
        num_templates, num_proposals: int64 ``[B]``: problem b is ``cost[b, :num_templates[b], :num_proposals[b]]``. Padding
            may hold anything; X and gradients are 0 there.
        backend: "native" (C++/CUDA), "triton" (CUDA tensors), "reference" (plain PyTorch), or "auto": native, and Triton for
            CUDA tensors where the CUDA library is not built (``dmm_fast.build_info()`` tells).

    Returns:
        X, like ``cost``, contiguous. With n_proj = 5 it is not feasible yet: row sums reach 1.3 to 1.7 (``feasibility``
        measures it); use ``mask_confident`` for the paper's soft decision and ``assign`` for a hard one.
        A problem with anything non-finite in it is NaN throughout and leaves the others alone.

    Differentiable once in cost, init and lr; nothing but the inputs is kept for the backward.

    Raises:
        RuntimeError: shapes, dtypes or devices that don't fit, counts out of range (on CUDA, where looking would cost a
            synchronisation, such a problem comes back as NaN instead). ValueError: an unknown option.
    """
    if backend == "reference":
        return reference.match(
            cost, init, n_grad=n_grad, n_proj=n_proj, lr=lr, dykstra=dykstra, output=output, num_templates=num_templates,
            num_proposals=num_proposals,
        )  # fmt: skip
    if dykstra != "reset" and dykstra != "carry":
        raise ValueError(f'match: dykstra must be "reset" or "carry" (or "released" with backend="reference"), got {dykstra!r}')
    if output != "average" and output != "last":
        raise ValueError(f'match: output must be "average" or "last", got {output!r}')
    lr_tensor = lr if isinstance(lr, Tensor) else None
    rate = 0.0 if lr_tensor is not None else lr
    args = (cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, rate, dykstra == "carry", output == "last")
    if backend != "auto" and backend != "native":
        if backend != "triton":
            raise ValueError(f"match: backend must be one of {BACKENDS}, got {backend!r}")
        from .kernels.match import match as match_triton

        return match_triton(*args)
    if backend == "native" and cost.is_cuda and _library.CUDA_MISSING is not None:
        raise RuntimeError(f"match: backend='native' on a CUDA tensor, but the CUDA library is {_library.CUDA_MISSING}")
    if _is_compiling() or _in_autocast("cpu") or _in_autocast("cuda"):
        return _match(*args)
    if torch.is_grad_enabled() and (
        cost.requires_grad
        or (init is not None and init.requires_grad)
        or (lr_tensor is not None and lr_tensor.requires_grad)
    ):
        function = _TransformableMatch if _in_functorch() else _Match
        return function.apply(*args)
    return _call(_match, args)


def _call(op, args: tuple):
    """Call an op below torch's autograd layer, where neither a gradient nor a function transform can want that layer: in Python
    it costs some 4 us forward and 35 us with backward."""
    if _in_functorch():
        return op(*args)
    with _below_autograd():
        return op(*args)


# ---- what torch needs to know ----


def _setup_context(ctx, inputs, output):
    *tensors, ctx.options = inputs[:5] + (inputs[5:],)
    ctx.save_for_backward(*tensors)


def _backward(call, ctx, grad: Tensor) -> tuple:
    """The gradients of dmm::match's ten arguments, through ``call(args of dmm::match_backward)``."""
    saved = ctx.saved_tensors
    init, lr_tensor = saved[1], saved[4]
    grad_cost, grad_init, grad_lr = call((grad, *saved, *ctx.options))
    if lr_tensor is None:
        grad_lr = None
    elif lr_tensor.dim() == 0:
        grad_lr = grad_lr.sum()
    return grad_cost, None if init is None else grad_init, None, None, grad_lr, None, None, None, None, None


class _Match(torch.autograd.Function):
    """The gradient of dmm::match in eager mode; compiled and exported graphs use the op's own, registered below."""

    @staticmethod
    def forward(ctx, *args):
        _setup_context(ctx, args, None)
        return _call(_match, args)

    @staticmethod
    def backward(ctx, grad):
        def call(args):
            if torch.is_grad_enabled():  # create_graph=True: record, and refuse, the second derivative
                return _MatchBackward.apply(*args)
            return _call(_match_backward, args)

        return _backward(call, ctx, grad)


class _TransformableMatch(_Match):
    """The same for torch.func, in the form it asks for (twice as slow to enter)."""

    generate_vmap_rule = True
    setup_context = staticmethod(_setup_context)

    @staticmethod
    def forward(*args):
        return _match(*args)


class _MatchBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args):
        return _call(_match_backward, args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        _no_double_backward(ctx, *grads)


@torch.library.register_fake("dmm::match")
def _(cost, init=None, num_templates=None, num_proposals=None, lr_tensor=None, n_grad=40, n_proj=5, lr=0.1, carry=False,
      last=False):  # fmt: skip
    torch._check(cost.dim() in (2, 3), lambda: f"dmm::match: cost must have shape [B, N, M] or [N, M], got {cost.shape}")
    return torch.empty_like(cost, memory_format=torch.contiguous_format)


@torch.library.register_fake("dmm::match_backward")
def _(grad, cost, init, num_templates, num_proposals, lr_tensor, n_grad, n_proj, lr, carry, last):
    accumulate = torch.float64 if cost.dtype == torch.float64 else torch.float32
    like_cost = torch.empty_like(cost, memory_format=torch.contiguous_format)
    batch = cost.shape[0] if cost.dim() == 3 else 1
    return like_cost, torch.empty_like(like_cost), cost.new_empty(batch, dtype=accumulate)


torch.library.register_autograd(
    "dmm::match",
    lambda ctx, grad: _backward(lambda args: _match_backward(*args), ctx, grad),
    setup_context=_setup_context,
)


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        "dmm::match_backward: the matching layer is differentiable once; a gradient of its gradient (create_graph=True) is "
        "not available. Use dmm_fast.match(..., backend='reference') for that."
    )


torch.library.register_autograd("dmm::match_backward", _no_double_backward)


for _device in ("cpu", "cuda"):  # like softmax: float32 inside autocast
    torch.library.register_autocast("dmm::match", _device, torch.float32)


def _merge_batch(info, in_dims: tuple, tensors: tuple, item_dims: tuple) -> tuple[list, int]:
    """vmap's dimension V joined with the batch B: every tensor as ``[V * B, ...]``, and B (0: the problems had no batch)."""
    shape = list(tensors[0].shape)
    if in_dims[0] is not None:
        del shape[in_dims[0]]
    batch = shape[0] if len(shape) == 3 else 0
    merged = []
    for tensor, dim, item in zip(tensors, in_dims, item_dims):
        if tensor is not None:
            tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            if tensor.dim() == item + 1:  # no batch in it: [V, ...] -> [V, B, ...]
                tensor = tensor.unsqueeze(1).expand(-1, max(batch, 1), *tensor.shape[1:])
            tensor = tensor.reshape(info.batch_size * max(batch, 1), *tensor.shape[2:])
        merged.append(tensor)
    return merged, batch


@torch.library.register_vmap("dmm::match")
def _(info, in_dims, *args):
    merged, batch = _merge_batch(info, in_dims[:5], args[:5], (2, 2, 0, 0, 0))
    x = torch.ops.dmm.match(*merged, *args[5:])
    return x.unflatten(0, (info.batch_size, batch)) if batch else x, 0


@torch.library.register_vmap("dmm::match_backward")
def _(info, in_dims, *args):
    merged, batch = _merge_batch(info, in_dims[:6], args[:6], (2, 2, 2, 0, 0, 0))
    grad_cost, grad_init, grad_lr = torch.ops.dmm.match_backward(*merged, *args[6:])
    if batch:
        grad_cost, grad_init = (g.unflatten(0, (info.batch_size, batch)) for g in (grad_cost, grad_init))
    return (grad_cost, grad_init, grad_lr.unflatten(0, (info.batch_size, max(batch, 1)))), (0, 0, 0)

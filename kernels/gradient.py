"""Gradients of ops that are Triton's or native ones, for both: ``dmm_fast.ops`` takes them from here too."""

from __future__ import annotations

from torch import Tensor


class Gradient:
    """What autograd needs of the op ``dmm::<name>``, which is differentiable once.

    Its first ``tensors`` arguments are tensors or None, and so is the last, ``unmatched_cost``; options are between. The backward
    op takes the gradient and the op's arguments, and returns gradients of those in ``differentiable``: the cost first, the step
    size (one number per problem) last. That of ``unmatched_cost`` follows from the cost's.
    """

    def __init__(self, name: str, tensors: int, differentiable: tuple[int, ...]):
        self.name = name
        self.tensors = tensors
        self.differentiable = differentiable

    def setup_context(self, ctx, inputs, output):
        ctx.options = inputs[self.tensors : -1]
        ctx.save_for_backward(*inputs[: self.tensors], inputs[-1])

    def backward(self, call, ctx, grad: Tensor) -> tuple:
        """The gradients of all the op's arguments, through ``call(args of the backward op)``."""
        *saved, unmatched = ctx.saved_tensors
        grads = [None] * (self.tensors + len(ctx.options) + 1)
        given, own = (grad, *saved), unmatched is not None and ctx.needs_input_grad[len(grads) - 1]
        if own:  # sums of what is rounded to half precision would be off
            given = [t if t is None or t.dtype != grad.dtype else t.to(unmatched.dtype) for t in given]
        results = call((*given, *ctx.options, unmatched))
        for i, g in zip(self.differentiable, results, strict=True):
            if saved[i] is not None:
                grads[i] = g.sum() if saved[i].dim() == 0 else g
                grads[i] = grads[i].to(saved[i].dtype) if own else grads[i]
        if own:
            rows = results[0].sum(-1, dtype=unmatched.dtype)
            grads[-1] = -(rows.sum(0) if rows.dim() > unmatched.dim() else rows)
        return tuple(grads)

    def refuse_second(self, ctx, *grads):
        raise RuntimeError(
            f"dmm::{self.name}_backward: the matching layer is differentiable once; a gradient of its gradient "
            f"(create_graph=True) is not available. Use dmm_fast.{self.name}(..., backend='reference') for that."
        )


def setup_bias_clamp(ctx, inputs, output):
    ctx.save_for_backward(output)
    x, _, residual, ctx.low, ctx.high = inputs
    ctx.x, ctx.residual = x.shape, None if residual is None else residual.shape


def bias_clamp_gradient(ctx, grad: Tensor) -> tuple:
    """It is 0 where the result is one of the limits."""
    (out,) = ctx.saved_tensors
    grad = grad * ((out > ctx.low) & (out < ctx.high))
    of_residual = None if ctx.residual is None else grad.sum_to_size(ctx.residual)
    return grad.sum_to_size(ctx.x), grad.sum((0, 2, 3)), of_residual, None, None

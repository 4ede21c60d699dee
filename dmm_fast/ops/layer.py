"""What torch needs to know about an op with a backward op: its gradient, shapes without data (fake kernels), autocast, vmap.

The native libraries hold ``dmm::<name>`` and ``dmm::<name>_backward``, matching layers whose first argument is the cost.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dmm_fast.kernels.gradient import Gradient
from dmm_fast.ops import library, reference

_below_autograd = torch._C._AutoDispatchBelowAutograd
_in_functorch = torch._C._are_functorch_transforms_active
_in_autocast = torch.is_autocast_enabled
_is_compiling = torch.compiler.is_compiling


def transforming() -> bool:
    """Whether a call is inside torch.func, which takes an op's gradient from `transformable` only."""
    return not _is_compiling() and _in_functorch() and not (_in_autocast("cpu") or _in_autocast("cuda"))


def transformable(op, setup, gradient) -> type[torch.autograd.Function]:
    """An op and its gradient in the form that torch.func asks for (twice as slow to enter as the older one)."""

    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        setup_context = staticmethod(setup)
        backward = staticmethod(gradient)

        @staticmethod
        def forward(*args):
            return op(*args)

    return Function


class _Forward(torch.autograd.Function):
    """Nothing, but torch asks it for a derivative in forward mode where one of the tensors has a tangent, at any level."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, *tensors):
        return torch.zeros(())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_NO_FORWARD_MODE.format(ctx.name))


_NO_FORWARD_MODE = (
    "dmm::{0}: has no derivative in forward mode (forward_ad, torch.func.jvp, jacfwd). Take reverse mode (backward, torch.func.vjp, "
    "jacrev), or dmm_fast.{0}(..., backend='reference')"
)


def refuse_forward_mode(name: str, given: tuple) -> None:
    """Refuse tangents, which torch drops without a word at an op that has a backward only. given: tensors among other arguments."""
    if forward_ad._current_level >= 0:
        if _is_compiling():  # where who has a tangent is not known
            raise RuntimeError(_NO_FORWARD_MODE.format(name))
        _Forward.apply(name, *(t for t in given if isinstance(t, Tensor) and t.is_floating_point()))


class Layer:
    """``dmm::<name>``, made differentiable once; call it with the tuple of the op's arguments.

    ``item_dims`` gives the dimensions that each leading tensor argument has per problem: 2 for the cost, 0 for a number per
    problem. Options follow, and last comes ``unmatched_cost``, a number per template, which the cost is less by.
    ``differentiable`` lists the leading tensors that get a gradient, as `Gradient` has it.
    """

    def __init__(self, name: str, item_dims: tuple[int, ...], differentiable: tuple[int, ...]):
        library.let_triton_serve(name, f"{name}_backward")
        self.name = name
        self.op = getattr(torch.ops.dmm, name).default
        self.backward_op = getattr(torch.ops.dmm, f"{name}_backward").default
        self.defaults = tuple(argument.default_value for argument in self.op._schema.arguments)
        self.item_dims = item_dims
        self.differentiable = differentiable
        self._gradient = Gradient(name, len(item_dims), differentiable)
        self._function = self._functions()
        self._register()

    def __call__(self, args: tuple) -> Tensor:
        if _is_compiling() or _in_autocast("cpu") or _in_autocast("cuda"):
            return self.op(*args)
        if torch.is_grad_enabled():
            for i in (*self.differentiable, -1):
                if args[i] is not None and args[i].requires_grad:
                    return self._function[_in_functorch()].apply(*args)
        return _call(self.op, args)

    def _functions(self) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:
        """The gradient in eager mode, outside and inside torch.func; compiled and exported graphs use the op's own."""
        layer = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *args):
                layer._gradient.setup_context(ctx, args, None)
                return _call(layer.op, args)

            @staticmethod
            def backward(ctx, grad):
                refuse_forward_mode(layer.name, (grad,))

                def call(args):
                    if torch.is_grad_enabled():  # create_graph=True: record, and refuse, the second derivative
                        return BackwardFunction.apply(*args)
                    return _call(layer.backward_op, args)

                return layer._gradient.backward(call, ctx, grad)

        BackwardFunction = transformable(
            lambda *args: _call(self.backward_op, args), lambda ctx, inputs, output: None, self._gradient.refuse_second
        )
        return Function, transformable(self.op, self._gradient.setup_context, Function.backward)

    def _register(self):
        name, backward_name = f"dmm::{self.name}", f"dmm::{self.name}_backward"
        torch.library.register_fake(name, self._fake)
        torch.library.register_fake(backward_name, self._fake_backward)

        def backward(ctx, grad):
            refuse_forward_mode(self.name, (grad,))
            return self._gradient.backward(lambda args: self.backward_op(*args), ctx, grad)

        torch.library.register_autograd(name, backward, setup_context=self._gradient.setup_context)
        torch.library.register_autograd(backward_name, self._gradient.refuse_second)
        for device in ("cpu", "cuda"):  # like softmax: float32 inside autocast
            torch.library.register_autocast(name, device, torch.float32)
        torch.library.register_vmap(name, self._vmap)
        torch.library.register_vmap(backward_name, self._vmap_backward)

    def _fake(self, cost: Tensor, *args, **kwargs) -> Tensor:
        torch._check(
            cost.dim() in (2, 3), lambda: f"dmm::{self.name}: cost must have shape [B, N, M] or [N, M], got {cost.shape}"
        )
        return torch.empty_like(cost, memory_format=torch.contiguous_format)

    def _fake_backward(self, grad: Tensor, cost: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        like_cost = torch.empty_like(cost, memory_format=torch.contiguous_format)
        batch = cost.shape[0] if cost.dim() == 3 else 1
        others = [torch.empty_like(like_cost) for _ in self.differentiable[1:-1]]
        return like_cost, *others, cost.new_empty(batch, dtype=reference.accumulate_dtype(cost))

    def _merge(self, info, in_dims: tuple, args: tuple, item_dims: tuple[int, ...]) -> tuple[tuple, int | None]:
        """The arguments of one of the ops for all of vmap's problems at once, and their batch, as `_merge_batch` has it."""
        count = len(self.defaults) + len(item_dims) - len(self.item_dims)
        missing = count - len(args)  # torch leaves out what has its default
        args = (*args, *self.defaults[len(self.defaults) - missing :])
        in_dims = (*in_dims, *[None] * missing)
        tensors = len(item_dims)
        given = (*args[:tensors], args[-1])
        (*merged, unmatched), batch = _merge_batch(info, (*in_dims[:tensors], in_dims[-1]), given, (*item_dims, 1))
        return (*merged, *args[tensors:-1], unmatched), batch

    def _vmap(self, info, in_dims, *args):
        args, batch = self._merge(info, in_dims, args, self.item_dims)
        x = self.op(*args)
        return _split_batch(info, batch, x), 0

    def _vmap_backward(self, info, in_dims, *args):
        args, batch = self._merge(info, in_dims, args, (2, *self.item_dims))
        *grads, grad_lr = self.backward_op(*args)
        grads = [_split_batch(info, batch, g) for g in grads]
        grads.append(_split_batch(info, 1 if batch is None else batch, grad_lr))
        return tuple(grads), (0,) * len(grads)


def _call(op, args: tuple):
    """Call an op below torch's autograd layer, where neither a gradient nor a function transform can want that layer: in Python
    it costs some 4 us forward and 35 us with backward."""
    if _in_functorch():
        return op(*args)
    with _below_autograd():
        return op(*args)


def _merge_batch(info, in_dims: tuple, tensors: tuple, item_dims: tuple) -> tuple[list, int | None]:
    """vmap's dimension V joined with the batch B: every tensor as ``[V * B, ...]``, and B (None: the problems had no batch)."""
    shape = list(tensors[0].shape)
    if in_dims[0] is not None:
        del shape[in_dims[0]]
    batch = shape[0] if len(shape) == 3 else None
    problems = 1 if batch is None else batch
    merged = []
    for tensor, dim, item in zip(tensors, in_dims, item_dims):
        if tensor is not None:
            tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
            if tensor.dim() == item + 1:  # no batch in it: [V, ...] -> [V, B, ...]
                tensor = tensor.unsqueeze(1).expand(-1, problems, *tensor.shape[1:])
            tensor = tensor.reshape(info.batch_size * problems, *tensor.shape[2:])
        merged.append(tensor)
    return merged, batch


def _split_batch(info, batch: int | None, result: Tensor) -> Tensor:
    """A result for all of vmap's problems, ``[V * B, ...]``, as ``[V, B, ...]`` if there is a batch."""
    return result if batch is None else result.unflatten(0, (info.batch_size, batch))

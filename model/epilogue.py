"""Convolutions whose bias, addition and activation are one kernel, `torch.ops.dmm.bias_clamp`: on a GPU each is one of its own."""

import copy
import math
import operator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

ADDITIONS = (operator.add, operator.iadd, torch.add)
CLAMPS = {F.relu: (0.0, math.inf), torch.relu: (0.0, math.inf), F.relu6: (0.0, 6.0)}

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class Tracer(fx.Tracer):
    """Down to convolutions and batch norms."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv2d, nn.BatchNorm2d))


class Unbiased(nn.Module):
    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, input: Tensor) -> Tensor:  # named as that of a convolution
        return self.convolution._conv_forward(input, self.convolution.weight, None)


class Epilogue(nn.Module):
    """What follows an `Unbiased` convolution, y: clamp(y + bias + residual)."""

    def __init__(self, convolution: nn.Conv2d, low: float, high: float) -> None:
        super().__init__()
        self.convolution, self.low, self.high = convolution, low, high

    def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        assert self.convolution.bias is not None
        bias = self.convolution.bias.to(y.dtype)  # another one inside autocast
        if residual is None or (residual.dtype == y.dtype and residual.shape[1:] == y.shape[1:]):
            return torch.ops.dmm.bias_clamp(y, bias, residual, self.low, self.high)
        return (y + bias[:, None, None] + residual).clamp(self.low, self.high)  # rows or channels broadcast


def with_epilogues(module: nn.Module, method: str = "forward") -> Any:
    """`method` of a module, of the same parameters, for the dtype that they have; as it was where torch.fx cannot follow it."""
    tracer = Tracer()
    tracer.traced_func_name = method
    try:
        graph = tracer.trace(module)
    except Exception:  # control flow, or code of any other kind that torch.fx does not follow
        return module if method == "forward" else getattr(module, method)
    parts: dict[str, Any] = {
        str(node.target): operator.attrgetter(str(node.target))(module)
        for node in graph.nodes
        if node.op in ("call_module", "get_attr")
    }

    def biased(node: Any) -> bool:
        """Not one that does other things too."""
        own = parts.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None
        return isinstance(own, nn.Conv2d) and type(own).forward is nn.Conv2d.forward and own.bias is not None

    def follower(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    for node in [node for node in graph.nodes if biased(node)]:
        chain, residual, limits = [node], None, (-math.inf, math.inf)
        after = follower(node)
        if after is not None and after.target in ADDITIONS and len(after.args) == 2 and not after.kwargs:
            first, second = after.args
            other = first if second is node else second
            # Of two convolutions the second takes the first, which may be one image for many.
            if isinstance(other, fx.Node) and other is not node and not (node is first and biased(other)):
                residual = other
                chain.append(after)
                after = follower(after)
        if after is not None and after.target in CLAMPS and after.kwargs.keys() <= {"input", "inplace"}:
            limits = CLAMPS[after.target]
            chain.append(after)
        name, convolution = node.name, parts[str(node.target)]
        parts |= {f"{name}_unbiased": Unbiased(convolution), f"{name}_epilogue": Epilogue(convolution, *limits)}
        with graph.inserting_after(node):  # there, as what it reads may be written in place before the end
            y = graph.call_module(f"{name}_unbiased", node.args, node.kwargs)
        with graph.inserting_after(y if len(chain) == 1 else chain[-1]):
            result = graph.call_module(f"{name}_epilogue", (y, residual))
        chain[-1].replace_all_uses_with(result)
        for old in reversed(chain):
            graph.erase_node(old)
    return fx.GraphModule(parts, graph)


def methods_with_epilogues(module: AnyModule, *methods: str) -> AnyModule:
    """A copy of a module, of the same parts, with some of its methods as `with_epilogues` makes them."""
    twin = copy.copy(module)
    twin.__dict__.update({method: with_epilogues(module, method) for method in methods})
    return twin

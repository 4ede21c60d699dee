"""Counts the kernels that operations launch on a GPU, on fake tensors, without one."""

from __future__ import annotations

from collections import Counter

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Two launches: padding fills before it copies, others copy before they write.
TWO = ("aten::constant_pad_nd", "aten::masked_fill", "aten::scatter")


class Kernels(TorchDispatchMode):
    """Counts by operation. Views, memory that nothing fills and scalars on the CPU are no kernels; all else is one, but for `TWO` and
    convolutions with a bias, which cuDNN leaves to another kernel. `torch.where` with a number fills a scalar on the device first.
    A lower bound: libraries may change a layout, and what sorts or searches may take several launches."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self.of.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device.type != "cpu"]
        name = func._schema.name
        writes = func._schema.is_mutable or any(leaf.untyped_storage()._cdata not in given for leaf in made)
        if made and writes and "empty" not in name:
            biased = name == "aten::convolution" and args[2] is not None
            self.of[name] += 2 if biased or name in TWO else 1
        return result

"""A step as a CUDA graph: every kernel of it in one launch, at fixed shapes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dmm_fast.model import DMMNet, Output, Proposals, State
from dmm_fast.ops.vision import NO_RUN


class Graph:
    """`function(*inputs, state) -> (*results, following state)` as a CUDA graph, for the shapes of one frame size and number of slots.

    The first call for a shape runs the function a few times and captures it, which takes seconds; later ones copy their inputs
    in and replay it. The state that a call returns lies in the graph's own memory and is overwritten by the next one: pass it
    back as it is, or copy it. What the network is trained to do must not change in between. Graphs in several threads are captured one
    after the other, and run in the stream of their caller.
    """

    _capturing = threading.Lock()

    def __init__(self, function: Callable[..., tuple], net: DMMNet):
        if net.mean.device.type != "cuda":
            raise ValueError("Graph: CUDA graphs need a network on a GPU")
        self.function, self.device = function, net.mean.device
        self._key: Any = None
        self.captures = 0

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> tuple:
        key = [(leaf.shape, leaf.dtype) for leaf in tree_leaves(inputs)]
        if key != self._key:
            self._key = None  # a capture that fails leaves none
            self._capture(inputs)
            self.captures += 1
            self._key = key
        for own, given in zip(tree_leaves(self._inputs), tree_leaves(inputs)):
            if own is not given:
                own.copy_(given)
        self._replay()
        return (*tree_map(torch.clone, self._results), self._inputs[-1])

    def _replay(self) -> None:
        self._graph.replay()

    def _capture(self, inputs: tuple) -> None:
        self._inputs = tree_map(torch.clone, inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):  # which need not be the current one
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries choose their algorithms and allocate now, not while capturing
                    self.function(*self._inputs)
            torch.cuda.current_stream().wait_stream(side)
            # stream: torch's default one is on the GPU that was current when it was first wanted. thread_local: what other
            # threads do meanwhile, allocating say, is no error.
            with Graph._capturing, torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                *self._results, following = self.function(*self._inputs)
                for own, new in zip(tree_leaves(self._inputs[-1]), tree_leaves(following)):
                    own.copy_(new)


class GraphStep(Graph):
    """`net.step` as a graph, with up to `top` proposals, which are padded to that number: see `pad`, and `Segmenter`, which
    keeps the number of slots."""

    def __init__(self, net: DMMNet, top: int):
        super().__init__(net.step, net)
        self.top = top

    def __call__(self, frame: Tensor, proposals: Proposals, state: State) -> tuple[Output, State]:
        """As `net.step`; the masks of absent proposals are padding, so `Output.parts` has `top` columns."""
        return super().__call__(frame, pad(proposals, self.top), state)


def pad(proposals: Proposals, top: int) -> Proposals:
    """Exactly `top` proposals: padding, of score -inf and with empty masks, follows the real ones. Run-length codes are as long
    as a power of two, so that few lengths occur."""
    count = proposals.scores.numel()
    if count > top:
        raise ValueError(f"GraphStep: at most {top} proposals, got {count}")
    boxes, scores, masks = (
        torch.cat([part, part.new_full((top - count, *part.shape[1:]), fill)])
        for part, fill in zip(proposals, (0.0, float("-inf"), NO_RUN if proposals.masks.dtype == torch.int32 else 0))
    )
    if masks.dtype == torch.int32:
        length = 1 << max(masks.size(1) - 1, 0).bit_length()
        masks = F.pad(masks, (0, length - masks.size(1)), value=NO_RUN)
    return Proposals(boxes, scores, masks)

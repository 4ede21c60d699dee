"""A network as it runs when it does not learn: batch norms folded into the convolutions before them, weights channels-last."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .epilogue import Tracer, methods_with_epilogues, with_epilogues
from .network import DMMNet
from .refinement import HeavyRefinement


def inference(net: DMMNet, dtype: torch.dtype = torch.float32, fused: bool | None = None) -> DMMNet:
    """`net`, which must be in eval mode, with a folded copy of its backbone. The rest is shared: what that learns counts here.

    On a CPU convolutions run channels-last, and so do the shared ones from now on. dtype: of what costs the most, the backbone and
    the heavy refinement's decoder, which are copies then; all else, the matching first of all, stays as it is. fused: of those two,
    convolutions with all that follows them as one kernel more, for eager code; None: on a GPU.
    """
    twin = copy.copy(net)
    if fused is None:
        fused = net.mean.device.type == "cuda"
    if net.backbone is not None:
        backbone = folded(net.backbone)
        if fused:
            backbone = with_epilogues(backbone)
        if dtype != torch.float32:
            backbone = Within(backbone, dtype)
        twin._modules = {**net._modules, "backbone": backbone}
    if dtype != torch.float32 and isinstance(net.refinement, HeavyRefinement):
        twin._modules["refinement"] = net.refinement.in_precision(dtype)
    if fused and isinstance(twin.refinement, HeavyRefinement):
        twin._modules = {**twin._modules, "refinement": methods_with_epilogues(twin.refinement, "keys", "decode")}
    if net.mean.device.type == "cpu":
        twin.to(memory_format=torch.channels_last)
    return twin


class Within(nn.Module):
    """A backbone that computes in another type than what comes in and goes out."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [level.to(x.dtype) for level in self.module(x.to(self.dtype))]


def folded(backbone: nn.Module) -> nn.Module:
    """A copy of a backbone, as `fold` leaves it."""
    return fold(copy.deepcopy(backbone).eval())


def fold(backbone: nn.Module) -> nn.Module:
    """Take out of a backbone in eval mode the batch norms that follow a convolution: the same function, up to rounding.

    Which follows which is read off the traced graph. A backbone that cannot be traced stays as it is.
    """
    try:
        graph = Tracer().trace(backbone)
    except Exception:  # control flow, or code of any other kind that torch.fx does not follow
        return backbone
    modules = dict(backbone.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    for norm in (node for node in calls if isinstance(modules[node.target], nn.BatchNorm2d)):
        (before,) = norm.all_input_nodes
        if before.op != "call_module" or not isinstance(modules[before.target], nn.Conv2d) or len(before.users) > 1:
            continue
        if sum(node.target in (norm.target, before.target) for node in calls) > 2:  # one of them is used elsewhere too
            continue
        replaced = modules[norm.target]
        backbone.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target], replaced))
        backbone.set_submodule(norm.target, getattr(replaced, "act", nn.Identity()))  # timm's norms bring the activation along
    return backbone

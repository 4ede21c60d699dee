"""GPU code without a GPU: fake tensors on "cuda" have a shape and a device but no data.

An operation that mixes devices raises, and so does whatever makes the host wait for the device (`.item()`, `bool(tensor)`,
`nonzero`): what a CUDA graph cannot capture. A constant that is made on the host and copied raises here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from dmm_fast.model import Config, DMMNet, Proposals, State
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dmm_fast
from dmm_fast.data.augment import Clip
from dmm_fast.proposals.traceable import ProposalNetwork
from dmm_fast.inference.graph import pad
from dmm_fast.learning.online import LOSS
from dmm_fast.learning.unroll import unroll_all
from dmm_fast.proposals.detector import packaged_detector
from dmm_fast.training.config import TrainConfig

H, W = 120, 216
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NoCopies(TorchDispatchMode):
    """Raises where something is copied between the host and the fake device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in COPIES:
            other = kwargs.get("device") if func is COPIES[0] else args[0].device
            source = args[0] if func is COPIES[0] else args[1]
            if other is not None and torch.device(other).type != source.device.type:
                raise AssertionError(f"a copy from {source.device} to {other} of {list(source.shape)}")
        return func(*args, **kwargs)


@contextmanager
def fake(*modules: nn.Module, learn: bool = False, device: str = "cuda") -> Iterator[None]:
    """Everything made inside is fake; parameters and buffers of the modules become fake ones on the device for good."""
    with FakeTensorMode():
        for module in (own for each in modules for own in each.modules()):
            for name, p in module._parameters.items():
                if p is not None:
                    data = torch.empty(p.shape, dtype=p.dtype, device=device)
                    module._parameters[name] = nn.Parameter(data, requires_grad=learn and p.requires_grad)
            for name, b in module._buffers.items():
                if b is not None:
                    module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=device)
        with NoCopies():
            yield


def masks(count: int, device: str = "cuda") -> Tensor:
    return torch.empty(count, H, W, dtype=torch.bool, device=device)


def proposals(count: int, soft: bool, device: str = "cuda") -> Proposals:
    inside = torch.empty(count, 28, 28, device=device) if soft else masks(count, device)
    return Proposals(torch.empty(count, 4, device=device), torch.empty(count, device=device), inside)


def frame(device: str = "cuda") -> Tensor:
    return torch.empty(3, H, W, dtype=torch.uint8, device=device)


def on_device(value: object, device: str = "cuda") -> None:
    for leaf in torch.utils._pytree.tree_leaves(value):
        assert leaf.device.type == device


def test_the_check_finds_what_it_should():
    with fake():
        x = torch.empty(3, device="cuda")
        for wrong in (lambda: x + torch.empty(3), lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(),
                      lambda: torch.tensor([1.0, 2.0, 3.0], device="cuda")):  # fmt: skip
            with pytest.raises((RuntimeError, AssertionError)):
                wrong()


def network(refine: str) -> DMMNet:
    config = Config(backbone="test_resnet", input_size=(64, 96), iou_weight=0.5, refine=refine, hidden=16)
    return DMMNet(config).eval()


@pytest.mark.parametrize("soft", [False, True], ids=["masks", "soft"])
@pytest.mark.parametrize("name", ["none", "light", "heavy", "small", "iou"])
def test_follow(name, soft):
    """start, step, add and drop, of every refinement and of the packaged networks."""
    net = dmm_fast.Segmenter(name)._inference if name in ("small", "iou") else network(name)
    with fake(net), torch.no_grad():
        state = net.start(frame(), masks(3), torch.ones(3, dtype=torch.bool, device="cuda"))
        output, state = net.step(frame(), pad(proposals(20, soft), 50), state)
        state = net.add(frame(), masks(3), torch.ones(3, dtype=torch.bool, device="cuda"), state)
        state = net.drop(torch.ones(3, dtype=torch.bool, device="cuda"), state)
        output, state = net.step(frame(), proposals(20, soft), state)
        on_device((output, state))
        assert isinstance(state, State) and output.labels.shape == (H, W)


def clip(device: str) -> Clip:
    frames = torch.empty(3, 3, H, W, dtype=torch.uint8, device=device)
    seen = torch.empty(3, 2, H, W, dtype=torch.bool, device=device)
    return Clip(frames, seen, [proposals(20, False, device) for _ in range(3)], "fake")


# Autograd's engine asks a real GPU for its streams, but of "lazy" tensors it asks nothing: the backward runs on those.
@pytest.mark.parametrize("device", ["cuda", "lazy"])
@pytest.mark.parametrize("online", [False, True], ids=["train", "online"])
@pytest.mark.parametrize("refine", ["none", "light", "small"])
def test_training_step(refine, online, device):
    model = Config.preset("small") if refine == "small" else network(refine).config
    config = TrainConfig(model=model, freeze=online or refine == "small")
    config = replace(config, loss=LOSS) if online else config
    net = DMMNet(model)
    if config.freeze:
        net.backbone.requires_grad_(False)
    with fake(net, learn=True, device=device):
        losses = unroll_all(net, [clip(device), clip(device)], config).sum(0)
        on_device(losses, device)
        if device == "lazy" and losses.requires_grad:
            losses[0].backward()
            optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], fused=False, foreach=False)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=False)
            optimizer.step()


def test_detector():
    network = ProposalNetwork(packaged_detector(), fixed=True).eval()
    with fake(network), torch.no_grad():
        boxes, scores, inside = network(frame())
        on_device((boxes, scores, inside))
        assert boxes.shape == (50, 4) and scores.shape == (50,) and inside.shape == (50, 28, 28)

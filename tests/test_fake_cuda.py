"""GPU code without a GPU: fake tensors on "cuda" have a shape and a device but no data.

An operation that mixes devices raises, and so does whatever makes the host wait for the device (`.item()`, `bool(tensor)`,
`nonzero`): what a CUDA graph cannot capture. A constant that is made on the host and copied raises here too, and so do tensors
of two devices given to an op of this package, whose fake kernels say nothing about that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dmm_fast.model import Config, DMMNet, Proposals, State, inference
from dmm_fast.model.network import settled
from helpers.kernels import Kernels
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dmm_fast
from dmm_fast.data.augment import Clip
from dmm_fast.inference.graph import pad
from dmm_fast.learning.online import LOSS
from dmm_fast.learning.unroll import unroll_all
from dmm_fast.ops.library import CUDA_MISSING
from dmm_fast.proposals.detector import packaged_detector
from dmm_fast.proposals.live import Live
from dmm_fast.proposals.traceable import ProposalNetwork
from dmm_fast.training.config import TrainConfig

H, W = 120, 216
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Raises where something is copied between the host and the fake device, and where one of our ops is given both."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "dmm":
            given = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            if len(given) > 1:
                raise AssertionError(f"{func} is given tensors on {sorted(given)}")
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
        with OneDevice():
            yield


def masks(count: int, device: str = "cuda") -> Tensor:
    return torch.empty(count, H, W, dtype=torch.bool, device=device)


KINDS = ("masks", "soft", "runs")  # of proposals


def proposals(count: int, kind: str, device: str = "cuda") -> Proposals:
    if kind == "masks":
        inside = masks(count, device)
    elif kind == "soft":
        inside = torch.empty(count, 28, 28, device=device)
    else:
        inside = torch.empty(count, 37, dtype=torch.int32, device=device)
    return Proposals(torch.empty(count, 4, device=device), torch.empty(count, device=device), inside)


def frame(device: str = "cuda") -> Tensor:
    return torch.empty(3, H, W, dtype=torch.uint8, device=device)


def on_device(value: object, device: str = "cuda") -> None:
    for leaf in tree_leaves(value):
        assert not isinstance(leaf, Tensor) or leaf.device.type == device


def test_the_check_finds_what_it_should():
    with fake():
        x = torch.empty(3, device="cuda")
        for wrong in (lambda: x + torch.empty(3), lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.nonzero(),
                      lambda: torch.tensor([1.0, 2.0, 3.0], device="cuda"),
                      lambda: dmm_fast.paste_masks(x.view(3, 1, 1), torch.empty(3, 4), 5, 6),
                      lambda: dmm_fast.upsample_argmax(x.view(3, 1, 1), torch.arange(3), 5, 6),
                      lambda: dmm_fast.linear_assignment(x[None], num_templates=torch.ones(1).long())):  # fmt: skip
            with pytest.raises((RuntimeError, AssertionError)):
                wrong()


def test_ops():
    """Every op that a step may call."""
    with fake():
        cost, counts = torch.empty(4, 5, 50, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        boxes, inside, a, b = torch.empty(6, 4, device="cuda"), torch.empty(6, 28, 28, device="cuda"), masks(2), masks(6)
        runs, logits = torch.empty(6, 37, dtype=torch.int32, device="cuda"), torch.empty(3, 24, 43, device="cuda")
        sizes = dict(num_templates=counts, num_proposals=counts)
        on_device([match(cost, **sizes) for match in (dmm_fast.match, dmm_fast.match_prices)])
        on_device([dmm_fast.mask_iou(a, b), dmm_fast.paste_combine(cost[0, :, :6], inside, boxes, (H, W))])
        on_device([dmm_fast.paste_masks(inside, boxes, 30, 54), dmm_fast.decode_runs(runs, H, W, 30, 54)])
        on_device(dmm_fast.upsample_argmax(logits, torch.arange(3, device="cuda"), H, W))
        if CUDA_MISSING is None:  # else the CPU decides
            on_device([dmm_fast.linear_assignment(cost, unmatched_cost=0.5, return_duals=True, **sizes)])
            on_device([decide(cost, **sizes) for decide in (dmm_fast.linear_assignment, dmm_fast.hungarian, dmm_fast.assign)])


def network(refine: str) -> DMMNet:
    config = Config(backbone="test_resnet", input_size=(64, 96), iou_weight=0.5, refine=refine, hidden=16)
    return DMMNet(config).eval()


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["none", "heavy"])
def test_prepare(name, kind):
    """Proposals go to the grid on the device. With a coarser grid, soft masks and codes become nothing larger than that."""
    net = network(name)
    with fake(net), torch.no_grad():
        state = net.start(frame(), masks(3), torch.ones(3, dtype=torch.bool, device="cuda"))
        for count in (20, 0):
            given = proposals(count, kind)
            with Largest() as largest:
                candidates = net.prepare(given, state, H, W)
            on_device(candidates)
            assert candidates.cover.shape == (max(count, 1), *net.grid(net.encode(frame()[None]), H, W))
            assert (candidates.height, candidates.width) == (H, W)
            if name == "heavy" and kind != "masks":
                assert largest.elements == candidates.cover.numel()


def test_settled():
    with fake():
        on_grid = settled(torch.empty(3, 24, 43, device="cuda"), True)
        on_device(on_grid)
        assert on_grid.shape == (3, 24, 43)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["none", "light", "heavy", "small", "iou"])
def test_follow(name, kind):
    """start, step, add and drop, of every refinement and of the packaged networks."""
    net = dmm_fast.Segmenter(name)._inference if name in ("small", "iou") else network(name)
    with fake(net), torch.no_grad():
        state = net.start(frame(), masks(3), torch.ones(3, dtype=torch.bool, device="cuda"))
        output, state = net.step(frame(), pad(proposals(20, kind), 50), state)
        state = net.add(frame(), masks(3), torch.ones(3, dtype=torch.bool, device="cuda"), state)
        state = net.drop(torch.ones(3, dtype=torch.bool, device="cuda"), state)
        output, state = net.step(frame(), proposals(20, kind), state)
        output, state = net.step(frame(), proposals(0, kind), state)
        on_device((output, state))
        assert isinstance(state, State) and output.labels.shape == (H, W)


def test_kernels_of_a_step():
    """Of the packaged network, with three objects; docs/performance.md has the history. Lower the bound when it falls."""
    net = inference(dmm_fast.Segmenter().net, fused=True)  # as on a GPU
    with fake(net), torch.no_grad():
        state = net.start(frame(), masks(4), torch.ones(4, dtype=torch.bool, device="cuda"))
        with Kernels() as kernels:
            output, state = net.step(frame(), proposals(50, "soft"), state)
    on_device((output, state))
    assert kernels.of["aten::convolution"] == kernels.of["dmm::bias_clamp"] == 75
    assert 300 < kernels.count <= 454, kernels.of


def clip(device: str, kind: str) -> Clip:
    frames = torch.empty(3, 3, H, W, dtype=torch.uint8, device=device)
    seen = torch.empty(3, 2, H, W, dtype=torch.bool, device=device)
    return Clip(frames, seen, [proposals(20, kind, device) for _ in range(3)], "fake")


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
        losses = unroll_all(net, [clip(device, kind) for kind in ("masks", "soft")], config).sum(0)
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


def live(shared: bool) -> Live:
    return Live(dmm_fast.Segmenter()._inference, ProposalNetwork(packaged_detector(), fixed=True).eval(), shared)


@pytest.mark.parametrize("shared", [False, True])
def test_live_frame(shared):
    """The detector, on its own features or the network's, then the step on what it found."""
    network = live(shared)
    with fake(network), torch.no_grad():
        large = torch.empty(3, 2 * H, 2 * W, dtype=torch.uint8, device="cuda")
        objects = torch.empty(3, 2 * H, 2 * W, dtype=torch.bool, device="cuda")
        state = network.net.start(large, objects, torch.ones(3, dtype=torch.bool, device="cuda"))
        found, output, state = network(large, state)
        on_device((found, output, state))
        assert output.labels.shape == (2 * H, 2 * W) and found.scores.shape == (50,)


def test_parts_of_a_live_frame(monkeypatch):
    """What benchmarks/gpu_report.py captures as graphs."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    from gpu_stages import live_parts

    network = live(True)
    with fake(network), torch.no_grad():
        parts = live_parts(network, frame(), masks(3), proposals(50, "soft"), proposals(50, "runs"))
        on_device([run() for run in parts.values()])

"""A network that does not learn computes what it did, with fewer passes over memory."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from dmm_fast.model import Config, DMMNet, Proposals, inference, refinement
from dmm_fast.model.epilogue import Epilogue, with_epilogues
from dmm_fast.model.inference import folded
from dmm_fast.model.network import make_backbone
from torch import nn


def lively(backbone: nn.Module) -> nn.Module:
    """Batch norms whose statistics are not those of a fresh network."""
    torch.manual_seed(0)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias, std=0.1)
    return backbone.eval()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050"])
def test_folded_backbones(name):
    backbone = lively(make_backbone(name, False)[0])
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    twin = folded(backbone)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in twin.modules())
    image = torch.rand((1, 3, 70, 100))
    with torch.no_grad():
        for ours, theirs in zip(twin(image), backbone(image), strict=True):
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()  # rounding, through fifty layers
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "mobilenetv3_small_050"])
def test_convolutions_with_what_follows_them(name):
    plain = folded(lively(make_backbone(name, False)[0]))
    fused = with_epilogues(plain)
    ends = [module for module in fused.modules() if isinstance(module, Epilogue)]
    assert len(ends) >= 0.6 * sum(isinstance(module, nn.Conv2d) and module.bias is not None for module in plain.modules())
    calls = [str(node.target) for node in fused.graph.nodes]
    if name != "mobilenetv3_small_050":  # whose activations are others, and which scales some features
        assert not any("relu" in call or "add" in call for call in calls)
    for layout in (torch.contiguous_format, torch.channels_last):
        image = torch.rand((2, 3, 70, 100)).contiguous(memory_format=layout)
        with torch.no_grad():
            for ours, theirs in zip(fused(image), plain(image), strict=True):
                assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


class Additions(nn.Module):
    """Sums of convolutions: of one with itself, with a number, of two, with a single pixel, and what others read too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x):
        twice = self.a(x)
        both = torch.relu(self.a(x) + self.b(x[:1])) + self.b(x).mean((2, 3), keepdim=True)
        pixel = self.c(x) + x.amax((2, 3), keepdim=True)
        return [twice + twice, both, torch.relu(pixel), self.d(x) + 1.0, self.d(x).relu_(), twice]


def test_additions():
    net, x = Additions(), torch.rand((2, 3, 5, 4))
    expected = net(x)
    for ours, theirs in zip(with_epilogues(net)(x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Keywords(nn.Module):
    """Calls whose keywords say what is computed."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x):
        scaled = torch.add(self.a(x), x, alpha=2)
        return [torch.relu(scaled), F.relu6(self.b(input=x), inplace=True), torch.relu(input=self.c(x))]


def test_keywords():
    net, x = Keywords(), torch.rand((2, 3, 5, 4))
    fused = with_epilogues(net)
    for ours, theirs in zip(fused(x), net(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert sum("relu" in str(node.target) for node in fused.graph.nodes) == 1  # that of the scaled sum


@pytest.mark.parametrize("net", [Additions, Keywords])
def test_fused_inside_autocast(net):
    net, x = net(), torch.rand((2, 3, 5, 4))
    fused = with_epilogues(net)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(fused(x), net(x), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0.03)  # fused is rounded once


class Shared(nn.Module):
    """A convolution that is used without its norm as well, one called twice, and a norm that follows no convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.after = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.first = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(self.first(x))
        return self.after(self.twice(self.twice(self.norm(x) + x)))


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [Shared, Branch])
def test_what_cannot_be_folded_stays(kind):
    net = lively(kind())
    twin, x = folded(net), torch.rand((1, 3, 5, 5))
    assert [type(module) for module in twin.modules()] == [type(module) for module in net.modules()]
    assert torch.equal(twin(x), net(x))


def heavy() -> DMMNet:
    torch.manual_seed(0)
    config = Config(backbone="mobilenetv3_small_050", iou_weight=0.5, refine="heavy", hidden=16, follow="refined")
    net = DMMNet(config)
    nn.init.normal_(net.refinement.head.weight, std=5.0)
    lively(net.backbone)
    return net.eval()


def test_what_is_learned_counts():
    net = heavy()
    twin = inference(net)
    assert twin.refinement is net.refinement and twin.backbone is not net.backbone
    assert any(isinstance(module, nn.BatchNorm2d) for module in net.backbone.modules())


@torch.no_grad()
def test_fused():
    """As on a GPU: the same results, from the same parameters, also after they have learnt, and in a copy."""
    net = heavy()
    frame = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    masks = torch.zeros((2, 64, 96), dtype=torch.bool)
    masks[0, 5:40, 10:60] = masks[1, 20:60, 50:90] = True
    proposals = Proposals(torch.tensor([[10.0, 5, 60, 40], [50, 20, 90, 60]]), torch.tensor([0.9, 0.8]), masks)

    def step(net: DMMNet) -> torch.Tensor:
        return net.step(frame.flip(2), proposals, net.start(frame, masks, torch.ones(2, dtype=torch.bool)))[0].logits

    twin = inference(net, fused=True)
    assert twin.refinement is not net.refinement and {id(p) for p in twin.refinement.parameters()} == {
        id(p) for p in net.refinement.parameters()
    }
    before = step(twin)
    torch.testing.assert_close(before, step(net), atol=1e-4, rtol=1e-4)
    for parameter in net.refinement.parameters():
        parameter.mul_(0.9)
    assert (step(twin) - before).abs().max() > 0.1
    torch.testing.assert_close(step(copy.deepcopy(twin)), step(net), atol=1e-4, rtol=1e-4)
    short = inference(net, torch.bfloat16, fused=True)
    torch.testing.assert_close(step(short), step(inference(net, torch.bfloat16)), atol=0.3, rtol=0.1)


@torch.no_grad()
def test_objects_share_what_they_remember_of_a_frame(monkeypatch):
    """Three objects from two frames, one of them dropped: the same masks as with keys that each object keeps for itself."""
    net = heavy()
    frames = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    masks = torch.zeros((4, 64, 96), dtype=torch.bool)
    for k in range(4):
        masks[k, 8 * k : 8 * k + 24, 12 * k : 12 * k + 40] = True
    valid = torch.tensor([True, True, False, False])
    proposals = Proposals(torch.tensor([[10.0, 5, 60, 40], [30, 20, 80, 60]]), torch.tensor([0.9, 0.8]), masks[1:3])

    def follow() -> list[torch.Tensor]:
        state = net.start(frames[0], masks, valid)
        results = []
        for t in range(1, 4):
            output, state = net.step(frames[t], proposals, state)
            results.append(output.logits)
            if t == 1:
                state = net.add(frames[t], masks, torch.tensor([False, False, True, False]), state)
            if t == 2:
                state = net.drop(torch.tensor([True, False, False, False]), state)
        return results

    ours = follow()

    def each(query, known, value, valid):
        return refinement.recall_each(query, known.expand(value.size(0), -1, -1), value)

    monkeypatch.setattr(refinement, "recall_by_frame", each)
    for a, b in zip(ours, follow(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert ours[2][0].max() == -100 < ours[2][1:3].amax((1, 2)).min()


@pytest.mark.parametrize("frames", [[0, 0, 0, 0], [0, 1, 0, 1], [2, 0, 1, 3]])
def test_every_frame_is_compared_with_once(frames, monkeypatch):
    bank, query, value = torch.rand((4, 6, 3)), torch.rand((3, 5)), torch.rand((4, 2, 6))  # 6 cells known, 5 asked for
    known = bank[frames]
    expected = refinement.recall_each(query, known, value)
    seen = []
    recall = refinement.recall
    monkeypatch.setattr(refinement, "recall", lambda q, k, v: seen.append(k) or recall(q, k, v))
    valid = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(refinement.recall_by_frame(query, known, value, valid), expected)
    assert len(seen) == len(set(frames))
    known[2, 0, 0] = torch.nan  # equal to nothing, not even to itself
    assert refinement.recall_by_frame(query, known, value, valid)[2].isnan().any()
    seen.clear()
    assert not refinement.recall_by_frame(query, known, value, ~valid).any() and not seen

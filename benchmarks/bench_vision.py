"""Mask IoU and Eq. 8 against what people write instead: ``pytest benchmarks/bench_vision.py``.

Peers: the float matrix product over flattened masks; paste by ``grid_sample``, then a product with the assignment
(detectron2, torchvision); the separable products in plain PyTorch (``dmm_fast.reference``). All peers of a row must
first agree with ours.
"""

from __future__ import annotations

import core
import pytest
import torch
from torch import Tensor

from dmm_fast.ops import reference
from dmm_fast.ops.vision import mask_iou, paste_combine

N, M, S, SIZE = 10, 50, 28, (480, 854)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def scene(device: str, share: float):
    """N templates and M proposals whose boxes have about ``share`` of the image's width and height."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([SIZE[1], SIZE[0]] * 2)
    centre = torch.rand(M, 2, generator=generator) * (1 - share) + share / 2
    extent = (torch.rand(M, 2, generator=generator) + 0.5) * share / 2
    boxes = torch.cat([centre - extent, centre + extent], 1) * scale  # [M, 4]
    masks = torch.rand(M, S, S, generator=generator)
    assignment = torch.rand(N, M, generator=generator)
    return assignment.to(device), masks.to(device), boxes.to(device)


def product_iou(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1).float(), b.flatten(1).float()
    both = a @ b.T  # [N, M]
    either = a.sum(1)[:, None] + b.sum(1) - both
    return both / either.clamp(min=1)


def sampled_paste(assignment: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
    H, W = SIZE
    x0, y0, x1, y1 = boxes.T[:, :, None]
    x = (torch.arange(W, device=boxes.device) + 0.5 - x0) / (x1 - x0) * 2 - 1  # [M, W]
    y = (torch.arange(H, device=boxes.device) + 0.5 - y0) / (y1 - y0) * 2 - 1  # [M, H]
    grid = torch.stack([x[:, None, :].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], -1)  # [M, H, W, 2]
    pasted = torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]  # [M, H, W]
    return (assignment @ pasted.flatten(1)).view(-1, H, W)


def results(function: core.Function) -> list[Tensor]:
    value = function()
    return [value] if isinstance(value, Tensor) else list(value)


def run(benchmark, device: str, case: str, functions: dict[str, core.Function]) -> None:
    """Times ``functions`` in turns: ours, the closing table's peer, then other peers. A ratio is peer over ours."""
    expected = results(functions["dmm_fast"])
    for function in functions.values():
        for value, want in zip(results(function), expected):
            assert (value - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1)
    with core.one_thread():
        if device == "cpu":
            times = core.compare(functions, core.cpu_time, rounds=5, sample=0.05)
        else:
            times = core.compare(functions, core.cold_device_time, rounds=5, sample=0.005)
    ours, *peers = core.medians(times).items()
    row = {
        "case": f"{case}, {device}",
        "machine": core.machine(device),
        "us per problem": ours[1] * 1e6,
        "peer": peers[0][0],
        "peer us per problem": peers[0][1] * 1e6,
        "ratio": peers[0][1] / ours[1],
        "other ratios": {name: seconds / ours[1] for name, seconds in peers[1:]},
        "limit us per problem": None,
        "share of limit": None,
    }
    core.record(benchmark, times["dmm_fast"], row)


@pytest.mark.parametrize("device", DEVICES)
def bench_mask_iou(benchmark, device):
    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.rand(count, *SIZE, generator=generator) < 0.3).to(device) for count in (N, M))
    assert torch.equal(mask_iou(a, b), reference.mask_iou(a, b))
    functions = {"dmm_fast": lambda: mask_iou(a, b), "matrix product": lambda: product_iou(a, b)}
    run(benchmark, device, f"mask_iou, {N} x {M} masks of {SIZE[0]}x{SIZE[1]}", functions)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("confident", [True, False], ids=["confident", "dense"])
@pytest.mark.parametrize("share", [0.25, 1.0], ids=["quarter", "whole"])
@pytest.mark.parametrize("device", DEVICES)
def bench_paste_combine(benchmark, device, share, confident, backward):
    assignment, masks, boxes = scene(device, share)
    if confident:
        assignment = reference.mask_confident(assignment)
    forwards = {
        "dmm_fast": lambda a, m: paste_combine(a, m, boxes, SIZE),
        "grid_sample": lambda a, m: sampled_paste(a, m, boxes),
        "separable products": lambda a, m: reference.paste_combine(a, m, boxes, SIZE),
    }
    grad = torch.randn(N, *SIZE, generator=torch.Generator().manual_seed(1)).to(device) if backward else None

    def function_of(forward):
        if grad is None:
            return lambda: forward(assignment, masks)
        leaves = assignment.clone().requires_grad_(), masks.clone().requires_grad_()
        out = forward(*leaves)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    functions = {name: function_of(forward) for name, forward in forwards.items()}
    kind = "one proposal per template" if confident else "dense"
    case = f"paste_combine {'backward' if backward else 'forward'}, {kind}, boxes {share:g} of width and height"
    run(benchmark, device, case, functions)

"""The vision ops against what people write instead: ``pytest benchmarks/bench_vision.py``.

Peers: the float matrix product over flattened masks; paste by ``grid_sample``, then a product with the assignment
(detectron2, torchvision); the separable products in plain PyTorch (``dmm_fast.reference``). To and from a grid: masks of the
frame's size, averaged over its cells (torchvision, pycocotools), and logits of the frame's size. All peers of a row must first
agree with ours.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import core
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmm_fast.ops import reference
from dmm_fast.ops.vision import decode_runs, mask_iou, paste_combine, paste_masks, upsample_argmax
from dmm_fast.proposals.coco import read_coco

N, M, S, SIZE = 10, 50, 28, (480, 854)
FRAMES = {"240p": (240, 427), "1080p": (1080, 1920), "4K": (2160, 3840)}
GRID = (120, 214)  # the packaged network's, for frames of all these sizes
SHARES = [0.25, 1.0]  # of the frame's sides, that boxes take
CONTENTS = ["objects", "noise"]
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


class Case(NamedTuple):
    """What takes turns: ours first, then the closing table's peers.

    They must agree everywhere, or, where they round at other places, differ by at most ``apart`` in the mean.
    """

    name: str
    functions: dict[str, core.Function]
    apart: float | None = None


def measure(case: Case, device: str, rounds: int = 5) -> tuple[dict[str, list[float]], list[dict]]:
    """(samples of each contestant, a row for each peer)."""
    expected = results(case.functions["dmm_fast"])
    for name, function in case.functions.items():
        for value, want in zip(results(function), expected):
            difference = (value.float() - want.float()).abs()
            if case.apart is None:
                assert difference.max() <= 1e-4 * want.abs().max().clamp(min=1), name
            else:
                assert difference.mean() <= case.apart, (name, float(difference.mean()))
    with core.one_thread():
        if device == "cpu":
            times = core.compare(case.functions, core.cpu_time, rounds=rounds, sample=0.05)
        else:
            times = core.compare(case.functions, core.cold_device_time, rounds=rounds, sample=0.005)
    return times, core.rows_of(f"{case.name}, {device}", times, device=device)


def run(benchmark, case: Case, device: str) -> None:
    times, rows = measure(case, device)
    core.record(benchmark, times["dmm_fast"], *rows)


def mask_iou_case(device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.rand(count, *SIZE, generator=generator) < 0.3).to(device) for count in (N, M))
    assert torch.equal(mask_iou(a, b), reference.mask_iou(a, b))
    functions = {"dmm_fast": lambda: mask_iou(a, b), "matrix product": lambda: product_iou(a, b)}
    return Case(f"mask_iou, {N} x {M} masks of {SIZE[0]}x{SIZE[1]}", functions)


def paste_combine_case(device: str, share: float, confident: bool, backward: bool) -> Case:
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
    return Case(
        f"paste_combine {'backward' if backward else 'forward'}, {kind}, boxes {share:g} of width and height", functions
    )


# ---- to and from a grid ----


def discs(count: int, height: int, width: int) -> Tensor:
    """[count, height, width]: 1 at the centre of an ellipse, 0 at its edge, negative outside."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.rand(2, count, 1, generator=generator) * 0.1 + 0.08
    middle = torch.rand(2, count, 1, generator=generator) * 0.6 + 0.2
    y, x = (((torch.arange(side) + 0.5) / side - middle[k]) / extent[k] for k, side in enumerate((height, width)))
    return 1 - y.square()[:, :, None] - x.square()[:, None, :]


def in_parts(function: Callable[[slice], Tensor], device: str) -> Tensor:
    """The masks of the frame's size one at a time on a CPU, whose caches hold one of them; all at once on a GPU."""
    if device != "cpu":
        return function(slice(M))
    return torch.cat([function(slice(k, k + 1)) for k in range(M)])


def paste_masks_case(device: str, frame: str) -> Case:
    """A detector's masks on the grid."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    height, width = FRAMES[frame]
    boxes = scene("cpu", 0.25)[2] * torch.tensor([width / SIZE[1], height / SIZE[0]] * 2)
    radius = torch.linspace(-1.2, 1.2, S).square()
    masks = torch.sigmoid(8 * (1 - radius[:, None] - radius) + torch.rand(M, S, S, generator=torch.Generator().manual_seed(1)))
    masks, boxes = masks.to(device), boxes.to(device)
    cells = boxes * torch.tensor([GRID[1] / width, GRID[0] / height] * 2, device=device)
    x0, y0, x1, y1 = cells.T[:, :, None]
    x, y = ((torch.arange(2 * side, device=device) + 0.5) / 2 for side in (GRID[1], GRID[0]))  # two points a cell

    def sampled() -> Tensor:
        across, down = (x - x0) / (x1 - x0) * 2 - 1, (y - y0) / (y1 - y0) * 2 - 1  # [M, 2 columns], [M, 2 rows]
        shape = (-1, 2 * GRID[0], 2 * GRID[1])
        points = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], -1)
        pasted = F.grid_sample(masks[:, None], points, align_corners=False)
        return F.avg_pool2d((pasted > 0.5).float(), 2)[:, 0]

    def torchvision(some: slice) -> Tensor:
        pasted = paste_masks_in_image(masks[some, None], boxes[some], (height, width))  # [m, 1, H, W]
        return F.interpolate((pasted > 0.5).float(), size=GRID, mode="area")[:, 0]

    functions = {
        "dmm_fast": lambda: paste_masks(masks, cells, *GRID),
        "grid_sample": sampled,
        "torchvision, area": lambda: in_parts(torchvision, device),
    }
    return Case(f"paste_masks, {M} of a frame of {frame} to {GRID[0]}x{GRID[1]}", functions, apart=5e-3)


def decode_runs_case(device: str, frame: str) -> Case:
    """A file's masks on the grid, from the text of their codes, which ours parses in Python."""
    from pycocotools import mask as coco

    height, width = FRAMES[frame]
    x0, y0, x1, y1 = (scene("cpu", 0.25)[2] * torch.tensor([width / SIZE[1], height / SIZE[0]] * 2)).T[:, :, None]
    x = torch.arange(width)
    half = (1 - ((2 * x + 1 - x0 - x1) / (x1 - x0)).square()).clamp(min=0).sqrt() * (y1 - y0) / 2  # of an ellipse, [M, W]
    ends = torch.stack([(y0 + y1) / 2 - half, (y0 + y1) / 2 + half], -1).round().clamp(0, height).long()
    places = [(mask + x[:, None] * height)[mask[:, 0] < mask[:, 1]].flatten() for mask in ends]
    lengths = [torch.cat([p[:1], p.diff(), height * width - p[-1:]]).tolist() for p in places]
    codes = coco.frPyObjects([{"size": [height, width], "counts": counts} for counts in lengths], height, width)

    segmentations = [{"size": [height, width], "counts": code["counts"].decode()} for code in codes]
    entries = [{"image_id": 0, "score": 1, "bbox": [0, 0, 1, 1], "segmentation": each} for each in segmentations]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as written:
        json.dump(entries, written)
        written.flush()
        file = read_coco(written.name, top=M)

    def decoded(some: slice) -> Tensor:
        masks = torch.from_numpy(coco.decode(codes[some])).permute(2, 1, 0).to(device)  # [m, W, H], as they lie in memory
        return F.adaptive_avg_pool2d(masks.float(), GRID[::-1]).mT

    functions = {
        "dmm_fast": lambda: decode_runs(file.runs("0").masks.to(device), height, width, *GRID),
        "pycocotools, area": lambda: in_parts(decoded, device),
    }
    return Case(f"decode_runs from text, {M} of a frame of {frame} to {GRID[0]}x{GRID[1]}", functions, apart=5e-3)


def upsample_argmax_case(device: str, frame: str, content: str) -> Case:
    """The labels of a frame; noise, of which nothing can be skipped, is the worst case."""
    noise = torch.randn(N, *GRID, generator=torch.Generator().manual_seed(2))
    logits = (noise if content == "noise" else 10 * discs(N, *GRID).clamp(min=-1)).to(device)
    rank, size = torch.arange(N, device=device).flip(0), FRAMES[frame]

    def interpolated() -> Tensor:
        value, index = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].max(0)
        return torch.where(value > 0, index + 1, 0).to(torch.uint8)

    functions = {"dmm_fast": lambda: upsample_argmax(logits, rank, *size), "interpolate, max": interpolated}
    return Case(f"upsample_argmax, {N} x {GRID[0]}x{GRID[1]} of {content} to {frame}", functions, apart=1e-3)


# ---- the suite ----


@pytest.mark.parametrize("device", DEVICES)
def bench_mask_iou(benchmark, device):
    run(benchmark, mask_iou_case(device), device)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("confident", [True, False], ids=["confident", "dense"])
@pytest.mark.parametrize("share", SHARES, ids=["quarter", "whole"])
@pytest.mark.parametrize("device", DEVICES)
def bench_paste_combine(benchmark, device, share, confident, backward):
    run(benchmark, paste_combine_case(device, share, confident, backward), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frame", FRAMES)
def bench_paste_masks(benchmark, frame, device):
    run(benchmark, paste_masks_case(device, frame), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frame", FRAMES)
def bench_decode_runs(benchmark, frame, device):
    pytest.importorskip("pycocotools.mask")
    run(benchmark, decode_runs_case(device, frame), device)


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frame", FRAMES)
def bench_upsample_argmax(benchmark, frame, device, content):
    run(benchmark, upsample_argmax_case(device, frame, content), device)

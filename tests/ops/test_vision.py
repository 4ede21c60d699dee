"""mask_iou and paste_combine against their plain references: values, gradients, and what torch can do with an op."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

import dmm_fast
from dmm_fast.ops import library as _library
from dmm_fast.ops import reference

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(torch.device("cuda"), marks=pytest.mark.gpu),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def distance(value: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value. NaN never passes a comparison with it."""
    assert value.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


# ---- mask_iou ----


def mask_inputs():
    """(name, a, b): random, odd sizes, ties, empties, many masks, batches."""
    generator = torch.Generator().manual_seed(0)

    def masks(*shape, p=0.4):
        return torch.rand(shape, generator=generator) < p

    empty_and_full = masks(4, 12, 70)
    empty_and_full[0], empty_and_full[1] = False, True
    same = masks(3, 20, 33)
    return [
        ("video", masks(10, 60, 107), masks(50, 60, 107)),
        ("chunks", masks(2, 130, 257), masks(3, 130, 257)),  # more than one chunk of pixels, and a ragged end
        ("one pixel", masks(2, 1, 1, p=0.9), masks(3, 1, 1, p=0.5)),
        ("63 pixels", masks(3, 7, 9), masks(2, 7, 9)),
        ("empty and full", empty_and_full, empty_and_full),
        ("identical", same, same.clone()),
        ("many", masks(70, 8, 16), masks(130, 8, 16)),
        ("no templates", masks(0, 8, 8), masks(3, 8, 8)),
        ("no proposals", masks(3, 8, 8), masks(0, 8, 8)),
        ("no pixels", masks(3, 0, 8), masks(2, 0, 8)),
        ("batch", masks(2, 3, 16, 16), masks(2, 5, 16, 16)),
        ("no batch", masks(0, 3, 16, 16), masks(0, 5, 16, 16)),
    ]


MASKS = {name: (a, b) for name, a, b in mask_inputs()}


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_mask_iou(name, device):
    a, b = (x.to(device) for x in MASKS[name])
    iou = dmm_fast.mask_iou(a, b)
    assert iou.dtype == torch.float32 and iou.is_contiguous()
    assert torch.equal(iou, reference.mask_iou(a, b))  # exact counts, one rounding


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_mask_iou_of_views(device):
    a, b = (x.to(device) for x in MASKS["video"])
    expected = reference.mask_iou(a, b)
    assert torch.equal(dmm_fast.mask_iou(a.mT.contiguous().mT, b), expected)
    assert torch.equal(dmm_fast.mask_iou(a, b.flip(0))[:, 0], expected[:, -1])
    assert torch.equal(dmm_fast.mask_iou(a[:1].expand(4, -1, -1), b), expected[:1].expand(4, -1))
    pad = torch.zeros(a.numel() + 3, dtype=torch.bool, device=device)
    pad[3:] = a.flatten()
    assert torch.equal(dmm_fast.mask_iou(pad[3:].view(a.shape), b), expected)  # no byte alignment is assumed


def test_mask_iou_counts_any_nonzero_byte():
    bytes_ = torch.randint(0, 4, (3, 20, 31), dtype=torch.uint8) * 85
    assert torch.equal(dmm_fast.mask_iou(bytes_.view(torch.bool), bytes_ > 0), reference.mask_iou(bytes_ > 0, bytes_ > 0))


def test_mask_iou_of_real_proposals(data):
    """Proposals of a DAVIS frame (RLE) against themselves: the matrix agrees with pycocotools', its diagonal is 1."""
    coco = pytest.importorskip("pycocotools.mask")
    file = sorted((data / "davis16-train" / "proposals").glob("*.json"))[0]
    entries = json.loads(file.read_text())
    rles = [e["segmentation"] for e in entries if e["image_id"] == entries[0]["image_id"]]
    masks = torch.from_numpy(coco.decode(rles)).permute(2, 0, 1).bool()  # [M, H, W]
    iou = dmm_fast.mask_iou(masks[:10], masks)
    assert torch.allclose(iou.double(), torch.from_numpy(coco.iou(rles[:10], rles, [0] * len(rles))))
    filled = masks[:10].flatten(1).any(1)
    assert torch.equal(iou[:, :10].diagonal() == 1, filled)


@pytest.mark.parametrize(
    "a, b, message",
    [
        ((2, 3), (2, 3, 4), "dmm::mask_iou: a must have shape [N, H, W] or [B, N, H, W], got [2, 3]"),
        ((2, 3, 4), (2, 3, 5), "b must have the shape of a [2, 3, 4] except for the number of masks, got [2, 3, 5]"),
        ((1, 2, 3, 4), (2, 2, 3, 4), "b must have the shape of a [1, 2, 3, 4] except for the number of masks"),
    ],
)  # fmt: skip
def test_mask_iou_refuses(a, b, message):
    with pytest.raises(RuntimeError) as error:
        dmm_fast.mask_iou(torch.ones(a).bool(), torch.ones(b).bool())
    assert message in str(error.value)


def test_mask_iou_takes_bool_only():
    masks = torch.ones(2, 3, 4)
    with pytest.raises(RuntimeError, match="dmm::mask_iou: a must be Bool, got Float"):
        dmm_fast.mask_iou(masks, masks.bool())
    with pytest.raises(RuntimeError, match="dmm::mask_iou: b must be Bool, got Byte"):
        dmm_fast.mask_iou(masks.bool(), masks.byte())


# ---- paste_combine ----

NAN, INF = math.nan, math.inf
STRANGE_BOXES = [
    [0, 0, 0, 5], [5, 5, 1, 1], [3, 3, 3, 3],  # no width, turned round, a point
    [-100, -100, -50, -50], [1e3, 1e3, 2e3, 2e3],  # outside
    [-1e6, -1e6, 1e6, 1e6], [-1e30, -1e30, 1e30, 1e30], [3, 3, 3.0001, 3.0001],  # huge, tiny
    [NAN, 0, 5, 5], [0, 0, INF, 5], [-INF, 0, INF, 5], [0, INF, 9, INF],
    [2.5, 2.5, 3.5, 3.5], [-5, -6, 4, 3], [14, 30, 20, 40],  # one pixel, over two corners
]  # fmt: skip


def paste_inputs():
    """(name, assignment [N, M], masks [M, S, S], boxes [M, 4], size), float64."""
    generator = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def case(name, N, M, S, size, boxes=None):
        assignment = rand(N, M)
        assignment[rand(N, M) < 0.3] = 0
        if boxes is None:
            centre, extent = rand(M, 2), rand(M, 2) * 0.7
            boxes = torch.cat([centre - extent / 2, centre + extent / 2], 1) * torch.tensor([size[1], size[0]] * 2)
        return name, assignment, rand(M, S, S) * 2 - 0.5, boxes, size

    confident = case("confident", 6, 20, 28, (60, 107))
    return [
        case("video", 5, 30, 28, (48, 85)),
        (*confident[:1], reference.mask_confident(confident[1]), *confident[2:]),
        case("strange boxes", 3, len(STRANGE_BOXES), 7, (33, 17), torch.tensor(STRANGE_BOXES, dtype=torch.float64)),
        case("one cell", 2, 3, 1, (9, 8)),
        case("large mask", 2, 3, 65, (20, 70)),
        case("many templates", 20, 5, 4, (16, 12)),
        case("one row", 1, 4, 5, (1, 40)),
        case("no templates", 0, 3, 4, (5, 6)),
        case("no proposals", 3, 0, 4, (5, 6)),
        case("no pixels", 2, 3, 4, (0, 6)),
        case("no cells", 2, 3, 0, (5, 6)),
    ]


PASTES = {name: rest for name, *rest in paste_inputs()}


def inputs_like(name: str, dtype: torch.dtype, device: torch.device, contiguous: bool = True):
    assignment, masks, boxes, size = PASTES[name]
    boxes = boxes.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    assignment, masks = assignment.to(device, dtype), masks.to(device, dtype)
    if not contiguous:
        assignment, masks, boxes = assignment.mT.contiguous().mT, masks.mT.contiguous().mT, boxes.mT.contiguous().mT
    return assignment.requires_grad_(), masks.requires_grad_(), boxes, size


def reference_of(assignment: Tensor, masks: Tensor, boxes: Tensor, size):
    """The reference in float64 on the values that the op sees: result and gradients for a fixed, strided gradient."""
    assignment, masks = (x.detach().double().requires_grad_() for x in (assignment, masks))
    out = reference.paste_combine(assignment, masks, boxes.double(), size)
    grad = torch.sin(torch.arange(out.numel(), dtype=torch.float64, device=out.device)).view(out.mT.shape).mT  # any strides
    return out, grad, torch.autograd.grad(out, (assignment, masks), grad)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize("name", PASTES)
def test_paste_combine(name, dtype, contiguous, device):
    assignment, masks, boxes, size = inputs_like(name, dtype, device, contiguous)
    expected, grad, expected_grads = reference_of(assignment, masks, boxes, size)
    out = dmm_fast.paste_combine(assignment, masks, boxes, size)
    assert out.dtype == dtype and out.is_contiguous()
    assert distance(out, expected) <= TOLERANCE[dtype]
    if dtype in (torch.bfloat16, torch.float16):  # the gradient arrives rounded: compare on what arrives
        grad = grad.to(dtype).double()
        double = [x.detach().double().requires_grad_() for x in (assignment, masks)]
        expected_grads = torch.autograd.grad(reference.paste_combine(*double, boxes.double(), size), double, grad)
    for value, want in zip(torch.autograd.grad(out, (assignment, masks), grad.to(dtype)), expected_grads):
        assert value.dtype == dtype
        assert distance(value, want) <= TOLERANCE[dtype]


def test_paste_is_grid_sample():
    """The reference itself against detectron2's continuous paste."""
    _, masks, boxes, (H, W) = PASTES["video"]
    x0, y0, x1, y1 = boxes.T[:, :, None]
    x = (torch.arange(W).double() + 0.5 - x0) / (x1 - x0) * 2 - 1  # [M, W]
    y = (torch.arange(H).double() + 0.5 - y0) / (y1 - y0) * 2 - 1  # [M, H]
    grid = torch.stack([x[:, None, :].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], -1)  # [M, H, W, 2]
    pasted = torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]  # [M, H, W]
    assert distance(reference.paste(masks, boxes, (H, W)), pasted) < 1e-12


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_paste_combine_repeats_bitwise(device):
    assignment, masks, boxes, size = inputs_like("video", torch.float32, device)
    runs = []
    for _ in range(2):
        out = dmm_fast.paste_combine(assignment, masks, boxes, size)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), (assignment, masks))))
    assert all(torch.equal(x, y) for x, y in zip(*runs))


@pytest.mark.parametrize("name", ["strange boxes", "one cell", "many templates"])
def test_paste_combine_gradcheck(name):
    assignment, masks, boxes, size = inputs_like(name, torch.float64, CPU)
    torch.autograd.gradcheck(lambda a, m: dmm_fast.paste_combine(a, m, boxes, size), (assignment, masks))


def test_paste_combine_in_torch_func():
    assignment, masks, boxes, size = inputs_like("many templates", torch.float64, CPU)
    inputs = assignment.detach(), masks.detach()

    def paste(backend, assignment, masks):
        return dmm_fast.paste_combine(assignment, masks, boxes, size, backend=backend)

    def gradient(backend):
        return torch.func.grad(lambda a, m: paste(backend, a, m).square().sum(), (0, 1))

    for value, expected in zip(gradient("auto")(*inputs), gradient("reference")(*inputs), strict=True):
        assert distance(value, expected) < 1e-12
    several = torch.stack([inputs[0], 2 * inputs[0]])
    for value, expected in zip(*(torch.func.vmap(gradient(b), (0, None))(several, inputs[1]) for b in ("auto", "reference"))):
        assert distance(value, expected) < 1e-12
    with pytest.raises(RuntimeError, match="dmm::paste_combine_backward: .* differentiable once"):
        torch.func.jacrev(gradient("auto"))(*inputs)
    with pytest.raises(RuntimeError, match="dmm::paste_combine: has no derivative in forward mode"):
        torch.func.jacfwd(paste, 2)("auto", *inputs)
    assert distance(torch.func.jacfwd(paste, 2)("reference", *inputs), torch.func.jacrev(paste, 2)("auto", *inputs)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_paste_combine_in_autocast(dtype):
    assignment, masks, boxes, size = inputs_like("confident", dtype, CPU)
    with torch.autocast("cpu", torch.bfloat16):
        out = dmm_fast.paste_combine(assignment, masks.float(), boxes, size)
    assert out.dtype == torch.float32
    assert torch.equal(out, dmm_fast.paste_combine(assignment.float(), masks.float(), boxes, size))
    (grad,) = torch.autograd.grad(out.sum(), assignment)
    assert grad.dtype == dtype and grad.abs().sum() > 0


def test_ties_share_the_gradient():
    """mask_confident keeps every maximum; the pasted sum and its gradient follow."""
    _, masks, boxes, size = PASTES["video"]
    assignment = torch.full((1, masks.shape[0]), 0.5, dtype=torch.float64, requires_grad=True)
    out = dmm_fast.paste_combine(reference.mask_confident(assignment), masks, boxes, size)
    assert distance(out[0], 0.5 * reference.paste(masks, boxes, size).sum(0)) < 1e-12
    (grad,) = torch.autograd.grad(out.sum(), assignment)
    assert distance(grad[0], reference.paste(masks, boxes, size).sum((1, 2))) < 1e-12


def test_gradient_of_the_gradient_is_refused():
    assignment, masks, boxes, size = inputs_like("one cell", torch.float64, CPU)
    (grad,) = torch.autograd.grad(dmm_fast.paste_combine(assignment, masks, boxes, size).sum(), masks, create_graph=True)
    with pytest.raises(RuntimeError, match="dmm::paste_combine_backward: .* differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(assignment=torch.ones(3)), "dmm::paste_combine: assignment must have shape [N, M], got [3]"),
        (dict(masks=torch.ones(4, 5, 6)), "masks must have shape [M, S, S] with M = 4, got [4, 5, 6]"),
        (dict(masks=torch.ones(3, 5, 5)), "masks must have shape [M, S, S] with M = 4, got [3, 5, 5]"),
        (dict(masks=torch.ones(4, 5, 5).double()), "masks must be Float, got Double"),
        (dict(boxes=torch.ones(4, 5)), "boxes must have shape [M, 4] with M = 4, got [4, 5]"),
        (dict(boxes=torch.ones(4, 4).half()), "boxes must be Float, got Half"),
        (dict(assignment=torch.ones(2, 4).long()), "must be float32, float64, float16 or bfloat16, got Long"),
        (dict(size=(-1, 5)), "height and width must be in [0, 2^24), got -1 and 5"),
    ],
)  # fmt: skip
def test_paste_combine_refuses(change, message):
    inputs = dict(assignment=torch.ones(2, 4), masks=torch.ones(4, 5, 5), boxes=torch.ones(4, 4), size=(6, 7)) | change
    with pytest.raises(RuntimeError) as error:
        dmm_fast.paste_combine(**inputs)
    assert message in str(error.value)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="mask_iou: backend must be one of"):
        dmm_fast.mask_iou(torch.ones(1, 2, 2).bool(), torch.ones(1, 2, 2).bool(), backend="magic")


# ---- what torch can do with the ops ----


class Step(torch.nn.Module):
    """What the network does around the matching layer: Eq. 8, then IoU with the previous masks."""

    def forward(self, assignment: Tensor, masks: Tensor, boxes: Tensor, previous: Tensor):
        combined = torch.ops.dmm.paste_combine(assignment, masks, boxes, previous.size(1), previous.size(2))
        return combined, torch.ops.dmm.mask_iou(combined > 0.5, previous)


def step_inputs():
    assignment, masks, boxes, size = inputs_like("confident", torch.float32, CPU)
    previous = torch.rand(assignment.shape[0], *size, generator=torch.Generator().manual_seed(2)) < 0.3
    return assignment.detach(), masks.detach(), boxes, previous


def assert_same_step(step):
    inputs = step_inputs()
    for value, expected in zip(step(*inputs), Step()(*inputs)):
        assert torch.allclose(value, expected)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_opcheck(device):
    a, b = (x.to(device) for x in MASKS["video"])
    torch.library.opcheck(torch.ops.dmm.mask_iou.default, (a, b))
    assignment, masks, boxes, size = inputs_like("video", torch.float32, device)
    torch.library.opcheck(torch.ops.dmm.paste_combine.default, (assignment, masks, boxes, *size))
    grad = torch.rand(assignment.shape[0], *size, device=device)
    torch.library.opcheck(torch.ops.dmm.paste_combine_backward.default, (grad, assignment.detach(), masks.detach(), boxes))


def test_script():
    assert_same_step(torch.jit.script(Step()))


def test_export():
    N, M, H, W = (torch.export.Dim(name) for name in "NMHW")
    shapes = ({0: N, 1: M}, {0: M}, {0: M}, {0: N, 1: H, 2: W})
    program = torch.export.export(Step(), step_inputs(), dynamic_shapes=shapes)
    assert_same_step(program.module())


def test_compile():
    assert_same_step(torch.compile(Step(), fullgraph=True, backend="aot_eager"))


def test_compiled_gradient():
    assignment, masks, boxes, size = inputs_like("confident", torch.float32, CPU)

    def loss(assignment, masks):
        return dmm_fast.paste_combine(assignment, masks, boxes, size).square().sum()

    expected = torch.autograd.grad(loss(assignment, masks), (assignment, masks))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value, want in zip(torch.autograd.grad(compiled(assignment, masks), (assignment, masks)), expected):
        assert distance(value, want) < 1e-5


@pytest.mark.gpu
def test_cuda_graph():
    """No synchronisation, and nothing but the caching allocator: both ops and the backward can be captured."""
    assignment, masks, boxes, previous = (x.cuda() for x in step_inputs())
    grad = torch.rand(assignment.shape[0], *previous.shape[1:], device="cuda")

    def step():
        return (
            *Step()(assignment, masks, boxes, previous),
            *torch.ops.dmm.paste_combine_backward(grad, assignment, masks, boxes),
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assignment.copy_(assignment.roll(1, 0))
    graph.replay()
    for value, expected in zip(captured, step()):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("backend", _library.BACKENDS)
def test_backends_agree(backend):
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("no GPU: tests/ops/test_vision_triton.py runs the kernels in Triton's interpreter")
    device = torch.device("cuda" if backend == "triton" else "cpu")
    a, b = (x.to(device) for x in MASKS["video"])
    assert torch.equal(dmm_fast.mask_iou(a, b, backend=backend), reference.mask_iou(a, b))
    inputs = inputs_like("video", torch.float32, device)
    assert distance(dmm_fast.paste_combine(*inputs, backend=backend), reference.paste_combine(*inputs)) < 1e-5

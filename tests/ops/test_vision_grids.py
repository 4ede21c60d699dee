"""paste_masks, decode_runs and upsample_argmax against their plain references, and what torch can do with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import grids
from torch import Tensor

import dmm_fast
from dmm_fast.ops import library, reference
from dmm_fast.ops.vision import NO_RUN

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def moved(inputs, device: torch.device, contiguous: bool = True):
    """The inputs on the device; not contiguous: with gaps between their elements."""
    inputs = tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)
    if contiguous:
        return inputs
    strided = tuple(torch.stack([x, x + 1], -1)[..., 0] if isinstance(x, Tensor) else x for x in inputs)
    assert not any(x.is_contiguous() for x in strided if isinstance(x, Tensor) and x.numel() > 1)
    return strided


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- paste_masks ----


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", grids.DTYPES, ids=named)
@pytest.mark.parametrize("name", grids.PASTES)
def test_paste_masks(name, dtype, contiguous, device):
    inputs = moved(grids.paste_inputs(name, dtype), device, contiguous)
    cover = dmm_fast.paste_masks(*inputs)
    assert cover.is_contiguous()
    grids.check_cover(cover, *inputs)


def test_two_samples_are_the_frame_at_half_size():
    """Paste at full size, threshold, average 2 x 2 pixels."""
    masks, boxes, rows, columns, _ = grids.paste_inputs("video", torch.float64)
    above = reference.paste(masks, boxes * 2, (2 * rows, 2 * columns)) > 0.5
    assert torch.equal(dmm_fast.paste_masks(masks, boxes, rows, columns), F.avg_pool2d(above.double(), 2))


def test_tiny_objects_are_found_where_a_point_sees_them():
    boxes = torch.tensor([[3.24, 3.24, 3.26, 3.26], [3.3, 3.3, 3.6, 3.6]])  # around a point; between points
    cover = dmm_fast.paste_masks(torch.ones(2, 7, 7), boxes, 6, 6, 2)
    assert cover[0, 3, 3] == 0.25 and cover.sum() == 0.25


def test_paste_masks_has_no_gradient():
    masks, *rest = grids.paste_inputs("video")
    assert not dmm_fast.paste_masks(masks.requires_grad_(), *rest).requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(masks=torch.ones(3, 4)), "dmm::paste_masks: masks must have shape [M, S, S], got [3, 4]"),
        (dict(masks=torch.ones(3, 4, 5)), "masks must have shape [M, S, S], got [3, 4, 5]"),
        (dict(masks=torch.ones(3, 4, 4).long()), "masks must be float32, float64, float16 or bfloat16, got Long"),
        (dict(boxes=torch.ones(4, 4)), "boxes must have shape [M, 4] with M = 3, got [4, 4]"),
        (dict(boxes=torch.ones(3, 5)), "boxes must have shape [M, 4] with M = 3, got [3, 5]"),
        (dict(boxes=torch.ones(3, 4).half()), "boxes must be Float, got Half"),
        (dict(masks=torch.ones(3, 4, 4).double()), "boxes must be Double, got Float"),
        (dict(samples=0), "samples must be in [1, 64], got 0"),
        (dict(samples=65), "samples must be in [1, 64], got 65"),
        (dict(rows=-1), "rows and columns must be in [0, 2^24 / samples), got -1 and 7"),
        (dict(columns=2**23), "rows and columns must be in [0, 2^24 / samples), got 6 and 8388608"),
    ],
)  # fmt: skip
def test_paste_masks_refuses(change, message):
    inputs = dict(masks=torch.ones(3, 4, 4), boxes=torch.ones(3, 4), rows=6, columns=7, samples=2) | change
    with pytest.raises(RuntimeError) as error:
        dmm_fast.paste_masks(**inputs)
    assert message in str(error.value)


# ---- decode_runs ----


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("name", grids.RUNS)
def test_decode_runs(name, contiguous, device):
    runs, *sizes = grids.run_inputs(name)
    share = dmm_fast.decode_runs(*moved((runs,), device, contiguous), *sizes)
    grids.check_decoded(share, runs.to(device), *sizes)


def test_decode_runs_is_pycocotools():
    """The masks of a code at full size, and cells of whole pixels as averages of them."""
    coco = pytest.importorskip("pycocotools.mask")
    masks = grids.full_masks(*grids.run_inputs("video")[:3])  # [M, H, W]
    codes = coco.encode(masks.permute(1, 2, 0).contiguous().byte().numpy().copy(order="F"))
    decoded = torch.from_numpy(coco.decode(codes)).permute(2, 0, 1)
    runs = grids.run_inputs("video")[0]
    assert torch.equal(dmm_fast.decode_runs(runs, 48, 85, 48, 85), decoded.float())
    assert torch.allclose(dmm_fast.decode_runs(runs, 48, 85, 12, 17), F.avg_pool2d(decoded.float(), (4, 5)))


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_decode_runs_of_a_large_frame(device):
    """A 4K frame: positions beyond 2^22, more pixels than float32 counts, a mask that leaves out a single pixel."""
    height, width = 5000, 6000
    last = height * width - 1
    runs = torch.tensor([[0, last, NO_RUN], [last, NO_RUN, NO_RUN], [0, 5, last]], dtype=torch.int32, device=device)
    pixel = torch.zeros(250, 300, device=device)
    pixel[-1, -1] = 1 / 400
    first = torch.zeros(250, 300, device=device)
    first[0, 0] = 5 / 400
    share = dmm_fast.decode_runs(runs, height, width, 250, 300)
    torch.testing.assert_close(share, torch.stack([1 - pixel, pixel, first + pixel]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_bad_runs_stay_in_memory(device):
    """Negative, descending, extreme places: anything may come out, within [0, 1] on the CPU, but nothing is harmed."""
    generator = torch.Generator().manual_seed(0)
    runs = torch.randint(-(2**31), 2**31 - 1, (20, 31), generator=generator).int()
    near = torch.randint(-40, 2100, (20, 31), generator=generator).int()
    for bad in (runs, near, near.flip(1).sort(1, descending=True).values, torch.full((2, 3), -(2**31)).int()):
        for rows, columns in ((10, 12), (40, 50), (97, 101)):
            share = dmm_fast.decode_runs(bad.to(device), 40, 50, rows, columns).cpu()
            assert share.shape == (len(bad), rows, columns)
            if device == CPU:
                assert bool(((share >= 0) & (share <= 1)).all())


@pytest.mark.parametrize(
    "runs, sizes, message",
    [
        (torch.ones(3).int(), (5, 6, 2, 3), "dmm::decode_runs: runs must have shape [M, R], got [3]"),
        (torch.ones(3, 2).long(), (5, 6, 2, 3), "dmm::decode_runs: runs must be Int, got Long"),
        (torch.ones(3, 2).int(), (0, 6, 2, 3), "height and width must be in [1, 2^16), their product below 2^31, got 0 and 6"),
        (torch.ones(3, 2).int(), (2**16 - 1, 2**15 + 1, 2, 3), "product below 2^31, got 65535 and 32769"),
        (torch.ones(3, 2).int(), (2**62, 2**62, 2, 3), "height and width must be in"),
        (torch.ones(3, 2).int(), (5, 6, -1, 3), "rows and columns must be in [0, 2^16), got -1 and 3"),
        (torch.ones(3, 2).int(), (5, 6, 2, 2**16), "rows and columns must be in [0, 2^16), got 2 and 65536"),
    ],
)  # fmt: skip
def test_decode_runs_refuses(runs, sizes, message):
    with pytest.raises(RuntimeError) as error:
        dmm_fast.decode_runs(runs, *sizes)
    assert message in str(error.value)


# ---- upsample_argmax ----


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", grids.DTYPES, ids=named)
@pytest.mark.parametrize("name", grids.LABELS)
def test_upsample_argmax(name, dtype, contiguous, device):
    inputs = moved(grids.label_inputs(name, dtype), device, contiguous)
    labels = dmm_fast.upsample_argmax(*inputs)
    assert labels.is_contiguous()
    grids.check_labels(labels, *inputs)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_ties_go_by_rank_then_index(device):
    logits = torch.ones(3, 4, 4, device=device)
    for rank, winner in (([0, 1, 2], 3), ([5, 5, 5], 1), ([-7, 9, 9], 2), ([2**40, 2**40 - 1, 0], 1)):
        labels = dmm_fast.upsample_argmax(logits, torch.tensor(rank, device=device), 9, 7)
        assert bool((labels == winner).all())
    assert not dmm_fast.upsample_argmax(torch.zeros(3, 4, 4, device=device), torch.arange(3, device=device), 9, 7).any()


def test_a_peak_between_two_labels():
    """Three logits cross within one step of the columns: the middle one is seen although it wins at no column."""
    logits = torch.tensor([[[4.0, -1.0]], [[1.9, 1.9]], [[-1.0, 4.0]]])
    labels = dmm_fast.upsample_argmax(logits, torch.arange(3), 1, 40)
    assert labels.unique_consecutive().tolist() == [1, 2, 3]


def test_an_object_at_no_row_of_the_logits_edge():
    """One row above 0 between rows below: the labels follow it on both sides, and no further."""
    logits = torch.full((1, 5, 3), -1.0)
    logits[0, 2] = 1
    labels = dmm_fast.upsample_argmax(logits, torch.zeros(1).long(), 50, 30)
    assert labels[:20].sum() == 0 and labels[30:].sum() == 0 and bool(labels[20:30].all())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=torch.ones(3, 4)), "dmm::upsample_argmax: logits must have shape [N, h, w], got [3, 4]"),
        (dict(logits=torch.ones(256, 1, 1)), "a label is a byte: N must be at most 255, got 256"),
        (dict(logits=torch.ones(2, 4, 5).int()), "logits must be float32, float64, float16 or bfloat16, got Int"),
        (dict(logits=torch.ones(2, 0, 5)), "h and w of logits must be in [1, 2^24), got [2, 0, 5]"),
        (dict(rank=torch.ones(3).long()), "rank must have shape [N] with N = 2, got [3]"),
        (dict(rank=torch.ones(2)), "rank must be Long, got Float"),
        (dict(height=-1), "height and width must be in [0, 2^24), got -1 and 7"),
    ],
)  # fmt: skip
def test_upsample_argmax_refuses(change, message):
    inputs = dict(logits=torch.ones(2, 4, 5), rank=torch.ones(2).long(), height=6, width=7) | change
    with pytest.raises(RuntimeError) as error:
        dmm_fast.upsample_argmax(**inputs)
    assert message in str(error.value)


# ---- what torch can do with the ops ----


class Grids(torch.nn.Module):
    """All three, of sizes that the inputs give."""

    def forward(self, masks: Tensor, boxes: Tensor, runs: Tensor, logits: Tensor, frame: Tensor):
        rows, columns = logits.size(1), logits.size(2)
        height, width = frame.size(0), frame.size(1)
        cover = torch.ops.dmm.paste_masks(masks, boxes, rows, columns, 2)
        share = torch.ops.dmm.decode_runs(runs, height, width, rows, columns)
        rank = torch.arange(logits.size(0), device=logits.device)
        return cover, share, torch.ops.dmm.upsample_argmax(logits, rank, height, width)


def all_inputs(device: torch.device = CPU):
    masks, boxes, rows, columns, _ = grids.paste_inputs("video")
    runs, height, width, *_ = grids.run_inputs("video")
    logits = grids.label_inputs("video")[0]
    assert (rows, columns) == logits.shape[1:]
    return moved((masks, boxes, runs, logits, torch.zeros(height, width)), device)


def assert_same(module, inputs) -> None:
    for value, expected in zip(module(*inputs), Grids()(*inputs)):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_opcheck(device):
    torch.library.opcheck(torch.ops.dmm.paste_masks.default, moved(grids.paste_inputs("video"), device))
    torch.library.opcheck(torch.ops.dmm.decode_runs.default, moved(grids.run_inputs("video"), device))
    torch.library.opcheck(torch.ops.dmm.upsample_argmax.default, moved(grids.label_inputs("video"), device))


def test_opcheck_of_inputs_that_require_a_gradient():
    masks, *rest = grids.paste_inputs("video")
    torch.library.opcheck(torch.ops.dmm.paste_masks.default, (masks.requires_grad_(), *rest))
    logits, *rest = grids.label_inputs("video")
    torch.library.opcheck(torch.ops.dmm.upsample_argmax.default, (logits.requires_grad_(), *rest))


def test_script():
    assert_same(torch.jit.script(Grids()), all_inputs())


def test_export():
    M, K, R, N, h, w, H, W = (torch.export.Dim(name) for name in ("M", "K", "R", "N", "h", "w", "H", "W"))
    shapes = ({0: M}, {0: M}, {0: K, 1: R}, {0: N, 1: h, 2: w}, {0: H, 1: W})
    program = torch.export.export(Grids(), all_inputs(), dynamic_shapes=shapes)
    masks, boxes, runs, logits, frame = all_inputs()
    assert_same(program.module(), (masks, boxes, runs, logits, frame))
    assert_same(program.module(), (masks[:5], boxes[:5], runs[:3, :9], logits[:2, :9, :8], frame[:31, :29]))


def test_compile():
    module = torch.compile(Grids(), fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same(module, all_inputs())
    masks, boxes, runs, logits, frame = all_inputs()
    assert_same(module, (masks[:5], boxes[:5], runs[:3, :9], logits[:2, :9, :8], frame[:31, :29]))


@pytest.mark.gpu
def test_cuda_graph():
    """No synchronisation, and nothing but the caching allocator."""
    inputs = all_inputs(torch.device("cuda"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        Grids()(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = Grids()(*inputs)
    inputs[0].copy_(inputs[0].roll(1, 0))
    inputs[3].neg_()
    graph.replay()
    for value, expected in zip(captured, Grids()(*inputs)):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("backend", library.BACKENDS)
def test_backends_agree(backend):
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("no GPU: tests/ops/test_vision_triton.py runs the kernels in Triton's interpreter")
    device = torch.device("cuda" if backend == "triton" else "cpu")
    inputs = moved(grids.paste_inputs("video"), device)
    grids.check_cover(dmm_fast.paste_masks(*inputs, backend=backend), *inputs)
    inputs = moved(grids.run_inputs("video"), device)
    grids.check_decoded(dmm_fast.decode_runs(*inputs, backend=backend), *inputs)
    inputs = moved(grids.label_inputs("video"), device)
    labels = dmm_fast.upsample_argmax(*inputs, backend=backend)
    if backend == "reference":  # whose exact ties are rounded apart
        assert torch.equal(labels, reference.upsample_argmax(*inputs))
    else:
        grids.check_labels(labels, *inputs)


@pytest.mark.parametrize("op", [dmm_fast.paste_masks, dmm_fast.decode_runs, dmm_fast.upsample_argmax])
def test_unknown_backend_is_refused(op):
    inputs = {"paste_masks": grids.paste_inputs, "decode_runs": grids.run_inputs, "upsample_argmax": grids.label_inputs}
    with pytest.raises(ValueError, match=f"{op.__name__}: backend must be one of"):
        op(*inputs[op.__name__]("video"), backend="magic")

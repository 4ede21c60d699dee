"""The step as a CUDA graph: the same results as without, at any number of proposals, through changes of shape."""

from __future__ import annotations

import pytest
import torch
from dmm_fast.graph import GraphStep, pad
from dmm_fast.model import Config, DMMNet, Proposals
from dmm_fast.model.masks import mask_boxes

from dmm_fast.segmenter import Segmenter

SIZE = (64, 96)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def proposals(count: int, device: str = "cpu") -> Proposals:
    generator = torch.Generator().manual_seed(count)
    masks = torch.zeros((count, *SIZE), dtype=torch.bool)
    for mask in masks:
        y, x = torch.randint(0, 40, (2,), generator=generator).tolist()
        mask[y : y + 20, x : x + 30] = True
    return Proposals(*(part.to(device) for part in (mask_boxes(masks), torch.rand(count, generator=generator), masks)))


def test_padding_changes_no_step():
    """What the graph relies on: padded proposals are those of the step without them."""
    torch.manual_seed(0)
    frame = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    for refine in ("none", "light", "heavy"):
        net = DMMNet(Config(backbone="test_resnet", input_size=SIZE, iou_weight=0.5, refine=refine, hidden=16)).eval()
        with torch.no_grad():
            state = net.start(frame, proposals(2).masks, torch.ones(2, dtype=torch.bool))
            plain, after = net.step(frame, proposals(5), state)
            padded, after_padded = net.step(frame, pad(proposals(5), 9), state)
        torch.testing.assert_close(padded._replace(parts=plain.parts), plain)
        torch.testing.assert_close(after_padded, after)


def test_too_many_and_no_gpu():
    with pytest.raises(ValueError, match="at most 3 proposals, got 5"):
        pad(proposals(5), 3)
    with pytest.raises(ValueError, match="a network on a GPU"):
        GraphStep(DMMNet(Config()), 5)
    with pytest.raises(ValueError, match="graph needs a CUDA device"):
        Segmenter("iou", graph=True)


@gpu
@pytest.mark.parametrize("refine", ["none", "light", "heavy"])
def test_graph_equals_eager(refine):
    torch.manual_seed(0)
    net = DMMNet(Config(backbone="test_resnet", input_size=SIZE, iou_weight=0.5, refine=refine, hidden=16)).cuda().eval()
    step = GraphStep(net, 9)
    for objects in (2, 3):  # the second captures again
        first = proposals(objects, "cuda").masks
        frames = torch.randint(0, 256, (4, 3, *SIZE), dtype=torch.uint8, device="cuda")
        with torch.no_grad():
            state = net.start(frames[0], first, torch.ones(objects, dtype=torch.bool, device="cuda"))
            following = state
            for frame, count in zip(frames[1:], (9, 4, 7)):
                expected, state = net.step(frame, proposals(count, "cuda"), state)
                found, following = step(frame, proposals(count, "cuda"), following)
                assert torch.equal(found.labels, expected.labels) and torch.equal(found.proposal, expected.proposal)
                torch.testing.assert_close(found.masks, expected.masks, atol=1e-4, rtol=1e-4)

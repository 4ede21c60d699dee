"""A live frame: detector and network with one backbone, which runs once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dmm_fast.model.network import make_backbone
from PIL import Image
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, box_iou

from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.proposals.detector import Detector, packaged_detector
from dmm_fast.proposals.layers import DetectorConfig, Layers, cell_anchors
from dmm_fast.proposals.live import Live, shares_backbone
from dmm_fast.proposals.network import build
from dmm_fast.proposals.traceable import lags, pool_regions


@pytest.fixture(scope="module")
def detector() -> Detector:
    return packaged_detector()


@pytest.fixture(scope="module")
def frame(data) -> Tensor:
    """A real one, 427 x 240: both sides are odd at some level."""
    file = data / "clips" / "JPEGImages" / "horsejump-high" / "00000.jpg"
    return torch.from_numpy(np.array(Image.open(file).resize((427, 240)))).permute(2, 0, 1).contiguous()


def test_sharing_is_told_by_weights_and_size(detector):
    small = Segmenter()
    assert shares_backbone(small.net, detector)
    assert not shares_backbone(small.net, packaged_detector(short_side=480))
    assert shares_backbone(Segmenter(short_side=480).net, packaged_detector(short_side=480))
    assert not shares_backbone(Segmenter("iou").net, detector)
    assert not shares_backbone(small.net, lambda frame: None)
    other = copy.deepcopy(small.net)
    with torch.no_grad():
        next(other.backbone.parameters()).mul_(1.001)
    assert not shares_backbone(other, detector)


def test_smaller_frames_that_the_network_enlarges_are_shared_too(frame, monkeypatch):
    net, network = Segmenter(short_side=300)._inference, packaged_detector(short_side=300).network
    expected = network(frame)
    monkeypatch.setattr(network, "forward", None)  # its own backbone is not run
    with torch.no_grad():
        found = Live(net, network, True).propose(frame, net.encode(frame[None]))
    assert torch.allclose(found.scores[:3], expected[1][:3], atol=0.1)


def test_shared_features_give_much_the_same_proposals(detector, frame):
    """The image has no padding, so that cells lie elsewhere and no figure is the same."""
    net = Segmenter()._inference
    expected = detector(frame)
    with torch.no_grad():
        found = Live(net, detector.network, True).propose(frame, net.encode(frame[None]))
    sure = expected.boxes[expected.scores > 0.5]
    assert len(sure) > 3 and box_iou(sure, found.boxes).amax(1).mean() > 0.65


def halvings() -> nn.Sequential:
    """Means of 3 x 3 pixels at every other place, five times."""
    convolutions = nn.Sequential(*(Conv2dSame(1, 1, 3, stride=2, bias=False) for _ in range(5)))
    for convolution in convolutions:
        nn.init.constant_(convolution.weight, 1 / 9)
    return convolutions.requires_grad_(False)


def test_regions_are_read_where_they_lie():
    """In an image whose values are its columns' numbers, means are places: the same with padding as without."""
    image = torch.arange(427.0).expand(1, 1, 240, 427)
    boxes = torch.tensor([[90.0, 90, 130, 140], [100, 80, 200, 180], [70, 60, 300, 170], [100, 80, 310, 200]]) + 3
    pooled = []
    for x in (image, F.pad(image, [0, 21, 0, 16])):
        levels = [halvings()[: level + 2](x) for level in range(4)]
        down, right = lags(x.shape[2], True), lags(x.shape[3], True)
        pooled += [pool_regions(levels, boxes, 7, down, right), pool_regions(levels, boxes, 7, [0] * 4, [0] * 4)]
    torch.testing.assert_close(pooled[0], pooled[2], atol=1e-2, rtol=0)
    assert torch.equal(pooled[2], pooled[3]) and ((pooled[0] - pooled[1]).abs().amax((1, 2, 3)) > 0.9).all()


def test_strides_may_round_down(detector):
    """As ConvNeXt's do: what an odd level's last row lies in is missing, the rows before have theirs as where there is padding."""
    network, nowhere = detector.network, [0] * 4
    counts = [block[0].in_channels for block in network.fpn.inner_blocks]
    levels = [torch.rand(1, count, 16 >> level, 24 >> level) for level, count in enumerate(counts)]
    with torch.no_grad():
        whole = network.pyramid(levels, nowhere, nowhere)
        part = network.pyramid(
            [rows[:, :, : 15 >> level, : 23 >> level] for level, rows in enumerate(levels)], nowhere, nowhere
        )
    assert [tuple(rows.shape[2:]) for rows in part] == [(15, 23), (7, 11), (3, 5), (1, 2)]
    torch.testing.assert_close(part[0][:, :, :7, :15], whole[0][:, :, :7, :15])


def test_where_nothing_is_found_there_are_no_parts(frame):
    """Of the padding that a step then looks at neither."""
    net = Segmenter()._inference
    masks, valid = torch.zeros((2, 240, 427), dtype=torch.bool), torch.ones(2, dtype=torch.bool)
    masks[0, 60:180, 150:300] = masks[1, :40, :40] = True
    with torch.no_grad():
        live = Live(net, packaged_detector(threshold=1.0).network, True)
        found, output, _ = live(frame, net.start(frame, masks, valid))
    assert len(found.scores) == 0 and output.lost.all() and output.parts.shape == (2, 0)


def test_frames_smaller_than_the_detectors_are_its_own(detector, frame):
    """It enlarges them, the network does not."""
    net = Segmenter()._inference
    frame = frame[:, :200, :300]
    with torch.no_grad():
        found = Live(net, detector.network, True).propose(frame, net.encode(frame[None]))
    for ours, theirs in zip(found, detector(frame)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("refine", [None, "none"])
def test_a_segmenter_joins_them(detector, frame, refine, monkeypatch):
    """Two frames, by one function; and the detector's own call is not needed."""
    segmenter = Segmenter(refine=refine, proposer=detector)
    assert segmenter._live.shared
    ids = np.zeros((240, 427), np.uint8)
    ids[60:180, 150:300] = 1
    segmenter.start(frame, ids)
    following = frame.roll(3, 2)
    proposals = segmenter._live.propose(following, segmenter._inference.encode(following[None]))
    apart = Segmenter(refine=refine)
    apart.start(frame, ids)
    monkeypatch.setattr(Detector, "__call__", lambda *_: pytest.fail("called"))
    expected, result = apart.step(following, proposals), segmenter.step(following)
    assert np.array_equal(result.ids, expected.ids) and result.objects == expected.objects


def test_a_segmenter_asks_the_others(detector, frame):
    """Another matcher, and fewer proposals than the detector gives: a step with the detector's own proposals."""
    assert Segmenter("iou", proposer=detector)._live.shared is False
    assert Segmenter(matcher="greedy", proposer=detector)._live is None
    assert Segmenter(decision="assign", proposer=detector)._live is None
    many = packaged_detector(top=60)
    assert Segmenter(proposer=many)._live is None


@pytest.mark.parametrize("side", [224, 225, 226, 228, 232, 240, 427])
def test_lags_are_where_cells_lie(side):
    """What a cell sees of an image, and what the same cell sees with zeros behind it until 32 divides it."""
    for level, lag in enumerate(lags(side, True)):
        middles = []
        for length in (side, side + -side % 32):
            image = torch.ones((1, 1, 8, length), requires_grad=True)
            halvings()[: level + 2](image)[0, 0, 0, 3].backward()
            seen = image.grad.sum((0, 1, 2)).nonzero()
            middles.append((seen.min() + seen.max()).item() / 2)
        assert middles[1] - middles[0] == lag
    assert lags(side, False) == [0, 0, 0, 0]


def test_layers_are_torchvisions():
    """Names, initial values and results: weights of either serve both, and training starts from the same."""
    config = DetectorConfig(fpn=8, box=16, masks=2)
    torch.manual_seed(0)
    ours = Layers(config)
    torch.manual_seed(0)
    _, channels, *_ = make_backbone(config.backbone, False)
    heads = ours.roi_heads
    pairs = [
        (ours.backbone.fpn, FeaturePyramidNetwork(channels, 8)),
        (ours.rpn.head, RPNHead(8, 6)),
        (heads.box_head, TwoMLPHead(8 * 7**2, 16)),
        (heads.box_predictor, FastRCNNPredictor(16, 2)),
        (heads.mask_head, MaskRCNNHeads(8, [8, 8], 1)),
        (heads.mask_predictor, MaskRCNNPredictor(8, 8, 2)),
    ]
    for one, other in pairs:
        one, other = one.state_dict(), other.state_dict()
        assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    levels = [torch.rand(1, count, 41 >> k, 57 >> k) for k, count in enumerate(channels)]
    features = pairs[0][0](levels)
    assert all(map(torch.equal, features, pairs[0][1](dict(zip("0123", levels))).values()))
    assert all(all(map(torch.equal, *both)) for both in zip(pairs[1][0](features), pairs[1][1](features)))
    regions, masks = torch.rand(3, 8, 7, 7), torch.rand(3, 8, 14, 14)
    regions, same = (pair(regions) for pair in pairs[2])
    assert torch.equal(regions, same) and all(map(torch.equal, pairs[3][0](regions), pairs[3][1](regions)))
    masks, same = (pair(masks) for pair in pairs[4])
    assert torch.equal(masks, same) and torch.equal(pairs[5][0](masks), pairs[5][1](masks))


def test_anchors_are_torchvisions_where_that_divides():
    net = build(DetectorConfig())
    own = net.rpn.anchor_generator
    theirs = AnchorGenerator(own.sizes, own.aspect_ratios)
    images = ImageList(torch.zeros(2, 3, 128, 192), [(120, 190), (128, 192)])
    levels = [torch.zeros(2, 1, 128 // stride, 192 // stride) for stride in (8, 16, 32, 64)]
    for ours, expected in zip(own(images, levels), theirs(images, levels), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(cell_anchors(DetectorConfig()), torch.stack(theirs.cell_anchors))

"""The step as a CUDA graph: the same results as without, at any number of proposals, through changes of shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dmm_fast.model import Config, DMMNet, Proposals
from dmm_fast.model.masks import mask_boxes
from torch.utils._pytree import tree_leaves, tree_map

from dmm_fast.data.synthetic import Scene
from dmm_fast.inference.graph import Graph, GraphStep, pad
from dmm_fast.inference.segmenter import Segmenter, _proposals, graph_wanted
from dmm_fast.proposals.detector import packaged_detector
from dmm_fast.proposals.traceable import ROUNDS

SIZE = (64, 96)
gpu = pytest.mark.gpu


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


class Recorded(GraphStep):
    """The graph's bookkeeping without a GPU: what it would capture runs as it is."""

    def __init__(self, net: DMMNet, top: int):
        self.function, self.top, self._key, self.captures = net.step, top, None, 0

    def _capture(self, inputs):
        self._inputs = tree_map(torch.clone, inputs)

    def _replay(self):
        *self._results, following = self.function(*self._inputs)
        for own, new in zip(tree_leaves(self._inputs[-1]), tree_leaves(following)):
            own.copy_(new)


def objects(*ids: int) -> dict[int, torch.Tensor]:
    return dict(zip(ids, proposals(len(ids)).masks))


def test_when_the_segmenter_uses_it():
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert graph_wanted(None, gpu, "dmm", "confident") and graph_wanted(True, gpu, "dmm", "confident")
    assert not graph_wanted(False, gpu, "dmm", "confident") and not graph_wanted(None, cpu, "dmm", "confident")
    assert not graph_wanted(None, gpu, "hungarian", "confident") and not graph_wanted(None, gpu, "dmm", "assign")
    with pytest.raises(ValueError, match="the matcher 'dmm'"):
        graph_wanted(True, gpu, "greedy", "confident")


@pytest.mark.parametrize("refine", ["none", "light"])
def test_objects_come_and_go_in_few_captures(refine, monkeypatch):
    """The results are those without a graph, and only more slots capture again."""
    torch.manual_seed(0)
    config = Config(backbone="test_resnet", input_size=SIZE, iou_weight=0.5, refine=refine, hidden=16, top=9)
    net = DMMNet(config).eval()
    monkeypatch.setattr("dmm_fast.inference.segmenter._build", lambda *_: net)
    eager = Segmenter(config)
    monkeypatch.setattr("dmm_fast.inference.segmenter.graph_wanted", lambda *_: True)
    monkeypatch.setattr("dmm_fast.inference.segmenter.GraphStep", Recorded)
    graph = Segmenter(config)
    frames = np.random.default_rng(0).integers(0, 256, (9, *SIZE, 3), dtype=np.uint8)
    captures = []
    for segmenter in (eager, graph):
        segmenter.start(frames[0], objects(1, 2, 3))
    for number, frame in enumerate(frames[1:]):
        for segmenter in (eager, graph):
            if number == 1:
                segmenter.add(objects(4))  # a slot is free
            if number == 3:
                segmenter.drop([2, 3])
            if number == 5:
                segmenter.add(objects(7, 8, 9))  # five objects: more slots
        found = proposals(0) if number == 6 else proposals(3 + number % 5)
        expected, result = eager.step(frame, found), graph.step(frame, found)
        assert np.array_equal(result.ids, expected.ids) and [o.id for o in result.objects] == [o.id for o in expected.objects]
        for ours, theirs in zip(result.objects, expected.objects):
            assert (ours.proposal, ours.lost) == (theirs.proposal, theirs.lost)
            assert ours.score == pytest.approx(theirs.score, abs=1e-5)
        captures.append(graph._graph_step.captures)
    assert captures == [1, 1, 1, 1, 1, 2, 2, 2]


def test_a_capture_that_fails_leaves_no_graph():
    torch.manual_seed(0)
    net = DMMNet(Config(backbone="test_resnet", input_size=SIZE, iou_weight=0.5, refine="none", top=9)).eval()
    frame = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    state, wider = (net.start(frame, proposals(n).masks, torch.ones(n, dtype=torch.bool)) for n in (2, 3))
    graph = Recorded(net, 9)

    def step():
        return graph(frame, proposals(5), tree_map(torch.clone, state))[0].labels

    first, capture = step(), graph._capture

    def failing(inputs):
        capture(inputs)
        raise RuntimeError("out of memory")

    graph._capture = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        graph(frame, proposals(5), wider)
    graph._capture = capture
    assert torch.equal(step(), first) and graph.captures == 2


def test_a_live_frame_is_one_graph(monkeypatch):
    """Detector and step together, and captured again only for more slots."""

    class RecordedLive(Recorded, Graph):
        __call__ = Graph.__call__

        def __init__(self, function, net):
            self.function, self._key, self.captures = function, None, 0

    eager = Segmenter(proposer=packaged_detector(top=9))
    monkeypatch.setattr("dmm_fast.inference.segmenter.graph_wanted", lambda *_: True)
    monkeypatch.setattr("dmm_fast.inference.segmenter.GraphStep", Recorded)
    monkeypatch.setattr("dmm_fast.inference.segmenter.Graph", RecordedLive)
    detector = packaged_detector(top=9)
    detector.network.rounds = ROUNDS  # as on a GPU
    graph = Segmenter(proposer=detector)
    scene, captures = Scene(0, size=(96, 130), objects=3), []
    masks = torch.from_numpy(scene.render(0)[1])
    for segmenter in (eager, graph):
        segmenter.start(scene.render(0)[0], {k: masks == k for k in (1, 2)})
    for number in range(1, 5):
        if number == 3:
            eager.add({3: masks == 3})
            graph.add({3: masks == 3})
        expected, result = (segmenter.step(scene.render(number)[0]) for segmenter in (eager, graph))
        assert np.array_equal(result.ids, expected.ids)
        captures.append(graph._live.captures)
    assert captures == [1, 1, 2, 2]


@gpu
def test_a_live_graph_equals_eager():
    scene = Scene(0, size=(240, 432), objects=3)
    segmenters = [Segmenter(device="cuda", proposer=packaged_detector(device="cuda"), graph=graph) for graph in (True, False)]
    for segmenter in segmenters:
        segmenter.start(*scene.render(0))
    for number in range(1, 5):
        found, expected = (segmenter.step(scene.render(number)[0]) for segmenter in segmenters)
        assert (found.ids != expected.ids).mean() < 1e-3
        assert [o.lost for o in found.objects] == [o.lost for o in expected.objects]


def test_no_proposals_are_of_the_kind_of_others():
    """A frame without proposals must not capture again."""
    soft = Proposals(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 28, 28))
    for given, kind in ((soft, (torch.float32, 28, 28)), (proposals(0), (torch.bool, *SIZE))):
        none, kept = _proposals(given, SIZE, 9, torch.device("cpu"))
        assert (none.masks.dtype, *none.masks.shape[1:]) == kind and kept == [] and none.scores.tolist() == [float("-inf")]


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
                torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)

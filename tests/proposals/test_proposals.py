"""Proposals: COCO results files, good and bad, and the live detector on random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from dmm_fast.model import Proposals
from dmm_fast.model.masks import mask_boxes
from pycocotools import mask as coco

from dmm_fast.ops.vision import paste_combine
from dmm_fast.proposals.base import ProposalError
from dmm_fast.proposals.coco import CocoWriter, read_coco, write_coco
from dmm_fast.proposals.mask_rcnn import TorchvisionProposer

SIZE = (37, 53)


def random_masks(count, seed=0, size=SIZE):
    """Blobs, with the first and last pixel set in some, an empty and a full mask among them: bool [M, H, W]."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[: size[0], : size[1]]
    masks = np.stack([
        (y - rng.integers(size[0])) ** 2 + (x - rng.integers(size[1])) ** 2 < rng.integers(3, 400) for _ in range(count)
    ])  # fmt: skip
    masks[0], masks[-1] = False, True
    masks[1] = rng.random(size) < 0.5
    return masks


def compressed(mask):
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def uncompressed(mask):
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff(edges, prepend=0, append=flat.size).tolist()}


def result(mask, image_id="00000", score=0.5, **more):
    return {"image_id": image_id, "category_id": 1, "score": score, "segmentation": compressed(mask), **more}


def pasted(masks, boxes, size):
    return paste_combine(torch.eye(len(masks)), masks, boxes, size) > 0.5  # [M, H, W]


def save(path, results):
    path.write_text(json.dumps(results))
    return path


@pytest.mark.parametrize("encode", [compressed, uncompressed])
def test_rle_decodes_as_pycocotools_does(tmp_path, encode):
    masks = random_masks(30)
    results = [{**result(mask, score=1 - index / 100), "segmentation": encode(mask)} for index, mask in enumerate(masks)]
    proposals = read_coco(save(tmp_path / "p.json", results)).frame("00000", SIZE)
    assert proposals.masks.dtype == torch.bool and proposals.masks.is_contiguous()
    assert (proposals.masks.numpy() == masks).all()
    assert torch.equal(proposals.boxes, mask_boxes(torch.from_numpy(masks)))
    assert proposals.scores.tolist() == pytest.approx([1 - index / 100 for index in range(30)])


def test_best_first_top_k_and_given_boxes(tmp_path):
    masks = random_masks(6)
    scores = [0.1, 0.9, 0.5, 0.7, 0.5, 0.3]
    results = [result(mask, score=score, bbox=[index, 2, 10, 20.5]) for index, (mask, score) in enumerate(zip(masks, scores))]
    proposals = read_coco(save(tmp_path / "p.json", results), top=4).frame("00000", SIZE)
    order = [1, 3, 2, 4]  # equal scores stay in the file's order
    assert proposals.scores.tolist() == pytest.approx([scores[index] for index in order])
    assert (proposals.masks.numpy() == masks[order]).all()
    assert proposals.boxes.tolist() == [[index, 2, index + 10, 22.5] for index in order]


@pytest.mark.parametrize(
    "image_id, stem", [("00007", "00007"), (7, "00007"), ("7", "00007"), ("00007.jpg", "00007"), ("a.b", "a.b")]
)
def test_image_ids_meet_stems(tmp_path, image_id, stem):
    file = read_coco(save(tmp_path / "p.json", [result(random_masks(3)[2], image_id)]))
    assert len(file.frame(stem).scores) == 1 and len(file.frame("other").scores) == 0


def test_a_frame_without_proposals_is_empty(tmp_path):
    proposals = read_coco(save(tmp_path / "p.json", [])).frame("00000", SIZE)
    assert [tuple(part.shape) for part in proposals] == [(0, 4), (0,), (0, *SIZE)]


def test_polygons(tmp_path):
    entry = {"image_id": 0, "score": 0.5, "segmentation": [[5, 5, 25, 5, 25, 20, 5, 20], [30, 30, 40, 30, 35, 36]]}
    file = read_coco(save(tmp_path / "p.json", [entry]))
    mask = file.frame("00000", SIZE).masks[0]
    assert mask[5:20, 5:25].all() and mask[:4].sum() == 0 and 300 < mask.sum() < 360
    with pytest.raises(ProposalError, match="polygons need the frame's size"):
        file.frame("00000")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such proposals file"),
        ("", "not valid JSON"),
        ('[{"image_id": "00000", "score": 0.5, "segm', "was it written to the end"),
        ("\x00\x01", "not valid JSON"),
        (b"\xff\xfe\x00", "not a text file"),
        ('{"annotations": []}', "a COCO data set without 'images'"),
        ('{"annotations": [], "videos": []}', "a YouTube-VIS file without 'images'"),
        ('{"annotations": [], "images": [{"file_name": "a.jpg"}]}', "image 0 needs an id"),
        ('{"annotations": [{"image_id": 2}], "images": [{"id": 1}]}', "annotation 0 needs the image_id of one of 1 images"),
        ('{"annotations": [], "images": [{"id": 1, "file_name": "a/0.jpg"}, {"id": 2, "file_name": "b/0.jpg"}]}', "two videos"),
        ('{"a": 1}', "is a list of results, or a data set"),
        ('[{"image_id": 3}]', "entry 0 needs image_id and a finite score"),
        ('[{"image_id": 3, "score": "high"}]', "finite score"),
        ('[{"image_id": 3, "score": NaN}]', "finite score"),
        ("[[1, 2]]", "entry 0"),
    ],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ProposalError, match=message):
        read_coco(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"segmentation": {"size": [37, 53], "counts": ""}}, "run lengths do not fill"),
        ({"segmentation": {"size": [37, 53], "counts": "05"}}, "run lengths do not fill"),
        ({"segmentation": {"size": [37, 53], "counts": "zzzz"}}, "run lengths do not fill"),
        ({"segmentation": {"size": [37, 53], "counts": "é"}}, "run lengths do not fill"),
        ({"segmentation": {"size": [37, 53], "counts": [37 * 53 + 5, -5]}}, "run lengths do not fill"),
        ({"segmentation": {"size": [37, 53], "counts": [1.5]}}, "run lengths do not fill"),
        ({"segmentation": {"size": [37, 53], "counts": [10**30]}}, "run lengths do not fill"),
        ({"segmentation": {"size": [53, 37], "counts": [37 * 53]}}, r"masks are 37x53, the frames are 53x37"),
        ({"segmentation": [[1, 2, 3]]}, "a polygon is a list"),
        ({"segmentation": [[0, 0, 4e8, 0, 4, 4]]}, "a polygon reaches 4e[+]08 pixels far"),
        ({"bbox": [1, 2, 3]}, "bbox must be"),
        ({"bbox": [1, 2, 3, "4"]}, "bbox must be"),
    ],
)
def test_bad_entries_are_named_when_their_frame_is_read(tmp_path, change, message):
    good, bad = result(random_masks(3)[1], "good"), {**result(random_masks(3)[1], "bad"), **change}
    file = read_coco(save(tmp_path / "p.json", [good, bad]))
    assert len(file.frame("good", SIZE).scores) == 1
    with pytest.raises(ProposalError, match=message) as caught:
        file.frame("bad", SIZE)
    assert "p.json" in str(caught.value) and "'bad'" in str(caught.value)


@pytest.mark.parametrize("segmentation", [None, [], {}, "mask", {"size": [37, 53]}, {"size": [0, 53], "counts": []}])
def test_entries_without_a_mask_are_named_before_a_run_begins(tmp_path, segmentation):
    good, bad = result(random_masks(3)[1], "good"), {**result(random_masks(3)[1], "bad"), "segmentation": segmentation}
    file = read_coco(save(tmp_path / "p.json", [good, bad]))
    file.check(["good"], SIZE)  # what is not read does no harm
    with pytest.raises(ProposalError, match="p.json, image_id 'bad': needs a segmentation, polygons or"):
        file.check(["good", "bad"], SIZE)
    if not segmentation:
        with pytest.raises(ProposalError, match="none of its 2 entries has a segmentation, and boxes alone are not enough"):
            read_coco(save(tmp_path / "p.json", [bad, bad]))


def test_masks_of_another_size_are_refused_before_a_run_begins(tmp_path):
    file = read_coco(save(tmp_path / "p.json", [result(random_masks(3)[1])]))
    file.check(["00000"], SIZE)
    file.check(["00001"], SIZE[::-1])
    with pytest.raises(ProposalError, match=r"p.json, image_id '00000': masks are 53x37, the frames are 37x53"):
        file.check(["00000"], SIZE[::-1])


def some_proposals(count=5, seed=0):
    masks = torch.from_numpy(random_masks(count, seed))
    return Proposals(mask_boxes(masks), torch.linspace(0.9, 0.1, count), masks)


def test_written_files_read_back_the_same(tmp_path):
    frames = {
        "00000": some_proposals(),
        "00001": some_proposals(4, seed=1),
        "00002": Proposals(*(p[:0] for p in some_proposals())),
    }
    write_coco(tmp_path / "p.json", frames, SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    file = read_coco(tmp_path / "p.json")
    for stem, written in frames.items():
        for part, original in zip(file.frame(stem, SIZE), written):
            assert torch.equal(part, original)
    assert all(type(entry["score"]) is float for entry in json.loads((tmp_path / "p.json").read_text()))


def test_soft_masks_are_pasted_into_their_boxes(tmp_path):
    torch.manual_seed(0)
    boxes = torch.tensor([[3.0, 4.0, 30.5, 33.0], [-5.0, 10.0, 20.0, 50.0]])
    soft = Proposals(boxes, torch.tensor([0.9, 0.8]), torch.rand(2, 28, 28))
    write_coco(tmp_path / "p.json", {"0": soft}, SIZE)
    read = read_coco(tmp_path / "p.json").frame("0", SIZE)
    assert torch.equal(read.masks, pasted(soft.masks, boxes, SIZE))
    assert read.masks[:, :3].sum() == 0 and read.masks.any((1, 2)).all()


def test_an_interrupted_writer_goes_on(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(KeyboardInterrupt), CocoWriter(path, SIZE) as writer:
        writer.add("00000", some_proposals())
        writer.add("00001", some_proposals(seed=1))
        raise KeyboardInterrupt
    assert not path.exists()
    part = tmp_path / "p.json.part"
    part.write_text(part.read_text()[:-40])  # as if killed in the middle of a line
    with CocoWriter(path, SIZE) as writer:
        assert writer.done == {"00000"}
        writer.add("00001", some_proposals(seed=1))
    resumed = path.read_text()
    write_coco(path, {"00000": some_proposals(), "00001": some_proposals(seed=1)}, SIZE)
    assert resumed == path.read_text() and not part.exists()


def test_a_writer_goes_on_from_its_own_only(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(KeyboardInterrupt), CocoWriter(path, SIZE, whose="a.mp4, small") as writer:
        writer.add("00000", some_proposals())
        raise KeyboardInterrupt
    with pytest.raises(ProposalError, match="left by a run of a.mp4, small, this one is of b.mp4, small; delete it first"):
        CocoWriter(path, SIZE, whose="b.mp4, small")
    assert CocoWriter(path, SIZE, whose="a.mp4, small").done == {"00000"}


def test_writer_refuses_masks_of_another_size(tmp_path):
    with pytest.raises(ProposalError, match="must have the frame's size"):
        write_coco(tmp_path / "p.json", {"0": some_proposals()}, (10, 10))
    assert not (tmp_path / "p.json").exists()


def test_real_file_equals_pycocotools(data):
    path = data / "clips/proposals/schoolgirls.json"
    entries = [entry for entry in json.loads(path.read_text()) if entry["image_id"] == "00025"]
    proposals = read_coco(path).frame("00025", (240, 432))
    assert len(proposals.scores) == len(entries) > 10
    best = sorted(entries, key=lambda entry: -entry["score"])
    for mask, box, score, entry in zip(proposals.masks, proposals.boxes, proposals.scores, best):
        assert (mask.numpy() == coco.decode(entry["segmentation"]).astype(bool)).all()
        assert score.item() == pytest.approx(entry["score"])
        assert (box[2:] - box[:2]).tolist() == pytest.approx(entry["bbox"][2:])


# --------------------------------------------------------------------------------------------------- the live detector


def small_proposer(**options):
    """Random weights, and fewer regions than the thousand that would take seconds."""
    torch.manual_seed(0)
    proposer = TorchvisionProposer(weights=None, short_side=96, **options)
    proposer.model.rpn._post_nms_top_n = {"training": 30, "testing": 30}
    return proposer


@pytest.fixture(scope="module")
def proposer():
    return small_proposer(top=6)


def picture(height=60, width=90):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_detector_gives_few_class_agnostic_proposals_with_small_masks(proposer):
    from torchvision.ops import box_iou

    frame = picture()
    boxes, scores, masks = proposer(frame)
    assert boxes.shape == (6, 4) and scores.shape == (6,) and masks.shape == (6, 28, 28)
    assert masks.dtype == torch.float32 and masks.min() >= 0 and masks.max() <= 1
    assert (scores.diff() <= 0).all() and (scores > 0).all()
    low, high = boxes[:, :2], boxes[:, 2:]
    assert (low >= 0).all() and (high <= torch.tensor([90.0, 60.0]) + 1e-3).all() and (high > low).all()
    overlaps = box_iou(boxes, boxes).fill_diagonal_(0)
    assert overlaps.max() <= proposer.model.roi_heads.nms_thresh + 1e-4  # across classes, not within each
    for array, tensor in zip((boxes, scores, masks), proposer(torch.from_numpy(frame).permute(2, 0, 1))):
        assert torch.equal(array, tensor)


def test_one_class_alone_equals_torchvisions_own_detections():
    """With one class left, class-agnostic and per-class detection are the same: boxes, scores and pasted masks."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    proposer = small_proposer(top=8)
    heads = proposer.model.roi_heads
    heads.box_predictor.cls_score.bias[2:] = -1e4
    heads.score_thresh, heads.detections_per_img = 0.0, 8
    frame = picture()
    ours = proposer(frame)
    with torch.inference_mode():
        (theirs,) = proposer.model([torch.from_numpy(frame).permute(2, 0, 1) / 255])
    assert torch.allclose(ours.scores, theirs["scores"]) and torch.allclose(ours.boxes, theirs["boxes"], atol=1e-3)
    pasted_their_way = paste_masks_in_image(ours.masks[:, None], ours.boxes, (60, 90))
    assert torch.allclose(pasted_their_way, theirs["masks"], atol=1e-4)


def test_local_weights_files(tmp_path, proposer):
    from safetensors.torch import save_file

    state = proposer.model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        loaded = TorchvisionProposer(weights=tmp_path / name).model.state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in state.items())


def test_bad_weights_files(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK\x03\x04torn")
    for name, message in (
        ("other.pth", "not the weights of"),
        ("torn.pth", "cannot be read"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(ProposalError, match=message):
            TorchvisionProposer(weights=tmp_path / name)


def test_offline_says_which_file_it_wants_and_what_else_to_do(tmp_path, monkeypatch):
    from urllib.error import URLError

    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ProposalError) as caught:
        TorchvisionProposer()
    message = str(caught.value)
    assert f"{tmp_path}/hub/checkpoints/maskrcnn_resnet50_fpn_v2_coco-" in message
    assert "--detector-weights FILE" in message and "--proposals FILE.json" in message and "\n" not in message


def test_damaged_weights_in_the_cache_are_named(tmp_path, monkeypatch):
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"PK\x03\x04torn")
    with pytest.raises(ProposalError, match=f"at {cached} are damaged; delete that file"):
        TorchvisionProposer()


# ------------------------------------------------------------------------------------------------------- COCO data sets


@pytest.mark.parametrize("encode", [compressed, uncompressed, None])
@pytest.mark.parametrize("score", [None, 0.25])
def test_a_data_set_tells_its_frames_by_file_name(tmp_path, encode, score):
    mask = np.zeros(SIZE, bool)
    mask[5:20, 5:25] = True
    polygon = [[5, 5, 25, 5, 25, 20, 5, 20]]
    images = [
        {"id": 900 + index, "file_name": f"clip/{index:05d}.jpg", "height": SIZE[0], "width": SIZE[1]} for index in range(3)
    ]
    entry = {"id": 1, "image_id": 901, "category_id": 3, "iscrowd": 0, "segmentation": encode(mask) if encode else polygon}
    content = {"images": images, "annotations": [entry if score is None else {**entry, "score": score}], "categories": []}
    file = read_coco(save(tmp_path / "p.json", content))
    found = file.frame("00001", SIZE)
    assert found.scores.tolist() == [1.0 if score is None else score] and (found.masks[0].numpy() == mask).all()
    stems = ["00000", "00001", "00002"]
    assert file.align(stems) == ["p.json: no proposals for 2 of 3 frames: 00000, 00002"]
    assert [len(file.frame(stem, SIZE).scores) for stem in stems] == [0, 1, 0]


# -------------------------------------------------------------------------------------- image ids that count otherwise


def ids_file(path, ids):
    """One proposal per id; the id is its score."""
    mask = random_masks(3)[2]
    return read_coco(save(path, [result(mask, image_id, score=index + 1) for index, image_id in enumerate(ids)]))


def met(file, stems):
    """Of every frame the place of its entry in the file, from 1; 0 for none."""
    return [int(file.frame(stem, SIZE).scores[0]) if len(file.frame(stem, SIZE).scores) else 0 for stem in stems]


FIVE = [f"{index:05d}" for index in range(5)]


@pytest.mark.parametrize(
    "ids, stems, places, notes",
    [
        ([0, 1, 2, 3, 4], FIVE, [1, 2, 3, 4, 5], []),
        (FIVE, FIVE, [1, 2, 3, 4, 5], []),
        ([1, 2, 3, 4, 5], [f"{n:05d}" for n in range(1, 6)], [1, 2, 3, 4, 5], []),  # frames that are named from 1
        ([1, 2, 3, 4, 5], FIVE, [1, 2, 3, 4, 5], ["-1 is added to each", "image id 1 is frame 00000"]),
        ([1, 2, 4, 5], FIVE, [1, 2, 0, 3, 4], ["-1 is added to each", "no proposals for 1 of 5 frames: 00002"]),
        ([0, 1, 2, 3, 4], [f"{n:05d}" for n in range(100, 105)], [1, 2, 3, 4, 5], ["+100 is added", "image id 0 is frame 00100"]),
        ([1, 2, 3, 4, 5], [f"img_{n}" for n in range(7, 12)], [1, 2, 3, 4, 5], ["+6 is added", "image id 1 is frame img_7"]),
        ([1, 2, 3], ["a", "b", "c"], [1, 2, 3], ["-1 is added", "image id 1 is frame a"]),
        ([1, 2, 3], ["00000", "00005", "00010"], [1, 2, 3], ["by their place in the clip", "image id 1 is frame 00000"]),
        ([0, 1, 3], FIVE, [1, 2, 0, 3, 0], ["no proposals for 2 of 5 frames: 00002, 00004"]),
        (range(9), FIVE, [1, 2, 3, 4, 5], ["4 of 9 image ids are not those of a frame: 5, 6, 7, 8"]),  # a longer clip
        ([0, 1, 2, 3, 77], FIVE, [1, 2, 3, 4, 0], ["no proposals for 1", "not those of a frame: 77", "--image-id-offset N"]),
        (["00001", "zebra"], FIVE, [0, 1, 0, 0, 0], ["no proposals for 4 of 5", "not those of a frame: zebra"]),
    ],
)  # fmt: skip
def test_which_frames_image_ids_mean(tmp_path, ids, stems, places, notes):
    file = ids_file(tmp_path / "p.json", ids)
    told = file.align(stems)
    assert met(file, stems) == places
    assert all(note in " ".join(told) for note in notes) and bool(told) == bool(notes), told


def test_frames_named_by_the_clock(tmp_path):
    """Nanoseconds: as many shifts as frames are tried, not as many as there are between the first name and the last."""
    stems = [str(1_403_636_579_763_555_584 + 50_000_000 * number) for number in range(3)]
    with pytest.raises(ProposalError, match="no proposals for these frames"):
        ids_file(tmp_path / "p.json", [1, 2, 9]).align(stems)
    many = ids_file(tmp_path / "many.json", range(1, 20_001))
    assert "-1 is added" in many.align([f"{index:05d}" for index in range(20_000)])[0]
    file = ids_file(tmp_path / "q.json", [1, 50_000_001, 100_000_001])
    assert "is added" in file.align(stems)[0] and met(file, stems) == [1, 2, 3]


def test_a_file_of_a_detector_that_found_nothing(tmp_path):
    write_coco(tmp_path / "p.json", {"00000": Proposals(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, *SIZE).bool())}, SIZE)
    file = read_coco(tmp_path / "p.json")
    assert "no proposals for 1 of 1 frames" in file.align(["00000"])[0] and len(file.frame("00000", SIZE).scores) == 0


def test_what_is_written_can_be_read(tmp_path):
    masks = torch.from_numpy(random_masks(4))[1:3]
    found = Proposals(mask_boxes(masks).double(), torch.tensor([0.5, -torch.inf]), masks)
    write_coco(tmp_path / "p.json", {"00000": found}, SIZE)
    assert torch.equal(read_coco(tmp_path / "p.json").frame("00000").masks, masks[:1])
    for scores in ([0.5, torch.nan], [torch.inf, 0.5]):
        with pytest.raises(ProposalError, match="finite boxes and scores"):
            write_coco(tmp_path / "q.json", {"00000": found._replace(scores=torch.tensor(scores))}, SIZE)
    soft = Proposals(
        torch.tensor([[5.0, 5, 33, 33]], dtype=torch.float64), torch.tensor([0.5]), torch.ones(1, 28, 28, dtype=torch.float64)
    )
    write_coco(tmp_path / "r.json", {"00000": soft}, SIZE)
    assert read_coco(tmp_path / "r.json").frame("00000").masks.sum() == 28 * 28


def test_frames_that_detectors_refuse():
    detector = TorchvisionProposer(weights=None, short_side=64)
    for frame in (
        np.zeros((32, 48, 3)),
        np.zeros((32, 48, 4), np.uint8),
        np.zeros((32, 48), np.uint8),
        torch.zeros(32, 48, 3).byte(),
    ):
        with pytest.raises(ValueError, match="a detector takes frames uint8"):
            detector(frame)


def test_ambiguous_image_ids_need_an_answer(tmp_path):
    file = ids_file(tmp_path / "p.json", [2, 3, 4, 5])
    with pytest.raises(ProposalError, match=r"off by a constant, but -2, -1 would all do; --image-id-offset N"):
        file.align(FIVE)
    assert "as asked" in file.align(FIVE, -1)[0] and met(file, FIVE) == [0, 1, 2, 3, 4]
    file.align(FIVE, -2)
    assert met(file, FIVE) == [1, 2, 3, 4, 0]
    with pytest.raises(ProposalError, match="with --image-id-offset 50 no image id is that of a frame"):
        file.align(FIVE, 50)
    assert "give --image-id-offset -1" in ids_file(tmp_path / "s.json", [1, 2, 3]).align(FIVE)[0]
    file = ids_file(tmp_path / "q.json", [1, 2, 3, 4, 5])
    assert "no proposals for 1 of 5 frames: 00000" in file.align(FIVE, 0)[0] and met(file, FIVE) == [0, 1, 2, 3, 4]
    with pytest.raises(ProposalError, match=r"no proposals for these frames: image ids 70 to 90, frames 00000 to 00004"):
        ids_file(tmp_path / "r.json", [70, 90]).align(FIVE)

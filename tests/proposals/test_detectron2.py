"""detectron2 itself, where it is installed: a tiny Mask R-CNN with random weights, of its own code, configs and files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from dmm_fast.commands.main import main
from dmm_fast.proposals.base import ProposalError, full_masks
from dmm_fast.proposals.coco import read_coco
from dmm_fast.proposals.sources import open_proposer

pytest.importorskip("detectron2", reason="detectron2 is not installed; docs/proposals.md says how to build it")
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"


def settings(masks: bool = True):
    from detectron2 import model_zoo

    cfg = model_zoo.get_config(MASK_RCNN)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = masks
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 60
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 192
    cfg.MODEL.WEIGHTS = ""
    return cfg


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """config.yaml with weights in both kinds of files that detectron2 writes, and one without masks."""
    from detectron2.modeling import build_model

    folder = tmp_path_factory.mktemp("d2")
    torch.manual_seed(0)
    for name, masks in (("config", True), ("boxes", False)):
        cfg = settings(masks)
        model = build_model(cfg)
        with torch.no_grad():  # else no region is sure of any class
            model.roi_heads.box_predictor.cls_score.weight.mul_(30)
        (folder / f"{name}.yaml").write_text(cfg.dump())
        torch.save({"model": model.state_dict(), "iteration": 7}, folder / f"{name}.pth")
        arrays = {key: value.numpy() for key, value in model.state_dict().items()}
        (folder / f"{name}.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "tests"}))
    return folder


def frames(count: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [np.kron(random.integers(0, 255, (6, 10, 3), dtype=np.uint8), np.ones((10, 10, 1), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_proposals_of_its_files(files, suffix):
    propose = open_proposer(f"detectron2:{files / 'config.yaml'}:{files / f'config.{suffix}'}", top=8)
    frame = frames(1)[0]
    boxes, scores, masks = propose(frame)
    assert 0 < len(scores) <= 8 and masks.dtype == torch.bool and masks.shape[1:] == (60, 100)
    assert (scores.diff() <= 0).all() and (scores > 0).all() and masks.any()
    from detectron2.engine import DefaultPredictor

    cfg = propose.predictor.cfg
    theirs = DefaultPredictor(cfg)(frame[:, :, ::-1])["instances"]
    best = theirs.scores.argmax()
    assert scores[0] == pytest.approx(theirs.scores[best].item(), abs=1e-5)
    assert torch.allclose(boxes[0], theirs.pred_boxes.tensor[best], atol=1e-3) and torch.equal(
        masks[0], theirs.pred_masks[best]
    )


def test_both_kinds_of_files_and_batches_are_the_same(files):
    some = frames()
    one, other = (
        open_proposer(f"detectron2:{files / 'config.yaml'}:{files / f'config.{suffix}'}") for suffix in ("pkl", "pth")
    )
    for batched, alone in zip(one.batch(some), map(other, some)):
        assert torch.allclose(batched.scores, alone.scores, atol=1e-4) and torch.allclose(batched.boxes, alone.boxes, atol=1e-2)
        assert (full_masks(batched, (60, 100))[2] == full_masks(alone, (60, 100))[2]).float().mean() > 0.999


def test_its_errors(files):
    with pytest.raises(ProposalError, match="finds boxes only"):
        open_proposer(f"detectron2:{files / 'boxes.yaml'}:{files / 'boxes.pth'}")(frames(1)[0])
    with pytest.raises(ProposalError, match="weights .*none.pth are not here"):
        open_proposer(f"detectron2:{files / 'config.yaml'}:{files / 'none.pth'}")
    with pytest.raises(ProposalError, match="names no weights"):
        open_proposer(f"detectron2:{files / 'config.yaml'}")
    with pytest.raises(ProposalError, match="neither a file nor in detectron2's model zoo"):
        open_proposer("detectron2:COCO-InstanceSegmentation/nothing.yaml")


def test_the_zoos_weights_are_named_where_they_cannot_be_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ProposalError, match=r"are not here and cannot be downloaded.*--proposals detectron2:COCO-.*:FILE"):
        open_proposer(f"detectron2:{MASK_RCNN}")


def test_proposals_command(files, tmp_path):
    from PIL import Image

    clip = tmp_path / "clip"
    clip.mkdir()
    for index, frame in enumerate(frames()):
        Image.fromarray(frame).save(clip / f"{index:05d}.png")
    detector = f"detectron2:{files / 'config.yaml'}:{files / 'config.pkl'}"
    arguments = ["proposals", str(clip), "--out", str(tmp_path / "p.json"), "--detector", detector, "--batch", "2", "--quiet"]
    assert main(arguments) == 0
    assert len(read_coco(tmp_path / "p.json")) == 3

"""Models of the Hugging Face hub as proposers: tiny ones of every family, with random weights, from folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from dmm_fast.model.masks import mask_boxes
from helpers import hub_models

from dmm_fast.commands.main import main
from dmm_fast.ops.vision import mask_iou
from dmm_fast.proposals.base import ProposalError, full_masks
from dmm_fast.proposals.coco import read_coco
from dmm_fast.proposals.hub import PROMPTS, QUERIES, HubProposer
from dmm_fast.proposals.sources import open_proposer

SIZE = (60, 100)


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Coarse noise: what a random network sees of it differs from place to place."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 10, 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(small, np.ones((10, 10, 1), np.uint8))[: size[0], : size[1]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """family -> its folder, made when first asked for."""
    made = {}

    def of(family: str):
        if family not in made:
            made[family] = hub_models.save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


def test_every_family_is_here():
    assert set(hub_models.FAMILIES) == {*QUERIES, *PROMPTS}


@pytest.mark.parametrize("family", hub_models.FAMILIES)
def test_proposals_of(family, folder):
    propose = open_proposer(f"hf:{folder(family)}", top=6)
    frames = [picture(0), picture(1)]
    found = propose(frames[0])
    boxes, scores, masks = full_masks(found, SIZE)
    assert found.masks.dtype == torch.int32 and masks.shape == (len(scores), *SIZE) and 0 < len(scores) <= 6
    assert (scores.diff() <= 0).all() and (scores > 0).all() and (scores <= 1).all()
    assert torch.equal(boxes, mask_boxes(masks)) and masks.any((1, 2)).all()
    for one, other in zip(found, propose(torch.from_numpy(frames[0]).permute(2, 0, 1))):
        assert torch.equal(one, other)
    together, alone = propose.batch(frames), [propose(frame) for frame in frames]
    for one, other in zip(together, alone):
        assert torch.allclose(one.scores, other.scores, atol=1e-4)
        same = full_masks(one, SIZE)[2] == full_masks(other, SIZE)[2]
        assert same.float().mean() > 0.999


# ------------------------------------------------------------------------------------- what the families themselves make of it


def outputs(propose: HubProposer, frame: np.ndarray):
    inputs = propose.processor(images=[torch.from_numpy(frame).permute(2, 0, 1)], return_tensors="pt")
    inputs.pop("patch_offsets", None)
    with torch.no_grad():
        return propose.model(**inputs)


@pytest.mark.parametrize(
    "family, options, least",
    [
        ("mask2former", {"return_binary_maps": True}, 0.93),  # it cuts masks at 384 x 384 and enlarges them then
        ("maskformer", {"return_binary_maps": True}, 0.85),  # and this one at a quarter of the size
        ("rf_detr", {"return_binary_maps": True, "top_k": 48}, 0.999),
    ],
)
def test_masks_and_scores_are_those_of_the_family(family, options, least, folder):
    """Each of our proposals is one of its post-processing at threshold 0, with its score. The frame is not padded: that they forget.

    DETR's and OneFormer's give each pixel to one query, which proposals do not."""
    propose = HubProposer(folder(family), top=100)
    hub_models.smooth(propose.model)
    frame = picture(size=(60, 60))
    found = propose(frame)
    (theirs,) = propose.processor.post_process_instance_segmentation(
        outputs(propose, frame), threshold=0.0, target_sizes=[frame.shape[:2]], **options
    )
    scores = torch.tensor([segment["score"] for segment in theirs["segments_info"]])
    iou = mask_iou(full_masks(found, frame.shape[:2])[2], theirs["segmentation"].bool()).amax(1)
    assert len(found.scores) > 1 and (iou > least).all()
    if family != "rf_detr":  # whose own score does not know the mask
        assert ((found.scores[:, None] - scores).abs().amin(1) < 0.01).all()


def test_eomts_masks_are_those_of_its_own(folder):
    """It paints later queries over earlier ones: what is left of a mask is inside ours."""
    propose = HubProposer(folder("eomt"), top=100)
    hub_models.smooth(propose.model)
    frame = picture()
    found = propose(frame)
    masks = full_masks(found, SIZE)[2]
    (theirs,) = propose.processor.post_process_instance_segmentation(
        outputs(propose, frame), threshold=0.0, target_sizes=[SIZE]
    )
    left = [(theirs["segmentation"] == segment["id"], segment["score"]) for segment in theirs["segments_info"]]
    assert len(masks) > 3
    for mask, score in zip(masks, found.scores):
        seen = next(seen for seen, other in sorted(left, key=lambda pair: abs(pair[1] - score)) if abs(other - score) < 0.02)
        assert (seen & ~mask).sum() <= 0.02 * SIZE[0] * SIZE[1]
    last = max(left, key=lambda pair: theirs["segments_info"][-1]["score"] == pair[1])[0]
    assert mask_iou(masks, last[None]).max() > 0.97


@pytest.mark.parametrize("family", PROMPTS)
def test_mask_generators_are_asked_as_by_their_processor(family, folder):
    """The best proposal is among the masks that the family's own post-processing makes of the same grid of points."""
    propose = HubProposer(folder(family), points=4, top=3)
    frame = picture()
    found = propose(frame)
    inputs = propose.processor(images=[torch.from_numpy(frame).permute(2, 0, 1)], return_tensors="pt")
    height, width = inputs["pixel_values"].shape[-2:]
    reshaped = inputs.pop("reshaped_input_sizes", torch.tensor([[height, width]]))
    ys, xs = ((torch.arange(4) + 0.5) / 4 * side for side in reshaped[0].tolist())
    points = torch.cartesian_prod(xs, ys)[None, :, None]
    with torch.no_grad():
        output = propose.model(inputs["pixel_values"], input_points=points)
    sizes = {} if family not in ("sam", "sam_hq") else {"reshaped_input_sizes": reshaped}
    (masks,) = propose.processor.post_process_masks(output.pred_masks, [list(SIZE)], **sizes)
    iou = mask_iou(full_masks(found, SIZE)[2], masks.flatten(0, 1))
    assert (iou.amax(1) == 1).all()


@pytest.mark.parametrize("family", QUERIES)
def test_masks_lie_where_they_are_seen(family, folder):
    """Padded or not: a model whose masks are what is bright gives the bright part of the frame."""
    propose = HubProposer(folder(family))
    hub_models.seeing(propose.model)
    frame = np.zeros((60, 110, 3), np.uint8)
    frame[10:45, 60:100] = 255
    for divisor in (32, 128):
        propose.processor.size_divisor = divisor
        (mask,) = full_masks(propose(frame), frame.shape[:2])[2]
        assert mask_iou(mask[None], torch.from_numpy(frame[None, :, :, 0] > 0)).item() > 0.88


# ------------------------------------------------------------------------------------------------------------- options


def test_short_side_and_precision(folder):
    frame = picture()
    large = HubProposer(folder("mask2former"), short_side=128)
    assert large.processor(images=[torch.from_numpy(frame).permute(2, 0, 1)], **large.options)["pixel_values"].shape[2] == 128
    assert len(large(frame).scores)
    for family in ("eomt", "rf_detr", "sam", "sam2"):
        with pytest.raises(ProposalError, match="takes frames of its own size only; leave out --short-side"):
            HubProposer(folder(family), short_side=128)
    half = HubProposer(folder("sam2"), precision="bfloat16", points=4)(frame)
    whole = HubProposer(folder("sam2"), points=4)(frame)
    iou = mask_iou(full_masks(half, SIZE)[2], full_masks(whole, SIZE)[2])
    assert iou[0].max() > 0.8 and not torch.equal(half.scores[:1], whole.scores[:1])


def test_in_the_command_line(folder, tmp_path, capsys):
    """Frames in batches give the file that one at a time give; and a run that follows an object takes the model live."""
    from PIL import Image

    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(5):
        Image.fromarray(np.roll(picture(), 2 * index, 1)).save(frames / f"{index:05d}.png")
    ids = np.zeros(SIZE, np.uint8)
    ids[20:40, 20:50] = 1
    Image.fromarray(ids).save(tmp_path / "first.png")
    model = f"hf:{folder('mask2former')}"
    for batch in ("1", "2"):
        assert (
            main(["proposals", str(frames), "--out", str(tmp_path / f"{batch}.json"), "--detector", model, "--batch", batch])
            == 0
        )
    one, two = (read_coco(tmp_path / f"{batch}.json") for batch in "12")
    for index in range(5):
        a, b = (file.frame(f"{index:05d}", SIZE) for file in (one, two))
        assert torch.allclose(a.scores, b.scores, atol=1e-4) and (a.masks == b.masks).float().mean() > 0.999
    run = ["segment", str(frames), "--masks", str(tmp_path / "first.png"), "--preset", "iou", "--quiet"]
    assert main([*run, "--proposals", model, "--out", str(tmp_path / "live")]) == 0
    assert main([*run, "--proposals", f"{model},{tmp_path / '1.json'}", "--out", str(tmp_path / "both")]) == 0
    assert json.loads((tmp_path / "live/report.json").read_text())["settings"]["proposals"] == model


# ------------------------------------------------------------------------------------------------------ what cannot be used


def test_models_of_other_kinds_are_refused(folder, tmp_path):
    import transformers as t

    bert = t.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10)
    t.BertModel(bert).save_pretrained(tmp_path / "bert")
    semantic = t.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], num_attention_heads=[1, 1, 1, 1], depths=[1, 1, 1, 1], decoder_hidden_size=8
    )
    t.SegformerForSemanticSegmentation(semantic).save_pretrained(tmp_path / "segformer")
    for name in ("bert", "segformer"):
        with pytest.raises(ProposalError, match=rf"{name} gives no masks of objects; families that do: Mask2Former, .* SAM 3"):
            open_proposer(f"hf:{tmp_path / name}")
    config = t.DetrConfig.from_pretrained(folder("detr"))
    t.DetrForObjectDetection(config).save_pretrained(tmp_path / "boxes")
    with pytest.raises(ProposalError, match="DetrForObjectDetection finds boxes only; proposals need masks"):
        open_proposer(f"hf:{tmp_path / 'boxes'}")
    images = json.loads((folder("eomt") / "preprocessor_config.json").read_text())
    clone(folder("eomt"), tmp_path / "stuff", {"preprocessor_config.json": json.dumps({**images, "do_split_image": True})})
    with pytest.raises(ProposalError, match="trained for semantic segmentation"):
        open_proposer(f"hf:{tmp_path / 'stuff'}")


def clone(source, target, changes: dict[str, str | bytes | None]):
    """A folder with the files of another, less those whose change is None."""
    target.mkdir()
    for file in source.iterdir():
        if file.name not in changes:
            (target / file.name).write_bytes(file.read_bytes())
    for name, content in changes.items():
        if content is not None:
            (target / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return target


def test_damaged_folders_are_named(folder, tmp_path):
    from safetensors.torch import load_file, save

    source = folder("eomt")
    tensors = load_file(source / "model.safetensors")
    some = save({name: tensor for name, tensor in tensors.items() if "mask_head" not in name}, {"format": "pt"})
    for name, changes, message in (
        (
            "empty",
            dict.fromkeys(("config.json", "model.safetensors", "preprocessor_config.json")),
            "no model that transformers",
        ),
        ("config", {"config.json": "{"}, "no model that transformers"),
        ("future", {"config.json": '{"model_type": "eomt9"}'}, "no model that transformers .* knows"),
        ("weightless", {"model.safetensors": None}, "cannot be loaded: .*model.safetensors"),
        ("torn", {"model.safetensors": b"\1\2\3"}, "cannot be loaded"),
        ("part", {"model.safetensors": some}, r"the weights lack \d+ tensors of a EoMT with masks, such as mask_head"),
        ("blind", {"preprocessor_config.json": None}, "cannot be loaded"),
    ):
        path = clone(source, tmp_path / name, changes)
        with pytest.raises(ProposalError, match=message) as caught:
            open_proposer(f"hf:{path}")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ProposalError, match="no such folder"):
        open_proposer(f"hf:{tmp_path}/nothing")


def hub_says(monkeypatch, error: Exception, of: str = "model_info") -> None:
    import huggingface_hub

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub.HfApi, of, fails)


def test_offline_says_how_to_bring_the_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    hub_says(monkeypatch, ConnectionError("Name or service not known"))
    with pytest.raises(ProposalError) as caught:
        open_proposer("hf:facebook/sam2.1-hiera-tiny@v1")
    message = str(caught.value)
    assert "hf download facebook/sam2.1-hiera-tiny --revision v1 --local-dir FOLDER" in message and "hf:FOLDER" in message
    assert "Name or service not known" in message and "--proposals small" in message and "\n" not in message
    (tmp_path / "f.png").write_bytes(b"")
    assert main(["segment", "x", "--masks", "y", "--out", "z", "--proposals", "hf:a/b/c"]) == 2
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ProposalError, match=r"needs transformers .*pip install 'dmm_fast\[hf\]'"):
        open_proposer("hf:facebook/sam2.1-hiera-tiny")


def test_the_cache_serves_without_a_network(monkeypatch, folder, tmp_path):
    """The hub's cache as it lies on disk, and no answer from the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--eomt"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("1" * 40)
    (repository / "snapshots").mkdir()
    clone(folder("eomt"), repository / "snapshots" / ("1" * 40), {})
    hub_says(monkeypatch, ConnectionError("no network"))
    assert len(open_proposer("hf:someone/eomt")(picture()).scores)


@pytest.mark.parametrize(
    "error, of, message",
    [
        ("RepositoryNotFoundError", "model_info", "no such model, or it is private: .*hf auth login"),
        ("RevisionNotFoundError", "model_info", "has no revision 'v9'"),
        (
            "GatedRepoError",
            "hf_hub_download",
            "agree to their terms first: do so at https://huggingface.co/some/model, then sign in",
        ),
        ("RemoteEntryNotFoundError", "hf_hub_download", "no config.json there"),
    ],
)
def test_what_the_hub_refuses_is_said(monkeypatch, error, of, message):
    from huggingface_hub import errors

    class Response:
        headers, request, status_code, text = {}, None, 404, ""

    try:
        cause = getattr(errors, error)("refused", response=Response())
    except TypeError:
        cause = getattr(errors, error)("refused")
    hub_says(monkeypatch, cause, of)
    with pytest.raises(ProposalError, match=message):
        open_proposer("hf:some/model@v9")

"""Tiny models of the families that `dmm_fast.proposals.hub` takes, with random weights, saved as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as t
from torch import nn

SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2, "image_size": 64}
RESNET = {"embeddings_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
STAGES = ["stage1", "stage2", "stage3", "stage4"]
CLASSES = {"id2label": {i: str(i) for i in range(4)}}
DECODER = {"encoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 8, "decoder_attention_heads": 8, "d_model": 32}  # fmt: skip
HIERA = {
    "hidden_size": 8, "image_size": [128, 128], "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 24, 32],
    "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [8, 4, 8, 4], "global_attention_blocks": [3],
    "num_query_pool_stages": 3, "window_positional_embedding_background_size": [4, 4],
}  # fmt: skip
MEMORY = {
    "memory_attention_hidden_size": 32, "memory_attention_num_layers": 1, "memory_attention_feed_forward_hidden_size": 16,
    "memory_encoder_hidden_size": 32, "memory_encoder_output_channels": 16, "mask_downsampler_embed_dim": 32, "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 16, "memory_fuser_num_layers": 1, "memory_attention_rope_feat_sizes": [8, 8],
}  # fmt: skip


def save(family: str, folder: Path) -> Path:
    """The model and its image processor in `folder`; which is returned."""
    torch.manual_seed(0)
    model, processor = FAMILIES[family]()
    for module in model.modules():  # their own beginnings give masks that are all the same
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, std=(2 / max(1, module.weight[0].numel())) ** 0.5)
        if isinstance(module, nn.Embedding) and "sam" not in family:
            nn.init.normal_(module.weight, std=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def mask2former():
    config = t.Mask2FormerConfig(
        backbone_config=t.SwinConfig(**SWIN, out_features=STAGES), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12, **CLASSES,
    )  # fmt: skip
    size = {"shortest_edge": 96, "longest_edge": 192}
    return t.Mask2FormerForUniversalSegmentation(config), t.Mask2FormerImageProcessor(size=size, size_divisor=32)


def maskformer():
    decoder = t.DetrConfig(**DECODER, decoder_layers=1, num_queries=12)
    config = t.MaskFormerConfig(
        backbone_config=t.SwinConfig(**SWIN, out_features=STAGES),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        **CLASSES,
    )
    size = {"shortest_edge": 96, "longest_edge": 192}
    return t.MaskFormerForInstanceSegmentation(config), t.MaskFormerImageProcessor(size=size, size_divisor=32)


def oneformer():
    config = t.OneFormerConfig(
        backbone_config=t.SwinConfig(**SWIN, out_features=STAGES), num_queries=12, conv_dim=32, mask_dim=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, task_seq_len=9,
        text_encoder_width=32, text_encoder_context_length=9, text_encoder_num_layers=1, text_encoder_vocab_size=64, text_encoder_n_ctx=4,
        query_dec_layers=1, is_training=False, **CLASSES,
    )  # fmt: skip
    return t.OneFormerForUniversalSegmentation(config), _OneFormerFiles()


class _OneFormerFiles:
    """Of an image processor whose names of classes lie in another repository, and a tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        images = t.OneFormerImageProcessor(size={"shortest_edge": 96, "longest_edge": 192}).to_dict()
        images |= {"class_info_file": "coco_panoptic.json", "repo_path": "shi-labs/oneformer_demo"}
        (folder / "preprocessor_config.json").write_text(json.dumps(images, default=str))
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
        (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def eomt(kind: str = "Eomt"):
    config = getattr(t, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=96, patch_size=8, num_blocks=1, num_queries=12,
        num_upscale_blocks=1, intermediate_size=16, mlp_ratio=1, **CLASSES,
    )  # fmt: skip
    size = {"shortest_edge": 96, "longest_edge": 96}
    return getattr(t, f"{kind}ForUniversalSegmentation")(config), t.EomtImageProcessor(size=size, do_pad=True)


def detr():
    config = t.DetrConfig(backbone_config=t.ResNetConfig(**RESNET), **DECODER, decoder_layers=1, num_queries=12, **CLASSES)
    return t.DetrForSegmentation(config), t.DetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 192})


def rf_detr():
    backbone = {
        "model_type": "rf_detr_dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 1, "image_size": 96,
        "patch_size": 8, "num_windows": 1, "out_features": ["stage1", "stage2"],
    }  # fmt: skip
    config = t.RfDetrConfig(
        backbone_config=backbone, d_model=32, decoder_ffn_dim=16, decoder_layers=1, decoder_self_attention_heads=2, group_detr=1,
        decoder_cross_attention_heads=2, num_queries=12, **CLASSES,
    )  # fmt: skip
    return t.RfDetrForInstanceSegmentation(config), t.RfDetrImageProcessor(size={"height": 96, "width": 96})


def sam(kind: str = "Sam"):
    vision = {
        "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 128, "patch_size": 16, "mlp_dim": 16,
        "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8,
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    if kind == "SamHQ":
        decoder["vit_dim"] = 16
    config = getattr(t, f"{kind}Config")(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    processor = t.SamImageProcessor(
        size={"longest_edge": 128},
        pad_size={"height": 128, "width": 128},
        mask_size={"longest_edge": 32},
        mask_pad_size={"height": 32, "width": 32},
    )
    return getattr(t, f"{kind}Model")(config), processor


def sam2(video: bool = False):
    """video: what the hub has as SAM 2, whose part without a memory is taken."""
    vision = t.Sam2VisionConfig(
        backbone_config=t.Sam2HieraDetConfig(**HIERA), backbone_channel_list=[32, 24, 16, 8], fpn_hidden_size=32,
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
    )  # fmt: skip
    prompt = {"hidden_size": 32, "image_size": 128, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    parts = {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    processor = t.Sam2ImageProcessor(size={"height": 128, "width": 128}, mask_size={"height": 32, "width": 32})
    if video:
        return t.Sam2VideoModel(t.Sam2VideoConfig(image_size=128, **parts, **MEMORY)), processor
    return t.Sam2Model(t.Sam2Config(**parts)), processor


def smooth(model: nn.Module) -> None:
    """Make a network's masks few blobs each, in place of noise."""

    def hook(module, inputs, output):
        name = "masks_queries_logits" if "masks_queries_logits" in output else "pred_masks"
        logits = output[name]
        for _ in range(2):
            logits = nn.functional.avg_pool2d(logits, 9, 1, 4, count_include_pad=False)
        output[name] = (logits - logits.mean((2, 3), keepdim=True)) / logits.std((2, 3), keepdim=True) * 3
        return output

    model.register_forward_hook(hook)


def seeing(model: nn.Module) -> None:
    """Make every mask of a network that of what is bright in the image that it is given."""

    def hook(module, arguments, options, output):
        name = "masks_queries_logits" if "masks_queries_logits" in output else "pred_masks"
        bright = nn.functional.adaptive_avg_pool2d(options["pixel_values"].mean(1, keepdim=True), output[name].shape[2:])
        output[name] = (bright - 0.5).expand_as(output[name])
        return output

    model.register_forward_hook(hook, with_kwargs=True)


def _sam3_parts():
    vision = {
        "backbone_config": {
            "model_type": "sam3_vit_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 112, "patch_size": 14, "window_size": 4, "global_attn_indexes": [1], "pretrain_image_size": 112,
        },
        "fpn_hidden_size": 32, "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }  # fmt: skip
    prompt = {"hidden_size": 32, "image_size": 112, "patch_size": 14, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    return vision, prompt, decoder


def sam3_tracker():
    vision, prompt, decoder = _sam3_parts()
    config = t.Sam3TrackerConfig(
        vision_config={"model_type": "sam3_vision_model", **vision}, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    return t.Sam3TrackerModel(config), t.Sam3ImageProcessor(
        size={"height": 112, "width": 112}, mask_size={"height": 32, "width": 32}
    )


def sam3_video():
    """What the hub has as SAM 3: a detector that is asked in words and a tracker, of which the latter takes points."""
    vision, prompt, decoder = _sam3_parts()
    vision["model_type"] = "sam3_vision_model"
    small = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {
        "model_type": "clip_text_model",
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    detector = {
        "model_type": "sam3", "vision_config": vision, "text_config": text, "geometry_encoder_config": small, "detr_encoder_config": small,
        "detr_decoder_config": {**small, "num_queries": 4}, "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2},
    }  # fmt: skip
    tracker = {
        "model_type": "sam3_tracker_video", "image_size": 112, "vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder,
        **MEMORY,
    }  # fmt: skip
    config = t.Sam3VideoConfig(detector_config=detector, tracker_config=tracker)
    return t.Sam3VideoModel(config), t.Sam3ImageProcessor(
        size={"height": 112, "width": 112}, mask_size={"height": 32, "width": 32}
    )


FAMILIES = {
    "mask2former": mask2former, "maskformer": maskformer, "oneformer": oneformer, "eomt": eomt, "eomt_dinov3": lambda: eomt("EomtDinov3"), "detr": detr, "rf_detr": rf_detr, "sam": sam,
    "sam_hq": lambda: sam("SamHQ"), "sam2": sam2, "sam2_video": lambda: sam2(video=True), "sam3_tracker": sam3_tracker, "sam3_video": sam3_video,
}  # fmt: skip

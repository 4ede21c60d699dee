"""Video segmenters of others, to be timed beside ours: SAM 2 and EdgeTAM of Hugging Face's transformers, Cutie of a folder.

All have the weights of their initialisation: nothing is downloaded, the work of a frame is the same, the masks mean nothing. Each takes
``start(frame, ids)`` and ``step(frame)`` as `Segmenter` does, frames uint8 [H, W, 3], ids uint8 [H, W] with 1..N, and gives masks of the
frame's size on the host: its own resizing is part of its time, as ours is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import core
import numpy as np
import torch
from torch import Tensor

SMALL = 320  # a square with as many pixels as 427 x 240


class Peer(NamedTuple):
    """A segmenter that can be timed. warm: frames until a step costs what it goes on to cost. objects: with how many it is timed."""

    name: str
    size: str  # of what its network sees
    version: str
    make: Callable[[], Any]
    warm: int
    objects: tuple[int, ...] = (1, 3)


class FromTransformers:
    """Sam2VideoModel or EdgeTamVideoModel, streaming, objects given by masks."""

    def __init__(self, kind: str, side: int):
        from transformers import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor

        torch.manual_seed(0)
        self.model = (_sam2(side) if kind == "SAM 2" else _edgetam()).eval()
        size = {"height": side, "width": side}
        mask_size = {"height": side // 4, "width": side // 4}
        self.processor = Sam2VideoProcessor(
            image_processor=Sam2ImageProcessor(size=size, mask_size=mask_size),
            video_processor=Sam2VideoVideoProcessor(size=size),
        )

    @torch.no_grad()
    def start(self, frame: np.ndarray, ids: np.ndarray) -> np.ndarray:
        self.session = self.processor.init_video_session()
        image = self.processor(images=frame, return_tensors="pt")
        objects = [int(label) for label in np.unique(ids) if label]
        self.session.video_height, self.session.video_width = frame.shape[:2]
        masks = [ids == label for label in objects]
        self.processor.add_inputs_to_inference_session(self.session, frame_idx=0, obj_ids=objects, input_masks=masks)
        return self._masks(self.model(inference_session=self.session, frame=image.pixel_values[0]), frame)

    @torch.no_grad()
    def step(self, frame: np.ndarray) -> np.ndarray:
        image = self.processor(images=frame, return_tensors="pt")
        return self._masks(self.model(inference_session=self.session, frame=image.pixel_values[0]), frame)

    def _masks(self, output: Any, frame: np.ndarray) -> np.ndarray:
        return self.processor.post_process_masks([output.pred_masks], [frame.shape[:2]])[0].numpy()


def _sam2(side: int) -> torch.nn.Module:
    """The sizes of sam2.1-hiera-tiny, which are the defaults of its configuration."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    config = Sam2VideoConfig()
    if side != config.image_size:
        grids = [[side // stride] * 2 for stride in (4, 8, 16)]
        vision = {
            "model_type": "sam2_vision_model",
            "backbone_config": {"model_type": "sam2_hiera_det_model", "image_size": [side, side]},
            "backbone_feature_sizes": grids,
        }
        config = Sam2VideoConfig(
            image_size=side,
            vision_config=vision,
            prompt_encoder_config={"image_size": side},
            memory_attention_rope_feat_sizes=grids[-1],
        )
    return Sam2VideoModel(config)


def _edgetam() -> torch.nn.Module:
    from transformers import EdgeTamVideoConfig, EdgeTamVideoModel

    return EdgeTamVideoModel(EdgeTamVideoConfig())


class Cutie:
    """Cutie-small of a clone of github.com/hkchengrex/Cutie; needs omegaconf. side: of its frames' shorter one, -1 for as they are."""

    def __init__(self, folder: Path, side: int):
        from omegaconf import OmegaConf

        sys.path.insert(0, str(folder))
        warnings.filterwarnings("ignore", "`torch.cuda.amp.autocast", FutureWarning)
        from cutie.inference.inference_core import InferenceCore
        from cutie.model.cutie import CUTIE
        from cutie.model.utils import resnet

        resnet.model_zoo.load_url = lambda *_, **__: {}  # ImageNet's weights, which would be downloaded
        resnet.load_weights_add_extra_dim = lambda *_, **__: None
        folder = folder / "cutie" / "config"
        settings = OmegaConf.load(folder / "eval_config.yaml")
        parts = [OmegaConf.load(folder / "model" / f"{name}.yaml") for name in ("base", "small")]
        settings = OmegaConf.merge(settings, settings.datasets["d17-val"], {"model": OmegaConf.merge(*parts)})
        settings.max_internal_size = side
        torch.manual_seed(0)
        self.new = lambda: InferenceCore(network, cfg=settings)
        network = CUTIE(settings).eval()

    @torch.inference_mode()
    def start(self, frame: np.ndarray, ids: np.ndarray) -> np.ndarray:
        self.core = self.new()
        objects = [int(label) for label in np.unique(ids) if label]
        return self._ids(self.core.step(_picture(frame), torch.from_numpy(ids.astype(np.int64)), objects=objects))

    @torch.inference_mode()
    def step(self, frame: np.ndarray) -> np.ndarray:
        return self._ids(self.core.step(_picture(frame)))

    def _ids(self, probabilities: Tensor) -> np.ndarray:
        return self.core.output_prob_to_mask(probabilities).numpy()


def _picture(frame: np.ndarray) -> Tensor:
    return torch.from_numpy(frame).permute(2, 0, 1).float() / 255


def segmenters(given: dict[str, Path]) -> tuple[list[Peer], dict[str, str]]:
    """Those that can run here, and why others cannot. given: folders, {"cutie": ..}."""
    found: list[Peer] = []
    absent: dict[str, str] = {}
    release = f"transformers {version('transformers')}" if find_spec("transformers") else ""
    if release and all(find_spec(f"transformers.models.{name}") for name in ("sam2_video", "edgetam_video")):
        found += [
            Peer("SAM 2.1 tiny", f"{SMALL}x{SMALL}", release, lambda: FromTransformers("SAM 2", SMALL), 6),
            Peer("SAM 2.1 tiny", "1024x1024", release, lambda: FromTransformers("SAM 2", 1024), 6, (1,)),
            Peer("EdgeTAM", "1024x1024", release, lambda: FromTransformers("EdgeTAM", 1024), 3, (1,)),
        ]
    else:
        absent["SAM 2.1 tiny, EdgeTAM"] = f"{release} has none" if release else "transformers is not installed"
    if folder := given.get("cutie"):
        found.append(Peer("Cutie-small", "427x240", f"Cutie {core.commit(folder)}", lambda: Cutie(folder, -1), 26))
    else:
        absent["Cutie-small"] = "no clone was given"
    return found, absent

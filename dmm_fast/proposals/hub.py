"""Segmentation models of the Hugging Face hub as proposers, by transformers' own classes. transformers is imported only when one is made."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmm_fast.model import Proposals
from dmm_fast.ops.device import open_device
from dmm_fast.proposals.base import TOP, ProposalError, channels_first, from_logits, suppress

# model_type of config.json -> family. A query is a mask and a class; a prompt is a point of the image, with masks of several extents.
QUERIES = {
    "mask2former": "Mask2Former", "maskformer": "MaskFormer", "oneformer": "OneFormer", "eomt": "EoMT",
    "eomt_dinov3": "EoMT", "detr": "DETR with masks", "rf_detr": "RF-DETR with masks",
}  # fmt: skip
PROMPTS = {
    "sam": "SAM", "sam_hq": "SAM-HQ", "sam2": "SAM 2", "sam2_video": "SAM 2", "sam3_tracker": "SAM 3", "sam3_video": "SAM 3",
}  # fmt: skip
FAMILIES = ", ".join(dict.fromkeys([*QUERIES.values(), *PROMPTS.values()]))
ANY_SIZE = ("mask2former", "maskformer", "oneformer", "detr")  # take frames of other sizes than those of their training
POINTS = 64  # prompts at a time
OTHERS = "--proposals small (in the package), torchvision, or FILE.json with another detector's masks"


class HubProposer:
    """An instance or universal segmenter, or a mask generator, of the Hugging Face hub as a class-agnostic proposer.

    model: NAME, NAME@REVISION, or a folder with config.json, preprocessor_config.json and the weights. top, threshold: at most so many
    proposals a frame, of higher scores. short_side: of the frames inside the model, for families that take any. precision:
    "float32" or "bfloat16", of its matrix products; of a mask generator those of the image encoder. points: a mask
    generator is asked at points x points places of the frame.

    A query's score is its best class's probability times the mean probability of its mask; a prompt's the IoU that the model expects
    times the mask's stability. Of masks with an IoU above .7 the best is kept. Proposals have run-length codes for masks.

    Raises ProposalError where transformers or the model is missing, or the model is of no family that gives masks of objects.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        top: int = TOP,
        threshold: float = 0.0,
        short_side: int | None = None,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        points: int = 16,
    ):
        self.top, self.threshold, self.device, self.points = top, threshold, open_device(device), points
        self.precision = getattr(torch, precision)
        where, known = _find(str(model))
        self.family, self.model, self.processor = _load(str(model), where, known)
        self.model = self.model.eval().requires_grad_(False).to(self.device)
        self.options = self._options(str(model), short_side)
        self.task = _task(where, known, self.model.config.task_seq_len) if self.family == "oneformer" else None

    def _options(self, name: str, short_side: int | None) -> dict[str, Any]:
        """What the image processor is told with every frame."""
        options: dict[str, Any] = {"return_tensors": "pt", "input_data_format": "channels_first", "device": self.device}
        if self.family in ("eomt", "eomt_dinov3") and self.processor.do_split_image:
            raise ProposalError(
                f"hf:{name}: trained for semantic segmentation, which has no objects; take weights for instances"
            )
        if short_side is None:
            return options
        if self.family not in ANY_SIZE:
            raise ProposalError(
                f"hf:{name}: a {_family(self.family)} takes frames of its own size only; leave out --short-side"
            )
        return {**options, "size": {"shortest_edge": short_side, "longest_edge": 2 * short_side}}

    def __call__(self, frame: np.ndarray | Tensor) -> Proposals:
        """frame uint8 [H, W, 3] RGB (array) or [3, H, W] (tensor) -> at most ``top`` proposals, best first."""
        return self.batch([frame])[0]

    @torch.inference_mode()
    def batch(self, frames: Sequence[np.ndarray | Tensor]) -> list[Proposals]:
        """The proposals of each of some frames of one size."""
        images = [channels_first(frame) for frame in frames]
        inputs = self.processor(images=images, **self.options)
        if self.family in PROMPTS:
            return self._prompt(inputs, [_size(image) for image in images])
        return self._query(inputs, [_size(image) for image in images])

    def _query(self, inputs: Any, sizes: list[tuple[int, int]]) -> list[Proposals]:
        pixels = inputs["pixel_values"].to(self.device)  # [B, 3, h, w]
        given: dict[str, Any] = {"pixel_values": pixels}
        padding = inputs.get("pixel_mask")  # [B, h, w], 0 where there is no frame
        if padding is not None:
            padding = given["pixel_mask"] = padding.to(self.device)
        if self.task is not None:
            given["task_inputs"] = self.task.to(self.device).expand(len(pixels), -1)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            output = self.model(**given)
        universal = "class_queries_logits" in output
        classes = (output.class_queries_logits if universal else output.logits).float()  # [B, Q, classes]
        logits = output.masks_queries_logits if universal else output.pred_masks  # [B, Q, h / 4, w / 4]
        odds = classes.sigmoid() if self.family == "rf_detr" else classes.softmax(-1)[..., :-1]  # the last one is "no object"
        padded = _size(pixels)
        found = []
        for index, size in enumerate(sizes):
            inside = padded
            if padding is not None:
                inside = int(padding[index].any(1).sum()), int(padding[index].any(0).sum())
            elif self.family in ("eomt", "eomt_dinov3"):
                inside = self._resized(size)
            candidates = _Candidates(self.threshold)
            candidates.add(logits[index].float(), odds[index].amax(-1), padded, inside)
            found.append(candidates.best(self.top, size, padded, inside))
        return found

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """How large EoMT's processor makes a frame before it pads it."""
        from transformers.image_transforms import get_size_with_aspect_ratio

        return get_size_with_aspect_ratio(size, self.processor.size["shortest_edge"], self.processor.size["longest_edge"])

    def _prompt(self, inputs: Any, sizes: list[tuple[int, int]]) -> list[Proposals]:
        pixels = inputs["pixel_values"].to(self.device)  # [B, 3, h, w]
        padded = _size(pixels)
        reshaped = inputs.get("reshaped_input_sizes")  # SAM's: it pads
        insides = [padded] * len(sizes) if reshaped is None else [(int(h), int(w)) for h, w in reshaped]
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            embeddings = self.model.get_image_embeddings(pixels)
        known: dict[str, Any] = {"image_embeddings": _floats(embeddings)}
        if self.family == "sam_hq":
            known = dict(zip(("image_embeddings", "intermediate_embeddings"), _floats(embeddings)))
        places = (torch.arange(self.points, device=self.device) + 0.5) / self.points
        grid = torch.cartesian_prod(places, places)  # [P, 2] x, y in 0..1
        ends = torch.tensor([[w, h] for h, w in insides], device=self.device)  # [B, 2]
        points = (grid * ends[:, None])[:, :, None]  # [B, P, 1, 2] pixels of the image that the model sees
        candidates = [_Candidates(self.threshold) for _ in sizes]
        for part in points.split(POINTS, 1):
            labels = torch.ones(part.shape[:3], dtype=torch.int32, device=self.device)
            output = self.model(input_points=part, input_labels=labels, multimask_output=True, **known)
            for index, one in enumerate(candidates):
                logits = output.pred_masks[index].flatten(0, 1)  # [3 P, h / 4, w / 4]
                one.add(logits, output.iou_scores[index].flatten().clamp(0, 1), padded, insides[index], stable=True)
        return [one.best(self.top, *sides) for one, sides in zip(candidates, zip(sizes, [padded] * len(sizes), insides))]


class _Candidates:
    """Masks of a frame, as logits [M, h, w], that no better one repeats."""

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.logits: list[Tensor] = []
        self.scores: list[Tensor] = []

    def add(
        self, logits: Tensor, scores: Tensor, padded: tuple[int, int], inside: tuple[int, int], stable: bool = False
    ) -> None:
        """stable: a mask's worth is how little it changes with the cut, else its mean probability."""
        masks = self._inside(logits, padded, inside) > 0
        filled = masks.flatten(1).any(1)
        logits, scores, masks = logits[filled], scores[filled], masks[filled]
        within = self._inside(logits, padded, inside)
        if stable:
            worth = (within > 1).sum((1, 2)) / (within > -1).sum((1, 2))
        else:
            worth = (within.sigmoid() * masks).sum((1, 2)) / masks.sum((1, 2))
        scores = scores * worth
        kept = (scores > self.threshold).nonzero()[:, 0]
        kept = kept[suppress(masks[kept], scores[kept], len(kept))]
        self.logits.append(logits[kept])
        self.scores.append(scores[kept])

    def best(self, top: int, size: tuple[int, int], padded: tuple[int, int], inside: tuple[int, int]) -> Proposals:
        logits, scores = torch.cat(self.logits), torch.cat(self.scores)
        kept = suppress(self._inside(logits, padded, inside) > 0, scores, top)
        return from_logits(logits[kept], scores[kept], size, padded, inside)

    @staticmethod
    def _inside(logits: Tensor, padded: tuple[int, int], inside: tuple[int, int]) -> Tensor:
        """The part of the logits in which the frame lies."""
        rows, columns = (math.ceil(n * part / whole) for n, part, whole in zip(logits.shape[1:], inside, padded))
        return logits[:, :rows, :columns]


def _size(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _floats(value: Any) -> Any:
    """A tensor, or lists of tensors, in float32."""
    return value.float() if isinstance(value, Tensor) else [_floats(each) for each in value]


# ------------------------------------------------------------------------------------------------------------- loading


def _find(model: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes for a folder, or for a model that the hub or the local cache has."""
    try:
        import transformers  # noqa: F401
        from huggingface_hub import HfApi, errors, try_to_load_from_cache
    except ImportError as error:
        raise ProposalError(
            f"hf:{model} needs transformers ({error}): pip install 'dmm_fast[hf]'. Without it: {OTHERS}"
        ) from None
    if os.path.isdir(model):
        return model, {"local_files_only": True}
    name, _, revision = model.partition("@")
    if model[:1] in "/.~" or name.count("/") > 1:
        raise ProposalError(f"hf:{model}: no such folder; give one with config.json and weights, or a model of the hub")
    version = {"revision": revision or "main"}
    page = f"https://huggingface.co/{name}"
    try:  # these two name the cause and do not wait where there is no network; from_pretrained tries for half a minute
        HfApi().model_info(name, timeout=20, **version)
        HfApi().hf_hub_download(name, "config.json", **version)
        return name, version
    except errors.HFValidationError as error:
        raise ProposalError(f"hf:{model}: neither a folder nor a name of the hub ({_line(error)})") from None
    except errors.GatedRepoError:
        raise ProposalError(f"hf:{model}: its authors want you to agree to their terms first: do so at {page}, then sign in here with "
                            "`hf auth login` (or set HF_TOKEN)") from None  # fmt: skip
    except errors.RevisionNotFoundError:
        raise ProposalError(f"hf:{model}: {name} has no revision {revision!r}; see {page}/commits/main") from None
    except errors.RepositoryNotFoundError:
        raise ProposalError(f"hf:{model}: the hub has no such model, or it is private: check {page}; for a private one sign in with "
                            "`hf auth login` (or set HF_TOKEN)") from None  # fmt: skip
    except errors.RemoteEntryNotFoundError:
        raise ProposalError(f"hf:{model}: no config.json there, so not a model of transformers; see {page}") from None
    except Exception as error:  # no network: the hub's versions raise types of three libraries
        if isinstance(try_to_load_from_cache(name, "config.json", **version), str):
            return name, {**version, "local_files_only": True}
        wanted = f" --revision {revision}" if revision else ""
        raise ProposalError(
            f"hf:{model}: its files are not here and cannot be fetched from the hub ({_line(error)}). Where there is a network: "
            f"hf download {name}{wanted} --local-dir FOLDER; then give the folder with --proposals hf:FOLDER. Or another detector: {OTHERS}"
        ) from None


def _load(model: str, where: str, known: dict[str, Any]) -> tuple[str, Any, Any]:
    """-> family, model, image processor."""
    import transformers
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.utils import logging

    try:
        config = AutoConfig.from_pretrained(where, **known)
    except Exception as error:  # as below
        raise ProposalError(f"hf:{model}: no model that transformers {transformers.__version__} knows ({_line(error)}); "
                            f"families that give proposals: {FAMILIES}") from None  # fmt: skip
    family, names = config.model_type, config.architectures or []
    if family not in QUERIES and family not in PROMPTS:
        raise ProposalError(f"hf:{model}: a {family} gives no masks of objects; families that do: {FAMILIES}")
    if any(name.endswith("ObjectDetection") for name in names):
        raise ProposalError(
            f"hf:{model}: {names[0]} finds boxes only; proposals need masks (families that give them: {FAMILIES})"
        )
    kind: Any
    if family in PROMPTS:
        kind = transformers.AutoModelForMaskGeneration
    elif family == "rf_detr":
        kind = transformers.AutoModelForInstanceSegmentation
    else:
        kind = transformers.AutoModelForUniversalSegmentation
    of_model: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if family == "sam3_video":  # the part of it that takes points; transformers 5.24 does not find its tensors by itself
        of_model["key_mapping"] = {r"^tracker_model\.": ""}
    of_images: dict[str, Any] = {}
    if family == "oneformer":
        of_images["class_info_file"] = None  # names of classes, from another repository
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # what is missing is told below
    logging.disable_progress_bar()  # of tensors; downloads have their own
    try:
        net, told = kind.from_pretrained(where, **of_model, **known)
        processor = AutoImageProcessor.from_pretrained(where, **of_images, **known)
    except Exception as error:  # transformers and safetensors raise half a dozen unrelated types for bad files
        raise ProposalError(f"hf:{model}: cannot be loaded: {_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    parameters = {name for name, _ in net.named_parameters()}
    if missing := sorted(parameters & set(told["missing_keys"])):
        raise ProposalError(
            f"hf:{model}: the weights lack {len(missing)} tensors of a {_family(family)} with masks, such as {missing[0]}; "
            "they are of another model, or of a part of it"
        )
    return family, net, processor


def _task(where: str, known: dict[str, Any], length: int) -> Tensor:
    """OneFormer is told what to do: [1, length] token ids, as its own processor makes them."""
    from transformers import AutoTokenizer

    try:
        tokens = AutoTokenizer.from_pretrained(where, **known)(
            "the task is instance", padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
    except (OSError, ValueError, TypeError) as error:
        raise ProposalError(f"hf:{where}: a OneFormer needs its tokenizer's files too ({_line(error)})") from None
    return tokens["input_ids"] * tokens["attention_mask"]


def _family(kind: str) -> str:
    return {**QUERIES, **PROMPTS}[kind]


def _line(error: BaseException) -> str:
    """The first line of a message, as others may be long."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."

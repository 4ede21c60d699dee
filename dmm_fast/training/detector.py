"""Training of the proposal network on images with masks: single pictures and video frames alike.

Data sets are those of `dmm_fast.data.datasets`. Confident proposals of another detector, one COCO results file per video, add
objects that nobody has annotated. Everything random comes from (seed, step), so that a run that was cut short goes on as
if it had not been.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from dmm_fast.data.annotated import Video
from dmm_fast.data.datasets import open_dataset
from dmm_fast.files import whole_file
from dmm_fast.learning.targets import target
from dmm_fast.model import Proposals
from dmm_fast.model.weights import load_weights, packaged, write_tensors
from dmm_fast.ops.device import open_device
from dmm_fast.ops.vision import mask_iou
from dmm_fast.proposals.base import full_masks
from dmm_fast.proposals.coco import ProposalFile, read_aligned
from dmm_fast.proposals.detector import shared_body
from dmm_fast.proposals.layers import DetectorConfig
from dmm_fast.proposals.mask_rcnn import MaskRCNNProposer
from dmm_fast.proposals.network import build, load_detector, save_detector
from dmm_fast.training.checkpoint import read_curve
from dmm_fast.training.imagenet import CARRIERS, imagenet_weights

MOST = 12  # proposals of a frame that may count as objects
SAME = 0.7  # masks that overlap more than this show one object
SEEDS = 1_000_003  # between two runs' seeds: more than a run has steps; torch keeps 32 bits of a seed
STATE, WEIGHTS, CURVE = "state.safetensors", "detector.safetensors", "curve.jsonl"


@dataclass(frozen=True)
class Schedule:
    """How to train. rate: Adam's step size, after `warmup` steps, falling to 0 at the end (a cosine); score: the least
    of a proposal that serves as ground truth; paste: how often objects of one picture are pasted into another;
    every: steps between two rows of the curve; rois: regions per picture that the box head learns from; amp: layers
    compute in bfloat16."""

    steps: int = 10000
    batch: int = 4
    rate: float = 6e-4
    decay: float = 1e-4
    warmup: int = 200
    clip: float = 5.0
    score: float = 0.3
    paste: float = 0.5
    rois: int = 64
    amp: bool = False
    every: int = 500
    seed: int = 0


def settings(asked: str, changes: Sequence[str] = ()) -> tuple[DetectorConfig, Schedule]:
    """From a preset's name or a YAML file (``preset: small`` and any field of DetectorConfig or Schedule), with
    "key=value" changes on top."""
    import yaml

    values: dict[str, Any] = {"preset": asked}
    if asked.endswith((".yaml", ".yml")):
        values = yaml.safe_load(Path(asked).read_text())
        if not isinstance(values, dict):
            raise ValueError(f"{asked}: must hold settings, one 'name: value' a line")
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"settings are changed by name=value, got {change!r}")
        values[name] = yaml.safe_load(value)
    for field in (*fields(Schedule), *fields(DetectorConfig)):
        value = values.get(field.name)
        if field.type in ("int", "float") and isinstance(value, (str, float)):  # YAML takes 1e-3 for a text
            values[field.name] = number = float(value)
            if field.type == "int":
                if not number.is_integer():
                    raise ValueError(f"{field.name} must be a whole number, got {value!r}")
                values[field.name] = int(number)
    schedule = Schedule(**{field.name: values.pop(field.name) for field in fields(Schedule) if field.name in values})
    return DetectorConfig.preset(values.pop("preset", "small"), **values), schedule


# -------------------------------------------------------------------------------------------------------------- data


class Example(NamedTuple):
    """An annotated frame (a single picture is a video of one), and a file of proposals for its video."""

    video: Video
    index: int
    pseudo: Path | None

    def image(self) -> Tensor:
        """uint8 [3, H, W], RGB."""
        return torch.from_numpy(self.video.frame(self.index)).permute(2, 0, 1).contiguous()

    def objects(self) -> Tensor:
        """Ground truth, bool [N, H, W]."""
        ids = torch.from_numpy(self.video.ids(self.index))  # [H, W]
        names = ids.unique()
        return ids == names[names > 0][:, None, None]

    def more_objects(self, score: float) -> Tensor:
        """Ground truth, then the proposals of at least `score` that show none of the objects before them."""
        masks = self.objects()
        if self.pseudo is not None:
            found = _proposals_of(self.pseudo, self.video).frame(self.video.stems[self.index], self.video.size)
            for mask in found.masks[found.scores >= score]:
                if len(masks) == 0 or mask_iou(mask[None], masks).max() < SAME:
                    masks = torch.cat([masks, mask[None]])
        return masks


@cache
def _proposals_of(file: Path, video: Video) -> ProposalFile:
    return read_aligned(file, video.stems, MOST)


def find_examples(roots: Iterable[str | os.PathLike], pseudo: Sequence[str | os.PathLike] = ()) -> list[Example]:
    """All annotated frames of the data sets `roots`; `pseudo` are folders of VIDEO.json proposals.

    Raises DataError for a folder that is no data set, ValueError where proposals fit none of the videos.
    """
    videos = [video for root in roots for video in open_dataset(root)]
    files = {file.stem: file for folder in map(Path, pseudo) for file in sorted(folder.glob("*.json"))}
    if pseudo and not {video.name for video in videos} & set(files):
        raise ValueError(f"{', '.join(map(str, pseudo))}: no proposals with the name of a video (VIDEO.json)")
    return [Example(video, index, files.get(video.name)) for video in videos for index in video.annotated]


def left_in(examples: list[Example], out: Iterable[str]) -> list[Example]:
    """Those of other videos than `out`. Raises ValueError for a name that no data set has."""
    if unknown := {*out} - {example.video.name for example in examples}:
        raise ValueError(f"held-out or left-out videos that no data set has: {', '.join(sorted(unknown))}")
    return [example for example in examples if example.video.name not in {*out}]


def picture_size(config: DetectorConfig) -> tuple[int, int]:
    """(H, W) of the pictures that a network learns from."""
    return config.short_side, round(config.short_side * 16 / 9 / 16) * 16


def augmentation(size: tuple[int, int]) -> v2.Transform:
    """Flips, zoom, crops and colours; pictures and masks come out as `size`."""
    shape = size[1] / size[0]
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomZoomOut(fill={tv_tensors.Image: 128, tv_tensors.Mask: 0}, side_range=(1.0, 1.6), p=0.25),
        v2.RandomResizedCrop(size, scale=(0.25, 1.0), ratio=(0.7 * shape, 1.4 * shape), antialias=True),
        v2.RandomPhotometricDistort(p=0.5),
        v2.RandomGrayscale(0.05),
    ])  # fmt: skip


def paste(target: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Some objects of `source` laid over `target`, (image [3, H, W], masks [N, H, W]) each; hidden ones go."""
    image, masks = target
    chosen = source[1][torch.rand(len(source[1])) < 0.5]
    over = chosen.any(0)  # [H, W]
    visible = masks & ~over
    kept = visible.sum((1, 2)) > 0.3 * masks.sum((1, 2))
    return torch.where(over, source[0], image), torch.cat([visible[kept], chosen])


Batch = tuple[list[Tensor], list[dict[str, Tensor]]]  # pictures and their targets


def on_device(batch: Batch, device: torch.device) -> Batch:
    images, targets = batch
    return [image.to(device) for image in images], [
        {name: value.to(device) for name, value in each.items()} for each in targets
    ]


class Batches(torch.utils.data.Dataset):
    """The batch of every step: item `step` is a list of pictures and a list of targets, always the same ones."""

    def __init__(self, examples: list[Example], schedule: Schedule, size: tuple[int, int]):
        if len(examples) <= schedule.batch:
            raise ValueError(
                f"training: {len(examples)} annotated frames are too few for batches of {schedule.batch} and one to paste from"
            )
        self.examples, self.schedule, self.augment = examples, schedule, augmentation(size)
        lengths = Counter(example.video.name for example in examples)
        # Frames of one video are much alike: a video counts as the square root of its length.
        self.weights = torch.tensor([lengths[example.video.name] ** -0.5 for example in examples])

    def __len__(self) -> int:
        return self.schedule.steps

    def __getitem__(self, step: int) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.schedule.seed * SEEDS + step)
            pairs = [self._augmented(index) for index in torch.multinomial(self.weights, self.schedule.batch + 1)]
            mixed = [paste(pair, pairs[-1]) if torch.rand(()) < self.schedule.paste else pair for pair in pairs[:-1]]
        return [image.float() / 255 for image, _ in mixed], [target(masks) for _, masks in mixed]

    def _augmented(self, index: Tensor) -> tuple[Tensor, Tensor]:
        example = self.examples[index]
        image, masks = example.image(), example.more_objects(self.schedule.score)
        image, masks = self.augment(tv_tensors.Image(image), tv_tensors.Mask(masks))
        return image.as_subclass(Tensor), masks.as_subclass(Tensor)


# ------------------------------------------------------------------------------------------------------------ measure


def recall(
    frames: Iterable[tuple[Tensor, Proposals]], tops: Sequence[int] = (10, 50), ious: Sequence[float] = (0.5, 0.75)
) -> dict[str, float]:
    """How much of the objects the proposals hold, for pairs of ground truth bool [N, H, W] and proposals.

    "recall@K/IOU": the share of objects that one of the K best proposals meets with at least this IoU; "best@K": the mean
    IoU of the best of them.
    """
    best: dict[int, list[float]] = {top: [] for top in tops}
    for objects, proposals in frames:
        _, scores, masks = full_masks(proposals, tuple(objects.shape[1:]))
        order = scores.argsort(descending=True, stable=True)
        for top in tops:
            ranked = masks[order[:top]]
            overlap = mask_iou(objects, ranked).amax(1) if len(ranked) else torch.zeros(len(objects))  # [N]
            best[top] += overlap.tolist()
    if not best[tops[0]]:
        raise ValueError("recall: there are no objects to find")
    report = {f"recall@{top}/{iou:g}": float(np.mean(np.array(best[top]) >= iou)) for top in tops for iou in ious}
    return {**report, **{f"best@{top}": float(np.mean(best[top])) for top in tops}}


def validate(propose: Callable[[Tensor], Proposals], examples: Iterable[Example]) -> dict[str, float]:
    """Recall of ground truth objects by a proposer."""
    return recall((example.objects(), propose(example.image())) for example in examples)


# --------------------------------------------------------------------------------------------------------------- train


def train(
    config: DetectorConfig,
    schedule: Schedule,
    data: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    pseudo: Sequence[str | os.PathLike] = (),
    held_out: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    minutes: float = math.inf,
    init: str | os.PathLike | None = None,
    backbone: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """Train until `schedule.steps` or `minutes` have passed, whichever is first; OUT receives the weights
    (detector.safetensors), curve.jsonl and the state from which the same call goes on after an interruption.

    held_out: videos that are validated on (every fifth frame); leave_out: videos that are not looked at; init: a file of
    weights to start from, "small" (those in the package) or "coco" (torchvision's, for resnet50), else the backbone has
    ImageNet's; backbone: a segmentation network's weights, whose backbone takes its place, so that both can share what it sees.
    Returns the last row of the curve.
    """
    examples = find_examples(data, pseudo)
    learned = left_in(examples, (*held_out, *leave_out))
    checked = [example for example in examples if example.video.name in held_out][::5]
    inputs = {
        "data": _absolute(data), "pseudo": _absolute(pseudo), "held_out": sorted({*held_out}), "leave_out": sorted({*leave_out}),
        "init": init if init in (None, "small", "coco") else _absolute([init])[0],
        "backbone": None if backbone is None else _absolute([backbone])[0],
    }  # fmt: skip
    run = _Run(config, schedule, Path(out), minutes, init, backbone, open_device(device), inputs)
    batches = Batches(learned, schedule, picture_size(config))
    rest = torch.utils.data.Subset(batches, range(run.step, schedule.steps))
    loader = torch.utils.data.DataLoader(rest, batch_size=None, num_workers=workers)
    bar = tqdm(loader, total=schedule.steps, initial=run.step, unit=" steps", disable=None if progress else True)
    for images, targets in bar:
        losses = run.learn(images, targets)
        bar.set_postfix(loss=f"{losses['loss']:.3f}")
        if run.step % schedule.every == 0 or run.finished:
            run.note(checked)
        if run.finished:
            break
    return run.last_row()


def _absolute(paths: Iterable[str | os.PathLike]) -> list[str]:
    return [os.path.abspath(path) for path in paths]


class _Run:
    """Network, optimiser, clock and files of a training. inputs: what it learns from, which its state keeps."""

    def __init__(
        self,
        config: DetectorConfig,
        schedule: Schedule,
        out: Path,
        minutes: float,
        init: Any,
        backbone: Any,
        device: torch.device,
        inputs: dict[str, Any],
    ):
        self.config, self.schedule, self.out, self.minutes, self.device = config, schedule, out, minutes, device
        self.inputs = inputs
        self.step, self.seconds = 0, 0.0
        self.sums: Counter[str] = Counter()  # of losses and steps since the curve's last row
        torch.manual_seed(schedule.seed)
        resuming = (out / STATE).exists()
        self.net = _initial(config, None if resuming else init, pretrained=not resuming and backbone is None)
        if backbone is not None and not resuming:
            load_weights(self.net.backbone.body, shared_body(backbone), str(backbone))
        make_ready(self.net, schedule.rois)
        self.net.to(device).to(memory_format=torch.channels_last)
        self.weights = {name: weight for name, weight in self.net.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), schedule.rate, weight_decay=schedule.decay)
        out.mkdir(parents=True, exist_ok=True)
        if resuming:
            self._resume()
        else:
            (out / CURVE).unlink(missing_ok=True)
        self.began = time.monotonic()

    @property
    def part(self) -> float:
        """How much of the training is done, in [0, 1]."""
        return min(1.0, max(self.step / self.schedule.steps, self.seconds / 60 / self.minutes))

    @property
    def finished(self) -> bool:
        return self.part >= 1.0

    def learn(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, float]:
        warm = min(1.0, (self.step + 1) / max(1, self.schedule.warmup))
        rate = self.schedule.rate * warm * (1 + math.cos(math.pi * self.part)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(self.schedule.seed * SEEDS + self.step)  # torchvision samples anchors and regions at random
        self.net.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.schedule.amp):
            losses = self.net(*on_device((images, targets), self.device))
        loss = sum(losses.values())
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), self.schedule.clip)
        self.optimizer.step()
        values = {name: float(value.detach()) for name, value in {"loss": loss, **losses}.items()}
        if not math.isfinite(values["loss"]):
            raise ValueError(f"training: the loss is {values['loss']} at step {self.step}; a lower rate may help")
        self.sums.update(values, steps=1)
        self.step += 1
        now = time.monotonic()
        self.seconds, self.began = self.seconds + now - self.began, now
        return values

    def note(self, checked: list[Example]) -> None:
        """A row of the curve, then weights and state; the state is last, so that it never knows more than the others."""
        steps = self.sums.pop("steps")
        row = {"step": self.step, "minutes": round(self.seconds / 60, 2)}
        row.update({name: round(total / steps, 5) for name, total in self.sums.items()})
        if checked:
            proposer = MaskRCNNProposer(self.net, device=self.device)
            row.update({name: round(value, 4) for name, value in validate(proposer, checked).items()})
            for weight in self.weights.values():
                weight.requires_grad_(True)  # a proposer takes it away
        self.sums.clear()
        with (self.out / CURVE).open("a") as file:
            file.write(json.dumps(row) + "\n")
        save_detector(self.net, self.config, self.out / WEIGHTS, {"trained": row, "schedule": asdict(self.schedule)})
        self._save()

    def last_row(self) -> dict[str, float]:
        return json.loads((self.out / CURVE).read_text().splitlines()[-1])

    def _save(self) -> None:
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        for name, weight in self.weights.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                tensors[f"{kind}.{name}"] = self.optimizer.state[weight][kind]
        write_tensors(self.out / STATE, tensors, {"step": self.step, "seconds": self.seconds, **self._asked()})

    def _asked(self) -> dict[str, dict[str, Any]]:
        """What must be the same when it goes on."""
        return {"config": self.config.to_dict(), "schedule": asdict(self.schedule), "inputs": self.inputs}

    def _resume(self) -> None:
        path = self.out / STATE
        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["dmm_fast"])
        for name, own in self._asked().items():
            before = notes.get(name, own)  # a state of an earlier version has no inputs
            changed = {key: (before.get(key), value) for key, value in own.items() if before.get(key) != value}
            if changed:
                raise ValueError(f"{path}: was trained with other settings (there, now): {changed}; take another --out")
        tensors = load_file(path, str(self.device))
        load_weights(self.net, {name[4:]: value for name, value in tensors.items() if name.startswith("net.")}, str(path))
        self.step, self.seconds = notes["step"], notes["seconds"]
        for name, weight in self.weights.items():
            moments = {kind: tensors[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **moments}
        rows = read_curve(self.out / CURVE, self.step, 0)
        with whole_file(self.out / CURVE) as whole:
            whole.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_ready(net: nn.Module, rois: int) -> None:
    """Let a Mask R-CNN learn from `rois` regions per picture, in bfloat16 too."""
    net.roi_heads.fg_bg_sampler.batch_size_per_image = rois
    for head in (net.rpn.head, net.roi_heads.box_predictor, net.roi_heads.mask_predictor):
        head.register_forward_hook(_in_float)


def _in_float(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Boxes and losses are computed in float: bfloat16 has whole pixels only from 256 on."""
    return output.float() if isinstance(output, Tensor) else type(output)(_in_float(_module, None, each) for each in output)


def _initial(config: DetectorConfig, init: str | os.PathLike | None, pretrained: bool) -> nn.Module:
    """The network at step 0: with the weights of `init`, else with a backbone from ImageNet."""
    if init == "coco":
        net = build(config)
        load_weights(net, class_agnostic(_coco_tensors(config)), "Mask R-CNN's COCO weights without classes")
    elif init is not None:
        net, saved = start_from(init)
        if saved != config:
            raise ValueError(f"{init}: its settings are {saved}, not {config}")
    elif config.backbone in CARRIERS:
        net = build(config)
        if pretrained:
            load_weights(net.backbone.body, imagenet_weights(config.backbone), f"ImageNet weights of {config.backbone}")
    else:
        net = build(config, pretrained)
    return net


def start_from(init: str | os.PathLike) -> tuple[nn.Module, DetectorConfig]:
    """The network in a file, or the packaged one ("small"), and its settings."""
    return load_detector(packaged("small-proposals"), shared_body()) if init == "small" else load_detector(init)


def _coco_tensors(config: DetectorConfig) -> dict[str, Tensor]:
    if config.backbone != "resnet50":
        raise ValueError(f"init: torchvision has COCO weights for the backbone resnet50, not for {config.backbone}")
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    return MaskRCNN_ResNet50_FPN_Weights.COCO_V1.get_state_dict(progress=False, check_hash=True)


def class_agnostic(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Mask R-CNN with the foreground classes of its three predictors averaged into one."""
    merged = dict(tensors)
    for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits"):
        for name in (f"roi_heads.{layer}.weight", f"roi_heads.{layer}.bias"):
            each = 4 if "bbox" in layer else 1  # rows of a class; class 0 is the background
            classes = tensors[name].unflatten(0, (-1, each))  # [classes, each, ..]
            merged[name] = torch.stack([classes[0], classes[1:].mean(0)]).flatten(0, 1)
    return merged

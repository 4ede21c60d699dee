"""What a training run is made of, as YAML: ``read_config("small", ["data.path=davis"])``.

The files beside this one are the presets. A name that is not a setting is refused, with the nearest that is.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from dmm_fast.learning.losses import Loss
from dmm_fast.model import Config

FOLDER = Path(__file__).parent


class ConfigError(ValueError):
    """A training configuration that cannot be used; the message names the setting and the rule."""


@dataclass(frozen=True)
class Data:
    """Where clips come from.

    path, layout, split, proposals: as `open_dataset` takes them; the defaults of every source and of validation.
    frames: of a clip, the first of which gives the objects: 2 is one unrolled step, the paper's 2 steps are 3.
    sources: {kind: clips, paste, alike, stills or synthetic; weight; settings of that class in `dmm_fast.data`}, and any of path,
    layout, split, names, proposals that are not the defaults. clips: in an epoch; default one for each video.
    augment: settings of `dmm_fast.data.augment.Augment` for the sources that have none of their own; size is (H, W).
    held_out: names of videos that validate and are kept from every source; [] for none. val_split: or a split that validates,
    kept from every source of the same data set.
    val_stride: validate on every n-th frame.
    """

    path: str | None = None
    layout: str = "auto"
    split: str | None = None
    proposals: str | None = None
    frames: int = 2
    clips: int | None = None
    sources: tuple[dict, ...] = ({"kind": "clips"},)
    augment: dict = field(default_factory=dict)
    held_out: tuple[str, ...] = ()
    val_split: str | None = None
    val_proposals: str | None = None
    val_stride: int = 1
    workers: int = 2


@dataclass(frozen=True)
class Optim:
    """Adam or AdamW, with one rate for weights that came from `pretrained` and one for new weights.

    lr_backbone: of the backbone's pretrained weights; None: as the others'.
    schedule: of the rates after a linear warm-up of so many steps: constant, cosine (down to `floor` of the rate at the
    end), or step (times `gamma` after each epoch in `milestones`). clip: of the gradient's norm, 0 for none.
    """

    name: str = "adam"
    lr_pretrained: float = 1e-4
    lr_backbone: float | None = None
    lr_new: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    floor: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    clip: float = 5.0


@dataclass(frozen=True)
class Beside:
    """A proposal network that learns on the same backbone, so that both can use what it sees.

    init: small (the packaged one's layers) or a file of `dmm-fast train-proposals`. data, pseudo, leave_out: as in that command;
    videos that validate are left out too. batch: pictures per step, over all processes; score, paste, rois: see
    `dmm_fast.training.detector.Schedule`. rate: of its own layers; the rest of `optim`, the gradient's clip too, is for both
    networks together. weight: of its loss beside the segmenter's.
    """

    init: str = "small"
    data: tuple[str, ...] = ()
    pseudo: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    batch: int = 4
    score: float = 0.3
    paste: float = 0.5
    rois: int = 64
    rate: float = 4e-4
    weight: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    pretrained: imagenet (the backbone's weights, from an installed package that carries them or through timm), none, small or detail
    (a packaged network's), or a safetensors file of this project. freeze: the backbone stays as it is. assignment: layer, or detached: the Hungarian
    assignment of the detached cost takes its place (Table 4's comparison). batch: clips per step, over all processes;
    accumulate: in so many parts, one after the other. ema: decay of the averaged weights, which are validated and shipped;
    0 for none. save_seconds: between checkpoints. detector: a proposal network that learns beside; default none.
    """

    out: str = "runs/train"
    seed: int = 0
    device: str = "auto"
    model: Config = field(default_factory=lambda: Config.preset("youtube-vos", refine="light"))
    pretrained: str = "imagenet"
    freeze: bool = False
    assignment: str = "layer"
    epochs: int = 10
    batch: int = 24
    accumulate: int = 1
    amp: bool = False
    ema: float = 0.0
    channels_last: bool = True
    compile: bool = False
    save_seconds: float = 300.0
    val_every: int = 1
    tensorboard: bool = True
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    detector: Beside | None = None

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, rule: str) -> None:
            if not holds:
                value = self
                for part in name.split("."):
                    value = getattr(value, part)
                raise ConfigError(f"train: {name} must be {rule}, got {value!r}")

        require(self.model.backbone != "none", "model.backbone", "a timm model: without one there is nothing to train")
        require(self.assignment in ("layer", "detached"), "assignment", "layer or detached")
        require(self.epochs >= 1, "epochs", "at least 1")
        require(self.accumulate >= 1, "accumulate", "at least 1")
        require(self.batch >= 1 and self.batch % self.accumulate == 0, "batch", "a positive multiple of accumulate")
        require(0 <= self.ema < 1, "ema", "in [0, 1)")
        require(self.save_seconds >= 0, "save_seconds", "at least 0")
        require(self.val_every >= 1, "val_every", "at least 1")
        require(self.data.frames >= 2, "data.frames", "at least 2")
        require(self.data.val_stride >= 1, "data.val_stride", "at least 1")
        require(len(self.data.sources) > 0, "data.sources", "at least one source")
        require(self.optim.name in ("adam", "adamw"), "optim.name", "adam or adamw")
        require(self.optim.schedule in ("constant", "cosine", "step"), "optim.schedule", "constant, cosine or step")
        require(self.optim.clip >= 0, "optim.clip", "at least 0")
        if self.detector is not None:
            require(len(self.detector.data) > 0, "detector.data", "at least one data set")
            require(self.detector.batch >= 1, "detector.batch", "at least 1")
            require(self.detector.rois >= 1, "detector.rois", "at least 1")
            require(self.detector.rate > 0, "detector.rate", "above 0")
            require(self.detector.weight >= 0, "detector.weight", "at least 0")
            require(not self.freeze, "freeze", "false where a detector learns on the backbone too")

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML: lists for tuples."""
        return _plain(dataclasses.asdict(self))


def presets() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_config(source: str | Path, changes: Iterable[str] = ()) -> TrainConfig:
    """The preset or YAML file `source`, with changes "key=value" on top: dotted keys, values in YAML."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{source}.yaml"
        if not path.is_file():
            raise ConfigError(f"train: no preset {str(source)!r}{nearest(str(source), presets())}; or name a .yaml file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"train: no such file: {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"train: {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"train: {path} must hold settings by name, got {type(values).__name__}")
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"train: {change!r} must be key=value")
        try:
            _put(values, key, yaml.safe_load(text))
        except yaml.YAMLError:
            raise ConfigError(f"train: the value of {change!r} is not YAML") from None
    return from_dict(values)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_dict`; what is not given has its default."""
    return _build(TrainConfig, values, "")


def _put(values: dict, key: str, value: Any) -> None:
    """Set a dotted key; a number goes into a list."""
    *parents, last = key.split(".")
    here: Any = values
    for part in parents:
        try:
            if isinstance(here, dict) and here.get(part) is None:
                here[part] = {}
            here = here[int(part) if isinstance(here, list) else part]
        except (ValueError, IndexError):
            raise ConfigError(f"train: {key}: the list has {len(here)} entries, from 0; {part!r} is none of them") from None
        if not isinstance(here, (dict, list)):
            raise ConfigError(f"train: {key}: {part} is a value, it has no settings")
    try:
        here[int(last) if isinstance(here, list) else last] = value
    except (ValueError, IndexError):
        raise ConfigError(f"train: {key}: the list has {len(here)} entries, from 0; {last!r} is none of them") from None


def _build(cls: type, values: Any, where: str) -> Any:
    """A dataclass from plain values, and those inside it."""
    if not isinstance(values, dict):
        raise ConfigError(f"train: {where or 'a configuration'} must hold settings by name, got {values!r}")
    types = get_type_hints(cls)
    for name in values:
        if name not in types:
            hint = "; steps are epochs x data.clips / batch" if name == "steps" else nearest(name, types)
            raise ConfigError(f"train: no setting {where + '.' if where else ''}{name}{hint}")
    prefix = f"{where}." if where else ""
    return cls(**{name: _convert(value, types[name], prefix + name) for name, value in values.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    """A YAML value as the field's type has it; 1e-4, which YAML takes for text, is a number."""
    if get_origin(kind) in (Union, UnionType):  # here always: or None
        if value is None:
            return None
        kind = get_args(kind)[0]
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _build(kind, value, where)
    try:
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is int and float(value) == int(value) and not isinstance(value, bool):
            return int(value)
    except (TypeError, ValueError):
        pass
    origin = get_origin(kind) or kind
    if origin is tuple and value is None:
        return ()
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(item, get_args(kind)[0], f"{where}.{i}") for i, item in enumerate(value))
    if origin is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a video called 01
    if not isinstance(value, origin) or (origin in (int, float) and isinstance(value, bool)):
        name = {"tuple": "list"}.get(origin.__name__, origin.__name__)
        raise ConfigError(f"train: {where} must be of type {name}, got {value!r}")
    return value


def nearest(name: str, names: Iterable[str]) -> str:
    """For an error: which of `names` was meant, or all of them."""
    names = list(names)
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value

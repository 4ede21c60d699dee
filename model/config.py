"""Everything that decides what a `DMMNet` computes, as one frozen dataclass, and the paper's settings as presets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

REFINEMENTS = ("none", "light", "heavy")
FOLLOW = ("matched", "refined")
OBJECTS = ("apart", "sharing", "together")
POOLS = ("box", "mask")
LAYERS = ("dykstra", "prices")
DYKSTRA = ("reset", "carry")


@dataclass(frozen=True)
class Config:
    """Settings of a `DMMNet`; the defaults match on mask overlap alone and need no weights.

    Features: `backbone` is any timm model with four feature levels (`features_only`), or "none". Frames are resized to
    `input_size` (height, width) when given, else shrunk until their short side is at most `short_side`, and with `enlarge` smaller ones
    are enlarged to it.
    An object's features are the mean over its "box" (the paper's RoIAlign) or its "mask": `pool`. They go through a learned projection
    to `embed` dimensions, or as they are (0). `update` is how much of a match's features goes into the template's, in frames in which
    the proposal and the last mask have an IoU above 0.5; 0 (the paper): the template stays as it was given.
    Matching: `iou_weight` is lambda of Eq. 1. `layer` "dykstra" is the paper's (`dmm_fast.match`, Algorithm 1), with its
    `n_grad`, `n_proj`, `lr` and `dykstra`; "prices" (`dmm_fast.match_prices`, docs/variants.md) takes the first three and
    decides like the Hungarian method, for networks that are not trained through it.
    IoU is taken with an object's last mask, moved on as it has moved: `motion` is how much of its velocity an object keeps from
    frame to frame, the rest is new; 0 (the paper): the mask stays where it was.
    Decision: a matched proposal is believed if its IoU with the object's last mask is above `min_iou`, or its cosine
    similarity with the template above `min_cosine` (95% of unrelated proposals stay below 0.72 with ImageNet features);
    otherwise the object keeps its last mask and is lost.
    Refinement: "none", "light" (ConvLSTM) or "heavy" (U-Net) with `hidden` channels in the coarsest layer. A light one that
    is `serial` passes its state from object to object too, as the authors' code does. A heavy one decides for its `objects`
    "apart"; "sharing", where a proposal's parts are divided among them and rivals weaken each other's pixels; or "together",
    where pixels are divided as well. It can keep a `memory` of so many frames of each object beside the template, in which the
    object was seen well. `follow` says which masks the next frame's IoU is taken with: the "matched" ones (the paper) or the
    "refined". An object whose mask has less than `min_certainty`, sum p^2 / sum p over its pixels' probabilities p, is not shown:
    what is left of one that went out of sight is uncertain all over, while a small object in sight is not.
    """

    backbone: str = "none"
    input_size: tuple[int, int] | None = None
    short_side: int | None = None
    enlarge: bool = False
    pool: str = "box"
    embed: int = 0
    update: float = 0.0
    motion: float = 0.0
    iou_weight: float = 1.0
    layer: str = "dykstra"
    n_grad: int = 40
    n_proj: int = 5
    lr: float = 0.1
    dykstra: str = "reset"
    top: int = 50
    min_iou: float = 0.0
    min_cosine: float = 0.7
    refine: str = "none"
    hidden: int = 128
    serial: bool = False
    objects: str = "apart"
    memory: int = 0
    follow: str = "matched"
    min_certainty: float = 0.0

    def __post_init__(self) -> None:
        def require(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise ValueError(f"Config: {name} must be {rule}, got {getattr(self, name)!r}")

        if self.input_size is not None:
            object.__setattr__(self, "input_size", tuple(self.input_size))  # JSON has lists only
            pair = len(self.input_size) == 2
            require(pair and min(self.input_size) >= 32, "input_size", "(height, width), each >= 32")
        require(self.short_side is None or self.short_side >= 32, "short_side", "None or at least 32")
        require(self.input_size is None or self.short_side is None, "short_side", "None when input_size is given")
        require(self.short_side is not None or not self.enlarge, "enlarge", "False without a short_side")
        require(0.0 <= self.iou_weight <= 1.0, "iou_weight", "in [0, 1]")
        require(self.backbone != "none" or self.iou_weight == 1.0, "iou_weight", "1 without a backbone")
        require(self.embed >= 0, "embed", "0 or more")
        require(self.embed == 0 or self.backbone != "none", "embed", "0 without a backbone")
        require(self.pool in POOLS, "pool", f"one of {POOLS}")
        require(0.0 <= self.update < 1.0, "update", "in [0, 1)")
        require(0.0 <= self.motion < 1.0, "motion", "in [0, 1)")
        require(self.n_grad >= 1, "n_grad", "at least 1")
        require(self.n_proj >= 1, "n_proj", "at least 1")
        require(self.lr > 0.0, "lr", "positive")
        require(self.layer in LAYERS, "layer", f"one of {LAYERS}")
        require(self.dykstra in DYKSTRA, "dykstra", f"one of {DYKSTRA}")
        require(self.top >= 1, "top", "at least 1")
        require(0.0 <= self.min_iou < 1.0, "min_iou", "in [0, 1)")
        require(0.0 < self.min_cosine <= 1.0, "min_cosine", "in (0, 1]")
        require(self.refine in REFINEMENTS, "refine", f"one of {REFINEMENTS}")
        require(self.refine == "none" or self.backbone != "none", "refine", "'none' without a backbone")
        require(self.follow in FOLLOW, "follow", f"one of {FOLLOW}")
        require(self.refine != "none" or self.follow == "matched", "follow", "'matched' without a refinement")
        require(self.refine == "light" or not self.serial, "serial", "False unless the refinement is light")
        require(self.objects in OBJECTS, "objects", f"one of {OBJECTS}")
        require(self.refine == "heavy" or self.objects == "apart", "objects", "'apart' unless the refinement is heavy")
        require(self.memory >= 0, "memory", "0 or more frames")
        require(self.refine == "heavy" or self.memory == 0, "memory", "0 unless the refinement is heavy")
        require(0.0 <= self.min_certainty < 1.0, "min_certainty", "in [0, 1)")
        require(self.refine != "none" or self.min_certainty == 0.0, "min_certainty", "0 without a refinement")
        require(self.hidden >= 8 and self.hidden % 8 == 0, "hidden", "a positive multiple of 8")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Config:
        """The settings called `name` (see `PRESETS`), with `changes` on top."""
        if name not in PRESETS:
            raise ValueError(f"Config: preset must be one of {tuple(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    def to_dict(self) -> dict[str, Any]:
        """All settings by name, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; a name that is not a field is an error, not ignored."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"Config: unknown settings {unknown}")
        return cls(**values)


_SMALL: dict[str, Any] = {
    "backbone": "tf_efficientnet_lite0",
    "short_side": 240,
    "pool": "mask",
    "embed": 128,
    "update": 0.3,
    "motion": 0.5,
    "iou_weight": 0.7,
    "min_cosine": 0.55,
    "refine": "heavy",
    "hidden": 64,
    "follow": "refined",
    "min_certainty": 0.65,
    "objects": "sharing",
    "layer": "prices",
    "n_grad": 80,
    "n_proj": 1,
    "lr": 5.0,
}
# Section 4.1. DMM-Net is ResNet-50, DMM-Net+ ResNet-101: `Config.preset("youtube-vos", backbone="resnet101")`.
PRESETS: dict[str, dict[str, Any]] = {
    # Not the paper's: with nothing to train, decide like the Hungarian method.
    "iou": {"layer": "prices", "n_grad": 80, "n_proj": 1, "lr": 5.0},
    # Not the paper's either: what the weights in the package were trained for, in real time on a CPU, and on larger frames.
    "small": _SMALL,
    "detail": _SMALL | {"short_side": 400, "enlarge": True},
    "youtube-vos": {"backbone": "resnet50", "input_size": (255, 448), "iou_weight": 0.3, "refine": "light"},
    "davis": {"backbone": "resnet50", "short_side": 480, "iou_weight": 0.3, "refine": "heavy", "hidden": 128},
    "segtrack": {"backbone": "resnet50", "short_side": 800, "iou_weight": 0.9, "refine": "heavy", "hidden": 128},
}
"""Settings by name, for `Config.preset`: the packaged network's, overlap alone, and the paper's."""

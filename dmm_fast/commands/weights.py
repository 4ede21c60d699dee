"""``dmm-fast weights``: what a weights file holds, and a smaller copy of it for use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmm_fast.commands.options import add_command

if TYPE_CHECKING:
    from torch import Tensor


def add(commands: Any) -> None:
    parser = add_command(
        commands, "weights", run, "describe a weights file, or make a half-precision copy of it",
        "Print what network a weights file is for, how it was trained, and how large it is. With --pack, write a copy in half\n"
        "precision, which is what the package ships; settings that do not affect the weights can be changed.",
        ("dmm-fast weights", "the network in the package"),
        ("dmm-fast weights runs/small/last.safetensors --pack small.safetensors --set layer=prices n_grad=80 n_proj=1 lr=5",
         "a copy of half the size that matches by prices"),
        ("dmm-fast weights detector.safetensors --pack small-proposals.safetensors --without backbone.body.",
         "without the weights that another file holds"),
        ("dmm-fast weights runs/detail/last.safetensors --pack detail.safetensors --base small",
         "without the backbone, which is that of the packaged network"),
        ("dmm-fast weights runs/identity/last.safetensors --average runs/small/last.safetensors 0.25 --pack small.safetensors",
         "three quarters of the first file, a quarter of the second, from which its training started"),
    )  # fmt: skip
    parser.add_argument(
        "file", nargs="?", default="small", metavar="FILE", help="a file, small or detail (default: small, in the package)"
    )
    parser.add_argument("--pack", metavar="OUT", help="write a half-precision copy")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the network in the copy")
    parser.add_argument(
        "--average", nargs=2, metavar=("OTHER", "SHARE"),
        help="the copy is the mean of both files, with this share of the other, in 0..1",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="NAME", help="leave out weights that the packaged file NAME has too, to be read from there"
    )
    parser.add_argument("--without", metavar="PREFIX", help="leave out weights whose names begin with this")


def run(a: argparse.Namespace) -> int:
    import torch
    import yaml

    from dmm_fast.model import PACKAGED, Config, packaged, read_weights
    from dmm_fast.model.weights import read_about, weights_file, write_tensors

    path = weights_file(a.file)
    tensors, about = read_weights(path), read_about(path)
    if a.pack is None:
        if a.set or a.without or a.average or a.base:
            raise ValueError("--set, --average, --base and --without are for the copy that --pack writes")
        count = sum(tensor.numel() for tensor in tensors.values())
        print(f"{path}: {count:,} values, {path.stat().st_size / 1e6:.1f} MB")
        print(yaml.safe_dump(about, sort_keys=False).rstrip())
        return 0
    changes = dict(change.split("=", 1) for change in a.set if "=" in change)
    if len(changes) < len(a.set):
        raise ValueError(f"--set takes NAME=VALUE, got {a.set}")
    if changes and "config" not in about:
        raise ValueError(f"{path}: says nothing of a network whose settings --set could change")
    if changes:
        about["config"] = Config.from_dict(about["config"] | {k: yaml.safe_load(v) for k, v in changes.items()}).to_dict()
    tensors = without(a.without, tensors)
    if a.average:
        tensors = averaged(tensors, without(a.without, read_weights(weights_file(a.average[0]))), a.average)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    about.pop("base", None)  # what was read from there is in `half` now
    if a.base is not None:
        if a.base not in PACKAGED:
            raise ValueError(f"--base must be one of {PACKAGED}, got {a.base!r}")
        base = read_weights(packaged(a.base))
        if absent := sorted(base.keys() - half.keys()):
            raise ValueError(
                f"--base {a.base}: it has {absent[0]} and {len(absent) - 1} more that the copy has not, and that would come back"
            )
        half = {name: tensor for name, tensor in half.items() if name not in base or not torch.equal(tensor, base[name])}
        about["base"] = a.base
    write_tensors(a.pack, half, about)
    print(f"{a.pack}: {Path(a.pack).stat().st_size / 1e6:.1f} MB")
    return 0


def without(prefix: str | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not (prefix and name.startswith(prefix))}


def averaged(tensors: dict[str, Tensor], other: dict[str, Tensor], asked: tuple[str, str]) -> dict[str, Tensor]:
    """The mean of two files' weights. asked: the other file and its share, as they were typed."""
    import torch

    from dmm_fast.training.setup import widened  # the other may be from before a layer got further inputs

    name, text = asked
    share = float(text) if text.replace(".", "", 1).isdecimal() else -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"--average takes a file and its share in 0..1, got {text!r}")
    other = widened(other, tensors)
    if wrong := sorted(
        n for n in {*tensors, *other} if n not in tensors or n not in other or tensors[n].shape != other[n].shape
    ):
        raise ValueError(f"{name}: holds another network: {wrong[0]} differs, and {len(wrong) - 1} more")
    return {n: torch.lerp(t.float(), other[n].float(), share) if t.is_floating_point() else t for n, t in tensors.items()}

"""``dmm-fast bench``: what a frame costs here, stage by stage."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import PRESETS, add_command, add_precision, add_short_side, check_device, check_packages, count

SIZES = [(240, 432), (480, 854), (720, 1280), (1080, 1920), (2160, 3840)]
RUNTIMES = ("eager", "torchscript", "pt2", "onnx", "c++ torchscript", "c++ pt2")


def add(commands: Any) -> None:
    parser = add_command(
        commands, "bench", run, "what a frame costs on this machine: stages, objects, runtimes",
        "Follow 1, 5, 10 and 20 objects through a generated clip with each runtime, and report the median and the 99th\n"
        "percentile of decoding, proposals, features, matching, refinement and writing, in milliseconds. Proposals are read\n"
        "from a file, so a detector's time is not counted, unless you give --detector. Other work on the machine changes the\n"
        "figures, so the report includes the load.\n\n"
        "pt2 takes minutes to compile first. The C++ runtimes need dmm-fast runtime --build; onnx needs ONNX Runtime.",
        ("dmm-fast bench", "the preset small in eager PyTorch and TorchScript"),
        ("dmm-fast bench --runtimes eager,pt2,'c++ pt2' --out bench", "with bench/bench.json and bench/bench.svg"),
        ("dmm-fast bench --preset youtube-vos --weights net.safetensors --device cuda --objects 5", "on a GPU"),
        ("dmm-fast bench --runtimes eager,onnx --detector small", "the live proposal network included"),
        ("dmm-fast bench --frame-size", "what frames from 432x240 to 3840x2160 cost"),
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="write bench.json and bench.svg here")
    parser.add_argument("--objects", type=_counts, metavar="N,...", help="how many objects (default: 1,5,10,20)")
    parser.add_argument(
        "--runtimes", type=_runtimes, default=["eager", "torchscript"], metavar="NAME,...",
        help=f"any of {', '.join(RUNTIMES)} (default: eager,torchscript)",
    )  # fmt: skip
    parser.add_argument("--preset", default="small", choices=PRESETS, help="the network (default: small)")
    parser.add_argument("--weights", metavar="FILE|imagenet", help="its weights, if the preset has none of its own")
    add_short_side(parser)
    parser.add_argument("--size", type=_size, default=(255, 448), metavar="HxW", help="size of the frames (default: 255x448)")
    parser.add_argument(
        "--frame-size", type=_sizes, nargs="?", const=SIZES, metavar="HxW,...",
        help="compare frames of these sizes instead, in eager PyTorch, with the first of --objects (default: 3) "
        f"(default sizes: {','.join('x'.join(map(str, size)) for size in SIZES)})",
    )  # fmt: skip
    parser.add_argument("--frames", type=count, default=40, metavar="N", help="frames to measure (default: 40)")
    parser.add_argument("--proposals", type=count, default=50, metavar="M", help="proposals a frame (default: 50)")
    parser.add_argument(
        "--detector", metavar="NAME",
        help="a live detector instead of the file: small or FILE.safetensors; with eager also torchvision, ...",
    )  # fmt: skip
    add_precision(parser, " of the runtime eager, which must then be the only one")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--threads", type=partial(count, least=1), metavar="N", help="CPU threads (default: torch's)")


def run(a: argparse.Namespace) -> int:
    import torch

    from dmm_fast.inference.bench import bench, bench_frame_sizes, frame_size_table, plot, table
    from dmm_fast.inference.segmenter import Segmenter

    check_device(a.device)
    if "onnx" in a.runtimes and not a.frame_size:
        check_packages("onnx", "onnxscript", "onnxruntime")
    if a.threads:
        torch.set_num_threads(a.threads)
    net = Segmenter(a.preset, weights=a.weights, short_side=a.short_side, device=a.device).net
    if a.frame_size:
        report = bench_frame_sizes(
            net, sizes=a.frame_size, objects=a.objects[0] if a.objects else 3, frames=a.frames, proposals=a.proposals,
            detector=a.detector, precision=a.precision, progress=partial(print, flush=True),
        )  # fmt: skip
        print(frame_size_table(report))
        if a.out:
            Path(a.out).mkdir(parents=True, exist_ok=True)
            (Path(a.out) / "frame_sizes.json").write_text(json.dumps(report, indent=1) + "\n")
        return 0
    report = bench(
        net, objects=a.objects or [1, 5, 10, 20], runtimes=a.runtimes, size=a.size, frames=a.frames, proposals=a.proposals, detector=a.detector,
        precision=a.precision, progress=partial(print, flush=True),
    )  # fmt: skip
    print(table(report))
    if a.out:
        Path(a.out).mkdir(parents=True, exist_ok=True)
        (Path(a.out) / "bench.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, Path(a.out) / "bench.svg")
    return 0


def _counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def _runtimes(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in RUNTIMES]:
        raise argparse.ArgumentTypeError(f"must be among {', '.join(RUNTIMES)}, got {', '.join(wrong)}")
    return names


def _sizes(text: str) -> list[tuple[int, int]]:
    return [_size(part) for part in text.split(",")]


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return count(height, least=32), count(width, least=32)

"""``dmm-fast study``: the paper's studies."""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import Help, add_command, count, examples


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "study", help="the paper's studies: convergence (Figure 5, Theorem 1), matching (Table 4)", formatter_class=Help,
        description="Run a study of the paper again, and draw it.",
        epilog=examples(
            ("dmm-fast study convergence --out study", "how the layer converges on random costs, a few minutes"),
            ("dmm-fast study matching DIR --proposals DIR --held-out a,b,c --out study", "does training through it help?"),
        ),
    )  # fmt: skip
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True)
    _add_convergence(studies)
    _add_matching(studies)


def _add_convergence(studies: Any) -> None:
    parser = add_command(
        studies, "convergence", _convergence, "Figure 5: objective and projection error; Theorem 1, checked",
        "Run Algorithm 1 on random costs for every pair of --lr and --n-proj, watch its objective and its projection\n"
        "error step by step, and compare with what Theorem 1 promises. Writes convergence.json and convergence.svg.",
        ("dmm-fast study convergence --out study", "Figure 5's setting: 5 x 100, three costs, ten starts"),
        ("dmm-fast study convergence --out study --templates 10 --proposals 20 --lr 0.05,0.1", "costs that are more contested"),
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument("--templates", type=count, default=5, metavar="N", help="rows of the costs (default: 5)")
    parser.add_argument("--proposals", type=count, default=100, metavar="M", help="columns of the costs (default: 100)")
    parser.add_argument("--costs", type=count, default=3, help="random costs (default: 3)")
    parser.add_argument("--starts", type=count, default=10, help="random starts of each (default: 10)")
    parser.add_argument("--n-grad", type=count, default=400, help="gradient steps (default: 400)")
    parser.add_argument("--n-proj", type=partial(_several, count), default=(5, 20, 50), metavar="N,..",
                        help="rounds of projections (default: 5,20,50)")  # fmt: skip
    parser.add_argument("--lr", type=partial(_several, float), default=(0.005, 0.01, 0.1), metavar="LR,..",
                        help="step sizes (default: 0.005,0.01,0.1)")  # fmt: skip
    parser.add_argument("--epsilon", type=partial(_several, float), default=(0.5, 0.2), metavar="E,..",
                        help="accuracies for which Theorem 1's K and N_proj are tried (default: 0.5,0.2)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of costs and starts (default: 0)")


def _add_matching(studies: Any) -> None:
    parser = add_command(
        studies, "matching", _matching, "Table 4: greedy, Hungarian, the layer; features tuned through the layer or not",
        "Score greedy, Hungarian and the layer on the same features, then tune a linear map of the features with the\n"
        "matched masks' loss going through the layer, and again with the assignment detached. The map is trained on clips\n"
        "with pasted objects, and scored on such clips and on whole videos, both from the held-out videos.\n"
        "Writes matching.json and matching.svg; repeat the command to go on where it was stopped.",
        ("dmm-fast study matching DAVIS --proposals DIR --held-out bus,kite-walk --out study", "on a data set with proposals"),
        ("dmm-fast study matching ... --kind alike --pool mask --iou-weight 0", "alike objects, told apart by features alone"),
        ("dmm-fast study matching ... --backbone resnet50 --short-side 240 --clips 500 --steps 2000", "a larger study"),
    )  # fmt: skip
    parser.add_argument("data", metavar="DIR", help="a data set of videos")
    parser.add_argument("--proposals", required=True, metavar="DIR", help="NAME.json for each video, COCO results")
    parser.add_argument("--held-out", required=True, type=lambda text: tuple(text.split(",")), metavar="NAME,..",
                        help="videos to score on")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.add_argument("--layout", default="auto", help="layout of the data set (default: auto)")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", metavar="NAME",
                        help="a timm model with ImageNet weights (default: tf_efficientnet_lite0)")  # fmt: skip
    parser.add_argument("--short-side", type=partial(count, least=32), default=128, metavar="PIXELS",
                        help="short side of the frames that features come from (default: 128)")  # fmt: skip
    parser.add_argument("--pool", choices=("box", "mask"), default="box",
                        help="an object's features: the mean over its box, as in the paper, or its mask (default: box)")  # fmt: skip
    parser.add_argument("--weights", default="imagenet", metavar="NAME",
                        help="imagenet; small: the packaged network, with its trained map of features; or a file (default: imagenet)")  # fmt: skip
    parser.add_argument("--kind", choices=("paste", "alike"), default="paste",
                        help="clips with objects of several videos, or with copies of one whose paths cross "
                        "(default: paste)")  # fmt: skip
    parser.add_argument("--objects", type=partial(_several, count), default=(1, 4), metavar="FROM,TO",
                        help="how many objects are pasted into a clip (default: 1,4)")  # fmt: skip
    parser.add_argument("--copies", type=partial(count, least=0), default=0,
                        help="copies of the first object, with --kind alike; the rest are other objects "
                        "(default: 0, one or two)")  # fmt: skip
    parser.add_argument("--covers", type=float, default=0.5, metavar="CHANCE",
                        help="chance that an object is covered for a while, with --kind alike (default: 0.5)")  # fmt: skip
    parser.add_argument("--suppress", type=float, default=1.0, metavar="IOU",
                        help="leave out proposals whose IoU with a better one is above this (default: 1, none)")  # fmt: skip
    parser.add_argument("--iou-weight", type=float, default=0.3, metavar="LAMBDA", help="lambda of Eq. 1 (default: 0.3)")
    parser.add_argument("--clips", type=count, default=64, help="clips to train on (default: 64)")
    parser.add_argument("--val-clips", type=count, default=40, help="clips to score on (default: 40)")
    parser.add_argument("--val-frames", type=partial(count, least=2), default=8, help="frames of each of these (default: 8)")
    parser.add_argument("--top", type=count, default=50, help="proposals of a frame (default: 50)")
    parser.add_argument("--unroll", type=partial(_several, count), default=(2, 3), metavar="N,..",
                        help="matched frames of a training clip; all variants use the first (default: 2,3)")  # fmt: skip
    parser.add_argument("--steps", type=count, default=300, help="training steps (default: 300)")
    parser.add_argument("--batch", type=count, default=4, help="clips in a step (default: 4)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of Adam (default: 0.001)")
    parser.add_argument("--seeds", type=count, default=5, help="orders of the clips (default: 5)")


def _several(kind: Any, text: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between them, got {text!r}") from None


def _convergence(arguments: argparse.Namespace) -> int:
    from dmm_fast.studies import convergence as study

    result = study.study(_settings(study, arguments))
    print(study.table(result))
    for path in study.write(result, arguments.out):
        print(path)
    return 0


def _matching(arguments: argparse.Namespace) -> int:
    from dmm_fast.studies import matching as study

    result = study.study(_settings(study, arguments), arguments.out)
    print(study.table(result))
    study.draw(result, arguments.out / "matching.svg")
    for name in ("matching.json", "matching.svg"):
        print(arguments.out / name)
    return 0


def _settings(study: Any, arguments: argparse.Namespace) -> Any:
    return study.Settings(**{field.name: getattr(arguments, field.name) for field in fields(study.Settings)})

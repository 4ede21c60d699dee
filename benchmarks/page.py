"""The benchmarks page: every figure of docs/benchmarks.md, measured here and written from what was stored.

python benchmarks/page.py measure [SECTION ...]      measure on this machine, into docs/benchmarks/SECTION.json
python benchmarks/page.py gpu RESULTS.jsonl          the same from a run of gpu_report.py
python benchmarks/page.py write                      docs/benchmarks.md, from the stored files alone
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_tables import machine_of, merged, read_rows  # noqa: E402
from page_text import DATA, PAGE, SECTIONS, page  # noqa: E402

Measured = dict[str, Any]  # "rows", "versions", "notes" and what else belongs to the machine
ROUNDS = 5

GIVEN, LIVE = "dmm_fast, given proposals", "dmm_fast, live"
# Of DAVIS 2016's training split, which no training of the packaged network has seen.
HELD_OUT = ["breakdance-flare", "dog-agility", "motorbike", "rollerblade", "surf"]
SINGLE, SEVERAL = ["bmx-trees", "horsejump-high"], ["schoolgirls", "puma-chair"]  # scored as foreground; by object
PUBLISHED = {"OSVOS": "osvos2016", "RGMP": "rgmp2016", "STM": "stm2016"}  # masks of the first two, as published
WAYS: dict[str, dict[str, Any]] = {
    "given": {}, "live": {}, "detail given": {"preset": "detail"}, "detail live": {"preset": "detail"}, "overlap alone": {"preset": "iou"},
}  # fmt: skip


# ---- the layer, exact assignment, the steps around the layer: CPU time of one thread ----


def measure_layer(args: argparse.Namespace) -> Measured:
    import bench_match

    cases = bench_match.CPU_CASES[: 1 if args.quick else None]
    rows = []
    for case in cases:
        peers = ["Listing 1"] if case.batch == 1 else []
        peers += ["sinkhorn"] if args.quick else ["batched eager", "compiled", "sinkhorn"]
        rows += told(bench_match.measure_cpu(case, peers, args.rounds)[1])
        rows += told(bench_match.measure_prices_cpu(case, args.rounds)[1])
    return {"rows": rows, "versions": versions("torch")}


def measure_assignment(args: argparse.Namespace) -> Measured:
    import bench_assignment

    shapes = list(bench_assignment.SHAPES)[: 1 if args.quick else None]
    kinds = bench_assignment.KINDS[: 1 if args.quick else None]
    rows = [row for shape in shapes for kind in kinds for row in told(bench_assignment.measure(kind, shape, args.rounds)[1])]
    found = versions("torch", "scipy", "torch-linear-assignment")
    notes = [] if "torch-linear-assignment" in found else ["torch-linear-assignment is not installed on this machine."]
    return {"rows": rows, "versions": found, "notes": notes}


def measure_vision(args: argparse.Namespace) -> Measured:
    import bench_vision as vision

    frames = list(vision.FRAMES)[: 1 if args.quick else None]
    cases: list[Callable[[], Any]] = [lambda: vision.mask_iou_case("cpu")]
    if not args.quick:
        cases += [
            lambda share=share, confident=confident, backward=backward: vision.paste_combine_case(
                "cpu", share, confident, backward
            )
            for share in vision.SHARES
            for confident in (True, False)
            for backward in (False, True)
        ]
    for frame in frames:
        cases += [
            lambda frame=frame: vision.paste_masks_case("cpu", frame),
            lambda frame=frame: vision.decode_runs_case("cpu", frame),
        ]
        cases += [lambda frame=frame, kind=kind: vision.upsample_argmax_case("cpu", frame, kind) for kind in vision.CONTENTS]
    rows = [row for case in cases for row in told(vision.measure(case(), "cpu", args.rounds)[1])]
    return {"rows": rows, "versions": versions("torch", "torchvision", "pycocotools")}


def told(rows: list[dict]) -> list[dict]:
    """The rows of a case, reported and without what stands above the table."""
    kept = [{key: row[key] for key in ("case", "us per problem", "peer", "peer us per problem", "ratio")} for row in rows]
    for row in kept:
        print(f"{row['case']}: {row['us per problem']:.2f} us, {row['peer']} {row['ratio']:.2f}x", flush=True)
    return kept


# ---- the segmenter: wall-clock time of this machine as it is ----


def measure_segmenter(args: argparse.Namespace) -> Measured:
    from peers import segmenters

    peers, absent = segmenters(args.peers)
    if args.quick:
        peers = []
    rows = []
    for objects in (1,) if args.quick else (1, 3):
        taking_part = [peer for peer in peers if objects in peer.objects]
        rows += measure_frames(objects, taking_part, rounds=args.rounds, sample=0.1 if args.quick else 1)
    notes = [f"{name}: not measured, {why}." for name, why in absent.items()]
    found = versions("torch", "torchvision", "timm") | {peer.version.split()[0]: peer.version.split()[1] for peer in peers}
    return {"rows": rows, "versions": found, "notes": notes, "machine": used()}


def used() -> dict[str, Any]:
    """What wall-clock time depends on."""
    import torch

    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load at the end": round(os.getloadavg()[0], 1)}


def measure_frames(objects: int, peers: list[Any], **budget: Any) -> list[dict]:
    """A frame of ours and of every peer in turns, of one generated clip that goes to and fro. A turn is several frames where there is time
    for them: the first pays for what another left in the caches. budget: as of `core.compare`."""
    import core
    import torch
    from dmm_fast.model import Proposals
    from dmm_fast.model.masks import mask_boxes

    from dmm_fast import Segmenter
    from dmm_fast.data.synthetic import Scene
    from dmm_fast.proposals.base import encode_runs
    from dmm_fast.proposals.sources import open_proposer

    scene = Scene(3, size=(240, 427), objects=objects, strangers=0, length=(0.25, 0.35), clutter=50)
    clip = []
    for number in range(12):
        masks, scores = (torch.from_numpy(part) for part in scene.proposals(number))
        best = scores.argsort(descending=True)[:50]
        proposals = Proposals(mask_boxes(masks[best]), scores[best], encode_runs(masks[best]))  # as read from a file
        clip.append((*scene.render(number), proposals))

    def steps(session: Any, given: bool, warm: int) -> Callable[[], object]:
        at = 0

        def step() -> object:
            nonlocal at
            at += 1
            place = at % (2 * len(clip) - 2)
            frame, _, proposals = clip[min(place, 2 * len(clip) - 2 - place)]
            return session.step(frame, proposals) if given else session.step(frame)

        session.start(*clip[0][:2])
        for _ in range(warm):
            step()
        return step

    proposer = open_proposer("small")
    functions = {
        (GIVEN, "427x240"): steps(Segmenter(), True, 3),
        (LIVE, "427x240"): steps(Segmenter(proposer=proposer), False, 3),
        ("dmm_fast, overlap alone, given proposals", "no network"): steps(Segmenter("iou"), True, 3),
    }
    for peer in peers:
        print(f"{objects} objects: {peer.name}, {peer.size}, {peer.warm} frames to fill its memory", flush=True)
        functions[peer.name, peer.size] = steps(peer.make(), False, peer.warm)
    ms = {key: 1e3 * seconds for key, seconds in core.medians(core.compare(functions, core.wall_time, **budget)).items()}
    rows = []
    for (name, size), each in ms.items():
        live, given = each / ms[LIVE, "427x240"], each / ms[GIVEN, "427x240"]
        rows.append({"name": name, "input": size, "objects": objects, "ms": each, "live": live, "given": given})
        print(f"{objects} objects: {name}, {size}: {each:.1f} ms, {live:.2f}x of live", flush=True)
    return rows


# ---- accuracy ----


def check_data(folder: Path) -> None:
    """SystemExit where the folder lacks something that is scored."""
    needed = [folder / "davis16-train" / part / name for part in ("JPEGImages", "Annotations") for name in HELD_OUT]
    needed += [folder / "davis16-train" / "proposals" / f"{name}.json" for name in HELD_OUT]
    missing = [str(path) for path in needed if not path.exists()]
    if missing:
        raise SystemExit(
            f"page.py: --data {folder}: {len(missing)} of {len(needed)} things are not there, the first {missing[0]}"
        )


def measure_accuracy(args: argparse.Namespace) -> Measured:
    check_data(args.data)
    videos, clips = args.data / "davis16-train", args.data / "clips"
    rows, speed = [], {}
    with tempfile.TemporaryDirectory(prefix="dmm-page-") as work:
        made = Path(work)
        for way in WAYS:
            names = HELD_OUT[: 1 if args.quick else None]
            scores, summary = segment_and_score(videos, way, names, made, videos / "Annotations", foreground=True)
            rows += [{"set": "held out", "way": f"dmm_fast, {way}", **score} for score in scores]
            speed[way] = summary["fps"]
        several = [name for name in SEVERAL if (clips / "Annotations" / name).is_dir()]
        single = [name for name in SINGLE if (clips / "Annotations_union" / name).is_dir()]
        if args.quick:
            several, single = [], []
        for kind, names, first in (("objects", several, "Annotations"), ("foreground", single, "Annotations_first")):
            if not names:
                continue
            folder = made / f"data {kind}"
            for part, source in (("JPEGImages", "JPEGImages"), ("Annotations", first), ("proposals", "proposals")):
                (folder / part).mkdir(parents=True)
                for name in names:
                    name = f"{name}.json" if part == "proposals" else name
                    (folder / part / name).symlink_to((clips / source / name).resolve())
            truth = clips / ("Annotations_union" if kind == "foreground" else "Annotations")
            for way in WAYS:
                scores, _ = segment_and_score(folder, way, names, made, truth, foreground=kind == "foreground")
                rows += [{"set": kind, "way": f"dmm_fast, {way}", **score} for score in scores]
        for method, results in PUBLISHED.items():
            if single and (clips / "results" / results).is_dir():
                scores = score_of(clips / "Annotations_union", clips / "results" / results, single, foreground=True)
                rows += [{"set": "foreground", "way": method, **score} for score in scores]
    notes = [] if single else ["Published masks of other systems were not in the folder."]
    found = versions("torch", "torchvision", "timm")
    return {"rows": rows, "versions": found, "notes": notes, "machine": used(), "frames/s": speed}


def segment_and_score(
    data: Path, way: str, names: list[str], work: Path, truth: Path, foreground: bool
) -> tuple[list[dict], dict]:
    """Each video's scores, and the run's summary."""
    from dmm_fast.inference.sets import SetJob, segment_set

    out = work / f"{data.name} {way}"
    proposals = "small" if way.endswith("live") else str(data / "proposals")
    summary = segment_set(SetJob(str(data), str(out), proposals=proposals, options=WAYS[way]), names, progress=True)
    assert summary is not None
    if summary["failed"]:
        raise SystemExit(f"page.py: {way}: videos failed: {summary['failed']}")
    return score_of(truth, out, names, foreground), summary


def score_of(truth: Path, out: Path, names: list[str], foreground: bool) -> list[dict]:
    """J and F as DAVIS: inner frames; a mean over the objects of a video."""
    from dmm_fast.evaluation import evaluate

    found = []
    for name in names:
        report = evaluate(truth, out, "davis", sequences=[name], foreground=foreground)
        found.append({"video": name, "objects": len(report.objects), "J": report.summary["J"], "F": report.summary["F"]})
        print(f"{out.name}, {name}: J {found[-1]['J']:.3f}, F {found[-1]['F']:.3f}", flush=True)
    return found


MEASURES: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "layer": measure_layer,
    "assignment": measure_assignment,
    "vision": measure_vision,
    "segmenter": measure_segmenter,
    "accuracy": measure_accuracy,
}


# ---- what is stored ----


def versions(*packages: str) -> dict[str, str]:
    """Those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def store(section: str, stored: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{section}.json").write_text(json.dumps(rounded(stored), indent=1) + "\n")
    print(f"stored {folder / section}.json", flush=True)


def rounded(value: Any) -> Any:
    """Five digits: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def measure(args: argparse.Namespace) -> int:
    """One section in this process; several each in a process of its own, as one leaves its allocator, caches and threads to the next."""
    names = args.sections or [name for name in MEASURES if name != "accuracy" or args.data]
    if "accuracy" in names:
        if not args.data:
            raise SystemExit("page.py: accuracy needs --data FOLDER, with videos and their ground truth")
        check_data(args.data)
    if len(names) > 1:
        options = ["--rounds", str(args.rounds), "--out", str(args.out), *["--quick"] * args.quick]
        options += ["--data", str(args.data)] if args.data else []
        options += [word for name, folder in args.peers.items() for word in ("--peer", f"{name}={folder}")]
        failed = [name for name in names if subprocess.run([sys.executable, __file__, "measure", name, *options]).returncode]
        if failed:
            print(f"page.py: {', '.join(failed)} failed: what was stored of them before is as it was", file=sys.stderr)
        if skipped := [name for name in MEASURES if name not in names and not args.sections]:
            print(f"not measured: {', '.join(skipped)} (needs --data FOLDER)")
        return 1 if failed else 0
    (name,) = names
    import core

    facts = core.machine("cpu")
    found = MEASURES[name](args)
    command = f"python benchmarks/page.py measure {name}" + " --data FOLDER" * (name == "accuracy")
    command += f" --rounds {args.rounds}" * (args.rounds != ROUNDS and name != "accuracy")
    command += "".join(f" --peer {each}=FOLDER" for each in args.peers) * (name == "segmenter")
    stored = {
        "date": datetime.date.today().isoformat(),
        "command": command + " --quick" * args.quick,
        "machine": facts | found.pop("machine", {}),
        **found,
    }
    store(name, stored, args.out)
    return 0


def gpu(args: argparse.Namespace) -> int:
    """The rows of a run of gpu_report.py that the page shows."""
    if not args.results.is_file():
        raise SystemExit(f"page.py: no such file: {args.results}")
    rows = read_rows(args.results)
    facts = machine_of(args.results, rows)
    layers = [row for row in merged(rows) if (row["n"], row["m"], row["n_grad"]) == (5, 50, 40)]
    if not layers:
        raise SystemExit(f"page.py: {args.results}: no rows of the layer: was the run cut off before?")
    kept = ("case", "batch", "backward", "kernel", "call", "peers")
    stored = {
        "date": args.date or "not stored",
        "command": "python benchmarks/gpu_report.py",
        "machine": {key: value for key, value in facts.items() if key not in ("torch", "CUDA", "python")},
        "versions": {key: facts[key] for key in ("torch", "CUDA", "python") if key in facts},
        "layer": [{key: row[key] for key in kept} for row in layers],
        "frames": [
            {key: row[key] for key in ("size", "objects", "proposals", "kind", "dtype", "ms")}
            for row in rows
            if row["table"] == "step"
        ],
        # no stage times another system's frames: such rows come from scripts of their own
        "peers": [{key: row[key] for key in ("name", "size", "objects", "ms")} for row in rows if row["table"] == "peer"],
        "memory": [{key: value for key, value in row.items() if key != "table"} for row in rows if row["table"] == "memory"],
        "notes": args.note,
        "vision": [
            cells_of(line)
            for row in [row for row in rows if row["table"] == "vision"][-1:]  # a later one is of the whole suite again
            for line in row["text"].splitlines()[2:]
        ],
    }
    store("gpu", stored, args.out)
    return 0


def cells_of(line: str) -> dict[str, Any]:
    """A line of the closing table of bench_vision.py."""
    case, ours, peer, its, *_ = (cell.strip() for cell in line.strip().strip("|").split("|"))
    us = [float(text.replace(",", "")) for text in (ours, its)]
    return {"case": case, "us per problem": us[0], "peer": peer, "peer us per problem": us[1], "ratio": us[1] / us[0]}


def write(args: argparse.Namespace) -> int:
    args.page.write_text(page(args.stored))
    print(f"wrote {args.page}")
    return 0


def peer(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if name != "cutie" or not (Path(folder) / "cutie" / "model").is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: must be cutie=FOLDER, a clone of https://github.com/hkchengrex/Cutie")
    return name, Path(folder)


def section(text: str) -> str:
    if text not in MEASURES:
        raise argparse.ArgumentTypeError(f"{text!r}: must be one of {', '.join(MEASURES)}")
    return text


def parser() -> argparse.ArgumentParser:
    how = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser(
        "measure",
        formatter_class=how,
        help="measure on this machine and store",
        description="Measure and store each section with date, command, machine and versions. Nothing else should run on the machine: the\n"
        "segmenter is timed by the clock (the others are CPU time of one thread, or accuracy).",
        epilog="sections:\n" + "\n".join(f"  {name:11} {SECTIONS[name].title}" for name in MEASURES)
        + "\n\nexamples:\n  python benchmarks/page.py measure\n      all that needs no data\n"
        "  python benchmarks/page.py measure --data data --peer cutie=Cutie\n      all: seven minutes on two cores\n"
        "  python benchmarks/page.py measure layer\n      one section: a minute",
    )  # fmt: skip
    one.add_argument("sections", nargs="*", metavar="SECTION", type=section, help="which (default: all)")
    one.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="for accuracy: davis16-train/ and, if there, clips/, each with JPEGImages, Annotations and proposals",
    )  # fmt: skip
    one.add_argument("--peer", type=peer, action="append", default=[], dest="peers", metavar="cutie=FOLDER",
                     help="a clone of Cutie, to be timed beside the segmenter; needs omegaconf")  # fmt: skip
    one.add_argument("--rounds", type=int, default=ROUNDS, help=f"samples of each contestant (default: {ROUNDS})")
    one.add_argument("--quick", action="store_true", help="a few cases: to try this script, not for the page")
    one.add_argument("--out", type=Path, default=DATA, metavar="DIR", help="where to store (default: docs/benchmarks)")
    one.set_defaults(run=measure)
    two = commands.add_parser("gpu", help="store what gpu_report.py measured", description=gpu.__doc__)
    two.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    two.add_argument("--date", help="of the run, which the file does not say")
    two.add_argument("--note", action="append", default=[], help="what a reader must know about the run")
    two.add_argument("--out", type=Path, default=DATA, metavar="DIR", help="where to store (default: docs/benchmarks)")
    two.set_defaults(run=gpu)
    three = commands.add_parser("write", help="write docs/benchmarks.md from what is stored", description=page.__doc__)
    three.add_argument("--stored", type=Path, default=DATA, metavar="DIR", help="what is stored (default: docs/benchmarks)")
    three.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page (default: docs/benchmarks.md)")
    three.set_defaults(run=write)
    return top


def main(words: list[str] | None = None) -> int:
    args = parser().parse_args(words)
    if hasattr(args, "peers"):
        args.peers = dict(args.peers)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())

"""What gpu_report.py measures, each stage in a process of its own that appends rows to results.jsonl.

    python benchmarks/gpu_stages.py STAGE --out DIR [--seconds N] [--quick] [--dry-run]

A row that is there already is not measured again, so a second run goes on where the first was cut off, at the same commit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # core and the suites, also under PYTHONSAFEPATH
from gpu_tables import append_row, check_machine, read_results  # noqa: E402

SIZES = {"240p": (240, 427), "480p": (480, 854), "1080p": (1080, 1920), "4K": (2160, 3840)}


class Run:
    """Where rows go, how much time there is, and what is there already."""

    def __init__(self, out: Path, seconds: float, quick: bool, dry_run: bool):
        self.out, self.quick, self.dry_run = out, quick, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.deadline = time.monotonic() + seconds
        self.rows = read_results(out)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def has(self, **facts: Any) -> bool:
        facts = json.loads(json.dumps(facts))  # tuples as lists, as in the file
        return any(all(row.get(key) == value for key, value in facts.items()) for row in self.rows)

    def write(self, **row: Any) -> None:
        self.rows.append(json.loads(json.dumps(row)))
        append_row(self.out, row)
        print({key: value for key, value in row.items() if key not in ("peers", "skipped", "text")}, flush=True)

    def machine(self) -> None:
        """What the rows belong to."""
        import core

        facts = core.machine(self.device)
        check_machine(self.out, commit=facts["commit"], GPU=facts.get("GPU"))
        if not self.has(table="machine", **facts):
            self.write(table="machine", **facts)


# ---- sanitizer ----


def sanitize(run: Run) -> None:
    """Every kind of kernel once, small; data is made on the CPU, so that little else runs on the GPU."""
    import torch

    import dmm_fast
    from dmm_fast.ops.vision import NO_RUN, bias_clamp

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64).to(dtype).to(run.device)

    shapes = [(3, n, m) for n, m in ((1, 50), (3, 33), (5, 50), (5, 100), (10, 64), (16, 128), (20, 200))]
    calls = [(shape, torch.float32, {}) for shape in [*shapes, (1100, 5, 50), (1100, 10, 50), (1100, 5, 100)]]
    calls += [((3, 5, 50), dtype, {}) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    calls += [((3, 5, 50), torch.float32, dict(n_grad=60, n_proj=20)), ((2, 20, 40), torch.float32, dict(n_grad=30))]
    ragged = dict(num_templates=torch.tensor([0, 2, 5]).to(run.device), num_proposals=torch.tensor([50, 7, 0]).to(run.device))
    calls += [((3, 5, 50), torch.float32, {**ragged, "dykstra": dykstra}) for dykstra in ("reset", "carry")]
    for shape, dtype, options in calls:
        cost, init = random(*shape, dtype=dtype).requires_grad_(), random(*shape, dtype=dtype).requires_grad_()
        x = dmm_fast.match(cost, init, **{"n_grad": 2, "n_proj": 3, **options})
        torch.autograd.grad(x, (cost, init), random(*shape, dtype=dtype))
    for shape, options in (((3, 5, 50), {}), ((3, 16, 128), {}), ((2, 20, 200), {}), ((2, 5, 50), dict(n_grad=2000))):
        for output in ("last", "average"):
            cost = random(*shape).requires_grad_()
            torch.autograd.grad(dmm_fast.match_prices(cost, output=output, **options), cost, random(*shape))
    masks = [(torch.rand(count, 37, 53) < 0.5).to(run.device) for count in (4, 7)]
    dmm_fast.mask_iou(*masks)
    boxes = torch.tensor([[2.0, 3, 30, 31], [-5, -5, 60, 40], [10, 10, 10, 20]]).to(run.device)
    assignment, small = random(2, 3).requires_grad_(), random(3, 28, 28).requires_grad_()
    pasted = dmm_fast.paste_combine(assignment, small, boxes, (37, 53))
    torch.autograd.grad(pasted, (assignment, small), random(*pasted.shape))
    for rows, columns, samples in ((37, 53, 2), (1, 1, 64), (5, 300, 3)):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            given = boxes.to(torch.float64 if dtype == torch.float64 else torch.float32)
            dmm_fast.paste_masks(random(3, 28, 28, dtype=dtype), given, rows, columns, samples)
            dmm_fast.upsample_argmax(random(5, 9, 17, dtype=dtype) - 0.5, torch.arange(5).to(run.device), rows, columns)
            for layout in (torch.contiguous_format, torch.channels_last):
                x = random(2, 16, rows, columns, dtype=dtype).contiguous(memory_format=layout)
                bias_clamp(x, random(16, dtype=dtype), x[:1], 0.0, 6.0)
    places = torch.randint(0, 37 * 53 + 1, (7, 31)).sort(1).values
    padded = torch.where(torch.arange(31) < torch.randint(0, 32, (7, 1)), places, NO_RUN)
    for runs in (places, padded, places.flip(1), torch.randint(-(2**31), NO_RUN, (7, 31))):
        for grid in ((37, 53), (9, 13), (1, 1), (50, 70)):
            dmm_fast.decode_runs(runs.int().to(run.device), 37, 53, *grid)
    problems = [((3, 5, 50), torch.float32), ((3, 50, 33), torch.float64), ((300, 7, 9), torch.bfloat16)]
    problems += [((2, 90, 300), torch.float32), ((1, 2, 9000), torch.float32)]  # the last too wide for shared memory
    for shape, dtype in problems:
        cost = random(*shape, dtype=dtype)
        alone = random(*shape[:2], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for given in (cost, cost.masked_fill(cost > 0.4, torch.inf)):
            dmm_fast.linear_assignment(given, return_duals=True)
            dmm_fast.linear_assignment(given, unmatched_cost=alone)
    dmm_fast.linear_assignment(random(3, 5, 50), **ragged)
    if run.device == "cuda":
        torch.cuda.synchronize()
    print("done")


# ---- whole frames ----


def step_cases(run: Run) -> list[dict[str, Any]]:
    """The most wanted first: graph before eager, given before live proposals."""
    sizes = [("240p", 1), ("240p", 3), ("240p", 10), ("480p", 3), ("1080p", 3), ("4K", 3)]
    if run.quick or run.dry_run:
        sizes = [("240p", 3)] if run.quick else [("240p", 1), ("4K", 3)]
    cases = []
    for kind in ("eager",) if run.dry_run else ("graph", "eager"):
        for size, objects in sizes:
            given = ("soft", "live", "runs", "masks") if objects == 3 else ("soft", "masks")
            given = given[:2] if kind == "eager" and not run.dry_run else given  # all of one speed there: the host's
            cases += [(size, objects, proposals, kind, "float32") for proposals in given]
    if not (run.quick or run.dry_run):
        cases.append(("4K", 3, "soft", "graph", "bfloat16"))  # the one size where it might pay
    names = ("case", "size", "objects", "proposals", "kind", "dtype")
    shrink = 10 if run.dry_run else 1
    return [
        dict(zip(names, (f"step {' '.join(map(str, case))}", [side // shrink for side in SIZES[case[0]]], *case[1:])))
        for case in cases
    ]


def steps(run: Run) -> None:
    """Frames of the packaged network through `Segmenter`'s own step: median, p99, memory grown."""
    missing = [case for case in step_cases(run) if not run.has(table="step", **case)]
    if not missing:
        return
    import torch

    import dmm_fast

    run.machine()
    segmenters: dict[tuple, Any] = {}  # one per dtype, as a captured graph is kept whatever autocast says
    for case in missing:
        if run.late:
            run.write(table="cut", name="step", case=case["case"])
            break
        key = (case["kind"], case["dtype"], case["proposals"] == "live")
        try:
            if key not in segmenters:
                proposer = _detector(run.device) if case["proposals"] == "live" else None
                segmenters[key] = dmm_fast.Segmenter(device=run.device, graph=case["kind"] == "graph", proposer=proposer)
            with torch.autocast(run.device, torch.bfloat16, enabled=case["dtype"] != "float32", cache_enabled=False):
                measured = follow(segmenters[key], case["size"], case["objects"], case["proposals"], run)
        except RuntimeError as error:  # out of memory, or a capture that failed: the others go on
            run.write(table="failed", case=case["case"], error=str(error)[:300])
            continue
        run.write(table="step", **case, **measured)


def follow(segmenter: Any, size: list[int], objects: int, proposals: str, run: Run) -> dict[str, Any]:
    """200 frames, fewer where they would take more than 3 s. Random frames and 50 boxes: the work is the same for all."""
    warm, most, seconds = (1, 2, 1) if run.dry_run else (5, 200, 3)
    frame, masks, given = scene(size, proposals, device=run.device)
    segmenter.start(frame, masks[:: 50 // objects][:objects])
    times: list[float] = []
    before, end = 0, math.inf
    while len(times) < warm + most and time.perf_counter() < end:
        if len(times) == warm:
            before, end = _allocated(run), time.perf_counter() + seconds
        begin = time.perf_counter()
        segmenter.step(frame, None if proposals == "live" else given)  # its masks are on the host: the GPU has finished
        times.append(1e3 * (time.perf_counter() - begin))
    counted = sorted(times[warm:])
    frames = len(counted)
    grown = _allocated(run) - before
    return {"ms": counted[frames // 2], "p99": counted[int(0.99 * (frames - 1))], "frames": frames, "grown": grown}


def scene(size: list[int], kind: str, device: str) -> tuple[Any, Any, Any]:
    """A random frame; 50 rectangles as masks; the same as proposals: "soft" masks, "runs" or the "masks" themselves."""
    import torch
    from dmm_fast.model import Proposals

    from dmm_fast.proposals.base import encode_runs

    height, width = size
    generator = torch.Generator().manual_seed(0)
    frame = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator).to(device)
    masks = torch.zeros((50, height, width), dtype=torch.bool, device=device)
    boxes = torch.tensor([[k * width // 80, k * height // 80] for k in range(50)])
    boxes = torch.cat([boxes, boxes + torch.tensor([width // 4, height // 3])], 1)  # [50, 4] as x0, y0, x1, y1
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist()):
        mask[y0:y1, x0:x1] = True
    scores = torch.rand(50, generator=generator).to(device)
    soft = torch.rand(50, 28, 28, generator=generator).to(device)
    shapes = encode_runs(masks) if kind == "runs" else soft if kind == "soft" else masks
    return frame, masks, Proposals(boxes.float().to(device), scores, shapes)


def videos(run: Run) -> None:
    """Several videos at once in one process, a session, a thread and a stream for each: frames per second, summed."""
    cases = [
        (count, kind) for kind in ("soft", "live") for count in ((1, 2) if run.dry_run else (1, 4) if run.quick else (1, 4, 16))
    ]
    cases = [
        dict(videos=count, proposals=kind) for count, kind in cases if not run.has(table="videos", videos=count, proposals=kind)
    ]
    if not cases:
        return
    import torch

    import dmm_fast

    run.machine()
    size = [side // (10 if run.dry_run else 1) for side in SIZES["240p"]]
    warm, frames = (1, 2) if run.dry_run else (5, 100)
    for case in cases:
        if run.late:
            run.write(table="cut", name="videos", case=f"{case['videos']} videos, {case['proposals']}")
            break
        proposer = _detector(run.device) if case["proposals"] == "live" else None
        first = dmm_fast.Segmenter(device=run.device, graph=not run.dry_run, proposer=proposer)
        sessions = [first, *(first.another() for _ in range(case["videos"] - 1))]
        ready = threading.Barrier(len(sessions) + 1)
        frame, masks, given = scene(size, "soft", device=run.device)

        def follow(session: Any) -> None:
            stream = torch.cuda.Stream() if run.device == "cuda" else None
            with torch.cuda.stream(stream):  # does nothing with None
                session.start(frame, masks[::16][:3])
                for number in range(warm + frames):
                    if number == warm:
                        ready.wait(60)
                    session.step(frame, None if proposer else given)

        try:
            with ThreadPoolExecutor(len(sessions)) as pool:
                tasks = [pool.submit(follow, session) for session in sessions]
                ready.wait(60)
                begin = time.perf_counter()
                for task in tasks:
                    task.result()
                seconds = time.perf_counter() - begin
        except (RuntimeError, threading.BrokenBarrierError) as error:
            run.write(table="failed", case=f"{case['videos']} videos at once", error=repr(error)[:300])
            continue
        run.write(table="videos", **case, size=size, seconds=seconds, frames=frames * len(sessions))


def _allocated(run: Run) -> int:
    import torch

    return torch.cuda.memory_allocated() if run.device == "cuda" else 0


def _detector(device: str, kept: dict[str, Any] = {}) -> Callable:  # noqa: B006  one for the process
    from dmm_fast.proposals.sources import open_proposer

    if device not in kept:
        kept[device] = open_proposer("small", device=device)
    return kept[device]


def live_parts(live: Any, frame: Any, masks: Any, soft: Any, runs: Any) -> dict[str, Callable]:
    """What a live frame is made of, and all of it, for the objects `masks`; `soft` and `runs` are the same 50 proposals."""
    import torch

    net = live.net
    height, width = frame.shape[1:]
    state = net.start(frame, masks, torch.ones(len(masks), dtype=torch.bool, device=frame.device))
    features, candidates = net.encode(frame[None]), net.prepare(soft, state, height, width)
    affinity = net.compare(features, candidates, state)
    assignment = net.match(net.cost(affinity), soft.scores, state.valid)
    logits = net.decide(features, candidates, affinity, assignment, state)[0].logits
    rank = torch.arange(len(masks), device=frame.device)
    return {
        "step": lambda: net.step(frame, soft, state)[0].labels,
        "encode": lambda: net.encode(frame[None]),
        "prepare (paste_masks)": lambda: net.prepare(soft, state, height, width).cover,
        "prepare (decode_runs)": lambda: net.prepare(runs, state, height, width).cover,
        "compare": lambda: net.compare(features, candidates, state).iou,
        "match": lambda: net.match(net.cost(affinity), soft.scores, state.valid),
        "decide": lambda: net.decide(features, candidates, affinity, assignment, state)[0].labels,
        "of it upsample_argmax": lambda: torch.ops.dmm.upsample_argmax(logits, rank, height, width),
        "detector": lambda: live.detector(frame),
        "proposals of its features": lambda: live.propose(frame, features),
        "live": lambda: live(frame, state)[1].labels,
    }  # fmt: skip


def parts(run: Run) -> None:
    """A live frame part by part: kernels alone, as a graph's replay, and as an eager call."""
    names = ("240p",) if run.quick else ("4K",) if run.dry_run else ("240p", "1080p", "4K")
    sizes = [[side // (10 if run.dry_run else 1) for side in SIZES[name]] for name in names]
    missing = [size for size in sizes if not run.has(table="parts", size=size)]
    if not missing:
        return
    import core
    import torch

    import dmm_fast
    from dmm_fast.proposals.detector import packaged_detector
    from dmm_fast.proposals.traceable import ROUNDS

    on_the_cpu(run, core)
    run.machine()
    detector = packaged_detector(device=run.device)
    detector.network.rounds = ROUNDS  # in a dry run too
    live = dmm_fast.Segmenter(device=run.device, graph=False, proposer=detector)._live
    budget = {"rounds": 1, "sample": 0.001} if run.dry_run else {"rounds": 3, "sample": 0.02}
    for size in missing:
        frame, masks, soft = scene(size, "soft", run.device)
        runs = scene(size, "runs", run.device)[2]
        times: dict[str, dict[str, float]] = {}
        with torch.no_grad():
            for name, function in live_parts(live, frame, masks[::16][:3], soft, runs).items():
                if run.late:
                    break
                try:
                    calls = {"call": function, "kernel": core.captured(function)}
                    times[name] = core.medians(core.compare(calls, core.device_time, **budget))
                except RuntimeError as error:  # out of memory, or a capture that failed: the others go on
                    run.write(table="failed", case=f"{name} {size}", error=str(error)[:300])
        if run.late:
            run.write(table="cut", name="parts", case=f"parts {size}")
            break
        run.write(table="parts", size=size, case=f"parts {size}", seconds=times)


def on_the_cpu(run: Run, core: Any) -> None:
    """For a dry run: the same path with the CPU's clock on one thread, and nothing to capture."""
    import torch

    if not run.dry_run:
        return
    core.device_time = core.cold_device_time = core.cpu_time
    core.captured = lambda function, calls=1: lambda: [function() for _ in range(calls)][-1]
    core.peak_memory = lambda function: function().nbytes
    torch.set_num_threads(1)


def pt2(run: Run) -> None:
    """The packaged network compiled ahead of time for this GPU: minutes. A dry run exports TorchScript, which takes seconds."""
    if run.has(table="pt2"):
        return
    import torch

    import dmm_fast
    from dmm_fast.export import Sizes, export, load

    kind, size, frames = ("torchscript", [48, 84], 2) if run.dry_run else ("pt2", SIZES["240p"], 50)
    options = {} if run.dry_run else {"sizes": Sizes(H=size[0], W=size[1]), "masks": "soft"}
    net = dmm_fast.Segmenter(device=run.device, graph=False).net
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        export(kind, net, Path(folder) / "export", progress=print, **options)
        seconds = time.monotonic() - begin
        exported = load(Path(folder) / "export", device=run.device)
        frame, masks, given = scene(size, "soft", device=run.device)
        state = exported.start(frame, masks[::16][:3], torch.ones(3, dtype=torch.bool, device=run.device))
        times = []
        for _ in range(frames + 5):
            begin = time.perf_counter()
            output, state = exported.step(frame, given, state)
            output.labels.cpu()
            times.append(1e3 * (time.perf_counter() - begin))
    run.write(table="pt2", kind=kind, size=size, seconds=seconds, frames=frames, ms=sorted(times[5:])[frames // 2])


# ---- decisions ----


def decisions(run: Run) -> None:
    """Ways to decide 5x50, from a cost on the device to an answer on the device, seconds per problem."""
    batches = [batch for batch in ((1, 64) if run.dry_run else (1, 64, 4096)) if not run.has(table="decisions", batch=batch)]
    if not batches:
        return
    import core
    import numpy as np
    import torch
    from scipy.optimize import linear_sum_assignment

    import dmm_fast

    def scipy(cost: torch.Tensor) -> torch.Tensor:
        host = cost.double().cpu().numpy()
        columns = [linear_sum_assignment(problem)[1] for problem in host]
        return torch.from_numpy(np.stack(columns)).to(cost.device)

    ways: dict[str, Callable] = {
        "scipy, copied": scipy, "hungarian": dmm_fast.hungarian, "match, assign": lambda cost: dmm_fast.assign(dmm_fast.match(cost)),
        "greedy": dmm_fast.greedy, "match_prices": dmm_fast.match_prices,
    }  # fmt: skip
    if importlib.util.find_spec("torch_linear_assignment"):
        from torch_linear_assignment import batch_linear_assignment

        ways["torch-linear-assignment"] = batch_linear_assignment
    timer = core.cpu_time if run.dry_run else core.device_time
    run.machine()
    for batch in batches:
        if run.late:
            break
        cost = torch.rand(batch, 5, 50, generator=torch.Generator().manual_seed(batch)).to(run.device)
        calls = {name: (lambda way=way, cost=cost: way(cost)) for name, way in ways.items()}
        times = core.medians(core.compare(calls, timer, rounds=1 if run.dry_run else 5, sample=0.001 if run.dry_run else 0.02))
        run.write(table="decisions", batch=batch, seconds={name: value / batch for name, value in times.items()})


# ---- the layer ----


def plan(quick: bool) -> Iterator[tuple[str, list, list[str]]]:
    """(name, cases, peers), the most wanted first: the run may end before the plan does."""
    from bench_match import BATCHES, SHAPES, Case

    def cases(shapes, batches, **options):
        return [
            Case(batch, n, m, backward=backward, device="cuda", **options)
            for n, m in shapes
            for batch in batches
            for backward in (False, True)
        ]

    study = dict(n_grad=400, n_proj=50)
    eager = ["Listing 1", "batched eager", "batched eager, graph", "match_prices", "sinkhorn"]
    eager += ["linear assignment", "triton"]
    others = [shape for shape in SHAPES if shape != (5, 50)]
    yield "5x50, 40x5", cases([(5, 50)], BATCHES), eager
    if quick:
        return
    yield "other shapes, 40x5", cases(others, BATCHES), ["batched eager", "sinkhorn", "linear assignment"]
    yield "5x50, 400x50", cases([(5, 50)], BATCHES, **study), []
    yield "torch.compile", cases([(5, 50)], BATCHES), ["compiled", "compiled, graph"]
    yield "Triton, other shapes", cases(others, [1, 4096]), ["triton"]
    yield "study peers", cases([(5, 50)], [1, 64, 4096], **study), ["batched eager", "sinkhorn"]
    yield "study literal", cases([(5, 50)], [1], **study), ["Listing 1"]
    yield "other shapes, 400x50", cases(others, BATCHES, **study), []


def layer(run: Run) -> None:
    """Cases of the layer against its peers until the plan or the time is used up."""
    from dataclasses import replace

    import core
    import torch
    from bench_match import Case, batched, measure_gpu, measure_memory, ours

    on_the_cpu(run, core)
    run.machine()
    for name, cases, peers in plan(run.quick):
        for case in cases:
            if run.dry_run:
                peers = [peer for peer in peers if peer != "triton"]
                case = replace(case, device="cpu", batch=min(case.batch, 4), n_grad=case.n_grad // 20, n_proj=2)
            if run.has(table="match", name=name, case=str(case)):
                continue
            if run.late:
                run.write(table="cut", name=name, case=str(case))
                break
            try:
                row = measure_gpu(case, peers, rounds=1 if run.dry_run else 3)
            except (AssertionError, RuntimeError) as error:  # the row is refused or impossible; the others go on
                run.write(table="failed", case=str(case), error=str(error)[:400])
                continue
            run.write(table="match", name=name, **row)
            if not run.dry_run:
                torch.cuda.empty_cache()
        if not run.has(table="memory"):
            case = Case(4 if run.dry_run else 4096, backward=True, device=run.device)
            run.write(table="memory", **measure_memory(case, {"ours": ours(case), "batched eager": batched(case)}))


STAGES: dict[str, Callable[[Run], None]] = {
    "sanitize": sanitize, "steps": steps, "parts": parts, "videos": videos, "pt2": pt2, "decisions": decisions, "layer": layer,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    STAGES[args.stage](Run(args.out, args.seconds, args.quick, args.dry_run))


if __name__ == "__main__":
    main()

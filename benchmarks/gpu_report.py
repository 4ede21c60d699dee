"""One command for a fresh GPU machine: build, GPU tests, compute-sanitizer, then the tables of docs/performance.md.

    python benchmarks/gpu_report.py [--out DIR] [--minutes 9] [--quick] [--dry-run]

Needs what building needs (torch, nvcc, a C++ compiler, cmake, ninja) and pytest with pytest-benchmark; no network.
Every stage has a time budget and is cut off at its end; whatever was measured until then is in DIR and in the summary.
Files: results.jsonl (one row a line, as measured), performance_gpu.md (the tables), and a log per stage.
``--dry-run`` goes through the tables on the CPU with tiny sizes and builds nothing: it checks this script, no speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # core and bench_match, also under PYTHONSAFEPATH
ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    f"tests/test_{name}.py"
    for name in ("match", "match_triton", "match_prices", "match_prices_triton", "vision", "vision_triton", "graph")
]


# ---- stages, each a process of its own ----


def run(command: list[str], log: Path, seconds: float, **environment: str) -> int | None:
    """Run a command into a log; its exit code, or None where it was cut off after ``seconds``."""
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )  # fmt: skip
        try:
            return process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            output.write(f"\ncut off after {seconds:.0f} s\n".encode())
            return None


def describe(code: int | None, good: str) -> str:
    return (
        "cut off at the end of its budget" if code is None else good if code == 0 else f"FAILED with exit code {code}"
    )


def facts() -> list[str]:
    """The machine, from tools alone."""
    commands = {
        "GPU": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"],
        "compiler": ["nvcc", "--version"],
        "torch": [sys.executable, "-c", "import torch; print(torch.__version__, torch.cuda.get_device_capability())"],
    }
    lines = [f"python     {sys.version.split()[0]} at {sys.executable}"]
    for name, command in commands.items():
        try:
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            lines.append(f"{name:10} {output.splitlines()[-1]}")
        except (OSError, subprocess.CalledProcessError) as error:
            lines.append(f"{name:10} unknown: {error}")
    return lines


def architecture() -> str:
    code = "import torch; print(*torch.cuda.get_device_capability(), sep='')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"gpu_report: torch sees no GPU: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout.strip()


def build(out: Path, seconds: float) -> tuple[str, dict[str, str]]:
    """Install from this folder with CUDA kernels for this GPU alone: (what happened, the environment to use it in).

    Raises SystemExit where that fails: nothing else is worth running then.
    """
    log, begin = out / "build.log", time.monotonic()
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    settings = {"FORCE_CUDA": "1", "DMM_CUDA_ARCHITECTURES": f"{architecture()}-real"}
    environment = {}
    code = run([*install, "-e", "."], log, seconds, **settings)
    if code not in (0, None):  # site-packages may be read-only
        site = ROOT / "build" / "site"
        left = seconds - (time.monotonic() - begin)
        code = run([*install, "--upgrade", "--target", str(site), "."], log, left, **settings)
        environment = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}  # the source folder must not shadow it
    native = ROOT / "build" / "cuda" / "build.log"
    if native.exists():
        with log.open("ab") as output:
            output.write(native.read_bytes())
    result = describe(code, f"CUDA kernels for {settings['DMM_CUDA_ARCHITECTURES']}")
    if code != 0:
        raise SystemExit(f"{log.read_text(errors='replace')[-6000:]}\nbuild      {result}")
    return f"{result} ({time.monotonic() - begin:.0f} s)", environment


def last_lines(log: Path, count: int = 1) -> list[str]:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-count:]


def tests(out: Path, seconds: float, environment: dict[str, str]) -> str:
    log = out / "tests.log"
    command = [sys.executable, "-m", "pytest", *TESTS, "-k", "cuda or triton", "-p", "no:cacheprovider", "--maxfail=30",
               "--tb=short", "-rf"]  # fmt: skip
    code = run(command, log, seconds, **environment)
    if code:
        failed = [line[:160] for line in log.read_text(errors="replace").splitlines() if line.startswith("FAILED")]
        print("\n".join(failed))
    return f"{describe(code, 'passed')}: {' '.join(last_lines(log))[-160:]}"


def sanitizer(out: Path, seconds: float, environment: dict[str, str]) -> str:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "compute-sanitizer was not found"
    log, deadline, verdicts = out / "sanitizer.log", time.monotonic() + seconds, []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, __file__, "--stage", "sanitize"]
        # every tensor in an allocation of its own, so that no overrun lands in a neighbour
        code = run(command, log, deadline - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1", **environment)
        verdicts.append(f"{check} {describe(code, 'clean')}")
    return ", ".join(verdicts)


def sanitize() -> None:
    """Every kind of kernel once, small; data is made on the CPU, so that little else runs on the GPU."""
    import torch

    import dmm_fast

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64).to(dtype).cuda()

    shapes = [(3, n, m) for n, m in ((1, 50), (3, 33), (5, 50), (5, 100), (10, 64), (16, 128), (20, 200))]
    calls = [(shape, torch.float32, {}) for shape in [*shapes, (1100, 5, 50), (1100, 10, 50), (1100, 5, 100)]]
    calls += [((3, 5, 50), dtype, {}) for dtype in (torch.float64, torch.float16, torch.bfloat16)]
    calls += [((3, 5, 50), torch.float32, dict(n_grad=60, n_proj=20)), ((2, 20, 40), torch.float32, dict(n_grad=30))]
    ragged = dict(num_templates=torch.tensor([0, 2, 5]).cuda(), num_proposals=torch.tensor([50, 7, 0]).cuda())
    calls += [((3, 5, 50), torch.float32, {**ragged, "dykstra": dykstra}) for dykstra in ("reset", "carry")]
    for shape, dtype, options in calls:
        cost, init = random(*shape, dtype=dtype).requires_grad_(), random(*shape, dtype=dtype).requires_grad_()
        x = dmm_fast.match(cost, init, **{"n_grad": 2, "n_proj": 3, **options})
        torch.autograd.grad(x, (cost, init), random(*shape, dtype=dtype))
    for shape, options in (((3, 5, 50), {}), ((3, 16, 128), {}), ((2, 20, 200), {}), ((2, 5, 50), dict(n_grad=2000))):
        for output in ("last", "average"):
            cost = random(*shape).requires_grad_()
            torch.autograd.grad(dmm_fast.match_prices(cost, output=output, **options), cost, random(*shape))
    masks = [(torch.rand(count, 37, 53) < 0.5).cuda() for count in (4, 7)]
    dmm_fast.mask_iou(*masks)
    boxes = torch.tensor([[2.0, 3, 30, 31], [-5, -5, 60, 40], [10, 10, 10, 20]]).cuda()
    assignment, small = random(2, 3).requires_grad_(), random(3, 28, 28).requires_grad_()
    pasted = dmm_fast.paste_combine(assignment, small, boxes, (37, 53))
    torch.autograd.grad(pasted, (assignment, small), random(*pasted.shape))
    torch.cuda.synchronize()
    print("done")


# ---- tables ----


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


def tables(out: Path, seconds: float, quick: bool, dry_run: bool) -> None:
    """Measure until the plan or the time is used up; every row is written as it comes."""
    from dataclasses import replace

    import core
    import torch
    from bench_match import Case, batched, measure_gpu, measure_memory, ours

    deadline = time.monotonic() + seconds
    device = "cpu" if dry_run else "cuda"
    if dry_run:  # the same path with the CPU's clock, and nothing to capture
        core.device_time = core.cold_device_time = core.cpu_time
        core.captured = lambda function, calls=1: lambda: [function() for _ in range(calls)][-1]
        core.peak_memory = lambda function: function().nbytes
        torch.set_num_threads(1)

    with (out / "results.jsonl").open("a") as results:

        def write(**row) -> None:
            results.write(json.dumps(row) + "\n")
            results.flush()

        write(table="machine", **core.machine(device))
        first, seen = True, set()
        for name, cases, peers in plan(quick):
            for case in cases:
                if time.monotonic() > deadline:
                    write(table="cut", name=name, case=str(case))
                    break
                if dry_run:
                    peers = [peer for peer in peers if peer != "triton"]
                    case = replace(case, device="cpu", batch=min(case.batch, 8), n_grad=min(case.n_grad, 41), n_proj=2)
                    if (name, case) in seen:
                        continue
                    seen.add((name, case))
                begin = time.monotonic()
                try:
                    row = measure_gpu(case, peers, rounds=3)
                except (AssertionError, RuntimeError) as error:  # the row is refused or impossible; the others go on
                    write(table="failed", case=str(case), error=str(error)[:400])
                    print(f"{case}: FAILED: {str(error)[:200]}")
                    continue
                write(table="match", name=name, seconds=time.monotonic() - begin, **row)
                print(f"{case}: kernel {core.microseconds(row['kernel'])} us, call {core.microseconds(row['call'])} us")
                if not dry_run:
                    torch.cuda.empty_cache()
            if first:
                first = False
                case = Case(8 if dry_run else 4096, backward=True, device=device)
                names = {"ours": ours(case), "batched eager": batched(case)}
                write(table="memory", **measure_memory(case, names))
            render(out)


# ---- Markdown ----


def read_results(out: Path) -> list[dict]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def merged(rows: list[dict]) -> list[dict]:
    """One row per case: peers measured in a later part of the plan join the first."""
    cases: dict[str, dict] = {}
    for row in rows:
        if row["table"] == "match":
            kept = cases.setdefault(row["case"], row)
            kept["peers"].update(row["peers"])
            kept["skipped"].update(row["skipped"])
    return list(cases.values())


def render(out: Path) -> str:
    """The Markdown tables of everything measured so far; also written to performance_gpu.md."""
    import core

    rows = read_results(out)
    machine = next((row for row in rows if row["table"] == "machine"), {})
    match = merged(rows)
    us = core.microseconds
    parts = ["; ".join(f"{key} {value}" for key, value in machine.items() if key != "table") + "."]

    def setting(row: dict) -> str:
        return f"{row['n_grad']}x{row['n_proj']}"

    def both(row: dict) -> dict | None:
        return next((r for r in match if r["backward"] and {**r, **same(row)} == r), None)

    def same(row: dict) -> dict:
        return {key: row[key] for key in ("batch", "n", "m", "n_grad", "n_proj")}

    for name in dict.fromkeys(setting(row) for row in match):
        lines = []
        for row in match:
            if setting(row) != name or row["backward"]:
                continue
            cells = [f"{row['n']}x{row['m']}", f"{row['batch']}"]
            for r in (row, both(row)):
                if r is None:
                    cells += ["-"] * 4
                    continue
                share = f"{r['limit'] / r['kernel']:.0%}" if r["limit"] else "-"
                cells += [us(r["kernel"]), us(r["call"]), us(r["limit"]), share]
            lines.append(cells)
        header = ["n x m", "B", "forward", "call", "limit", "share", "with backward", "call", "limit", "share"]
        parts.append(
            f"Ours at {name}, us: kernels alone (graph replay), whole eager call, predicted limit and its share."
        )
        parts.append(core.table(header, lines))

    peers = list(dict.fromkeys(peer for row in match for peer in row["peers"]))
    for direction in (False, True):
        shown = [row for row in match if row["backward"] == direction and row["peers"]]
        if not shown:
            continue
        names = [peer for peer in peers if any(peer in row["peers"] for row in shown)]
        lines = []
        for row in shown:
            cells = [f"{row['n']}x{row['m']} {setting(row)}", f"{row['batch']}", us(row["call"])]
            for peer in names:
                found = row["peers"].get(peer)
                cells.append(f"{us(found['time'])} ({found['ratio']:,.1f}x)" if found else "-")
            lines.append(cells)
        title = "Forward and backward" if direction else "Forward"
        parts.append(
            f"{title}, us per call; in brackets the ratio to ours in the same run (graphs against ours as a graph)."
        )
        parts.append(core.table(["n x m", "B", "ours", *names], lines))

    reasons = {f"{peer}: {row['case']}: {why}" for row in match for peer, why in row["skipped"].items()
               if "GB" in why or " s" in why and "takes" not in why or "memory" in why}  # fmt: skip
    if reasons:
        parts.append("Not run:\n" + "\n".join(f"- {reason}" for reason in sorted(reasons)))
    for row in rows:
        if row["table"] == "memory":
            sizes = {key: value for key, value in row.items() if isinstance(value, int)}
            cells = [[key, f"{value / 1e6:,.1f}"] for key, value in sizes.items()]
            parts.append(f"Peak memory of {row['case']}, beyond its inputs (outputs: X and the gradient of the cost).")
            parts.append(core.table(["", "MB"], cells))
    failed = [f"- {row['case']}: {row['error']}" for row in rows if row["table"] == "failed"]
    if failed:
        parts.append(f"REFUSED, {len(failed)} cases, the first of them:\n" + "\n".join(failed[:10]))
    cut = [f"- {row['name']}: from {row['case']} on" for row in rows if row["table"] == "cut"]
    if cut:
        parts.append("Cut for time:\n" + "\n".join(cut))
    for row in rows:
        if row["table"] == "vision":
            parts.append("Mask IoU and Eq. 8.\n\n" + row["text"])
    if steps := [row for row in rows if row["table"] == "segmenter"]:
        cells = "| {net} | {size[0]}x{size[1]} | {objects} | {kind} | {dtype} | {ms:.2f} | {fps:.0f} | {grown} B in {frames} |"
        lines = ["| network | frame | objects | | dtype | ms per step | frames/s | memory grown in frames |"]
        lines += ["|---|---|--:|---|---|--:|--:|--:|", *(cells.format(**row) for row in steps)]
        parts.append("The whole step, 50 given proposals, random weights.\n\n" + "\n".join(lines))
    for row in rows:
        if row["table"] == "detector":
            height, width = row["size"]
            parts.append(f"The packaged proposal network, frames of {height}x{width}: {row['ms']:.1f} ms a frame.")
    text = "\n\n".join(parts) + "\n"
    (out / "performance_gpu.md").write_text(text)
    return text


def vision(out: Path, seconds: float, environment: dict[str, str], device: str) -> str:
    """The vision kernels' own suite; its closing table joins the results."""
    log = out / "vision.log"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_vision.py", "-k", device, "--benchmark-only",
               "-p", "no:cacheprovider"]  # fmt: skip
    code = run(command, log, seconds, **environment)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("| ")]
    if lines:
        with (out / "results.jsonl").open("a") as results:
            results.write(json.dumps({"table": "vision", "text": "\n".join(lines)}) + "\n")
    return describe(code, "measured")


def segmenter(out: Path, quick: bool, dry_run: bool) -> None:
    """Steps of whole segmenters, given proposals: eager and as a CUDA graph, float32 and bfloat16; memory over a video; and the
    packaged proposal network.

    Random weights do the same work as trained ones. Times are wall-clock, the GPU waited for after every step.
    """
    import torch

    from dmm_fast.detector import packaged_detector
    from dmm_fast.graph import GraphStep
    from dmm_fast.model import Config, DMMNet, Proposals, inference
    from dmm_fast.model.masks import mask_boxes

    device = "cpu" if dry_run else "cuda"
    configs = {
        "ResNet-50, light": (Config.preset("youtube-vos"), (255, 448)),
        "small (packaged)": (Config.preset("small"), (240, 427)),
    }
    frames, video = (2, 3) if dry_run else (20, 50) if quick else (100, 1000)
    wait = (lambda: None) if dry_run else torch.cuda.synchronize
    for label, (config, size) in configs.items():
        net = inference(DMMNet(config).to(device).eval())
        for objects in (1, 5) if not dry_run else (1,):
            frame = torch.randint(0, 256, (3, *size), dtype=torch.uint8, device=device)
            masks = torch.zeros((50, *size), dtype=torch.bool, device=device)
            for k, mask in enumerate(masks):
                mask[3 * k : 3 * k + 60, 6 * k : 6 * k + 90] = True
            proposals = Proposals(mask_boxes(masks), torch.rand(50, device=device), masks)
            valid = torch.ones(objects, dtype=torch.bool, device=device)
            for dtype in (torch.float32, torch.bfloat16):
                for kind in ("eager",) if dry_run else ("eager", "graph"):
                    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False):
                        step = net.step if kind == "eager" else GraphStep(net, 50)
                        state = net.start(frame, masks[:objects], valid)
                        times = []
                        for _ in range(frames + 5):
                            begin = time.perf_counter()
                            _, state = step(frame, proposals, state)
                            wait()
                            times.append(time.perf_counter() - begin)
                        before = 0 if dry_run else torch.cuda.memory_allocated()
                        for _ in range(video):
                            _, state = step(frame, proposals, state)
                        wait()
                        grown = 0 if dry_run else torch.cuda.memory_allocated() - before
                    milliseconds = sorted(times[5:])[frames // 2] * 1e3
                    row = {"table": "segmenter", "net": label, "size": size, "objects": objects, "kind": kind,
                           "dtype": str(dtype)[6:], "ms": milliseconds, "fps": 1e3 / milliseconds,
                           "frames": video, "grown": grown}  # fmt: skip
                    with (out / "results.jsonl").open("a") as results:
                        results.write(json.dumps(row) + "\n")
                    print(row, flush=True)

    detector, times = packaged_detector(device=device), []
    frame = torch.randint(0, 256, (3, 240, 427), dtype=torch.uint8, device=device)
    for _ in range(frames + 5):
        begin = time.perf_counter()
        detector(frame)
        wait()
        times.append(time.perf_counter() - begin)
    row = {"table": "detector", "size": (240, 427), "ms": sorted(times[5:])[frames // 2] * 1e3}
    with (out / "results.jsonl").open("a") as results:
        results.write(json.dumps(row) + "\n")
    print(row, flush=True)


# ---- the whole ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_report", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9, help="the time for everything (default 9)")
    parser.add_argument("--quick", action="store_true", help="only the 5x50, 40x5 tables")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny tables on the CPU, no build: a check of this script"
    )
    parser.add_argument("--stage", choices=("tables", "sanitize", "segmenter"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=300, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage == "sanitize":
        return sanitize()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage == "segmenter":
        return segmenter(args.out, args.quick, args.dry_run)
    if args.stage == "tables":
        return tables(args.out, args.seconds, args.quick, args.dry_run)

    deadline = time.monotonic() + args.minutes * 60
    for name in ("results.jsonl", "build.log", "tests.log", "sanitizer.log", "tables.log", "vision.log", "segmenter.log"):
        (args.out / name).unlink(missing_ok=True)

    def left(share: float = 1.0) -> float:
        """Seconds left, or that share of the whole if it is less; ten seconds are kept for the summary."""
        return min(deadline - time.monotonic() - 10, share * args.minutes * 60)

    summary = facts()
    environment: dict[str, str] = {}

    def report(stage: str, result: str) -> None:
        summary.append(f"{stage:10} {result}")
        print(summary[-1], flush=True)

    print("\n".join(summary), flush=True)
    if not args.dry_run:
        result, environment = build(args.out, left(0.35))
        report("build", result)
        report("tests", tests(args.out, left(0.25), environment))
        report("sanitizer", sanitizer(args.out, left(0.15), environment))
    options = ["--out", str(args.out)] + ["--quick"] * args.quick + ["--dry-run"] * args.dry_run
    code = run(
        [sys.executable, __file__, "--stage", "segmenter", *options], args.out / "segmenter.log", left(0.12), **environment
    )
    report("segmenter", describe(code, "measured"))
    command = [sys.executable, __file__, "--stage", "tables", *options]
    vision_seconds = 0.07 * args.minutes * 60
    seconds = left() - vision_seconds
    code = run([*command, "--seconds", f"{seconds - 10:.0f}"], args.out / "tables.log", seconds, **environment)
    report("tables", describe(code, "measured"))
    if code:
        print("\n".join(last_lines(args.out / "tables.log", 15)))
    report("vision", vision(args.out, left(), environment, "cpu" if args.dry_run else "cuda"))

    if environment:
        sys.path.insert(0, environment["PYTHONPATH"])
    print(f"\n{render(args.out)}\n" + "\n".join(summary), flush=True)


if __name__ == "__main__":
    main()

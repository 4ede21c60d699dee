"""One command for a fresh GPU machine: build, GPU tests, compute-sanitizer, then the tables of docs/performance.md.

    python benchmarks/gpu_report.py [--out DIR] [--minutes 8] [--wheel FILE] [--quick] [--dry-run]

Needs torch and pytest with pytest-benchmark, and to build also nvcc, a C++ compiler, cmake and ninja; no network. With
--wheel it installs a wheel that was built elsewhere for this GPU.

Every stage has a time limit; the limits add up to --minutes. Called again with the same DIR, at the same commit, it measures the rows
that are missing there, and repeats only the tests and checks that have not passed with the same sources. DIR gets results.jsonl
(one row a line), performance_gpu.md (the tables) and the logs. It prints its tables however it ends. ``--dry-run`` goes
through all stages on the CPU with tiny sizes and builds nothing: it checks this script, no speed.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from gpu_tables import append_row, check_machine, read_results, render  # noqa: E402  they import nothing that must be installed
from text import commit  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STAGES = ROOT / "benchmarks" / "gpu_stages.py"
# A stage may take its share of the time that is left for it and those after it.
SHARES = {"tests": 4, "steps": 5, "parts": 1, "videos": 1, "sanitizer": 3, "decisions": 1, "layer": 6, "vision": 2}
SUMMARY, LEAST = 5, 10  # seconds kept for the tables, and below which no stage is worth starting: imports take some


class Report:
    """The run: its folder, its clock, what it started and what it has to say."""

    def __init__(self, args: argparse.Namespace):
        self.quick, self.dry_run, self.wheel = args.quick, args.dry_run, args.wheel
        self.out = (args.out or ROOT / "out" / ("gpu_report_dry" if args.dry_run else "gpu_report")).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + args.minutes * 60 - SUMMARY
        self.sources = sources() + " dry run" * args.dry_run  # whose checks prove nothing for a real one
        self.environment: dict[str, str] = {"OMP_NUM_THREADS": "1"} if args.dry_run else {}
        self.summary: list[str] = []
        self.running: set[subprocess.Popen] = set()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, stage: str, result: str) -> None:
        self.summary.append(f"{stage:10} {result}")
        print(self.summary[-1], flush=True)

    def passed(self, name: str) -> bool:
        wanted = {"table": "stage", "name": name, "sources": self.sources}
        return any(wanted.items() <= row.items() for row in read_results(self.out))

    def note_passed(self, name: str) -> None:
        append_row(self.out, {"table": "stage", "name": name, "sources": self.sources})

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment, **environment},
            )  # fmt: skip
        self.running.add(process)
        return process

    def wait(self, process: subprocess.Popen, log: Path, seconds: float) -> int | None:
        """Its exit code, or None where it was cut off after ``seconds``."""
        try:
            code = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            self.stop(process)
            code = None
            with log.open("ab") as output:
                output.write(f"\ncut off after {seconds:.0f} s\n".encode())
        self.running.discard(process)
        return code

    def run(self, command: list[str], log: Path, seconds: float, **environment: str) -> int | None:
        return self.wait(self.start(command, log, **environment), log, seconds)

    def stop(self, process: subprocess.Popen) -> None:
        """End a command with everything it started."""
        try:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
        except ProcessLookupError:
            pass
        process.wait()

    def stage(self, name: str, seconds: float) -> list[str]:
        """The command of a stage of gpu_stages.py, which should end by itself a little before it is cut off."""
        command = [sys.executable, str(STAGES), name, "--out", str(self.out), "--seconds", f"{max(seconds - 5, 1):.0f}"]
        return command + ["--quick"] * self.quick + ["--dry-run"] * self.dry_run


def describe(code: int | None, good: str, log: Path) -> str:
    """A command's result in a line, with the end of its log where it failed."""
    if code is None:
        return "cut off at its time limit"
    return good if code == 0 else f"FAILED with exit code {code}\n" + "\n".join(lines_of(log)[-12:])


def lines_of(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []


def sources() -> str:
    """A digest of the sources: also where there is no commit to name, or changes beside it."""
    digest = hashlib.sha256()
    paths = [ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", "setup.py")]
    for folder in ("csrc", "dmm_fast", "kernels", "model", "tests", "benchmarks"):
        paths += [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")]
    for path in paths:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# ---- the machine and the build ----


def describe_machine(report: Report) -> str:
    """Report the machine, from tools alone; returns the GPU's architecture, "" where torch sees none."""
    code = "import torch; print(torch.__version__, *torch.cuda.get_device_capability())"
    if report.dry_run:  # which has no use for the GPU, and importing torch takes seconds
        code = "import importlib.metadata; print(importlib.metadata.version('torch'))"
    commands = {
        "GPU": ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"],
        "compiler": ["nvcc", "--version"],
        "torch": [sys.executable, "-c", code],
    }
    report.say("python", f"{sys.version.split()[0]} at {sys.executable}; sources {report.sources}")
    output = ""
    for name, command in commands.items():
        try:
            result = subprocess.run(command, capture_output=True, text=True)
            output = "" if result.returncode else result.stdout.strip().splitlines()[-1]
            report.say(name, output or f"unknown: {(result.stderr or result.stdout).strip().splitlines()[-1]}")
        except OSError as error:
            output = ""
            report.say(name, f"unknown: {error}")
    return "".join(output.split()[1:])


def install(report: Report, architecture: str) -> None:
    """Install the package, from a wheel or built for this GPU alone. SystemExit where that fails: nothing else can run."""
    log, begin, limit = report.out / "build.log", time.monotonic(), 0.35 * report.left()
    works = "import dmm_fast; assert dmm_fast.build_info()['backends']['cuda'] == 'native', dmm_fast.build_info()"
    check = [sys.executable, "-c", works]
    if not report.wheel and report.passed("build") and report.run(check, log, 60, PYTHONSAFEPATH="1") == 0:
        return report.say("build", "done before")
    if not architecture:
        raise SystemExit("gpu_report: torch sees no GPU; --dry-run needs none")
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    site = ROOT / "build" / "site"
    elsewhere = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}  # so that the source folder does not shadow it
    settings = {} if report.wheel else {"FORCE_CUDA": "1", "DMM_CUDA_ARCHITECTURES": f"{architecture}-real"}
    if report.wheel:
        code = report.run([*pip, "--upgrade", "--target", str(site), str(report.wheel.resolve())], log, limit)
        report.environment = elsewhere
    else:
        code = report.run([*pip, "--no-build-isolation", "-e", "."], log, limit, **settings)
        if code not in (0, None):  # site-packages may be read-only
            left = limit - (time.monotonic() - begin)
            code = report.run([*pip, "--no-build-isolation", "--upgrade", "--target", str(site), "."], log, left, **settings)
            report.environment = elsewhere
    built = report.wheel.name if report.wheel else f"CUDA kernels for {settings['DMM_CUDA_ARCHITECTURES']}"
    if code != 0:
        raise SystemExit(f"build      {describe(code, built, log)}")
    if report.run(check, log, 60, PYTHONSAFEPATH="1") != 0:  # such as a wheel without CUDA kernels
        raise SystemExit(f"build      FAILED: {built} has no CUDA kernels that run here\n" + "\n".join(lines_of(log)[-3:]))
    if not report.environment:
        report.note_passed("build")
    report.say("build", f"{built} ({time.monotonic() - begin:.0f} s)")


# ---- tests and checks ----


def test_files() -> list[Path]:
    """Test files with cases for a GPU, the longest first."""
    wanted = re.compile(r"cuda|triton|mark\.gpu")
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if wanted.search(path.read_text())]
    return sorted(found, key=lambda path: -path.stat().st_size)


def tests(report: Report, seconds: float) -> None:
    """Each file in a process of its own with a time limit of its own, several at a time."""
    files = test_files()[-1:] if report.dry_run else test_files()
    workers = os.cpu_count() or 2
    deadline, limit = time.monotonic() + seconds, seconds / math.ceil(len(files) / workers)

    def one(path: Path) -> tuple[str, str]:
        name = str(path.relative_to(ROOT))
        if report.passed(name):
            return name, "passed before"
        left = min(limit, deadline - time.monotonic())
        if left < 5:
            return name, "not reached"
        log = report.out / "tests" / f"{name.removeprefix('tests/').replace('/', '.')}.log"
        log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", name, "-m", "gpu", "-p", "no:cacheprovider", "--maxfail=30", "--tb=short"]
        command += ["-rf", *["--collect-only"] * report.dry_run]
        code = report.run(command, log, left, OMP_NUM_THREADS="1")
        lines = lines_of(log)
        if code in (0, 5):  # 5: no test of it needs a GPU
            report.note_passed(name)
            return name, f"{'collected' if report.dry_run else 'passed'}: {lines[-1][-120:]}"
        failed = [line[:160] for line in lines if line.startswith(("FAILED", "ERROR"))]
        return name, "\n".join([f"{'cut off at' if code is None else 'FAILED:'} {lines[-1 - (code is None)][-120:]}", *failed])

    pool = ThreadPoolExecutor(workers)
    try:
        for name, result in pool.map(one, files):
            report.say("tests", f"{name}: {result}")
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def sanitizer(report: Report, seconds: float) -> None:
    """Every kind of kernel once under each check; a dry run calls them without."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not report.dry_run and not Path(tool).exists():
        return report.say("sanitizer", "compute-sanitizer was not found")
    log, deadline = report.out / "sanitizer.log", time.monotonic() + seconds
    for check in ("memcheck", "racecheck")[: 1 if report.dry_run else 2]:
        if report.passed(check):
            report.say("sanitizer", f"{check} passed before")
            continue
        prefix = [] if report.dry_run else [tool, "--tool", check, "--error-exitcode", "9"]
        # every tensor in an allocation of its own, so that no overrun lands in a neighbour
        left, whole = deadline - time.monotonic(), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        code = report.run([*prefix, *report.stage("sanitize", left)], log, left, **whole)
        if code == 0:
            report.note_passed(check)
        report.say("sanitizer", f"{check} {describe(code, 'skipped: its kernels run' if report.dry_run else 'clean', log)}")


def vision(report: Report, seconds: float) -> None:
    """The vision kernels' own suite; its closing table joins the results."""
    if any(row["table"] == "vision" and row["complete"] for row in read_results(report.out)):
        return report.say("vision", "measured before")
    log = report.out / "vision.log"
    log.unlink(missing_ok=True)
    cases = "cpu and mask_iou" if report.dry_run else "cuda"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_vision.py", "-k", cases, "--benchmark-only"]
    code = report.run([*command, "-p", "no:cacheprovider"], log, seconds)
    lines = [line for line in lines_of(log) if line.startswith("| ")]
    if lines:
        append_row(report.out, {"table": "vision", "complete": code == 0, "text": "\n".join(lines)})
    report.say("vision", describe(code, "measured", log))


# ---- the whole ----


def measure(report: Report) -> None:
    """All stages in turn; `.pt2` compiles beside them, as it takes minutes on the CPU."""
    architecture = describe_machine(report)
    if not report.dry_run:
        install(report, architecture)
    log = report.out / "pt2.log"
    compiling = None if report.quick else report.start(["nice", *report.stage("pt2", report.left())], log)
    special = {"tests": tests, "sanitizer": sanitizer, "vision": vision}
    to_come = sum(SHARES.values())
    for name, share in SHARES.items():
        left = report.left()
        seconds = min(max(left * share / to_come, LEAST), left)
        to_come -= share
        if left < LEAST:
            report.say(name, "not reached")
        elif name in special:
            special[name](report, seconds)
        else:
            code = report.run(report.stage(name, seconds), report.out / f"{name}.log", seconds)
            report.say(name, describe(code, "done", report.out / f"{name}.log"))
    if compiling:
        report.say("pt2", describe(report.wait(compiling, log, report.left()), "done", log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the results (default out/gpu_report)")
    parser.add_argument("--minutes", type=float, default=8, help="the time for everything (default 8)")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="install this wheel in place of building")
    parser.add_argument("--quick", action="store_true", help="240p and the 5x50, 40x5 tables alone, no .pt2")
    parser.add_argument("--dry-run", action="store_true", help="tiny tables on the CPU, no build: a check of this script")
    args = parser.parse_args()
    if args.wheel and not args.wheel.is_file():
        parser.error(f"--wheel: no such file: {args.wheel}")
    report = Report(args)
    check_machine(report.out, commit=commit())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_report: terminated"))
    try:
        measure(report)
    finally:
        for process in list(report.running):
            report.stop(process)
        print(f"\n{render(report.out)}\n" + "\n".join(report.summary), flush=True)


if __name__ == "__main__":
    main()

"""One command for a fresh GPU machine: build, GPU tests, compute-sanitizer, then the tables of docs/performance.md.

    python benchmarks/gpu_report.py [--out DIR] [--minutes 8] [--wheel FILE] [--quick] [--dry-run]

Needs what building needs (torch, nvcc, a C++ compiler, cmake, ninja) and pytest with pytest-benchmark; no network. With
--wheel a wheel that was built elsewhere for this GPU is installed in place of building.

Every stage has a time budget and is cut off at its end; whatever was measured until then is in DIR and in the summary.
Called again with the same DIR, the command does what is missing there: rows that were not measured, and at the same
commit the tests and checks that have not passed. DIR holds results.jsonl (one row a line), performance_gpu.md (the tables)
and a log per stage. ``--dry-run`` goes through everything on the CPU with tiny sizes and builds nothing: it checks this
script, no speed.
"""

from __future__ import annotations

import argparse
import json
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
from gpu_tables import read_results, render  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STAGES = ROOT / "benchmarks" / "gpu_stages.py"
# What each stage may take of the time that is left for it and those after it.
SHARES = {"tests": 4, "steps": 4, "sanitizer": 3, "decisions": 1, "layer": 7, "vision": 1.5}
KEPT, LEAST = 10, 15  # seconds for the summary, and for a stage (imports alone take some)


class Report:
    """The run: its folder, its clock, its environment, and what has been said."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.quick, self.dry_run = args.out.resolve(), args.quick, args.dry_run
        self.out.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + args.minutes * 60 - KEPT
        self.environment: dict[str, str] = {}
        self.commit = _commit()
        self.summary: list[str] = []

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, stage: str, result: str) -> None:
        self.summary.append(f"{stage:10} {result}")
        print(self.summary[-1], flush=True)

    def passed(self, name: str) -> bool:
        facts = {"table": "stage", "name": name, "commit": self.commit}
        return any(facts.items() <= row.items() for row in read_results(self.out) if row["table"] == "stage")

    def note_passed(self, name: str) -> None:
        with (self.out / "results.jsonl").open("a") as results:
            results.write(json.dumps({"table": "stage", "name": name, "commit": self.commit}) + "\n")

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen:
        with log.open("ab") as output:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            return subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment, **environment},
            )  # fmt: skip

    def run(self, command: list[str], log: Path, seconds: float, **environment: str) -> int | None:
        """A command's exit code, or None where it was cut off after ``seconds``."""
        return wait(self.start(command, log, **environment), log, seconds)

    def stage(self, name: str, seconds: float) -> str:
        """A stage of gpu_stages.py, cut off a little after it should have ended by itself."""
        command = [sys.executable, str(STAGES), name, "--out", str(self.out), "--seconds", f"{max(seconds - 5, 1):.0f}"]
        command += ["--quick"] * self.quick + ["--dry-run"] * self.dry_run
        log = self.out / f"{name}.log"
        code = self.run(command, log, seconds)
        return describe(code, "measured") + ("" if not code else "\n" + "\n".join(last_lines(log, 12)))


def wait(process: subprocess.Popen, log: Path, seconds: float) -> int | None:
    try:
        return process.wait(max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with log.open("ab") as output:
            output.write(f"\ncut off after {seconds:.0f} s\n".encode())
        return None


def describe(code: int | None, good: str) -> str:
    return "cut off at the end of its budget" if code is None else good if code == 0 else f"FAILED with exit code {code}"


def last_lines(log: Path, count: int = 1) -> list[str]:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-count:]


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"


# ---- the machine and the build ----


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


def install(report: Report, wheel: Path | None) -> None:
    """Put the package here, from a wheel or built for this GPU alone. SystemExit where that fails: nothing else can run."""
    log, begin, limit = report.out / "build.log", time.monotonic(), 0.35 * report.left()
    if report.passed("build") and wheel is None and report.run([sys.executable, "-c", "import dmm_fast"], log, 60) == 0:
        return report.say("build", "done before")
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    site = ROOT / "build" / "site"
    elsewhere = {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}  # the source folder must not shadow it
    settings = {} if wheel else {"FORCE_CUDA": "1", "DMM_CUDA_ARCHITECTURES": f"{architecture()}-real"}
    if wheel:
        code = report.run([*pip, "--upgrade", "--target", str(site), str(wheel.resolve())], log, limit)
        report.environment = elsewhere
    else:
        code = report.run([*pip, "--no-build-isolation", "-e", "."], log, limit, **settings)
        if code not in (0, None):  # site-packages may be read-only
            left = limit - (time.monotonic() - begin)
            code = report.run([*pip, "--no-build-isolation", "--upgrade", "--target", str(site), "."], log, left, **settings)
            report.environment = elsewhere
    built = wheel.name if wheel else f"CUDA kernels for {settings['DMM_CUDA_ARCHITECTURES']}"
    if code != 0:
        raise SystemExit(f"{log.read_text(errors='replace')[-6000:]}\nbuild      {describe(code, built)}")
    if not wheel and not report.environment:
        report.note_passed("build")
    report.say("build", f"{built} ({time.monotonic() - begin:.0f} s)")


# ---- tests and checks ----


def test_files() -> list[Path]:
    """Test files with cases for a GPU, the longest first."""
    wanted = re.compile(r"cuda|triton|mark\.gpu")
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if wanted.search(path.read_text())]
    return sorted(found, key=lambda path: -path.stat().st_size)


def tests(report: Report, seconds: float) -> None:
    """Each file in a process of its own, several at a time."""
    deadline = time.monotonic() + seconds

    def one(path: Path) -> tuple[str, str]:
        name = str(path.relative_to(ROOT))
        if report.passed(name):
            return name, "passed before"
        left = deadline - time.monotonic()
        if left < 5:
            return name, "not reached"
        log = report.out / f"{path.stem}.log"
        log.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            name,
            "-m",
            "gpu",
            "-p",
            "no:cacheprovider",
            "--maxfail=30",
            "--tb=short",
            "-rf",
        ]
        code = report.run(command, log, left)
        if code in (0, 5):  # 5: no test of it needs a GPU
            report.note_passed(name)
        failed = [line[:160] for line in log.read_text(errors="replace").splitlines() if line.startswith("FAILED")]
        return name, "\n".join(
            [f"{describe(code or 0 if code == 5 else code, 'passed')}: {' '.join(last_lines(log))[-120:]}", *failed]
        )

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        for name, result in pool.map(one, test_files()):
            report.say("tests", f"{name}: {result}")


def sanitizer(report: Report, seconds: float) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return report.say("sanitizer", "compute-sanitizer was not found")
    log, deadline = report.out / "sanitizer.log", time.monotonic() + seconds
    for check in ("memcheck", "racecheck"):
        if report.passed(check):
            report.say("sanitizer", f"{check} clean before")
            continue
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            str(STAGES),
            "sanitize",
            "--out",
            str(report.out),
        ]
        # every tensor in an allocation of its own, so that no overrun lands in a neighbour
        code = report.run(command, log, deadline - time.monotonic(), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if code == 0:
            report.note_passed(check)
        report.say("sanitizer", f"{check} {describe(code, 'clean')}")


def vision(report: Report, seconds: float) -> None:
    """The vision kernels' own suite; its closing table joins the results."""
    if any(row["table"] == "vision" for row in read_results(report.out)):
        return report.say("vision", "measured before")
    log = report.out / "vision.log"
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_vision.py", "-k", "cpu" if report.dry_run else "cuda",
               "--benchmark-only", "-p", "no:cacheprovider"]  # fmt: skip
    code = report.run(command, log, seconds)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("| ")]
    if lines:
        with (report.out / "results.jsonl").open("a") as results:
            results.write(json.dumps({"table": "vision", "text": "\n".join(lines)}) + "\n")
    report.say("vision", describe(code, "measured"))


# ---- the whole ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_report", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8, help="the time for everything (default 8)")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="install this wheel in place of building")
    parser.add_argument("--quick", action="store_true", help="240p and the 5x50, 40x5 tables alone")
    parser.add_argument("--dry-run", action="store_true", help="tiny tables on the CPU, no build: a check of this script")
    report = Report(parser.parse_args())
    wheel = parser.parse_args().wheel

    for line in facts():
        report.say(*line.split(None, 1))
    shares = dict(SHARES)
    compiling = None
    if not report.dry_run:
        install(report, wheel)
        command = [sys.executable, str(STAGES), "pt2", "--out", str(report.out)]
        compiling = report.start(command, report.out / "pt2.log")  # minutes on the CPU, beside everything else
    else:
        del shares["tests"], shares["sanitizer"], shares["vision"]
    for name in list(shares):
        seconds = report.left() * shares[name] / sum(shares.values())  # what a stage leaves goes to those after it
        seconds = min(max(seconds, LEAST), report.left())
        del shares[name]
        if name in ("tests", "sanitizer", "vision"):
            {"tests": tests, "sanitizer": sanitizer, "vision": vision}[name](report, seconds)
        else:
            report.say(name, report.stage(name, seconds))
    if compiling is not None:
        report.say("pt2", describe(wait(compiling, report.out / "pt2.log", report.left()), "measured"))
    print(f"\n{render(report.out)}\n" + "\n".join(report.summary), flush=True)


if __name__ == "__main__":
    main()

"""Compiles the native sources against the oldest torch that pyproject.toml allows: ``make oldest``.

Only the headers of that torch are needed. They are fetched once, with pip, into build/.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"


def oldest() -> str:
    """The lower bound of torch, as in "2.11"."""
    return re.search(r'^dependencies = .*"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)


def headers(version: str) -> Path:
    """The folder of a torch package that holds its headers, and nothing else."""
    folder = BUILD / f"torch-{version}"
    if not (folder / "torch" / "include").exists():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, f"torch=={version}.*"]
            if subprocess.run(command).returncode:
                raise SystemExit(f"make oldest: torch {version} could not be fetched with: {shlex.join(command)}")
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                wheel.extractall(unpacked, [name for name in wheel.namelist() if name.startswith("torch/include/")])
            unpacked.rename(folder)
    return folder / "torch"


def commands(torch: Path, build: Path) -> list[tuple[str, list[str]]]:
    """(source, command) of everything that the build compiles, checked only: no machine code is made."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with_cuda = Path(nvcc).exists()
    if not with_cuda:
        print("make oldest: no nvcc here, the CUDA sources are left out")
    configure = ["cmake", "-S", ROOT, "-B", build, f"-DTORCH_DIR={torch}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
                 f"-DDMM_CUDA={'ON' if with_cuda else 'OFF'}"]  # fmt: skip
    if with_cuda:
        configure += [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DDMM_CUDA_ARCHITECTURES=80-virtual"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    found = []
    for entry in json.loads((build / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        if entry["file"].endswith(".cu"):
            output = words.index("-o")
            words[output : output + 2] = ["-o", f"{build}/{Path(entry['file']).stem}.ii"]
            words = ["--cuda" if word == "-c" else word for word in words if word != "-Xptxas=-v"]
        else:
            words.append("-fsyntax-only")
        found.append((os.path.relpath(entry["file"], ROOT), words))
    return found


def main() -> int:
    version = oldest()
    torch = headers(version)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # pip's cmake
    with tempfile.TemporaryDirectory() as build, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = commands(torch, Path(build))

        def compile(job: tuple[str, list[str]]) -> str:
            result = subprocess.run(job[1], cwd=build, capture_output=True, text=True)
            return f"{job[0]}:\n{result.stdout}{result.stderr}" if result.returncode else ""

        failures = [text for text in pool.map(compile, jobs) if text]
    print("\n".join(failures) or f"{len(jobs)} sources compile with the headers of torch {version}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

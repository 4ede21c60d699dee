"""The wheel in dist/ with every torch it supports: ``make matrix``.

For each torch, in an environment of its own that is removed afterwards: the wheel with nothing but what it requires, what importing it
takes beyond torch, and the layer; then the segmenter's packages too, the segmenter and ``dmm-fast doctor``. Prints a table. A torch that
cannot be installed is reported and passes; anything else that fails does not. Some minutes and 5 GB of packages for each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from zipfile import Path as ZipPath

ROOT = Path(__file__).resolve().parent.parent
TORCH = ("2.11.*", "2.12.*", "2.13.0+cpu", "2.14.*", "2.15.*")
COLUMNS = ("torch", "import", "layer", "programs", "segment", "live", "doctor")
LIMIT = 0.3  # seconds of CPU time that importing dmm_fast may take beyond torch


class Environment:
    """A virtual environment, without the variables that would show it this source tree."""

    def __init__(self, folder: Path):
        self.folder, self.python = folder, folder / "bin" / "python"
        folder.parent.mkdir(parents=True, exist_ok=True)
        hidden = ("PYTHONPATH", "VIRTUAL_ENV")
        self.variables = {name: value for name, value in os.environ.items() if name not in hidden}
        self.run("uv", "venv", "--quiet", "--clear", "--python", sys.executable, folder)

    def run(self, *command: object) -> str:
        done = subprocess.run(
            [str(word) for word in command], cwd=self.folder.parent, env=self.variables, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError((done.stderr + done.stdout).strip())
        return done.stdout + done.stderr

    def install(self, *packages: str) -> None:
        self.run("uv", "pip", "install", "--quiet", "--python", self.python, *packages)


def segmenter_packages(wheel: Path, with_torchvision: bool) -> list[str]:
    """The extra "vos" of the wheel; torchvision, which timm needs too, cannot be imported beside a torch without CUDA."""
    (info,) = (path for path in ZipPath(wheel).iterdir() if path.name.endswith(".dist-info"))
    requires = Distribution.requires.fget(PathDistribution(info)) or []
    wanted = [text.partition(";")[0].strip() for text in requires if "extra ==" in text and "vos" in text.partition(";")[2]]
    return [package for package in wanted if with_torchvision or package not in ("torchvision", "timm")]


def import_seconds(environment: Environment) -> float:
    """CPU time of importing dmm_fast once torch is there, the second time, when its files are compiled and cached."""
    timed = "import time, torch; before = time.process_time(); import dmm_fast; print(time.process_time() - before)"
    return [float(environment.run(environment.python, "-c", timed).split()[-1]) for _ in range(2)][-1]


def check(torch: str, wheel: Path, folder: Path) -> tuple[dict[str, str], list[str]]:
    """(a row of the table, what failed)."""
    row, failed = dict.fromkeys(COLUMNS, "-"), []
    row["torch"] = torch

    def cell(column: str, act: Callable[[], str]) -> None:
        try:
            row[column] = act()
        except Exception as error:
            row[column] = "FAILED"
            failed.append(f"torch {torch}, {column}: {str(error)[-1500:]}")

    def smoke(column: str) -> None:
        cell(column, lambda: environment.run(environment.python, ROOT / "tests" / "smoke.py", column) and "ok")

    def doctor() -> str:
        try:
            return environment.run(environment.python, "-m", "dmm_fast", "doctor") and "healthy"
        except RuntimeError as error:
            if cuda or "torchvision" not in str(error) or "FAILED" in str(error):
                raise
            return "names torchvision, timm"

    environment = Environment(folder)
    try:
        environment.install(f"torch=={torch}")
    except RuntimeError as error:
        row["import"] = f"not available here: {str(error).splitlines()[-1][:100]}"
        return row, []
    try:
        environment.install(str(wheel))
        installed = environment.run(
            environment.python, "-c", "import torch; print(torch.__version__, bool(torch.version.cuda))"
        )
        row["torch"], cuda = installed.split()[0], installed.split()[1] == "True"
        seconds = import_seconds(environment)
        row["import"] = f"{seconds:.2f} s"
        if seconds > LIMIT:
            failed.append(f"torch {torch}: importing dmm_fast takes {seconds:.2f} s beyond torch, more than {LIMIT}")
        smoke("layer")
        smoke("programs")
        environment.install(f"torch=={torch}", *segmenter_packages(wheel, cuda))
        smoke("segment")
        smoke("live")
        cell("doctor", doctor)
    except RuntimeError as error:
        failed.append(f"torch {torch}: {str(error)[-1500:]}")
    return row, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?", help="the wheel, by default the one in dist/")
    parser.add_argument("--torch", nargs="+", default=TORCH, metavar="VERSION", help=f"default: {' '.join(TORCH)}")
    arguments = parser.parse_args()
    wheels = [arguments.wheel] if arguments.wheel else sorted((ROOT / "dist").glob("*.whl"))
    if len(wheels) != 1:
        parser.error(f"one wheel must be in dist/ (make wheel), found {[path.name for path in wheels]}")
    if not shutil.which("uv"):
        parser.error("uv is needed: pip install uv")
    folder = ROOT / "build" / "matrix"
    failures: list[str] = []
    print(f"{wheels[0].name}\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for torch in arguments.torch:
        try:
            row, failed = check(torch, wheels[0].resolve(), folder / "env")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(f"| {' | '.join(row[column] for column in COLUMNS)} |", flush=True)
        failures += failed
    print("\n".join(["", *failures]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

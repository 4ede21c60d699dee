"""`dmm-fast runtime`: where the C++ runtime's sources are, and building them here."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dmm_fast.commands.options import add_command

PACKAGE = Path(__file__).resolve().parents[1]


def add(commands: Any) -> None:
    parser = add_command(
        commands, "runtime", run, "build the C++ runtime, or show where it is",
        "The C++ runtime runs an export (dmm-fast export) without Python. The package contains its sources, which compile\n"
        "against your own torch. C++ programs use find_package(dmm); --build makes the program dmm-segment and the Python\n"
        "module dmm_fast.runtime. Without options, the command shows what is installed. Building needs a C++20 compiler,\n"
        "libjpeg and libpng (apt-get install g++ libjpeg-dev libpng-dev).",
        ("dmm-fast runtime --build", "compile dmm-segment and dmm_fast.runtime, about a minute"),
        ("cmake -B build -Ddmm_DIR=$(dmm-fast runtime --cmake-dir) -DDMM_TORCH=$(dmm-fast runtime --torch-dir)",
         "configure your own program, which uses find_package(dmm) and links dmm::runtime"),
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cmake-dir", action="store_true", help="print the folder of dmm-config.cmake, for -Ddmm_DIR=")
    what.add_argument("--torch-dir", action="store_true", help="print the folder of torch, for -DDMM_TORCH=")
    what.add_argument("--build", action="store_true", help="compile dmm-segment and the Python module")
    parser.add_argument("--out", metavar="DIR", help="with --build: install here (default: into the package)")
    parser.add_argument("--work", metavar="DIR", help="with --build: keep object files here, so that the next build is faster")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.out or arguments.work) and not arguments.build:
        raise ValueError("runtime: --out and --work go with --build")
    if arguments.cmake_dir:
        print(sources())
    elif arguments.torch_dir:
        print(torch_dir())
    elif arguments.build:
        out = Path(arguments.out or _built())
        with contextlib.ExitStack() as stack:
            work = arguments.work or stack.enter_context(tempfile.TemporaryDirectory(prefix="dmm-runtime-"))
            build(Path(work), out)
        print(f"built: {out / 'dmm-segment'}, and dmm_fast.runtime for Python {sys.version_info[0]}.{sys.version_info[1]}")
    else:
        found = sorted(path.name for path in _built().glob("*")) if _built().is_dir() else []
        print(f"sources: {sources()}\ntorch:   {torch_dir()}")
        print(f"built:   {', '.join(found) + f' in {_built()}' if found else 'nothing yet; dmm-fast runtime --build'}")
    return 0


def sources() -> Path:
    """The folder with dmm-config.cmake: in the package, or beside it in a clone."""
    for folder in (PACKAGE / "cpp", PACKAGE.parent / "csrc" / "runtime"):
        if (folder / "dmm-config.cmake").is_file():
            return folder
    raise FileNotFoundError(f"runtime: the sources are missing: no dmm-config.cmake in {PACKAGE / 'cpp'}")


def torch_dir() -> Path:
    from importlib.util import find_spec

    found = find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def build(work: Path, out: Path) -> None:
    """Compile in the folder `work` and install dmm-segment and the Python module in `out`."""
    # pip's cmake and ninja sit beside the interpreter, which need not be on PATH
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
    cmake = shutil.which("cmake", path=environment["PATH"])
    if cmake is None:
        raise FileNotFoundError("runtime: cmake is missing; pip install cmake")
    configure = [
        cmake, "-S", sources(), "-B", work, f"-DDMM_TORCH={torch_dir()}", f"-DDMM_PYTHON={sys.executable}",
        f"-DCMAKE_INSTALL_PREFIX={out.resolve()}",
    ]  # fmt: skip
    if not (work / "CMakeCache.txt").exists() and shutil.which("ninja", path=environment["PATH"]):
        configure += ["-G", "Ninja"]
    for step in (configure, [cmake, "--build", work, "--parallel", str(os.cpu_count() or 1)], [cmake, "--install", work]):
        result = subprocess.run([str(word) for word in step], env=environment, text=True, capture_output=True)
        if result.returncode:
            log = (result.stdout + result.stderr)[-4000:]
            raise RuntimeError(f"{log}\nruntime: the build failed: {' '.join(map(str, step[:2]))}")


def _built() -> Path:
    return PACKAGE / "lib" / "runtime"

"""Builds the native libraries with CMake and puts them inside the package. Everything else is in pyproject.toml.

Environment: FORCE_CUDA=1 fails unless the CUDA kernels can be built, FORCE_CUDA=0 leaves them out; by default they are built
where nvcc is found and the torch at hand is a CUDA build. DMM_CUDA_ARCHITECTURES is "all", the default of a wheel, or a list for
CMake such as "90-real;120". An editable install is for this machine: by default its GPUs, or 8.0 and PTX where none is visible.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(p) for p in [shutil.which("nvcc")] if p] + [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(p) for p in candidates if p.exists()), None)


def nvcc_release():
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def cuda_decision(torch):
    """(build the CUDA kernels?, why)."""
    wish = os.environ.get("FORCE_CUDA")
    nvcc = find_nvcc()
    if wish == "0":
        return False, "left out by FORCE_CUDA=0"
    if nvcc and torch.version.cuda:
        return True, f"nvcc at {nvcc}, torch for CUDA {torch.version.cuda}"
    missing = "no nvcc was found (set CUDA_HOME)" if not nvcc else f"torch {torch.__version__} is a build without CUDA"
    if wish == "1":
        raise SystemExit(f"dmm_fast: FORCE_CUDA=1, but {missing}")
    return False, missing


def cuda_architectures(torch, inplace):
    """(DMM_CUDA_ARCHITECTURES, why). One takes a small part of the time of all; its PTX serves newer GPUs too."""
    if wish := os.environ.get("DMM_CUDA_ARCHITECTURES"):
        return wish, "DMM_CUDA_ARCHITECTURES"
    if not inplace:
        return "all", "a wheel"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = sorted({torch.cuda.get_device_capability(index) for index in range(count)})
    served = [f"{major}{minor}" for major, minor in found if (major, minor) >= (7, 5)]
    which = "the GPUs here" if served else "no GPU from 7.5 on is visible; any from 8.0 on takes the PTX"
    return ";".join(served) or "80", f"{which}. DMM_CUDA_ARCHITECTURES=all: every one"


class CMakeBuild(build_ext):
    def run(self):
        import torch

        with_cuda, why = cuda_decision(torch)
        print(f"dmm_fast: CUDA kernels {'on' if with_cuda else 'off'} ({why})", file=sys.stderr)
        architectures = None
        if with_cuda:
            architectures, chosen = cuda_architectures(torch, self.inplace)
            print(f"dmm_fast: CUDA architectures {architectures} ({chosen})", file=sys.stderr)
        build = ROOT / "build" / ("cuda" if with_cuda else "cpu")
        # pip's cmake and ninja sit beside the interpreter, which need not be on PATH
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        target = ROOT / "dmm_fast" / "lib" if self.inplace else Path(self.build_lib).resolve() / "dmm_fast" / "lib"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DTORCH_DIR={Path(torch.__file__).parent}", f"-DDMM_CUDA={'ON' if with_cuda else 'OFF'}",
        ]  # fmt: skip
        cache, ninja = build / "CMakeCache.txt", shutil.which("ninja")
        if ninja and (not cache.exists() or "CMAKE_GENERATOR:INTERNAL=Ninja\n" in cache.read_text()):
            # each time: pip deletes the ninja of its build environment, which the cache names
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if with_cuda:
            configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DDMM_CUDA_ARCHITECTURES={architectures}"]
        subprocess.run(configure, check=True)
        log = subprocess.run(
            ["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        with open(build / "build.log", "a") as file:  # an incremental build says nothing of what it kept
            file.write(log.stdout)
        if log.returncode:
            raise SystemExit(f"{log.stdout[-8000:]}\ndmm_fast: the native build failed; the whole log is {build}/build.log")
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(target)], check=True)
        if not with_cuda:
            (target / "libdmm_cuda.so").unlink(missing_ok=True)
        nvcc = nvcc_release() if with_cuda else None
        facts = {"torch": torch.__version__, "nvcc": nvcc, "cuda_decision": why, "cuda_architectures": architectures}
        (target / "build.json").write_text(json.dumps(facts, indent=1) + "\n")

    def get_outputs(self):
        return []

    def get_source_files(self):
        return []

    def copy_extensions_to_source(self):
        pass


class PlatformWheel(bdist_wheel):
    """The libraries hold no Python symbols: one wheel serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("dmm_fast.lib.dmm", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)

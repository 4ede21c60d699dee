"""What the CUDA compiler made, on any machine: every architecture, no spills, and kernels that can be launched.

``python tests/ops/test_cuda_build.py`` prints the registers of every kernel as a Markdown table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from dmm_fast.ops import library as _library

LOG = Path(__file__).resolve().parents[2] / "build" / "cuda" / "build.log"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
REGISTERS = 1 << 16  # of a multiprocessor, and so of a block


class Kernel(NamedTuple):
    """One kernel in the built library, for one architecture."""

    name: str
    architecture: str
    registers: int  # of a thread
    stack: int  # bytes; spilled registers go there
    threads: int | None  # the most in a block (__launch_bounds__), which no launch may exceed

    @property
    def block(self) -> int:
        """Registers of the largest block: the hardware hands them out by 8 to a thread, to whole warps."""
        return -(-self.registers // 8) * 8 * -(-self.threads // 32) * 32


def cuobjdump() -> str | None:
    """From CUDA's toolkit, or from Triton, which brings it along."""
    import importlib.util

    found = importlib.util.find_spec("triton")
    beside = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if found else None
    return shutil.which("cuobjdump") or (str(beside) if beside and beside.exists() else None)


def read_kernels(library: Path) -> list[Kernel]:
    """Every kernel of a built library, as its machine code describes itself."""
    tool = cuobjdump()
    usage = subprocess.run([tool, "-res-usage", str(library)], capture_output=True, text=True, check=True).stdout
    elf = subprocess.run([tool, "-elf", str(library)], capture_output=True, text=True, check=True).stdout
    threads, architecture, name = {}, "", ""
    lines = iter(elf.splitlines())
    for line in lines:
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif line.startswith(".nv.info."):
            name = line.removeprefix(".nv.info.").strip()
        elif line.strip().endswith("EIATTR_MAX_THREADS"):
            next(lines)
            x, y, z = (int(number, 16) for number in next(lines).split(":")[1].split())
            threads[name, architecture] = x * y * z
    found = []
    for line in usage.splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match.group(1)
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            registers, stack = map(int, match.groups())
            found.append(Kernel(name, architecture, registers, stack, threads.get((name, architecture))))
    return found


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if not _library.built_facts().get("nvcc"):
        pytest.skip("the CUDA kernels were not built here (no nvcc, or a torch without CUDA)")
    if cuobjdump() is None:
        pytest.skip("no cuobjdump here, neither CUDA's nor Triton's")
    return read_kernels(_library.FOLDER / "libdmm_cuda.so")


def test_every_architecture(kernels):
    built = _library.built_facts().get("cuda_architectures")
    if built != "all":
        pytest.skip(f"built for {built}; with DMM_CUDA_ARCHITECTURES=all for every one, as CI does")
    names = {kernel.name for kernel in kernels}
    assert len(names) > 60
    assert {(kernel.name, kernel.architecture) for kernel in kernels} == {(n, a) for n in names for a in ARCHITECTURES}


def test_every_kernel_can_be_launched(kernels):
    """At any size it is launched with: its launch bounds are the most threads of a block."""
    assert not [kernel for kernel in kernels if kernel.threads is None], "a kernel without __launch_bounds__"
    assert not [(*kernel, kernel.block) for kernel in kernels if kernel.block > REGISTERS]
    general = {kernel.threads for kernel in kernels if "general_" in kernel.name}
    assert general == {256, 512}  # kGeneralThreads, which the launch takes its blocks from


def test_no_stack(kernels):
    assert not [kernel for kernel in kernels if kernel.stack]


def test_no_spills():
    """By the compiler's own report, of builds in this checkout."""
    if not LOG.exists() or not _library.built_facts().get("nvcc"):
        pytest.skip("no report: the CUDA kernels were not built in this checkout")
    report = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?\n.*?Function properties.*?\n(.*?)\n")
    newest = {(name, architecture): properties for name, architecture, properties in report.findall(LOG.read_text())}
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert newest and not [(*key, properties) for key, properties in newest.items() if clean not in properties]


def table(kernels: list[Kernel]) -> str:
    """Registers by kernel and architecture, and the worst share of a multiprocessor that one block takes."""
    plain = subprocess.run(["c++filt"], input="\n".join(k.name for k in kernels), capture_output=True, text=True).stdout
    rows: dict[str, list[Kernel]] = {}
    for kernel, name in zip(kernels, plain.splitlines()):
        name = re.sub(r"^void dmm::(cuda::)?|\((?!anonymous).*", "", name)
        rows.setdefault(name, []).append(kernel)
    lines = [
        f"| kernel | threads | {' | '.join(ARCHITECTURES)} | largest block |",
        "|---|--:|" + "--:|" * (len(ARCHITECTURES) + 1),
    ]
    for name, of_it in sorted(rows.items()):
        registers = {kernel.architecture: str(kernel.registers) for kernel in of_it}
        cells = [registers.get(architecture, "-") for architecture in ARCHITECTURES]
        lines.append(f"| {name} | {of_it[0].threads} | {' | '.join(cells)} | {max(k.block for k in of_it) / REGISTERS:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(print(table(read_kernels(_library.FOLDER / "libdmm_cuda.so"))))

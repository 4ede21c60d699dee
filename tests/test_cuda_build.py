"""What the CUDA compiler reported when this environment was built: every architecture, no spills, no stack frames."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from dmm_fast import _library

LOG = Path(__file__).resolve().parent.parent / "build" / "cuda" / "build.log"
ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[str, str], str]:
    """ptxas' report by (kernel, architecture); the newest where something was compiled twice."""
    if not LOG.exists() or not _library.built_facts().get("nvcc"):
        pytest.skip("the CUDA kernels were not built here (no nvcc, or a torch without CUDA)")
    report = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?\n.*?Function properties.*?\n(.*?)\n")
    return {(name, architecture): properties for name, architecture, properties in report.findall(LOG.read_text())}


def test_every_architecture(kernels):
    if "DMM_CUDA_ARCHITECTURES" in os.environ:
        pytest.skip("DMM_CUDA_ARCHITECTURES narrows the list")
    by_kernel: dict[str, set[str]] = {}
    for name, architecture in kernels:
        by_kernel.setdefault(name, set()).add(architecture)
    assert len(by_kernel) > 10
    for name, architectures in by_kernel.items():
        assert architectures >= ARCHITECTURES, name


def test_no_spills_and_no_stack_frame(kernels):
    clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert not [(*key, properties) for key, properties in kernels.items() if clean not in properties]

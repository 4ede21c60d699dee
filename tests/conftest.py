"""Fixtures that every test may use."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels then run on CPU tensors

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # they and what they start share the cores
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Random numbers that depend neither on the tests before nor on the process; before any fixture, whatever its scope."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def pytest_collection_modifyitems(items):
    """What `-m gpu` selects: tests marked so, which are skipped without a GPU; cases with a device "cuda"; Triton's tests."""
    absent = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            if not torch.cuda.is_available():
                item.add_marker(absent)
        elif "triton" in item.path.stem or "cuda" in _devices(item):
            item.add_marker(pytest.mark.gpu)


def _devices(item) -> set[str]:
    """The kinds of devices among a case's parameters."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return {str(value).partition(":")[0] for value in values if isinstance(value, str | torch.device)}


@pytest.fixture(scope="session")
def data() -> Path:
    """The development data beside the repository (or at DMM_FAST_DATA); tests on it are skipped where it is absent."""
    path = Path(os.environ.get("DMM_FAST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("the development data is absent; DMM_FAST_DATA names its folder")
    return path

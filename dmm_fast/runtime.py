"""The C++ runtime from Python: `dmm::Segmenter` on an export (docs/deploy.md), the same code that C++ programs link.

    from dmm_fast.runtime import Segmenter
    segmenter = Segmenter("exported"); segmenter.start(frame, ids); segmenter.step(frame, (boxes, scores, masks))

Frames are uint8 [H, W, 3] arrays and ids uint8 [H, W]; proposals are arrays too. It is compiled against the torch at hand, so
it is not in the wheel: ``dmm-fast runtime --build`` makes it.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

from dmm_fast.ops import library

FOLDER = library.FOLDER / "runtime"
BUILD = "dmm-fast runtime --build"


def _load():
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    path = next((p for p in (FOLDER / f"_runtime{suffix}" for suffix in suffixes) if p.exists()), None)
    if path is None:
        raise ImportError(f"dmm_fast.runtime is not built for this Python (nothing in {FOLDER}); build it with: {BUILD}")
    spec = importlib.util.spec_from_file_location("dmm_fast._runtime", path)
    assert spec is not None and spec.loader is not None, path
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        cause = f"{path} does not load into torch {torch.__version__}: {error}"
        raise ImportError(f"{cause}. Build it again with: {BUILD}") from error
    if module.torch != torch.__version__.partition("+")[0]:
        raise ImportError(
            f"{path} was built against torch {module.torch}, this is {torch.__version__}; build it again with: {BUILD}"
        )
    sys.modules[spec.name] = module
    return module


_runtime = _load()
FrameResult = _runtime.FrameResult
ObjectResult = _runtime.ObjectResult
RuntimeFault = _runtime.RuntimeFault
Segmenter = _runtime.Segmenter
read_frame, read_mask, read_proposals = _runtime.read_frame, _runtime.read_mask, _runtime.read_proposals
PROGRAM = Path(FOLDER / "dmm-segment")

"""A whole step, eager against C++ on the same export: ``pytest benchmarks/bench_segment.py``.

Both must first agree on every frame's ids. ``dmm-fast bench`` tells the stages apart and compiles .pt2 too.
"""

from __future__ import annotations

import numpy as np
import pytest

from dmm_fast.data.masks import read_mask
from dmm_fast.data.video import open_frames
from dmm_fast.export import export
from dmm_fast.inference.bench import _make_clip
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.proposals.coco import read_coco


@pytest.mark.parametrize("objects", [1, 5, 10, 20])
@pytest.mark.parametrize("runtime", ["eager", "c++"])
def bench_step(benchmark, runtime, objects, tmp_path):
    from dmm_fast.runtime import Segmenter as Native

    _make_clip(tmp_path, objects, 6, (255, 448), 50)
    eager = Segmenter("iou")
    export("torchscript", eager.net, tmp_path / "export")
    native = Native(tmp_path / "export")
    file, ids = read_coco(tmp_path / "proposals.json"), read_mask(tmp_path / "first.png")
    for stem, frame in open_frames(tmp_path / "frames").read():
        found = file.frame(stem, ids.shape)
        arrays = tuple(part.numpy() for part in found)
        if not eager.object_ids:
            eager.start(frame, ids), native.start(frame, ids)
        else:
            assert np.array_equal(eager.step(frame, found).ids, native.step(frame, arrays).ids)
    step, given = (eager.step, found) if runtime == "eager" else (native.step, arrays)
    benchmark(step, frame, given)

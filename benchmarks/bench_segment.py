"""A whole step in C++ (``make runtime``) against eager: ``pytest benchmarks/bench_segment.py``.

Both must first agree on every frame's ids. Wall-clock time, all of torch's threads. ``dmm-fast bench`` tells the stages apart and compiles .pt2 too.
"""

from __future__ import annotations

import core
import numpy as np
import pytest

from dmm_fast.data.masks import read_mask
from dmm_fast.data.video import open_frames
from dmm_fast.export import export
from dmm_fast.inference.bench import _make_clip
from dmm_fast.inference.segmenter import Segmenter
from dmm_fast.proposals.coco import read_coco


@pytest.mark.parametrize("objects", [1, 5, 10, 20])
def bench_step(benchmark, objects, tmp_path):
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
    functions = {"c++": lambda: native.step(frame, arrays), "eager": lambda: eager.step(frame, found)}
    times = core.compare(functions, core.wall_time, rounds=5, sample=0.1)
    core.record(benchmark, times["c++"], *core.rows_of(f"step, {objects} objects", times))

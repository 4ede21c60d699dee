"""What tests of training share: one thread, and videos of the koi pond on disk."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from dmm_fast.data.masks import write_mask
from dmm_fast.data.synthetic import synthetic_clip


@pytest.fixture(scope="module")
def one_thread():
    """As the processes that the tests start: what is computed depends on the number of threads, in its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def write_ponds():
    """(folder, frames, size) -> two clips of two objects, "one" and "two", written to the folder in the plain layout."""

    def write(root, frames, size):
        clips = {name: synthetic_clip(number, frames, size, objects=2, pads=0) for number, name in enumerate(("one", "two"))}
        for name, clip in clips.items():
            for part in ("JPEGImages", "Annotations"):
                (root / part / name).mkdir(parents=True)
            for time, (frame, ids) in enumerate(zip(clip.frames, clip.ids)):
                Image.fromarray(frame).save(root / "JPEGImages" / name / f"{time:05d}.png")
                write_mask(root / "Annotations" / name / f"{time:05d}.png", ids)
        return clips

    return write

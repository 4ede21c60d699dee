"""What the tests of the page share."""

from __future__ import annotations

import pytest

from dmm_fast.inference.demo import make_clip


@pytest.fixture(scope="module")
def demo(request, tmp_path_factory):
    """A made clip in DAVIS's layout, of the module's SIZE and LENGTH."""
    folder = tmp_path_factory.mktemp("demo")
    make_clip(folder, seed=7, frames=request.module.LENGTH, size=request.module.SIZE)
    return folder

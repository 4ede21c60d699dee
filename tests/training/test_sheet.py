"""The contact sheet of training clips, and training clips written as a data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dmm_fast.commands.main import main
from dmm_fast.data.datasets import open_dataset
from dmm_fast.data.masks import write_mask
from dmm_fast.proposals.base import full_masks
from dmm_fast.training.config import read_config
from dmm_fast.training.data import open_data

SIZE = (48, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A grey video with a yellow box that moves."""
    root = tmp_path_factory.mktemp("videos")
    for part in ("JPEGImages/a", "Annotations/a"):
        (root / part).mkdir(parents=True)
    for t in range(8):
        ids = np.zeros(SIZE, np.uint8)
        ids[12:32, 10 + 4 * t : 30 + 4 * t] = 1
        frame = np.where(ids[..., None] == 1, np.uint8([250, 250, 0]), np.uint8(90))
        Image.fromarray(frame).save(root / f"JPEGImages/a/{t:05d}.png")
        write_mask(root / f"Annotations/a/{t:05d}.png", ids)
    return root


def arguments(folder):
    sources = "[{kind: clips}, {kind: alike, size: [48, 80]}]"
    return ["train", "small", f"data.path={folder}", "data.held_out=[]", "data.frames=4", "data.clips=5", f"data.sources={sources}",
            "data.augment={size: [48, 80]}", "--quiet"]  # fmt: skip


def test_a_sheet_of_clips(folder, tmp_path):
    for name, count in (("one.png", "2"), ("all.jpg", "9")):
        assert main([*arguments(folder), "--sheet", str(tmp_path / name), "--clips", count]) == 0
    one, whole = (Image.open(tmp_path / name) for name in ("one.png", "all.jpg"))
    assert (one.format, whole.format) == ("PNG", "JPEG") and one.width == whole.width == 1600
    assert whole.height == one.height // 2 * 5  # an epoch has no more than five
    assert not list(tmp_path.glob("runs*")) and {path.name for path in tmp_path.iterdir()} == {"one.png", "all.jpg"}
    # The first clip's first frame is at the left, its object tinted and the rest as it is.
    config = read_config("small", arguments(folder)[2:-1])
    clips, _ = open_data(config)
    clip, cell = clips[0], (1600 - 6) // 4 - 6
    assert {clips.source_of(index) for index in range(5)} == {0, 1}
    picture = np.asarray(one)[24 : 24 + round(cell * 48 / 80), 6 : 6 + cell].astype(int)
    small = np.asarray(Image.fromarray(picture.astype(np.uint8)).resize((80, 48), Image.Resampling.BOX)).astype(int)
    change = np.abs(small - clip.frames[0].permute(1, 2, 0).numpy()).max(2)
    mask = clip.masks[0].any(0).numpy()
    assert np.median(change[mask]) > 40 > np.median(change[~mask])


def test_clips_as_a_data_set(folder, tmp_path, capsys):
    """What training sees, to the pixel where files keep pixels, and nothing of a call that failed."""
    made = tmp_path / "made"
    assert main([*arguments(folder), "--write-clips", str(made), "--clips", "9"]) == 0
    clips, _ = open_data(read_config("small", arguments(folder)[2:-1]))
    dataset = open_dataset(made, "folder", proposals=made / "proposals")
    assert len(dataset) == 5 and {name.split("-")[1] for name in dataset.names} == {"clips", "alike"}
    for clip, video in zip(clips, dataset):
        assert len(video) == 4 and video.annotated == [0, 1, 2, 3]
        for t, (frame, masks) in enumerate(zip(clip.frames, clip.masks)):
            assert np.abs(video.frame(t).astype(int) - frame.permute(1, 2, 0).numpy()).mean() < 8
            assert np.array_equal(video.truth(t), ids_of(masks))
            boxes, scores, found = full_masks(video.proposals(t), SIZE)
            expected = full_masks(clip.proposals[t], SIZE)
            assert len(scores) == len(expected[1])
            assert torch.equal(found.sum((1, 2)).sort().values, expected[2].sum((1, 2)).sort().values)
    assert main([*arguments(folder), "--write-clips", str(made)]) == 2 and "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def ids_of(masks):
    return sum((number * mask.numpy().astype(np.uint8) for number, mask in enumerate(masks, 1)), np.zeros(SIZE, np.uint8))


@pytest.mark.parametrize(
    ("extra", "message"),
    [(["--sheet", "x.gif"], "x.gif: a sheet is a .jpg or .png file"), (["--sheet", "x.png", "--clips", "0"], "at least one clip, got 0"),
     (["--clips", "3"], "--clips N is for --sheet"), (["--sheet", "x.png", "data.sources.1.twins=2"], "twins is a chance in [0, 1], got 2"),
     (["--sheet", "x.png", "data.sources.1.twin=2"], "a source of kind alike"),
     (["--sheet", "x.png", "data.sources.0.mined=0.5"], "mined is a share in [0, 1] of clips from videos with proposals"),
     (["--sheet", "nowhere/x.png"], "there is no directory nowhere"),
     (["--write-clips", "made", "--clips", "0"], "at least one clip can be written, got 0"),
     (["--write-clips", "nowhere/made"], "there is no directory nowhere")],
)  # fmt: skip
def test_bad_sheets(folder, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(folder), *extra]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())

"""Devices by name: a GPU always with its index, and a plain message where there is none."""

from __future__ import annotations

import pytest
import torch

from dmm_fast.commands.main import main
from dmm_fast.ops import library
from dmm_fast.ops.device import open_device
from dmm_fast.training.team import Team


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says of two GPUs; `set_device` refuses a device without an index, as the real one does."""

    def set_device(device):
        if torch.device(device).index is None:
            raise ValueError("Expected a torch.device with a specified index")
        chosen.append(torch.device(device).index)

    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return chosen


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("auto", 0), ("cuda:1", 1), (torch.device("cuda"), 0)])
def test_training_starts_on_one_gpu(two_gpus, name, index):
    team = Team(name)
    assert team.device == open_device(name) == torch.device("cuda", index) and two_gpus == [index]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_of_torchrun_has_a_gpu(two_gpus, monkeypatch, rank):
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", started.append)
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    assert Team("cuda").device == Team("auto").device == torch.device("cuda", rank)
    assert two_gpus == [rank, rank] and started == ["nccl", "nccl"]


def test_a_gpu_that_is_not_there(two_gpus):
    with pytest.raises(ValueError, match=r"^device cuda:2 cannot be used here \(there is no GPU 2: torch sees 2"):
        open_device("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "words",
    [
        ["train", "small", "device=cuda", "data.path=x"],
        ["train", "small", "data.path=x", "--device", "cuda"],
        ["train", "--online", "x.png", "--masks", "x.png", "--out", "x.safetensors", "--device", "cuda"],
        ["train-proposals", "small", "--data", "x", "--out", "x", "--device", "cuda"],
        ["segment", "x", "--masks", "x", "--out", "x", "--device", "cuda"],
        ["segment", "x", "--masks", "x", "--out", "x", "--online", "30", "--device", "cuda"],
        ["proposals", "x", "--out", "x.json", "--device", "cuda"],
        ["demo", "--device", "cuda"],
        ["bench", "--device", "cuda"],
        ["export", "--format", "torchscript", "--out", "x", "--device", "cuda"],
    ],
    ids=" ".join,
)
def test_every_command_says_so_in_one_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("dmm-fast: device cuda cannot be used here (torch ") and told.count("\n") == 1, told
    assert not list(tmp_path.iterdir())


def test_auto_takes_what_is_there():
    assert open_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device gpu cannot be used here"):
        open_device("gpu")


def test_when_the_cuda_kernels_are_left_to_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "built_facts", lambda: {"nvcc": "13.0"})
    monkeypatch.setattr(library.torch.version, "cuda", "13.0")

    class Driver:
        def __init__(self, version):
            self.version = version

        def cuDriverGetVersion(self, place):
            place._obj.value = self.version

    for version, told in (
        (12_080, "built with CUDA 13.0; the driver here serves 12.8"),
        (13_000, None),
        (13_010, None),
        (14_000, None),
    ):
        monkeypatch.setattr(library.ctypes, "CDLL", lambda name, version=version: Driver(version))
        assert library._older_driver() == told
    (tmp_path / "libdmm_cuda.so").touch()
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setenv("DMM_CUDA", "0")
    assert library.load_cuda() == "left out by DMM_CUDA=0"

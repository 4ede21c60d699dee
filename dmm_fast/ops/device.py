"""Which device a name means, checked before anything is read or computed."""

from __future__ import annotations

import os

import torch


def open_device(name: str | torch.device) -> torch.device:
    """The device of "cpu", "cuda", "cuda:1" or "auto" (a GPU where torch sees one), a GPU always with its index.

    "cuda" is the current GPU, or under torchrun the one of this process (LOCAL_RANK). Raises ValueError, in one line, where
    the device cannot be used here.
    """
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(1, device=device)
            return device
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU")
        index, count = device.index, torch.cuda.device_count()
        if index is None:
            index = int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else torch.cuda.current_device()
        if index >= count:
            raise RuntimeError(f"there is no GPU {index}: torch sees {count}, counted from 0")
        return torch.device("cuda", index)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # NotImplementedError: a device without storage
        cause = str(error).splitlines()[0]
        raise ValueError(f"device {name} cannot be used here ({cause}); dmm-fast doctor tells more") from None

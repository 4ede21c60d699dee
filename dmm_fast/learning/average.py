"""The running average of a net's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a net's trainable parameters, in float32; after few steps it forgets faster.

    decay 0: the weights themselves.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.live = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.live.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step`, from 1."""
        if self.decay:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), weight)


def weights_of(net: nn.Module, average: Average) -> dict[str, Tensor]:
    """The state dict of `net`, averaged where there is an average."""
    return {**net.state_dict(), **average.shadow}

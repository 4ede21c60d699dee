"""A live frame in one function: its proposals and its step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmm_fast.model import DMMNet, Output, Proposals, State, digest
from dmm_fast.proposals.traceable import ProposalNetwork


class Live(nn.Module):
    """(frame [3, H, W], state) -> the proposals that `detector` finds in the frame, and `DMMNet.step` with them.

    shared: the detector's body is the network's backbone, see `shares_backbone`. It then runs once for both, on frames that are at least
    as large as it sees them, or that the network enlarges too: on others the detector, which enlarges them, runs its own.
    """

    def __init__(self, net: DMMNet, detector: ProposalNetwork, shared: bool) -> None:
        super().__init__()
        self.net, self.detector, self.shared = net, detector, shared

    def forward(self, frame: Tensor, state: State) -> tuple[Proposals, Output, State]:
        height, width = frame.size(1), frame.size(2)
        features = self.net.encode(frame[None])
        proposals = self.propose(frame, features)
        found, state = self.net.follow(features, proposals, state, height, width)
        parts = found.parts[:, : proposals.scores.size(0)]  # where there is no proposal, a step adds one of padding
        output = Output(
            found.logits, found.matched, found.labels, found.proposal, found.score, found.runner_up, found.lost, parts
        )
        return proposals, output, state

    def propose(self, frame: Tensor, features: list[Tensor]) -> Proposals:
        """Proposals of a frame, given its features too."""
        height, width = frame.size(1), frame.size(2)
        if self.shared and (self.net.enlarge or min(height, width) >= self.net.short_side):
            size = self.net.resized(height, width)
            found = self.detector.find(features[-4:], size, size, (height, width))
        else:
            found = self.detector(frame)
        return Proposals(found[0], found[1], found[2])


def shares_backbone(net: DMMNet, detector: Any) -> bool:
    """Whether a `Detector` looks at frames as `net` (not folded) does: with the same weights, at the same size."""
    network = getattr(detector, "network", None)
    return (
        network is not None
        and net.backbone is not None
        and net.input_size == (0, 0)
        and net.short_side == network.short_side
        and torch.equal(net.mean.cpu(), network.mean.cpu())
        and torch.equal(net.std.cpu(), network.std.cpu())
        and digest(net.backbone) == detector.body_digest
    )

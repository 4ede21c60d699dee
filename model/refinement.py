"""Refinement of matched masks. An implementation maps (features, matched, templates, hidden) -> (masks, hidden)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvLSTM(nn.Module):
    """One ConvLSTM layer over N objects of one image.

    Its input is the image's features, the same for all objects, beside maps of each object. A convolution over stacked
    maps is the sum of convolutions over the parts, so the image's part is computed once however many objects there are.
    """

    def __init__(self, shared: int, own: int, hidden: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(shared, 4 * hidden, 3, padding=1)
        self.own = nn.Conv2d(own + hidden, 4 * hidden, 3, padding=1, bias=False)

    def forward(self, shared: Tensor, own: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """shared [1, C, y, x], own [N, K, y, x], hidden and cell state [N, D, y, x] -> the next h and c."""
        gates = self.shared(shared) + self.own(torch.cat([own, h], 1))  # [N, 4D, y, x]
        i, f, o, g = gates.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class LightRefinement(nn.Module):
    """Section 3's light refinement: four ConvLSTM layers from conv5 to conv2, with memory from frame to frame.

    Each layer sees its level's features, the coarser layer's output, and the matched and template masks. The result is
    added to the matched mask as a change of its logit: the last convolution starts at zero, so that an untrained
    refinement returns the matched mask, and fine detail of a proposal survives the coarse grid of conv2.
    """

    def __init__(self, channels: list[int], hidden: int) -> None:
        super().__init__()
        widths = [hidden, hidden // 2, hidden // 4, hidden // 8]  # conv5 .. conv2
        self.widths = widths
        squeezes: list[nn.Module] = []
        layers: list[nn.Module] = []
        above = 0  # beside it, a layer sees two masks: matched and template
        for level, width in zip(reversed(channels), widths):
            squeezes.append(nn.Sequential(nn.Conv2d(level, width, 1), nn.GroupNorm(1, width)))
            layers.append(ConvLSTM(width, above + 2, width))
            above = width
        self.squeezes, self.layers = nn.ModuleList(squeezes), nn.ModuleList(layers)
        self.head = nn.Conv2d(above, 1, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.gain = nn.Parameter(torch.tensor(4.0))  # logit of a matched pixel

    def start(self, features: list[Tensor], objects: int) -> list[Tensor]:
        """Zero state: h and c of each layer, coarse to fine, each [N, D, h_l, w_l]."""
        hidden: list[Tensor] = []
        for k, width in enumerate(self.widths):
            level = features[len(features) - 1 - k]
            zeros = level.new_zeros((objects, width, level.size(2), level.size(3)))
            hidden.append(zeros)
            hidden.append(zeros)
        return hidden

    def forward(
        self, features: list[Tensor], matched: Tensor, templates: Tensor, hidden: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """features: each [1, C_l, h_l, w_l], fine to coarse; matched, templates [N, H, W] float -> masks [N, H, W]."""
        masks = torch.stack([matched, templates], 1)  # [N, 2, H, W]
        above: list[Tensor] = []
        following: list[Tensor] = []
        for k, (squeeze, layer) in enumerate(zip(self.squeezes, self.layers)):
            level = features[len(features) - 1 - k]
            size = [level.size(2), level.size(3)]
            own = [F.adaptive_avg_pool2d(masks, size)]
            for h in above:
                own.append(F.interpolate(h, size=size, mode="bilinear", align_corners=False))
            h, c = layer(squeeze(level), torch.cat(own, 1), hidden[2 * k], hidden[2 * k + 1])
            above = [h]
            following.append(h)
            following.append(c)
        change = F.interpolate(self.head(above[0]), size=matched.shape[1:], mode="bilinear", align_corners=False)[:, 0]
        return torch.sigmoid(change + self.gain * (2.0 * matched - 1.0)), following

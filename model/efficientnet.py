"""EfficientNet-Lite0, the packaged network's backbone, as timm has it: the same weights under the same names, the same features.

It is here so that the packaged network starts without timm, whose import takes longer than torch's.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = [0.5] * 3, [0.5] * 3
STRIDES = [2, 4, 8, 16, 32]
STAGES = [  # expansion, kernel, stride, channels, blocks
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
]  # fmt: skip
LEVELS = [0, 1, 2, 4, 6]  # stages after which the features have strides 2 to 32


class Conv2dSame(nn.Conv2d):
    """TensorFlow's "same" padding: ceil(size / stride) cells, of an odd number of padded pixels the last one after the image."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tall = padding(x.size(2), self.kernel_size[0], self.stride[0])
        wide = padding(x.size(3), self.kernel_size[1], self.stride[1])
        x = F.pad(x, [wide // 2, wide - wide // 2, tall // 2, tall - tall // 2])
        return F.conv2d(x, weight, bias, self.stride, [0, 0], self.dilation, self.groups)


def padding(size: int, kernel: int, stride: int) -> int:
    """Pixels to add along a side; kernel >= stride."""
    return ((size + stride - 1) // stride - 1) * stride + kernel - size


def convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return Conv2dSame(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)


def relu6(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=True)  # a third of the memory traffic


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Separable(nn.Module):
    """Depthwise, then pointwise."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv_dw, self.bn1 = convolution(inputs, inputs, kernel, groups=inputs), norm(inputs)
        self.conv_pw, self.bn2 = convolution(inputs, outputs), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(relu6(self.bn1(self.conv_dw(x)))))


class Inverted(nn.Module):
    """Expanded by a pointwise convolution, depthwise, and projected; around blocks that keep the shape the input is carried."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.conv_pw, self.bn1 = convolution(inputs, inner), norm(inner)
        self.conv_dw, self.bn2 = convolution(inner, inner, kernel, stride, inner), norm(inner)
        self.conv_pwl, self.bn3 = convolution(inner, outputs), norm(outputs)
        self.carried = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = relu6(self.bn1(self.conv_pw(x)))
        y = relu6(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.carried else y


class EfficientNetLite0(nn.Module):
    """Images [B, 3, H, W], normalised with `MEAN` and `STD` -> features of the `levels` coarsest of strides 2 to 32."""

    def __init__(self, levels: int = 5) -> None:
        super().__init__()
        self.wanted = LEVELS[-levels:]
        self.conv_stem, self.bn1 = convolution(3, 32, 3, 2), norm(32)
        stages: list[nn.Module] = []
        inputs = 32
        for expansion, kernel, stride, outputs, count in STAGES:
            blocks: list[nn.Module] = []
            for _ in range(count):
                if expansion == 1:
                    blocks.append(Separable(inputs, outputs, kernel))
                else:
                    blocks.append(Inverted(inputs, outputs, expansion, kernel, stride))
                inputs, stride = outputs, 1
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # so that it can be trained from nothing, too
                outputs = module.out_channels * module.kernel_size[0] ** 2 // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / outputs))
        self.channels = [STAGES[level][3] for level in self.wanted]

    def forward(self, x: Tensor) -> list[Tensor]:
        x = relu6(self.bn1(self.conv_stem(x)))
        features: list[Tensor] = []
        for k, stage in enumerate(self.blocks):
            x = stage(x)
            if k in self.wanted:
                features.append(x)
        return features

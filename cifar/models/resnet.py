"""The 6.6 M residual network for 32x32 colour images.

After David Page's DAWNBench network (github.com/davidcpage/cifar10-fast): one preparatory convolution, three
stages that each halve the map, residual branches on the first and the third, a global max-pool and a linear head.
With ten classes it has 6,575,370 parameters and costs 379 M multiply-adds per image.
"""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn import functional as F


class SmallMapConv2d(nn.Conv2d):
    """A convolution for small maps: nn.Conv2d's results up to rounding, faster on a CPU.

    With channels last, oneDNN's kernels go along a row of the map, and one of 4 cells leaves them half idle: with 512
    channels, bf16, batch 512 and 2 cores, 52 ms forward and 52 and 62 ms backward, against 30, 31 and 57 where both map
    and filters are contiguous. With 8x8 cells it is the other way round. The rest of the network sees no difference.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.device.type == "cpu":  # `to` has made all filters of the network channels-last
            self.weight.data = self.weight.data.contiguous()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        last = x.is_contiguous(memory_format=torch.channels_last)
        y = super().forward(x.contiguous())
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def conv_block(
    channels_in: int, channels_out: int, pool: bool = False, convolution: type[nn.Conv2d] = nn.Conv2d
) -> nn.Sequential:
    """Builds a 3x3 convolution, batch-norm and ReLU; with `pool`, a 2x2 max-pool halves the map.

    Pooling before the ReLU gives the same values and gradients, since both are monotonic, and leaves the ReLU a quarter
    of the work.
    """
    return nn.Sequential(
        convolution(channels_in, channels_out, kernel_size=3, padding=1),
        nn.BatchNorm2d(channels_out),
        *([nn.MaxPool2d(2)] if pool else []),
        # In place: saves one activation, and no backward pass needs the overwritten values.
        nn.ReLU(inplace=True),
    )


class GlobalMaxPool2d(nn.Module):
    """The maximum of each map: nn.AdaptiveMaxPool2d(1), whose CUDA backward pass torch lists as nondeterministic."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, x.shape[-2:])


class Residual(nn.Module):
    """Two convolution blocks whose output is added to their input."""

    def __init__(self, channels: int, convolution: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.block1 = conv_block(channels, channels, convolution=convolution)
        self.block2 = conv_block(channels, channels, convolution=convolution)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch: torch.Tensor = self.block2(self.block1(x))
        return x + branch


class ResNet(nn.Module):
    """Maps images [n, 3, h, w] (normalised; 16 pixels a side or more) to logits [n, classes]."""

    # Layers for class activation maps, shallow to deep, with the cells along a side for 32x32 images, evenly spread.
    explainable_layers: ClassVar = {"prep": 32, "layer1": 16, "layer2": 8, "layer3": 4}
    early_layers: ClassVar = ("prep", "layer1")

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.prep = conv_block(3, 64)
        self.layer1 = nn.Sequential(conv_block(64, 128, pool=True), Residual(128))
        self.layer2 = conv_block(128, 256, pool=True)
        self.layer3 = nn.Sequential(conv_block(256, 512, pool=True), Residual(512, SmallMapConv2d))
        self.pool = GlobalMaxPool2d()  # of 4x4 cells; smaller images leave fewer
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        logits: torch.Tensor = self.linear(self.dropout(self.pool(x).flatten(1)))
        return logits


build = ResNet

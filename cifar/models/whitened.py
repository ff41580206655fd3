"""A small, fast convolutional network of 2.0 M parameters with a frozen whitening layer.

After airbench94 (K. Jordan, arXiv 2404.00498; github.com/KellerJordan/cifar10-airbench): its layers, widths and
initialisation. Differences: the last row and column of odd maps, which pooling discards, are not computed (10.8 % of
the multiply-adds, though only 1 % of the time of the three convolutions in float32 with AVX2); the whitening has no
bias, so nothing below the first filters needs a gradient; the last pool is global, so smaller images work too.
With ten classes it has 1,971,328 parameters that learn, and costs 105 M multiply-adds per image.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from cifar.models.resnet import GlobalMaxPool2d

WHITENED = 12  # principal directions of 2x2 patches in three channels


class DiracConv2d(nn.Conv2d):
    """A 3x3 convolution whose first filters begin as the identity (Dirac), so that images reach every depth."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.dirac_(self.weight.data[: self.in_channels])


class PrePoolConv2d(DiracConv2d):
    """The same before a 2x2 pool: of an odd map, the last row and column of the result are not computed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % 2:
            return F.conv2d(F.pad(x, (1, 0, 1, 0)), self.weight)  # no zeros below and at the right
        return super().forward(x)


class Norm(nn.BatchNorm2d):
    """Batch-norm with a fixed scale and a high momentum, since training lasts only some hundred steps."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad = False


class Stage(nn.Module):
    """Two convolutions; a 2x2 max-pool behind the first halves the map, rounding down."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = PrePoolConv2d(channels_in, channels_out), Norm(channels_out)
        self.conv2, self.norm2 = DiracConv2d(channels_out, channels_out), Norm(channels_out)
        self.pool, self.activation = nn.MaxPool2d(2), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.norm1(self.pool(self.conv1(x))))
        x = self.norm2(self.conv2(x))
        return self.activation(x)  # type: ignore[no-any-return]


class Whitened(nn.Module):
    """Maps images [n, 3, h, w] (normalised; 16 pixels a side or more) to logits [n, classes]."""

    # Layers for class activation maps, shallow to deep: for 32x32 images cells along a side, the first one's centre and
    # their distance in pixels. From the whitening's first centre, 1, a stage goes half a distance on, then doubles it.
    explainable_layers: ClassVar = {"stage1": (15, 1.5, 2), "stage2": (7, 2.5, 4), "stage3": (3, 4.5, 8)}
    early_layers: ClassVar = ("whitening", "stage1")

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 2 * WHITENED, kernel_size=2, bias=False).requires_grad_(False)
        self.activation = nn.GELU()
        self.stage1, self.stage2, self.stage3 = Stage(2 * WHITENED, 64), Stage(64, 256), Stage(256, 256)
        self.pool = GlobalMaxPool2d()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(256, classes, bias=False)
        nn.init.normal_(self.linear.weight, std=1 / 256)

    def init_from_data(self, images: torch.Tensor) -> None:
        """Sets the whitening filters from training images [n, 3, h, w].

        They are the principal components of the images' 2x2 patches, divided by their standard deviations, and the
        negatives, since the activation cuts off one side.
        """
        patches = F.unfold(images, kernel_size=2).transpose(1, 2).reshape(-1, WHITENED)  # in the weight's order
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        variances.clamp_(min=0)  # rounding makes those of a blank set negative
        filters = (directions / (variances + 5e-4).sqrt()).T.reshape(WHITENED, 3, 2, 2)  # airbench's epsilon
        self.whitening.weight.copy_(torch.cat((filters, -filters)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.whitening(x))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: torch.Tensor = self.linear(self.dropout(self.pool(x).flatten(1)))
        return logits


build = Whitened

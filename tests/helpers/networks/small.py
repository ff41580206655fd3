"""A network of 25,000 weights, for tests that want many steps and little computing: as if a file of cifar/models.

While there is a file that the variable SLOWLY names, steps take SECONDS at least: a test that wants to strike a run
keeps it from ending before, however fast the machine, and then lets it go. While there is one that the variable FAILS
names, those of rank 1 fail.
"""

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

SECONDS = 0.5  # a step at least, while it is to be slow


class Small(nn.Module):
    """Three convolutions; images float32 [n, 3, 32, 32] in, logits [n, classes] out."""

    early_layers: ClassVar = ("stages.0",)
    explainable_layers: ClassVar = {"stages.0": (16, 0.5, 2), "stages.1": (8, 0.5, 4), "stages.2": (4, 0.5, 8)}

    def __init__(self, classes: int, dropout: float) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairwise(widths)
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        if self.training and "SLOWLY" in os.environ and Path(os.environ["SLOWLY"]).exists():
            time.sleep(SECONDS)
        if "FAILS" in os.environ and os.environ.get("RANK") == "1" and Path(os.environ["FAILS"]).exists():
            raise ValueError("boom")
        for stage in self.stages:
            images = stage(images)
        logits: torch.Tensor = self.linear(self.dropout(images.mean(dim=(2, 3))))
        return logits


build = Small

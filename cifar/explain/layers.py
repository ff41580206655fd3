"""The layers at which maps can be made, known without importing torch, and where their cells lie on a picture."""

import ast
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from cifar import models

if TYPE_CHECKING:
    from torch import nn

SIDE = 32  # pixels of the pictures that networks declare their layers for
NONE = -1


class Grid(NamedTuple):
    """A layer's cells: in each direction, cell k is `stride` pixels wide around `first + k * stride`.

    Positions are distances from the picture's top and left edge in pixels, so the first pixel's centre is at 0.5.
    """

    cells: int
    first: float
    stride: float

    def of_pixels(self) -> npt.NDArray[np.int64]:
        """Returns the cell [SIDE] that each pixel lies in, NONE for one beyond all cells."""
        return self._known(self._places())

    def nearest(self) -> npt.NDArray[np.int64]:
        """Returns the cell [SIDE] that is nearest to each pixel."""
        cells: npt.NDArray[np.int64] = self._places().clip(0, self.cells - 1)
        return cells

    def spans(self) -> list[tuple[int, int]]:
        """Returns the first pixel that lies in each cell, and how many do."""
        pixels = [np.flatnonzero(self.of_pixels() == cell) for cell in range(self.cells)]
        return [(int(of_cell[0]), len(of_cell)) for of_cell in pixels]

    @property
    def covering(self) -> bool:
        """Whether each pixel lies in a cell."""
        return NONE not in self.of_pixels()

    def mirrored(self) -> npt.NDArray[np.int64]:
        """Returns the cell [cells] lying where each is in a mirrored picture, NONE where none is within half a cell."""
        place = (SIDE - 2 * self.first) / self.stride - np.arange(self.cells)
        found = np.rint(place).astype(np.int64)
        return np.where(abs(place - found) < 0.5, self._known(found), NONE)

    def _places(self) -> npt.NDArray[np.int64]:
        places: npt.NDArray[np.int64] = np.floor((np.arange(SIDE) + 0.5 - self.first) / self.stride + 0.5).astype(int)
        return places

    def _known(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.where((places >= 0) & (places < self.cells), places, NONE)


def grid(network: "nn.Module", layer: str) -> Grid:
    """Returns where a layer's cells lie."""
    return _grid(network.explainable_layers[layer])  # type: ignore[index, arg-type]


def _grid(declared: int | tuple[int, float, float]) -> Grid:
    """Returns the declared grid. A number of cells alone means that they are spread evenly over the picture."""
    if isinstance(declared, int):
        return Grid(declared, SIDE / declared / 2, SIDE / declared)
    return Grid(*declared)


def resolutions(network: str) -> dict[str, int]:
    """Returns name and cells along a side of each layer, shallow to deep: the network class's `explainable_layers`.

    They are read from its source, since importing it would take the seconds that torch takes, and `explain.py --help`
    lists them too.
    """
    source = Path(models.__path__[0], f"{network}.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == "explainable_layers":
            return {name: _grid(declared).cells for name, declared in ast.literal_eval(node.value).items()}
    raise AssertionError(f"cifar/models/{network}.py has no annotated explainable_layers")


def default(layers: dict[str, int]) -> str:
    """Returns the deepest layer of at least 7x7 cells: deeper ones are more semantic, but 4x4 cells are too coarse."""
    return [name for name, cells in layers.items() if cells >= 7][-1]


def listed(layers: dict[str, int]) -> str:
    """Lists layers for a person: 'prep (32x32), layer1 (16x16), ...'."""
    return ", ".join(f"{name} ({cells}x{cells})" for name, cells in layers.items())

"""The layers of a network that maps can be made at, known before torch has loaded."""

import ast
from pathlib import Path

from cifar import models


def of(network: str) -> dict[str, int]:
    """Name and cells along a side of each layer, shallow to deep: the network class's `explainable_layers`.

    They are read from its source, since importing it would take the seconds that torch takes, and `explain.py --help`
    lists them too.
    """
    source = Path(models.__path__[0], f"{network}.py").read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == "explainable_layers":
            layers: dict[str, int] = ast.literal_eval(node.value)
            return layers
    raise AssertionError(f"cifar/models/{network}.py has no annotated explainable_layers")


def default(layers: dict[str, int]) -> str:
    """The deepest layer of at least 7x7 cells: what is deeper says more, but 4x4 cells of a 32x32 image are coarse."""
    return [name for name, cells in layers.items() if cells >= 7][-1]


def listed(layers: dict[str, int]) -> str:
    """For a person: 'prep (32x32), layer1 (16x16), ...'."""
    return ", ".join(f"{name} ({cells}x{cells})" for name, cells in layers.items())

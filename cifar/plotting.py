"""matplotlib as this project uses it: into memory, whatever backend or style the user has set for other programs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

# MPLBACKEND may name a backend that only notebooks have, or that no longer exists: the import would fail.
_backend = os.environ.pop("MPLBACKEND", None)
import matplotlib as mpl  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend  # for the programs that this one starts

DPI = 100
UInt8 = npt.NDArray[np.uint8]

__all__ = ["DPI", "Figure", "colours", "mpl", "own_style", "pixels"]


@contextmanager
def own_style() -> Iterator[None]:
    """Gives figures that are made and drawn in the block the same look everywhere.

    A matplotlibrc may ask for LaTeX, or for large letters.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        yield


def pixels(figure: Figure) -> UInt8:
    """Draws a figure, [h, w, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


def colours(scale: str, values: npt.NDArray[np.float32]) -> UInt8:
    """Returns the colours [..., 3] of values in 0..1 on one of matplotlib's scales."""
    found: UInt8 = np.rint(255 * np.asarray(mpl.colormaps[scale](values))[..., :3]).astype(np.uint8)
    return found

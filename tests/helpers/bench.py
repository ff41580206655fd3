"""`python -m cifar.bench` on fewer and smaller: a test looks at what is measured, and not at how fast it is."""

import sys
from pathlib import Path
from typing import Any

from cifar.bench import context
from cifar.bench.context import Bench

BATCH = 16


def shrink() -> None:
    """Of the images, the batch and the network that the bench measures; the recipe's others stay."""
    arguments = Bench._arguments

    def smaller(bench: Bench, name: str) -> list[Any]:
        return [*arguments(bench, name), "--network", "whitened", "--global-batch-size", BATCH]

    context.IMAGES.update(train=2_500, test=500)
    Bench._arguments = smaller  # type: ignore[method-assign]
    Bench.batch = BATCH  # type: ignore[method-assign, assignment]


SMALL = (
    f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from helpers.bench import shrink; shrink(); "
    "import runpy; runpy.run_module('cifar.bench', run_name='__main__', alter_sys=True)"
)
BENCH = (sys.executable, "-c", SMALL)

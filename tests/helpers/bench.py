"""`python -m cifar.bench` on fewer and smaller: a test looks at what is measured, and not at how fast it is."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar.bench import context, limit
from cifar.bench.context import Bench
from cifar.bench.interleave import Program

BATCH = 16
SMALL = ("--network", "whitened", "--global-batch-size", str(BATCH))
AUGMENTED = ("ours", "input", "plain")  # augmentation is measured in these; the others skip Albumentations' import
TRAINING = ("cifar.bench.probe", "cifar.bench.plain")


def shrink() -> None:
    """Fewer images, a smaller batch and network, and one shape of matmul; the rest of the recipe stays."""
    start = Program.__init__

    def smaller(program: Program, name: str, command: Sequence[str], *others: Any) -> None:
        words = list(command)
        for module in TRAINING:
            if module in words:
                after = words.index(module) + 1  # first, so that the bench's own flags win
                words[after:after] = [*SMALL, *(() if name in AUGMENTED else ("--augmentation-backend", "device"))]
        start(program, name, words, *others)

    context.IMAGES.update(train=2_500, test=500)
    limit.SHAPES = limit.SHAPES[:1]
    Program.__init__ = smaller  # type: ignore[method-assign]
    Bench.batch = BATCH  # type: ignore[method-assign, assignment]


def command(module: str) -> list[str]:
    """`python -m <module>` of the bench, shrunk."""
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); from helpers.bench import shrink; "
        f"shrink(); import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", script]

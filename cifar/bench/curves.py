"""Test accuracy over training time: several runs in one picture.

Reads each run's metrics.jsonl, of which it needs `seconds` and `test_accuracy`, and `test_accuracy_tta` where it is
there: other programs' runs can be drawn beside this one's.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cifar.errors import Parser, UserError, command_line

LOWEST = 0.5  # lower accuracies last a moment and would take half the figure


class Curve(NamedTuple):
    """A run's evaluations: when each was finished, its accuracy, and the last one's with test-time augmentation."""

    seconds: list[float]
    accuracies: list[float]
    tta: float | None


def read(run: Path) -> Curve:
    """Reads a run's evaluations. Raises UserError where there are none."""
    path = run / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        seconds, accuracies = ([float(line[name]) for line in lines] for name in ("seconds", "test_accuracy"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); name a run's directory") from None
    if not lines:
        raise UserError(f"{path} has no evaluation yet; draw it after the run's first epoch")
    tta = lines[-1].get("test_accuracy_tta", lines[-1].get("test_accuracy_of_views"))  # its earlier name
    return Curve(seconds, accuracies, tta)


def draw(runs: dict[str, list[Curve]]) -> Figure:
    """Draws curves in one colour per name. The legend has the mean final accuracy; a cross marks accuracy with TTA."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, curves) in enumerate(runs.items()):
        colour = f"C{number % 10}"
        label = f"{name}: {_mean([curve.accuracies[-1] for curve in curves])}"
        seen = [curve.tta for curve in curves if curve.tta is not None]
        if seen:
            label += f", {_mean(seen)} with TTA"
        if len(curves) > 1:
            label += f" (mean of {len(curves)})"
        for curve in curves:
            minutes = [seconds / 60 for seconds in curve.seconds]
            axes.plot(minutes, [100 * accuracy for accuracy in curve.accuracies], ".-", color=colour, lw=1, label=label)
            if curve.tta is not None:
                axes.plot(minutes[-1], 100 * curve.tta, "x", color=colour)
            label = "_"  # one legend entry per name
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=100 * LOWEST)
    axes.set_xlabel("minutes of training, evaluations included")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    return figure


def _mean(accuracies: list[float]) -> str:
    return f"{100 * sum(accuracies) / len(accuracies):.2f} %"


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m cifar.bench.curves", allow_abbrev=False, description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="run directories; names that differ only in -seed<number> share a colour")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .svg or .png")
    arguments = parser.parse_args(argv)
    if arguments.output.suffix not in (".svg", ".png"):
        raise UserError(f"--output {arguments.output} is neither .svg nor .png")
    if not arguments.output.absolute().parent.is_dir():
        raise UserError(f"--output {arguments.output}: there is no such folder; make it first")
    return arguments


def main() -> None:
    with command_line("bench"):
        arguments = parse_command_line(sys.argv[1:])
        runs: dict[str, list[Curve]] = {}
        for run in arguments.runs:
            runs.setdefault(re.sub(r"-seed\d+$", "", run.absolute().name), []).append(read(run))
    # Reproducible files: no date, no random ids, and text stays text.
    mpl.rcParams.update({"svg.hashsalt": "cifar", "svg.fonttype": "none", "font.family": "sans-serif"})
    draw(runs).savefig(arguments.output, dpi=120, metadata={"Date": None} if arguments.output.suffix == ".svg" else {})


if __name__ == "__main__":
    main()

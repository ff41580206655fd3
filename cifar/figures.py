"""Pictures of a run: sample images, learning curves, the confusion matrix."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from cifar.run import EpochMetrics

mpl.use("agg")  # files only: there may be no screen


def samples(rows: dict[str, tuple[npt.NDArray[np.uint8], Sequence[str]]]) -> Figure:
    """One strip per entry of `rows`: its title, then its images uint8 [n, height, width, 3] with their class names."""
    count = max(len(images) for images, _ in rows.values())
    across = min(10, count)
    deep = {title: -(-len(images) // across) for title, (images, _) in rows.items()}
    figure = Figure(figsize=(across * 0.95, sum(deep.values()) * 1.15 + 0.4 * len(rows)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(rows), 1, height_ratios=[deep[title] for title in rows], squeeze=False)[:, 0]
    for part, (title, (images, names)) in zip(parts, rows.items(), strict=True):
        part.suptitle(title, fontsize=11)
        for axes in (grid := part.subplots(deep[title], across, squeeze=False)).flat:
            axes.axis("off")
        for axes, image, name in zip(grid.flat, images, names, strict=False):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(name, fontsize=8, pad=2)
    return figure


def curves(epochs: Sequence[EpochMetrics]) -> Figure:
    """Loss, accuracy and learning rate over the epochs."""
    figure = Figure(figsize=(12, 3.6), dpi=100, layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    x = [metrics.epoch for metrics in epochs]
    for axes, field, title, percent in ((loss, "loss", "loss", 1), (accuracy, "accuracy", "accuracy, %", 100)):
        for split, style in (("train", "--"), ("test", "-")):
            values = [percent * getattr(metrics, f"{split}_{field}") for metrics in epochs]
            axes.plot(x, values, style, marker="o", markersize=3, label=split)
        axes.set_title(title)
        axes.legend(frameon=False)
    rate.plot(x, [metrics.learning_rate for metrics in epochs], marker="o", markersize=3)
    rate.set_title("learning rate")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if epochs:
        accuracy.set_title(f"accuracy, % (test {100 * epochs[-1].test_accuracy:.2f} at the end)")
    return figure


def confusion(matrix: npt.NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Counts by true class (rows) and predicted class (columns); the colour scale is that of the mistakes."""
    count = len(classes)
    side = max(4.0, 0.62 * count + 1.8)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.subplots()
    mistakes = np.where(np.eye(count, dtype=bool), 0, matrix)
    axes.imshow(np.ma.masked_array(mistakes, np.eye(count, dtype=bool)), cmap="cividis")
    for (row, column), number in np.ndenumerate(matrix):
        dark = row != column and number < mistakes.max() / 2
        axes.text(column, row, str(number), ha="center", va="center", fontsize=9,
                  color="white" if dark else "black", weight="bold" if row == column else "normal")  # fmt: skip
    axes.set_xticks(range(count), classes, rotation=45, ha="right")
    axes.set_yticks(range(count), classes)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    return figure

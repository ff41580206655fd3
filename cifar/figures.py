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
    # One picture and some words for each strip: with axes for each image matplotlib takes seconds.
    across = min(10, max(len(images) for images, _ in rows.values()))
    strips = {title: _strip(images, across) for title, (images, _) in rows.items()}
    pixel, head = 3 / 100, 0.4  # inches
    inches = {title: head + pixel * strip.shape[0] for title, (strip, _) in strips.items()}
    top = height = sum(inches.values())
    figure = Figure(figsize=(pixel * max(strip.shape[1] for strip, _ in strips.values()), height), dpi=100)
    for title, (_, names) in rows.items():
        strip, places = strips[title]
        figure.text(0.5, (top - head / 2) / height, title, fontsize=11, ha="center", va="center")
        axes = figure.add_axes((0, (top - inches[title]) / height, 1, (inches[title] - head) / height))
        axes.axis("off")
        axes.imshow(strip, interpolation="nearest", aspect="auto")
        for (x, y), name in zip(places, names, strict=True):
            axes.text(x, y, name, fontsize=8, ha="center", va="bottom")
        top -= inches[title]
    return figure


def _strip(images: npt.NDArray[np.uint8], across: int) -> tuple[npt.NDArray[np.uint8], list[tuple[float, float]]]:
    """The images side by side on white, and where the middle of each one's name goes, above it."""
    high, wide = images.shape[1:3]
    right, down = wide + 4, high + 12
    strip = np.full((-(-len(images) // across) * down, across * right, 3), 255, dtype=np.uint8)
    places = []
    for number, image in enumerate(images):
        x, y = number % across * right + 2, number // across * down + 10
        strip[y : y + high, x : x + wide] = image
        places.append((x + wide / 2 - 0.5, y - 2.0))
    return strip, places


def curves(epochs: Sequence[EpochMetrics]) -> Figure:
    """Loss, accuracy and learning rate over the epochs."""
    figure = Figure(figsize=(12, 3.6), dpi=100)
    # Drawn after every epoch: a layout that matplotlib finds by itself takes as long as the drawing.
    loss, accuracy, rate = figure.subplots(1, 3, gridspec_kw={"left": 0.045, "right": 0.99, "bottom": 0.14, "top": 0.9})
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

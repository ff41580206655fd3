"""Figures of a run (samples, learning curves, confusion matrix), and the panels that they are composed of."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from cifar import lettering, plotting
from cifar.lettering import LINE, Labels, Line
from cifar.run import EpochMetrics

UInt8 = npt.NDArray[np.uint8]
Strips = Mapping[str, tuple[UInt8, Sequence[int]]]  # images [n, height, width, 3] and their classes, by title

GAP = 12  # pixels between panels
SMALL = 3  # times that a sample is enlarged
MOST_NUMBERS = 20  # classes; of more, the cells of a confusion matrix have no number in them
SIDE = 1000  # pixels of a confusion matrix of many classes


# ---- panels: pictures under their lines of text, on white


def enlarged(array: UInt8, factor: int) -> UInt8:
    """Returns the picture [h, w, 3] with every pixel as a square of factor x factor."""
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def panel(picture: UInt8, lines: Sequence[Line]) -> UInt8:
    """Draws a picture under lines that are cut where they are wider than it."""
    height, width = picture.shape[:2]
    image = Image.new("RGB", (width, LINE * len(lines) + 3 + height), "white")
    for number, line in enumerate(lines):
        lettering.write(image, (0, LINE * number), lettering.fitting(line, width))
    image.paste(Image.fromarray(picture), (0, LINE * len(lines) + 3))
    return np.asarray(image)


def beside(panels: Sequence[UInt8]) -> UInt8:
    """Puts panels in a row, their lower edges level."""
    height = max(len(panel) for panel in panels)
    parts = [np.full((height, GAP, 3), 255, np.uint8)]
    for panel in panels:
        above = np.full((height - len(panel), panel.shape[1], 3), 255, np.uint8)
        parts += [np.concatenate((above, panel)), parts[0]]
    return np.concatenate(parts, axis=1)


def below(title: Line, rows: Sequence[UInt8]) -> UInt8:
    """Puts rows under each other, under a title."""
    width = max([lettering.length(title) + 2 * GAP, *(row.shape[1] for row in rows)])
    head = Image.new("RGB", (width, LINE + 2 * GAP), "white")
    lettering.write(head, (GAP, GAP), title)
    padded = [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([np.asarray(head), *padded])


def png(picture: UInt8) -> bytes:
    """Encodes a picture [h, w, 3] as a file."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", dpi=(plotting.DPI, plotting.DPI))
    return content.getvalue()


# ---- pictures


def samples(strips: Strips, classes: Sequence[str]) -> UInt8:
    """Draws one strip per entry of `strips`, under its title."""
    labels, rows = Labels(classes), []
    for title, (images, numbers) in strips.items():
        names = labels.fitted(SMALL * images.shape[2])
        panels = [panel(enlarged(image, SMALL), [names[number]]) for image, number in zip(images, numbers, strict=True)]
        lines = [beside(panels[start : start + 10]) for start in range(0, len(panels), 10)]
        rows.append(below(lettering.of(title), lines))
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )


def curves(epochs: Sequence[EpochMetrics], label_smoothing: float) -> UInt8:
    """Draws loss, accuracy and learning rate over the epochs; only the training loss uses label smoothing."""
    with plotting.own_style():
        figure = plotting.Figure(figsize=(12, 3.6), dpi=plotting.DPI)
        # Drawn after every epoch: a layout that matplotlib finds by itself takes as long as the drawing.
        loss, accuracy, rate = figure.subplots(
            1, 3, gridspec_kw={"left": 0.045, "right": 0.99, "bottom": 0.14, "top": 0.9}
        )
        x = [metrics.epoch for metrics in epochs]
        smoothed = {"train": f", label smoothing {label_smoothing:g}", "test": ", without"} if label_smoothing else {}
        for axes, field, title, percent in ((loss, "loss", "loss", 1), (accuracy, "accuracy", "accuracy, %", 100)):
            for split, style in (("train", "--"), ("test", "-")):
                values = [percent * getattr(metrics, f"{split}_{field}") for metrics in epochs]
                label = split + (smoothed.get(split, "") if axes is loss else "")
                axes.plot(x, values, style, marker="o", markersize=3, label=label)
            axes.set_title(title)
            axes.legend(frameon=False)
        rate.plot(x, [metrics.learning_rate for metrics in epochs], marker="o", markersize=3)
        rate.set_title("learning rate")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))  # short: there is no room for 0.00175
        for axes in (loss, accuracy, rate):
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        if epochs:
            accuracy.set_title(f"accuracy, % (test {100 * epochs[-1].test_accuracy:.2f} at the end)")
        return plotting.pixels(figure)


def confusion_matrix(labels: npt.NDArray[Any], predicted: npt.NDArray[Any], classes: int) -> npt.NDArray[np.int64]:
    """Returns [C, C] counts by true (rows) and predicted class (columns)."""
    pairs = labels.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def confusion(matrix: npt.NDArray[np.int64], classes: Sequence[str]) -> UInt8:
    """Draws counts by true class (rows) and predicted class (columns); colours are scaled to the mistakes.

    Up to MOST_NUMBERS classes, cells contain their counts. With more, cells shrink, and once they are less tall than a
    line of text only every 2nd, 5th, ... class is labelled: the size of the figure stays bounded.
    """
    count = len(classes)
    mistakes = np.where(np.eye(count, dtype=bool), 0, matrix)
    most = int(mistakes.max())
    coloured = plotting.colours("cividis", (mistakes / max(1, most)).astype(np.float32))
    coloured[np.eye(count, dtype=bool)] = 255
    cell = 56 if count <= MOST_NUMBERS else max(1, SIDE // count)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell >= LINE)
    names = Labels(classes).fitted(160)[::every]
    margin = GAP + LINE + GAP + max(map(lettering.length, names))  # an axis' title, and the names

    side, top = cell * count, LINE + GAP
    scale = lettering.of(f"dark blue: no mistakes, yellow: {most:,}; white: correct" if most else "no mistakes")
    width = max(margin + side + GAP, lettering.length(scale) + 2 * GAP)
    image = Image.new("RGB", (width, top + side + margin), "white")
    lettering.write(image, (GAP, 4), scale)
    image.paste(Image.fromarray(enlarged(coloured, cell)), (margin, top))
    if count <= MOST_NUMBERS:
        for (row, column), number in np.ndenumerate(matrix):
            middle = margin + (column + 0.5) * cell, top + (row + 0.5) * cell
            dark = coloured[row, column] @ (0.299, 0.587, 0.114) < 128
            lettering.write_centred(image, middle, str(number), "white" if dark else "black")
    ticks = _tick_labels(names, every * cell, (margin - GAP - LINE, side + LINE))
    over = (LINE - cell) // 2  # a cell may be less tall than its name
    image.paste(ticks, (GAP + LINE, top - over))
    image.paste(ticks.transpose(Image.Transpose.ROTATE_90), (margin - over, top + side))
    title = _axis_title("true class")
    image.paste(title.transpose(Image.Transpose.ROTATE_90), (GAP, max(0, top + (side - title.width) // 2)))
    title = _axis_title("predicted class")
    image.paste(title, (max(0, margin + (side - title.width) // 2), top + side + margin - GAP - LINE))
    return np.asarray(image)


def _tick_labels(names: Sequence[Line], step: int, size: tuple[int, int]) -> Image.Image:
    """Draws right-aligned names, one every `step` pixels."""
    image = Image.new("RGB", size, "white")
    for number, name in enumerate(names):
        lettering.write(image, (image.width - 4 - lettering.length(name), number * step), name)
    return image


def _axis_title(text: str) -> Image.Image:
    image = Image.new("RGB", (lettering.length(lettering.of(text)), LINE), "white")
    lettering.write(image, (0, 0), lettering.of(text))
    return image

"""Which test images a network gets wrong, which of them are shown, and the list of all of them as a file."""

import csv
import io
import re

import numpy as np

from cifar.errors import UserError
from cifar.explain import label_quality
from cifar.explain.findings import DECIMALS, Findings, Float, Int64, UInt8
from cifar.explain.options import COUNT, ExplainOptions

FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # the last four are the first four, as wide letters

COLUMNS = (
    *("index", "file", "true", "predicted", "confidence", "true_probability", "margin", "top5", "epochs_right"),
    "doubt_rank",
)


def find(probabilities: Float, labels: UInt8) -> Int64:
    """Returns the positions [m] of the wrongly classified images, the most confident first, then by position."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    confidence = probabilities[wrong].max(axis=1).round(DECIMALS)
    return wrong[np.lexsort((wrong, -confidence))]


def choose(wrong: Int64, predictions: UInt8, labels: UInt8, classes: list[str], options: ExplainOptions) -> Int64:
    """Returns the rows of `wrong` (most confident first) that the pictures show, in the order that was asked for.

    Raises UserError where --count asks for more than there are.
    """
    true, predicted = (None if name is None else classes.index(name) for name in (options.true, options.predicted))
    rows = select(labels[wrong], predictions[wrong], true, predicted, options.order, options.seed)
    if options.count is not None and options.count > len(rows):
        raise UserError(f"--count {options.count} is more than the {len(rows)} such mistake(s) there are; give fewer")
    return rows[: options.count or COUNT]


def select(labels: UInt8, predictions: UInt8, true: int | None, predicted: int | None, order: str, seed: int) -> Int64:
    """Returns the rows of the mistakes of a true and a predicted class, if given.

    `labels` and `predictions` [m] are the mistakes', most confident first. `order` is one of ORDERS; `seed` is used by
    `random` alone.
    """
    keep = np.ones(len(labels), bool)
    if true is not None:
        keep &= labels == true
    if predicted is not None:
        keep &= predictions == predicted
    rows = np.flatnonzero(keep)
    if order == "uncertain":
        return rows[::-1]
    return np.random.default_rng(seed).permutation(rows) if order == "random" else rows


def companions(wrong: Int64, probabilities: Float, labels: UInt8) -> tuple[Int64, Int64]:
    """Finds for each mistake a correctly classified image of its true class whose runner-up is the same wrong class.

    Returns positions [k], one for each confused pair of classes: the correct image with the highest probability of the
    runner-up. And, for each mistake, its row in them [m], or -1 where no correct image has that runner-up.
    """
    ranking = np.argsort(-probabilities, axis=1, kind="stable")
    correct = np.flatnonzero(ranking[:, 0] == labels)
    runner_up = probabilities[correct, ranking[correct, 1]]
    best: dict[tuple[int, int], int] = {}
    for image in correct[np.argsort(runner_up, kind="stable")]:  # the last of each pair stays
        best[int(ranking[image, 0]), int(ranking[image, 1])] = int(image)
    wanted = [(int(labels[image]), int(ranking[image, 0])) for image in wrong]
    pairs = sorted(set(wanted) & best.keys())
    row = {pair: number for number, pair in enumerate(pairs)}
    positions = np.array([best[pair] for pair in pairs], np.int64)
    return positions, np.array([row.get(pair, -1) for pair in wanted], np.int64)


def guarded(text: str) -> str:
    """Returns a text for a CSV cell, with an apostrophe before what a spreadsheet would read as a formula.

    To read it back, remove the apostrophe if what follows would get one.
    """
    return f"'{text}" if FORMULA.match(text) else text


def table(findings: Findings) -> bytes:
    """Returns misclassified.csv: a line for each mistake, the most confident first. The margin is one of logits.

    `top5` and `epochs_right` are lists within a field, separated by "; " and by spaces. Names are `guarded`.
    `doubt_rank` is empty where the label is not in doubt.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    shown, names, doubts = findings.mistakes, findings.classes, label_quality.measure(findings)
    for row, image in enumerate(shown.indices):
        probabilities, true = findings.probabilities[image], int(findings.labels[image])
        predicted = int(probabilities.argmax())
        top = np.argsort(-probabilities, kind="stable")[:5]
        right = findings.epochs[findings.epoch_predictions[:, image] == true]
        lines.writerow([
            int(image),
            guarded(shown.files[row]) if shown.files else "",
            guarded(names[true]),
            guarded(names[predicted]),
            f"{probabilities[predicted]:.{DECIMALS}f}",
            f"{probabilities[true]:.{DECIMALS}f}",
            f"{shown.margins[row]:.{DECIMALS}f}",
            guarded("; ".join(f"{names[number]} {probabilities[number]:.{DECIMALS}f}" for number in top)),
            " ".join(str(epoch) for epoch in right),
            doubts.rank[row] or "",
        ])  # fmt: skip
    return text.getvalue().encode(errors="backslashreplace")  # a file's name need not be UTF-8

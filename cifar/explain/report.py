"""The page: every mistake of a run in one HTML file that needs no network.

Python ships numbers (base64 of typed arrays) and one sprite of all pictures; `report.js` colours and filters them, so
that opacity, class, difference and scale change at once. The template, the script and the style sheet are the files
`report.html.j2`, `report.js` and `report.css` beside this module.
"""

import base64
import hashlib
import io
import math
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from cifar import names, plotting
from cifar.explain import calibration, label_quality, wording
from cifar.explain.calibration import BINS, Reliability
from cifar.explain.figures import confusion_matrix
from cifar.explain.findings import (
    ALIKE,
    EQUAL,
    FLIPS,
    STANDS_OUT,
    ExplainedImages,
    Findings,
    Flip,
    Neighbours,
    Robustness,
    UInt8,
)
from cifar.explain.maps import OF_NO_CLASS

MATRIX_CLASSES = 30  # a larger confusion matrix cannot be read; the rest is reached through the filters

# The page stays under 15 MB whatever the network: base64 adds a third to these.
LOSSLESS_BYTES = 6_000_000  # a larger sprite of mistakes is compressed with loss, and the page says so
MAP_BYTES = 3_000_000  # maps of the most confident mistakes; the rest are left out, and the page says so
LOSSES = 5  # colours of the table of corrupted images
NEIGHBOUR_PICTURES = 10_000  # different training pictures; fewer neighbours of each mistake are shown if there are more

Array = npt.NDArray[Any]


def render(findings: Findings) -> str:
    """Returns the page as text."""
    package = resources.files("cifar.explain")
    parts = ["report", *(["corruptions"] if findings.robustness else [])]
    script = "".join(package.joinpath(f"{part}.js").read_text(encoding="utf-8") for part in parts)
    style = "".join(package.joinpath(f"{part}.css").read_text(encoding="utf-8") for part in parts)
    count, reliability = len(findings.labels), calibration.measure(findings)
    sprite, lossless = _sprite(_joined(findings.mistakes.pictures, findings.companions.pictures))
    nearest = _neighbours(findings.neighbours) if findings.neighbours else None
    template = wording.templates("cifar.explain").get_template("report.html.j2")
    return template.render(
        findings=findings,
        count=count,
        mistakes=len(findings.mistakes.indices),
        accuracy=findings.accuracy,
        interval=[float(end) for end in calibration.wilson(np.array(findings.accuracy), np.array(count))],
        metadata=findings.metadata,
        checks=_checks(findings.checks),
        corruption=_corruption(findings, findings.robustness) if findings.robustness else None,
        pairs=_pairs(findings),
        expected_error=reliability.error,
        bins=BINS,
        of_no_class=findings.method in OF_NO_CLASS,
        most_classes=MATRIX_CLASSES,
        correlations={"equal": EQUAL, "alike": ALIKE, "part": round(1 / STANDS_OUT)},
        doubtful=label_quality.LEAST,
        lossless=lossless,
        data={**_data(findings, reliability), "nearest": nearest, **_flip_pictures(findings.robustness)},
        sprite=sprite,
        # Markup: trusted text; the content security policy allows exactly these hashes.
        script=Markup(script),
        style=Markup(style),
        script_hash=_hash(script),
        style_hash=_hash(style),
    )


def _data(findings: Findings, reliability: Reliability) -> dict[str, Any]:
    """Returns what the script reads. Rows are the mistakes followed by the companions."""
    shown, companions = findings.mistakes, findings.companions
    mistakes, cells = len(shown.indices), shown.maps.shape[2] * shown.maps.shape[3]
    confidences = findings.probabilities.max(axis=1)
    mapped = min(mistakes, MAP_BYTES // (2 * max(1, cells)))
    maps = _joined(shown.maps[:mapped], companions.maps)
    tops = maps.max(axis=(2, 3), initial=0)
    levels = np.rint(255 * maps / np.where(tops > 0, tops, 1)[:, :, None, None])
    doubts = label_quality.measure(findings)
    wrong = np.array([findings.wrong_in[run][shown.indices] for run in findings.wrong_in], dtype=np.uint8)
    arrays = {
        "labels": _packed(findings.labels, "uint8"),
        "predictions": _packed(findings.predictions, "uint8"),
        "confidences": _packed(confidences, "float32"),
        "index": _packed(_joined(shown.indices, companions.indices), "int32"),
        "bin": _packed(calibration.bin_of(confidences[shown.indices]), "uint8"),
        "probabilities": _packed(findings.probabilities[shown.indices], "float32"),
        "history": _packed(findings.epoch_predictions[:, shown.indices], "uint8"),
        "companion": _packed(findings.companion_of, "int32"),
        "wrong": _packed(wrong, "uint8"),
        "doubt": _packed(doubts.doubt, "float32"),
        "doubtRank": _packed(doubts.rank, "int32"),
        "doubtParts": _packed(np.stack(list(doubts.parts.values())), "float32"),
        "levels": _packed(levels, "uint8"),  # of each map's maximum: as fine as the 256 colours that show it
        "tops": _packed(tops, "float32"),
        **{
            name: _packed(_joined(getattr(shown, name), getattr(companions, name)), kind)
            for name, kind in (("targets", "uint8"), ("peaks", "float32"), ("votes", "float32"), ("bias", "float32"))
        },
        "margins": _packed(_joined(shown.margins, companions.margins), "float32"),
        "unsigned": _packed(_colours("viridis", 256), "uint8"),
        "signed": _packed(_colours("RdBu_r", 255), "uint8"),  # odd: the middle one is zero's, and neutral
    }
    return {
        "classes": findings.classes,
        "names": names.on_pages(findings.classes),
        "matrixClasses": _most_confused(findings),
        "mistakes": mistakes,
        "mapped": mapped,
        "files": shown.files,
        "epochs": findings.epochs.tolist(),
        "runs": list(findings.wrong_in),
        "doubtParts": list(doubts.parts),
        "doubtful": label_quality.LEAST,
        "usual": label_quality.thresholds(findings.probabilities, findings.labels).tolist(),
        "side": shown.pictures.shape[1],
        "spriteColumns": _columns(mistakes + len(companions.indices)),
        "mapShape": list(shown.maps.shape[2:]),
        "mapCells": shown.map_grid.of_pixels().tolist(),
        "voteSpans": shown.vote_grid.spans(),
        "voteStride": shown.vote_grid.stride,
        "voteShape": list(shown.votes.shape[1:]),
        "pageTop": float(tops[:mapped].max(initial=0)),  # of the mistakes; a companion above it shows the last colour
        "pageDifference": float(np.abs(maps[:mapped, 0] - maps[:mapped, 1]).max(initial=0)),
        "ofNoClass": findings.method in OF_NO_CLASS,
        "bins": _bin_values(reliability),
        "identity": _identity(findings, shown),
        "arrays": arrays,
    }


def _joined(mistakes: Array, companions: Array) -> Array:
    """Concatenates both; an empty array may have another shape."""
    return np.concatenate([mistakes, companions]) if len(companions) and len(mistakes) else mistakes


def _identity(findings: Findings, shown: ExplainedImages) -> str:
    """Returns an id of these mistakes, so that a browser's verdicts on one page never appear on another."""
    parts = (shown.indices, findings.labels[shown.indices], findings.predictions[shown.indices])
    classes = "/".join(findings.classes).encode(errors="surrogatepass")
    return hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts) + classes).hexdigest()[:16]


def _neighbours(neighbours: Neighbours) -> dict[str, Any]:
    """Returns the nearest training images. A picture that is near to many mistakes is shipped once."""
    depth = neighbours.indices.shape[1]
    while depth > 1 and len(np.unique(neighbours.indices[:, :depth])) > NEIGHBOUR_PICTURES:
        depth -= 1
    indices = neighbours.indices[:, :depth]
    unique, first, slot = np.unique(indices, return_index=True, return_inverse=True)
    pictures = neighbours.pictures[:, :depth].reshape(-1, *neighbours.pictures.shape[2:])[first]
    sprite, _ = _sprite(pictures, lossless=False)
    return {
        "sprite": sprite,
        "spriteColumns": _columns(len(unique)),
        "depth": depth,
        "found": neighbours.indices.shape[1],
        "compared": neighbours.nearest_labels.shape[1],
        "nearDuplicates": neighbours.near_duplicates.tolist(),
        "arrays": {
            "slot": _packed(slot, "int32"),
            "index": _packed(indices, "int32"),
            "labels": _packed(neighbours.labels[:, :depth], "uint8"),
            "distances": _packed(neighbours.distances[:, :depth], "float32"),
        },
    }


def _columns(count: int) -> int:
    """Returns the columns of a nearly square sprite: WebP ends at 16,383 pixels a side."""
    return max(1, math.ceil(math.sqrt(count)))


def _sprite(pictures: UInt8, lossless: bool = True) -> tuple[str, bool]:
    """Returns all pictures [k, side, side, 3] in one WebP, row by row, as base64; and whether it is lossless."""
    count, height, width = pictures.shape[:3]
    columns = _columns(count)
    rows = max(1, -(-count // columns))
    padded = np.zeros((rows * columns, height, width, 3), np.uint8)
    padded[:count] = pictures
    image = Image.fromarray(
        padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    )
    if lossless:
        content = _webp(image, lossless=True, quality=0, method=0)  # a tenth of the default's time, 11 % larger
        if len(content) <= LOSSLESS_BYTES:
            return base64.b64encode(content).decode(), True
    return base64.b64encode(_webp(image, lossless=False, quality=85, method=2)).decode(), False


def _webp(image: Image.Image, **options: bool | int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return buffer.getvalue()


def _packed(values: Array, kind: str) -> dict[str, str]:
    """Returns a typed array for the script: little-endian, C order."""
    content = np.ascontiguousarray(values, np.dtype(kind).newbyteorder("<")).tobytes()
    return {"type": kind, "base64": base64.b64encode(content).decode()}


def _colours(name: str, count: int) -> UInt8:
    """Returns [count, 3] colours of a matplotlib scale."""
    return plotting.colours(name, np.linspace(0, 1, count, dtype=np.float32))


def _most_confused(findings: Findings) -> list[int]:
    """Returns the classes that the matrix shows: those with most mistakes, in their order."""
    matrix = confusion_matrix(findings)
    involved = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * matrix.diagonal()
    return sorted(np.argsort(-involved, kind="stable")[:MATRIX_CLASSES].tolist())


def _pairs(findings: Findings) -> list[tuple[str, str, int]]:
    """Returns the most frequent confusions (true, predicted, count), for readers without JavaScript."""
    matrix = confusion_matrix(findings)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:10]
    cells = [(int(cell) // len(matrix), int(cell) % len(matrix)) for cell in order]
    shown = names.on_pages(findings.classes)
    pairs = [(shown[row], shown[column], int(matrix[row, column])) for row, column in cells]
    return [pair for pair in pairs if pair[2]]


def _bin_values(reliability: Reliability) -> list[dict[str, float]]:
    """Returns what the calibration diagram shows of each bin, over all test images."""
    columns = (values.tolist() for values in reliability)
    return [dict(zip(Reliability._fields, bin_, strict=True)) for bin_ in zip(*columns, strict=True)]


def _checks(checks: dict[str, float | int]) -> list[tuple[str, list[str]]]:
    """Returns the metrics of --check as table lines: name, then for mistakes and for correct images "mean ± spread".

    Each baseline follows the metric it belongs to.
    """
    groups = ("mistakes", "correct")
    names = dict.fromkeys(name.partition("_")[2] for name in checks if name.startswith(groups))  # in order, once each
    metrics = [name for name in names if not name.endswith("_sd")]
    baselines = {f"{name}_shuffled" for name in metrics}
    lines = []
    for metric in (name for name in metrics if name not in baselines):
        for name in (metric, f"{metric}_shuffled"):
            if name in metrics:
                values = [
                    _mean_and_spread(checks.get(f"{group}_{name}"), checks.get(f"{group}_{name}_sd"))
                    for group in groups
                ]
                lines.append((name.replace("_", " "), values))
    return lines


def _mean_and_spread(value: float | None, spread: float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not defined"
    text = f"{value:.3f}".replace("-", "\u2212")
    return text + (f" ± {spread:.3f}" if spread is not None and math.isfinite(spread) else "")


def _corruption(findings: Findings, found: Robustness) -> dict[str, Any]:
    """Returns what the section on corrupted images shows: curves, table, captions of the pictures that flip first."""
    runs = names.readable(found.runs)
    places = np.linspace(30, 142, 1 + found.accuracy.shape[2]).tolist()  # of severities, 0 first, in the drawing
    kinds = [
        {
            "name": kind.replace("_", " "),
            "lines": [
                {**_corruption_line(run, clean, values, places), "look": _look(number)}
                for number, (run, clean, values) in enumerate(zip(runs, found.clean, of_runs, strict=True))
            ],
            "flips": [_caption(findings, number, flip) for number, flip in enumerate(found.flips) if flip.kind == kind],
        }
        for kind, of_runs in zip(found.kinds, found.accuracy.swapaxes(0, 1), strict=True)
    ]
    means, worst = found.means, found.worst
    return {
        "kinds": kinds,
        "mean": _tenths(means[0].mean()),
        "clean": _tenths(found.clean[0]),
        "worst": f"{kinds[worst]['name']}, {_tenths(means[0, worst])} %",
        "runs": [
            {"name": run, "mean": _tenths(mean), "clean": _tenths(clean), "look": _look(number)}
            for number, (run, mean, clean) in enumerate(zip(runs, means.mean(axis=1), found.clean, strict=True))
        ],
        "severities": range(1, len(places)),
        "grid": [(level, _height(level / 100)) for level in (0, 50, 100)],
        "places": places,
        "most": FLIPS,
    }


def _look(number: int) -> str:
    """Returns the classes of a run's curve: its colour and its stroke, four of each.

    The first 16 runs all look different.
    """
    return f"colour-{number % 4} stroke-{(number + number // 4) % 4}"


def _corruption_line(run: str, clean: float, values: Array, places: list[float]) -> dict[str, Any]:
    """Returns a run's curve and table cells under one corruption."""
    return {
        "run": run,
        "points": " ".join(f"{x:.1f},{_height(y):.1f}" for x, y in zip(places, [clean, *values], strict=True)),
        "cells": [{"text": _tenths(value), "lost": _lost(value, clean)} for value in (*values, values.mean())],
    }


def _caption(findings: Findings, number: int, flip: Flip) -> dict[str, Any]:
    """Returns the caption of the `number`th picture that flips, and its places in `_flip_pictures`."""
    shown = names.on_pages(findings.classes)
    return {
        "severity": flip.severity,
        "image": flip.image,
        "true": shown[findings.labels[flip.image]],
        "predicted": shown[flip.predicted],
        "confidence": wording.percent(flip.confidence),
        "clean": 2 * number,
        "corrupted": 2 * number + 1,
    }


def _tenths(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _height(accuracy: float) -> float:
    """Returns the y coordinate of an accuracy in a drawing of height 88."""
    return 74 - 68 * accuracy


def _lost(accuracy: float, clean: float) -> int:
    """Returns how much of an accuracy is lost, from 0 to LOSSES - 1."""
    return min(LOSSES - 1, max(0, math.floor(LOSSES * (1 - accuracy / clean)))) if clean else 0


def _flip_pictures(found: Robustness | None) -> dict[str, Any]:
    """Returns the pictures that flip first, each followed by itself corrupted."""
    if found is None:
        return {}
    pictures = [picture for flip in found.flips for picture in (flip.clean, flip.picture)]
    stacked = np.stack(pictures) if pictures else np.zeros((0, 32, 32, 3), np.uint8)
    return {"flips": {"sprite": _sprite(stacked)[0], "spriteColumns": _columns(len(pictures))}}


def _hash(text: str) -> str:
    """Returns the source that a content security policy allows for exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

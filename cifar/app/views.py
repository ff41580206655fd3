"""What the app shows, as HTML: the macros of `views.html.j2`, and the same answers as plain numbers."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar import names, recipes, summary
from cifar.app.content import AppContent, EvaluatedImages
from cifar.app.engine import Answer, Engine, Heatmap, Votes
from cifar.explain import figures, wording
from cifar.explain.findings import Float, UInt8
from cifar.explain.layers import SIDE
from cifar.explain.maps import OF_NO_CLASS
from cifar.figures import png

DIGITS = 6  # decimals of the numbers; float32 has about as many


@dataclass(frozen=True)
class Mistake:
    """A test image that the network got wrong."""

    index: int
    pixels: UInt8  # [32, 32, 3]
    true: int
    predicted: int  # by the run itself, in the precision that it was trained with
    probabilities: Float  # [C], the run's own
    target: int  # the class that the map is for
    heatmap: Heatmap | None = None  # None: no map was asked for
    now: int | None = None  # the class that the network predicts here, in float32


def _uri(pixels: UInt8) -> str:
    """Returns a picture [h, w, 3] as a data: URI, lossless."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def _vote_text(votes: Votes, vote: float) -> str:
    """Returns a signed vote in at most five characters, with the same decimals in all cells of a map."""
    largest = float(np.abs(votes.cells).max())
    return f"{vote:+.{2 if largest < 9.995 else 1 if largest < 99.95 else 0}f}"


def _vote_style(votes: Votes, down: int, across: int) -> str:
    """Returns CSS size and colours of a vote's cell: background, and black or white text, whichever contrasts more."""
    limit = float(np.abs(votes.cells).max())
    colour = figures.coloured(votes.cells, limit, signed=True)[down, across]
    linear = np.where(colour <= 10, colour / 3294.6, ((colour / 255 + 0.055) / 1.055) ** 2.4)  # sRGB's definition
    dark = linear @ (0.2126, 0.7152, 0.0722) < 0.179  # where white and black have the same contrast (WCAG), 4.6
    height, width = (_long(votes.grid.spans()[cell][1]) for cell in (down, across))
    size = f"width: {width}; height: {height}"
    return f"{size}; background: rgb({' '.join(map(str, colour))}); color: {'white' if dark else 'black'}"


def _votes_style(votes: Votes) -> str:
    """Returns the CSS that lays a table of votes in its square as the cells lie on the picture."""
    (before, _), (start, pixels) = votes.grid.spans()[0], votes.grid.spans()[-1]
    return f"width: {_long(start + pixels - before)}; margin: {_long(before)} 0 0 {_long(before)}"


def _long(pixels: int) -> str:
    """Returns the CSS length of so many pixels of a picture."""
    return f"calc(var(--tile) * {pixels / SIDE})"


_environment = wording.templates("cifar.app")
_environment.globals |= {
    "uri": _uri,
    "overlay": figures.overlay,
    "of_no_class": OF_NO_CLASS,
    "vote_style": _vote_style,
    "votes_style": _votes_style,
    "vote_text": _vote_text,
    "ramp": figures.coloured(np.linspace(0, 1, 128, dtype=np.float32)[None], 1),
}
_macros: Any = _environment.get_template("views.html.j2").module


def hint(text: str) -> str:
    return str(_macros.hint(text))


def problem(text: str) -> str:
    return str(_macros.problem(f"{text[:1].upper()}{text[1:]}."))


def examples(evaluated: EvaluatedImages, classes: list[str]) -> str:
    """Returns a button with each picture and its class."""
    rows, shown = zip(evaluated.indices, evaluated.pixels, evaluated.labels, strict=True), names.on_pages(classes)
    return str(_macros.tiles([{"index": int(i), "pixels": p, "name": shown[label]} for i, p, label in rows]))


def answer(given: Answer, engine: Engine, top: int) -> str:
    """Returns the picture as the network sees it, bars of its `top` classes, maps and votes."""
    return str(_macros.answer(given, names.on_pages(engine.run.classes), top, engine.layers))


def mistakes(rows: list[Mistake], classes: list[str], sentence: str, method: str) -> str:
    """Returns a button with each mistake, its map over it, true and predicted class."""
    return str(_macros.mistakes(rows, names.on_pages(classes), sentence, method not in OF_NO_CLASS))


def about(content: AppContent, engine: Engine) -> str:
    """Describes the network, how it was trained, and what it cannot do."""
    run = engine.run
    described = {name: field.description for name, field in recipes.Recipe.model_fields.items()}
    rows = summary.rows(engine.network)
    classes = names.on_pages(run.classes)
    recipe = {**run.recipe, "data": Path(run.recipe["data"]).name}  # visitors need not know where it lies
    return str(_macros.about(content.metadata, classes, content.right, rows, recipe, described))


def answer_numbers(given: Answer, engine: Engine, top: int) -> dict[str, Any]:
    """Returns an answer for programs: everything that the page shows."""
    classes, votes = engine.run.classes, given.votes
    return {
        "top": [{"class": classes[n], "probability": _rounded(given.probabilities[n])} for n in given.ranking[:top]],
        "map for": classes[given.target],
        "method": given.method,
        "maps": [{"layer": heatmap.layer, **_map(heatmap)} for heatmap in given.heatmaps],
        "votes": votes
        and {
            "layer": votes.layer,
            "for": classes[votes.target],
            "against": classes[votes.against],
            "cells": _rounded(votes.cells),
            "sum": _rounded(votes.cells.sum()),
            "bias": _rounded(votes.bias),
            "margin": _rounded(votes.margin),
        },
    }


def _map(heatmap: Heatmap) -> dict[str, Any]:
    return {"cells": len(heatmap.map), "raw maximum": _rounded(heatmap.peak), "map": _rounded(heatmap.map)}


def _rounded(values: Float | np.floating[Any] | float) -> Any:
    return np.asarray(values, np.float64).round(DIGITS).tolist()


def mistake_numbers(rows: list[Mistake], classes: list[str]) -> list[dict[str, Any]]:
    """Returns mistakes for programs: everything that the page shows."""
    return [
        {
            "index": row.index,
            "true": classes[row.true],
            "predicted": classes[row.predicted],
            "probabilities": dict(zip(classes, _rounded(row.probabilities), strict=True)),
            "map for": classes[row.target],
            **(_map(row.heatmap) if row.heatmap else {}),
        }
        for row in rows
    ]

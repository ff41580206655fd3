"""Request handlers: from the values that a browser sends to HTML, and the same answer as plain values.

Nothing here depends on Gradio. Inputs are untrusted; invalid ones raise UserError.
"""

import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cifar import names
from cifar.app import validation, views
from cifar.app.content import AppContent
from cifar.app.engine import Engine
from cifar.app.gate import lies_in
from cifar.app.views import Mistake
from cifar.data import pictures
from cifar.errors import UserError
from cifar.explain import figures, mistakes, wording
from cifar.explain.findings import Int64, UInt8
from cifar.explain.maps import METHODS
from cifar.explain.options import ORDERS
from cifar.figures import enlarged

MOST = 60  # mistakes on the page at once
PREDICTED, TRUE, NO_MAP, ANY = "(predicted)", "(true)", "(no map)", "(any)"  # among classes: see `distinct`
HINT = "Upload, paste or photograph a picture, or choose one of the test images."

Response = tuple[str, Any]  # HTML, and the same as plain values


def distinct(word: str, classes: list[str]) -> str:
    """Returns `word`, in additional brackets while a class has, or is displayed with, the same name."""
    taken = {*classes, *(unicodedata.normalize("NFKC", name) for name in names.on_pages(classes))}
    while word in taken:
        word = f"({word})"
    return word


@dataclass(frozen=True)
class Handlers:
    """The answers of one network; `uploads` is the only folder whose files are read."""

    engine: Engine
    content: AppContent
    uploads: Path

    @cached_property
    def any_class(self) -> str:
        """The choice for 'all classes' in a list of class names."""
        return distinct(ANY, self.engine.run.classes)

    @cached_property
    def predicted_class(self) -> str:
        """The choice for 'the predicted class' in a list of class names."""
        return distinct(PREDICTED, self.engine.run.classes)

    def classify(self, picture: Any, top: Any, maps: Any, map_for: Any, method: Any, layers: Any) -> Response:
        """Classifies a picture: classes with their probabilities, maps and votes."""
        if picture is None:
            return views.hint(HINT), None
        classes, known = self.engine.run.classes, list(self.engine.layers)
        top = validation.whole("the number of classes", top, 1, len(classes))
        map_for = validation.one_of("class", map_for, [self.predicted_class, *classes])
        method = validation.one_of("method", method, list(METHODS))
        layers = validation.some_of("layer", layers, known) if validation.switch("the switch", maps) else []
        target = None if map_for == self.predicted_class else classes.index(map_for)
        answer = self.engine.answer(pictures.read(self._uploaded(picture)), target, method, layers)
        return views.answer(answer, self.engine, top), views.answer_numbers(answer, self.engine, top)

    def misclassified(
        self,
        show: Any,
        count: Any,
        true: Any,
        predicted: Any,
        order: Any,
        seed: Any,
        map_for: Any,
        method: Any,
        layer: Any,
    ) -> Response:
        """Test images that the network got wrong, each with its map."""
        if not validation.switch("the switch", show):
            return "", None
        wrong, classes, cells = self.content.mistakes, self.engine.run.classes, self.engine.layers
        count = validation.whole("the number of mistakes", count, 1, MOST)
        true = validation.one_of("true class", true, [self.any_class, *classes])
        predicted = validation.one_of("predicted class", predicted, [self.any_class, *classes])
        order = validation.one_of("order", order, ORDERS)
        seed = validation.whole("seed", seed, 0, 2**32 - 1)
        map_for = validation.one_of("map", map_for, [NO_MAP, PREDICTED, TRUE])
        method = validation.one_of("method", method, list(METHODS))
        layer = validation.one_of("layer", layer, list(cells))
        of_true, of_predicted = (None if name == self.any_class else classes.index(name) for name in (true, predicted))
        found = mistakes.select(wrong.labels, wrong.predictions, of_true, of_predicted, order, seed)
        shown = self._mistakes(found[:count], map_for, method, layer)
        names_shown = names.on_pages(classes)
        chosen = (("true", of_true), ("predicted", of_predicted))
        kind = "".join(f", {word} {names_shown[number]}" for word, number in chosen if number is not None)
        sentence = f"{len(shown)} of {wording.counted(len(found), 'mistake')}{kind}. Choose one to classify it."
        if map_for != NO_MAP:
            sentence += (
                f" Maps: {method} at {layer}, {cells[layer]}x{cells[layer]} cells, each on its own scale from 0 to "
            )
            sentence += "its raw maximum."
        return views.mistakes(shown, classes, sentence, method), views.mistake_numbers(shown, classes)

    def test_image(self, index: Any) -> UInt8:
        """Returns a clicked test image, enlarged by a whole factor: sharp, and the same again once downscaled."""
        index = validation.whole("test image", index, 0, self.content.images - 1)
        for evaluated in (self.content.examples, self.content.mistakes):
            for row in (evaluated.indices == index).nonzero()[0]:
                return enlarged(evaluated.pixels[row], figures.ENLARGED)
        raise UserError("that is no test image of this page; choose one of those shown")

    def _mistakes(self, rows: Int64, map_for: str, method: str, layer: str) -> list[Mistake]:
        wrong = self.content.mistakes
        targets = (wrong.labels if map_for == TRUE else wrong.predictions)[rows]
        if map_for == NO_MAP or not len(rows):
            return [Mistake(*wrong.row(row), int(target)) for row, target in zip(rows, targets, strict=True)]
        heatmaps, probabilities = self.engine.heatmaps(wrong.pixels[rows], targets, method, layer)
        now = probabilities.argmax(axis=1).tolist()
        made = zip(rows, targets.tolist(), heatmaps, now, strict=True)
        return [Mistake(*wrong.row(row), *rest) for row, *rest in made]

    def _uploaded(self, picture: Any) -> Path:
        """Returns the file of an uploaded picture. Raises UserError for any other."""
        path = picture.get("path") if isinstance(picture, dict) else None
        if not isinstance(path, str) or not lies_in(path, self.uploads):
            raise UserError("the picture was not uploaded here; upload it")
        return Path(path)

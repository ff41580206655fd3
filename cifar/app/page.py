"""The page's three tabs: layout and events. Their content is made in handlers.py and views.py.

Components pass on the browser's values unprocessed (`preprocess=False`): Gradio would decode a picture before its size
has been checked.
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import escape
from PIL import Image

from cifar import names
from cifar.app import views
from cifar.app.content import AppContent
from cifar.app.engine import Engine
from cifar.app.handlers import HINT, MOST, NO_MAP, PREDICTED, TRUE, Handlers, Response
from cifar.data import pictures
from cifar.errors import UserError
from cifar.explain.maps import METHODS
from cifar.explain.options import COUNT, ORDERS

TOP = 5  # classes shown at first
OPACITY = 0.5
KEPT = (300, 3600)  # seconds: interval of the clean-up, and age at which uploads are deleted
WAITING = 200  # queued requests; further ones are refused
PLACEHOLDER = f"Drop a picture here, or click to choose one\nup to {pictures.BYTES >> 20} MB"
NETWORK: dict[str, Any] = {  # for every event that uses the network: one at a time, in a queue
    "concurrency_id": "network",
    "concurrency_limit": 1,
    "preprocess": False,
    "show_progress": "minimal",
    "trigger_mode": "always_last",
}
ASIDE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# Opacity is set in the browser: the map is an overlay with a CSS opacity.
SET_OPACITY = "(value) => document.getElementById('%s').style.setProperty('--opacity', value)"
ON_CLICK = """element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-index]');
  if (button) trigger('click', { index: Number(button.dataset.index) });
});"""


def build(engine: Engine, content: AppContent, uploads: Path) -> gr.Blocks:
    """Builds the page of a network; `uploads` is the only folder whose files are read."""
    handlers, wrong = Handlers(engine, content, uploads), len(content.mistakes.indices)
    classes, methods = engine.run.classes, list(METHODS)
    choices = list(zip(names.on_pages(classes), classes, strict=True))  # what is shown, and what is sent
    layers = [(f"{name} ({cells}x{cells})", name) for name, cells in engine.layers.items()]
    right = content.metadata["accuracy"].partition(" (")[0]
    name = f"{engine.run.network}: {len(classes)} classes, {right} correct"

    def carry(event: gr.EventData) -> tuple[Image.Image, gr.Tabs]:
        index = event._data.get("index") if isinstance(event._data, dict) else None
        try:
            return Image.fromarray(handlers.test_image(index)), gr.Tabs(selected="classify")
        except UserError as error:
            raise gr.Error(f"{error}", print_exception=False) from None

    page = _Page(title=name, analytics_enabled=False, delete_cache=KEPT)
    with page:
        _html(f"<h1>{escape(name)}</h1>")
        with gr.Tabs() as tabs:
            with gr.Tab("Classify", id="classify"), gr.Row(elem_id="classify"):
                with gr.Column(elem_id="ask"):
                    picture = gr.Image(
                        label="Picture", sources=["upload", "webcam", "clipboard"], format="png", height=280,
                        buttons=[], placeholder=PLACEHOLDER, elem_id="picture",
                    )  # fmt: skip
                    tiles = _html(views.examples(content.examples, classes), ON_CLICK, "examples")
                with gr.Column(elem_id="answer"):
                    answer = _html(views.hint(HINT), elem_id="answer-view")
                    with gr.Accordion("The same as numbers", open=False):
                        numbers = gr.JSON(show_label=False)
                with gr.Column(elem_id="controls"):
                    top = gr.Slider(1, len(classes), min(TOP, len(classes)), step=1, label="Top classes")
                    maps = gr.Checkbox(True, label="Show maps")
                    opacity = gr.Slider(0, 1, OPACITY, step=0.01, label="Map opacity")
                    at = gr.CheckboxGroup(layers, value=[engine.default_layer], label="Layers, side by side")
                    its_own = handlers.predicted_class
                    map_for = gr.Dropdown([its_own, *choices], value=its_own, label="Map for class")
                    method = gr.Dropdown(methods, value=methods[0], label="Method")
            asks: Any = [picture, top, maps, map_for, method, at]
            gr.on([component.change for component in asks], _in_words(handlers.classify), asks, [answer, numbers],
                  api_name="classify", **NETWORK)  # fmt: skip
            opacity.change(None, opacity, js=SET_OPACITY % "answer-view")
            tiles.click(carry, outputs=[picture, tabs], **ASIDE)

            with gr.Tab("Misclassified", id="misclassified") as tab:
                if wrong:
                    with gr.Row(elem_id="filters"):
                        show = gr.Checkbox(True, label="Show mistakes")
                        most = max(2, min(MOST, wrong))  # a slider needs at least two values
                        count = gr.Slider(1, most, min(COUNT, wrong), step=1, label="How many", visible=wrong > 1)
                        any_class = handlers.any_class
                        true = gr.Dropdown([any_class, *choices], value=any_class, label="True class")
                        predicted = gr.Dropdown([any_class, *choices], value=any_class, label="Predicted class")
                        order = gr.Dropdown(list(ORDERS), value=ORDERS[0], label="Order")
                        seed = gr.Number(0, precision=0, minimum=0, label="Seed of the order", visible=False)
                        map_for = gr.Dropdown([PREDICTED, TRUE, NO_MAP], value=PREDICTED, label="Map for class")
                        method = gr.Dropdown(methods, value=methods[0], label="Method")
                        layer = gr.Dropdown(layers, value=engine.default_layer, label="Layer")
                        opacity = gr.Slider(0, 1, OPACITY, step=0.01, label="Map opacity")
                    gallery = _html("", ON_CLICK, "gallery")
                    with gr.Accordion("The same as numbers", open=False):
                        listed = gr.JSON(show_label=False)
                else:
                    _html(views.hint(f"No mistakes: all {content.images:,} test images are classified correctly."))
            if wrong:
                asks = [show, count, true, predicted, order, seed, map_for, method, layer]
                gr.on([tab.select, *(component.change for component in asks)], _in_words(handlers.misclassified), asks,
                      [gallery, listed], api_name="misclassified", **NETWORK)  # fmt: skip
                order.change(lambda value: gr.Number(visible=value == "random"), order, seed, **ASIDE)
                opacity.change(None, opacity, js=SET_OPACITY % "gallery")
                gallery.click(carry, outputs=[picture, tabs], **ASIDE).then(None, js="() => scrollTo(0, 0)")

            with gr.Tab("About", id="about"):
                _html(views.about(content, engine))
    page.queue(max_size=WAITING)
    return page


class _Page(gr.Blocks):
    """Blocks that answer an unreadable request with a message, where Gradio prints a traceback."""

    async def preprocess_data(self, *arguments: Any, **more: Any) -> Any:
        try:
            return await super().preprocess_data(*arguments, **more)
        except Exception:
            raise gr.Error("The request cannot be read; upload a picture.", print_exception=False) from None


def _html(value: str, js_on_load: str | None = None, elem_id: str | None = None) -> gr.HTML:
    return gr.HTML(value, js_on_load=js_on_load, elem_id=elem_id, apply_default_css=False)


def _in_words(handler: Callable[..., Response]) -> Callable[..., Response]:
    """Returns the same handler, with a UserError turned into its answer."""

    @wraps(handler)  # the API exposes the parameters' names
    def answer(*values: Any) -> Response:
        try:
            return handler(*values)
        except UserError as error:
            return views.problem(str(error)), {"error": str(error)}

    return answer

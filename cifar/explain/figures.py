"""Pictures of a network's mistakes: gallery, maps, confusion, calibration.

Images are enlarged by whole numbers and without smoothing: what is seen is what the network got. A map keeps its own
cells. The opacity is true: 0 is the picture, 1 the map's colours, and between them each pixel is their weighted mean.
"""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from cifar import figures
from cifar.explain import calibration
from cifar.explain.findings import Findings, Float, Int64, Shown, UInt8
from cifar.explain.options import Options

ENLARGED = 6  # times: 192 pixels for an image of 32
ACROSS = 5  # images beside each other in the gallery
FONT, LINE, GAP = 13, 17, 12  # pixels
DPI = 100
UNSIGNED, SIGNED = "viridis", "RdBu_r"  # perceptually uniform; and diverging, with white for zero


# ---- colours


def enlarged(array: UInt8, factor: int) -> UInt8:
    """[h, w, 3] with every pixel as a square of factor x factor."""
    return array.repeat(factor, axis=0).repeat(factor, axis=1)


def coloured(values: Float, limit: float, signed: bool = False) -> UInt8:
    """Colours [h, w, 3] of values [h, w] on a scale of 0 to `limit`, or, signed, of -limit to limit."""
    scaled = np.asarray(values, np.float32) / (limit if limit > 0 else 1)
    table = mpl.colormaps[SIGNED if signed else UNSIGNED]
    colours: UInt8 = table((scaled + 1) / 2 if signed else scaled, bytes=True)[..., :3]
    return colours


def blended(picture: UInt8, values: Float, limit: float, opacity: float) -> UInt8:
    """A map [h, h] over a picture [32, 32, 3]: each pixel has the colour of the cell that its top left corner is in."""
    cell = np.arange(len(picture)) * len(values) // len(picture)
    colours = coloured(values, limit)[cell][:, cell]
    return ((1 - opacity) * picture.astype(np.float32) + opacity * colours).round().astype(np.uint8)


# ---- panels: a picture of 192 pixels under its lines of text, on white


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), FONT)


def _fitting(text: str, width: int) -> str:
    """The text, cut where it is wider than `width` pixels: a class may have a long name."""
    if _font().getlength(text) <= width:
        return text
    while text and _font().getlength(text + "\u2026") > width:
        text = text[:-1]
    return text + "\u2026"


def _panel(picture: UInt8, lines: Sequence[str]) -> UInt8:
    height, width = picture.shape[:2]
    image = Image.new("RGB", (width, LINE * len(lines) + 3 + height), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        draw.text((0, LINE * number), _fitting(line, width), "black", _font())
    image.paste(Image.fromarray(picture), (0, LINE * len(lines) + 3))
    return np.asarray(image)


def _bar(limit: float, height: int) -> UInt8:
    """The scale of the maps beside it, as tall as they are."""
    image = Image.new("RGB", (60, height), "white")
    ramp = coloured(np.linspace(limit, 0, height, dtype=np.float32)[:, None], limit)
    image.paste(Image.fromarray(ramp.repeat(14, axis=1)), (0, 0))
    draw = ImageDraw.Draw(image)
    draw.text((18, 0), f"{limit:.2g}", "black", _font())
    draw.text((18, height - LINE), "0", "black", _font())
    return np.asarray(image)


def _beside(panels: Sequence[UInt8]) -> UInt8:
    """Panels in a row, their lower edges level."""
    height = max(len(panel) for panel in panels)
    parts = [np.full((height, GAP, 3), 255, np.uint8)]
    for panel in panels:
        above = np.full((height - len(panel), panel.shape[1], 3), 255, np.uint8)
        parts += [np.concatenate((above, panel)), parts[0]]
    return np.concatenate(parts, axis=1)


def below(title: str, rows: Sequence[UInt8]) -> UInt8:
    """Rows under each other, under a title."""
    width = max([round(_font().getlength(title)) + 2 * GAP, *(row.shape[1] for row in rows)])
    head = Image.new("RGB", (width, LINE + 2 * GAP), "white")
    ImageDraw.Draw(head).text((GAP, GAP), title, "black", _font())
    padded = [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate([np.asarray(head), *padded])


# ---- pictures


def gallery(findings: Findings, rows: Int64, options: Options) -> UInt8:
    """The mistakes `rows` with their true and predicted class and the confidence in it."""
    shown, names = findings.mistakes, findings.classes
    panels = []
    for row in rows:
        predicted, true = shown.targets[row]
        lines = (
            f"true: {names[true]}",
            f"predicted: {names[predicted]}",
            f"confidence {findings.probabilities[shown.indices[row], predicted]:.1%}  #{shown.indices[row]}",
        )
        panels.append(_panel(enlarged(shown.pictures[row], ENLARGED), lines))
    strips = [_beside(panels[start : start + ACROSS]) for start in range(0, len(panels), ACROSS)]
    return below(_gallery_title(findings, len(rows), options), strips)


def _gallery_title(findings: Findings, count: int, options: Options) -> str:
    images = f"of {len(findings.labels):,} test images"
    if not len(findings.mistakes.indices):
        return f"no mistakes: every one {images} is classified correctly"
    order = {"confident": "the most confident first", "uncertain": "the least confident first"}
    kind = [f"true class {options.true}"] if options.true else []
    kind += [f"predicted class {options.predicted}"] if options.predicted else []
    text = f"{count} of {len(findings.mistakes.indices):,} mistakes, "
    text += order.get(options.order, f"drawn at random with seed {options.seed}")
    return f"{text}{''.join(f', {part}' for part in kind)}; accuracy {findings.accuracy:.2%} {images}"


def map_strips(findings: Findings, rows: Int64, opacity: float) -> list[UInt8]:
    """For each mistake of `rows` a strip: picture, both maps on one scale, votes, a correct image with its map."""
    return [_map_strip(findings, int(row), opacity) for row in rows]


def _map_strip(findings: Findings, row: int, opacity: float) -> UInt8:
    shown, names = findings.mistakes, findings.classes
    near, other = findings.companions, int(findings.companion_of[row])
    predicted, true = (names[number] for number in shown.targets[row])
    limit = max(float(shown.maps[row].max()), float(near.maps[other, 0].max()) if other >= 0 else 0.0)
    panels = [
        _panel(enlarged(shown.pictures[row], ENLARGED), _names(findings, shown, row, "true", "predicted")),
        _map_panel(shown, row, 0, limit, opacity, f"for {predicted} (predicted)"),
        _map_panel(shown, row, 1, limit, opacity, f"for {true} (true)"),
        _bar(limit, ENLARGED * shown.pictures.shape[1]),
        _vote_panel(shown, row, predicted, true),
    ]
    if other >= 0:
        panels += [
            _panel(enlarged(near.pictures[other], ENLARGED), _names(findings, near, other, "correct", "runner-up")),
            _map_panel(near, other, 0, limit, opacity, f"for {true} (correct)"),
        ]
    return _beside(panels)


def _names(findings: Findings, shown: Shown, row: int, first: str, second: str) -> tuple[str, str, str]:
    """The image's number, its true class, and the class that it was, or was nearly, taken for."""
    image = shown.indices[row]
    true = int(findings.labels[image])
    mistaken = next(int(target) for target in shown.targets[row] if target != true)
    values, names = findings.probabilities[image], findings.classes
    return (
        f"#{image}",
        f"{first}: {names[true]} {values[true]:.1%}",
        f"{second}: {names[mistaken]} {values[mistaken]:.1%}",
    )


def _map_panel(shown: Shown, row: int, target: int, limit: float, opacity: float, name: str) -> UInt8:
    peak = shown.peaks[row, target]
    strength = f"maximum {peak:.3g}" if peak > 0 else f"no positive evidence ({peak:.2g})"
    return _panel(
        enlarged(blended(shown.pictures[row], shown.maps[row, target], limit, opacity), ENLARGED), (name, strength)
    )


def _vote_panel(shown: Shown, row: int, predicted: str, true: str) -> UInt8:
    votes = shown.votes[row]
    side = ENLARGED * shown.pictures.shape[1] // len(votes)
    image = Image.fromarray(enlarged(coloured(votes, float(np.abs(votes).max()), signed=True), side))
    draw = ImageDraw.Draw(image)
    for (down, across), vote in np.ndenumerate(votes):
        dark = abs(vote) > 0.7 * np.abs(votes).max()
        middle = ((across + 0.5) * side, (down + 0.5) * side)
        draw.text(middle, f"{vote:+.2f}", "white" if dark else "black", _font(), anchor="mm")
    total = f"{votes.sum():+.2f} {shown.bias[row]:+.2f} (bias) = {shown.margins[row]:+.2f}"
    return _panel(np.asarray(image), (f"votes: {predicted} against {true}", total))


def map_title(findings: Findings, opacity: float) -> str:
    """Method, layer and resolution of the maps, and what one should know of them."""
    maps = findings.mistakes.maps
    cells, voters = (f"{array.shape[-1]}x{array.shape[-1]} cells" for array in (maps, findings.mistakes.votes))
    title = (
        f"{findings.method} at {findings.layer} ({cells}): what raised the score of a class, opacity {opacity:g}; "
        f"votes at the last stage ({voters}): + for the predicted class, - for the true one"
    )
    if len(maps) and np.array_equal(maps[:, 0], maps[:, 1]):
        title += "; this method's map is the same for every class"
    return title if len(maps) else "no mistakes"


def confusion(findings: Findings) -> UInt8:
    """Counts by true and predicted class."""
    classes = len(findings.classes)
    pairs = findings.labels.astype(np.int64) * classes + findings.predictions
    matrix = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    return _drawn(figures.confusion(matrix, findings.classes))


def reliability(findings: Findings) -> UInt8:
    """The calibration diagram: accuracy over confidence."""
    bins = calibration.measure(findings)
    used = bins.counts > 0
    figure = Figure(figsize=(6.4, 5.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="grey", label="as often right as it is sure")
    errors = (bins.accuracy - bins.low, bins.high - bins.accuracy)
    axes.errorbar(bins.confidence[used], bins.accuracy[used], [error[used] for error in errors], fmt="o", capsize=3,
                  label="accuracy, 95 % interval (Wilson)")  # fmt: skip
    for number in np.flatnonzero(used):
        axes.annotate(f"n {bins.counts[number]:,}", (bins.confidence[number], bins.low[number]), (0, -4), va="top",
                      textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    axes.set(xlim=(-0.03, 1.05), ylim=(-0.08, 1.05), xlabel="confidence (mean of the bin)", ylabel="accuracy")
    title = f"{bins.counts.sum():,} test images, {len(used)} bins, expected calibration error {bins.error:.3f}"
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, loc="upper left")
    axes.grid(alpha=0.3)
    return _drawn(figure)


def _drawn(figure: Figure) -> UInt8:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


def png(picture: UInt8) -> bytes:
    """A picture [h, w, 3] as a file."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", dpi=(DPI, DPI))
    return content.getvalue()

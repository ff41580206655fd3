"""Pictures of a network's mistakes: gallery, maps, confusion, calibration.

Images are enlarged by whole factors, without interpolation: what is seen is what the network got. Maps are shown cell
by cell. Opacity is alpha blending: 0 is the picture, 1 the map's colours.
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from cifar import failure, figures, lettering, plotting
from cifar.explain import calibration, wording
from cifar.explain.findings import ExplainedImages, Findings, Float, Int64, Robustness, UInt8
from cifar.explain.layers import NONE, Grid
from cifar.explain.maps import OF_NO_CLASS
from cifar.explain.options import ExplainOptions
from cifar.figures import below, beside, enlarged, panel
from cifar.lettering import LINE, Labels, Line

ENLARGED = 6  # times: 192 pixels for an image of 32
ACROSS = 5  # images beside each other in the gallery
UNSIGNED, SIGNED = "viridis", "RdBu_r"  # perceptually uniform; and diverging, with white for zero


# ---- colours


def coloured(values: Float, limit: float, signed: bool = False) -> UInt8:
    """Returns colours [h, w, 3] of values [h, w] on a scale of 0 to `limit`, or, signed, of -limit to limit."""
    scaled = np.asarray(values, np.float32) / (limit if limit > 0 else 1)
    if signed:
        return plotting.colours(SIGNED, np.asarray((scaled + 1) / 2, np.float32))
    return plotting.colours(UNSIGNED, np.asarray(scaled, np.float32))


def overlay(values: Float, grid: Grid, limit: float, signed: bool = False) -> UInt8:
    """Returns the colours and alpha [SIDE, SIDE, 4] of a map [h, h]: opaque where a cell lies, else transparent."""
    cells = grid.of_pixels()
    colours = coloured(values, limit, signed)[cells][:, cells]
    covered = (cells != NONE) & (cells[:, None] != NONE)
    return np.dstack((colours, np.where(covered, 255, 0))).astype(np.uint8)


def blended(picture: UInt8, values: Float, grid: Grid, limit: float, opacity: float, signed: bool = False) -> UInt8:
    """Blends a map [h, h] over a picture [SIDE, SIDE, 3]; a pixel that no cell lies over stays as it is."""
    drawn = overlay(values, grid, limit, signed)
    alpha = opacity * (drawn[..., 3:] / np.float32(255))
    return ((1 - alpha) * picture.astype(np.float32) + alpha * drawn[..., :3]).round().astype(np.uint8)


def _bar(limit: float, height: int) -> UInt8:
    """Draws a colour bar for the maps, as tall as they are."""
    image = Image.new("RGB", (60, height), "white")
    ramp = coloured(np.linspace(limit, 0, height, dtype=np.float32)[:, None], limit)
    image.paste(Image.fromarray(ramp.repeat(14, axis=1)), (0, 0))
    lettering.write(image, (18, 0), lettering.of(f"{limit:.2g}"))
    lettering.write(image, (18, height - LINE), lettering.of("0"))
    return np.asarray(image)


# ---- pictures


def draw(
    findings: Findings, rows: Int64, options: ExplainOptions
) -> tuple[dict[str, UInt8], Iterator[tuple[int, UInt8]]]:
    """Draws the pictures of an explanation by name, and for each mistake of `rows` its test image and its maps."""
    labels, title = Labels(findings.classes), map_title(findings, options.opacity)
    strips = [_map_strip(findings, int(row), options.opacity, labels) for row in rows]
    pictures = {
        "gallery": gallery(findings, rows, options),
        "cam": below(title, strips),
        "confusion": confusion(findings),
        "calibration": reliability(findings),
        **({"corruptions": corruptions(findings.robustness)} if findings.robustness else {}),
    }
    images = findings.mistakes.indices[rows].tolist()
    return pictures, ((image, below(title, [strip])) for image, strip in zip(images, strips, strict=True))


def gallery(findings: Findings, rows: Int64, options: ExplainOptions) -> UInt8:
    """Draws the mistakes `rows` with their true and predicted class and the confidence in it."""
    shown, labels = findings.mistakes, Labels(findings.classes)
    panels = []
    for row in rows:
        predicted, true = shown.targets[row]
        confidence = findings.probabilities[shown.indices[row], predicted]
        lines = (
            _line(labels, "true: ", true),
            _line(labels, "predicted: ", predicted),
            lettering.of(f"confidence {wording.percent(confidence)}  #{shown.indices[row]}"),
        )
        panels.append(panel(enlarged(shown.pictures[row], ENLARGED), lines))
    strips = [beside(panels[start : start + ACROSS]) for start in range(0, len(panels), ACROSS)]
    return below(_gallery_title(findings, len(rows), options, labels), strips)


def _line(labels: Labels, before: str, number: int, after: str = "", width: int = 32 * ENLARGED) -> Line:
    """Returns a class name between other words; only the name is truncated."""
    room = width - lettering.length(lettering.of(before, after))
    return lettering.of(before, labels.fitted(room)[number], after)


def _gallery_title(findings: Findings, count: int, options: ExplainOptions, labels: Labels) -> Line:
    images = f"of {len(findings.labels):,} test images"
    if not len(findings.mistakes.indices):
        return lettering.of(f"no mistakes: every one {images} is classified correctly")
    order = {"confident": "the most confident first", "uncertain": "the least confident first"}
    text = f"{count} of {wording.counted(len(findings.mistakes.indices), 'mistake')}, "
    text += order.get(options.order, f"drawn at random with seed {options.seed}")
    kind: Line = ()
    for word, name in (("true", options.true), ("predicted", options.predicted)):
        if name:
            kind += _line(labels, f", {word} class ", findings.classes.index(name), width=400)
    return lettering.of(text, kind, f"; accuracy {findings.accuracy:.2%} {images}")


def _map_strip(findings: Findings, row: int, opacity: float, labels: Labels) -> UInt8:
    """Draws a mistake in a row: picture, both maps on one scale, votes, a correct image with its map."""
    failure.report_progress()
    shown, near, other = findings.mistakes, findings.companions, int(findings.companion_of[row])
    limit = max(float(shown.maps[row].max()), float(near.maps[other, 0].max()) if other >= 0 else 0.0)
    predicted, true = shown.targets[row]
    names = [_line(labels, "for ", predicted, " (predicted)"), _line(labels, "for ", true, " (true)")]
    name = _line(labels, "for ", true, " (correct)")
    if findings.method in OF_NO_CLASS:
        names = [name := lettering.of("the layer's activity")]
    panels = [
        _named_panel(findings, shown, row, ("true", "predicted"), labels),
        *(_map_panel(shown, row, target, limit, opacity, line) for target, line in enumerate(names)),
        _bar(limit, ENLARGED * shown.pictures.shape[1]),
        _vote_panel(shown, row),
    ]
    if other >= 0:
        panels += [
            _named_panel(findings, near, other, ("correct", "runner-up"), labels),
            _map_panel(near, other, 0, limit, opacity, name),
        ]
    return beside(panels)


def _named_panel(findings: Findings, shown: ExplainedImages, row: int, words: tuple[str, str], labels: Labels) -> UInt8:
    """Draws an image under its number, its true class, and its predicted class or runner-up."""
    image = shown.indices[row]
    true = int(findings.labels[image])
    mistaken = next(int(target) for target in shown.targets[row] if target != true)
    values = findings.probabilities[image]
    lines = [
        _line(labels, f"{word}: ", number, f" {wording.percent(values[number])}")
        for word, number in zip(words, (true, mistaken), strict=True)
    ]
    return panel(enlarged(shown.pictures[row], ENLARGED), [lettering.of(f"#{image}"), *lines])


def _map_panel(shown: ExplainedImages, row: int, target: int, limit: float, opacity: float, name: Line) -> UInt8:
    peak = shown.peaks[row, target]
    strength = lettering.of(f"maximum {peak:.3g}" if peak > 0 else f"no positive evidence ({peak:.2g})")
    return panel(
        enlarged(blended(shown.pictures[row], shown.maps[row, target], shown.map_grid, limit, opacity), ENLARGED),
        (name, strength),
    )


def _vote_panel(shown: ExplainedImages, row: int) -> UInt8:
    votes, grid, white = shown.votes[row], shown.vote_grid, np.full_like(shown.pictures[row], 255)
    most = float(np.abs(votes).max())
    image = Image.fromarray(enlarged(blended(white, votes, grid, most, 1, signed=True), ENLARGED))
    middles = [ENLARGED * (start + pixels / 2) for start, pixels in grid.spans()]
    for (down, across), vote in np.ndenumerate(votes):
        dark = abs(vote) > 0.7 * most
        middle = (middles[across], middles[down])
        lettering.write_centred(image, middle, f"{vote:+.2f}", "white" if dark else "black")
    total = f"{votes.sum():+.2f} {shown.bias[row]:+.2f} (bias) = {shown.margins[row]:+.2f}"
    return panel(np.asarray(image), (lettering.of("votes: + predicted, - true"), lettering.of(total)))


def map_title(findings: Findings, opacity: float) -> Line:
    """Names method, layer and resolution of the maps, what they mean, and whether they depend on the class."""
    maps = findings.mistakes.maps
    if not len(maps):
        return lettering.of("no mistakes")
    cells, voters = (f"{array.shape[-1]}x{array.shape[-1]} cells" for array in (maps, findings.mistakes.votes))
    shown = "what raised the score of a class"
    if findings.method in OF_NO_CLASS:
        shown = "where the layer was most active, the same for every class"
    title = (
        f"{findings.method} at {findings.layer} ({cells}): {shown}, opacity {opacity:g}; "
        f"votes at the last stage ({voters}): + for the predicted class, - for the true one"
    )
    return lettering.of(title)


def confusion(findings: Findings) -> UInt8:
    """Draws the counts by true and predicted class."""
    return figures.confusion(confusion_matrix(findings), findings.classes)


def confusion_matrix(findings: Findings) -> Int64:
    """Returns [C, C] counts of test images by true (rows) and predicted class (columns)."""
    return figures.confusion_matrix(findings.labels, findings.predictions, len(findings.classes))


def reliability(findings: Findings) -> UInt8:
    """Draws the calibration diagram: accuracy over confidence."""
    bins = calibration.measure(findings)
    used = bins.counts > 0
    with plotting.own_style():
        figure = plotting.Figure(figsize=(6.4, 5.6), dpi=plotting.DPI, layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], "--", color="grey", label="perfect calibration")
        errors = (bins.accuracy - bins.low, bins.high - bins.accuracy)
        axes.errorbar(bins.confidence[used], bins.accuracy[used], [error[used] for error in errors], fmt="o",
                      capsize=3, label="accuracy, 95 % interval (Wilson)")  # fmt: skip
        for number in np.flatnonzero(used):
            axes.annotate(f"n {bins.counts[number]:,}", (bins.confidence[number], bins.low[number]), (0, -4), va="top",
                          textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
        axes.set(xlim=(-0.03, 1.05), ylim=(-0.08, 1.05), xlabel="confidence (mean of the bin)", ylabel="accuracy")
        title = f"{bins.counts.sum():,} test images, {len(used)} bins, expected calibration error {bins.error:.3f}"
        axes.set_title(title, fontsize=11)
        axes.legend(frameon=False, loc="upper left")
        axes.grid(alpha=0.3)
        return plotting.pixels(figure)


def corruptions(found: Robustness) -> UInt8:
    """Draws each run's accuracy over the severity of each corruption; severity 0 is no corruption."""
    severities = np.arange(found.accuracy.shape[2] + 1)
    rows = -(-len(found.kinds) // ACROSS)
    with plotting.own_style():
        figure = plotting.Figure(figsize=(2.7 * ACROSS, 2.2 * rows + 0.4), dpi=plotting.DPI, layout="constrained")
        grid = figure.subplots(rows, ACROSS, sharex=True, sharey=True, squeeze=False)
        for axes, kind, of_runs in zip(grid.flat, found.kinds, found.accuracy.swapaxes(0, 1), strict=False):
            for number, (clean, accuracy) in enumerate(zip(found.clean, of_runs, strict=True)):
                colour, _, style = _curve(number)
                axes.plot(severities, [clean, *accuracy], style, color=f"tab:{colour}", marker="o", markersize=3)
            axes.set(ylim=(-0.03, 1.03), xticks=severities)
            axes.set_title(kind.replace("_", " "), fontsize=10)
            axes.grid(alpha=0.3)
        for axes in grid.flat[len(found.kinds) :]:
            axes.set_axis_off()
        figure.supxlabel("severity (0: no corruption)", fontsize=10)
        figure.supylabel("accuracy", fontsize=10)
        plot = plotting.pixels(figure)
    title = f"Accuracy on corrupted test images, made here with seed {found.seed}; not the published CIFAR-10-C files"
    lines = [lettering.of(title)]
    for number, (name, table) in enumerate(zip(Labels(found.runs).fitted(700), found.accuracy, strict=True)):
        colour, stroke, _ = _curve(number)
        lines.append(lettering.of(f"{colour}, {stroke}: ", name, f", mean under corruption {table.mean():.2%}"))
    return panel(plot, lines)


def _curve(number: int) -> tuple[str, str, str]:
    """Returns a run's colour and its stroke, in words and as matplotlib calls it."""
    colours = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")
    strokes = (("solid", "-"), ("dashed", "--"), ("dash-dotted", "-."), ("dotted", ":"))
    return colours[number % len(colours)], *strokes[number % len(strokes)]

"""Class names in pictures: any text at all, drawn or numbered, and never taken for another's."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from cifar import figures, lettering, names, plotting
from cifar.lettering import Labels, Line
from cifar.run import EpochMetrics

CAT, DOG = "\u732b", "\u72ac"  # as they are written in China and Japan
NOBODYS = ["\U0010fff0", "\U0010fff1"]  # for private use: no font has them
CONFUSING = [
    "$0_$50", "$50_$100", "a\nb", "a b", " a b", "\u3164", "\u200b", "#1", "caf\u00e9", "cafe\u0301", "x" * 255,
    "x" * 254 + "y", "<b>&amp;", "50%", "\u202eabc", "abc", "\udce9", "=1+1", r"\frac{1}{2}", "^_{", *NOBODYS,
]  # fmt: skip


def texts(lines: list[Line]) -> list[str]:
    return ["".join(part.text for part in line) for line in lines]


@pytest.mark.parametrize("width", [60, 96, 150, 400])
def test_no_two_classes_look_alike_however_little_room_there_is(width: int) -> None:
    labels = Labels(CONFUSING).fitted(width)
    assert len(set(texts(labels))) == len(CONFUSING)
    assert all(lettering.length(line) <= width for line in labels)
    assert all("\n" not in text and text.strip() for text in texts(labels))


def test_ordinary_names_stay_as_they_are() -> None:
    classes = ["automobile", "sea gull", "sea_gull", "Caf\u00e9", "\u05e9\u05dc\u05d5\u05dd", "$0_$50", "<b>", "50 %"]
    assert names.readable(classes) == classes
    assert texts(Labels(classes).fitted(400)) == classes
    assert Labels(classes).advice() == ""


def test_pages_show_names_that_nobody_takes_for_each_other() -> None:
    hebrew = "\u05e9\u05dc\u05d5\u05dd"
    assert names.on_pages(["cat", hebrew, CAT, "Caf\u00e9", "\u041a\u043e\u0442"]) == [
        "cat", f"#1 \u2068{hebrew}\u2069", f"#2 {CAT}", "Caf\u00e9", "\u041a\u043e\u0442"
    ]  # fmt: skip
    shown = names.on_pages(CONFUSING)
    assert len({name[: names.SEEN] for name in shown}) == len(CONFUSING)
    assert max(map(len, shown)) < 70


def test_classes_that_no_font_can_show_have_their_numbers_and_a_line_names_a_font(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert texts(Labels(["cat", *NOBODYS]).fitted(200)) == ["cat", "#1", "#2"]
    assert "2 of 3 classes by number" in Labels(["cat", *NOBODYS]).advice()
    monkeypatch.setattr(lettering, "_installed", list)  # a machine without fonts of its own
    assert texts(Labels([CAT, DOG]).fitted(200)) == ["#0", "#1"]
    assert "fonts-noto-cjk" in Labels([CAT, DOG]).advice()
    assert "\n" not in Labels([CAT, DOG]).advice()


DRAW = """
import sys
from pathlib import Path
import numpy as np
from cifar import figures
from cifar.lettering import Labels
folder, *classes = sys.argv[1:]
print("".join(part.text for line in Labels(classes).fitted(300) for part in line), Labels(classes).advice())
matrix = np.arange(len(classes) ** 2).reshape(len(classes), len(classes))
images = np.zeros((len(classes), 32, 32, 3), np.uint8)
Path(folder, "confusion.png").write_bytes(figures.png(figures.confusion(matrix, classes)))
Path(folder, "samples.png").write_bytes(figures.png(figures.samples({"a": (images, range(len(classes)))}, classes)))
Path(folder, "curves.png").write_bytes(figures.png(figures.curves([], 0.0)))
"""


def drawn(folder: Path, classes: list[str], cwd: Path = ROOT, **env: str) -> str:
    """Draws in a process of its own, which must not warn, and says what it prints."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRAW, folder, *classes], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def font_with(letters: str, path: Path) -> None:
    """A font in which every letter is a square of its own width."""
    glyphs: dict[str, Any] = {}
    for number, name in enumerate([".notdef", *(f"g{ord(letter)}" for letter in letters)]):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for corner in ((0, 700), (300 + 100 * number, 700), (300 + 100 * number, 0)):
            pen.lineTo(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap({ord(letter): f"g{ord(letter)}" for letter in letters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Mine", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True)
    builder.save(path)


def test_a_font_that_is_installed_is_used_at_once(tmp_path: Path) -> None:
    assert drawn(tmp_path / "before", NOBODYS).startswith("#0#1 pictures show 2 of 2 classes by number")
    font_with("".join(NOBODYS), tmp_path / "share" / "fonts" / "mine.ttf")
    (tmp_path / "share" / "fonts" / "broken.ttf").write_bytes(b"no font")
    # matplotlib's own list of fonts is of the time before: it is not asked.
    assert drawn(tmp_path / "after", NOBODYS, XDG_DATA_HOME=str(tmp_path / "share")) == "".join(NOBODYS)
    for picture in ("confusion.png", "samples.png"):
        assert (tmp_path / "before" / picture).read_bytes() != (tmp_path / "after" / picture).read_bytes()


def test_pictures_depend_on_no_backend_and_on_nobodys_style(tmp_path: Path) -> None:
    drawn(tmp_path / "plain", ["cat", "dog"])
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\nbackend: nbagg\nsavefig.dpi: 7\n")
    for number, backend in enumerate(("module://matplotlib_inline.backend_inline", "Qt4Agg", "nonsense")):
        other = tmp_path / str(number)
        drawn(other, ["cat", "dog"], cwd=tmp_path, MPLBACKEND=backend)
        for picture in ("confusion.png", "samples.png", "curves.png"):
            assert (other / picture).read_bytes() == (tmp_path / "plain" / picture).read_bytes()


def matrix_of(count: int) -> np.ndarray[Any, Any]:
    matrix = np.random.default_rng(0).poisson(0.5, (count, count))
    matrix[np.arange(count), np.arange(count)] = 70
    return matrix


@pytest.mark.parametrize("count", [2, 20, 21, 59, 100, 256])
def test_a_confusion_picture_does_not_grow_with_the_classes(count: int) -> None:
    picture = figures.confusion(matrix_of(count), [f"class {number}" for number in range(count)])
    assert max(picture.shape) < 1400
    assert len(figures.png(picture)) < 300_000
    # Every cell is there: the colours of as many as there are rows on the diagonal, which has none.
    cells = (picture == 255).all(axis=2)
    assert cells.sum() >= count


def test_the_cells_of_a_confusion_picture_are_those_of_the_matrix() -> None:
    matrix = np.zeros((256, 256), np.int64)
    matrix[3, 200], matrix[199, 7] = 8, 4
    picture = figures.confusion(matrix, [f"{number}" for number in range(256)])
    scale = plotting.colours("cividis", np.array([0, 0.5, 1], np.float32))
    places = [np.argwhere((picture == colour).all(axis=2)) for colour in scale]
    top, left = places[0].min(axis=0)
    cell = (places[0].max(axis=0) - (top, left) + 1)[0] / 256
    assert cell == int(cell)
    for place, expected in ((places[1], (199, 7)), (places[2], (3, 200))):
        assert ((place.mean(axis=0) - (top, left)) // cell).tolist() == list(expected)


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from cifar import figures
from cifar.run import EpochMetrics
def used(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
before = used()
count = int(sys.argv[1])
classes = [f"class {number}" for number in range(count)]
epochs = [EpochMetrics(number, number, 1.0, 0.5, 1.0, 0.5, 0.1, 1.0, 1.0) for number in range(1, 50)]
for _ in range(3):
    figures.png(figures.confusion(np.ones((count, count), np.int64), classes))
    figures.png(figures.curves(epochs, 0.1))
print(used() - before)
"""


@pytest.mark.parametrize("count", [100, 256])
def test_an_epochs_pictures_need_little_memory(count: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(count)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 200  # MB


def test_the_two_losses_of_one_plot_say_which_has_smoothed_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def legends(figure: plotting.Figure) -> np.ndarray[Any, Any]:
        seen.append([text.get_text() for axes in figure.axes[:2] for text in axes.get_legend().get_texts()])
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(plotting, "pixels", legends)
    epochs = [EpochMetrics(1, 4, 1.0, 0.5, 1.0, 0.5, 0.1, 1.0, 1.0)]
    figures.curves(epochs, 0.2)
    figures.curves(epochs, 0.0)
    assert seen == [["train, label smoothing 0.2", "test, without", "train", "test"], ["train", "test"] * 2]


def test_samples_show_every_pixel_under_its_class() -> None:
    images = np.random.default_rng(0).integers(0, 256, (23, 32, 32, 3)).astype(np.uint8)
    picture = figures.samples({"training": (images, [0] * 23), "test": (images[:3], [1, 0, 1])}, ["$0_$50", CAT])
    windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (96, 96))
    for image, times in ((images[0], 2), (images[22], 1)):
        large = figures.enlarged(image, 3)[..., 0]
        found = np.argwhere(windows[:, :, 0, 0] == large[0, 0])
        assert sum((windows[down, across] == large).all() for down, across in found) == times
    Image.fromarray(picture)

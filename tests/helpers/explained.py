"""explain.py as a user starts it, and the list of mistakes that it leaves."""

import csv
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import ROOT, command

Lines = list[dict[str, str]]


def explain(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ROOT / "explain.py", *arguments, launcher=launcher),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def lines_of(folder: Path) -> Lines:
    with (folder / "misclassified.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_predicted_alike(explanation: Path, predictions: Mapping[str, Mapping[str, str]], root: Path) -> None:
    """The mistakes are what cifar.predict says, in lines by the path of a picture, of the same pictures in `root`."""
    mistakes = lines_of(explanation)
    assert mistakes
    for mistake in mistakes:
        row = predictions[str(root / mistake["file"])]
        assert row["class"] == mistake["predicted"]
        assert float(row["probability"]) == pytest.approx(float(mistake["confidence"]), abs=5e-4)

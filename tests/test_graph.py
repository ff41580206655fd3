"""Graphs of a step, where a device has them: on a CPU, whose replay is the eager step itself, all but the capture."""

import json
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import command
from helpers.launching import TWO, project

pytestmark = pytest.mark.slow

ON_A_CPU = (
    "from cifar import graph\n"
    "graph.KINDS = ('cpu',)\n"
    "counted = graph.GraphedGradients.__call__\n"
    "def call(self, *arguments):\n"
    "    totals = counted(self, *arguments)\n"
    "    os.write(1, f'replayed {self.replayed} of {len(self.graphs)} graphs\\n'.encode())\n"  # in one piece
    "    return totals\n"
    "graph.GraphedGradients.__call__ = call\n"
)
FAITHFUL = ON_A_CPU + "graph.capture = lambda step: step\n"
ONE: tuple[str, ...] = ()
STEPS = 12
SMALL = ("--network", "small", "--augmentation-backend", "device")
VARIANTS = {
    "dropout": SMALL,
    "sizes and freezing": ("--recipe", "speedrun", "--freeze-at", 0.5, "--peak-epoch", 0),
    "micro-batches": (*SMALL, "--gradient-accumulation-steps", 2),
}
Finished = Callable[[str, str, tuple[str, ...]], tuple[str, Path]]


@pytest.fixture(scope="module")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Output and directory of a run of a variant, with a patch, made when first asked for."""

    @cache
    def run(variant: str, patch: str, launcher: tuple[str, ...]) -> tuple[str, Path]:
        folder = tmp_path_factory.mktemp("graph")
        arguments = ["--data", shapes, "--run", folder / "run", "--epochs", 3, "--global-batch-size", 16,
                     "--cuda-graph", "auto", *VARIANTS[variant]]  # fmt: skip
        if variant != "sizes and freezing":
            arguments += ["--peak-epoch", 1]
        done = subprocess.run(
            command(project(folder, patch), *arguments, launcher=launcher),
            env={**os.environ, "PYTHONUNBUFFERED": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, folder / "run"

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """With batch-norm's statistics."""
    return safetensors.torch.load_file(directory / "model.safetensors")


def assert_equal(ours: Path, theirs: Path) -> None:
    expected = weights(theirs)
    for name, tensor in weights(ours).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(("variant", "graphs"), [("dropout", 1), ("sizes and freezing", 5), ("micro-batches", 1)])
def test_a_run_by_graphs_is_the_same_run(variant: str, graphs: int, finished: Finished) -> None:
    output, directory = finished(variant, FAITHFUL, ONE)
    assert f"replayed {STEPS} of {graphs} graphs" in output
    _, eager = finished(variant, "", ONE)
    assert_equal(directory, eager)


def test_two_ranks_by_graphs_train_as_with_ddp(finished: Finished) -> None:
    output, directory = finished("dropout", FAITHFUL, TWO)
    assert output.count(f"replayed {STEPS} of 1 graphs") == 2
    assert_equal(directory, finished("dropout", "", TWO)[1])


FAILING = "def capture(step):\n    raise RuntimeError('CUDA error: operation not permitted')\n"
WRONG = "def capture(step):\n    return lambda: (step(), [a.mul_(1.1) for a in step.__self__.gradients])\n"
FULL = (
    "import torch\ndef init(*arguments):\n    raise torch.OutOfMemoryError('CUDA out of memory.\\nMore')\n"
    "graph._Graph.__init__, capture = init, None\n"
)


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (FULL, "OutOfMemoryError: CUDA out of memory."),
        (FAILING, "RuntimeError: CUDA error: operation not permitted"),
        (WRONG, "its gradients differ by "),
    ],
    ids=["full", "failing", "wrong"],
)
def test_a_graph_that_cannot_be_trusted_is_not_used(capture: str, reason: str, finished: Finished) -> None:
    output, directory = finished("dropout", f"{ON_A_CPU}{capture}graph.capture = capture", ONE)
    (line,) = [line for line in output.splitlines() if line.startswith("no CUDA graph")]
    assert line.startswith(f"no CUDA graph ({reason}")
    assert line.endswith("): continuing without")
    assert "replayed 1" not in output
    assert_equal(directory, finished("dropout", "", ONE)[1])


def test_if_one_rank_has_no_graph_none_uses_one(finished: Finished) -> None:
    capture = f"{FAILING}if os.environ.get('RANK') != '1': capture = lambda step: step\n"
    output, directory = finished("dropout", f"{ON_A_CPU}{capture}graph.capture = capture", TWO)
    assert output.count("no CUDA graph (another rank has none): continuing without") == 1
    assert "replayed 1" not in output
    assert_equal(directory, finished("dropout", "", TWO)[1])


def test_a_device_without_graphs_trains_without_a_word(finished: Finished) -> None:
    output, directory = finished("dropout", "", ONE)
    assert "CUDA graph" not in output
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"

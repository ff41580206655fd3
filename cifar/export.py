"""Exports a trained network as one file for other programs: ONNX or torch.export.

    python -m cifar.export --run runs/resnet --output resnet.onnx

It takes uint8 RGB images [n, 32, 32, 3], any n, and returns probabilities float32 [n, classes]: weights, normalisation
and class names are inside. The file gets its name only after its outputs have been compared with the run's network.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np

from cifar import files, names
from cifar.errors import Parser, UserError, command_line, outlive_readers
from cifar.explain import runs
from cifar.explain.findings import Float, UInt8

if TYPE_CHECKING:
    import torch

Program = Callable[[UInt8], Float]

BATCH = 256  # images at a time, to verify
TOLERANCE = 1e-4  # between two probabilities of an image and class
NEEDS = {".onnx": ("onnx", "onnxruntime", "onnxscript"), ".pt2": ()}  # packages of each format
INPUT, OUTPUT, CLASSES = "images", "probabilities", "classes"


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises UserError for a wrong flag, an --output that cannot be written, and a package that is missing.
    """
    parser = Parser(
        prog="python -m cifar.export",
        allow_abbrev=False,
        description="Write a finished run's network as one file, and verify it on the run's test images.",
    )
    add = parser.add_argument
    runs.add_flag(parser)
    add("--output", type=Path, required=True, metavar="FILE", help="a new .onnx file, or .pt2 for torch.export")
    add("--data", metavar="PATH", help="where the test images are (as in training)")
    asked = parser.parse_args(argv)
    output: Path = asked.output
    if output.suffix not in NEEDS:
        raise UserError(f"--output {output} has an unknown suffix; use one of: {', '.join(NEEDS)}")
    if os.path.lexists(output):
        raise UserError(f"--output {output} exists; name a new file")
    if not runs.can_be_written(output.parent):
        raise UserError(f"--output {output} cannot be written; name another folder")
    if missing := [package for package in NEEDS[output.suffix] if importlib.util.find_spec(package) is None]:
        raise UserError(f"{', '.join(missing)} not installed; install it with: pip install '.[export]'")
    return asked


def export(run: runs.Run, test_images: UInt8, output: Path) -> tuple[Float, float]:
    """Writes and verifies `output`; returns its probabilities on the test images, and their largest error.

    Raises UserError if they are not those of the run's network.
    """
    import torch

    on_cpu = torch.device("cpu")
    network = runs.load(run, on_cpu)

    def reference(images: UInt8) -> Float:
        answers: Float = runs.logits(run, network, images).softmax(dim=1).numpy()
        return answers

    # A contiguous copy: other runtimes do not know channels-last, and the layout changes the order of sums.
    plain: torch.nn.Module = runs.load(run, on_cpu).to(memory_format=torch.contiguous_format)
    whole = _with_normalization(plain, run)
    write, load = {".onnx": (_write_onnx, _load_onnx), ".pt2": (_write_pt2, _load_pt2)}[output.suffix]
    output.parent.mkdir(parents=True, exist_ok=True)
    with _under_another_name(output) as temporary:
        write(whole, run.classes, temporary)
        program = load(temporary)
        found, expected = (_of_all(answers, test_images) for answers in (program, reference))
        _compare(found, expected)
        _compare(program(test_images[:1]), expected[:1])  # another batch size
    return found, float(np.abs(found - expected).max())


def _with_normalization(network: "torch.nn.Module", run: runs.Run) -> "torch.nn.Module":
    import torch

    class Whole(torch.nn.Module):
        """Takes uint8 [n, 32, 32, 3], gives probabilities [n, classes]."""

        mean: torch.Tensor
        std: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", 255 * torch.tensor(run.mean).view(3, 1, 1))
            self.register_buffer("std", 255 * torch.tensor(run.std).view(3, 1, 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            normalized = (images.permute(0, 3, 1, 2).float() - self.mean) / self.std
            probabilities: torch.Tensor = self.network(normalized).softmax(dim=1)
            return probabilities

    return Whole().eval()


def _exported(whole: "torch.nn.Module") -> "torch.export.ExportedProgram":
    import torch

    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    return torch.export.export(whole, (example,), dynamic_shapes={INPUT: {0: torch.export.Dim("n", min=1)}})


def _write_onnx(whole: "torch.nn.Module", classes: list[str], path: Path) -> None:
    import onnx
    import torch

    program = torch.onnx.export(
        _exported(whole), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
    )
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {CLASSES: json.dumps(classes)})
    path.write_bytes(model.SerializeToString())


def _load_onnx(path: Path) -> Program:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run([OUTPUT], {INPUT: images})[0]


def _write_pt2(whole: "torch.nn.Module", classes: list[str], path: Path) -> None:
    import torch

    with path.open("wb") as file:
        torch.export.save(_exported(whole), file, extra_files={f"{CLASSES}.json": json.dumps(classes)})


def _load_pt2(path: Path) -> Program:
    import torch

    with path.open("rb") as file:
        program = torch.export.load(file).module()
    return lambda images: program(torch.from_numpy(images)).detach().numpy()


def _of_all(program: Program, images: UInt8) -> Float:
    return np.concatenate([program(images[start : start + BATCH]) for start in range(0, len(images), BATCH)])


def _compare(found: Float, expected: Float) -> None:
    """Raises UserError if probabilities differ by more than TOLERANCE, or classes differ that are no near tie."""
    difference = np.abs(found - expected).max()
    second, first = np.sort(expected, axis=1)[:, -2:].T
    others = (found.argmax(axis=1) != expected.argmax(axis=1)) & (first - second > TOLERANCE)
    if not difference <= TOLERANCE or others.any():
        raise UserError(
            f"the exported file is not the network: probabilities differ by up to {difference:.2g}, and {others.sum()} "
            "of the test images get another class; nothing was written. Try the other format"
        )


@contextmanager
def _under_another_name(output: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `output` if the block does not raise."""
    temporary = output.with_name(f".{output.stem}-{uuid4().hex}{output.suffix}")
    try:
        with runs.written_to(output.parent):
            yield temporary
            files.sync(temporary)
            _name(temporary, output)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _name(temporary: Path, output: Path) -> None:
    """Gives the file its name; raises OSError where somebody else has made one, unlike a renaming."""
    try:
        os.link(temporary, output)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with output.open("xb") as file:
            try:
                file.write(temporary.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                output.unlink()
                raise


def start(asked: argparse.Namespace) -> None:
    """Exports, and prints the largest difference."""
    run = runs.open_run(asked.run_dir)

    data = runs.images(run, asked.data)
    found, difference = export(run, data.test_images, asked.output)
    epochs, history = runs.prediction_history(run, data)
    print(f"{asked.output}: {asked.output.stat().st_size / 1e6:.1f} MB, verified on {len(found):,} test images: "
          f"probabilities differ by at most {difference:.1g} from the network's in float32")  # fmt: skip
    if len(epochs):
        same = (history[epochs.argmax()] == found.argmax(axis=1)).mean()
        print(f"{same:.2%} of the classes are those of the run's own last evaluation (in precision {run.precision})")
    print(f"{names.one_line(', '.join(run.classes))}: the classes, as JSON in its metadata under {CLASSES!r}")


def main() -> None:
    with command_line("cifar.export"):
        asked = parse_command_line(sys.argv[1:])
        outlive_readers()  # the file is what was asked for, not the lines about it
        start(asked)


if __name__ == "__main__":
    main()

"""python -m cifar.bench: peak throughput of this machine, how close this project gets, and a naive baseline.

    python -m cifar.bench                                # everything
    python -m cifar.bench step --recipe digits --repeats 3
    python -m cifar.bench --json bench.json

Measurements are interleaved (A B A B), each program in a process of its own; see interleave.py. The baseline is in
plain.py.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cifar import files, recipes
from cifar.bench import checkpoint, explain, input, limit, measurement, scaling, startup, step  # noqa: A004
from cifar.bench.context import Bench
from cifar.bench.measurement import Measurement
from cifar.errors import Parser, UserError, command_line

PARTS: dict[str, tuple[Callable[[Bench], list[Measurement]], str]] = {
    "limit": (limit.measure, "peak matmul throughput and memory bandwidth; always measured: the limit of the others"),
    "step": (step.measure, "a training step, also by operator, and evaluation"),
    "input": (input.measure, "augmented images on one core, and how long a step waits for them"),
    "scaling": (scaling.measure, "two processes against one, and the bytes that they exchange"),
    "checkpoint": (checkpoint.measure, "saving and resuming"),
    "explain": (explain.measure, "maps in batches against one at a time"),
    "startup": (startup.measure, "launch to first step, --help, the image cache"),
}


def parse_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line. Raises UserError for an unknown part or flag, or a value outside its range."""
    parser = Parser(
        prog="python -m cifar.bench",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure this machine, and this project on it.\n\n"
        + "\n".join(f"  {name:12}{text}" for name, (_, text) in PARTS.items()),
        epilog="Close other programs first. Images are scanned digits: nothing is downloaded.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure (everything)")
    parser.add_argument("--recipe", default="resnet", metavar="NAME", help=f"one of: {', '.join(recipes.RECIPES)}")
    parser.add_argument("--repeats", type=int, metavar="N", help="measurements of each program (5; on a GPU 3)")
    parser.add_argument("--seconds", type=float, metavar="S", help="seconds per measurement (5; on a GPU 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement to this file")
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in PARTS:
            raise UserError(f"part {part!r} is unknown; choose among: {', '.join(PARTS)}")
    if arguments.recipe not in recipes.RECIPES:
        raise UserError(f"--recipe {arguments.recipe!r} is unknown; choose one of: {', '.join(recipes.RECIPES)}")
    if arguments.repeats is not None and arguments.repeats < 2:
        raise UserError(f"--repeats {arguments.repeats} has no spread; give at least 2")
    if arguments.seconds is not None and not 0 < arguments.seconds <= 3600:
        raise UserError(f"--seconds {arguments.seconds:g} is outside 0..3600; give e.g. 5")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json {arguments.json}: there is no such folder; make it first")
    return arguments


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Measures the parts that are asked for, and prints each when it is done."""
    bench = Bench(arguments.recipe, arguments.repeats or 0, arguments.seconds or 0.0, folder)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    found: list[Measurement] = []
    for name, (part, _) in PARTS.items():
        if name == "limit" or not arguments.parts or name in arguments.parts:
            of_part = part(bench)
            if name == "limit":
                metadata = bench.machine
                print(f"{began}  {metadata['device']}, {metadata['threads']} threads, torch {metadata['torch']}; "
                      f"recipe {bench.recipe}, precision {bench.precision}\n{measurement.head()}")  # fmt: skip
            found += of_part
            print("\n".join(each.row() for each in of_part), flush=True)
    if arguments.json:
        content = {
            "date": began,
            "machine": bench.machine,
            "recipe": bench.recipe,
            "precision": bench.precision,
            "images": "scanned digits, over and over; random ones for maps and the forward pass",
            "repeats": bench.repeats,
            "seconds": bench.seconds,
            "counts": bench.counts,
            "figures": [each.json() for each in found],
        }
        files.replace(arguments.json, json.dumps(content, indent=1))


def main() -> None:
    with command_line("bench"):
        arguments = parse_command_line(sys.argv[1:])
        try:
            # In the current directory, so that checkpoints go to the same disk as those of runs.
            with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as folder:
                measure(arguments, Path(folder))
        except OSError as error:
            where = error.filename or "this folder"
            raise UserError(f"{where}: {error.strerror}; the benchmark needs 500 MB here temporarily") from None


if __name__ == "__main__":
    main()

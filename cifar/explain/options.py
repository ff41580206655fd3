"""The command line of explain.py. Nothing here imports torch, so that --help and a wrong flag are answered at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cifar import models
from cifar.errors import Parser, UserError
from cifar.explain import layers
from cifar.explain.maps import METHODS
from cifar.explain.runs import Run

ORDERS = ("confident", "uncertain", "random")
COUNT = 10


@dataclass(frozen=True)
class ExplainOptions:
    """The options of explain.py; None is the run's own value."""

    run_dir: Path
    data: str | None
    output: Path | None
    count: int | None  # None: COUNT, or as many as there are
    order: str
    seed: int
    true: str | None
    predicted: str | None
    method: str
    layer: str | None
    opacity: float
    check: bool
    neighbours: bool
    corruptions: bool
    compare: list[Path]


def parse_command_line(argv: Sequence[str]) -> ExplainOptions:
    """Parses the command line; `--help` prints and exits. Raises UserError for a flag or value that is wrong."""
    places = "; ".join(f"{name}: {layers.listed(layers.resolutions(name))}" for name in models.names())
    parser = Parser(
        prog="explain.py",
        allow_abbrev=False,
        description="Show what a finished run gets wrong, and which parts of the picture led to it.",
        epilog="Processes and precision are set by the launcher: accelerate launch explain.py --run runs/resnet",
    )
    add = parser.add_argument
    add(
        "--run",
        "--run-dir",  # for torchrun, which takes --run for the beginning of a flag of its own
        dest="run_dir",
        type=Path,
        default=Path("runs", "resnet"),
        metavar="DIR",
        help="a finished run, or one of an unfinished run's checkpoints (runs/resnet)",
    )
    add("--data", metavar="PATH", help="path of the images, as in training (default: those of the run)")
    add("--output", type=Path, metavar="DIR", help="where pictures and report go (explain/ in the run)")
    add("--count", type=int, metavar="N", help=f"mistakes in the pictures ({COUNT}); the report has all of them")
    add("--order", default="confident", metavar="|".join(ORDERS), help="which mistakes come first (confident)")
    add("--seed", type=int, default=0, metavar="N", help="random seed of --order random, --check and --corruptions (0)")
    add("--true", metavar="CLASS", help="only mistakes on images of this class")
    add("--predicted", metavar="CLASS", help="only mistakes predicted as this class")
    add("--method", default="gradcam", metavar="NAME", help=f"CAM method: {', '.join(METHODS)} (gradcam)")
    add(
        "--layer",
        metavar="NAME",
        help=f"layer of the maps (the deepest whose feature map has at least 7x7 positions); {places}",
    )
    add("--opacity", type=float, default=0.5, metavar="0..1", help="opacity of a map over its picture (0.5)")
    add("--check", action="store_true", help="measure map faithfulness against a shuffled baseline; minutes on a CPU")
    add(
        "--neighbours",
        action="store_true",
        help="the nearest training images of each mistake, and test images with a near-duplicate in the training set",
    )
    add(
        "--corruptions",
        action="store_true",
        help="accuracy under the 15 corruptions of CIFAR-10-C at 5 severities, made here and not the published "
        "files: evaluates the test images 75 times; on two CPU cores 3 minutes for digits, 75 for CIFAR-10",
    )
    add("--compare", type=Path, nargs="+", default=[], metavar="RUN",
        help="other runs on the same images: how many misclassify an image too; with --corruptions, side by side",
    )  # fmt: skip
    options = ExplainOptions(**vars(parser.parse_args(argv)))
    if options.count is not None and options.count < 1:
        raise UserError(f"--count {options.count} shows nothing; give at least 1")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed} is outside 0..2^63 - 1; give e.g. 0")
    if not 0 <= options.opacity <= 1:
        raise UserError(f"--opacity {options.opacity:g} is outside 0..1; give e.g. 0.5")
    for flag, value, known in (("--order", options.order, ORDERS), ("--method", options.method, METHODS)):
        if value not in known:
            raise UserError(f"{flag} {value!r} is unknown; choose one of: {', '.join(known)}")
    return options


def check(options: ExplainOptions, run: Run) -> None:
    """Raises UserError for a class or a layer that the run's network does not know."""
    for flag, name in (("--true", options.true), ("--predicted", options.predicted)):
        if name is not None and name not in run.classes:
            raise UserError(f"{flag} {name!r} is not a class of {run.path}; choose one of: {', '.join(run.classes)}")
    known = layers.resolutions(run.network)
    if options.layer is not None and options.layer not in known:
        raise UserError(f"--layer {options.layer!r} is unknown; choose one of: {layers.listed(known)}")

"""Recipes: every hyper-parameter of a training run as one typed, frozen, validated value.

A recipe is a function that returns a `Recipe`; its docstring states command, cost and expected score. A new one is a
function with the `@recipe` decorator, and the command line and the tests find it. The flags of `train.py` are made
from the fields' types. Nothing here imports torch, so that `train.py --help` answers at once.
"""

import argparse
import inspect
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cifar.errors import Parser, UserError


class Recipe(BaseModel):
    """All hyper-parameters of a run. Processes and mixed precision are set by `accelerate launch`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[
        str, Field(min_length=1, description="cifar10, cifar100, digits, or an archive or folder of images")
    ] = "cifar10"
    fit: Annotated[
        int,
        Field(
            description="32: center-crop images of any size and mode to a square, and resize it to 32x32; 0: accept "
            "32x32 images only"
        ),
    ] = 0
    network: Annotated[str, Field(description="a file of cifar/models")] = "resnet"
    epochs: Annotated[int, Field(ge=1, le=100_000, description="passes over the training images")] = 24
    global_batch_size: Annotated[
        int, Field(ge=1, le=1_000_000, description="images per optimizer step, over all processes together")
    ] = 512
    gradient_accumulation_steps: Annotated[
        int,
        Field(
            ge=1,
            description="micro-batches that each process splits its batch into, to save memory; batch-norm statistics "
            "are per micro-batch, so results depend on it",
        ),
    ] = 1
    gradient_compression: Annotated[
        Literal["none", "bf16"],
        Field(description="format of the gradients that processes exchange; bf16 halves the traffic"),
    ] = "none"
    augmentation: Annotated[str, Field(description="an entry of cifar/data/augment.py")] = "crop_flip_cutout"
    augmentation_backend: Annotated[
        Literal["albumentations", "device"],
        Field(
            description="albumentations: image by image, in dataloader workers; device: whole batches, on the "
            "training device"
        ),
    ] = "albumentations"
    image_sizes: Annotated[
        str,
        Field(
            pattern=r"^\d+(,\d+)*$",
            description="progressive resizing: sides of the training images, each for an equal part of the steps, "
            "e.g. 24,28,32",
        ),
    ] = "32"
    optimizer: Annotated[
        Literal["adam", "muon"],
        Field(description="adam, or muon for convolution filters and Nesterov SGD for the rest"),
    ] = "adam"
    peak_learning_rate: Annotated[
        float, Field(gt=0, le=100, description="peak learning rate; with muon, of the convolution filters")
    ] = 0.01
    bias_learning_rate: Annotated[
        float, Field(gt=0, le=10_000, description="peak learning rate of biases and norms (muon only)")
    ] = 0.1
    head_learning_rate: Annotated[
        float, Field(gt=0, le=100, description="peak learning rate of the linear layer (muon only)")
    ] = 0.1
    peak_epoch: Annotated[
        float,
        Field(
            ge=0,
            description="epoch at which the learning rate peaks before it falls to zero; scaled with --epochs unless "
            "given",
        ),
    ] = 5.0
    freeze_at: Annotated[
        float, Field(gt=0, le=1, description="fraction of the steps after which early layers are frozen")
    ] = 1.0
    weight_decay: Annotated[
        float,
        Field(ge=0, le=1, description="L2 penalty; with muon, not on filters, and divided by each group's peak rate"),
    ] = 1e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1, description="probability spread over all classes")] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1, description="rate on the features before the linear layer")] = 0.1
    test_time_augmentation: Annotated[
        bool,
        Field(description="at the end, use test-time augmentation for the least confident quarter of the test images"),
    ] = False
    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="random seed of initial weights, data order, augmentation and dropout")
    ] = 0

    @field_validator("fit")
    @classmethod
    def fits_the_networks(cls, fit: int) -> int:
        if fit not in (0, 32):
            raise ValueError("the networks take images of 32x32 pixels; give --fit 32")
        return fit

    @field_validator("image_sizes")
    @classmethod
    def images_survive_three_poolings(cls, sizes: str) -> str:
        if not all(16 <= int(size) <= 64 for size in sizes.split(",")):
            raise ValueError("each side must be from 16 to 64")
        return sizes

    @model_validator(mode="after")
    def peak_lies_within_training(self) -> "Recipe":
        if self.peak_epoch >= self.epochs:
            raise ValueError(
                f"peak_epoch {self.peak_epoch:g} must be less than the number of epochs, {self.epochs}; "
                "set --peak-epoch or more --epochs"
            )
        return self


FORMER_NAMES = {"augment": "augmentation_backend"}  # of fields: understood as a flag, and in the files of a run

RECIPES: dict[str, Callable[[], Recipe]] = {}


def recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Lists a recipe under its function's name."""
    RECIPES[function.__name__] = function
    return function


@recipe
def resnet() -> Recipe:
    """ResNet of 6.6 M parameters on CIFAR-10: 24 epochs of Adam, one cycle of the learning rate, crop, flip and cutout.

    accelerate launch --mixed_precision bf16 train.py

    Expect 90.7 % test accuracy on CIFAR-10 re-encoded as JPEG, after 69 minutes on 2 CPU cores with native bf16, or
    84 s on an H200 with --augmentation-backend device.
    """
    return Recipe()


@recipe
def resnet_fast() -> Recipe:
    """The network of `resnet` in 0.30 of its time: Muon, progressive resizing, early layers frozen for the last fifth.

    accelerate launch --mixed_precision bf16 train.py --recipe resnet_fast

    Expect 90.6 % test accuracy on CIFAR-10 re-encoded as JPEG, after 20 minutes on 2 CPU cores with native bf16, or
    44 s on an H200.
    """
    return Recipe(
        epochs=10,
        global_batch_size=512,
        augmentation="crop_alternating_flip",
        augmentation_backend="device",
        image_sizes="24,28,32",
        optimizer="muon",
        peak_learning_rate=0.106,
        bias_learning_rate=0.2,
        head_learning_rate=0.001,
        peak_epoch=1.0,
        freeze_at=0.8,
        weight_decay=1e-4,
        label_smoothing=0.2,
        dropout=0.0,
    )


@recipe
def speedrun() -> Recipe:
    """airbench94 in two thirds of its time: a small network with frozen whitening, Muon, progressive resizing, TTA.

    accelerate launch --mixed_precision bf16 train.py --recipe speedrun

    Expect 90.8 % test accuracy with test-time augmentation on CIFAR-10 re-encoded as JPEG, after 5 minutes on 2 CPU
    cores with native bf16, or 40 s on an H200.
    """
    return Recipe(
        network="whitened",
        epochs=9,
        global_batch_size=1536,
        augmentation="crop_alternating_flip_light",
        augmentation_backend="device",
        image_sizes="20,24,28,28,32",
        optimizer="muon",
        peak_learning_rate=0.23,
        bias_learning_rate=90.0,
        head_learning_rate=0.015,
        peak_epoch=0.0,
        freeze_at=0.7,
        weight_decay=0.002,
        label_smoothing=0.1,
        dropout=0.0,
        test_time_augmentation=True,
    )


@recipe
def digits() -> Recipe:
    """The network of `resnet` on the 1,797 scanned digits of scikit-learn, which need no download.

    accelerate launch train.py --recipe digits

    Expect 98 % test accuracy or more, after one minute on 2 CPU cores with native bf16, 3.5 with AVX2 alone.
    """
    return Recipe(
        data="digits",
        epochs=6,
        global_batch_size=64,
        augmentation="crop_cutout",
        peak_learning_rate=2e-3,
        peak_epoch=2.0,
    )


class RunOptions(NamedTuple):
    """A run's options that are not hyper-parameters: directory, resuming, saving, determinism, CUDA graph, profile."""

    run_dir: Path
    resume: str
    checkpoint_every: int
    recipe_name: str
    deterministic: bool
    cuda_graph: Literal["auto", "off"]
    profile: int  # steps


def parse_command_line(argv: Sequence[str]) -> tuple[Recipe, RunOptions]:
    """Parses the arguments of `train.py` into a recipe and options.

    Raises UserError for an unknown recipe or flag and for values outside their range; `--help` prints the values of
    the recipe that is named beside it, and exits.
    """
    chosen = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    chosen.add_argument("--recipe", default="resnet")
    name = chosen.parse_known_args(argv)[0].recipe
    if name not in RECIPES:
        raise UserError(f"--recipe {name!r} is unknown; choose one of: {', '.join(RECIPES)}")
    defaults = RECIPES[name]()

    parser = Parser(
        prog="train.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Train an image classifier.\n\nRecipe {name}: {inspect.getdoc(RECIPES[name])}",
        epilog="Processes and precision are set by the launcher: accelerate launch --mixed_precision bf16 train.py ...",
    )
    _add_options(parser, name)
    group = parser.add_argument_group("fields of the recipe")
    for field, info in Recipe.model_fields.items():
        names = [field, *(former for former, now in FORMER_NAMES.items() if now == field)]
        group.add_argument(
            *("--" + name.replace("_", "-") for name in names),
            default=argparse.SUPPRESS,
            metavar="|".join(get_args(info.annotation)) or getattr(info.annotation, "__name__", "VALUE").upper(),
            help=f"{info.description} ({getattr(defaults, field)})",
        )
    arguments = vars(parser.parse_args(argv))
    overrides = {field: arguments[field] for field in Recipe.model_fields if field in arguments}
    every = arguments["checkpoint_every"]
    if not re.fullmatch("0*[1-9][0-9]{0,17}", every):
        raise UserError(f"--checkpoint-every {every} is not a number of steps; give a whole number of at least 1")
    if arguments["profile"] < 0:
        raise UserError(f"--profile {arguments['profile']} is not a number of steps; give e.g. 10")
    options = RunOptions(
        arguments["run_dir"] or Path("runs", name),
        arguments["resume"],
        int(every),
        name,
        arguments["deterministic"],
        arguments["cuda_graph"],
        arguments["profile"],
    )
    if "epochs" in overrides and "peak_epoch" not in overrides:
        overrides["peak_epoch"] = _moved_peak(defaults, overrides["epochs"], options)
    return override(defaults, overrides), options


def _add_options(parser: Parser, name: str) -> None:
    """Adds the flags that are not fields of a recipe."""
    parser.add_argument("--recipe", default="resnet", metavar="NAME", help=f"one of: {', '.join(RECIPES)}")
    # torchrun takes --run for the beginning of a flag of its own.
    parser.add_argument(
        "--run", "--run-dir", dest="run_dir", type=Path, metavar="DIR", help=f"run directory (runs/{name})"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="resume from the run's newest complete checkpoint (auto), start in a new directory (never), "
        "or resume from the checkpoint at PATH (auto)",
    )
    parser.add_argument(
        "--checkpoint-every", default="500", metavar="STEPS", help="steps between checkpoints, and at epoch ends (500)"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="use deterministic operations only: bit-identical on the same hardware, libraries and processes",
    )
    parser.add_argument(
        "--cuda-graph",
        default="off",
        choices=("auto", "off"),
        help="on a GPU, replay forward pass, loss and backward pass as one CUDA graph if its gradients match eager "
        "ones (off)",
    )
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="profile this many steps: a trace per rank in RUN/profile/, and where the time goes (0)",
    )


def _moved_peak(defaults: Recipe, epochs: str, options: RunOptions) -> float:
    """Returns the recipe's peak epoch, scaled to another number of epochs, so that the schedule keeps its shape.

    A run or checkpoint of a version that did not scale it keeps its own.
    """
    chosen = override(defaults.model_copy(update={"peak_epoch": 0.0}), {"epochs": epochs}).epochs
    for path in (options.run_dir / "recipe.json", Path(options.resume, "state.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            recorded = json.loads(path.read_bytes())["recipe"]
            if recorded["epochs"] == chosen and recorded["peak_epoch"] == defaults.peak_epoch:
                return defaults.peak_epoch
    return defaults.peak_epoch * chosen / defaults.epochs


def override(base: Recipe, overrides: dict[str, Any]) -> Recipe:
    """Returns `base` with some fields changed (strings are converted). Raises UserError, naming an invalid flag."""
    try:
        return Recipe(**{**base.model_dump(), **overrides})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        wrong = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise UserError(wrong) from None
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise UserError(f"{flag} {first['input']}: {wrong[0].lower()}{wrong[1:]}") from None


def current_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns recorded fields under the names that they have today."""
    return {FORMER_NAMES.get(field, field): value for field, value in fields.items()}


def differences(ours: Recipe, theirs: dict[str, Any]) -> list[str]:
    """Lists the fields that affect the result and differ, as 'field (theirs there, ours here)'.

    `data` and `fit` are left out: images are compared by content.
    """
    # A run of a version without a field used what is now its default.
    mine, theirs = ours.model_dump(), {**Recipe().model_dump(), **current_names(theirs)}
    return [
        f"{field} ({theirs.get(field)!r} there, {mine.get(field)!r} here)"
        for field in sorted(mine.keys() | theirs.keys())
        if field not in {"data", "fit"} and mine.get(field) != theirs.get(field)
    ]

"""A trained network that can be explained: a finished run, or one checkpoint of an unfinished one.

Weights, network, classes and normalisation are read from it alone.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cifar import formats, models, names, recipes
from cifar.errors import Parser, UserError
from cifar.explain.findings import Int64, UInt8

if TYPE_CHECKING:  # a wrong --run is refused before torch has loaded
    import torch
    from torch import nn

    from cifar.data.cache import Data


# What an explanation writes into its folder, and where it keeps that until all of it is there.
FILES = re.compile(
    r"(gallery|cam|confusion|calibration|corruptions)\.png|maps/\d{5,}\.png|misclassified\.csv|report\.html|result\.json"
)
STAGING = ".explain-*.tmp"


@dataclass(frozen=True)
class Run:
    """A trained network and where it is. Statistics are per channel on a scale of 0 to 1."""

    path: Path  # as it was named: the run's directory, or a checkpoint
    finished: bool  # False for a checkpoint
    network: str
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    recipe: dict[str, Any]
    data_fingerprint: str
    sha256: str  # of model.safetensors
    test_accuracy: float | None  # a fraction, as the finished run measured it
    step: int  # optimizer steps taken
    precision: str | None  # that it was trained in; None: the version that wrote it did not say
    ended: datetime | None = None  # UTC; None: a checkpoint, or the version that wrote it did not say

    @property
    def directory(self) -> Path:
        return self.path if self.finished else self.path.absolute().parents[1]

    @property
    def end(self) -> str:
        """When the run ended, to the minute; '' if that is not known."""
        return f"{self.ended:%Y-%m-%d %H:%M} UTC" if self.ended else ""

    @property
    def output(self) -> Path:
        """The default folder of an explanation; not in a checkpoint's directory, to which nothing is added."""
        return self.directory / ("explain" if self.finished else f"explain-{self.path.name}")

    def events(self, output: Path) -> Path:
        """Returns where the pictures go for TensorBoard: the run's directory, or `output` where that cannot be written.

        TensorBoard follows the newest file of a directory: another one would hide the progress of an unfinished run.
        """
        return self.directory if self.finished and os.access(self.directory, os.W_OK) else output


def open_run(path: Path) -> Run:
    """Opens a run or a checkpoint. Raises UserError if there is none, the run is not finished, or files are damaged."""
    if any("\ud800" <= letter <= "\udfff" for letter in str(path.absolute())):  # how Python keeps other bytes
        raise UserError(f"--run {names.one_line(str(path))} has a name that is not UTF-8; rename the folder")
    finished = is_finished(path)
    if not finished and not (path / "state.json").is_file():
        raise _nothing_to_explain(path)
    try:
        config = json.loads((path / ("config.json" if finished else "state.json")).read_bytes())
        if config["format"] > formats.RUN:
            raise UserError(f"{path} has format {config['format']}, this version reads up to {formats.RUN}; update it")
        run = Run(
            path=path,
            finished=finished,
            network=config["network"],
            classes=list(config["classes"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            recipe=recipes.current_names(dict(config["recipe"])),
            data_fingerprint=config["data_fingerprint"],
            sha256=config["sha256"] if finished else config["sha256"]["model.safetensors"],
            test_accuracy=config["test_accuracy"] if finished else None,
            step=json.loads((path / "result.json").read_bytes())["steps"] if finished else config["progress"]["step"],
            precision=config.get("precision"),
            ended=datetime.fromisoformat(config["ended"]).astimezone(UTC) if "ended" in config else None,
        )
        with (path / "model.safetensors").open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; choose another --run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); choose another --run") from None
    if digest != run.sha256:
        raise UserError(f"{path / 'model.safetensors'} does not match its sha256; choose another --run or checkpoint")
    if run.network not in models.names():
        raise UserError(f"{path}: network {run.network!r} is unknown; choose a run of: {', '.join(models.names())}")
    return run


def add_flag(parser: Parser) -> None:
    """Adds --run, for programs that need a finished run."""
    help_ = "a finished run (runs/resnet)"
    parser.add_argument("--run", dest="run_dir", type=Path, default=Path("runs", "resnet"), metavar="DIR", help=help_)


def is_finished(path: Path) -> bool:
    """Checks whether this is the directory of a finished run. Raises UserError where that cannot be seen."""
    try:
        return all((path / name).is_file() for name in ("config.json", "result.json"))  # written last, in this order
    except OSError as error:  # it is not for this user to read, or its name is too long for any file
        raise UserError(f"--run {path}: {error.strerror}; choose another --run") from None


def _nothing_to_explain(path: Path) -> UserError:
    if not path.is_dir():
        return UserError(f"{path} does not exist; name the directory of a finished run")
    from cifar import checkpoint

    try:
        newest, _ = checkpoint.newest(path / "checkpoints")
    except OSError as error:
        return UserError(f"{path}/checkpoints: {error.strerror}; make it readable")
    if newest is None:
        return UserError(f"{path} holds neither a finished run nor a complete checkpoint; choose another")
    return UserError(f"{path} is not finished; its newest complete checkpoint can be explained: --run {newest}")


def check_output(folder: Path) -> None:
    """Raises UserError for a folder that is not writable, or holds a run or files that would be replaced.

    It need not exist. An explanation that is there is replaced, and what is left of one whose replacement broke off.
    """
    for name in ("recipe.json", "config.json", "state.json"):  # a run has a result.json, as an explanation has
        if os.path.lexists(folder / name):
            raise UserError(f"output folder {folder} holds a run ({name}); choose another --output")
    with suppress(OSError):  # it does not exist, or cannot be looked into: see below
        found = [path.relative_to(folder) for path in (*folder.iterdir(), *folder.glob("maps/*"))]
        theirs = sorted(str(path) for path in found if FILES.fullmatch(str(path)))
        if theirs and not any(path.match(STAGING) for path in found) and not _is_explanation(folder / "result.json"):
            raise UserError(
                f"output folder {folder} holds files that are not an explanation ({theirs[0]}); choose another --output"
            )
    if not can_be_written(folder):
        raise UserError(f"output folder {folder} is not writable; choose another --output")


def _is_explanation(result: Path) -> bool:
    try:
        found = json.loads(result.read_bytes())
        return isinstance(found, dict) and {"method", "layer"} <= found.keys()
    except (OSError, ValueError):
        return False


def can_be_written(folder: Path) -> bool:
    """Checks whether files could be written into a folder, which need not exist yet."""
    place = folder.absolute()
    try:
        while not place.exists():
            place = place.parent
        return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    except OSError:  # a name that is too long, or a folder that cannot be looked into
        return False


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Runs the block; whatever cannot be written within it is a UserError."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        raise UserError(f"{where} cannot be written ({error.strerror}); make room or choose another --output") from None


def load(run: Run, device: "torch.device") -> "nn.Module":
    """Loads the network with the run's weights, float32, in evaluation mode.

    Raises UserError where the weights are not those of the network and the classes that the run names.
    """
    import torch

    from cifar import checkpoint

    network = models.build(run.network, len(run.classes), dropout=0.0)
    checkpoint.load_weights(run.path / checkpoint.WEIGHTS, network)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()


def logits(run: Run, network: "nn.Module", pixels: UInt8) -> "torch.Tensor":
    """Returns logits float32 [n, C] of the run's network for pictures [n, 32, 32, 3], on its device."""
    import torch

    from cifar.data.augment import normalize

    images = torch.from_numpy(pixels).to(next(network.parameters()).device)
    with torch.no_grad():
        said: torch.Tensor = network(normalize(images, run.mean, run.std))
    return said


def images(run: Run, data: str | None) -> "Data":
    """Returns the images that the run was trained on, or those at `data` (as --data), prepared in the same way.

    Raises UserError for whatever is wrong with them.
    """
    from cifar.data.cache import open_data

    return as_trained(open_data(data or run.recipe["data"], fit=run.recipe.get("fit", 0) > 0), run)


def as_trained(data: "Data", run: Run) -> "Data":
    """Returns the images with the normalisation the network was trained with. Raises UserError for other classes."""
    if data.classes != run.classes:
        raise UserError(
            f"the images have the classes {', '.join(data.classes)}, but {run.path} was trained on "
            f"{', '.join(run.classes)}; give the --data that it was trained on"
        )
    return replace(data, mean=run.mean, std=run.std)


def recipe_name(run: Run) -> str:
    """Returns the recipe's name, or '' where the version that trained the run did not keep it."""
    try:
        name = json.loads((run.directory / "recipe.json").read_bytes()).get("name")
    except (OSError, ValueError, AttributeError):
        return ""
    return name if isinstance(name, str) else ""


def own_accuracy(run: Run, precision: str) -> str:
    """Returns what a finished run measured itself, and in which precision if not the one here; '' for a checkpoint."""
    if run.test_accuracy is None:
        return ""
    other = "" if run.precision in {None, precision} else f" in precision {run.precision}, here {precision}"
    return f"{run.test_accuracy:.2%}{other}"


def metadata(run: Run, data: "Data", accuracy: float, precision: str) -> dict[str, str]:
    """Returns the lines about the run that stand above a report."""
    recipe = run.recipe
    epochs = f"{recipe['epochs']} epoch{'s' if recipe['epochs'] > 1 else ''}"
    lengths = f"{epochs}, global batch {recipe['global_batch_size']}, seed {recipe['seed']}"
    own = own_accuracy(run, precision)
    return {
        "run": names.one_line(str(run.path)),
        "recipe": ", ".join(filter(None, (recipe_name(run), lengths))),
        "network": run.network,
        "trained": ", ".join(filter(None, (run.end, f"{run.step:,} steps"))),
        "weights": f"sha256 {run.sha256}",
        "test images": f"{len(data.test_labels):,}"
        + ("" if data.fingerprint == run.data_fingerprint else ", not those of the run"),
        "accuracy": f"{accuracy:.2%} in precision {precision}" + (f"; the run's own: {own}" if own else ""),
    }


def prediction_history(run: Run, data: "Data") -> tuple[Int64, UInt8]:
    """Returns the epochs [E] that the run evaluated on these images, if any, and the class [E, n] it predicted then.

    Of a checkpoint, the epochs that it had completed. Raises UserError for a file that is damaged.
    """
    from cifar import schedule
    from cifar.run import read_predictions

    none = np.empty(0, np.int64), np.empty((0, len(data.test_labels)), np.uint8)
    path = run.directory / "predictions.safetensors"
    if run.data_fingerprint != data.fingerprint:
        return none
    found, _ = read_predictions(run.directory, len(data.test_labels))
    if not found and path.is_file():
        raise UserError(f"{path} is damaged; choose another --run, or delete it to do without the epochs")
    epochs = schedule.epochs_completed(run.step, len(data.train_labels), run.recipe["global_batch_size"])
    kept = {epoch: predictions for epoch, predictions in sorted(found.items()) if epoch <= epochs}
    return (np.array(list(kept)), np.stack(list(kept.values()))) if kept else none


def others(run: Run, paths: list[Path]) -> tuple[list[Run], list[str]]:
    """Opens the paths. Returns those that are runs other than `run` and each other, and a line about each of the rest.

    Raises UserError for a run that is not finished.
    """
    known, lines = [run], []
    for path in paths:
        other = open_run(path)
        if not other.finished:
            raise UserError(f"--compare {path} is a checkpoint; name finished runs")
        for one in known:
            if one.sha256 == other.sha256 or one.directory.resolve() == other.directory.resolve():
                lines.append(f"--compare {path} is the same run as {one.path}; left out")
                break
        else:
            known.append(other)
    return known[1:], lines


def wrong_in(compared: list[Run], data: "Data") -> dict[str, npt.NDArray[np.bool_]]:
    """Returns for each run, by its path, which of the test images [n] its network got wrong at the end.

    Raises UserError for a run that was trained and evaluated on other images.
    """
    wrong = {}
    for run in compared:
        epochs, predictions = prediction_history(run, data)
        if not len(epochs):
            raise UserError(f"--compare {run.path} did not evaluate these images; name finished runs on the same data")
        wrong[str(run.path)] = predictions[epochs.argmax()] != data.test_labels
    return wrong

"""Atomic checkpoints, and the final weights.

A checkpoint is a directory `step-NNNNNNN` with `model.safetensors`, `optimizer.safetensors` and `state.json`. It is
written under a temporary name, synced and renamed. state.json has a sha256 of each file and of itself, and all that is
needed to rebuild the network: its name, classes and normalisation. There is no pickle. If a broken checkpoint already
has the name, the attempt's number is appended: `step-NNNNNNN-attempt-N`.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from cifar import device, failure, files, recipes
from cifar.attempt import Attempt
from cifar.errors import FULL, LOST, UserError, disk_error
from cifar.formats import RUN as FORMAT
from cifar.recipes import Recipe

KEEP = 3  # checkpoints of a run; one is enough to resume, the others guard against corrupted files
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_NAME = re.compile(r"step-(\d+)(?:-attempt-(\d+))?")


@dataclass
class Progress:
    """Training progress: all state that is not in the network or the optimizer."""

    step: int = 0  # optimizer steps taken
    seconds: float = 0.0  # spent so far, over all attempts
    # Sums over the images trained on since the last evaluation, for that epoch's mean loss and accuracy.
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    scaler: dict[str, Any] | None = None  # state of the float16 loss scaler

    def count(self, images: int, loss: float, correct: int) -> None:
        """Adds a step's mean loss and its number of correct predictions."""
        self.loss_sum += loss * images
        self.correct += correct
        self.seen += images

    def begin_epoch(self) -> None:
        """Resets the sums for the next epoch."""
        self.loss_sum, self.correct, self.seen = 0.0, 0, 0


class BrokenCheckpointError(Exception):
    """A checkpoint that is not what was saved: the message names it and says what is wrong."""


@dataclass(frozen=True)
class Chosen:
    """The checkpoint to resume from, if any, and a message for each broken one that was skipped."""

    path: Path | None = None
    step: int = 0  # of `path`, whatever its name: it may be a copy
    origin: str | None = None  # the checkpoint that --resume named when the run began, as an absolute path
    skipped: Sequence[str] = ()


class Snapshot:
    """Copies of weights and optimizer state at one step, to be written in the background."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        self.progress = replace(progress)
        tensors = {WEIGHTS: network.state_dict(), OPTIMIZER: optimizer_tensors(network, optimizer)}
        self._copies = {
            file: {name: tensor.detach().to("cpu", non_blocking=True, copy=True) for name, tensor in part.items()}
            for file, part in tensors.items()
        }
        self._mark = device.Mark(next(network.parameters()).device)

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Returns the copies by file, once the device has made them."""
        self._mark.wait()
        return self._copies


def write(attempt: Attempt, snapshot: Snapshot, metadata: dict[str, Any]) -> Path:
    """Writes `checkpoints/step-NNNNNNN` in the run and deletes all but the newest KEEP. Call it on rank 0 alone.

    `metadata` says what the weights are: at least network, classes, mean, std, recipe and data_fingerprint. Raises
    UserError where a weight or the optimizer's state is not finite, the disk is full or not writable, or a newer
    attempt has taken the run over; earlier checkpoints are then as they were.
    """
    directory = attempt.run_dir / "checkpoints"
    path = directory / f"step-{snapshot.progress.step:07d}"
    tensors = snapshot.tensors()
    # A finite loss does not imply a finite update, and no run could resume from such a checkpoint.
    if not all_finite([tensor for part in tensors.values() for tensor in part.values()]):
        raise UserError(
            f"weights are not finite after step {snapshot.progress.step}; lower --peak-learning-rate in a new --run "
            f"(last good checkpoint: {last_good(directory)})"
        )
    temporary = attempt.temporary(path)
    try:
        attempt.check()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with ThreadPoolExecutor() as pool:  # copying, writing, syncing and hashing all let other threads run
            digests = pool.map(lambda name: _write_tensors(temporary / name, tensors[name]), tensors)
            sums = dict(zip(tensors, digests, strict=True))
        state = {"format": FORMAT, **metadata, "progress": asdict(snapshot.progress), "sha256": sums}
        state["sha256"] = {**sums, STATE: _state_sum(state)}
        files.write(temporary / STATE, json.dumps(state, indent=1).encode())
        files.sync(temporary)
        path = _commit(attempt, temporary, path)
    except OSError as error:
        attempt.check()  # a newer one may have cleared the temporary directory away
        advice = "make room there" if error.errno in FULL else "make it writable"
        advice += " and start again with the same command: it resumes from the previous checkpoint"
        raise disk_error(error, f"{path}: checkpoint not written", advice) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):  # what cannot be listed now is deleted after a later save
        older = [other for other in found(directory) if _order(other) < _order(path)]
        for old in older[KEEP - 1 :]:
            _delete(attempt, old)
    return path


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Returns whether no tensor holds an infinity or NaN. Reads the device once for all of them."""
    numbers = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    largest = torch._foreach_norm(numbers, math.inf)  # of absolute values; NaN where there is one
    return bool(torch.stack([value.float() for value in largest]).isfinite().all())


def _commit(attempt: Attempt, temporary: Path, path: Path) -> Path:
    try:
        attempt.commit(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # A broken checkpoint was skipped at the start, and its step is reached again. It is left in place: an attempt
        # that froze before moving it could move a newer attempt's checkpoint instead.
        own = path.with_name(f"{path.name}-attempt-{attempt.number}")
        temporary.rename(attempt.temporary(own))
        attempt.commit(own)
        return own
    return path


def _delete(attempt: Attempt, old: Path) -> None:
    """Deletes a checkpoint. What cannot be deleted now is deleted after a later save."""
    with suppress(OSError):
        attempt.mark(old, STATE)
        shutil.rmtree(old)


def found(directory: Path) -> list[Path]:
    """Returns the checkpoints in a directory, newest first, complete or not. Raises OSError where it cannot be read."""
    try:
        names = os.listdir(directory)  # noqa: PTH208 -- Path.glob takes a folder that cannot be read for an empty one
    except FileNotFoundError:
        return []
    return sorted((directory / name for name in names if _NAME.fullmatch(name)), key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    """Returns step and attempt: of two checkpoints of the same step, the later one is complete."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} has not the name of a checkpoint")
    return int(match[1]), int(match[2] or 0)


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest complete checkpoint, or None, and what is wrong with each one that was skipped."""
    broken = []
    for path in found(directory):
        try:
            verify(path)
        except BrokenCheckpointError as error:
            broken.append(str(error))
        else:
            return path, broken
    return None, broken


def last_good(directory: Path) -> str:
    """Returns the newest complete checkpoint, for a message."""
    try:
        return str(newest(directory)[0] or "none yet")
    except (OSError, UserError):
        return "unknown"


def verify(path: Path) -> dict[str, Any]:
    """Returns the checkpoint's state after verifying the checksum of every file.

    Raises BrokenCheckpointError if a file is missing or does not match, UserError for a format of a later version or a
    disk that cannot be read.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_bytes())
        sums = dict(state["sha256"])
        own_sum = sums.pop(STATE)
        if _state_sum({**state, "sha256": sums}) != own_sum:
            raise BrokenCheckpointError(f"{path / STATE} does not match its own sha256")
        if state["format"] > FORMAT:
            raise UserError(f"{path} has format {state['format']}, this version reads up to {FORMAT}; update it")
        for name, digest in sums.items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise BrokenCheckpointError(f"{path / name} does not match its sha256")
    except OSError as error:
        if error.errno in LOST:  # nothing is known of it, and to skip it would be to lose its steps
            raise disk_error(error, f"{path} cannot be read", "") from None
        raise BrokenCheckpointError(f"{error.filename}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpointError(f"{path / STATE} is damaged ({error})") from None
    return state


def choose(directory: Path, resume: str) -> Chosen:
    """Returns the checkpoint to resume from according to `--resume`; none to start from scratch.

    A run that started from a named checkpoint resumes from its own newest one when the same command is given again.
    Raises UserError if there are checkpoints but none is complete, or the named one is not.
    """
    try:
        path, broken = newest(directory)
    except OSError as error:
        raise disk_error(error, f"{directory} cannot be read", "make it readable") from None
    own = _state(path) if path else {}
    step, origin = own["progress"]["step"] if path else 0, own.get("resumed_from")
    if resume in ("auto", "never"):
        if broken and path is None:
            raise UserError(f"{broken[0]}, and {directory} has no complete checkpoint; choose a new --run")
        return Chosen(path, step, origin, broken)
    named = Path(resume).resolve()
    if origin == str(named):
        return Chosen(path, step, origin, broken)
    try:
        named_step = verify(Path(resume))["progress"]["step"]
    except BrokenCheckpointError as error:
        raise UserError(f"--resume {resume}: {error}; name a complete checkpoint, or use --resume auto") from None
    if path and step > named_step:
        raise UserError(f"{directory} holds a later checkpoint, {path.name}; give a new --run to branch off")
    return Chosen(Path(resume), named_step, str(named))


def check_named(directory: Path, resume: str, recipe: Recipe, data_fingerprint: str) -> None:
    """Raises UserError where `--resume PATH` names no checkpoint from which this run could resume.

    Call it before the run is claimed: an attempt that is training there would end for nothing.
    """
    if resume in ("auto", "never"):
        return
    path = choose(directory, resume).path
    if path:
        _check_origin(path, _state(path), recipe, data_fingerprint)


def _check_origin(path: Path, state: dict[str, Any], recipe: Recipe, data_fingerprint: str) -> None:
    different = recipes.differences(recipe, state["recipe"])
    if different:
        raise UserError(f"{path} was written with another recipe: {', '.join(different)}; use the same, or a new --run")
    if state["data_fingerprint"] != data_fingerprint:
        raise UserError(f"{path} was trained on other images than --data {recipe.data}; give the same --data")


def _state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / STATE).read_bytes())
    return state


def changes(path: Path, metadata: dict[str, Any], global_batch_size: int) -> list[str]:
    """Describes what differs between the run that wrote a checkpoint and the one that resumes from it."""
    before = _state(path)
    lines = []
    ranks, now = before["world_size"], metadata["world_size"]
    if ranks != now:
        lines.append(
            f"processes: {ranks} before, {now} now, so {global_batch_size // ranks} images a process before, "
            f"{global_batch_size // now} now; same batches, but batch-norm statistics are per process, "
            "and the weights will not be equal bit for bit"
        )
    if before["precision"] != metadata["precision"]:
        lines.append(f"precision: {before['precision']} before, {metadata['precision']} now")
    theirs, ours = before.get("computed_on", {}), metadata["computed_on"]
    different = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
    if different:
        each = "; ".join(f"{name}: {theirs[name]} before, {ours[name]} now" for name in different)
        lines.append(f"{each}; same batches, but the weights may not be equal bit for bit")
    return lines


def restore(
    path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, data_fingerprint: str
) -> Progress:
    """Loads a verified checkpoint into network and optimizer; returns its progress.

    Raises UserError where it comes from another recipe, other images or another network.
    """
    state = _state(path)
    _check_origin(path, state, recipe, data_fingerprint)
    load_weights(path / WEIGHTS, network)
    tensors = safetensors.torch.load_file(path / OPTIMIZER)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue  # frozen: not in the optimizer
        optimizer.state[parameter] = {}
        for key in [key for key in tensors if key.rpartition(".")[0] == name]:
            value = tensors.pop(key)
            if value.shape == parameter.shape:  # a moment: laid out in memory as its parameter is
                value = torch.empty_like(parameter).copy_(value)
            optimizer.state[parameter][key.rpartition(".")[2]] = value.to(parameter.device)
    if tensors:
        raise UserError(f"{path / OPTIMIZER} is of another network ({min(tensors)}); choose another checkpoint")
    return Progress(**state["progress"])


def load_weights(path: Path, network: nn.Module) -> None:
    """Loads a safetensors file into the network. Raises UserError, naming a tensor, where names or shapes differ."""
    theirs, ours = safetensors.torch.load_file(path), network.state_dict()
    odd = sorted(name for name in theirs.keys() | ours.keys()
                 if name not in theirs or name not in ours or theirs[name].shape != ours[name].shape)  # fmt: skip
    if odd:
        raise UserError(f"{path} is of another network ({len(odd)} tensors differ, {odd[0]} first); choose another")
    network.load_state_dict(theirs)


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns the optimizer's state as '<parameter's name>.<key>', e.g. 'linear.weight.exp_avg'."""
    return {
        f"{name}.{key}": value
        for name, parameter in network.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def export(attempt: Attempt, network: nn.Module, config: dict[str, Any]) -> None:
    """Writes the result, `model.safetensors` and `config.json`, each atomically. Raises UserError, OSError."""
    weights = safetensors.torch.save(_contiguous(network.state_dict()))
    config = {"format": FORMAT, **config, "sha256": hashlib.sha256(weights).hexdigest()}
    for name, content in ((WEIGHTS, weights), ("config.json", json.dumps(config, indent=1).encode())):
        attempt.replace(attempt.run_dir / name, content)


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors refuses channels-last memory; the loader restores the layout.
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Writes a safetensors file, waits until it is on the disk, and returns its sha256. Raises OSError."""
    try:
        safetensors.torch.save_file(_contiguous(tensors), path)
    except SafetensorError as error:  # its way of passing on an OSError
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    failure.report_progress()
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it private, whatever the umask
    with path.open("rb") as file:
        os.fsync(file.fileno())
        failure.report_progress()
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_sum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

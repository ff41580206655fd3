"""One training step: gradients, and metrics that are read back asynchronously.

`model` includes mixed precision: Accelerator.prepare has wrapped its forward pass in the launcher's autocast.
"""

import math
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from cifar import device, failure, stop
from cifar.errors import UserError
from cifar.recipes import Recipe

# How many steps later a step's metrics are read, by device type. Reading a GPU's at once would let its queue run dry
# before each step; on a CPU there is nothing to wait for.
DELAY = {"cpu": 0, "cuda": 3}
MEASURED_STEPS = 10  # steps needed for a median of a rank's own work; the first ones are warm-up


class StepMetrics(NamedTuple):
    """A global batch's metrics, the same on all ranks."""

    step: int  # optimizer steps taken, this one included
    loss: float  # mean over the batch
    correct: int
    stop: bool  # a rank was asked to stop
    write_failed: bool  # rank 0 could not write something
    gradient_norm: float | None = None  # only on rank 0, and only of steps that are logged


class DelayedMetrics:
    """The metrics of each step, read DELAY steps later, at the same step by all ranks."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.ranks, self.delay = accelerator.num_processes, DELAY[accelerator.device.type]
        self._pending: deque[tuple[int, torch.Tensor, device.Mark]] = deque()

    def add(self, step: int, totals: torch.Tensor, norm: torch.Tensor | None = None) -> list[StepMetrics]:
        """Takes what `accumulate_gradients` returned for a step; returns the metrics that are due now, if any."""
        if norm is not None:
            totals = torch.cat((totals, norm.view(1)))
        copy = totals.to("cpu", non_blocking=True)  # into pinned memory
        self._pending.append((step, copy, device.Mark(totals.device)))
        return self.read(len(self._pending) - self.delay)

    def read(self, steps: int | None = None) -> list[StepMetrics]:
        """Waits for and returns the metrics of the next `steps` unread steps; of all by default."""
        found = []
        for _ in range(len(self._pending) if steps is None else steps):
            step, copy, mark = self._pending.popleft()
            mark.wait()
            loss, correct, stopping, write_failed, *norm = copy.tolist()
            found.append(StepMetrics(step, loss / self.ranks, round(correct), stopping > 0, write_failed > 0, *norm))
        return found


class OwnWork:
    """Measures this rank's own time in a step: up to its last backward pass, where it may start to wait for others.

    Ranks that average gradients all have the same step time; this identifies the straggler.
    """

    def __init__(self, of: torch.device) -> None:
        self.device = of
        self.steps: deque[tuple[device.Mark, device.Mark]] = deque(maxlen=1000)
        self.begins()

    def begins(self) -> None:
        """Marks a step's start. Call it before the step's images are waited for."""
        self.began = device.Mark(self.device, timed=True)
        self.compiles = False  # the network: such a step is not timed

    def elapsed(self) -> float:
        """Returns the seconds since the step's start on the host; NaN for a step that compiles the network."""
        return math.nan if self.compiles else time.perf_counter() - self.began.made

    def ends(self) -> None:
        """Marks the end of a step's own work. Call it before the step's first collective."""
        if not self.compiles:
            self.steps.append((self.began, device.Mark(self.device, timed=True)))

    def seconds(self) -> float:
        """Returns the median since the last call that returned one; NaN with fewer than MEASURED_STEPS steps."""
        if len(self.steps) < MEASURED_STEPS:
            return math.nan
        times = [end.seconds_since(start) for start, end in self.steps]
        self.steps.clear()
        return statistics.median(times)


def accumulate_gradients(
    accelerator: Accelerator,
    recipe: Recipe,
    own_work: OwnWork,
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    write_failed: bool = False,
) -> torch.Tensor:
    """Leaves the mean gradient of the global batch in the parameters; returns its totals for DelayedMetrics.

    `images` and `labels` are this rank's part of the batch. It is split into the recipe's number of micro-batches, and
    the ranks' gradients are averaged once, during the last one's backward pass. Raises UserError where the device has
    not enough memory, or batch-norm too few values.
    """
    parts = recipe.gradient_accumulation_steps
    totals = torch.zeros(2, device=accelerator.device)
    for part, (piece, piece_labels) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), start=1):
        with nullcontext() if part == parts else accelerator.no_sync(model):
            try:
                loss = micro_batch_loss(model, piece, piece_labels, recipe, totals)
                if part == parts:
                    own_work.ends()
                accelerator.backward(loss)
            except (RuntimeError, ValueError) as error:
                explained = _explained(error, accelerator, len(piece), len(images))
                if explained is None:
                    raise
                raise explained from None
        failure.step_progressed()
    return reduced_totals(accelerator, totals, write_failed)


def _explained(error: Exception, accelerator: Accelerator, images: int, share: int) -> UserError | None:
    """Translates an out-of-memory or batch-norm error into a UserError; None for a bug."""
    who = f"rank {accelerator.process_index} on {socket.gethostname()}"
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # on a GPU; on a CPU
        smaller = next((parts for parts in range(share // images + 1, share + 1) if share % parts == 0), None)
        advice = f"--gradient-accumulation-steps {smaller}, in a new --run, or more processes" if smaller else "a GPU"
        return UserError(f"{who} is out of memory with {images} images at a time; give {advice}")
    if "Expected more than 1 value per channel" in str(error):
        return UserError(
            f"{who} has one image at a time, of which batch-norm has no statistics where a map has one cell; give "
            "a larger --global-batch-size, fewer processes or fewer --gradient-accumulation-steps, in a new --run"
        )
    return None


def micro_batch_loss(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, labels: torch.Tensor, recipe: Recipe,
    totals: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Returns a micro-batch's part of the batch's mean loss.

    Adds it and the number of correct predictions to `totals` [2].
    """
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing) / recipe.gradient_accumulation_steps
    totals[0] += loss.detach()
    totals[1] += (logits.argmax(dim=1) == labels).sum()
    return loss


def reduced_totals(accelerator: Accelerator, totals: torch.Tensor, write_failed: bool) -> torch.Tensor:
    """Sums over the ranks: loss and correct predictions [2], stop requests, write failures.

    One small all-reduce carries all of it, so that all ranks act alike.
    """
    flags = torch.tensor((float(bool(stop.requested())), float(write_failed))).to(totals.device, non_blocking=True)
    reduced: torch.Tensor = accelerator.reduce(torch.cat((totals, flags)), reduction="sum")
    return reduced


def gradient_norm(accelerator: Accelerator, network: nn.Module) -> torch.Tensor:
    """Returns the L2 norm of all gradients together, unscaled. Call it between backward and the optimizer's step."""
    accelerator.unscale_gradients()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)

"""The record of a run, which rank 0 writes: checkpoints, metrics, pictures, TensorBoard, status, result.

On other ranks the methods only take part in collectives. Slow work runs in two background threads: one writes
checkpoints and metrics, of which nothing is dropped, the other draws figures. An error in either reaches all ranks with
the metrics of the next step.
"""

import math
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn, optim

from cifar import attempt as attempts
from cifar import checkpoint, failure, launch, profiling, run, stop, summary
from cifar.background import Background
from cifar.checkpoint import Chosen, Progress, Snapshot
from cifar.clock import Clock
from cifar.data.cache import Data
from cifar.data.loading import TrainingImages
from cifar.errors import UserError
from cifar.evaluation import Evaluation
from cifar.guard import RunPosition
from cifar.loop import StepMetrics
from cifar.ranks import raise_on_all_ranks, require_equal
from cifar.recipes import Recipe, RunOptions
from cifar.run import EpochMetrics, History
from cifar.schedule import Schedule

if TYPE_CHECKING:
    from cifar.tracking import Tracker

LOG_SECONDS = 0.25  # between logged steps, which cost a fraction of a millisecond each
PICTURE_SECONDS = 30  # between pictures, which keep a core busy for half a second
CHECK_SECONDS = 5  # between checks for a newer attempt, in addition to the one before each write
WAITING, TRAINING = "waiting for images", "training"  # on the clock
LATE = 0.1  # fraction of training spent waiting for images above which the run says so
SLOW = 1.5  # a rank is slow if its own time per step exceeds this multiple of the others' median
LAST_SAVE_SECONDS = 3  # how long a failed job waits for a save in progress


def finished_before(accelerator: Accelerator, options: RunOptions, recipe: Recipe) -> bool:
    """Returns whether the run is finished; rank 0 then says so.

    Raises UserError where the directory holds another one.
    """
    line = ""
    with raise_on_all_ranks(accelerator):
        if accelerator.is_main_process:
            run.check(options.run_dir, recipe, options.resume)
            line = run.finished(options.run_dir, recipe)
    line = broadcast_object_list([line])[0]
    if line and accelerator.is_main_process:
        print(line)
    return bool(line)


class RunRecord:
    """The record of one attempt at a run, from the checkpoint that it resumes to its result."""

    def __init__(
        self,
        accelerator: Accelerator,
        options: RunOptions,
        recipe: Recipe,
        data: Data,
        schedule: Schedule,
        clock: Clock,
    ) -> None:
        self.accelerator, self.options, self.recipe = accelerator, options, recipe
        self.run_dir = options.run_dir
        self.data, self.schedule, self.clock = data, schedule, clock
        self.attempt: attempts.Attempt | None = None
        self.tracker: Tracker | None = None
        # Before the run is claimed, which ends an attempt that is training there.
        require_equal(accelerator, self._command())
        number, token, chosen, evaluated = 0, "", Chosen(), 0
        with raise_on_all_ranks(accelerator):
            if accelerator.is_main_process:
                profiling.check(options.profile, schedule.total_steps)
                checkpoint.check_named(self.run_dir / "checkpoints", options.resume, recipe, data.fingerprint)
                self.attempt = run.start(options, recipe, data.fingerprint, accelerator.num_processes)
                chosen = checkpoint.choose(self.run_dir / "checkpoints", options.resume)
                with run.disk_errors_named():
                    self.history = History(self.attempt, chosen.step, data.test_labels)
                number, token, evaluated = self.attempt.number, self.attempt.token, self.history.last_epoch()
        number, token, chosen, evaluated = broadcast_object_list([number, token, chosen, evaluated])
        self.number, self.token, self.chosen, self.evaluated = number, token, chosen, evaluated  # the last: epochs
        with raise_on_all_ranks(accelerator):
            attempts.wait_until_visible(self.run_dir, self.number)
        self.writer, self.drawer = Background("writer"), Background("drawer")
        self.logged = self.checked = -math.inf
        self.drawn = time.monotonic()
        self.ended, self.status_lock = False, threading.Lock()
        self.own_works: list[float] = []  # seconds in a step, of each rank
        self.slow: set[int] = set()  # ranks already reported as slow
        self.metadata = {
            "network": recipe.network, "classes": data.classes, "mean": data.mean, "std": data.std,
            "recipe": recipe.model_dump(), "data_fingerprint": data.fingerprint,
            "world_size": accelerator.num_processes, "precision": accelerator.mixed_precision,
            "resumed_from": self.chosen.origin, "computed_on": launch.computed_on(accelerator),
        }  # fmt: skip
        self.progress = Progress()
        failure.when_ended(self._write_end, self._position)

    # ---- the beginning

    def _command(self) -> dict[str, object]:
        """Returns the settings that must be equal on all ranks. Paths of images may differ, images may not."""
        names = ("checkpoint_every", "deterministic", "cuda_graph", "profile")
        return {
            **{name: value for name, value in self.recipe.model_dump().items() if name != "data"},
            **{name: getattr(self.options, name) for name in names},
            "precision": self.accelerator.mixed_precision,
            "images": self.data.fingerprint[:8],
        }

    def resume(self, network: nn.Module, optimizer: optim.Optimizer) -> Progress:
        """Loads the checkpoint to resume from, if there is one, and returns its progress."""
        with raise_on_all_ranks(self.accelerator):
            if self.chosen.path:
                self.progress = checkpoint.restore(
                    self.chosen.path, network, optimizer, self.recipe, self.data.fingerprint
                )
        self.seconds_before = self.progress.seconds
        return self.progress

    @run.disk_errors_named()
    def start(self, network: nn.Module, images: TrainingImages) -> None:
        """Prints the set-up, and sets the status to `running`."""
        if self.attempt is None:
            return
        from cifar.tracking import Tracker  # TensorBoard and matplotlib: a second of imports, for rank 0 alone

        batch, path = self.recipe.global_batch_size, self.chosen.path
        self.tracker = Tracker(self.attempt, self.recipe, self.data, self.progress.step, self.schedule.total_steps)
        self.tracker.start(launch.topology(self.accelerator, batch), summary.table(network))
        if not self.progress.step or not (self.run_dir / "samples.png").exists():
            self.drawer.submit(run.disk_errors_named(self.attempt)(self.tracker.samples(images)))
        for line in self.chosen.skipped:
            self.tracker.say(f"skipped a broken checkpoint: {line}")
        if path:
            self.tracker.say(f"attempt {self.attempt.number}: resuming from {path}")
            for line in checkpoint.changes(path, self.metadata, batch):
                self.tracker.say(line)
        self.attempt.write_status("running", self.progress.step)
        launch.collect_garbage()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Turns disk errors in the block into UserErrors that name the file; closes append-only files at its end."""
        with run.disk_errors_named():
            yield
        if self.tracker:
            self.tracker.close()
            self.history.close()

    def profiled_steps(self) -> AbstractContextManager[profiling.StepProfiler]:
        """Returns this rank's profiler for --profile."""
        done, total = self.progress.step, self.schedule.total_steps
        return profiling.of_steps(self.options.profile, self.accelerator, self.run_dir, self.number, done, total)

    def _position(self) -> RunPosition:
        return RunPosition(str(self.run_dir.absolute()), self.number, self.token, self.progress.step)

    def _write_end(self, state: str, reason: str, in_place_of_rank_0: bool) -> None:
        """Writes status.json on rank 0, after a save in progress.

        If rank 0 is what failed, another rank writes it as the next attempt, so that a rank 0 that was only frozen
        writes no more.
        """
        with suppress(OSError, UserError):  # the disk may be what failed, or the run be another attempt's by now
            if self.attempt:
                with suppress(Exception):
                    self.writer.wait(LAST_SAVE_SECONDS)
                self._write_status(state, reason, last=True)
            elif in_place_of_rank_0 and (successor := attempts.claim_after(self.run_dir, self.number, self.token)):
                successor.write_status(state, self.progress.step, reason)

    def _write_status(self, state: str, reason: str = "", step: int | None = None, last: bool = False) -> None:
        """Writes status.json, unless the final state has been written."""
        with self.status_lock:
            if self.attempt and not self.ended:
                self.ended = last
                self.attempt.write_status(state, self.progress.step if step is None else step, reason)

    # ---- between steps

    def write_failed(self) -> bool:
        """Returns whether something could not be written: the ranks then raise it together, see `count`."""
        return self.writer.error is not None or self.drawer.error is not None

    def log_due(self) -> bool:
        """Returns whether the current step is due to be logged."""
        if self.tracker is None or time.monotonic() - self.logged < LOG_SECONDS:
            return False
        self.logged = time.monotonic()
        return True

    def log_steps(self, arrived: list[StepMetrics], seconds: float) -> bool:
        """Records the metrics that have arrived, and the duration of the newest step on this rank.

        Returns whether a rank was asked to stop. Raises UserError, on all ranks, for a loss that is not finite, and for
        what could not be written.
        """
        batch = self.recipe.global_batch_size
        if self.tracker:
            self.tracker.count(batch, seconds)
        for metrics in arrived:
            if metrics.write_failed:
                self.wait()
            if not math.isfinite(metrics.loss):
                self._refuse(metrics)
            self.progress.count(batch, metrics.loss, metrics.correct)
            if self.attempt and self.tracker and metrics.gradient_norm is not None:
                rate = self.schedule.learning_rate(metrics.step - 1)
                log = self.tracker.say_step(metrics, rate, launch.memory_bytes(self.accelerator.device))
                self.writer.submit(run.disk_errors_named(self.attempt)(log))
                if time.monotonic() - self.checked > CHECK_SECONDS and self.drawer.idle():
                    self.checked = time.monotonic()
                    self.drawer.submit(self.attempt.check)
        return any(metrics.stop for metrics in arrived)

    def _refuse(self, metrics: StepMetrics) -> None:
        self.progress.step = metrics.step - 1  # the last that was good, whatever has been computed since
        with raise_on_all_ranks(self.accelerator):
            if self.attempt:
                with suppress(UserError):
                    self.writer.wait()  # for a checkpoint that is good and not there yet
                last = checkpoint.last_good(self.run_dir / "checkpoints")
                raise UserError(
                    f"loss {metrics.loss} in step {metrics.step} at learning rate "
                    f"{self.schedule.learning_rate(metrics.step - 1):.3g}; lower "
                    f"--peak-learning-rate in a new --run (last good checkpoint: {last})"
                )

    def save(self, network: nn.Module, optimizer: optim.Optimizer) -> None:
        """Copies the training state and queues it for writing, after a save in progress.

        Call it once the metrics of all steps have been counted.
        """
        failure.save_begins()
        if self.attempt is None:
            return
        self.progress.seconds = self._seconds()
        self.progress.scaler = launch.scaler_state(self.accelerator)
        with self.clock.within("saving"):
            with suppress(Exception):  # what failed reaches all ranks with the next metrics
                self.writer.wait()
            snapshot = Snapshot(network, optimizer, self.progress)
            self.writer.submit(lambda: self._write(snapshot))

    def _write(self, snapshot: Snapshot) -> None:
        assert self.attempt
        assert self.tracker
        with run.disk_errors_named(self.attempt):
            self.tracker.writer.flush()  # the curves must cover every step of the checkpoint
            checkpoint.write(self.attempt, snapshot, self.metadata)
            self._write_status("running", step=snapshot.progress.step)

    def log_epoch(self, evaluation: Evaluation, own_work: float) -> None:
        """Records an evaluation: metrics and predictions at once, pictures when they are due.

        `own_work` is this rank's own time per step, in seconds, or NaN.
        """
        self.evaluated = self.schedule.epochs_completed(self.progress.step)
        own_works = self.accelerator.gather(torch.tensor([own_work], device=self.accelerator.device)).tolist()
        if self.tracker is None:
            return
        progress = self.progress
        metrics = EpochMetrics(
            epoch=self.evaluated,
            step=progress.step,
            train_loss=progress.loss_sum / progress.seen,
            train_accuracy=progress.correct / progress.seen,
            test_loss=evaluation.loss,
            test_accuracy=evaluation.accuracy,
            learning_rate=self.schedule.learning_rate(progress.step - 1),
            images_per_second=self.tracker.epochs_images_per_second(),
            seconds=self._seconds(),
            test_accuracy_tta=evaluation.accuracy_tta,
        )
        self.tracker.say_epoch(metrics)
        if not math.isnan(sum(own_works)):
            self.own_works = own_works
            self._say_if_a_rank_is_slow()
        self.writer.submit(lambda: self._write_epoch(metrics, evaluation))
        if time.monotonic() - self.drawn > PICTURE_SECONDS and self.drawer.idle():
            self.drawn = time.monotonic()
            self.drawer.submit(self._draw)

    def _write_epoch(self, metrics: EpochMetrics, evaluation: Evaluation) -> None:
        assert self.tracker
        with run.disk_errors_named(self.attempt):
            self.history.record(metrics, evaluation.probabilities)
            self.tracker.log_epoch(metrics, evaluation)

    def _draw(self) -> None:
        assert self.tracker
        with run.disk_errors_named(self.attempt):
            self.tracker.draw(list(self.history.epochs))

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.clock.began

    # ---- the end

    def _say_if_a_rank_is_slow(self) -> None:
        assert self.tracker
        slowest = max(self.own_works)
        rank = self.own_works.index(slowest)
        others = statistics.median(self.own_works[:rank] + self.own_works[rank + 1 :] or [slowest])
        if slowest > SLOW * others and rank not in self.slow:
            self.slow.add(rank)
            self.tracker.say(
                f"{failure.name(rank)} is slow: its own time per step is {1000 * slowest:.3g} ms, that of the "
                f"others {1000 * others:.3g} ms, and they wait for it"
            )

    def _say_if_images_are_late(self) -> None:
        assert self.tracker
        waiting, training = self.clock.seconds[WAITING], self.clock.seconds[TRAINING]
        if self.recipe.augmentation_backend != "device" and waiting > LATE * (waiting + training):
            self.tracker.say(
                f"{waiting / (waiting + training):.0%} of training was waiting for images; "
                "--augmentation-backend device, in a new --run, makes them on the device"
            )

    def wait(self) -> None:
        """Waits until everything is written. Raises UserError on all ranks if something could not be written."""
        with raise_on_all_ranks(self.accelerator), self.clock.within("saving"):
            self.writer.wait()
            if self.drawer.error:
                self.drawer.wait()

    def finish(self, network: nn.Module, stopped: bool) -> None:
        """Writes how the run ended, and its result unless it was `stopped` on request. The other ranks wait."""
        failure.first_rank_works_alone()
        if self.attempt is None or self.tracker is None:
            return
        self.drawer.wait(PICTURE_SECONDS)
        self.history.export()
        self._say_if_images_are_late()
        if stopped:
            self._write_status("preempted", f"{stop.name() or 'another rank'} asked to stop", last=True)
            step = self.progress.step
            self.tracker.say(f"stopped on request after step {step}; the same command resumes from there")
        if self.history.epochs and self.drawer.idle():
            self._draw()
        if stopped:
            return
        final = self.history.epochs[-1]
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        checkpoint.export(
            self.attempt, network, {**self.metadata, "test_accuracy": final.test_accuracy, "ended": ended}
        )
        result = {
            "test_accuracy": final.test_accuracy,
            "test_accuracy_tta": final.test_accuracy_tta,
            "test_loss": final.test_loss,
            "images_per_second": self.tracker.images_per_second(),
            "seconds": self._seconds(),
            "seconds_of_this_attempt": self.clock.rounded(),
            "steps": self.progress.step,
            "epochs": self.recipe.epochs,
            "world_size": self.accelerator.num_processes,
            "step_seconds_of_ranks": [round(seconds, 6) for seconds in self.own_works],
            "precision": self.accelerator.mixed_precision,
            "parameters": summary.parameter_count(network),
        }
        run.write_result(self.attempt, result)
        self._write_status("finished", last=True)
        self.tracker.finish(result)

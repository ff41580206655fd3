"""Monitoring: TensorBoard, figures, and lines on the terminal. Rank 0 only."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from cifar import figures, names
from cifar.attempt import Attempt
from cifar.data import sampler
from cifar.data.cache import Data
from cifar.data.loading import TrainingImages
from cifar.data.waiting import has_room_for_a_bar
from cifar.evaluation import Evaluation
from cifar.lettering import Labels
from cifar.loop import StepMetrics
from cifar.recipes import Recipe
from cifar.run import EpochMetrics

LINE_EVERY = 30  # seconds between lines where there is no progress bar
# TensorBoard's tab of custom scalars: training and test in one chart each.
CHARTS = {
    "epochs": {
        kind: ["Multiline", [f"epoch/{split}_{kind}" for split in ("train", "test")]] for kind in ("loss", "accuracy")
    }
}
RANKS_LISTED = 8  # on the terminal
PICTURES_SHOWN = 10  # of one name: TensorBoard shows no more, and draws them from all that it is given


class Tracker:
    """Monitoring of a run from `step` on."""

    def __init__(self, attempt: Attempt, recipe: Recipe, data: Data, step: int, total_steps: int) -> None:
        self.attempt, self.recipe, self.data = attempt, recipe, data
        self.first_step, self.total_steps = step, total_steps
        # Purges what earlier attempts logged beyond this step, so that curves do not overlap; even one that still logs,
        # since its file sorts before this one.
        self.writer = SummaryWriter(str(attempt.run_dir), purge_step=step + 1 if step else 0)
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=not has_room_for_a_bar(sys.stderr))
        self.said = time.monotonic()
        self.warm = False  # after the first step of this attempt
        # Images and seconds of this attempt's steps but the first: in all, before this epoch, before the last log.
        self.counted = self.epoch_began = self.logged = (0, 0.0)
        # Step and confusion matrix of the evaluation that is to be drawn, from one thread to another.
        self.undrawn: deque[tuple[int, npt.NDArray[np.int64]]] = deque(maxlen=1)

    def start(self, topology: str, table: str) -> None:
        """Prints the set-up; at a run's first start also logs recipe and network to TensorBoard."""
        self.say(topology)
        self.say(table)
        if advice := Labels(self.data.classes).advice():
            self.say(advice)
        if self.first_step:
            return
        self.writer.add_text("recipe", f"```json\n{json.dumps(self.recipe.model_dump(), indent=1)}\n```")
        self.writer.add_text("network", f"```\n{table}\n```")
        self.writer.add_custom_scalars(CHARTS)

    def samples(self, training_images: TrainingImages) -> Callable[[], None]:
        """Augments some training images; returns a function that draws them and some test images."""
        first = sampler.batch(self.recipe.seed, 0, len(self.data.train_labels), 20)
        tensors, labels = training_images.__getitems__(first)
        seen = tensors.cpu().permute(0, 2, 3, 1).numpy() * np.array(self.data.std) + np.array(self.data.mean)
        test = np.random.default_rng(0).permutation(len(self.data.test_labels))[:20]
        strips = {
            f"training images, augmented ({self.recipe.augmentation}, {self.recipe.augmentation_backend})":
                ((seen.clip(0, 1) * 255).round().astype(np.uint8), labels.tolist()),
            "test images":
                (self.data.test_images[test], self.data.test_labels[test].tolist()),
        }  # fmt: skip
        return partial(self._draw_samples, strips)

    def _draw_samples(self, strips: figures.Strips) -> None:
        picture = figures.samples(strips, self.data.classes)
        self.writer.add_image("samples", picture, dataformats="HWC")
        self.writer.flush()
        self.attempt.replace(self.attempt.run_dir / "samples.png", figures.png(picture))  # last: says that all is there

    def count(self, images: int, seconds: float) -> None:
        """Counts one step's images and time, including the wait for its input; a step with time NaN is left out."""
        if self.warm and not math.isnan(seconds):
            self.counted = (self.counted[0] + images, self.counted[1] + seconds)
        self.warm = True

    def images_per_second(self, since: tuple[int, float] = (0, 0.0)) -> float:
        """Returns the training speed of this attempt.

        Its first step, which warms up, is left out. 0 if there was no other.
        """
        images, seconds = self.counted[0] - since[0], self.counted[1] - since[1]
        return images / seconds if images else 0.0

    def epochs_images_per_second(self) -> float:
        """Returns the training speed since this was last asked, at an epoch's end."""
        speed, self.epoch_began = self.images_per_second(self.epoch_began), self.counted
        return speed

    def say_step(self, metrics: StepMetrics, learning_rate: float, memory: int) -> Callable[[], None]:
        """Shows a step's progress on the terminal; returns a function that writes it to TensorBoard."""
        step, accuracy = metrics.step, metrics.correct / self.recipe.global_batch_size
        speed, self.logged = self.images_per_second(self.logged), self.counted
        values = {"loss": metrics.loss, "accuracy": accuracy, "learning_rate": learning_rate,
                  "gradient_norm": metrics.gradient_norm, "images_per_second": speed,
                  "memory_bytes": memory}  # fmt: skip
        text = f"loss {metrics.loss:.3f}  accuracy {accuracy:.1%}  lr {learning_rate:.2g}  {speed:.0f} images/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and time.monotonic() - self.said > LINE_EVERY:
            self.say(f"step {step}/{self.total_steps}  {text}")
        return partial(self._log_step, values, step, time.time())

    def _log_step(self, values: dict[str, Any], step: int, now: float) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}", value, step, walltime=now)

    def say_epoch(self, metrics: EpochMetrics) -> None:
        speed = f"{metrics.images_per_second:.0f} images/s  " if metrics.images_per_second else ""  # no step was timed
        self.say(
            f"epoch {metrics.epoch}/{self.recipe.epochs}  "
            f"loss {metrics.train_loss:.3f}  accuracy {metrics.train_accuracy:.2%}  "
            f"test loss {metrics.test_loss:.3f}  test accuracy {metrics.test_accuracy:.2%}  "
            f"{speed}{metrics.seconds:.0f} s"
        )

    def log_epoch(self, metrics: EpochMetrics, evaluation: Evaluation) -> None:
        """Adds an evaluation's points to TensorBoard."""
        for split in ("train", "test"):
            for kind in ("loss", "accuracy"):
                self.writer.add_scalar(f"epoch/{split}_{kind}", getattr(metrics, f"{split}_{kind}"), metrics.step)
        classes = self.data.classes
        confusion = figures.confusion_matrix(
            self.data.test_labels, evaluation.probabilities.argmax(axis=1), len(classes)
        )
        for number, (name, row) in enumerate(zip(names.readable(classes), confusion, strict=True)):
            self.writer.add_scalar(f"test_accuracy_of/{name}", row[number] / row.sum(), metrics.step)
        self.writer.flush()
        if metrics.epoch % -(-self.recipe.epochs // PICTURES_SHOWN) == 0 or metrics.epoch == self.recipe.epochs:
            self.undrawn.append((metrics.step, confusion))

    def draw(self, epochs: Sequence[EpochMetrics]) -> None:
        """Draws the learning curves so far, and the confusion matrix if one is due."""
        if self.undrawn:
            step, confusion = self.undrawn.pop()
            picture = figures.confusion(confusion, self.data.classes)
            self.writer.add_image("confusion", picture, step, dataformats="HWC")
        curves = figures.curves(epochs, self.recipe.label_smoothing)
        self.attempt.replace(self.attempt.run_dir / "curves.png", figures.png(curves))
        self.writer.flush()

    def finish(self, result: dict[str, Any]) -> None:
        """Logs the hyper-parameters with the accuracy they reached (add_hparams would open a second run for it)."""
        accuracy = {"hparams/test_accuracy": result["test_accuracy"]}
        fields = self.recipe.model_dump(exclude={"data"})  # often a path, which compares nothing
        for part in hparams(fields, accuracy):  # type: ignore[no-untyped-call]
            self.writer._get_file_writer().add_summary(part)  # type: ignore[no-untyped-call]
        self.writer.add_scalar(*accuracy.popitem(), result["steps"])
        with_tta = result["test_accuracy_tta"]
        tta = "" if with_tta is None else f" ({with_tta:.2%} with test-time augmentation)"
        spent = result["seconds_of_this_attempt"]
        most = ", ".join(f"{name} {spent[name]:.0f} s" for name in sorted(spent, key=spent.__getitem__)[:-4:-1])
        ranks = sorted(enumerate(result["step_seconds_of_ranks"]), key=lambda rank: -rank[1])
        if len(ranks) > 1:
            each = ", ".join(f"rank {rank} {1000 * seconds:,.2f} ms" for rank, seconds in ranks[:RANKS_LISTED])
            more = f", and {len(ranks) - RANKS_LISTED} more in result.json" if len(ranks) > RANKS_LISTED else ""
            self.say(f"own time per step, slowest first: {each}{more}")
        self.say(
            f"finished: test accuracy {result['test_accuracy']:.2%}{tta} in {result['seconds']:.0f} s "
            f"({sum(spent.values()):.0f} s since this process began: {most}); see {self.attempt.run_dir}"
        )

    def say(self, text: str) -> None:
        """Prints lines above the progress bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()
        self.said = time.monotonic()

    def close(self) -> None:
        """Writes what is pending."""
        self.bar.close()
        self.writer.close()

"""Instruments train.py: the real program, timed at the start and end of each step.

    accelerate launch ... -m cifar.bench.probe <arguments of train.py>

At the start of a step it waits for requests (see interleave.py). The wrappers around the functions that train.py calls
between steps do nothing else.
"""

from cifar.bench import imports

IMPORTS = imports.Imports()

import importlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import suppress  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from cifar.bench import interleave  # noqa: E402
from cifar.bench.interleave import Answer  # noqa: E402
from cifar.recipes import Recipe, RunOptions  # noqa: E402

if TYPE_CHECKING:  # train.py decides when torch is imported, which is measured
    from accelerate import Accelerator
    from torch import nn


class Observer:
    """Times one run of train.py. Time goes to `input` (waiting for a batch), `work`, `save` or `pause`."""

    recipe: Recipe
    accelerator: "Accelerator"
    network: "nn.Module"
    images: Any  # what training batches are made of: `__getitems__` makes one
    image_size: int  # of the last step
    saved: tuple[Any, ...]  # the arguments of the last checkpoint

    def __init__(self) -> None:
        self.ahead = 0  # batches that other processes may have ready when a request arrives
        self.ready: float | None = None  # when the first step began
        self.passing, self.since = "pause", 0.0
        self.spans: dict[str, list[float]] = {}
        self.host = 0.0  # processor seconds of this thread before the first counted step
        self.asked: Answer | None = None  # the current request
        self.uncounted = self.counted = 0  # its steps to come
        self.profiler: Any = None

    # ---- what train.py calls

    def observe(self, train: Callable[[Recipe, RunOptions], None]) -> Callable[[Recipe, RunOptions], None]:
        """Returns `train` with its steps timed."""

        def watched(recipe: Recipe, options: RunOptions) -> None:
            from cifar import evaluation, launch, models  # as `train` does, a moment later
            from cifar.data import loading
            from cifar.record import RunRecord
            from cifar.schedule import Schedule

            self.recipe = recipe
            start, build, batches = launch.start, models.build, loading.training_batches
            evaluate, save, image_size = evaluation.evaluate, RunRecord.save, Schedule.image_size

            def started(*arguments: Any) -> "Accelerator":
                self.accelerator = start(*arguments)
                return self.accelerator

            def built(*arguments: Any) -> "nn.Module":
                self.network = build(*arguments)
                return self.network

            def made(images: Any, shares: Any, workers: int, device: Any) -> Iterator[Any]:
                self.images, self.ahead = images, 2 * workers  # as loading.py has it
                return self.watch_batches(iter(batches(images, shares, workers, device)))

            def evaluated(*arguments: Any) -> Any:
                self.passes("pause")
                return evaluate(*arguments)

            def saved(record: RunRecord, *state: Any) -> None:
                self.passes("save")
                self.saved = (record, *state)
                save(record, *state)

            def sized(schedule: Schedule, step: int) -> int:
                """Comes right before train.py compares the step with `freeze_step`."""
                assert self.asked is not None
                if self.asked.get("frozen") and schedule.freeze_step > step:
                    schedule.freeze_step = step
                self.image_size = self.asked.get("image_size") or image_size(schedule, step)
                return self.image_size

            launch.start, models.build, loading.training_batches = started, built, made  # type: ignore[assignment]
            evaluation.evaluate, RunRecord.save = evaluated, saved  # type: ignore[assignment, method-assign]
            Schedule.image_size = sized  # type: ignore[assignment, method-assign]
            train(recipe, options)

        return watched

    def watch_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yields the batches, with requests answered between the steps."""
        while True:
            if self.asked and not self.uncounted + self.counted:
                # The last steps belong to the request, though a GPU may still compute them.
                interleave.synchronize(self.accelerator.device.type)
            self.passes("pause")
            self.between_steps()
            self.passes("input")
            batch = next(batches)
            self.passes("work")
            yield batch

    def passes(self, what: str) -> None:
        """Starts counting time for `what`; the end of a step also ends its recording."""
        now = time.perf_counter()
        if self.passing == "work" and self.profiler and not self.counted:
            self.profiler.stop()
        self.spans.setdefault(self.passing, []).append(now - self.since)
        self.passing, self.since = what, now

    def between_steps(self) -> None:
        """Continues the current request, or answers it and waits for the next."""
        if self.ready is None:
            self.ready = time.time()
            IMPORTS.end()
        if self.asked and not self.uncounted + self.counted:
            self.answer(self.trained())
        if self.asked is None:
            self.requests()
        assert self.asked is not None
        if self.uncounted:
            self.uncounted -= 1
            return
        if self.counted == self.asked["amount"]:
            interleave.synchronize(self.accelerator.device.type)
            self.spans, self.host = {}, time.thread_time()
            if self.asked["do"] == "profile":
                from cifar.bench import counts

                self.profiler = counts.recorder(self.accelerator.device.type)
                self.profiler.start()
        self.counted -= 1

    # ---- requests for steps

    def requests(self) -> None:
        """Answers requests until one asks for steps; rank 0 broadcasts them."""
        from accelerate.utils import broadcast_object_list

        while True:
            first = self.accelerator.is_main_process
            asked = broadcast_object_list([interleave.ask() if first else None])[0]
            if asked is None:
                os._exit(0)  # the run directory is thrown away: there is nothing to save
            if asked["do"] in ("train", "profile"):
                self.asked = asked
                # First use up the batches that workers have prepared while this program was waiting.
                self.uncounted, self.counted = asked.get("uncounted", self.ahead + 1), asked["amount"]
                return
            self.answer(getattr(self, asked.pop("do"))(**asked))

    def answer(self, given: Answer) -> None:
        """Answers the current request."""
        self.asked = None
        if self.accelerator.is_main_process:
            interleave.answer(given)

    def trained(self) -> Answer:
        """Returns what the requested steps took. `save` has the time from each save's beginning to the next step's."""
        assert self.asked is not None
        interleave.synchronize(self.accelerator.device.type)
        spans, host = self.spans, time.thread_time() - self.host
        found = {
            "amount": self.asked["amount"],
            "seconds": sum(spans["input"]) + sum(spans["work"]),
            "input": sum(spans["input"]),
            "host": host,
            "image_size": self.image_size,
            "save": spans.get("save", []),
            "at": time.time(),
        }
        if self.profiler:
            from cifar.bench import counts

            found |= counts.read(self.profiler, self.accelerator.device.type)._asdict()
            self.profiler = None
        return found

    # ---- other requests

    def metadata(self) -> Answer:
        """Returns what does not depend on time, and when the first step began."""
        from cifar import summary
        from cifar.bench import counts

        return {
            "multiply_adds": counts.forward_multiply_adds(self.network),
            "step_multiply_adds": counts.step_multiply_adds(self.network),
            "parameters": summary.parameter_count(self.network),
            "began": imports.BEGAN,
            "imports": IMPORTS.seconds,
            "ready": self.ready,
        }

    def evaluate(self, amount: int) -> Answer:
        """Evaluates `amount` test images, repeating them if there are fewer."""
        from dataclasses import replace

        import numpy as np
        import torch

        from cifar import evaluation
        from cifar.data.cache import open_data

        data = open_data(self.recipe.data, fit=self.recipe.fit > 0)
        chosen = np.arange(amount) % len(data.test_labels)
        data = replace(data, test_images=data.test_images[chosen], test_labels=data.test_labels[chosen])
        images = torch.from_numpy(data.test_images).to(self.accelerator.device)
        began = time.perf_counter()
        evaluation.evaluate(self.accelerator, self.network, images, data)  # ends with its results in the CPU's memory
        return {"amount": amount, "seconds": time.perf_counter() - began}

    def forward(self, amount: int) -> Answer:
        """Runs the network's forward pass only, on images that are ready."""
        import torch

        from cifar.evaluation import EVALUATION_BATCH

        images = torch.randn(EVALUATION_BATCH, 3, 32, 32, device=self.accelerator.device)
        images = images.contiguous(memory_format=torch.channels_last)
        self.network.eval()
        interleave.synchronize(self.accelerator.device.type)
        began = time.perf_counter()
        with torch.no_grad():
            for _ in range(amount // EVALUATION_BATCH):
                self.network(images)
        interleave.synchronize(self.accelerator.device.type)
        seconds = time.perf_counter() - began
        self.network.train()
        return {"amount": amount, "seconds": seconds}

    def input(self, amount: int) -> Answer:
        """Makes `amount` training images here, on one core."""
        import torch

        from cifar.data import sampler

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with suppress(ImportError):
            import cv2

            cv2.setNumThreads(0)
        epochs, indices = sampler.batch(self.recipe.seed, 0, 1024, amount)
        size = min(amount, self.recipe.global_batch_size)
        began = time.perf_counter()
        for start in range(0, amount, size):
            self.images.__getitems__(sampler.Samples(epochs[start : start + size], indices[start : start + size]))
        seconds = time.perf_counter() - began
        torch.set_num_threads(threads)
        return {"amount": amount, "seconds": seconds}

    def restore(self, amount: int) -> Answer:
        """Verifies and restores the last checkpoint, `amount` times."""
        from cifar import checkpoint

        record, network, optimizer = self.saved
        record.writer.wait()
        path, *_ = checkpoint.found(record.run_dir / "checkpoints")
        size = sum(file.stat().st_size for file in path.iterdir())
        began = time.perf_counter()
        for _ in range(amount):
            checkpoint.verify(path)
            checkpoint.restore(path, network, optimizer, self.recipe, record.data.fingerprint)
        return {"amount": amount, "seconds": time.perf_counter() - began, "bytes": size}


def main() -> None:
    observer = Observer()
    sys.path.insert(0, str(interleave.ROOT))
    train: Any = importlib.import_module("train")
    train.train = observer.observe(train.train)
    sys.argv[0] = str(train.__file__)
    train.main()


if __name__ == "__main__":
    main()

"""Training batches from the cached images, augmented ahead by dataloader workers, or on the device."""

import atexit
import itertools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch.profiler import record_function

from cifar import failure, stop
from cifar.data import augment, augment_device
from cifar.data.augment import Pipeline
from cifar.data.augment_device import Plan
from cifar.data.cache import Data, open_cache, open_data
from cifar.data.sampler import DistributedBatchSampler, Samples
from cifar.data.sources import SIZE
from cifar.errors import LostError, UserError, end_of
from cifar.profiling import IMAGES
from cifar.ranks import raise_on_all_ranks
from cifar.recipes import Recipe

SAMPLE = 5000  # images, as airbench has for its whitening
PIXELS = SIZE * SIZE * 3

# Images float32 [n, 3, 32, 32] (channels-last) and labels int64 [n], on the device that trains.
Batch = tuple[torch.Tensor, torch.Tensor]


class WorkerDataset:
    """Training images that Albumentations augments, fetched a batch at a time by worker processes."""

    def __init__(self, data: Data, pipeline: Pipeline, seed: int) -> None:
        from cifar.data.augment_albumentations import Augmentation  # half a second to import, and only needed here

        # Only the path: each worker maps the images for itself, and the process that trains does not touch them.
        self.path, self.augmentation = data.path, Augmentation(pipeline, data.mean, data.std, seed)
        self.data: Data | None = None

    def __getitems__(self, samples: Samples) -> Batch:
        self.data = self.data or open_cache(self.path)
        images = np.empty((len(samples.indices), *self.data.train_images.shape[1:]), np.float32)
        for image, epoch, index in zip(images, samples.epochs.tolist(), samples.indices.tolist(), strict=True):
            image[:] = self.augmentation(self.data.train_images[index], epoch, index)
        labels = self.data.train_labels[samples.indices].astype(np.int64)
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


class DeviceDataset:
    """All training images as uint8, and their labels, on the device, augmented there a batch at a time.

    On a CPU the images are the cache's memory map, which all processes share; on a GPU a copy for each process,
    154 MB for CIFAR-10.
    """

    def __init__(self, data: Data, pipeline: Pipeline, seed: int, device: torch.device) -> None:
        self.pipeline, self.seed, self.mean, self.std = pipeline, seed, data.mean, data.std
        self.images = torch.from_numpy(data.train_images).to(device)
        self.labels = torch.from_numpy(data.train_labels.astype(np.int64)).to(device)

    def __getitems__(self, samples: Samples) -> Batch:
        return self._batch(self._plan(samples))

    def batches(self, sampler: DistributedBatchSampler) -> Iterator[Batch]:
        """Yields the sampler's batches.

        Random numbers are drawn, and sent to the device, for a block of steps at once.
        """
        for samples in sampler.blocks():
            for of_step in zip(*self._plan(samples), strict=True):
                yield self._batch(Plan(*of_step))

    def _plan(self, samples: Samples) -> Plan:
        draws = augment_device.draw(self.pipeline, self.seed, samples)
        return augment_device.plan(samples.indices, draws, self.images.device)

    def _batch(self, batch: Plan) -> Batch:
        images = augment_device.augment(self.images, batch, self.pipeline, self.mean, self.std)
        return images, self.labels.index_select(0, batch.image)


TrainingImages = WorkerDataset | DeviceDataset


def training_images(recipe: Recipe, data: Data, device: torch.device) -> TrainingImages:
    """Returns the training images, augmented as the recipe says. Raises UserError for an unknown augmentation."""
    pipeline = augment.find(recipe.augmentation)
    if recipe.augmentation_backend == "device":
        return DeviceDataset(data, pipeline, recipe.seed, device)
    return WorkerDataset(data, pipeline, recipe.seed)


def open_on_all_ranks(accelerator: Accelerator, recipe: Recipe) -> tuple[Data, TrainingImages]:
    """Opens the images, which one process of each machine decodes; the others map what it wrote. Raises UserError."""
    with raise_on_all_ranks(accelerator):
        data = open_data(recipe.data, fit=recipe.fit > 0) if accelerator.is_local_main_process else None
    with raise_on_all_ranks(accelerator):
        data = data or open_data(recipe.data, fit=recipe.fit > 0)
        images = training_images(recipe, data, accelerator.device)
    # The slow part is done: from here on a hang is noticed sooner, unless steps have to compile.
    if accelerator.state.dynamo_plugin.backend == DynamoBackend.NO:
        failure.shorten_hang_timeout()
    else:
        failure.allow_compilation()
    return data, images


def sample_images(data: Data, device: torch.device) -> torch.Tensor:
    """Returns some normalised training images [n, 3, 32, 32] on the device, for a network initialised from them.

    They are spread evenly over all: a folder's are sorted by class, and the first ones would be of one class alone.
    """
    n = len(data.train_images)
    chosen = np.linspace(0, n - 1, min(n, SAMPLE)).astype(np.int64)
    return augment.normalize(torch.from_numpy(data.train_images[chosen]).to(device), data.mean, data.std)


def training_batches(
    images: TrainingImages, sampler: DistributedBatchSampler, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Returns the sampler's batches on the device, made there or by `workers` processes, two batches ahead each.

    Raises UserError where a worker cannot be started, fails, is killed or hangs.
    """
    return _traced(_made(images, sampler, workers, device))


def _traced(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yields the batches, with the wait for each marked for a profiler."""
    while True:
        profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        with record_function(IMAGES) if profiled else nullcontext():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _made(
    images: TrainingImages, sampler: DistributedBatchSampler, workers: int, device: torch.device
) -> Iterator[Batch]:
    if isinstance(images, DeviceDataset):
        return images.batches(sampler)
    started: list[_Worker] = []
    atexit.register(_end, started)
    started.extend(
        _Worker(images, sampler.every(workers, number), f"loader worker {number + 1} of {workers}")
        for number in range(workers)
    )
    return _received(started, sampler, device)


def _received(workers: "list[_Worker]", sampler: DistributedBatchSampler, device: torch.device) -> Iterator[Batch]:
    seconds = failure.hang_seconds()
    limit = max(failure.HANG_SECONDS, seconds)  # for the first one, as for a job's first step
    n, on_gpu = sampler.size, device.type == "cuda"
    uploads = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
    try:
        for _, worker in zip(sampler.steps, itertools.cycle(workers), strict=False):
            # One pinned buffer, images then labels, so that one asynchronous copy uploads both.
            content = torch.empty(n * (4 * PIXELS + 8), dtype=torch.uint8, pin_memory=on_gpu)
            worker.receive(limit, content)
            if uploads:
                content = _uploaded(content, uploads)
            images, labels = content[: n * 4 * PIXELS], content[n * 4 * PIXELS :]
            yield images.view(torch.float32).view(n, SIZE, SIZE, 3).permute(0, 3, 1, 2), labels.view(torch.int64)
            limit = seconds
    finally:
        _end(workers)


def _uploaded(content: torch.Tensor, uploads: torch.cuda.Stream) -> torch.Tensor:
    """Copies pinned memory to the GPU on a stream of its own, beside queued steps; does not block."""
    with torch.cuda.stream(uploads):
        uploaded = content.to(uploads.device, non_blocking=True)
    steps = torch.cuda.current_stream(uploads.device)
    steps.wait_stream(uploads)
    uploaded.record_stream(steps)
    return uploaded


class _Worker:
    """A worker process that makes batches and sends them through a socket pair.

    torch's DataLoader needs shared memory and semaphores, for which a container's /dev/shm or a long TMPDIR may leave
    no room; it raises a worker's death from a signal handler, perhaps in the middle of a checkpoint; and it waits for
    ever for a worker that hangs.
    """

    def __init__(self, images: WorkerDataset, sampler: DistributedBatchSampler, name: str) -> None:
        try:
            self.connection, theirs = socket.socketpair()
            with theirs:  # only the worker keeps this end open, so its death closes the connection
                make = multiprocessing.get_context("fork").Process
                self.process = make(target=_work, args=(theirs, images, sampler, os.getpid()), daemon=True)
                self.process.start()
        except OSError as error:
            raise UserError(
                f"{name} cannot be started ({error.strerror}); raise the limit (ulimit -n, ulimit -u, memory), or use "
                "no dataloader workers: --augmentation-backend device, in a new --run"
            ) from None
        self.name = f"{name} (process {self.process.pid} on {socket.gethostname()})"

    def receive(self, limit: int, content: torch.Tensor) -> None:
        """Fills `content` with the next batch. Raises UserError where none comes, or none within `limit` seconds."""
        self.connection.settimeout(min(limit, failure.LONGEST))
        status = bytearray(1)
        try:
            self._fill(memoryview(status))
            if status != _MADE:
                words = bytearray()
                while part := self.connection.recv(4096):
                    words += part
                raise (UserError if status == _REFUSED else LostError)(f"{self.name}: {words.decode()}")
            self._fill(content.numpy().data)
        except TimeoutError:
            raise LostError(
                f"no batch from {self.name} for {limit} s: it hangs, perhaps in a file system that does not answer; "
                "look there, then start the same command again"
            ) from None

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            received = self.connection.recv_into(buffer)
            if not received:
                self.process.join(1)
                raise LostError(
                    f"{self.name} {end_of(self.process.exitcode)}; the same command resumes from the last checkpoint, "
                    "and --augmentation-backend device, in a new --run, needs no dataloader workers"
                )
            buffer = buffer[received:]


_MADE, _FAILED, _REFUSED = b"0", b"1", b"2"


def _work(connection: socket.socket, images: WorkerDataset, sampler: DistributedBatchSampler, parent: int) -> None:
    import cv2

    stop.obey_parent()  # a stop request is for the training process, which still wants its batches
    if os.getppid() != parent:
        return  # the parent died before this process could ask to die with it
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        _make(connection, images, sampler)
    except UserError as error:
        connection.sendall(_REFUSED + str(error).encode())
    except ConnectionError:
        pass  # the parent is gone
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
        connection.sendall(_FAILED + " ".join(words.split()).encode())


def _make(connection: socket.socket, images: WorkerDataset, sampler: DistributedBatchSampler) -> None:
    """Makes a batch while the previous one is being sent."""

    def send(made: torch.Tensor, labels: torch.Tensor) -> None:
        for content in (_MADE, made.permute(0, 2, 3, 1).numpy().data, labels.numpy().data):
            connection.sendall(content)

    with ThreadPoolExecutor(1) as sender:
        before: Future[None] | None = None
        for samples in sampler:
            batch = images.__getitems__(samples)
            if before:
                before.result()
            before = sender.submit(send, *batch)


def _end(workers: list[_Worker]) -> None:
    """Kills the workers. At exit Python would send them SIGTERM, which they ignore, and wait for them."""
    for worker in workers:
        worker.process.kill()
        worker.connection.close()

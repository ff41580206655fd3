"""Loader workers: they need nothing but processes and sockets, and whatever becomes of one is told in a line."""

import gc
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, Train, command
from torch.utils._python_dispatch import TorchDispatchMode

from cifar.data import loading, sampler
from cifar.data.augment_albumentations import Augmentation
from cifar.data.cache import open_data
from cifar.errors import LostError, UserError
from cifar.recipes import Recipe

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
RECIPE = Recipe(global_batch_size=16)
NAME = rf"loader worker 1 of 2 \(process \d+ on {re.escape(os.uname().nodename)}\)"


def batches(data: object, workers: int, steps: int = 9) -> Iterator[loading.Batch]:
    images = loading.training_images(RECIPE, open_data(str(data)), CPU)
    return loading.training_batches(images, shares(steps), workers, CPU)


def shares(steps: int) -> sampler.DistributedBatchSampler:
    """All batches of one rank."""
    return sampler.DistributedBatchSampler(RECIPE, 64, 0, steps, 0, 1)


def workers() -> list[psutil.Process]:
    """The worker processes of this one, in the order in which they were started."""
    running = [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]
    return sorted(running, key=lambda p: p.pid)


SCRIPT = f"""
import hashlib, sys
sys.path[:0] = ["{ROOT}", "{ROOT}/tests"]
import test_loading
made = [b"".join(t.contiguous().numpy().tobytes() for t in batch) for batch in test_loading.batches(sys.argv[1], 2)]
print(hashlib.sha256(b"".join(made)).hexdigest())
"""


@pytest.mark.parametrize(
    ("mounted", "folder"),
    [("size=4k", "$PWD/$(printf %0100d 0) && mkdir $TMPDIR"), ("ro", "/no/such/folder")],
    ids=["little shared memory and a long TMPDIR", "no shared memory and no folder"],
)
def test_batches_need_no_shared_memory_and_no_temporary_folder(
    mounted: str, folder: str, shapes: Path, tmp_path: Path
) -> None:
    may_mount = os.geteuid() == 0 and not subprocess.run(["unshare", "-m", "true"], check=False).returncode
    prepared = f"export TMPDIR={folder} && exec {sys.executable} -c '{SCRIPT}' {shapes}"
    if may_mount:
        shell = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o {mounted} tmpfs /dev/shm && {prepared}"]
    else:
        shell = ["sh", "-c", prepared]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    images = loading.training_images(RECIPE, open_data(str(shapes)), CPU)
    batches = map(images.__getitems__, shares(9))
    here = [b"".join(t.contiguous().numpy().tobytes() for t in batch) for batch in batches]
    assert done.stdout.strip() == hashlib.sha256(b"".join(here)).hexdigest(), done.stderr
    if not may_mount:
        pytest.skip("shared memory stays: only root can mount a file system, and not in every container")


def test_a_killed_worker_ends_the_run_in_one_line_and_the_run_goes_on(
    shapes: Path, tmp_path: Path, train: Train
) -> None:
    arguments = ["--data", shapes, "--run", tmp_path / "run", "--network", "whitened", "--peak-epoch", 1,
                 "--epochs", 100_000, "--global-batch-size", 16, "--checkpoint-every", 5]  # fmt: skip
    process = subprocess.Popen(
        command(ROOT / "train.py", *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "run/checkpoints/step-0000005").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    try:
        for worker in psutil.Process(process.pid).children():
            worker.kill()
        errors = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == 1, errors
    assert re.fullmatch(
        r"train.py: error: loader worker \d of \d \(process \d+ on \S+\) was ended by SIGKILL, most likely out of "
        r"memory: request more for the job; the same command resumes .*\n",
        errors,
    )
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", errors.removeprefix("train.py: error: ").strip())
    shown = train(*arguments, "--resume", "no/such/one")  # any start that ends soon: the run is in order
    assert "no/such/one" in shown.stderr


@pytest.fixture
def running(shapes: Path) -> Iterator[Iterator[loading.Batch]]:
    """Batches of two workers, the first one of which has been taken."""
    made = batches(shapes, 2, steps=100)
    next(made)
    yield made
    for worker in workers():
        worker.kill()


def test_a_worker_that_was_killed_is_named(running: Iterator[loading.Batch]) -> None:
    workers()[0].kill()
    with pytest.raises(LostError, match=f"^{NAME} was ended by SIGKILL, most likely out of memory"):
        list(running)


@pytest.mark.parametrize("seconds", ["1", "2"])
def test_a_worker_that_hangs_is_named_after_the_hang_limit(
    seconds: str, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR_HANG_SECONDS", seconds)
    made = batches(shapes, 2, steps=100)
    next(made)
    workers()[0].suspend()  # with a part of a batch on its way
    with pytest.raises(LostError, match=f"^no batch from {NAME} for {seconds} s: it hangs"):
        list(made)
    assert psutil.wait_procs(workers(), timeout=60)[1] == []  # the others end as well


def test_an_error_in_a_worker_is_told_with_its_place(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Augmentation, image: object, epoch: int, index: int) -> None:
        raise ValueError("boom\nand more")

    monkeypatch.setattr(Augmentation, "__call__", fail)
    with pytest.raises(LostError, match=rf"^{NAME}: ValueError: boom and more \(test_loading.py:\d+\)$"):
        list(batches(shapes, 2))


def test_a_users_error_in_a_worker_stays_one(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise UserError(f"{path} is damaged; delete it")

    monkeypatch.setattr(loading, "open_cache", refuse)
    with pytest.raises(UserError, match=rf"^{NAME}: /.* is damaged; delete it$") as raised:
        list(batches(shapes, 2))
    assert raised.value.status == 2


LIMITED = f"""
import os, resource, sys
sys.path[:0] = ["{ROOT}", "{ROOT}/tests"]
import test_loading
from cifar.errors import UserError
from cifar.data import loading
images = loading.training_images(test_loading.RECIPE, test_loading.open_data(sys.argv[1]), test_loading.CPU)
free = os.dup(0)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + int(sys.argv[2]), free + int(sys.argv[2])))
try: loading.training_batches(images, test_loading.shares(9), 4, test_loading.CPU)
except UserError as error: print(error)
"""


@pytest.mark.parametrize(
    ("files", "which"),
    [(1, 1), (10, 3)],  # each keeps three, and six are open while one starts
)
def test_a_worker_that_cannot_be_started_is_one_line_and_the_others_end(files: int, which: int, shapes: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, shapes, str(files)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.startswith(
        f"loader worker {which} of 4 cannot be started (Too many open files); raise the limit"
    )
    assert (done.returncode, done.stderr) == (0, "")


ORPHANS = f"""
import os, signal, sys
sys.path[:0] = ["{ROOT}", "{ROOT}/tests"]
import test_loading
batches = test_loading.batches(sys.argv[1], 2, steps=1000)
next(batches)
print(*(worker.pid for worker in test_loading.workers()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_the_process_that_trains(shapes: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ORPHANS, shapes], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- images on the device: what the process that trains does for each step


MANY = 6000  # images


def device_batches(data: object, size: int, augmentation: str, device: torch.device = CPU) -> Iterator[loading.Batch]:
    """Batches from more images than the folder has."""
    few = open_data(str(data))
    chosen = np.arange(MANY) % len(few.train_labels)
    many = replace(few, train_images=few.train_images[chosen], train_labels=few.train_labels[chosen])
    recipe = Recipe(augmentation_backend="device", augmentation=augmentation, global_batch_size=size)
    images = loading.training_images(recipe, many, device)
    return loading.training_batches(images, sampler.DistributedBatchSampler(recipe, MANY, 0, 1000, 0, 1), 1, device)


def python_instructions(work: Callable[[], object]) -> int:
    """How many the interpreter goes through; what a library does inside a call is not among them."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    gc.disable()  # it would end what earlier tests have left, in Python, too
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def test_a_batch_of_many_images_takes_as_much_python_as_one_of_few(shapes: Path) -> None:
    def costs(size: int) -> list[int]:
        sampler.permutation.cache_clear()
        made = device_batches(shapes, size, "crop_alternating_flip_light")
        next(made)  # sends to the device what stays there
        return [python_instructions(lambda: next(made)) for _ in range(2 * sampler.BLOCK // size)]

    costs(64)  # Python 3.12 and 3.13 miss instructions of code that they trace for the first time
    few, many = costs(64), costs(1024)
    assert set(few) == set(many)
    assert min(few) < 400
    assert max(few) < 4000  # where a block of steps begins
    assert sum(count > 400 for count in few) == sum(count > 400 for count in many) == 2


class Operations(TorchDispatchMode):
    """Counts what is asked of the device, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if not func.is_view:
            moves = func.name() == "aten::_to_copy" and kwargs.get("device") not in (None, args[0].device)
            self.names.append("upload" if moves else func.name())
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("augmentation", "operations"),
    [
        # Which rows and which bytes; two gathers; normalisation; the hole; labels.
        ("crop_flip_cutout", 3 + 2 + 3 + 2 + 1),
        # The same with light instead of the hole.
        ("crop_alternating_flip_light", 3 + 2 + 3 + 4 + 1),
    ],
)
def test_a_step_asks_the_device_for_few_operations_and_a_block_of_steps_for_one_upload(
    augmentation: str, operations: int, shapes: Path
) -> None:
    made = device_batches(shapes, 64, augmentation, torch.device("meta"))  # where nothing is computed
    next(made)  # sends to the device what stays there
    steps = []
    for _ in range(2 * sampler.BLOCK // 64):
        with Operations() as seen:
            next(made)
        steps.append(seen.names)
    assert {sum(name != "upload" for name in names) for names in steps} <= {operations, operations + 1}
    assert [names.count("upload") for names in steps if "upload" in names] == [1, 1]

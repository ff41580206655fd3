"""When one rank fails, all end, and with the same line: real processes through the real launcher."""

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, command, poisoned, step_of
from helpers.launching import THREE, TWO, TwoLaunchers, free_port, project
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed import DistBackendError

from cifar import checkpoint, failure, guard

pytestmark = pytest.mark.slow

HOST = os.uname().nodename


def started(
    script: Path, shapes: Path, run: Path, launcher: tuple[str, ...], hang_seconds: int = 60,
    more: tuple[object, ...] = (), env: dict[str, str] | None = None, workers: bool = False, **popen: Any,
) -> "subprocess.Popen[str]":  # fmt: skip
    # Workers, and what they import, take their time at each start: only where a signal may reach them, too.
    augmented = ("--augmentation-backend", "albumentations" if workers else "device")
    arguments = command(script, "--data", shapes, "--run", run, "--network", "whitened", "--epochs", 60,
                        "--peak-epoch", 1, "--global-batch-size", 12, "--checkpoint-every", 3, *augmented, *more,
                        launcher=launcher)  # fmt: skip
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True, **popen}
    return subprocess.Popen(
        arguments, env={**os.environ, "CIFAR_HANG_SECONDS": str(hang_seconds), **(env or {})}, **popen
    )


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[str]"]]:
    """Those appended here are dead afterwards, with all their descendants."""
    made: list[subprocess.Popen[str]] = []
    yield made
    for process in made:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.communicate()


def ended(processes: list["subprocess.Popen[str]"], *arguments: Any, **options: Any) -> str:
    """The output of a job that is started and ends by itself; its process is the first of `processes`."""
    processes.append(started(*arguments, **options))
    return processes[0].communicate(timeout=900)[0]


def lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("train.py: error: ")]


def status(run: Path) -> dict[str, object]:
    return json.loads((run / "status.json").read_text())  # type: ignore[no-any-return]


def ranks(launcher: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The training processes of a launcher, by rank."""
    found = [p for p in psutil.Process(launcher.pid).children() if "RANK" in p.environ()]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def wait_for(path: Path, process: "subprocess.Popen[str]", read: int | None = None) -> None:
    """Waits for a file, reading what the process writes to a terminal meanwhile."""
    deadline = time.monotonic() + 300
    while not path.exists():
        while read is not None and select.select([read], [], [], 0)[0]:
            os.read(read, 1 << 16)
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def wait_for_state(run: Path, state: str) -> None:
    """Waits until status.json says so."""
    deadline = time.monotonic() + 300
    while status(run)["state"] != state:
        assert time.monotonic() < deadline, status(run)
        time.sleep(0.1)


def wait_for_steps(run: Path, steps: int, process: "subprocess.Popen[str]") -> None:
    """Waits for a checkpoint so many steps further, or more: not every step has one."""
    newest, deadline = step_of(checkpoint.found(run / "checkpoints")[0]), time.monotonic() + 300
    while step_of(checkpoint.found(run / "checkpoints")[0]) < newest + steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_rank_that_raises_ends_all_with_its_own_error_as_their_last_line(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = "def step(rank, number):\n    if (rank, number) == (1, 5): raise ValueError('boom')"
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", THREE)
    assert processes[0].returncode != 0
    assert lines(output) == [f"train.py: error: rank 1 on {HOST}: ValueError: boom"] * 3
    assert output.count("Traceback") == 2  # the rank's own, and the launcher's
    assert status(tmp_path / "run") == {"state": "failed", "step": 4, "reason": f"rank 1 on {HOST}: ValueError: boom"}


def test_the_traceback_of_a_rank_that_raises_while_a_save_is_under_way_is_there(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "import threading\nfrom cifar import files\nreal_write, writes = files.write, threading.Event()\n"
        "def write(path, content):\n"
        "    if 'step-0000003' in str(path): writes.set(); time.sleep(60)\n"
        "    real_write(path, content)\n"
        "files.write = write\n"
        "def step(rank, number):\n"
        "    if rank == 0 and number == 5: writes.wait(); raise ValueError('boom')"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", TWO)
    assert set(lines(output)) == {f"train.py: error: rank 0 on {HOST}: ValueError: boom"}
    assert ", in step\n" in output  # where it was raised
    assert status(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize(
    ("patch", "flags", "words", "late"),
    [
        ("if os.environ['RANK'] == '1': os.environ['CIFAR_DEVICE'] = 'cuda'", (), "no GPU", 5),  # no driver there
        ("", ("--recipe", "digitz"), "digitz", 5),
        ("", ("--recipe", "digitz"), "digitz", 600),
    ],
    ids=["one rank", "all ranks", "no rank 0"],
)
def test_what_keeps_ranks_from_coming_is_said_once_even_if_the_first_comes_last(
    patch: str, flags: tuple[str, ...], words: str, late: int, shapes: Path, tmp_path: Path,
    processes: list["subprocess.Popen[str]"],
) -> None:  # fmt: skip
    # A launcher ends it by SIGTERM as soon as another has exited.
    patch += f"\nif os.environ['RANK'] == '0': time.sleep({late})"
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", TWO, more=flags)
    assert processes[0].returncode != 0
    assert len(lines(output)) == 1, output
    assert words in lines(output)[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--seed", "7"), "seed (7, rank 0: 0)"), (("--data", "digits"), "images (")],
    ids=["another seed", "other images"],
)
def test_ranks_that_were_started_with_other_commands_are_refused(
    flags: tuple[str, str], words: str, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = f"if os.environ['RANK'] == '1': sys.argv += {list(flags)}"
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", TWO)
    assert processes[0].returncode != 0
    assert len(lines(output)) == 1, output
    assert f"rank 1 on {HOST} differs from rank 0 in {words}" in lines(output)[0]
    assert not (tmp_path / "run").exists()


def test_ranks_wait_for_images_as_long_as_one_of_them_gets_on_with_them(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "from cifar import failure\nfrom cifar.data import cache\n"
        "failure.SETUP_SECONDS, real_open = 8, cache.open_data\n"
        "def open_data(*data, **how):\n"
        "    if os.environ['RANK'] == '0':\n"
        "        for _ in range(50): time.sleep(0.5); failure.report_progress()\n"
        "    return real_open(*data, **how)\n"
        "cache.open_data = open_data"
    )
    run = tmp_path / "run"
    output = ended(processes, project(tmp_path, patch), shapes, run, TWO, more=("--epochs", 2))
    assert processes[0].returncode == 0, output
    assert status(run)["state"] == "finished"


def test_no_step_waits_for_curves_and_pictures(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    """The first point and picture are made only after four steps: a disk that is so slow stops no rank."""
    patch = (
        "from cifar import figures, record, tracking\n"
        "real_samples = figures.samples\n"
        "def samples(*arguments):\n"
        "    while count < 4: time.sleep(0.05)\n"
        "    return real_samples(*arguments)\n"
        "figures.samples = samples\n"
        "record.LOG_SECONDS, real_add = 0, tracking.SummaryWriter.add_scalar\n"
        "def add_scalar(*arguments, **more):\n"
        "    while count < 4: time.sleep(0.05)\n"
        "    real_add(*arguments, **more)\n"
        "tracking.SummaryWriter.add_scalar = add_scalar"
    )
    run = tmp_path / "run"
    more = ("--epochs", 2, "--checkpoint-every", 500)
    output = ended(processes, project(tmp_path, patch), shapes, run, (), 20, more=more)
    assert processes[0].returncode == 0, output
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    assert [point.step for point in accumulator.Scalars("train/loss")] == [*range(1, 12)]
    assert accumulator.Tags()["images"] == ["samples", "confusion"]


def test_a_disk_that_is_full_before_the_first_step_is_one_line(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "from cifar.attempt import Attempt\n"
        "def write_status(*arguments): raise OSError(28, 'No space left on device', 'status.json')\n"
        "Attempt.write_status = write_status"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", ())
    assert processes[0].returncode == 2
    assert "Traceback" not in output
    assert len(lines(output)) == 1
    assert "No space left on device" in lines(output)[0]


def test_a_gpu_whose_memory_is_full_outside_a_step_is_one_line(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "import torch\nfrom cifar import evaluation\n"
        "def evaluate(*arguments):\n"
        "    if int(os.environ['RANK']) == 1:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total')\n"
        "    time.sleep(600)\n"
        "evaluation.evaluate = evaluate"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", TWO, more=("--epochs", 2))
    words = f"rank 1 on {HOST}: CUDA out of memory. Tried to allocate 2.00 GiB; end what else uses the GPU"
    assert [words in line for line in lines(output)] == [True], output
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_user_error_on_the_first_rank_alone_ends_all_with_one_line(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    # A newer attempt is noticed by rank 0, between two collectives.
    patch = (
        "from pathlib import Path\nfrom cifar import attempt\n"
        f"def step(rank, number):\n    if (rank, number) == (0, 5): attempt.claim(Path({str(tmp_path / 'run')!r}), 1)"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", TWO)
    assert len(lines(output)) == 1
    assert "was taken over by attempt 2" in lines(output)[0]
    assert status(tmp_path / "run")["state"] == "running"  # it is the newer attempt's to change


@pytest.mark.parametrize(
    ("rank", "number"), [(2, signal.SIGKILL), (2, signal.SIGSTOP), (0, signal.SIGKILL), (0, signal.SIGSTOP)],
    ids=["killed", "frozen", "first killed", "first frozen"],
)  # fmt: skip
def test_a_rank_that_is_gone_is_named(
    rank: int, number: signal.Signals, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    processes.append(started(ROOT / "train.py", shapes, tmp_path / "run", THREE, hang_seconds=8))
    wait_for(tmp_path / "run/checkpoints/step-0000003", processes[0])
    victim = ranks(processes[0])[rank]
    victim.send_signal(number)
    wait_for_state(tmp_path / "run", "failed")
    if number == signal.SIGSTOP:
        victim.kill()  # the launcher would give it half a minute
    output = processes[0].communicate(timeout=900)[0]
    words = f"train.py: error: rank {rank} on {HOST}: no answer, so killed, frozen or cut off ("
    assert [line.startswith(words) for line in lines(output)] == [True, True], output
    assert len(set(lines(output))) == 1
    assert attempts(tmp_path / "run") == (2 if rank == 0 else 1)  # a frozen rank 0 may not write any more


@pytest.mark.parametrize("rank", [0, 1])
def test_whoever_is_killed_where_no_rank_gets_an_error_the_lowest_that_is_left_records_it(
    rank: int, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    # As over NCCL, where the main thread waits inside the device.
    patch = (
        "import signal\n"
        "def step(rank, number):\n"
        "    if number < 5: return\n"
        f"    if rank == {rank}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(600)"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", THREE)
    words = f"train.py: error: rank {rank} on {HOST}: no answer, so killed, frozen or cut off ("
    assert [line.startswith(words) for line in lines(output)] == [True, True], output
    assert status(tmp_path / "run")["state"] == "failed"
    assert status(tmp_path / "run")["reason"] == lines(output)[0].removeprefix("train.py: error: ")
    assert attempts(tmp_path / "run") == (2 if rank == 0 else 1)  # the record in place of rank 0 is one of its own


def test_a_first_rank_that_is_killed_in_its_last_writes_is_named_and_the_same_command_finishes(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "import signal\nfrom cifar import run\nfrom pathlib import Path\n"
        f"real_result, killed = run.write_result, Path({str(tmp_path / 'killed')!r})\n"
        "def write_result(*arguments):\n"
        "    if not killed.exists(): killed.touch(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real_result(*arguments)\n"
        "run.write_result = write_result"
    )
    script, run, short = project(tmp_path, patch), tmp_path / "run", ("--epochs", 2)
    output = ended(processes, script, shapes, run, TWO, more=short)
    assert processes[0].returncode != 0
    words = f"train.py: error: rank 0 on {HOST}: no answer, so killed, frozen or cut off ("
    assert [line.startswith(words) for line in lines(output)] == [True], output
    assert status(run)["state"] == "failed"
    assert status(run)["reason"] == lines(output)[0].removeprefix("train.py: error: ")
    processes.append(started(script, shapes, run, TWO, more=short))
    output = processes[1].communicate(timeout=900)[0]
    assert processes[1].returncode == 0, output
    assert status(run)["state"] == "finished"


@pytest.mark.parametrize("waiting", ["asleep", "decoding"])
def test_a_rank_that_is_killed_before_the_first_step_is_named(
    waiting: str, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    # torch's launcher sends the others SIGTERM: that is no user's request to stop.
    how = {"asleep": "time.sleep(600)", "decoding": "waiting.raise_if_stopped('decoding the images'); time.sleep(0.1)"}
    patch = (
        "import signal, threading\nfrom pathlib import Path\nfrom cifar.data import cache, waiting\n"
        f"begun = Path({str(tmp_path / 'begun')!r})\n"
        "def open_data(*data, **how):\n"  # rank 0 does it first
        "    begun.touch()\n"
        f"    while True: {how[waiting]}\n"
        "cache.open_data = open_data\n"
        "def die():\n"
        "    while not begun.exists(): time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ['RANK'] == '1': threading.Thread(target=die, daemon=True).start()"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", THREE)
    words = f"train.py: error: rank 1 on {HOST}: no answer, so killed, frozen or cut off ("
    assert lines(output), output
    assert all(line.startswith(words) for line in lines(output)), output
    assert "received while" not in output
    assert "stopped on request" not in output


def pair_of_launchers(script: Path, shapes: Path, run: Path) -> list[str]:
    """The outputs of a job of two launchers with a rank each, as on two machines."""
    arguments = ("--data", shapes, "--run", run, "--global-batch-size", 12)
    pair = TwoLaunchers(script, *arguments, precision="no", variables=[dict(os.environ)] * 2)
    try:
        return pair.outputs()
    finally:
        pair.end()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_another_machine_that_is_killed_between_its_data_and_the_first_step_is_named_soon(
    rank: int, shapes: Path, tmp_path: Path
) -> None:
    patch = (
        "import signal\nfrom cifar import failure\n"
        "failure.computes_on_cpu = lambda: None\n"
        "def build(*arguments):\n"
        "    time.sleep(2)\n"
        f"    if os.environ['RANK'] == '{rank}': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(600)\n"  # as over NCCL, where no error comes from a collective
        "cifar.models.build = build"
    )
    line, *rest = lines(pair_of_launchers(project(tmp_path, patch), shapes, tmp_path / "run")[1 - rank])
    assert not rest
    assert f"rank {rank} on" in line
    assert f"(no heartbeat for {failure.OPENED_SILENT_SECONDS} s)" in line


def test_a_wrong_command_on_another_machine_alone_is_told_at_once(shapes: Path, tmp_path: Path) -> None:
    patch = "if os.environ['RANK'] == '1': sys.argv += ['--epochs', 'many']"
    first, second = pair_of_launchers(project(tmp_path, patch), shapes, tmp_path / "run")
    (line,) = lines(first)
    assert line.startswith(f"train.py: error: rank 1 on {HOST}: --epochs many: ")
    assert not lines(second)


def test_a_rank_that_raises_before_the_first_step_leaves_a_run_that_failed(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    processes.append(started(ROOT / "train.py", shapes, run, TWO))
    wait_for(run / "checkpoints/step-0000003", processes[0])
    processes[0].terminate()
    processes[0].communicate(timeout=900)
    step = status(run)["step"]
    patch = (
        "from cifar import launch\n"
        "def prepare(*arguments): raise ValueError('boom')\n"
        "if os.environ['RANK'] == '1': launch.prepare = prepare"
    )
    processes.append(started(project(tmp_path, patch), shapes, run, TWO))
    output = processes[1].communicate(timeout=900)[0]
    reason = f"rank 1 on {HOST}: ValueError: boom"
    assert set(lines(output)) == {f"train.py: error: {reason}"}
    assert status(run) == {"state": "failed", "step": step, "reason": reason}


def test_output_that_nobody_reads_does_not_keep_a_job_that_hangs(shapes: Path, tmp_path: Path) -> None:
    read, write = os.pipe()  # full after some lines, like a terminal that was stopped by Ctrl-S
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = command(ROOT / "train.py", "--data", shapes, "--run", tmp_path / "run", "--network", "whitened",
                    "--global-batch-size", 8, "--epochs", 400, "--augmentation-backend", "device")  # fmt: skip
    job = subprocess.Popen(
        words, env={**env, "CIFAR_HANG_SECONDS": "8"}, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    errors = job.communicate(timeout=600)[1]
    os.close(read)
    assert job.returncode == 1
    assert len(lines(errors)) == 1, errors
    assert "(no step for 8 s)" in lines(errors)[0]
    assert status(tmp_path / "run")["state"] == "failed"


def test_a_rank_that_hangs_in_its_own_code_is_named_with_the_place(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "from cifar import files\nreal_write = files.write\n"
        "def write(path, content):\n"
        "    if 'step-0000006' in str(path): time.sleep(600)\n"  # a file system that does not answer
        "    real_write(path, content)\n"
        "files.write = write"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", THREE, hang_seconds=8)
    assert len(set(lines(output))) == 1, output
    line = lines(output)[0]
    assert f"rank 0 on {HOST} is in cifar/checkpoint.py:" in line
    assert "(write), the others in cifar/loop.py:" in line
    assert "(no step for 8 s)" in line
    assert status(tmp_path / "run")["reason"] == line.removeprefix("train.py: error: ")


def test_a_file_system_that_answers_nothing_any_more_does_not_keep_the_job(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "from cifar import files\nreal_write, hangs = files.write, False\n"
        "def write(path, content):\n"
        "    global hangs\n"
        "    hangs = hangs or 'step-0000006' in str(path)\n"
        "    if hangs: time.sleep(600)\n"  # status.json, too
        "    real_write(path, content)\n"
        "files.write = write"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", THREE, hang_seconds=8)
    assert len(set(lines(output))) == 1, output
    assert len(lines(output)) == 3, output  # rank 0 ends itself, before the launcher's patience is at its end
    assert f"rank 0 on {HOST} is in cifar/checkpoint.py:" in lines(output)[0]


def test_a_rank_that_does_not_come_is_named(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "from cifar import failure\nfailure.SETUP_SECONDS = 20\n"
        "if os.environ['RANK'] == '2': time.sleep(600)"  # the ranks form a group without it, for half an hour
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", THREE)
    line = "train.py: error: rank 2 on machine 0: no answer, so killed, frozen or cut off (no step for 20 s)"
    assert lines(output) == [line] * 2, output


def test_a_rank_that_hangs_before_its_first_step_is_named_with_the_place(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "from cifar import failure, models\nfailure.HANG_SECONDS = 8\nreal_build = models.build\n"
        "def build(*arguments):\n"
        "    if os.environ['RANK'] == '1': time.sleep(600)\n"
        "    return real_build(*arguments)\n"
        "models.build = build"
    )
    output = ended(processes, project(tmp_path, patch), shapes, tmp_path / "run", THREE, hang_seconds=8)
    assert len(set(lines(output))) == 1, output
    assert f"rank 1 on {HOST} is in cifar/models/__init__.py:" in lines(output)[0]
    assert "(create), the others in cifar/ranks.py:" in lines(output)[0]
    assert "(no step for 8 s)" in lines(output)[0]


ONE = ("--num_processes", "1")


@pytest.mark.parametrize(
    ("launcher", "number", "by_keyboard"),
    [(ONE, signal.SIGINT, True), (ONE, signal.SIGTERM, False), (ONE, signal.SIGKILL, False),
     (TWO, signal.SIGINT, True), (TWO, signal.SIGTERM, False)],
    ids=["Ctrl-C", "kill", "kill -9", "Ctrl-C, two processes", "kill, two processes"],
)  # fmt: skip
def test_whatever_ends_the_launcher_its_ranks_save_and_stop(
    launcher: tuple[str, ...], number: signal.Signals, by_keyboard: bool,
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    processes.append(started(ROOT / "train.py", shapes, run, launcher, workers=True))
    wait_for(run / "checkpoints/step-0000003", processes[0])
    if by_keyboard:
        os.killpg(processes[0].pid, number)  # a terminal sends it to all that run in its foreground
    else:
        processes[0].send_signal(number)
    output = processes[0].communicate(timeout=900)[0]  # until the ranks, too, have closed their ends
    assert status(run)["state"] == "preempted", output
    # One that is killed passes nothing on: its death does.
    assert status(run)["reason"] in ("SIGINT asked to stop", "SIGTERM asked to stop")
    newest, broken = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert (step_of(newest), broken) == (status(run)["step"], [])
    assert f"stopped on request after step {status(run)['step']}; the same command resumes from there" in output


@pytest.mark.parametrize("what", ["save", "step"])
def test_a_launcher_that_is_killed_costs_no_slow_save_and_no_slow_step(
    what: str, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    """Its store is gone, which must not be taken for a node that does not answer."""
    slow_save = (
        "from cifar import failure, files, stop\nreal_write, slow = files.write, True\n"
        "failure.computes_on_cpu = lambda: None\n"  # as on a GPU
        "def write(path, content):\n"
        "    global slow\n"
        "    if stop.requested() and 'step-' in str(path) and slow: slow = False; time.sleep(20)\n"
        "    real_write(path, content)\n"
        "files.write = write\n"
        "def step(rank, number): time.sleep(0.2)"
    )
    slow_step = (
        "from cifar import stop\nslow = True\n"
        "def step(rank, number):\n"
        "    global slow\n"
        "    time.sleep(0.2)\n"
        "    if stop.requested() and slow: slow = False; time.sleep(20)"
    )
    run = tmp_path / "run"
    patch = {"save": slow_save, "step": slow_step}[what]
    processes.append(started(project(tmp_path, patch), shapes, run, TWO, hang_seconds=120))
    wait_for(run / "checkpoints/step-0000003", processes[0])
    processes[0].kill()
    output = processes[0].communicate(timeout=900)[0]
    assert status(run)["state"] == "preempted", output
    newest, broken = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert (step_of(newest), broken) == (status(run)["step"], [])


IN_A_STEP = "def step(rank, number):\n    if (rank, number) == (1, 5): os.kill(os.getpid(), signal.SIGTERM)"
IN_AN_EVALUATION = (
    "from cifar import evaluation\nreal_evaluate = evaluation.evaluate\n"
    "def evaluate(*arguments):\n"
    "    if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
    "    return real_evaluate(*arguments)\n"
    "evaluation.evaluate = evaluate"
)


@pytest.mark.parametrize(("patch", "last_step"), [(IN_A_STEP, 5), (IN_AN_EVALUATION, 6)], ids=["step", "evaluation"])
def test_what_one_rank_is_asked_in_a_step_all_do_right_after_it(
    patch: str, last_step: int, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    output = ended(processes, project(tmp_path, f"import signal\n{patch}"), shapes, run, TWO)
    assert processes[0].returncode == 0, output
    assert status(run) == {"state": "preempted", "step": last_step, "reason": "another rank asked to stop"}
    newest, _ = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert step_of(newest) == last_step
    assert not (
        run / "metrics.jsonl"
    ).read_text()  # the first epoch's end is step 6: its evaluation is not half recorded


def test_where_metrics_come_back_later_all_ranks_stop_after_the_same_step(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    patch = (
        "import signal\nloop.DELAY['cpu'] = 3\n"
        "def step(rank, number):\n    if (rank, number) == (1, 2): os.kill(os.getpid(), signal.SIGTERM)"
    )
    more = ("--checkpoint-every", 500)
    output = ended(processes, project(tmp_path, patch), shapes, run, TWO, more=more)
    assert processes[0].returncode == 0, output
    assert status(run) == {"state": "preempted", "step": 5, "reason": "another rank asked to stop"}
    newest, _ = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert step_of(newest) == 5


def test_a_second_signal_does_not_spoil_the_first_ones_checkpoint(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    processes.append(started(ROOT / "train.py", shapes, tmp_path / "run", (), workers=True))
    wait_for(tmp_path / "run/checkpoints/step-0000003", processes[0])
    while processes[0].poll() is None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            processes[0].send_signal(number)
        time.sleep(0.05)
    output = processes[0].communicate()[0]
    assert processes[0].returncode == 0, output
    newest, broken = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert broken == []
    assert newest is not None
    assert step_of(newest) == status(tmp_path / "run")["step"]
    assert status(tmp_path / "run")["state"] == "preempted"


def test_an_absurd_hang_limit_is_refused(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    output = ended(processes, ROOT / "train.py", shapes, tmp_path / "run", TWO, hang_seconds=0)
    assert lines(output) == [
        "train.py: error: CIFAR_HANG_SECONDS=0 is not a number of seconds; give a whole number of at least 1"
    ]


# ---- a process alone, and stop requests that nothing hears

SLEEPS_IN_STEP_5 = "def step(rank, number):\n    if number == 5: time.sleep(600)"


def test_a_process_alone_that_hangs_is_ended_with_the_place(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    output = ended(processes, project(tmp_path, SLEEPS_IN_STEP_5), shapes, run, (), hang_seconds=8)
    assert processes[0].returncode == 1
    assert len(lines(output)) == 1, output
    assert "this process is in train.py:" in lines(output)[0]
    assert "(no step for 8 s)" in lines(output)[0]
    assert status(run) == {"state": "failed", "step": 4, "reason": lines(output)[0].removeprefix("train.py: error: ")}


def test_native_code_that_lets_no_thread_run_does_not_keep_a_process_alone(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    # PyDLL keeps Python's lock: no thread of the watchdog runs. It has reported step 4 before.
    patch = (
        "import ctypes\ndef step(rank, number):\n"
        "    if number == 5: time.sleep(2); open('asleep', 'w'); ctypes.PyDLL(None).sleep(600)"
    )
    run = tmp_path / "run"
    processes.append(started(project(tmp_path, patch), shapes, run, (), hang_seconds=4, cwd=tmp_path))
    wait_for(tmp_path / "asleep", processes[0])
    output = processes[0].communicate(timeout=300)[0]
    assert processes[0].returncode == -signal.SIGKILL
    assert len(lines(output)) == 1, output
    assert "this process is in train.py:" in lines(output)[0]
    assert lines(output)[0].endswith(": native code there has let no Python thread run for 4 s")
    assert status(run) == {"state": "failed", "step": 4, "reason": lines(output)[0].removeprefix("train.py: error: ")}


def test_a_process_alone_that_was_stopped_for_longer_than_the_limit_goes_on(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    processes.append(started(ROOT / "train.py", shapes, run, (), hang_seconds=4))
    wait_for(run / "checkpoints/step-0000003", processes[0])
    os.kill(processes[0].pid, signal.SIGSTOP)  # this process alone, as a debugger does
    time.sleep(4 + guard.MARGIN_SECONDS + 4)
    os.kill(processes[0].pid, signal.SIGCONT)
    wait_for_steps(run, 6, processes[0])
    processes[0].terminate()
    assert "stopped on request after step" in processes[0].communicate(timeout=900)[0]


def test_a_process_alone_whose_step_takes_long_is_left_alone(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    patch = (
        "def step(rank, number):\n"
        "    end = time.monotonic() + (12 if number == 5 else 0)\n"
        "    while time.monotonic() < end: pass"
    )
    processes.append(started(project(tmp_path, patch), shapes, tmp_path / "run", (), hang_seconds=4))
    wait_for(tmp_path / "run/checkpoints/step-0000006", processes[0])
    processes[0].terminate()
    assert processes[0].communicate(timeout=900)[0].count("stopped on request after step") == 1


@pytest.mark.parametrize(
    ("number", "launcher"), [(signal.SIGINT, ()), (signal.SIGTERM, TWO)], ids=["Ctrl-C", "kill, two processes"]
)
def test_a_request_that_is_repeated_ends_what_no_longer_moves(
    number: signal.Signals, launcher: tuple[str, ...],
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"],
) -> None:  # fmt: skip
    # The main thread is inside C code, where no handler of Python's runs.
    patch = (
        "import ctypes\n"
        "def step(rank, number):\n"
        "    if number == 5:\n"
        "        open(os.environ['STUCK'], 'w').close()\n"
        "        ctypes.CDLL(None).pthread_cond_wait((ctypes.c_char * 64)(), (ctypes.c_char * 64)())"
    )
    run, stuck = tmp_path / "run", tmp_path / "stuck"
    processes.append(started(project(tmp_path, patch), shapes, run, launcher, 600, env={"STUCK": str(stuck)}))
    wait_for(stuck, processes[0])
    victims = ranks(processes[0]) if launcher else [psutil.Process(processes[0].pid)]
    for victim in victims:
        victim.send_signal(number)
    for victim in victims:  # at once: as Ctrl-C comes from the terminal and from the launcher
        victim.send_signal(number)
    time.sleep(12)
    assert [victim.is_running() for victim in victims] == [True] * len(victims)
    for victim in victims:
        victim.send_signal(number)
    output = processes[0].communicate(timeout=900)[0]
    words = f"train.py: error: {number.name} again, and nothing has moved for "
    assert lines(output), output
    assert all(line.startswith(words) for line in lines(output)), output
    assert "the same command resumes from the last checkpoint" in lines(output)[0]
    assert status(run)["state"] == "preempted"
    assert checkpoint.newest(run / "checkpoints")[0] == run / "checkpoints/step-0000003"


FOR_IMAGES = (
    "from cifar.data import cache\nreal_open = cache.open_data\n"
    "def open_data(*data, **how):\n"
    "    if os.environ.get('RANK', '0') == '0': open(os.environ['STUCK'], 'w').close(); time.sleep(600)\n"
    "    return real_open(*data, **how)\n"
    "cache.open_data = open_data"
)
FOR_A_RANK = (
    "from cifar import failure\nreal_exchange = failure.exchange\n"
    "def exchange(*what):\n"
    "    open(os.environ['STUCK'], 'w').close()\n"
    "    return real_exchange(*what)\n"
    "failure.exchange = exchange\n"
    "if os.environ['RANK'] == '1': time.sleep(40)"  # imports from a slow disk: it is not to blame
)


@pytest.mark.parametrize(
    ("waiting", "launcher"), [(FOR_IMAGES, ()), (FOR_IMAGES, TWO), (FOR_A_RANK, TWO)],
    ids=["one process", "two processes", "one that has not begun"],
)  # fmt: skip
def test_one_request_ends_what_waits_before_the_first_step(
    waiting: str, launcher: tuple[str, ...],
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"],
) -> None:  # fmt: skip
    stuck = tmp_path / "stuck"
    processes.append(
        started(project(tmp_path, waiting), shapes, tmp_path / "run", launcher, 600, env={"STUCK": str(stuck)})
    )
    wait_for(stuck, processes[0])
    victim = ranks(processes[0])[0] if launcher else psutil.Process(processes[0].pid)
    victim.send_signal(signal.SIGTERM)
    output = processes[0].communicate(timeout=900)[0]
    assert processes[0].returncode == 0, output
    assert lines(output) == []
    assert output.count("train.py: stopped on request before the first step") == 1
    assert ("before the first step (rank 1 on machine 0 had not begun)" in output) == (waiting == FOR_A_RANK)
    assert not (tmp_path / "run").exists()


def test_processes_that_were_all_suspended_go_on(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    # As `scontrol suspend` does, and a laptop that sleeps.
    run = tmp_path / "run"
    processes.append(started(ROOT / "train.py", shapes, run, TWO, hang_seconds=8, workers=True))
    wait_for(run / "checkpoints/step-0000003", processes[0])
    whole = [psutil.Process(processes[0].pid), *psutil.Process(processes[0].pid).children(recursive=True)]
    for process in whole:
        process.suspend()
    time.sleep(15)
    for process in whole:
        process.resume()
    wait_for_steps(run, 6, processes[0])
    processes[0].terminate()
    assert "stopped on request after step" in processes[0].communicate(timeout=900)[0]


# ---- the terminal and what else may go away


def test_a_terminal_that_is_closed_is_a_stop_request(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    mine, theirs = os.openpty()
    process = started(
        ROOT / "train.py", shapes, run, (), workers=True, stdin=theirs, stdout=theirs, stderr=theirs,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    processes.append(process)
    os.close(theirs)
    wait_for(run / "checkpoints/step-0000003", process, read=mine)
    os.close(mine)
    assert process.wait(timeout=900) == 0
    assert status(run)["state"] == "preempted"
    assert status(run)["reason"] == "SIGHUP asked to stop"
    newest, _ = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert step_of(newest) == status(run)["step"]


def test_nohup_is_respected(shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]) -> None:
    run = tmp_path / "run"
    processes.append(
        started(ROOT / "train.py", shapes, run, (), preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    )
    wait_for(run / "checkpoints/step-0000003", processes[0])
    processes[0].send_signal(signal.SIGHUP)
    wait_for_steps(run, 6, processes[0])
    assert status(run)["state"] == "running"
    processes[0].terminate()
    processes[0].communicate(timeout=900)


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_output_that_cannot_be_written_does_not_end_training(
    output: str, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    if output == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        read, descriptor = os.pipe()
        os.close(read)
    more = ("--epochs", 2)
    processes.append(started(ROOT / "train.py", shapes, run, (), more=more, stdout=descriptor, stderr=subprocess.PIPE))
    os.close(descriptor)
    assert processes[0].communicate(timeout=900)[1] == ""
    assert processes[0].returncode == 0
    assert status(run)["state"] == "finished"


@pytest.mark.parametrize("columns", [0, 80])
def test_a_terminal_shows_a_bar_or_lines(
    columns: int, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    mine, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    patch = "from cifar import record, tracking\nrecord.LOG_SECONDS = tracking.LINE_EVERY = 0"
    process = started(
        project(tmp_path, patch), shapes, tmp_path / "run", (), more=("--epochs", 2), stdout=theirs, stderr=theirs
    )
    processes.append(process)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other end was closed
        while read := os.read(mine, 1 << 16):
            shown += read
    os.close(mine)
    assert process.wait(timeout=900) == 0, shown
    assert (b"step 10/" in shown) == (columns == 0)
    assert (b"\r" in shown.replace(b"\r\n", b"\n")) == (columns > 0)


# ---- restarts in place

RESTARTING = (*TWO, "--max_restarts", "3")


def attempts(run: Path) -> int:
    return len(list((run / "attempts").glob("*.json")))


def test_a_run_that_is_started_twice_belongs_to_the_later_one_and_the_earlier_one_ends(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    slow = project(tmp_path, "def step(rank, number): time.sleep(0.2)")
    processes.append(started(slow, shapes, run, RESTARTING))
    wait_for(run / "checkpoints/step-0000003", processes[0])
    output = ended(processes, slow, shapes, run, RESTARTING)
    assert processes[0].returncode != 0
    assert len(lines(output)) == 1, output
    assert "was taken over by attempt 2" in lines(output)[0]
    wait_for_steps(run, 6, processes[1])
    assert attempts(run) == 2
    processes[1].terminate()
    processes[1].communicate(timeout=900)
    assert status(run)["state"] == "preempted"


def test_a_users_error_is_not_tried_again_in_place(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    output = ended(processes, project(tmp_path, poisoned(5)), shapes, run, RESTARTING)
    assert processes[0].returncode != 0
    assert len(lines(output)) == 1, output
    assert "loss nan in step 5" in lines(output)[0]
    assert attempts(run) == 1
    assert status(run)["state"] == "failed"


def test_a_wrong_flag_is_not_tried_again_in_place(
    shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    output = ended(processes, ROOT / "train.py", shapes, tmp_path / "run", RESTARTING, more=("--epochs", "many"))
    assert processes[0].returncode != 0
    assert len(lines(output)) == 1, output


def test_a_users_error_ends_no_process_that_has_only_adopted_the_rank() -> None:
    # What a process of a dead launcher has as parent may be the job script, or a container's first process.
    rank = (
        "import os, sys, time\nfrom cifar import failure\n"
        "os.environ |= {'LOCAL_RANK': '0', 'TORCHELASTIC_RESTART_COUNT': '0', 'TORCHELASTIC_MAX_RESTARTS': '3'}\n"
        "launcher = os.getppid()\nprint('ready', flush=True)\n"
        "while os.getppid() == launcher: time.sleep(0.01)\n"
        "failure.leave(failure.USER_ERROR)"
    )
    launcher = f"import subprocess, sys\nrank = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=-1)\n"
    launcher += "rank.stdout.readline()"
    adopter = (
        "import ctypes, os, subprocess, sys\nctypes.CDLL(None).prctl(36, 1)\n"  # PR_SET_CHILD_SUBREAPER
        f"subprocess.run([sys.executable, '-c', {launcher!r}])\n"
        "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert subprocess.run([sys.executable, "-c", adopter], check=False, cwd=ROOT).returncode == failure.USER_ERROR


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_started_again_in_place(
    rank: int, shapes: Path, tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    run = tmp_path / "run"
    processes.append(started(ROOT / "train.py", shapes, run, RESTARTING))
    wait_for(run / "checkpoints/step-0000003", processes[0])
    ranks(processes[0])[rank].kill()
    deadline = time.monotonic() + 300
    while not list((run / "attempts").glob("*.json")) or status(run)["state"] != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert f"rank {rank} on {HOST}: no answer, so killed" in str(status(run)["reason"])  # also of rank 0
    begun = attempts(run)
    while status(run)["state"] != "running" or attempts(run) == begun:
        assert processes[0].poll() is None, processes[0].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[0].terminate()
    output = processes[0].communicate(timeout=900)[0]
    assert "resuming from" in output


# ---- before training


def preflight(
    rank: int, *nodes: str, port: int, program: tuple[str, ...] = ("-m", "cifar.preflight"), seconds: int = 10
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *program, "--port", str(port), "--processes-per-node", "1", "--seconds", str(seconds), *nodes],
        cwd=ROOT, env={**os.environ, "SLURM_PROCID": str(rank)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_first_node_that_answers_nothing_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "GRACE_SECONDS", 0.1)
    peers, asked = failure._Peers.__new__(failure._Peers), threading.Semaphore(0)
    peers.cut_off = False

    def question() -> None:
        asked.release()
        time.sleep(3600)

    unreachable = failure.End("does not answer", 1)
    assert peers.ask(question, unreachable) == peers.ask(question, unreachable) == unreachable
    assert asked.acquire(timeout=60)
    assert not asked.acquire(blocking=False)


def test_nodes_that_answer_pass_the_preflight(processes: list["subprocess.Popen[str]"]) -> None:
    port = free_port()
    processes += [preflight(rank, "localhost", "second", "third", port=port) for rank in range(3)]
    outputs = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert outputs[0][0] == "preflight: 3 nodes answer: localhost, second, third\n"


def test_a_first_node_that_freezes_keeps_no_other(processes: list["subprocess.Popen[str]"]) -> None:
    freezing = (
        "import os, signal\nfrom cifar import preflight\nmeet = preflight._meet\n"
        "def frozen(store, nodes, rank, seconds, stage, *word):\n"
        "    if (rank, stage) == (0, 'added up'): os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    meet(store, nodes, rank, seconds, stage, *word)\n"
        "preflight._meet = frozen\npreflight.main()"
    )
    port = free_port()
    processes += [
        preflight(rank, "localhost", "second", port=port, program=("-c", freezing), seconds=4) for rank in (0, 1)
    ]
    assert (
        processes[1].communicate(timeout=900)[1].startswith("preflight: error: localhost does not answer, or another")
    )
    assert processes[1].returncode == 2


def test_a_node_that_does_not_answer_is_named(processes: list["subprocess.Popen[str]"]) -> None:
    port = free_port()
    processes.append(preflight(0, "localhost", "second", "third", port=port))
    time.sleep(4)  # one that comes later hears of it from the first, which waits for it
    processes.append(preflight(2, "localhost", "second", "third", port=port))
    for process in processes:
        line = "preflight: error: no answer from second within 10 s; check or exclude it\n"
        assert process.communicate(timeout=900)[1] == line
        assert process.returncode == 2


def test_the_first_node_alone_names_the_other(processes: list["subprocess.Popen[str]"]) -> None:
    processes.append(preflight(0, "localhost", "second", port=free_port()))
    line = "preflight: error: no answer from second within 10 s; check or exclude it\n"
    assert processes[0].communicate(timeout=900)[1] == line


def test_nodes_that_cannot_make_a_group_end_in_time(processes: list["subprocess.Popen[str]"]) -> None:
    # NCCL may wait for a communicator without an end, and gloo for an address, inside of the store's connection.
    script = (
        "from datetime import timedelta\nfrom torch import distributed\nfrom cifar import preflight\n"
        "def init_process_group(*_, store, **__): store.wait(['never'], timedelta(seconds=600))\n"
        "distributed.init_process_group = init_process_group\n"
        "preflight.main()"
    )
    port = free_port()
    for rank in (0, 1):
        arguments = ["--port", str(port), "--processes-per-node", "1", "--seconds", "5", "localhost", "second"]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", script, *arguments], cwd=ROOT, env={**os.environ, "SLURM_PROCID": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for process, node in zip(processes, ("localhost", "second"), strict=True):
        assert process.communicate(timeout=300)[1] == (
            f"preflight: error: {node}: the nodes answer but their all-reduce fails (they have not done so in time); "
            "set the interface that connects them (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)\n"
        )
        assert process.returncode == 2


NCCL = "NCCL error in: /pytorch/NCCLUtils.cpp:94, {0}, NCCL version 2.28.9\n{1}: {2}\nLast error:\n{3}\n"


@pytest.mark.parametrize(
    ("text", "line", "code"),
    [
        (NCCL.format("invalid usage (run with NCCL_DEBUG=WARN for details)", "ncclInvalidUsage", "This is a bug.",
                     "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device a1000"),
         "two processes share one GPU; set --num_processes to the number of GPUs", 2),
        (NCCL.format("unhandled cuda error", "ncclUnhandledCudaError", "Call to CUDA function failed.",
                     "Cuda failure 2\n'out of memory'"),
         "rank 1 on node1: Cuda failure 2 'out of memory'", 1),
        ("[/pytorch/gloo/pair.cc:534] Connection closed by peer [10.0.0.1]:41. This may indicate a remote failure",
         "all ranks are in train.py:1 (train) (Connection closed by peer [10.0.0.1]:41)", 1),
    ],
    ids=["duplicate GPU", "out of memory", "gloo"],
)  # fmt: skip
def test_what_a_backend_says_is_one_line(text: str, line: str, code: int) -> None:
    class Peers:
        """Ranks that all answer."""

        rank = 1

        def name(self, rank: int) -> str:
            return f"rank {rank} on node{rank}"

        def roll_call(self, reason: str) -> None:
            pass

        def where_all_are(self, reason: str) -> failure.End:
            return failure.End(f"all ranks are in train.py:1 (train) ({reason})", 1)

    peers: Any = Peers()
    assert failure._own_end(peers, DistBackendError(text), failure.End("", 1))[:2] == (line, code)


def test_the_first_node_that_does_not_answer_is_named(processes: list["subprocess.Popen[str]"]) -> None:
    processes.append(preflight(1, "localhost", "second", port=free_port()))
    assert "preflight: error: second does not reach localhost, port" in processes[0].communicate(timeout=900)[1]
    assert processes[0].returncode == 2

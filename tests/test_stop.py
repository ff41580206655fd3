"""Signals are requests, and one that is repeated in vain is told from one that comes twice."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cifar import stop

WAITS = (
    "import time\nfrom cifar import stop\nstop.catch()\nprint('ready', flush=True)\n"
    "while not stop.requested(): time.sleep(0.01)\nprint(stop.name())"
)


@pytest.mark.parametrize("number", stop.SIGNALS, ids=lambda number: number.name)
def test_each_signal_is_a_request_that_is_remembered(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[0] == f"{number.name}\n"
    assert process.returncode == 0


@pytest.mark.parametrize("exported", [{}, {"ACCELERATE_MIXED_PRECISION": "no"}], ids=["plain", "exported"])
def test_a_shell_that_ends_is_no_launcher(exported: dict[str, str], tmp_path: Path) -> None:
    done = tmp_path / "done"
    waits = f"{WAITS}; open({str(done)!r}, 'w').write(stop.name())"
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(waits)} >/dev/null 2>&1 & echo $!; exec sleep 2"
    started = subprocess.run(
        ["bash", "-c", shell], env={**os.environ, **exported}, capture_output=True, text=True, check=True
    )
    process = psutil.Process(int(started.stdout.split()[0]))
    time.sleep(1)
    assert process.is_running()
    assert not done.exists()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert done.read_text() == "SIGINT"


@pytest.fixture
def caught() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in stop.SIGNALS}
    stop.catch()
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
    stop._received, stop._wakeup = 0, None


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.usefixtures("caught")
def test_only_what_a_person_repeats_after_some_time_without_a_move_counts() -> None:
    began = time.monotonic()
    repeated = stop.RepeatedStop(patience=0.5)
    send(signal.SIGINT)
    send(signal.SIGINT)  # from the terminal and from the launcher
    assert repeated.look(began) == 0
    assert stop.name() == "SIGINT"
    time.sleep(0.6)
    send(signal.SIGUSR1)  # a job script repeats it
    assert repeated.look(began) == 0
    send(signal.SIGTERM)
    assert repeated.look(time.monotonic() - 0.1) == 0  # something has moved since
    send(signal.SIGTERM)
    assert repeated.look(began) == signal.SIGTERM

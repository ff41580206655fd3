"""Work beside training, and where the time goes."""

import threading
from types import SimpleNamespace

import psutil
import pytest

from cifar.background import Background
from cifar.clock import Clock


def test_tasks_are_done_one_after_the_other_and_waited_for() -> None:
    background, done, go = Background("writer"), [], threading.Event()
    background.submit(lambda: done.append(go.wait(60)))
    for number in range(5):
        background.submit(lambda number=number: done.append(number))
    assert not background.idle()
    background.wait(seconds=0.05)  # and no longer
    assert done == []
    go.set()
    background.wait()
    assert done == [True, 0, 1, 2, 3, 4]
    assert background.idle()
    background.submit(lambda: done.append(5))  # by a new thread
    background.wait()
    assert done[-1] == 5


def test_after_one_that_failed_nothing_more_is_done_and_who_waits_is_told() -> None:
    background, done = Background("writer"), []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    background.submit(fail)
    background.submit(lambda: done.append(1))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            background.wait()
    background.submit(lambda: done.append(2))
    with pytest.raises(OSError, match="No space left"):
        background.wait()
    assert done == []


def test_seconds_are_those_since_the_process_began_each_of_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, began = 1000.0, psutil.Process().create_time()
    monkeypatch.setattr(
        "cifar.clock.time",
        SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: now, time=lambda: began + 7),
    )
    clock = Clock()
    clock.on("training")
    now += 2
    with clock.within("saving"):
        now += 3
    now += 4
    assert clock.rounded() == {"start": 7, "training": 6, "saving": 3}

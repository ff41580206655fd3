"""Work beside training, and where the time goes."""

import threading
import time

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


def test_seconds_are_those_since_the_process_began_each_of_them_once() -> None:
    clock = Clock()
    began = sum(clock.rounded().values())
    clock.on("training")
    before = time.perf_counter()
    with clock.within("saving"):
        time.sleep(0.05)
    time.sleep(0.02)
    passed = time.perf_counter() - before
    seconds = clock.rounded()
    assert set(seconds) == {"start", "training", "saving"}
    assert seconds["saving"] >= 0.05
    assert sum(seconds.values()) == pytest.approx(began + passed, abs=0.05)

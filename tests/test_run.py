"""What a run's evaluations leave: metrics.jsonl, predictions.log and predictions.safetensors."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from cifar import attempt
from cifar.attempt import Attempt
from cifar.errors import UserError
from cifar.recipes import Recipe
from cifar.run import EpochMetrics, History, read_predictions
from cifar.tracking import Tracker

OPEN: list[History] = []
LABELS = np.arange(6, dtype=np.uint8) % 3


def metrics(epoch: int) -> EpochMetrics:
    return EpochMetrics(epoch, 10 * epoch, 1.0, 0.5, 1.0, 0.5, 0.1, 100.0, float(epoch))


def probabilities(epoch: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(epoch).random((len(LABELS), 3), np.float32)


def predicted(epoch: int) -> list[int]:
    return probabilities(epoch).argmax(axis=1).tolist()  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Histories are closed at a test's end: each is as a process that was killed may leave it."""
    yield
    while OPEN:
        OPEN.pop().close()


def opened(claimed: Attempt, step: int) -> History:
    OPEN.append(History(claimed, step, LABELS))
    return OPEN[-1]


def history(claimed: Attempt, step: int, first: int, last: int) -> History:
    made = opened(claimed, step)
    for epoch in range(first, last + 1):
        made.record(metrics(epoch), probabilities(epoch))
    return made


def assert_holds(run: Path, epochs: int) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    rows, _ = read_predictions(run, len(LABELS))
    assert {epoch: row.tolist() for epoch, row in rows.items()} == {e: predicted(e) for e in range(1, epochs + 1)}


def assert_exported(run: Path, epochs: int) -> None:
    tensors = load_file(run / "predictions.safetensors")
    assert tensors["epochs"].tolist() == list(range(1, epochs + 1))
    assert tensors["predictions"].tolist() == [predicted(epoch) for epoch in range(1, epochs + 1)]
    assert tensors["labels"].tolist() == LABELS.tolist()
    assert np.array_equal(tensors["probabilities"], probabilities(epochs).astype(np.float16))


def test_each_epoch_is_on_the_disk_at_once_and_a_reader_finds_them_all(tmp_path: Path) -> None:
    made = opened(attempt.claim(tmp_path, 1), 0)
    for epoch in range(1, 30):
        made.record(metrics(epoch), probabilities(epoch))
        assert_holds(tmp_path, epoch)
    made.export()
    assert_exported(tmp_path, 29)


def test_what_is_written_does_not_grow_with_the_square_of_the_epochs(tmp_path: Path) -> None:
    claimed = attempt.claim(tmp_path, 1)
    written: list[str] = []
    replace = claimed.replace
    claimed.replace = lambda path, content: (written.append(path.name), replace(path, content))[1]  # type: ignore[func-returns-value,method-assign]
    history(claimed, 0, 1, 300)
    # Once for each of the first ten epochs, then for each tenth more: 10 + log(300 / 10) / log(10 / 9).
    assert set(written) == {"predictions.safetensors"}
    assert 35 < len(written) < 50
    assert (tmp_path / "predictions.log").stat().st_size == 300 * (8 + len(LABELS))


@pytest.mark.parametrize("step", [0, 70, 75, 250])
def test_the_next_attempt_goes_on_from_any_step_to_the_same_files(step: int, tmp_path: Path) -> None:
    history(attempt.claim(tmp_path, 1), 0, 1, 25)
    again = opened(attempt.claim(tmp_path, 1), step)
    assert again.last_epoch() in (step // 10, step // 10 - 1)
    for epoch in range(again.last_epoch() + 1, 31):
        again.record(metrics(epoch), probabilities(epoch))
    again.export()
    assert_holds(tmp_path, 30)
    assert_exported(tmp_path, 30)


@pytest.mark.parametrize("cut", [1, 3, 20])
@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.log"])
def test_an_epoch_that_a_crash_cut_short_is_recorded_anew(name: str, cut: int, tmp_path: Path) -> None:
    history(attempt.claim(tmp_path, 1), 0, 1, 15)  # the last two are not in predictions.safetensors yet
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-cut])
    again = opened(attempt.claim(tmp_path, 1), 150)
    assert again.last_epoch() < 15
    for epoch in range(again.last_epoch() + 1, 16):
        again.record(metrics(epoch), probabilities(epoch))
    again.export()
    assert_holds(tmp_path, 15)
    assert_exported(tmp_path, 15)


def test_a_crash_before_the_export_costs_no_probabilities(tmp_path: Path) -> None:
    history(attempt.claim(tmp_path, 1), 0, 1, 11)
    assert len(load_file(tmp_path / "predictions.safetensors")["epochs"]) == 10
    again = opened(attempt.claim(tmp_path, 1), 110)
    assert again.last_epoch() == 10  # so the eleventh is evaluated again
    again.record(metrics(11), probabilities(11))
    again.export()
    assert_exported(tmp_path, 11)


def test_files_of_an_earlier_version_are_taken_up(tmp_path: Path) -> None:
    history(attempt.claim(tmp_path, 1), 0, 1, 5).export()
    (tmp_path / "predictions.log").unlink()
    lines = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines.replace('test_accuracy_tta": null', 'test_accuracy_of_views": 0.5'))
    history(attempt.claim(tmp_path, 1), 50, 6, 7).export()
    assert_holds(tmp_path, 7)
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["test_accuracy_tta"] for line in lines.splitlines()] == [0.5] * 5 + [None] * 2
    assert_exported(tmp_path, 7)


def test_an_attempt_that_was_frozen_adds_nothing_to_its_successors_files(tmp_path: Path) -> None:
    older = history(attempt.claim(tmp_path, 1), 0, 1, 3)
    newer = history(attempt.claim(tmp_path, 1), 30, 4, 4)
    with pytest.raises(UserError, match="was taken over by attempt 2"):
        older.record(metrics(4), probabilities(9))
    assert_holds(tmp_path, 4)
    newer.record(metrics(5), probabilities(5))
    newer.export()
    assert_holds(tmp_path, 5)
    assert_exported(tmp_path, 5)


def test_an_epoch_of_which_no_step_was_timed_has_no_speed() -> None:
    said: list[str] = []
    tracker: Any = SimpleNamespace(say=said.append, recipe=Recipe())
    for speed in (400.0, 0.0):  # 0 where an attempt resumes at an epoch's end
        Tracker.say_epoch(tracker, dataclasses.replace(metrics(1), images_per_second=speed, seconds=7))
    assert [line.rpartition("%  ")[2] for line in said] == ["400 images/s  7 s", "7 s"]

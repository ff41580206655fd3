"""Only the newest attempt at a run writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Disk

from cifar import attempt
from cifar.errors import UserError


def test_the_newer_attempt_writes_and_the_older_one_ends_with_a_line(tmp_path: Path) -> None:
    older = attempt.claim(tmp_path, 1)
    older.replace(tmp_path / "status.json", "older")
    newer = attempt.claim(tmp_path, 2)
    assert (older.number, newer.number) == (1, 2)
    with pytest.raises(UserError) as error:
        older.replace(tmp_path / "status.json", "older again")
    assert str(error.value) == (
        f"{tmp_path} was taken over by attempt 2 (process {os.getpid()} on {os.uname().nodename}); "
        "this one, attempt 1, ends and has written nothing since"
    )
    newer.replace(tmp_path / "status.json", "newer")
    assert (tmp_path / "status.json").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts", "status.json"]


def test_an_attempt_that_was_frozen_before_its_rename_renames_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = attempt.claim(tmp_path, 1)
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "step-0000005"
    older.temporary(path).mkdir()
    (older.temporary(path) / "model.safetensors").write_bytes(b"stale")
    looks = iter([older.check, older.check])

    def look_then_freeze() -> None:
        next(looks)()
        if not (tmp_path / "attempts" / "0002.json").exists():
            attempt.claim(tmp_path, 1)  # between the look and the rename

    monkeypatch.setattr(older, "check", look_then_freeze)
    with pytest.raises(UserError, match="was taken over by attempt 2"):
        older.commit(path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_new_attempt_leaves_alone_what_newer_ones_are_writing(tmp_path: Path) -> None:
    for _ in range(3):
        current = attempt.claim(tmp_path, 1)
    mine = current.temporary(tmp_path / "status.json")
    mine.write_text("half")
    (tmp_path / "attempts" / "0003.json").rename(tmp_path / "attempts" / "0001.json")
    (tmp_path / "attempts" / "0002.json").unlink()
    assert attempt.claim(tmp_path, 1).number == 2  # as if it had been slow to get from its number to the clearing
    assert mine.exists()


def test_an_attempt_whose_run_was_deleted_and_begun_anew_writes_no_more(tmp_path: Path) -> None:
    older = attempt.claim(tmp_path, 1)
    shutil.rmtree(tmp_path / "attempts")
    with pytest.raises(UserError, match="was deleted or replaced"):
        older.replace(tmp_path / "status.json", "older")
    newer = attempt.claim(tmp_path, 1)
    assert (older.number, newer.number) == (1, 1)
    assert older.temporary(tmp_path / "status.json") != newer.temporary(tmp_path / "status.json")
    newer.replace(tmp_path / "status.json", "newer")
    with pytest.raises(UserError, match="was deleted or replaced"):
        older.replace(tmp_path / "status.json", "older")
    assert attempt.claim_after(tmp_path, 1, older.token) is None
    assert attempt.claim_after(tmp_path, 1, newer.token) is not None
    assert (tmp_path / "status.json").read_text() == "newer"


def test_attempts_that_begin_in_the_same_moment_get_numbers_of_their_own(tmp_path: Path) -> None:
    script = "import sys, pathlib; from cifar import attempt; print(attempt.claim(pathlib.Path(sys.argv[1]), 1).number)"
    claims = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    assert sorted(int(claim.communicate()[0]) for claim in claims) == list(range(1, 9))


def test_an_attempt_says_who_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    attempt.claim(tmp_path, 8)
    metadata = json.loads((tmp_path / "attempts" / "0001.json").read_text())
    assert {key: metadata[key] for key in ("pid", "job", "requeues", "restarts_in_place", "world_size")} == {
        "pid": os.getpid(), "job": "17", "requeues": 2, "restarts_in_place": 0, "world_size": 8,
    }  # fmt: skip
    assert attempt.described(tmp_path, 1).endswith(", Slurm job 17)")


def test_a_machine_that_does_not_see_the_attempt_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number = attempt.claim(tmp_path / "theirs", 2).number
    attempt.wait_until_visible(tmp_path / "theirs", number)
    monkeypatch.setattr(attempt, "VISIBLE_SECONDS", 0)
    with pytest.raises(
        UserError, match=r"does not see .*/ours/attempts/0001.json, which rank 0 has just written; give"
    ):
        attempt.wait_until_visible(tmp_path / "ours", number)


def test_a_file_for_which_the_disk_has_no_room_stays_as_it_was(disk: Disk) -> None:
    disk.remount("size=100k")
    writer = attempt.claim(disk.path, 1)
    writer.replace(disk.path / "model", b"before")
    with pytest.raises(OSError, match="No space left"):  # a part of it would fit
        writer.replace(disk.path / "model", bytes(300_000))
    assert (disk.path / "model").read_bytes() == b"before"
    assert sorted(path.name for path in disk.path.iterdir()) == ["attempts", "model"]

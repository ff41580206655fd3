"""Files that are replaced whole, by any number of writers."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from cifar import files

WRITE = """
import sys
from pathlib import Path
from cifar import files
for number in range(200):
    files.replace(Path(sys.argv[1]), sys.argv[2] * 1000)
"""


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, path, letter], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for letter in "ab"
    ]
    for writer in writers:
        assert (writer.communicate(timeout=900)[1], writer.returncode) == ("", 0)
    assert path.read_text() in {"a" * 1000, "b" * 1000}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_permissions_of_any_new_one(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        files.replace(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # no file can take its place
    with pytest.raises(IsADirectoryError):
        files.replace(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]

"""The image cache: what may happen to it between two runs, and who else uses it."""

import os
import pwd
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Disk

from cifar.data import cache, sources
from cifar.data.cache import Data, open_data
from cifar.errors import UserError

CONTENT = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy", "files.json", "meta.json",
           "checksums.json")  # fmt: skip


@pytest.fixture
def opened(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """A cache of its own, which must survive what is done to it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_data(str(shapes))


def is_whole(data: Data, like: Data) -> bool:
    return all(
        np.array_equal(getattr(data, name), getattr(like, name))
        for name in ("train_images", "train_labels", "test_images", "test_labels", "classes", "mean", "std")
    ) and data.files("test") == like.files("test")  # fmt: skip


def deleted(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def extended(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def zeroed(path: Path) -> None:
    """In its second half, where a header is not."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


def changed_by_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("spoil", [deleted, emptied, cut_short, extended, zeroed, changed_by_one_bit])
def test_a_broken_cache_is_made_anew_with_one_line(
    spoil: Callable[[Path], None], name: str, opened: Data, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = [np.array(array) for array in (opened.train_images, opened.test_labels)]
    spoil(opened.path / name)
    capsys.readouterr()
    again = open_data(str(shapes))
    said = capsys.readouterr().out
    assert said.startswith(f"image cache {opened.path}: {name} ")
    assert said.endswith("; rebuilding it\n")
    assert said.count("\n") == 1
    assert is_whole(again, open_data(str(shapes)))
    assert again.fingerprint == opened.fingerprint
    assert np.array_equal(again.train_images, copies[0])
    assert np.array_equal(again.test_labels, copies[1])
    open_data(str(shapes))
    assert capsys.readouterr().out == ""
    assert [path.name for path in opened.path.parent.iterdir()] == [opened.path.name]


def test_a_process_that_maps_a_cache_which_is_made_anew_keeps_what_it_maps(opened: Data, shapes: Path) -> None:
    before = np.array(opened.train_images)
    (opened.path / "test_labels.npy").unlink()
    assert open_data(str(shapes)).train_images is not opened.train_images
    assert np.array_equal(opened.train_images, before)


@pytest.mark.parametrize("is_folder", [True, False])
def test_whatever_stands_in_a_caches_place_is_replaced(is_folder: bool, opened: Data, shapes: Path) -> None:
    shutil.rmtree(opened.path)
    if is_folder:
        opened.path.mkdir()
    else:
        opened.path.write_bytes(b"x")
    assert open_data(str(shapes)).fingerprint == opened.fingerprint
    assert [path.name for path in opened.path.parent.iterdir()] == [opened.path.name]


def test_a_cache_of_an_earlier_version_is_made_anew(
    opened: Data, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (opened.path / "checksums.json").unlink()
    assert open_data(str(shapes)).fingerprint == opened.fingerprint
    assert "checksums.json is missing (earlier versions wrote none); rebuilding it" in capsys.readouterr().out


def fingerprint(data: str) -> str:
    return open_data(data).fingerprint


def test_jobs_that_find_a_broken_cache_side_by_side_all_get_a_whole_one(opened: Data, shapes: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        for _ in range(5):
            zeroed(opened.path / "train_images.npy")
            assert set(pool.map(fingerprint, [str(shapes)] * 8)) == {opened.fingerprint}
            assert [path.name for path in opened.path.parent.iterdir()] == [opened.path.name]


def test_a_cache_that_is_moved_aside_as_soon_as_it_is_whole_is_no_error(
    opened: Data, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job, which has seen the broken one, takes this one for it, and a moment later has a whole one."""
    rename, aside = Path.rename, tmp_path / "aside"

    def renamed(path: Path, target: Path) -> None:
        rename(path, target)
        if target == opened.path:
            rename(target, aside)

    zeroed(opened.path / "train_images.npy")
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(cache.time, "sleep", lambda _: rename(aside, opened.path))
    assert open_data(str(shapes)).fingerprint == opened.fingerprint


def test_content_is_compared_once_and_by_one_process_of_a_machine(
    opened: Data, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    compare = cache._crc32

    def noted(path: Path) -> int:
        read.append(path.name)
        return compare(path)

    monkeypatch.setattr(cache, "_crc32", noted)
    monkeypatch.setattr(cache, "_verified", set())
    monkeypatch.setenv("LOCAL_RANK", "1")
    open_data(str(shapes))
    assert read == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    open_data(str(shapes))
    open_data(str(shapes))
    assert sorted(read) == sorted(set(CONTENT) - {"checksums.json"})
    monkeypatch.setenv("LOCAL_RANK", "1")  # sizes are compared by all
    cut_short(opened.path / "train_images.npy")
    assert is_whole(open_data(str(shapes)), open_data(str(shapes)))


def test_what_the_cache_holds_is_on_the_disk_before_it_has_its_name(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file and the folder are synced, then comes the rename, then the folder around is synced."""
    events: list[tuple[str, str]] = []
    sync, rename = os.fsync, os.rename

    def noted_sync(descriptor: int) -> None:
        events.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append(("rename", str(source)))

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = open_data(str(shapes)).path
    (temporary,) = [source for event, source in events if event == "rename"]
    place = events.index(("rename", temporary))
    assert {synced for _, synced in events[: place - 1]} >= {f"{temporary}/{name}" for name in CONTENT}
    assert events[place - 1] == ("sync", temporary)
    assert events[place + 1 :] == [("sync", str(path.parent))]


# ---- folders and users

NOBODY = 65534
TELL = """
import os, sys, tempfile
from cifar.data.cache import open_data
from cifar.errors import UserError
asked = os.environ.pop("XDG_CACHE_HOME", "")
with tempfile.TemporaryDirectory(dir="/tmp") as own:  # imports all: Python may lie where only root may read
    os.environ["XDG_CACHE_HOME"] = own
    open_data(sys.argv[1])
os.environ["XDG_CACHE_HOME"] = asked
os.setgroups([]), os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[2])), os.umask(int(sys.argv[3], 8))
try:
    print(open_data(sys.argv[1]).path)
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def everybodys(shapes: Path) -> Iterator[Path]:
    """A folder outside of pytest's private one, which holds the images, for users of all kinds."""
    if os.geteuid() != 0:
        pytest.skip("only root can be several users")
    path = Path(f"/tmp/cifar-test-{uuid.uuid4().hex}")
    path.mkdir(mode=0o755)
    shutil.copytree(shapes, path / "shapes")
    yield path
    shutil.rmtree(path)


def as_user(user: int, data: Path, umask: str = "022", **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    return subprocess.run(
        [sys.executable, "-c", TELL, data, str(user), umask],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_two_users_share_a_folder_that_both_may_write_to(everybodys: Path) -> None:
    shared = everybodys / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    first = as_user(NOBODY, everybodys / "shapes", XDG_CACHE_HOME=str(shared))
    second = as_user(NOBODY - 1, everybodys / "shapes", XDG_CACHE_HOME=str(shared))
    assert first.returncode == 0, first.stderr
    assert (second.returncode, second.stdout) == (0, first.stdout), second.stderr
    (everybodys / "shapes" / "test" / "disc" / "00.png").touch()  # so that it is another set of images
    other = as_user(NOBODY - 1, everybodys / "shapes", XDG_CACHE_HOME=str(shared))
    assert other.returncode == 0, other.stderr
    assert Path(other.stdout.strip()).stat().st_uid == NOBODY - 1


def test_a_cache_that_its_owner_keeps_private_is_one_line_for_others(everybodys: Path) -> None:
    shared = everybodys / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    assert as_user(NOBODY, everybodys / "shapes", "077", XDG_CACHE_HOME=str(shared)).returncode == 0
    second = as_user(NOBODY - 1, everybodys / "shapes", XDG_CACHE_HOME=str(shared))
    assert second.returncode == 1
    assert "no permission to read the image cache; change its permissions, or set XDG_CACHE_HOME" in second.stderr
    assert second.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", [0o700, 0o555])
def test_a_cache_folder_of_somebody_else_is_one_line(mode: int, everybodys: Path) -> None:
    shared = everybodys / "shared"
    shared.mkdir()
    shared.chmod(mode)
    done = as_user(NOBODY, everybodys / "shapes", XDG_CACHE_HOME=str(shared))
    assert done.returncode == 1
    assert "or set XDG_CACHE_HOME to a folder of your own" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_cache_in_a_folder_that_may_only_be_read_is_used(everybodys: Path) -> None:
    shared = everybodys / "shared"
    shared.mkdir()
    made = as_user(0, everybodys / "shapes", XDG_CACHE_HOME=str(shared))
    used = as_user(NOBODY, everybodys / "shapes", XDG_CACHE_HOME=str(shared))
    assert (used.returncode, used.stdout) == (0, made.stdout), used.stderr


def nameless() -> int:
    """A user id that no passwd entry has."""
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return next(user for user in range(47_000, 60_000) if user not in taken)


def test_a_user_without_a_name_and_a_home_has_a_private_cache_in_the_temporary_folder(everybodys: Path) -> None:
    temporary, user = everybodys / "tmp", nameless()
    temporary.mkdir()
    temporary.chmod(0o1777)
    done = as_user(user, everybodys / "shapes", TMPDIR=str(temporary))
    assert done.returncode == 0, done.stderr
    folder = temporary / f"cifar-{user}"
    assert done.stdout.startswith(f"{folder}/")
    assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (user, 0o700)
    assert as_user(user, everybodys / "shapes", TMPDIR=str(temporary)).stdout == done.stdout


@pytest.mark.parametrize("trap", ["another user's folder", "a link"])
def test_a_trap_in_the_temporary_folder_is_not_stepped_into(trap: str, everybodys: Path) -> None:
    temporary, user = everybodys / "tmp", nameless()
    temporary.mkdir()
    temporary.chmod(0o1777)
    path = temporary / f"cifar-{user}"
    if trap == "a link":
        (everybodys / "elsewhere").mkdir()
        os.chown(everybodys / "elsewhere", user, user)
        path.symlink_to(everybodys / "elsewhere")
    else:
        path.mkdir()
        path.chmod(0o777)
    done = as_user(user, everybodys / "shapes", TMPDIR=str(temporary))
    assert done.returncode == 1
    assert "can be written by others; set XDG_CACHE_HOME to a folder of your own" in done.stderr


def test_a_full_disk_is_one_line_and_keeps_nothing(shapes: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.remount("size=100k")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk.path))
    with pytest.raises(UserError, match=r"the image cache cannot be written \(.+\); make room") as error:
        open_data(str(shapes))
    assert "None" not in str(error.value)
    assert list((disk.path / "cifar").iterdir()) == []
    disk.remount("size=10m")
    assert len(open_data(str(shapes)).train_labels) == 64


def test_what_a_killed_process_left_is_removed_after_a_day(opened: Data, shapes: Path) -> None:
    folder = opened.path.parent
    for name, age in ((".old", sources.ABANDONED_SECONDS + 60), (".young", 0)):
        (folder / name).mkdir()
        (folder / name / "train_images.npy").write_bytes(b"x")
        os.utime(folder / name, (time.time() - age,) * 2)
    (opened.path / "meta.json").unlink()
    open_data(str(shapes))
    assert sorted(path.name for path in folder.iterdir()) == [".young", opened.path.name]


def test_a_cache_that_vanishes_before_it_is_mapped_is_one_line(opened: Data) -> None:
    shutil.rmtree(opened.path)
    with pytest.raises(UserError, match="was removed or damaged just now"):
        cache.open_cache(opened.path)


def test_the_cache_is_below_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "cifar"

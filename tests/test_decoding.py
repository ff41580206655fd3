"""Images decoded by several processes: the same as by one, whatever happens to them."""

import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import Disk
from PIL import Image

from cifar import cores
from cifar.data import decoding
from cifar.data.cache import Data, open_data
from cifar.errors import LostError, UserError

COUNT = 60  # training images


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few images are worth several processes."""
    monkeypatch.setattr(decoding, "PART", 7)
    monkeypatch.setattr(decoding, "WORTH_A_PROCESS", 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", COUNT), ("test", 6)):
        for number in range(count):
            path = tmp_path / "data" / split / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(path)
    return tmp_path / "data"


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = b"of some use"
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
    return path


def behind_a_program(folder: Path) -> Path:
    """A zip that unpacks itself: its entries do not lie where they say."""
    path = zipped(folder)
    path.write_bytes(b"#!/bin/sh\nexec unzip $0\n" + path.read_bytes())
    return path


def tarred(folder: Path) -> Path:
    path = folder.with_suffix(".tar.gz")
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, ".")
    return path


def opened_by(processes: int, path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    """The data, decoded into a cache of its own, with a look at how many processes have been at work."""
    started: list[int] = []

    class Noted(decoding._Process):
        def __init__(self) -> None:
            super().__init__()
            started.append(self.process.pid)

    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / f"cache-{processes}"))
    monkeypatch.setattr(cores, "of_job", lambda: processes)
    monkeypatch.setattr(decoding, "_Process", Noted)
    data = open_data(str(path))
    assert len(started) == (processes if processes > 1 else 0)
    assert not any(psutil.pid_exists(process) for process in started)
    return data


@pytest.mark.parametrize("packed", [lambda folder: folder, zipped, behind_a_program, tarred])
def test_the_images_are_the_same_whoever_decodes_them(
    packed: Callable[[Path], Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packed(folder)
    alone, shared = (opened_by(processes, path, tmp_path, monkeypatch) for processes in (1, 3))
    assert alone.fingerprint == shared.fingerprint
    for name in ("train_images.npy", "test_images.npy", "files.json", "meta.json", "checksums.json"):
        assert (alone.path / name).read_bytes() == (shared.path / name).read_bytes()
    for split, images in (("train", shared.train_images), ("test", shared.test_images)):
        for image, name in zip(images, shared.files(split), strict=True):
            with Image.open(folder / name) as original:
                assert np.array_equal(np.asarray(original), image)


def test_of_several_wrong_files_the_first_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("test/a/00.png", "train/b/59.png", "train/a/30.png", "train/a/32.png"):
        (folder / name).write_bytes(b"broken")
    for processes in (1, 3):
        with pytest.raises(UserError, match=r"train/a/30.png is not an image"):
            opened_by(processes, folder, tmp_path, monkeypatch)
        assert list((tmp_path / f"cache-{processes}" / "cifar").iterdir()) == []


@pytest.mark.parametrize("processes", [1, 3])
def test_a_disk_that_becomes_full_is_one_line(
    processes: int, folder: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.remount("size=100k")
    with pytest.raises(UserError, match=r"the image cache cannot be written \(No space left on device\); make room"):
        opened_by(processes, folder, disk.path, monkeypatch)
    assert list((disk.path / f"cache-{processes}" / "cifar").iterdir()) == []


def test_without_processes_images_are_decoded_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = opened_by(1, folder, tmp_path, monkeypatch).fingerprint
    monkeypatch.setattr(cores, "of_job", lambda: 3)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert open_data(str(folder)).fingerprint == expected


class Deadly(decoding.InFolder):
    """Ends the process that reads the file called so."""

    @contextmanager
    def opened(self) -> Iterator[decoding.Read]:
        def read(name: str) -> bytes:
            if name == "train/a/30.png":
                os.kill(os.getpid(), signal.SIGKILL)
            return (self.root / name).read_bytes()

        yield read


def test_a_process_that_is_killed_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "of_job", lambda: 2)
    names = [f"train/a/{number:02d}.png" for number in range(0, COUNT, 2)]
    with pytest.raises(LostError) as error:
        decoding.decode_all(decoding.parts("it", Deadly(folder), names, tmp_path / "images.npy"))
    assert str(error.value) == (
        "it: the process that decoded train/a/28.png to train/a/40.png was ended by SIGKILL, most likely out of "
        "memory: request more for the job; start the same command again"
    )


def test_many_files_are_asked_for_at_once_where_a_disk_is_slow(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = opened_by(1, folder, tmp_path, monkeypatch).fingerprint
    monkeypatch.setattr(decoding, "PART", COUNT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    read, asked, most, lock = Path.read_bytes, 0, 0, threading.Lock()

    def slowly(path: Path) -> bytes:
        nonlocal asked, most
        if path.suffix != ".png":
            return read(path)
        with lock:
            asked += 1
            most = max(most, asked)
        time.sleep(0.05)
        with lock:
            asked -= 1
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", slowly)
    assert open_data(str(folder)).fingerprint == expected
    assert most == decoding.AT_ONCE


# ---- being asked to stop


class Hanging(decoding.InFolder):
    """A disk that never answers, after a note of who asked."""

    @contextmanager
    def opened(self) -> Iterator[decoding.Read]:
        def read(name: str) -> bytes:
            (self.root / str(os.getpid())).touch()
            time.sleep(600)
            return b""

        yield read


PROGRAM = """
import sys
from pathlib import Path
from cifar import cores, stop
stop.catch()
from cifar.data import decoding
from cifar.errors import UserError
from test_decoding import Hanging
cores.of_job = lambda: 2
root = Path(sys.argv[1])
root.mkdir()
try:
    decoding.decode_all(decoding.parts("it", Hanging(root), [str(n) for n in range(5000)], root / "images.npy"))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", list[psutil.Process]]]:
    """A program that decodes, and the two processes that help it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, tmp_path / "root"], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    found: list[psutil.Process] = []
    while len(found) < 2 and program.poll() is None:
        found = [psutil.Process(int(path.name)) for path in (tmp_path / "root").glob("[0-9]*")]
        time.sleep(0.1)
    assert len(found) == 2
    yield program, found
    program.kill()
    program.communicate()


def test_ctrl_c_reaches_all_processes_and_is_one_line(
    hanging: tuple["subprocess.Popen[str]", list[psutil.Process]],
) -> None:
    program, helpers = hanging
    os.killpg(program.pid, signal.SIGINT)
    *progress, line = program.communicate(timeout=60)[1].splitlines()
    assert line == "SIGINT received while decoding the images; no images were kept"
    assert all(said.startswith("decoding the images: ") for said in progress)
    assert program.returncode == 1
    assert psutil.wait_procs(helpers, timeout=30)[1] == []


def test_no_process_outlives_the_one_that_it_helps(
    hanging: tuple["subprocess.Popen[str]", list[psutil.Process]],
) -> None:
    program, helpers = hanging
    program.kill()
    assert psutil.wait_procs(helpers, timeout=30)[1] == []


def test_a_disk_that_never_answers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PART_SECONDS", 3)
    monkeypatch.setattr(cores, "of_job", lambda: 2)
    names = [str(number) for number in range(COUNT)]
    before = {*psutil.Process().children()}  # dataloader workers of other tests may be ending
    with pytest.raises(UserError, match="reading 7 files of it takes more than 3 s; look at the disk or network"):
        decoding.decode_all(decoding.parts("it", Hanging(tmp_path), names, tmp_path / "images.npy"))
    assert not {*psutil.Process().children()} - before

"""What is said while one waits, and to whom."""

import fcntl
import http.server
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar.data import decoding, waiting
from cifar.data.cache import open_data
from cifar.data.waiting import ProgressBar


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "QUIET_SECONDS", 0)


@pytest.fixture
def own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_nothing_is_said_of_what_does_not_take_long(
    own_cache_folder: None, shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_data(str(shapes))
    assert capsys.readouterr() == ("", "")


def test_lines_say_how_far_decoding_has_come(
    at_once: None, own_cache_folder: None, shapes: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(waiting, "LINE_EVERY", 0)
    monkeypatch.setattr(decoding, "PART", 60)
    open_data(str(shapes))
    said = capsys.readouterr()
    assert said.out == ""
    for line in (
        "looking through the images: 0 files",
        "decoding the images: 60 of 86 images",
        "decoding the images: 64 of 86 images",
    ):
        assert line in said.err.splitlines()


def test_lines_come_now_and_then(at_once: None, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("reading", "B", 5_000_000) as progress:
        for progress.done in range(0, 5_000_000, 1000):
            progress.look()
    assert capsys.readouterr().err == "reading: 0.0 of 5.0 MB\n"


def test_one_process_of_a_machine_prints(
    at_once: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with ProgressBar("reading", "images") as progress:
        progress.look()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("columns", "total", "shown"),
    [
        (100, 100, "decoding the images:  40%|"),
        (100, None, "decoding the images: 40 images ["),
        (0, 100, "decoding the images: 40 of 100 images\r\n"),
    ],
)
def test_a_terminal_that_is_wide_enough_has_a_bar(
    columns: int, total: int | None, shown: str, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:  # noqa: PTH123
        patch.setattr(sys, "stderr", terminal)
        with ProgressBar("decoding the images", "images", total) as progress:
            progress.done = 40
            progress.look()
        said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert said.lstrip("\r").startswith(shown)


@pytest.fixture
def slow_server() -> Iterator[str]:
    """Serves 30 bytes, one every 0.2 s."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "30")
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b"x")
                time.sleep(0.2)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


MD5_OF_30 = "4495c1948d806f6dd8cbd8e15f7e254a"
DOWNLOAD = f"""
import sys
from pathlib import Path
from cifar import failure
failure.SETUP_SECONDS = 2  # in which nothing moves
failure.start()
from cifar.data import sources
sources.download(sys.argv[1], Path(sys.argv[2]), {MD5_OF_30!r})
"""


def test_a_download_that_moves_is_no_hang_however_long_it_takes(slow_server: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, slow_server, tmp_path / "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x").read_bytes() == b"x" * 30
    assert all(line.startswith(f"downloading {slow_server}: 0.0 of 0.0 MB") for line in done.stderr.splitlines())

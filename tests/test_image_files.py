"""Images in folders, zips and tar archives: whatever names, files and programs that pack them can come up with."""

import errno
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, PngImagePlugin

from cifar.data import decoding, image_files, official, pictures
from cifar.data.cache import open_data
from cifar.errors import UserError


def png(value: int = 0) -> bytes:
    return encoded(Image.new("RGB", (32, 32), (value, 0, 0)))


def encoded(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


# Two classes with an image each in either split, told apart by their red.
PLAIN = {f"{split}/{name}/0.png": png(value) for value, (split, name) in
         enumerate([("test", "a"), ("test", "b"), ("train", "a"), ("train", "b")])}  # fmt: skip


def as_folder(root: Path, content: dict[str, bytes]) -> Path:
    for name, file in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)
    return root


def as_zip(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in content.items():
            archive.writestr(zipfile.ZipInfo(name), file)
    return path


def as_tar(path: Path, content: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, file in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(file)
            archive.addfile(entry, io.BytesIO(file))
    return path


def reds(path: Path) -> list[int]:
    """The red of each test image, then of each training image, after a look at the classes."""
    data = open_data(str(path))
    assert data.classes == ["a", "b"]
    return [*data.test_images[:, 0, 0, 0].tolist(), *data.train_images[:, 0, 0, 0].tolist()]


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_data(str(path))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---- what is skipped


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_hidden_folders_and_what_lies_beside_the_splits_are_skipped_and_said(
    make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junk = {
        "train/.ipynb_checkpoints/0-checkpoint.png": png(),
        "test/.ipynb_checkpoints/0-checkpoint.png": png(),
        "train/a/.ipynb_checkpoints/0-checkpoint.png": png(),
        ".git/train/a/0.png": png(),
        "__MACOSX/train/a/._0.png": b"x",
        "readme.txt": b"x",
        "val/a/0.png": png(),
        "large.bin": bytes(2 << 20),
    }
    path = make(tmp_path / "data", {**junk, **PLAIN})
    assert reds(path) == [0, 1, 2, 3]
    hidden, outside = ".git, __MACOSX, test/.ipynb_checkpoints, ...", "large.bin, readme.txt, val/a/0.png"
    said = f"{path}: skipped 5 hidden ({hidden}), 3 outside train/ and test/ ({outside})\n"
    assert capsys.readouterr().out == said
    open_data(str(path))
    assert capsys.readouterr().out == ""


JUNK = ["Thumbs.db", "ehthumbs.db", "desktop.ini", "labels.txt", "a.CSV", "box.json", "box.xml", "README", "index.html"]


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_files_that_are_no_images_by_their_names_are_skipped_and_said(
    make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junk = {f"photos/train/a/{name}": bytes(2 << 20) for name in JUNK}
    beside = {"notes/train/x/about.txt": b"x", "photos/test/about.md": b"x", "photos/train/a/.DS_Store": b"x"}
    alone = {"photos/train/texts/0.txt": b"x"}
    path = make(tmp_path / "data", {**junk, **beside, **alone, **{f"photos/{name}": PLAIN[name] for name in PLAIN}})
    assert reds(path) == [0, 1, 2, 3]
    some = "photos/test/about.md, photos/train/a/README, photos/train/a/Thumbs.db, ..."
    folders = ", 1 class folders without images (photos/train/texts)" if make is as_folder else ""
    said = f"1 hidden (photos/train/a/.DS_Store), 11 files that are not images ({some})"
    outside = "1 outside photos/train/ and photos/test/ (notes/train/x/about.txt)"
    assert capsys.readouterr().out == f"{path}: skipped {said}, {outside}{folders}\n"


@pytest.mark.parametrize("name", ["0.jpg", "0", "0.heic", "0.svg", "0.zip", "notes.txt.png"])
def test_a_file_that_may_have_been_an_image_is_named(name: str, tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x.zip", {**PLAIN, f"train/a/{name}": b"broken"})
    assert f"train/a/{name} is not an image" in refused(path)


def test_texts_alone_are_no_images(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x.zip", {name.replace(".png", ".txt"): PLAIN[name] for name in PLAIN})
    assert "holds no images" in refused(path)


def test_class_folders_without_images_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    (root / "train" / "empty").mkdir()
    assert reds(root) == [0, 1, 2, 3]
    assert "skipped 1 class folders without images (train/empty)" in capsys.readouterr().out


# ---- names


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_a_folder_around_train_and_test_is_accepted(
    make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "data", {"readme.txt": b"x", **{f"photos/mine/{name}": PLAIN[name] for name in PLAIN}})
    assert reds(path) == [0, 1, 2, 3]
    assert open_data(str(path)).files("train") == ["photos/mine/train/a/0.png", "photos/mine/train/b/0.png"]
    assert "1 outside photos/mine/train/ and photos/mine/test/ (readme.txt)" in capsys.readouterr().out


@pytest.mark.parametrize("called", ["validation", "val"])
@pytest.mark.parametrize("around", ["", "photos/"])
def test_validation_images_are_tested_on_where_there_are_no_others(
    called: str, around: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {around + name.replace("test/", f"{called}/"): content for name, content in PLAIN.items()}
    path = as_zip(tmp_path / "x.zip", files)
    assert open_data(str(path)).files("test") == [f"{around}{called}/a/0.png", f"{around}{called}/b/0.png"]
    assert capsys.readouterr().out == f"{path}: {around}{called}/ holds the test images\n"


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_other_files_may_be_called_as_splits_and_official_files_are(
    make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    files = {name.replace("test/", "val/"): content for name, content in PLAIN.items()}
    beside = {"test": b"x", "meta": b"x", "notes/train": b"x", "notes/test": b"x", "notes/meta": b"x"}
    assert open_data(str(make(tmp_path / "data", files | beside))).files("test") == ["val/a/0.png", "val/b/0.png"]


def test_two_folders_around_train_and_test_are_named(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x.zip", {f"{around}/{name}": PLAIN[name] for around in "vw" for name in PLAIN})
    assert "has images under v/, w/, each with train/ or test/; give one of them" in refused(path)


@pytest.mark.parametrize("make", [as_zip, as_tar])
def test_dots_and_doubled_separators_in_an_archive_are_no_part_of_a_name(
    make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    content = {"./": b"", "./train/": b"", **{f".//{name}": PLAIN[name] for name in PLAIN}}
    if make is as_tar:
        content = {name: file for name, file in content.items() if file}
    path = make(tmp_path / "data", content)
    assert reds(path) == [0, 1, 2, 3]
    assert open_data(str(path)).files("test") == ["test/a/0.png", "test/b/0.png"]


def test_backslashes_in_a_zip_separate_folders(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x.zip", {"train\\": b"", **{name.replace("/", "\\"): PLAIN[name] for name in PLAIN}})
    assert reds(path) == [0, 1, 2, 3]
    evil = as_zip(tmp_path / "y.zip", {**PLAIN, "train\\..\\..\\0.png": png()})
    assert "leaves the archive" in refused(evil)


def zip_with_raw_names(path: Path, encoding: str, system: int, *, unicode_path: bool = False) -> Path:
    """As programs write it that know nothing of the mark for UTF-8: class a is called '猫' in some encoding."""

    class Entry(zipfile.ZipInfo):
        def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802
            return self.filename.encode(encoding), self.flag_bits & ~0x800

    with zipfile.ZipFile(path, "w") as archive:
        for name, file in PLAIN.items():
            entry = Entry(name.replace("/a/", "/猫/"))
            entry.create_system = system
            if unicode_path:
                raw, text = entry.filename.encode(encoding), entry.filename.encode()
                entry.extra = struct.pack("<HHBL", 0x7075, 5 + len(text), 1, zlib.crc32(raw)) + text
            archive.writestr(entry, file)
    return path


DOS, UNIX = 0, 3


@pytest.mark.parametrize(
    ("encoding", "system", "unicode_path"), [("utf-8", UNIX, False), ("gbk", DOS, True), ("shift-jis", DOS, True)]
)
def test_names_of_a_zip_are_read_as_it_declares_them(
    encoding: str, system: int, unicode_path: bool, tmp_path: Path
) -> None:
    path = zip_with_raw_names(tmp_path / "x.zip", encoding, system, unicode_path=unicode_path)
    assert open_data(str(path)).classes == ["b", "猫"]


@pytest.mark.parametrize(("encoding", "system"), [("gbk", DOS), ("shift-jis", DOS), ("shift-jis", UNIX)])
def test_names_of_a_zip_in_an_undeclared_encoding_are_refused(encoding: str, system: int, tmp_path: Path) -> None:
    line = refused(zip_with_raw_names(tmp_path / "x.zip", encoding, system))
    assert "in an encoding that the zip does not declare; create the zip again with names in UTF-8" in line


def test_accents_that_are_taken_apart_make_no_other_class(tmp_path: Path) -> None:
    """As macOS writes them: the letter, then its accent."""
    apart = unicodedata.normalize("NFD", "é")
    content = {name.replace("/a/", f"/{apart if 'train' in name else 'é'}/"): file for name, file in PLAIN.items()}
    assert open_data(str(as_zip(tmp_path / "x.zip", content))).classes == ["b", "é"]


def test_how_accents_are_stored_changes_neither_order_nor_fingerprint(tmp_path: Path) -> None:
    content = {name.replace("/a/", "/é/").replace("/b/", "/f/"): file for name, file in PLAIN.items()}
    composed, apart = (
        open_data(
            str(as_folder(tmp_path / form, {unicodedata.normalize(form, name): content[name] for name in content}))
        )
        for form in ("NFC", "NFD")
    )
    assert composed.files("train") == ["train/f/0.png", "train/é/0.png"]
    assert [unicodedata.normalize("NFC", name) for name in apart.files("train")] == composed.files("train")
    assert apart.fingerprint == composed.fingerprint


def test_classes_that_differ_in_case_are_named(tmp_path: Path) -> None:
    content = {name.replace("train/a", "train/A"): file for name, file in PLAIN.items()}
    line = refused(as_zip(tmp_path / "x.zip", content))
    assert "class 'A' has images under train/ but none under test/" in line


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"train/a/caf\xe9.png", r"'train/a/caf\udce9.png'"),
        (b"train/a/two\nlines.png", r"'train/a/two\nlines.png'"),
        (b"train/a\x1b[31m/0.png", r"'train/a\x1b[31m/0.png'"),
    ],
)
def test_names_that_no_line_can_show_are_refused(name: bytes, shown: str, tmp_path: Path) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    path = os.fsencode(root) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(png())
    assert f"{shown} has a line break, a control character or bytes that are not UTF-8 in its name" in refused(root)


def test_an_archive_with_two_entries_of_one_name_is_refused(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "x.zip", PLAIN)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("train/a/0.png", png(9))
    assert "train/a/0.png appears twice; create the zip again" in refused(path)


# ---- files that are none


def special(path: Path, kind: str) -> None:
    if kind == "dangling link":
        path.symlink_to("nowhere.png")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path is short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("dangling link", "is a symbolic link to 'nowhere.png', and that cannot be read (No such file or directory)"),
        ("link to itself", "is a symbolic link to 'x.png', and that cannot be read (Too many levels of symbolic"),
        ("pipe", "is a pipe, socket or device"),
        ("device", "is a pipe, socket or device"),
        ("socket", "is a pipe, socket or device"),
    ],
)
def test_what_is_no_file_is_named_and_never_waited_for(kind: str, wrong: str, tmp_path: Path) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    special(root / "x.png", kind)  # beside train/ and test/ it disturbs nobody
    assert reds(root) == [0, 1, 2, 3]
    special(root / "train" / "b" / "x.png", kind)
    line = refused(root)
    assert f"train/b/x.png {wrong}" in line
    assert "remove it" in line


def test_a_link_round_in_a_circle_is_named(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    for name in ("x", "y"):  # two of them, followed blindly, would be walked through for years
        (root / "train" / "a" / name).symlink_to(root)
    assert "is a symbolic link to one of its parent folders; remove it" in refused(root)


AS_NOBODY = """
import os, sys
from cifar.data.cache import open_data
from cifar.errors import UserError
os.environ["XDG_CACHE_HOME"] = ".cache/root"
open_data(".")  # imports all: Python may lie where only root may read
os.environ["XDG_CACHE_HOME"] = ".cache/nobody"
os.setuid(65534)
try:
    print(open_data(".").files("train"))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize(
    ("closed", "named"),
    [("lost+found", ""), ("backup/train/a", ""), ("train/a", "train/a/"), ("train/a/more", "train/a/more/"),
     ("train", "train/"), ("test", "test/")],
)  # fmt: skip
def test_a_folder_that_may_not_be_read_matters_within_the_splits_alone(closed: str, named: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    root = as_folder(tmp_path, PLAIN | {name.replace("test", "val"): PLAIN[name] for name in PLAIN if "test" in name})
    for folder in (closed, ".cache/root", ".cache/nobody"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / ".cache/nobody").chmod(0o777)
    (root / closed).chmod(0o700)
    root.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY], cwd=root, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if named:
        why = "cannot be read (Permission denied); change its permissions, or remove it"
        assert (done.returncode, done.stderr) == (1, f".: {named} {why}\n")
    else:
        assert (done.returncode, done.stderr) == (0, "")
        said, files = done.stdout.splitlines()[-2:]
        assert f"outside train/ and test/ ({closed}/, val/a/0.png, val/b/0.png)" in said
        assert files == "['train/a/0.png', 'train/b/0.png']"


def test_a_folder_that_cannot_be_read_is_named_where_no_images_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, opened = as_folder(tmp_path / "data", {f"photos/{name}": PLAIN[name] for name in PLAIN}), os.open

    def closed(path: str, flags: int, *rest: int) -> int:
        if path == f"{root}/photos":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", closed)
    assert "has no images under train/; photos/ cannot be read (Permission denied); change its" in refused(root)


def test_links_to_images_and_folders_are_followed(tmp_path: Path) -> None:
    there = as_folder(tmp_path / "there", PLAIN)
    root = tmp_path / "data"
    root.mkdir()
    (root / "train").symlink_to(there / "train")
    (root / "test" / "a").mkdir(parents=True)
    (root / "test" / "a" / "0.png").symlink_to(there / "test" / "a" / "0.png")
    (root / "test" / "b").symlink_to(there / "test" / "b")
    assert reds(root) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_data_that_is_neither_file_nor_folder_is_named(kind: str, tmp_path: Path) -> None:
    special(tmp_path / "x.zip", kind)
    assert "is neither a file nor a folder" in refused(tmp_path / "x.zip")


def test_a_path_that_is_too_long_is_one_line() -> None:
    assert "cannot be read (File name too long)" in refused(Path("/tmp/" + "x" * 5000))


def test_a_large_file_in_a_class_folder_is_refused_unread(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    with (root / "train" / "a" / "x.png").open("wb") as file:
        file.truncate(1 << 40)
    assert f"train/a/x.png has {1 << 40} bytes; give opaque 8-bit RGB or grey images of 32x32 pixels" in refused(root)


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    decode = image_files.decode_image

    def slow_copy(content: bytes, name: str) -> object:
        as_folder(root, {"train/a/1.png": png()})
        return decode(content, name)

    monkeypatch.setattr(image_files, "decode_image", slow_copy)
    assert "changed while it was being read; start again when it is complete" in refused(root)
    monkeypatch.undo()
    assert len(open_data(str(root)).train_labels) == 3


# ---- archives


def patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def all_methods(content: bytearray, method: int) -> None:
    for mark, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        place = content.find(mark)
        while place >= 0:
            content[place + at : place + at + 2] = struct.pack("<H", method)
            place = content.find(mark, place + 1)


DEFLATE64 = 9


@pytest.mark.parametrize("method", [DEFLATE64, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_python_lacks_or_cannot_bound_is_named(method: int, tmp_path: Path) -> None:
    path = patched(as_zip(tmp_path / "x.zip", PLAIN), lambda content: all_methods(content, method))
    assert "train/a/0.png is not compressed with Deflate; create the zip again with" in refused(path)


def test_compressed_data_that_is_none_is_named(tmp_path: Path) -> None:
    path = patched(as_zip(tmp_path / "x.zip", PLAIN), lambda content: all_methods(content, zipfile.ZIP_DEFLATED))
    assert "train/a/0.png cannot be read" in refused(path)


def test_a_zip_unpacks_no_more_than_its_entries_tell(tmp_path: Path) -> None:
    """A file of 300 MB whose entry tells 1,000 bytes: memory is what is looked at, in a process of its own."""
    flood = 300 << 20
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in PLAIN.items():
            archive.writestr(name, content)
        with archive.open("train/a/flood.png", "w") as file:
            for _ in range(300):
                file.write(bytes(1 << 20))

    def lie(content: bytearray) -> None:
        place, told = content.find(struct.pack("<L", flood)), 0
        while place >= 0:
            content[place : place + 4] = struct.pack("<L", 1000)
            place, told = content.find(struct.pack("<L", flood), place), told + 1
        assert told >= 1

    path = patched(tmp_path / "x.zip", lie)
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from cifar.data import image_files\n"
        "from cifar.data.decoding import InZip\n"
        "path = Path(sys.argv[1])\n"
        "_, entries = image_files.list_zip(path)\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "try:\n"
        "    with InZip(path, entries).opened() as read: read('train/a/flood.png')\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    error, grown = done.stdout.split()
    assert error == "BadZipFile"
    assert int(grown) < 50_000  # kB
    assert "train/a/flood.png cannot be read" in refused(path)


def test_an_encrypted_zip_is_named(tmp_path: Path) -> None:
    def encrypt(content: bytearray) -> None:
        content[content.find(b"PK\1\2") + 8] |= 1

    assert "is encrypted; make the zip without a password" in refused(
        patched(as_zip(tmp_path / "x.zip", PLAIN), encrypt)
    )


def test_a_zip_with_a_damaged_directory_is_one_line(tmp_path: Path) -> None:
    def damage(content: bytearray) -> None:
        content[content.find(b"PK\1\2") + 8 + 1] |= 8  # marks the name as UTF-8
        content[content.find(b"PK\1\2") + 46] = 0xFF  # which it is not

    assert "cannot be read as a zip" in refused(patched(as_zip(tmp_path / "x.zip", PLAIN), damage))


def test_a_zip_that_was_written_to_a_pipe_is_read(tmp_path: Path) -> None:
    """With sizes behind the data (data descriptors), and in the 64-bit format."""

    class Pipe(io.RawIOBase):
        def __init__(self, path: Path) -> None:
            self.file = path.open("wb")

        def writable(self) -> bool:
            return True

        def write(self, content: object) -> int:
            return self.file.write(content)  # type: ignore[arg-type]

    pipe = Pipe(tmp_path / "x.zip")
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in PLAIN.items():
            with archive.open(name, "w", force_zip64=True) as entry:
                entry.write(file)
    pipe.file.close()
    assert reds(tmp_path / "x.zip") == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_images_is_the_same_data_as_their_folder(mode: str, tmp_path: Path) -> None:
    tar = open_data(str(as_tar(tmp_path / "x.tar", {f"./{name}": PLAIN[name] for name in reversed(PLAIN)}, mode)))
    folder = open_data(str(as_folder(tmp_path / "data", PLAIN)))
    assert tar.fingerprint == folder.fingerprint
    assert tar.files("test") == folder.files("test")


def test_a_tar_whose_last_file_is_a_zip_is_that_tar(tmp_path: Path) -> None:
    others = as_zip(tmp_path / "others.zip", {name: png(99) for name in PLAIN}).read_bytes()
    tar = as_tar(tmp_path / "x.tar", {**PLAIN, "others.zip": others}, "w")
    assert zipfile.is_zipfile(tar)
    assert open_data(str(tar)).fingerprint == open_data(str(as_folder(tmp_path / "data", PLAIN))).fingerprint


def test_photographs_in_a_tar_are_refused_without_filling_the_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3)).astype(np.uint8)
    photograph = encoded(Image.fromarray(noise), "JPEG")
    assert len(photograph) > image_files.HELD
    content = {f"{name[:-5]}{number:03}.jpg": photograph for name in PLAIN for number in range(50)}
    path = as_tar(tmp_path / "x.tar", {**PLAIN, **content, "notes/manual.pdf": photograph}, "w")
    tracemalloc.start()
    line = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "train/a/000.jpg cannot be used: it has 400x400 pixels; give opaque 8-bit RGB or grey images" in line
    assert peak < 20 * len(photograph) < path.stat().st_size / 9


def truncated(content: bytearray) -> None:
    half = len(content) // 2
    del content[half // 512 * 512 or half :]  # between two headers, where a plain tar looks whole


def flipped(content: bytearray) -> None:
    content[content.index(b"train/a/0.png")] ^= 1  # a header, so that reading ends there


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("spoil", [truncated, flipped])
def test_a_damaged_tar_never_loses_images_without_a_word(
    spoil: Callable[[bytearray], None], mode: str, tmp_path: Path
) -> None:
    content = {f"train/{name}/{number}.png": png(number) for name in "ab" for number in range(20)}
    path = as_tar(tmp_path / "x.tar", {"test/a/0.png": png(), "test/b/0.png": png(), **content}, mode)
    if spoil is flipped and mode != "w":
        spoil = lambda content: content.__setitem__(len(content) // 2, content[len(content) // 2] ^ 1)  # noqa: E731
    assert "damaged or cut short" in refused(patched(path, spoil))


def test_a_link_in_a_tar_is_named(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    (root / "train" / "a" / "1.png").symlink_to("0.png")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(root, ".")
    line = refused(tmp_path / "x.tar.gz")
    assert "train/a/1.png is a link or device, not a file; pack with tar --dereference --hard-dereference" in line


def test_an_archive_in_a_class_folder_is_named(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    as_zip(root / "train" / "a" / "more.zip", PLAIN)
    assert "train/a/more.zip is not an image" in refused(root)


# ---- images

LOSSLESS: dict[str, tuple[str, dict[str, object]]] = {
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
}


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA"])
def test_a_file_is_read_as_what_it_holds_whatever_it_is_called(
    mode: str, kind: str, make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    image = Image.fromarray(ORIENTED)
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    format_, options = LOSSLESS[kind]
    content = encoded(image, format_, **options)
    called = ["train/a/0.jpg", "train/a/1.png", "train/a/2", "train/b/0.tif", "train/b/1.gif", "test/a/0.bmp"]
    path = make(tmp_path / "data", {**PLAIN, **dict.fromkeys(called, content)})
    data = open_data(str(path))
    expected = np.asarray(image.convert("RGB"))
    for split, images in (("train", data.train_images), ("test", data.test_images)):
        for name, pixels in zip(data.files(split), images, strict=True):
            if name in called:
                assert np.array_equal(pixels, expected), name
                called.remove(name)
    assert called == []


@pytest.mark.parametrize("format_", ["JPEG", "WEBP", "GIF", "AVIF"])
def test_a_file_that_lost_something_when_it_was_made_loses_nothing_more(format_: str, tmp_path: Path) -> None:
    content = encoded(Image.fromarray(ORIENTED), format_)
    with Image.open(io.BytesIO(content)) as stored:
        assert np.array_equal(image_files.decode_image(content, "x"), np.asarray(stored.convert("RGB")))
    assert np.array_equal(image_files.decode_image(content, "x"), pictures.read(content))


ORIENTED = np.random.default_rng(1).integers(0, 256, (32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_upright_as_their_exif_orientation_says_and_the_app_agrees(
    format_: str, orientation: int, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    content = encoded(Image.fromarray(ORIENTED), format_, exif=exif)
    with Image.open(io.BytesIO(encoded(Image.fromarray(ORIENTED), format_))) as stored:
        plain = np.asarray(stored.convert("RGB"))
    upright = {
        2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1], 5: plain.transpose(1, 0, 2),
        6: np.rot90(plain, -1), 7: plain[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(plain),
    }.get(orientation, plain)  # fmt: skip
    assert np.array_equal(image_files.decode_image(content, "x"), upright)
    (tmp_path / "x").write_bytes(content)
    assert np.array_equal(pictures.read(tmp_path / "x"), upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b""])
def test_broken_exif_is_no_reason_to_refuse_an_image(exif: bytes) -> None:
    content = encoded(Image.fromarray(ORIENTED), "JPEG", exif=exif)
    assert image_files.decode_image(content, "x").shape == (32, 32, 3)


def opaque_palette() -> bytes:
    image = Image.fromarray(ORIENTED).quantize(16)
    return encoded(image, transparency=bytes([255] * 16))


def test_a_palette_with_opaque_alpha_is_taken_without_a_warning() -> None:
    content = opaque_palette()
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(image_files.decode_image(content, "x"), np.asarray(image.convert("RGBA"))[..., :3])


def animation(format_: str) -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    return encoded(frames[0], format_, save_all=True, append_images=frames[1:])


def with_16_bits(format_: str, *options: int) -> bytes:
    """RGB, of which Pillow would take the upper 8 bits without a word."""
    done, content = cv2.imencode(format_, np.zeros((32, 32, 3), np.uint16), options)
    assert done
    return content.tobytes()


def comment_of_two_gigabytes() -> bytes:
    """A PNG with a compressed text that would unpack to much more than it has bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (70 << 20), zip=True)
    return encoded(Image.new("RGB", (32, 32)), pnginfo=info)


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        *(
            (lambda format_=format_: animation(format_), "has more than one frame")
            for format_ in ("PNG", "GIF", "WEBP", "TIFF", "AVIF")
        ),
        *((lambda format_=format_: with_16_bits(format_), "has 16 bits a channel") for format_ in (".png", ".tiff")),
        (lambda: encoded(Image.fromarray(np.zeros((32, 32), np.uint16)), "TIFF"), "has 16 bits a channel"),
        *(
            (lambda bits=bits: with_16_bits(".avif", cv2.IMWRITE_AVIF_DEPTH, bits), f"has {bits} bits a channel")
            for bits in (10, 12)
        ),
        (lambda: encoded(Image.fromarray(np.zeros((32, 32), np.float32)), "TIFF"), "has 32 bits a pixel"),
        (lambda: encoded(Image.new("RGBA", (32, 32), (9, 9, 9, 254)), "TIFF"), "is partly transparent"),
        (lambda: encoded(Image.new("RGBA", (32, 32), (9, 9, 9, 254)), "WEBP", lossless=True), "is partly transparent"),
        (lambda: encoded(Image.new("CMYK", (32, 32)), "TIFF"), "has colour mode CMYK"),
        (lambda: encoded(Image.new("1", (11_000, 11_000))), "has far too many pixels"),
        (comment_of_two_gigabytes, "is damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_that_are_more_than_an_image_are_refused(content: Callable[[], bytes], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        image_files.decode_image(content(), "x")


@pytest.mark.parametrize("end", ["zeros", "a changed byte", "missing checksum"])
def test_a_png_whose_pixels_are_damaged_is_refused(end: str) -> None:
    content = bytearray(encoded(Image.fromarray(ORIENTED), compress_level=0))
    if end == "zeros":
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    elif end == "a changed byte":
        content[-20] ^= 1
    else:
        del content[-14:]
    with pytest.raises(UserError, match=r"x is damaged \(wrong checksum of its pixels\); repair or remove it"):
        image_files.decode_image(bytes(content), "x")
    with pytest.raises(UserError, match=r"the picture is damaged \(wrong checksum of its pixels\); save it again"):
        pictures.read(bytes(content))


# ---- being asked to stop

LOOK = """
import sys
from cifar import stop
stop.catch()
from cifar.data.cache import open_data
from cifar.errors import UserError
print("ready", flush=True)
try:
    open_data(sys.argv[1])
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("count", [256, 257])
def test_as_many_classes_as_a_byte_tells(count: int, tmp_path: Path) -> None:
    image = png()
    path = as_zip(tmp_path / "x.zip", {f"{s}/{n:03}/0.png": image for s in ("train", "test") for n in range(count)})
    if count == 257:
        assert "has 257 class(es); give between 2 and 256" in refused(path)
    else:
        assert open_data(str(path)).test_labels.tolist() == list(range(256))


@pytest.mark.parametrize("make", [as_folder, as_zip, as_tar])
def test_a_stop_request_is_heard_while_images_are_decoded(
    make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path
) -> None:
    image = png()
    content = {f"{split}/{name}/{number}.png": image for split in ("test", "train") for name in "ab"
               for number in range(10_000)}  # fmt: skip
    path = make(tmp_path / "data", content)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    looking = subprocess.Popen(
        [sys.executable, "-c", LOOK, str(path)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert looking.stdout
    assert looking.stdout.readline() == "ready\n"
    looking.terminate()
    _, said = looking.communicate(timeout=60)
    assert looking.returncode == 1
    assert said.startswith("SIGTERM received while ")
    assert said.endswith("no images were kept\n")
    assert said.count("\n") == 1
    assert not list((tmp_path / "cache").rglob("*.npy"))
    assert not list((tmp_path / "cache").glob("cifar/.*"))


@pytest.mark.parametrize("silent", [True, False], ids=["no answer", "a byte now and then"])
def test_a_stop_request_is_heard_while_a_download_waits(silent: bool, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection, suppress(ConnectionError):  # the other side has ended
                connection.recv(1 << 16)
                if not silent:
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                asked.set()
                while not over.is_set():
                    if not silent:
                        connection.sendall(b"x")
                    time.sleep(0.1)

        asked, over = threading.Event(), threading.Event()
        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"
        program = LOOK.replace("open_data(sys.argv[1])", "download(sys.argv[1], Path(sys.argv[2]), '')").replace(
            "from cifar.data.cache import open_data",
            "from pathlib import Path; from cifar.data.sources import download",
        )
        loading = subprocess.Popen(
            [sys.executable, "-c", program, url, str(tmp_path / "there" / "cifar.tar.gz")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert asked.wait(60)
        loading.terminate()
        _, said = loading.communicate(timeout=30)
        over.set()
    assert loading.returncode == 1
    assert said == f"SIGTERM received while downloading {url}; no images were kept\n"
    assert list((tmp_path / "there").iterdir()) == []


def test_a_wait_for_a_disk_that_never_answers_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    read = Path.read_bytes
    monkeypatch.setattr(decoding, "PART_SECONDS", 1)
    monkeypatch.setattr(Path, "read_bytes", lambda path: time.sleep(60) if "train/b" in str(path) else read(path))
    assert "takes more than 1 s; look at the disk or network" in refused(root)


def test_two_downloads_at_once_both_end_well_and_leave_nothing_else(tmp_path: Path) -> None:
    """Also of two containers, whose processes have the same number."""
    there = tmp_path / "there"
    there.mkdir()
    abandoned = there / ".cifar.tar.gz.0123.part"
    abandoned.write_bytes(b"x")
    os.utime(abandoned, (0, 0))
    everyone = threading.Barrier(2)

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\nabc")
            everyone.wait(60)  # both have begun
            connection.sendall(b"def")

    url_md5 = "e80b5017098950fc58aad83c8c14978e"
    program = (
        "import os, sys; from pathlib import Path; from cifar.data.sources import download; os.getpid = lambda: 1; "
        f"download(sys.argv[1], Path(sys.argv[2]), '{url_md5}')"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"
        threads = [threading.Thread(target=answer, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        command = [sys.executable, "-c", program, url, str(there / "cifar.tar.gz")]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
        assert [(process.communicate(timeout=60)[0].count(b"\n"), process.returncode) for process in both] == [
            (1, 0)
        ] * 2
    assert [path.name for path in there.iterdir()] == ["cifar.tar.gz"]
    assert (there / "cifar.tar.gz").read_bytes() == b"abcdef"


def test_an_official_archive_that_is_cut_short_is_never_told_to_be_deleted(tmp_path: Path) -> None:
    path = as_tar(
        tmp_path / "cifar-10-python.tar.gz", {f"{official.OFFICIAL['cifar10'].folder}/data_batch_1": bytes(1 << 21)}
    )
    line = refused(path)
    assert "data_batch_1 is not that of the official CIFAR-10 archive" in line
    assert "delete" not in line
    patched(path, lambda content: content.__delitem__(slice(len(content) // 2, None)))
    line = refused(path)
    assert "is damaged or cut short" in line
    assert "delete" not in line


def test_a_copy_of_the_images_elsewhere_is_the_same_data(tmp_path: Path) -> None:
    root = as_folder(tmp_path / "data", PLAIN)
    shutil.copytree(root, tmp_path / "copy")
    assert open_data(str(root)).fingerprint == open_data(str(tmp_path / "copy")).fingerprint

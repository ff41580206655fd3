"""`python -m cifar.predict`: the same answers as the app and explain.py, for whatever pictures there are."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Train
from helpers.explained import assert_predicted_alike, explain
from PIL import Image

from cifar import cores, predict
from cifar.app import content
from cifar.app.engine import Engine
from cifar.data import pictures
from cifar.data.cache import open_data
from cifar.explain import runs


@pytest.fixture(scope="module")
def run(shapes: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of few steps, which is not sure of anything."""
    directory = tmp_path_factory.mktemp("predict") / "run"
    done = train("--data", shapes, "--run", directory, "--network", "whitened", "--epochs", 2, "--peak-epoch", 1,
                 "--global-batch-size", 16, "--peak-learning-rate", 1e-4)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


def predicted(
    run: Path, *arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stdin: str = ""
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line."""
    monkeypatch.setattr("sys.argv", ["cifar.predict", "--run", *map(str, (run, *arguments))])
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    monkeypatch.setattr("cifar.data.waiting.QUIET_SECONDS", 600)  # no word of how far it has come, on a slow machine
    try:
        predict.main()
    except SystemExit as end:
        return int(end.code or 0), *capsys.readouterr()
    return 0, *capsys.readouterr()


@pytest.mark.parametrize("batch", [1, 256])
def test_it_says_what_the_app_says(
    batch: int, run: Path, shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "BATCH", batch)
    status, out, err = predicted(run, "--top", 4, "--format", "json", shapes / "test", capsys=capsys,
                                 monkeypatch=monkeypatch)  # fmt: skip
    assert (status, err) == (0, "")
    engine, lines = Engine(runs.open_run(run)), [json.loads(line) for line in out.splitlines()]
    assert [line["path"] for line in lines] == [str(path) for path in sorted((shapes / "test").glob("*/*.png"))]
    for line in lines:
        answer = engine.answer(pictures.read(Path(line["path"])), None, "gradcam", [])
        assert [entry["class"] for entry in line["classes"]] == [engine.run.classes[n] for n in answer.ranking]
        expected = answer.probabilities[answer.ranking]
        assert [entry["probability"] for entry in line["classes"]] == pytest.approx(expected.tolist(), abs=5e-4)


def test_it_says_what_the_explanation_says(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    explained = tmp_path / "explained"
    done = explain("--run", run, "--output", explained, launcher=("--mixed_precision", "no"))
    assert done.returncode == 0, done.stderr
    _, out, _ = predicted(run, "--format", "csv", shapes / "test", capsys=capsys, monkeypatch=monkeypatch)
    ours = {row["path"]: row for row in csv.DictReader(io.StringIO(out))}
    assert_predicted_alike(explained, ours, shapes)


def test_folders_zips_and_stdin_hold_the_same_pictures(
    run: Path, shapes: Path, shapes_zip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(path) for path in sorted((shapes / "test").glob("*/*.png"))]
    _, folder, _ = predicted(run, shapes / "test", capsys=capsys, monkeypatch=monkeypatch)
    _, named, _ = predicted(run, *files, capsys=capsys, monkeypatch=monkeypatch)
    _, given, _ = predicted(run, "-", stdin="\n".join(files) + "\n", capsys=capsys, monkeypatch=monkeypatch)
    _, packed, _ = predicted(run, shapes_zip, capsys=capsys, monkeypatch=monkeypatch)
    assert folder == named == given
    assert len(folder.splitlines()) == 22
    within = [line for line in packed.splitlines() if line.startswith(f"{shapes_zip}/test/")]
    assert [line.removeprefix(str(shapes_zip)) for line in within] == [
        line.removeprefix(str(shapes)) for line in folder.splitlines()
    ]


def test_a_broken_picture_is_a_line_and_the_rest_goes_on(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = next((shapes / "test").rglob("*.png"))
    (tmp_path / "a.png").write_bytes(whole.read_bytes()[:99])
    (tmp_path / "b.jpg").write_text("no picture")
    shutil.copy(whole, tmp_path / "c.png")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.write(whole, "one.png")
        archive.write(tmp_path / "a.png", "two.png")
    paths = [*sorted(tmp_path.iterdir()), tmp_path / "c.png"]
    status, out, err = predicted(run, *paths, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 1
    assert [line.partition("  ")[0] for line in out.splitlines()] == [
        f"{tmp_path}/c.png", f"{tmp_path}/d.zip/one.png", f"{tmp_path}/c.png",
    ]  # fmt: skip
    assert [line.partition(": ")[2].partition(":")[0] for line in err.splitlines()] == [
        f"{tmp_path}/a.png", f"{tmp_path}/b.jpg", f"{tmp_path}/d.zip/two.png",
    ]  # fmt: skip
    status, out, err = predicted(run, "-", stdin="nowhere.png\n", capsys=capsys, monkeypatch=monkeypatch)
    assert (status, out, err) == (1, "", "cifar.predict: nowhere.png: there is no such file; name another\n")


def test_what_is_no_picture_by_its_name_is_counted(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = next((shapes / "test").rglob("*.png"))
    for name in ("x/one.PNG", "x/.hidden.png", "__MACOSX/two.png", "x/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(whole, tmp_path / name)
    status, out, err = predicted(run, f"{tmp_path}/", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    assert [line.partition("  ")[0] for line in out.splitlines()] == [f"{tmp_path}/x/one.PNG"]
    words = "skipped 3 file(s) that are hidden or have no image suffix, e.g."
    assert err == f"cifar.predict: {words} {tmp_path}/__MACOSX\n"


def test_a_link_in_a_circle_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "back").symlink_to(tmp_path)
    words = f"{tmp_path}/back is a symbolic link to one of its parent folders; remove it"
    assert predicted(run, tmp_path, capsys=capsys, monkeypatch=monkeypatch) == (1, "", f"cifar.predict: {words}\n")


def test_a_zip_or_folder_that_cannot_be_read_is_a_line_and_the_rest_goes_on(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = next((shapes / "test").rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(whole, "../out.png")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "back").symlink_to(tmp_path / "c")
    paths = (whole, tmp_path / "b.zip", tmp_path / "c", whole)
    status, out, err = predicted(run, *paths, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 1
    assert [line.partition("  ")[0] for line in out.splitlines()] == [f"{whole}"] * 2
    first, second = err.splitlines()
    assert first.startswith(f"cifar.predict: {tmp_path}/b.zip: entry '../out.png' leaves the archive")
    assert second.startswith(f"cifar.predict: {tmp_path}/c/back is a symbolic link to one of its parent folders")


def test_a_line_of_stdin_is_taken_as_an_argument_is(
    run: Path, shapes: Path, shapes_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    whole, odd = next((shapes / "test").rglob("*.png")), tmp_path / "odd.png\r"
    shutil.copy(whole, odd)
    paths = (shapes / "test", shapes_zip, whole, odd)
    named = predicted(run, *paths, capsys=capsys, monkeypatch=monkeypatch)
    assert named[0] == 0
    given = "".join(f"{path}\n" for path in paths)
    assert predicted(run, "-", stdin=given, capsys=capsys, monkeypatch=monkeypatch) == named
    from_windows = "".join(f"{path}\r\n" for path in (*paths, ""))
    assert predicted(run, "-", stdin=from_windows, capsys=capsys, monkeypatch=monkeypatch) == named


def test_what_is_no_file_is_named_and_never_waited_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    line = f"{tmp_path}/pipe.png: it is a pipe, socket or device, not a file; name another"
    assert predicted(run, tmp_path / "pipe.png", capsys=capsys, monkeypatch=monkeypatch) == (
        1, "", f"cifar.predict: {line}\n",
    )  # fmt: skip


def test_a_tar_is_no_picture_even_if_it_ends_in_a_zip(
    run: Path, shapes_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(shapes_zip, "shapes.zip")
    status, out, err = predicted(run, tmp_path / "x.tar", capsys=capsys, monkeypatch=monkeypatch)
    assert (status, out) == (1, "")
    assert err.startswith(f"cifar.predict: {tmp_path}/x.tar: the file is not a picture that can be read")


def test_a_folder_that_may_not_be_read_is_a_line_and_the_rest_goes_on(shapes: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    shutil.copytree(shapes / "test", tmp_path, dirs_exist_ok=True)
    (tmp_path / "lost+found").mkdir(mode=0o700)
    tmp_path.chmod(0o755)
    code = (
        "import os; from PIL import Image; from cifar import predict; Image.init(); os.setuid(65534)\n"
        "for item in predict.items(['.'], [], print):\n"
        "    try: item.read()\n"
        "    except predict.UserError as error: print(f'{item.name}: {error}')\n"
        "    else: print('read')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines.count("read") == len(lines) - 1 == 22
    assert "./lost+found/: cannot be read (Permission denied); change its permissions, or remove it" in lines


def answers(run: Path, wanted: Iterator[predict.Item]) -> AbstractContextManager[Iterator[predict.Prediction]]:
    return closing(predict.predictions(runs.open_run(run), wanted, 1, pytest.fail))


def test_pictures_that_nobody_waits_for_are_not_read(run: Path) -> None:
    read = []

    def slowly() -> pictures.UInt8:
        time.sleep(0.05)
        read.append(None)
        return np.zeros((32, 32, 3), np.uint8)

    with answers(run, iter([predict.Item("x", slowly)] * 1000)) as found:
        for _ in range(300):
            next(found)
        asked = len(read)
    assert len(read) - asked <= cores.of_job()


def test_a_list_that_is_still_being_made_gets_answers(run: Path) -> None:
    given = []

    def live() -> Iterator[predict.Item]:
        for number in range(1000):
            given.append(number)
            yield predict.Item(f"{number}", lambda: np.zeros((32, 32, 3), np.uint8))

    with answers(run, live()) as found:
        assert next(found).name == "0"
    assert len(given) < 10


def in_shell(run: Path, arguments: str) -> tuple[int, str, str]:
    command = f"exec {sys.executable} -m cifar.predict --run {run} {arguments}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    err = [line for line in done.stderr.splitlines() if not line.startswith("classifying: ")]
    return done.returncode, done.stdout, "".join(err)


FULL = "cifar.predict: error: stdout cannot be written (No space left on device); make room, or write it to another"
CLOSED = "cifar.predict: error: - takes paths from stdin, which is closed; name the paths, or write them to stdin"


@pytest.mark.parametrize(
    ("streams", "expected"),
    [
        ("{picture} > /dev/full", (2, "", FULL)),
        ("{picture} > /dev/full 2> /dev/full", (2, "", "")),
        ("--format csv nothing.png > /dev/full", (2, "", "cifar.predict: error: nothing.png does not exist; name a ")),
        ("- <&-", (2, "", CLOSED)),
        ("{picture} >&-", (0, "", "")),
        ("nothing.png 2>&-", (2, "", "")),
    ],
)
def test_streams_that_are_closed_or_full_are_one_line(
    streams: str, expected: tuple[int, str, str], run: Path, shapes: Path
) -> None:
    status, out, err = in_shell(run, streams.format(picture=next(shapes.rglob("*.png"))))
    assert (status, out) == expected[:2]
    assert err.startswith(expected[2])
    assert err or not expected[2]
    assert "Traceback" not in err


def test_a_run_ended_when_it_says_whatever_happens_to_its_files(run: Path, shapes: Path, tmp_path: Path) -> None:
    data = open_data(str(shapes))

    def told(path: Path) -> tuple[str, str | None]:
        opened = runs.open_run(path)
        of_app = content.of_run(opened, str(shapes)).metadata
        return runs.metadata(opened, data, 1, "no")["trained"], of_app.get("finished")

    ended = runs.open_run(run).ended
    assert ended is not None
    assert abs(ended.timestamp() - (run / "result.json").stat().st_mtime) < 60
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    os.utime(copy / "model.safetensors", (0, 0))
    assert told(copy) == told(run) == (f"{ended:%Y-%m-%d %H:%M} UTC, 8 steps", f"{ended:%Y-%m-%d %H:%M} UTC")
    config = json.loads((copy / "config.json").read_text())
    del config["ended"]  # as an earlier version wrote it
    (copy / "config.json").write_text(json.dumps(config))
    assert told(copy) == ("8 steps", None)


def test_names_on_stdin_may_be_in_any_encoding(run: Path, shapes: Path, tmp_path: Path) -> None:
    picture = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(picture)).write_bytes(next((shapes / "test").rglob("*.png")).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "cifar.predict", "--run", run, "-"], input=picture + b"\n", cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},  # as in en_US.UTF-8
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(os.fsencode(tmp_path) + b"/caf\\udce9.png  ")


def test_the_most_probable_classes_in_every_format(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph = np.random.default_rng(0).integers(0, 256, (301, 200, 3)).astype(np.uint8)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph).convert("L").save(tmp_path / "=1+1.jpg")
    arguments = ("--top", 99, "=1+1.jpg")
    _, table, _ = predicted(run, *arguments, capsys=capsys, monkeypatch=monkeypatch)
    _, as_csv, _ = predicted(run, *arguments, "--format", "csv", capsys=capsys, monkeypatch=monkeypatch)
    _, as_json, _ = predicted(run, *arguments, "--format", "json", capsys=capsys, monkeypatch=monkeypatch)
    head, row = csv.reader(io.StringIO(as_csv))
    told = json.loads(as_json)
    assert head[:5] == ["path", "class", "probability", "class_2", "probability_2"]
    assert row[0] == "'=1+1.jpg"  # a spreadsheet would compute it
    assert (told["path"], len(told["classes"]), len(row), len(head)) == ("=1+1.jpg", 4, 9, 9)
    assert sum(entry["probability"] for entry in told["classes"]) == pytest.approx(1, abs=1e-5)
    pairs = [(entry["class"], entry["probability"]) for entry in told["classes"]]
    assert [(row[n], float(row[n + 1])) for n in range(1, 9, 2)] == pairs
    assert table == "  ".join(["=1+1.jpg", *(f"{name} {probability:.3f}" for name, probability in pairs)]) + "\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.png",), "nowhere.png does not exist; name a picture, a folder or a zip"),
        (("--top", "0", "."), "--top 0 is not a number of classes; give a whole number of at least 1"),
        (("--format", "xml", "."), "--format 'xml' is unknown; choose one of: table, csv, json"),
        ((), "the following arguments are required: PATH; see python -m cifar.predict --help"),
        (("--run", "nowhere", "."), "nowhere does not exist; name the directory of a finished run"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    arguments: tuple[str, ...], words: str, run: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert predicted(run, *arguments, capsys=capsys, monkeypatch=monkeypatch) == (
        2, "", f"cifar.predict: error: {words}\n",
    )  # fmt: skip


def test_it_ends_when_nobody_reads_any_more(run: Path, shapes: Path) -> None:
    words = " ".join([sys.executable, "-m", "cifar.predict", "--run", str(run), *[str(shapes)] * 300])
    done = subprocess.run(
        ["bash", "-c", f"{words} | head -1; echo ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    first, status = done.stdout.splitlines()
    assert first.startswith(f"{shapes}/test/disc/00.png  ")
    assert int(status) == 128 + 13
    assert [line for line in done.stderr.splitlines() if not line.startswith("classifying: ")] == []


def test_it_starts_without_what_only_others_need(run: Path, shapes: Path) -> None:
    others = ("gradio", "matplotlib", "tensorboard", "albumentations", "accelerate", "cv2", "sklearn", "scipy")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others})); from cifar import predict; "
        f"sys.argv = ['x', '--run', {str(run)!r}, {str(shapes / 'test')!r}]; predict.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 22
    whole = subprocess.run(
        [sys.executable, "-m", "cifar.predict", "--run", run, shapes / "test"], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert whole.stdout == done.stdout

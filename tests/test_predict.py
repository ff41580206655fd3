"""`python -m cifar.predict`: the same answers as the app and explain.py, for whatever pictures there are."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Train
from helpers.explained import assert_predicted_alike, explain
from PIL import Image

from cifar import predict
from cifar.app.engine import Engine
from cifar.data import pictures
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

"""explain.py as a user starts it: what it writes, that its numbers agree with each other, what it refuses."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPES, Disk, Train, command, draw
from helpers.explained import explain, lines_of
from PIL import Image
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar import checkpoint, models
from cifar.attempt import claim
from cifar.data.augment import normalize
from cifar.data.cache import Data, open_data
from cifar.errors import UserError
from cifar.explain import calibration, checks, mistakes, neighbours, output, runs
from cifar.explain.findings import ExplainedImages, Findings
from cifar.explain.layers import Grid
from cifar.explain.options import ExplainOptions, parse_command_line

ONE = ("--num_processes", "1")


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shapes of which a third of the test images lie in the wrong folder: no network is right about all of them."""
    root = tmp_path_factory.mktemp("data") / "mislabelled"
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 9)):
        for number, shape in enumerate(SHAPES):
            for image in range(count):
                wrong = split == "test" and image % 3 == 0
                folder = root / split / SHAPES[(number + wrong) % len(SHAPES)]
                folder.mkdir(parents=True, exist_ok=True)
                draw(shape, generator).save(folder / f"{shape}{image:02d}.png")
    return root


@pytest.fixture(scope="module")
def run(mislabelled: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    done = train(
        "--data", mislabelled, "--run", directory, "--network", "whitened", "--augmentation-backend", "device",
        "--epochs", 3, "--peak-epoch", 1, "--global-batch-size", 16, "--peak-learning-rate", 1e-3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def explained(run: Path) -> Path:
    """What an explanation with everything switched on leaves."""
    done = explain("--run", run, "--check", "--neighbours", "--compare", run, launcher=ONE)
    assert done.returncode == 0, done.stderr
    (run / "explain" / "output.txt").write_text(done.stdout)
    return run / "explain"


def test_the_files_of_the_contract_are_there(explained: Path) -> None:
    assert {path.name for path in explained.iterdir()} == {
        "misclassified.csv", "gallery.png", "cam.png", "maps", "confusion.png", "calibration.png", "report.html",
        "result.json", "output.txt",
    }  # fmt: skip
    for picture in explained.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200
            assert image.info["dpi"] == pytest.approx((100, 100), abs=0.1)


def test_an_explanation_writes_the_files_that_it_may_replace(explained: Path) -> None:
    names = {str(path.relative_to(explained)) for path in explained.rglob("*") if path.is_file()}
    assert {name for name in names if not runs.FILES.fullmatch(name)} == {"output.txt"}
    runs.check_output(explained)


def test_the_accuracy_is_the_runs_own_and_every_count_agrees(run: Path, explained: Path) -> None:
    result, own = (json.loads((folder / "result.json").read_text()) for folder in (explained, run))
    lines = lines_of(explained)
    assert result["images"] == 36
    assert result["accuracy"] == own["test_accuracy"]
    assert result["mistakes"] == len(lines) == round(36 * (1 - own["test_accuracy"])) >= 4
    words = f"36 test images, {len(lines)} mistakes, accuracy {own['test_accuracy']:.2%} (the run's own: "
    assert words in (explained / "output.txt").read_text()
    assert result["checks"]["mistakes_images"] == len(lines)


def test_the_list_has_every_mistake_with_its_numbers(run: Path, explained: Path, mislabelled: Path) -> None:
    tensors = load_file(run / "predictions.safetensors")
    labels, last = tensors["labels"], tensors["predictions"][-1]
    names, files = sorted(SHAPES), open_data(str(mislabelled)).files("test")
    lines = lines_of(explained)
    assert sorted(int(line["index"]) for line in lines) == np.flatnonzero(labels != last).tolist()
    confidences = [float(line["confidence"]) for line in lines]
    assert confidences == sorted(confidences, reverse=True)
    for line in lines:
        index = int(line["index"])
        probabilities = tensors["probabilities"][index].astype(float)
        assert (line["true"], line["predicted"]) == (names[labels[index]], names[last[index]])
        assert line["file"] == files[index]
        assert f"/{line['true']}/" in line["file"]
        assert float(line["confidence"]) == pytest.approx(probabilities[last[index]], abs=2e-3)
        assert float(line["true_probability"]) == pytest.approx(probabilities[labels[index]], abs=2e-3)
        margin, true_probability = float(line["margin"]), float(line["true_probability"])
        assert margin >= 0
        if true_probability > 0.01:
            assert margin == pytest.approx(np.log(float(line["confidence"]) / true_probability), abs=0.02)
        assert [part.split()[0] for part in line["top5"].split("; ")] == [
            names[number] for number in np.argsort(-probabilities)
        ]  # fmt: skip
        right = tensors["epochs"][tensors["predictions"][:, index] == labels[index]]
        assert line["epochs_right"] == " ".join(map(str, right))


def test_the_list_has_as_many_ranks_as_the_result_counts_labels_in_doubt(explained: Path) -> None:
    ranks = sorted(int(line["doubt_rank"]) for line in lines_of(explained) if line["doubt_rank"])
    assert ranks == list(range(1, json.loads((explained / "result.json").read_text())["labels_in_doubt"] + 1))


def test_pictures_show_the_images_enlarged_without_smoothing(explained: Path, mislabelled: Path) -> None:
    data, lines = open_data(str(mislabelled)), lines_of(explained)
    with Image.open(explained / "gallery.png") as image:
        pixels = np.asarray(image)
    first = data.test_images[int(lines[0]["index"])].repeat(6, axis=0).repeat(6, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[..., 0], (192, 192))[:, :40]  # it stands at the left
    assert (windows == first[..., 0]).all(axis=(2, 3)).sum() == 1
    shown = {path.name for path in (explained / "maps").iterdir()}
    assert shown == {f"{int(line['index']):05}.png" for line in lines[:10]}


def test_tensorboard_gets_the_pictures(run: Path, explained: Path) -> None:
    assert explained.is_dir()
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    for name in ("gallery", "cam", "confusion", "calibration"):
        assert [image.step for image in events.Images(f"explain/{name}")] == [12]


def test_pictures_for_tensorboard_replace_those_of_the_explanation_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tmp_path / "events.out.tfevents.1.host.1.0"
    training.write_bytes(b"")
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        output.write_events(tmp_path, {"gallery": np.zeros((8, 8, 3), np.uint8)}, 7)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("explain/gallery")] == [7]
    assert training.exists()


def test_the_checks_come_with_n_and_spread(explained: Path) -> None:
    checks = json.loads((explained / "result.json").read_text())["checks"]
    figures = {name for name in checks if not name.endswith(("_sd", "_images"))}
    assert {f"{name}_sd" for name in figures} == {name for name in checks if name.endswith("_sd")}
    for group in ("mistakes", "correct"):
        assert 0 < checks[f"{group}_images"] <= checks["mistakes_images"]
        for measure in ("flip_rate", "deletion_area", "insertion_area"):
            assert 0 <= checks[f"{group}_{measure}"] <= 1
            assert 0 <= checks[f"{group}_{measure}_shuffled"] <= 1
        for measure in ("after_randomising_last_layer", "after_randomising_all_layers", "mirrored", "moved_one_pixel"):
            assert -1 <= checks[f"{group}_correlation_{measure}"] <= 1


ORDERS = ("confident", "uncertain")


@pytest.fixture(scope="module")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process leaves for each order of the mistakes."""
    folder = tmp_path_factory.mktemp("alone")
    for order in ORDERS:
        assert explain("--run", run, "--order", order, "--count", 3, "--output", folder / order).returncode == 0
    return {order: folder / order for order in ORDERS}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(run: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    configuration = tmp_path / "two.yaml"
    configuration.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\n"
        "machine_rank: 0\nmain_process_port: 0\nmixed_precision: 'no'\nrdzv_backend: static\nsame_network: true\n"
    )
    output = tmp_path / "out"
    done = explain("--run", run, "--output", output, launcher=("--config_file", str(configuration)))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("36 test images") == 1
    assert (output / "misclassified.csv").read_bytes() == (alone["confident"] / "misclassified.csv").read_bytes()


def test_a_checkpoint_is_explained_like_the_run_that_it_became(run: Path, explained: Path, tmp_path: Path) -> None:
    """An unfinished run: the error names its newest complete checkpoint, and that one can be explained."""
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run / "checkpoints", unfinished / "checkpoints")
    shutil.copy(run / "predictions.safetensors", unfinished)
    newest, older = checkpoint.found(unfinished / "checkpoints")[:2]
    shutil.copytree(newest, newest.with_name("step-0000099"))
    (newest.with_name("step-0000099") / "model.safetensors").write_bytes(b"cut short")
    refused = explain("--run", unfinished)
    assert refused.returncode == 2
    assert refused.stderr.endswith(f"newest complete checkpoint can be explained: --run {newest}\n")
    assert not (unfinished / "explain").exists()

    done = explain("--run", newest, "--method", "hirescam", "--layer", "stage1", "--opacity", 1, "--order", "uncertain",
                   "--neighbours", "--compare", run)  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = unfinished / f"explain-{newest.name}"
    assert (folder / "misclassified.csv").read_bytes() == (explained / "misclassified.csv").read_bytes()
    assert {path.name for path in (folder / "maps").iterdir()} == {
        f"{int(line['index']):05}.png" for line in lines_of(folder)[-10:]
    }
    assert checkpoint.verify(newest)
    assert not list(unfinished.glob("events*"))  # the training's own curves stay in sight
    epochs, predictions = runs.prediction_history(runs.open_run(older), open_data(runs.open_run(older).recipe["data"]))
    assert (epochs.tolist(), predictions.shape) == ([1, 2], (2, 36))


def test_a_network_without_a_mistake_has_a_page_that_says_so(tmp_path: Path) -> None:
    """Test images lie in the folders of the classes that a network predicts for them."""
    torch.manual_seed(0)
    network = models.build("resnet", 2, 0.0).eval()
    generator = np.random.default_rng(0)
    pictures = np.stack([np.asarray(draw(SHAPES[k % 4], generator)) for k in range(16)])
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    with torch.no_grad():
        logits = network(normalize(torch.from_numpy(pictures), mean, std))
        network.linear.bias -= logits.mean(dim=0)  # now both classes are predicted
        answers = network(normalize(torch.from_numpy(pictures), mean, std)).argmax(dim=1).tolist()
    assert set(answers) == {0, 1}
    for split in ("train", "test"):
        for number, (picture, answer) in enumerate(zip(pictures, answers, strict=True)):
            folder = tmp_path / "data" / split / "ab"[answer]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{number}.png")
    directory = tmp_path / "run"
    directory.mkdir()
    recipe = {"data": str(tmp_path / "data"), "epochs": 1, "global_batch_size": 16, "seed": 0}
    metadata = {"network": "resnet", "classes": ["a", "b"], "mean": mean, "std": std, "recipe": recipe,
             "data_fingerprint": "0", "test_accuracy": 1.0}  # fmt: skip
    checkpoint.export(claim(directory, 1), network, metadata)
    (directory / "result.json").write_text(json.dumps({"test_accuracy": 1.0, "steps": 1}))
    done = explain("--run", directory, "--check", "--neighbours", "--method", "eigencam")
    assert done.returncode == 0, done.stderr
    assert "16 test images, 0 mistakes, accuracy 100.00%" in done.stdout
    folder = directory / "explain"
    assert lines_of(folder) == []
    assert not list((folder / "maps").iterdir())
    assert json.loads((folder / "result.json").read_text())["mistakes"] == 0
    assert "no mistake" in (folder / "report.html").read_text().lower()


# ---- names

SIGNS = ("\u732b", "\U0010fff0", "\U0010fff1")  # a cat in Chinese; for the others no font can be installed
NAMES = [
    "$0_$50",
    "$50_$100",
    "=1+1",
    "-2",
    "'@x",
    "<b>&amp;%",
    "\u05e9\u05dc\u05d5\u05dd",
    "?",
    "z" * 200,
    *SIGNS,
]


@pytest.fixture(scope="module")
def named(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on classes with names of every kind, made as a notebook would make it."""
    data, generator = tmp_path_factory.mktemp("data") / "named", np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for name in NAMES:
            (data / split / name).mkdir(parents=True)
            for number in range(count):
                draw(SHAPES[number], generator).save(data / split / name / f"+{number}.png")
    directory = tmp_path_factory.mktemp("runs") / "named"
    done = train("--data", data, "--run", directory, "--network", "whitened", "--augmentation-backend", "device",
                 "--epochs", 1, "--peak-epoch", 0.5, "--global-batch-size", 13,
                 env={"MPLBACKEND": "module://matplotlib_inline.backend_inline"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "classes by number" in done.stdout
    return directory


def test_names_are_text_in_training_tables_and_page(named: Path) -> None:
    tags = EventAccumulator(str(named)).Reload().Tags()
    assert {"confusion", "samples"} <= set(tags["images"])
    assert sum(tag.startswith("test_accuracy_of/") for tag in tags["scalars"]) == len(NAMES)
    assert {"test_accuracy_of/$0_$50", "test_accuracy_of/$50_$100"} <= set(tags["scalars"])
    done = explain("--run", named, "--true", "$0_$50")
    assert (done.returncode, done.stderr) == (0, "")
    [advice] = [line for line in done.stdout.splitlines() if "classes by number" in line]
    assert "install one that has" in advice
    lines = lines_of(named / "explain")
    classes = sorted(NAMES)
    tensors = load_file(named / "predictions.safetensors")
    for line in lines:
        for column in ("file", "true", "predicted", "top5"):
            assert not line[column].startswith(("=", "+", "-", "@", "\t", "\r"))
        read = {name: line[name].removeprefix("'") if mistakes.FORMULA.match(line[name]) else line[name]
                for name in ("true", "predicted")}  # fmt: skip
        index = int(line["index"])
        assert read["true"] == classes[tensors["labels"][index]]
        assert read["predicted"] == classes[tensors["predictions"][-1][index]]
        assert line["file"].split("/")[1:2] == [read["true"]]
    assert len({line["true"] for line in lines}) > 5
    page = (named / "explain" / "report.html").read_text(encoding="utf-8")
    assert "<b>&amp;%" not in page


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@a", "\tx", "\rx", "'=1", "''=1", "\uff1d1"])
def test_what_a_spreadsheet_would_run_is_text_and_can_be_read_back(name: str) -> None:
    cell = mistakes.guarded(name)
    assert cell == f"'{name}"
    assert mistakes.FORMULA.match(cell)
    assert cell.removeprefix("'") == name


@pytest.mark.parametrize("name", ["cat", "a=b", "'cat", "1-2", "", "#1", " =1"])
def test_other_cells_stay_as_they_are(name: str) -> None:
    assert mistakes.guarded(name) == name
    assert not mistakes.FORMULA.match(name)


# ---- what is said of the run


def test_an_accuracy_in_another_precision_says_so(run: Path) -> None:
    opened = runs.open_run(run)
    assert opened.precision == json.loads((run / "result.json").read_text())["precision"]
    own = f"{opened.test_accuracy:.2%}"
    assert runs.own_accuracy(opened, str(opened.precision)) == own
    assert runs.own_accuracy(replace(opened, precision="fp16"), "no") == f"{own} in precision fp16, here no"
    assert runs.own_accuracy(replace(opened, precision=None), "no") == own  # older runs do not say


def test_the_line_recipe_names_the_recipe(run: Path, tmp_path: Path, mislabelled: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    opened, data = runs.open_run(copy), open_data(str(mislabelled))
    for name, line in (
        ("mine", "mine, 3 epochs, global batch 16, seed 0"),
        (None, "3 epochs, global batch 16, seed 0"),
    ):
        content = json.loads((run / "recipe.json").read_text())
        content.pop("name", None)
        (copy / "recipe.json").write_text(json.dumps({**content, **({"name": name} if name else {})}))
        metadata = runs.metadata(opened, data, 0.5, "no")
        assert (metadata["recipe"], metadata["network"]) == (line, "whitened")
    (copy / "recipe.json").unlink()
    assert runs.metadata(opened, data, 0.5, "no")["recipe"] == "3 epochs, global batch 16, seed 0"


def test_the_square_of_the_flip_test_is_the_cutouts_only_where_there_is_one() -> None:
    assert "shown the network such squares of 8x8 (crop_flip_cutout)" in checks.square("crop_flip_cutout")
    assert "has never shown the network" in checks.square("crop_alternating_flip")
    assert checks.square(None) == "a blank square of 8x8 pixels"


# ---- two at once, and crashes


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_explanations_of_a_run_at_once_leave_one_whole(run: Path, alone: dict[str, Path], tmp_path: Path) -> None:
    whole = [everything(folder) for folder in alone.values()]
    assert len({tuple(sorted(found)) for found in whole}) == 2  # other maps
    together = [
        subprocess.Popen(
            command(ROOT / "explain.py", "--run", run, "--order", order, "--count", 3, "--output", tmp_path / "both"),
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for order in ORDERS
    ]  # fmt: skip
    for process in together:
        assert (process.communicate(timeout=900)[1], process.returncode) == ("", 0)
    left = everything(tmp_path / "both")
    assert sorted(left) in [sorted(found) for found in whole]
    gallery = {found["gallery.png"]: sorted(found) for found in whole}
    assert gallery[left["gallery.png"]] == sorted(left)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_an_explanation_that_cannot_be_written_leaves_the_one_before(disk: Disk) -> None:
    folder = disk.path / "explain"
    output.publish(folder, [("gallery.png", b"old"), ("maps/00001.png", b"old"), ("result.json", b"old")])
    (folder / "maps" / "mine.png").write_bytes(b"mine")
    (folder / "verdicts.csv").write_bytes(b"mine")
    before = everything(folder)
    disk.remount("size=1m")
    full = [("gallery.png", b"new"), ("maps/00002.png", bytes(2 << 20)), ("result.json", b"new")]
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"), runs.written_to(folder):
        output.publish(folder, full)
    assert everything(folder) == before
    assert not list(folder.glob(".*"))
    disk.remount("size=20m")
    output.publish(folder, full)
    assert everything(folder) == {
        "gallery.png": b"new", "maps/00002.png": bytes(2 << 20), "result.json": b"new", "maps/mine.png": b"mine",
        "verdicts.csv": b"mine",
    }  # fmt: skip


WRITE_EVENTS = """
import sys
from pathlib import Path
import numpy as np
from cifar.explain import output, runs
picture = np.random.default_rng(0).integers(0, 256, (800, 800, 3)).astype(np.uint8)
with runs.written_to(Path(sys.argv[1])):
    output.write_events(Path(sys.argv[1]), {"gallery": picture}, 7)
"""


def test_pictures_for_tensorboard_that_find_no_room_are_one_error(disk: Disk) -> None:
    disk.remount("size=1m")
    done = subprocess.run([sys.executable, "-c", WRITE_EVENTS, disk.path], cwd=ROOT, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.stderr.count("Traceback") == 1  # of the UserError, which explain.py prints as one line
    assert "UserError" in done.stderr.splitlines()[-1]


KILLED = """
import os, signal, sys
from pathlib import Path
from cifar.explain import output
def contents():
    yield "gallery.png", b"new"
    yield "maps/00002.png", b"new"
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    yield "result.json", b"new"
real, renamed = Path.rename, 0
def rename(self, target):
    global renamed
    real(self, target)
    renamed += 1
    if renamed == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename
output.publish(Path(sys.argv[1]), contents())
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_one_that_is_killed_leaves_no_mixture_and_the_next_clears_up(moment: str, tmp_path: Path) -> None:
    folder = tmp_path / "explain"
    old = [("gallery.png", b"old"), ("maps/00001.png", b"old"), ("result.json", b"old")]
    output.publish(folder, old)
    done = subprocess.run([sys.executable, "-c", KILLED, folder, moment], cwd=ROOT, check=False)
    assert done.returncode == -9
    found = {path.read_bytes() for path in folder.rglob("*") if path.is_file() and ".explain-" not in str(path)}
    assert found == ({b"old"} if moment == "writing" else {b"new"})
    assert (folder / "result.json").exists() == (moment == "writing")
    assert list(folder.glob(".explain-*.tmp"))
    runs.check_output(folder)  # the same command may clear up
    output.publish(folder, old)
    assert names_in(folder) == {"gallery.png", "maps", "maps/00001.png", "result.json"}


def test_one_that_cannot_rename_its_files_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [("gallery.png", b"new"), ("maps/00001.png", b"new"), ("result.json", b'{"method": "", "layer": ""}')]

    def failing(path: Path, target: Path) -> None:
        if path.name == "result.json":
            raise OSError(5, "Input/output error", str(target))
        path.replace(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="Input/output error"):
            output.publish(tmp_path, files)
    assert (tmp_path / "gallery.png").exists()
    runs.check_output(tmp_path)
    output.publish(tmp_path, files)
    assert names_in(tmp_path) == {"gallery.png", "maps", "maps/00001.png", "result.json"}
    runs.check_output(tmp_path)


def test_maps_of_images_beyond_the_first_hundred_thousand_are_replaced_too(tmp_path: Path) -> None:
    output.publish(tmp_path, [("maps/123456.png", b"old")])
    output.publish(tmp_path, [("maps/00001.png", b"new")])
    assert names_in(tmp_path) == {"maps", "maps/00001.png"}


# ---- bad input


def test_an_explanation_does_not_replace_a_run(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    newest = checkpoint.found(other / "checkpoints")[0]
    for folder in (other, newest):
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        done = explain("--run", run, "--output", folder)
        assert done.returncode == 2
        assert f"output folder {folder} holds a run (" in done.stderr
        assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name", ["result.json", "confusion.png", "corruptions.png", "report.html", "maps/00042.png"])
def test_an_explanation_does_not_replace_files_of_the_users_own(name: str, tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "mine.png").write_bytes(b"mine")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    runs.check_output(tmp_path)
    (tmp_path / name).write_bytes(b'{"accuracy": 0.5}')
    words = f"output folder {tmp_path} holds files that are not an explanation ({name}); choose another --output"
    with pytest.raises(UserError) as refusal:
        runs.check_output(tmp_path)
    assert str(refusal.value) == words


def test_a_folder_of_the_users_own_is_one_line_and_stays_as_it_is(run: Path, tmp_path: Path) -> None:
    for name in ("result.json", "confusion.png"):
        (tmp_path / name).write_bytes(b"{}")
    done = explain("--run", run, "--output", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds files that are not an explanation (confusion.png); choose another --output" in done.stderr
    assert everything(tmp_path) == {"result.json": b"{}", "confusion.png": b"{}"}


@pytest.mark.slow
def test_a_name_that_a_terminal_cannot_show_is_no_reason_to_fail(run: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "\u732b"
    shutil.copytree(run, foreign, ignore=shutil.ignore_patterns("checkpoints", "explain"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with Path("/dev/full").open("w") as full:
        for stdout in (subprocess.PIPE, full):
            done = subprocess.run(
                command(ROOT / "explain.py", "--run", foreign), env=environment, stdout=stdout, stderr=subprocess.PIPE,
                text=True, check=False,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, "")
            assert stdout is full or "\\u732b/explain/report.html" in done.stdout


def test_a_run_whose_name_is_not_utf_8_is_one_line(run: Path, tmp_path: Path) -> None:
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sultat"))
    shutil.copytree(run, strange, ignore=shutil.ignore_patterns("checkpoints", "explain"))
    done = explain("--run", strange)
    assert done.returncode == 2
    assert done.stderr.endswith("r\\udce9sultat has a name that is not UTF-8; rename the folder\n")


def test_a_damaged_history_is_one_line(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "explain")))
    (copy / "predictions.safetensors").write_bytes(b"no")
    (copy / "predictions.log").unlink()
    done = explain("--run", copy)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "predictions.safetensors is damaged; choose another --run" in done.stderr


@pytest.mark.parametrize("flag", ["--run", "--output", "--compare"])
def test_a_name_that_no_file_can_have_is_one_line(flag: str, run: Path) -> None:
    done = explain(*(["--run", run] if flag != "--run" else []), flag, "x" * 300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_folder_that_may_not_be_looked_into_is_one_line(run: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    closed = tmp_path / "closed" / "run"
    closed.mkdir(parents=True)
    closed.parent.chmod(0o700)
    code = f"""
import os
from pathlib import Path
from cifar.explain import runs
os.setuid(65534)
runs.open_run(Path({str(closed)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "UserError: --run " in done.stderr
    assert done.stderr.endswith("Permission denied; choose another --run\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "no/such/run"], "no/such/run does not exist; name the directory of a finished run"),
        (["--run", "."], "error: . holds neither a finished run nor a complete checkpoint"),
        (["--layer", "layer9"], "--layer 'layer9' is unknown; choose one of: stage1 (15x15), stage2 (7x7), "),
        (["--method", "jet"], "choose one of: gradcam, gradcam++, hirescam, layercam, eigencam"),
        (["--order", "best"], "--order 'best' is unknown; choose one of: confident, uncertain, random"),
        (["--true", "cat"], "--true 'cat' is not a class of "),
        (["--predicted", "cat"], "choose one of: disc, ring, square, stripes"),
        (["--count", "0"], "--count 0 shows nothing"),
        (["--count", "-3"], "--count -3 shows nothing"),
        (["--count", "1000"], "--count 1000 is more than the "),
        (["--opacity", "1.5"], "--opacity 1.5 is outside 0..1"),
        (["--opacity", "nan"], "--opacity nan is outside 0..1"),
        (["--seed", "-1"], "--seed -1 is outside 0..2^63 - 1"),
        (["--seed", str(2**63)], f"--seed {2**63} is outside 0..2^63 - 1"),
        (["--data", "no/such/data"], "--data no/such/data does not exist"),
        (["--output", "explain.py"], "output folder explain.py is not writable"),
        (["--output", "explain.py/below"], "output folder explain.py/below is not writable"),
        (["--quick"], "unrecognized arguments: --quick; see explain.py --help"),
        (["--compare", "no/such/run"], "no/such/run does not exist; name the directory of a finished run"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_changes_nothing(
    arguments: list[str], words: str, run: Path, explained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    done = explain("--run", run, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("explain.py: error: ")
    assert words in done.stderr
    assert done.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before


def test_help_lists_the_layers_without_loading_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "explain.py", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "1000"},
    )  # fmt: skip
    assert "resnet: prep (32x32), layer1 (16x16), layer2 (8x8), layer3 (4x4)" in done.stdout
    assert not {"torch", "matplotlib", "PIL"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, "does not match its sha256"),
        ({"network": "vgg"}, "network 'vgg' is unknown; choose a run of: "),
        ({"format": 99}, "has format 99, this version reads up to 1"),
        ({"classes": None}, "is damaged (TypeError"),
    ],
)
def test_a_run_that_is_not_what_was_saved_is_refused(
    change: dict[str, object], words: str, run: Path, tmp_path: Path
) -> None:
    for name in ("model.safetensors", "result.json"):
        shutil.copy(run / name, tmp_path)
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=None) as error:
        runs.open_run(tmp_path)
    assert words in str(error.value)


def test_weights_of_another_network_are_refused(run: Path) -> None:
    opened = runs.open_run(run)
    with pytest.raises(UserError, match=r"of another network .* linear\.weight first"):
        runs.load(replace(opened, classes=["one", "two"]), torch.device("cpu"))


def test_images_of_other_classes_are_refused(run: Path, shapes: Path) -> None:
    data = open_data(str(shapes))
    opened = runs.open_run(run)
    other = replace(data, classes=["disc", "ring", "square", "star"])
    with pytest.raises(UserError, match=r"have the classes disc, ring, square, star, but .* was trained on disc, ring"):
        runs.as_trained(other, opened)
    # The run's normalisation goes with its weights, whatever the images are.
    assert runs.as_trained(replace(data, mean=(0.0, 0.0, 0.0)), opened).mean == opened.mean


def test_only_runs_on_the_same_images_are_compared(run: Path, shapes: Path) -> None:
    with pytest.raises(UserError, match=r"--compare .* did not evaluate these images"):
        runs.wrong_in([runs.open_run(run)], open_data(str(shapes)))


def test_a_run_is_compared_with_other_runs_alone(run: Path, explained: Path, tmp_path: Path) -> None:
    link, copy, other = (tmp_path / name for name in ("link", "copy", "other"))
    link.symlink_to(run)
    for folder in (copy, other):
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "explain"))
    weights = (run / "model.safetensors").read_bytes() + b" "
    (other / "model.safetensors").write_bytes(weights)
    config = json.loads((run / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "sha256": hashlib.sha256(weights).hexdigest()}))
    kept, lines = runs.others(runs.open_run(run), [run, other, link, copy, other])
    assert [each.path for each in kept] == [other]
    same = ((run, run), (link, run), (copy, run), (other, other))
    assert lines == [f"--compare {path} is the same run as {one}; left out" for path, one in same]
    assert f"--compare {run} is the same run as {run}; left out\n" in (explained / "output.txt").read_text()

    newest, older = checkpoint.found(run / "checkpoints")[:2]
    assert newest != older
    assert runs.others(runs.open_run(older), [run])[0] == []
    with pytest.raises(UserError, match=r"--compare .* is a checkpoint; name finished runs"):
        runs.others(runs.open_run(run), [older])


# ---- selection


PROBABILITIES = np.array(
    [
        [0.90, 0.08, 0.02],  # 0: wrong, 1 taken for 0
        [0.20, 0.70, 0.10],  # 1: wrong, 0 taken for 1
        [0.60, 0.30, 0.10],  # 2: right, nearly a 1
        [0.55, 0.40, 0.05],  # 3: right, and nearer to it
        [0.10, 0.80, 0.10],  # 4: right
        [0.34, 0.33, 0.33],  # 5: wrong, 2 taken for 0
        [0.90, 0.08, 0.02],  # 6: wrong, 1 taken for 0
    ],
    np.float32,
)
LABELS = np.array([1, 0, 0, 0, 1, 2, 1], np.uint8)


def chosen(*arguments: str) -> list[int]:
    wrong = mistakes.find(PROBABILITIES, LABELS)
    predictions = PROBABILITIES.argmax(axis=1).astype(np.uint8)
    rows = mistakes.choose(wrong, predictions, LABELS, ["a", "b", "c"], parse_command_line(arguments))
    return wrong[rows].tolist()


def test_mistakes_come_most_confident_first_and_filters_keep_the_order() -> None:
    assert mistakes.find(PROBABILITIES, LABELS).tolist() == [0, 6, 1, 5]
    assert chosen() == [0, 6, 1, 5]
    assert chosen("--count", "2") == [0, 6]
    assert chosen("--order", "uncertain", "--count", "2") == [5, 1]
    assert chosen("--true", "b") == [0, 6]
    assert chosen("--predicted", "a") == [0, 6, 5]
    assert chosen("--predicted", "a", "--true", "c") == [5]
    assert chosen("--predicted", "c") == []
    with pytest.raises(UserError, match="--count 3 is more than the 2 such mistake"):
        chosen("--true", "b", "--count", "3")


def test_a_random_order_belongs_to_its_seed() -> None:
    orders = [chosen("--order", "random", "--seed", str(seed)) for seed in range(20)]
    assert orders == [chosen("--order", "random", "--seed", str(seed)) for seed in range(20)]
    assert len({tuple(order) for order in orders}) > 5
    assert all(sorted(order) == [0, 1, 5, 6] for order in orders)


def test_each_mistake_has_a_correct_image_that_was_nearly_the_same_mistake() -> None:
    wrong = mistakes.find(PROBABILITIES, LABELS)
    positions, rows = mistakes.companions(wrong, PROBABILITIES, LABELS)
    # 4 is a true 1 with runner-up 0; 3 is the true 0 that came nearest to 1; no true 2 is right.
    assert positions.tolist() == [3, 4]
    assert rows.tolist() == [1, 1, 0, -1]


# ---- figures


def findings(probabilities: np.ndarray, labels: np.ndarray) -> Findings:
    empty = np.zeros(0, np.float32)
    nobody = ExplainedImages(np.zeros(0, np.int64), np.zeros((0, 32, 32, 3), np.uint8), [], np.zeros((0, 2), np.uint8),
                   np.zeros((0, 2, 8, 8), np.float32), np.zeros((0, 2), np.float32), np.zeros((0, 4, 4), np.float32),
                   empty, empty, Grid(8, 2, 4), Grid(4, 4, 8))  # fmt: skip
    numbers, classes = np.zeros(0, np.int64), np.zeros((0, len(labels)), np.uint8)
    return Findings({}, ["a", "b", "c"], labels, probabilities, numbers, classes, nobody, nobody, numbers, "", "")


def test_calibration_counts_every_image_once() -> None:
    bins = calibration.measure(findings(PROBABILITIES, LABELS))
    assert bins.counts.tolist() == [0, 0, 0, 1, 0, 1, 1, 1, 1, 2]
    assert bins.accuracy[[3, 5, 6, 7, 8, 9]].tolist() == [0, 1, 1, 0, 1, 0]
    assert bins.error == pytest.approx((0.34 + 0.45 + 0.4 + 0.7 + 0.2 + 1.8) / 7, abs=1e-6)
    assert (bins.low <= bins.accuracy).all()
    assert (bins.accuracy <= bins.high).all()


def test_intervals_are_wilsons() -> None:
    low, high = calibration.wilson(np.array([0.0, 0.5, 0.9, 0.0]), np.array([10, 10, 100, 0]))
    np.testing.assert_allclose(low, [0, 0.2366, 0.8256, 0], atol=1e-4)  # statsmodels.stats.proportion
    np.testing.assert_allclose(high, [0.2775, 0.7634, 0.9448, 1], atol=1e-4)


def test_neighbours_are_nearest_first_and_copies_are_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models.build("resnet", 2, 0.0).eval()
    generator = np.random.default_rng(0)
    training = np.stack([np.asarray(draw(SHAPES[k % 4], generator)) for k in range(12)])
    test = np.stack([training[5], training[8] // 2, *(np.asarray(draw("ring", generator)) for _ in range(2))])
    labels = np.arange(12, dtype=np.uint8) % 2
    data = Data(
        tmp_path, ["a", "b"], (0.5,) * 3, (0.25,) * 3, "", training, labels, test, np.array([1, 0, 1, 1], np.uint8)
    )
    found = neighbours.find(network, data, np.array([0, 2]), np.array([0, 0, 0, 1], np.uint8))
    assert found.indices.shape == (2, 4)
    assert found.indices[0, 0] == 5
    assert found.distances[0, 0] == pytest.approx(0, abs=1e-5)
    assert (np.diff(found.distances, axis=1) >= 0).all()
    np.testing.assert_array_equal(found.pictures, training[found.indices])
    assert [Counter(row.tolist()) for row in found.labels] == [Counter({0: 2, 1: 2})] * 2
    assert found.nearest_labels.shape == (2, 10)
    assert found.nearest_labels[0, 0] == labels[5]
    assert found.near_duplicates.tolist() == [0, 1]
    assert found.accuracy_without_duplicates == 0.5


def test_other_handwritings_are_no_near_duplicates_and_copies_are() -> None:
    data = open_data("digits")
    assert neighbours.near_duplicates(data, torch.device("cpu")).tolist() == []

    def stored(pixels: np.ndarray) -> np.ndarray:
        content = io.BytesIO()
        brighter = np.clip(1.1 * pixels.astype(float), 0, 255).astype(np.uint8)
        Image.fromarray(brighter).save(content, "JPEG", quality=75)
        return np.asarray(Image.open(content))

    copies = np.stack([stored(pixels) for pixels in data.train_images[::50]])
    several = replace(data, test_images=copies, train_images=np.concatenate([data.train_images, *[copies] * 3]))
    for other in (replace(data, test_images=copies), several):
        found = neighbours.near_duplicates(other, torch.device("cpu"))
        assert found.tolist() == list(range(len(copies)))


def test_a_compared_run_is_wrong_where_its_predictions_were(run: Path) -> None:
    tensors = load_file(run / "predictions.safetensors")
    (wrong,) = runs.wrong_in([runs.open_run(run)], open_data(runs.open_run(run).recipe["data"])).values()
    assert wrong.tolist() == (tensors["predictions"][-1] != tensors["labels"]).tolist()


def test_a_class_may_have_one_training_image_and_every_test_image_a_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = models.build("resnet", 3, 0.0).eval()
    generator = np.random.default_rng(0)
    images = np.stack([np.asarray(draw(SHAPES[k % 4], generator)) for k in range(4)])
    labels = np.array([0, 1, 1, 2], np.uint8)
    data = Data(tmp_path, list("abc"), (0.5,) * 3, (0.25,) * 3, "", images, labels, images[:2], labels[:2])
    found = neighbours.find(network, data, np.array([0]), np.array([1, 1], np.uint8))
    assert found.indices[0, 0] == 0
    assert set(found.indices[0, :3].tolist()) == {0, 1, 2}
    assert found.indices[0, 3] == neighbours.NONE
    assert found.near_duplicates.tolist() == [0, 1]
    assert found.accuracy_without_duplicates is None


def test_without_flags_the_ten_most_confident_mistakes_of_the_first_run_are_explained() -> None:
    assert parse_command_line([]) == ExplainOptions(
        run_dir=Path("runs/resnet"), data=None, output=None, count=None, order="confident", seed=0, true=None,
        predicted=None, method="gradcam", layer=None, opacity=0.5, check=False, neighbours=False, corruptions=False,
        compare=[],
    )  # fmt: skip

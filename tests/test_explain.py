"""explain.py as a user starts it: what it writes, that its numbers agree with each other, what it refuses."""

import csv
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
from conftest import ROOT, SHAPES, Train, command, draw
from PIL import Image
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar import checkpoint, models
from cifar.attempt import claim
from cifar.data.augment import normalize
from cifar.data.cache import Data, open_data
from cifar.errors import UserError
from cifar.explain import calibration, mistakes, neighbours, runs
from cifar.explain.findings import Findings, Shown
from cifar.explain.options import Options, parse_command_line

ONE = ("--num_processes", "1")
Lines = list[dict[str, str]]


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
        "--data", mislabelled, "--run", directory, "--epochs", 3, "--peak-epoch", 1, "--global-batch-size", 16,
        "--peak-learning-rate", 1e-3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory


def explain(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ROOT / "explain.py", *arguments, launcher=launcher),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def explained(run: Path) -> Path:
    """What an explanation with everything switched on leaves."""
    done = explain("--run", run, "--check", "--neighbours", "--compare", run, launcher=ONE)
    assert done.returncode == 0, done.stderr
    (run / "explain" / "output.txt").write_text(done.stdout)
    return run / "explain"


def lines_of(folder: Path) -> Lines:
    with (folder / "misclassified.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_files_of_the_contract_are_there(explained: Path) -> None:
    assert {path.name for path in explained.iterdir()} == {
        "misclassified.csv", "gallery.png", "cam.png", "maps", "confusion.png", "calibration.png", "report.html",
        "result.json", "output.txt",
    }  # fmt: skip
    for picture in explained.glob("*.png"):
        with Image.open(picture) as image:
            assert min(image.size) > 200
            assert image.info["dpi"] == pytest.approx((100, 100), abs=0.1)


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


def test_two_processes_find_what_one_finds(run: Path, explained: Path, tmp_path: Path) -> None:
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
    assert (output / "misclassified.csv").read_bytes() == (explained / "misclassified.csv").read_bytes()


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

    done = explain("--run", newest, "--method", "hirescam", "--layer", "layer1", "--opacity", 1, "--order", "uncertain")
    assert done.returncode == 0, done.stderr
    folder = unfinished / f"explain-{newest.name}"
    assert (folder / "misclassified.csv").read_bytes() == (explained / "misclassified.csv").read_bytes()
    assert {path.name for path in (folder / "maps").iterdir()} == {
        f"{int(line['index']):05}.png" for line in lines_of(folder)[-10:]
    }
    assert checkpoint.verify(newest)
    assert not list(unfinished.glob("events*"))  # the training's own curves stay in sight
    epochs, predictions = runs.judgements(runs.open_run(older), open_data(runs.open_run(older).recipe["data"]))
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
    facts = {"network": "resnet", "classes": ["a", "b"], "mean": mean, "std": std, "recipe": recipe,
             "data_fingerprint": "0", "test_accuracy": 1.0}  # fmt: skip
    checkpoint.export(claim(directory, 1), network, facts)
    (directory / "result.json").write_text(json.dumps({"test_accuracy": 1.0, "steps": 1}))
    done = explain("--run", directory, "--check", "--neighbours", "--method", "eigencam")
    assert done.returncode == 0, done.stderr
    assert "16 test images, 0 mistakes, accuracy 100.00%" in done.stdout
    folder = directory / "explain"
    assert lines_of(folder) == []
    assert not list((folder / "maps").iterdir())
    assert json.loads((folder / "result.json").read_text())["mistakes"] == 0
    assert "no mistake" in (folder / "report.html").read_text().lower()


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run", "no/such/run"], "no/such/run does not exist; name the directory of a finished run"),
        (["--run", "."], "error: . holds neither a finished run nor a complete checkpoint"),
        (["--layer", "layer9"], "--layer 'layer9' is unknown; choose one of: prep (32x32), layer1 (16x16), "),
        (["--method", "jet"], "choose one of: gradcam, gradcam++, hirescam, layercam, eigencam"),
        (["--order", "best"], "--order 'best' is unknown; choose one of: confident, uncertain, random"),
        (["--true", "cat"], "--true 'cat' is not a class of "),
        (["--predicted", "cat"], "choose one of: disc, ring, square, stripes"),
        (["--count", "0"], "--count 0 shows nothing"),
        (["--count", "-3"], "--count -3 shows nothing"),
        (["--count", "1000"], "--count 1000 is more than the "),
        (["--opacity", "1.5"], "--opacity 1.5 is outside 0..1"),
        (["--opacity", "nan"], "--opacity nan is outside 0..1"),
        (["--seed", "-1"], "--seed -1 is negative"),
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
    with pytest.raises(UserError, match=r"of another network .* linear\.bias first"):
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
    with pytest.raises(UserError, match=r"--compare .* did not judge these images"):
        runs.wrong_in([run], open_data(str(shapes)))


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
    nobody = Shown(np.zeros(0, np.int64), np.zeros((0, 32, 32, 3), np.uint8), [], np.zeros((0, 2), np.uint8),
                   np.zeros((0, 2, 8, 8), np.float32), np.zeros((0, 2), np.float32), np.zeros((0, 4, 4), np.float32),
                   empty, empty)  # fmt: skip
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
    assert found.near_duplicates.tolist() == [0, 1]
    assert found.accuracy_without_duplicates == 0.5


def test_without_flags_the_ten_most_confident_mistakes_of_the_first_run_are_explained() -> None:
    assert parse_command_line([]) == Options(
        run=Path("runs/resnet"), data=None, output=None, count=None, order="confident", seed=0, true=None,
        predicted=None, method="gradcam", layer=None, opacity=0.5, check=False, neighbours=False, compare=[],
    )  # fmt: skip

"""`explain.py --corruptions` as a user starts it: the table, the pictures, several processes, runs side by side."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHAPES, Train, command, draw
from helpers.explained import explain
from helpers.launching import CPU_2PROC
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cifar.data.cache import open_data
from cifar.explain import runs
from cifar.explain.corruptions import KINDS, corrupt

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(shapes: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short trainings on the same images."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        done = train(
            "--data", shapes, "--run", folder / str(seed), "--network", "whitened", "--epochs", 3, "--peak-epoch", 1,
            "--augmentation-backend", "device", "--global-batch-size", 16, "--peak-learning-rate", 1e-3, "--seed", seed,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return [folder / "0", folder / "1"]


@pytest.fixture(scope="module")
def compared(trained: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an explanation of the first with the second beside it leaves."""
    folder = tmp_path_factory.mktemp("explained") / "compared"
    done = explain("--run", trained[0], "--corruptions", "--compare", trained[1], "--seed", 3, "--output", folder)
    assert done.returncode == 0, done.stderr
    (folder.parent / "output.txt").write_text(done.stdout)
    return folder


def tables(folder: Path) -> dict[str, list[float] | float]:
    found: dict[str, list[float] | float] = json.loads((folder / "result.json").read_text())["corruptions"]
    return found


def test_the_table_is_what_the_network_says_of_the_corrupted_images(trained: list[Path], compared: Path) -> None:
    found = tables(compared)
    run = runs.open_run(trained[0])
    data = open_data(run.recipe["data"])
    network = runs.load(run, torch.device("cpu"))
    assert set(found) == {*KINDS, "mean"}
    accuracies = [found[kind] for kind in KINDS]
    assert found["mean"] == pytest.approx(np.mean(accuracies))
    indices = np.arange(len(data.test_labels))
    for kind in KINDS:
        for severity, accuracy in enumerate(found[kind], start=1):  # type: ignore[arg-type]
            corrupted = corrupt(kind, severity, np.array(data.test_images), indices, 3)
            said = runs.logits(run, network, corrupted).argmax(dim=1).numpy()
            assert accuracy == pytest.approx((said == data.test_labels).mean(), abs=1.01 / len(indices))
    assert found["mean"] < json.loads((compared / "result.json").read_text())["accuracy"]  # some of it hurts
    words = rf"under 15 corruptions at 5 severities: accuracy {found['mean']:.2%}, the worst kind \w+ with \d"
    assert re.search(words, (compared.parent / "output.txt").read_text())


def test_two_runs_stand_side_by_side(trained: list[Path], compared: Path, tmp_path: Path) -> None:
    assert explain("--run", trained[1], "--corruptions", "--seed", 3, "--output", tmp_path).returncode == 0
    alone = json.loads((tmp_path / "result.json").read_text())
    beside = json.loads((compared / "result.json").read_text())["corruptions_compared"]
    assert beside == {str(trained[1]): {"accuracy": alone["accuracy"], "corruptions": alone["corruptions"]}}
    assert alone["corruptions"] != tables(compared)
    assert "corruptions_compared" not in alone


def test_two_processes_find_what_one_finds(trained: list[Path], compared: Path, tmp_path: Path) -> None:
    done = explain("--run", trained[0], "--corruptions", "--compare", trained[1], "--seed", 3, "--output", tmp_path,
                   launcher=CPU_2PROC)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name in ("result.json", "corruptions.png"):
        assert (tmp_path / name).read_bytes() == (compared / name).read_bytes()
    section = re.compile(r'<details id="corruptions">.*?</details>', re.DOTALL)
    pages = [section.findall((folder / "report.html").read_text()) for folder in (tmp_path, compared)]
    assert pages[0] == pages[1] != []


def test_pictures_are_written_and_do_not_outlive_a_run_without(
    trained: list[Path], compared: Path, tmp_path: Path
) -> None:
    events = EventAccumulator(str(trained[0]), size_guidance={"images": 0}).Reload()
    assert len(events.Images("explain/corruptions")) >= 1
    with Image.open(compared / "corruptions.png") as image:
        assert min(image.size) > 500
    folder = shutil.copytree(compared, tmp_path / "copy")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert explain("--run", trained[0], "--output", folder).returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert after.keys() == before.keys() - {"corruptions.png"}
    assert all(after[name] > before[name] for name in after)
    assert b"corruptions" not in (folder / "report.html").read_bytes() + (folder / "result.json").read_bytes()


def test_a_run_on_other_images_is_one_line_before_any_image_is_corrupted(trained: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "other"
    copy.mkdir()
    for name in ("config.json", "result.json", "model.safetensors", "predictions.safetensors"):
        (copy / name).write_bytes((trained[1] / name).read_bytes())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "data_fingerprint": "another"}))
    done = explain("--run", trained[0], "--corruptions", "--compare", copy, "--output", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"--compare {copy} did not evaluate these images" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_stop_request_ends_it_and_nothing_is_written(trained: list[Path], tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 1), ("test", 400)):
        for shape in SHAPES:
            (tmp_path / "many" / split / shape).mkdir(parents=True)
            for number in range(count):
                draw(shape, generator).save(tmp_path / "many" / split / shape / f"{number}.png", compress_level=0)
    process = subprocess.Popen(
        command(ROOT / "explain.py", "--run", trained[0], "--data", tmp_path / "many", "--corruptions",
                "--output", tmp_path / "out"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    first = next((line for line in process.stderr if line.startswith("evaluating")), "")
    assert re.fullmatch(r"evaluating corrupted images: [\d,]+ of 120,000 images\n", first), first
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (printed, errors) == ("", "")
    assert not (tmp_path / "out").exists()

"""The main job, as real processes: what it writes, how it goes on after any end, what it refuses."""

import io
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import Disk, Train, command, poisoned, step_of
from helpers.launching import TWO, project
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from cifar import checkpoint, launch, models, record, run
from cifar.data.augment import normalize
from cifar.data.cache import open_data
from cifar.errors import UserError
from cifar.recipes import Recipe, RunOptions, parse_command_line

STEPS = 12  # 3 epochs of 64 images in batches of 16
# bf16 where the processor has it. Elsewhere torch emulates it, many times slower: test_muon.py has it on small banks.
PRECISION = "bf16" if launch.native_bf16(torch.device("cpu")) else "no"


def environment() -> dict[str, str]:
    """What `accelerate launch --mixed_precision ...` sets."""
    return {"ACCELERATE_MIXED_PRECISION": PRECISION}


def arguments(shapes: Path, directory: Path, *more: object) -> list[object]:
    return ["--data", shapes, "--run", directory, "--epochs", 3, "--peak-epoch", 1, "--global-batch-size", 16,
            "--checkpoint-every", 3, *more]  # fmt: skip


@pytest.fixture(scope="module")
def finished(shapes: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, launched as the README says."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    done = train(*arguments(shapes, directory), launcher=("--mixed_precision", PRECISION))
    assert done.returncode == 0, done.stderr
    (directory / "output.txt").write_text(done.stdout)
    return directory


def test_the_terminal_tells_what_runs_and_how_it_goes(finished: Path) -> None:
    output = (finished / "output.txt").read_text()
    cores = len(os.sched_getaffinity(0))
    assert f"CPU, 1 process, {cores} CPU threads each, precision {PRECISION}, global batch 16 (16 a process)" in output
    assert ["layer3.1.block2.0", "SmallMapConv2d", "512x4x4", "2,359,808"] in [
        line.split() for line in output.splitlines()
    ]
    assert [line.split()[1] for line in output.splitlines() if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    assert "\r" not in output  # no bar where there is no terminal


def test_a_run_leaves_the_files_of_the_contract(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {
        "recipe.json", "checkpoints", "model.safetensors", "config.json", "metrics.jsonl", "predictions.safetensors",
        "predictions.log", "status.json", "result.json", "samples.png", "curves.png", "attempts", "output.txt",
    }  # fmt: skip
    assert json.loads((finished / "status.json").read_text()) == {"state": "finished", "step": STEPS, "reason": ""}
    result = json.loads((finished / "result.json").read_text())
    assert set(result) == {
        "test_accuracy", "test_loss", "images_per_second", "seconds", "steps", "epochs", "world_size", "precision",
        "parameters", "test_accuracy_tta", "seconds_of_this_attempt", "step_seconds_of_ranks",
    }  # fmt: skip
    spent = result["seconds_of_this_attempt"]
    assert set(spent) == {
        "start", "data", "set-up", "training", "waiting for images", "evaluation", "final evaluation", "saving",
    }  # fmt: skip
    assert sum(spent.values()) > result["seconds"] > spent["training"] > 0
    assert (result["steps"], result["epochs"], result["world_size"], result["precision"]) == (STEPS, 3, 1, PRECISION)
    written = json.loads((finished / "recipe.json").read_text())
    assert Recipe(**written["recipe"]).epochs == 3
    assert written["name"] == "resnet"
    assert {"argv", "versions", "git_revision", "data_fingerprint"} <= set(written)
    assert [path.name for path in checkpoint.found(finished / "checkpoints")] == [
        "step-0000012", "step-0000009", "step-0000008",
    ]  # fmt: skip
    assert not list(finished.rglob("*.pkl")) + list(finished.rglob("*.pt")) + list(finished.rglob("*.bin"))
    for picture in ("samples.png", "curves.png"):
        with Image.open(finished / picture) as image:
            assert min(image.size) > 200


def test_metrics_predictions_and_result_agree(finished: Path) -> None:
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(m["epoch"], m["step"]) for m in metrics] == [(1, 4), (2, 8), (3, 12)]
    tensors = safetensors.torch.load_file(finished / "predictions.safetensors")
    assert tensors["epochs"].tolist() == [1, 2, 3]
    assert tensors["predictions"].shape == (3, 22)
    assert tensors["predictions"].dtype == torch.uint8
    assert tensors["probabilities"].dtype == torch.float16
    for row, m in zip(tensors["predictions"], metrics, strict=True):
        assert (row == tensors["labels"]).float().mean().item() == pytest.approx(m["test_accuracy"])
    assert torch.equal(tensors["probabilities"].argmax(1).to(torch.uint8), tensors["predictions"][-1])
    result = json.loads((finished / "result.json").read_text())
    assert result["test_accuracy"] == metrics[-1]["test_accuracy"]
    assert all(0 <= m["train_accuracy"] <= 1 for m in metrics)
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(metrics))


def test_the_result_alone_rebuilds_the_network(finished: Path, shapes: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    network = models.build(config["network"], len(config["classes"]), dropout=0)
    network.load_state_dict(safetensors.torch.load_file(finished / "model.safetensors"))
    network.eval()
    data = open_data(str(shapes))
    assert config["classes"] == data.classes
    images = normalize(torch.from_numpy(data.test_images[:].copy()), config["mean"], config["std"])
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bf16"):  # as the run evaluated
        probabilities = network(images).float().softmax(1)
    theirs = safetensors.torch.load_file(finished / "predictions.safetensors")["probabilities"].float()
    torch.testing.assert_close(probabilities, theirs, atol=1e-3, rtol=0)  # kept in float16


def events(directory: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_curves_pictures_text_and_hyperparameters(finished: Path) -> None:
    written = events(finished)
    tags = written.Tags()
    assert set(tags["scalars"]) >= {
        "train/loss", "train/accuracy", "train/learning_rate", "train/gradient_norm", "train/images_per_second",
        "train/memory_bytes", "epoch/train_loss", "epoch/train_accuracy", "epoch/test_loss", "epoch/test_accuracy",
        "test_accuracy_of/disc", "test_accuracy_of/stripes", "hparams/test_accuracy",
    }  # fmt: skip
    assert set(tags["images"]) == {"samples", "confusion"}
    shown = Image.open(io.BytesIO(written.Images("samples")[0].encoded_image_string))
    assert shown.tobytes() == Image.open(finished / "samples.png").convert("RGB").tobytes()
    assert set(tags["tensors"]) == {"recipe/text_summary", "network/text_summary", "custom_scalars__config__"}
    (layout,) = written.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(layout.tensor_proto.string_val[0]).category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == {kind: [f"epoch/train_{kind}", f"epoch/test_{kind}"] for kind in ("loss", "accuracy")}
    plugins = written.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(plugins)
    hyperparameters = HParamsPluginData.FromString(plugins["_hparams_/session_start_info"].plugin_data.content)
    # Runs are compared by them, and nobody compares paths.
    assert set(hyperparameters.session_start_info.hparams) == set(Recipe.model_fields) - {"data"}


def test_a_finished_run_says_so_and_changes_nothing(finished: Path, shapes: Path, train: Train) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = train(*arguments(shapes, finished))
    assert done.returncode == 0
    assert done.stdout.startswith(f"{finished} is finished: test accuracy ")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_finished_run_is_not_passed_off_as_one_on_other_images(
    finished: Path, shapes_zip: Path, train: Train
) -> None:
    for data, words in (("digits", "holds a run on other images than --data digits"), ("nowhere", "does not exist")):
        done = train(*arguments(Path(data), finished))
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr
    assert "is finished" in train(*arguments(shapes_zip, finished)).stdout  # the same ones


# ---- going on after any end


def same_result(ours: Path, theirs: Path) -> bool:
    files = ("model.safetensors", f"checkpoints/step-{STEPS:07d}/optimizer.safetensors", "predictions.safetensors")
    return all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in files)


def without_times(directory: Path) -> list[dict[str, float]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "images_per_second")
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 900
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def started(script: Path, arguments: list[object], slowly: Path) -> subprocess.Popen[str]:
    """A process that says everything in one stream; the small network is slow while there is the file `slowly`."""
    env = {**os.environ, **environment(), "PYTHONUNBUFFERED": "1", "SLOWLY": str(slowly)}
    return subprocess.Popen(
        command(script, *arguments), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(script: Path, arguments: list[object], launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A process after its end."""
    return subprocess.run(
        command(script, *arguments, launcher=launcher),
        env={**os.environ, **environment(), "PYTHONUNBUFFERED": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def newest_step(directory: Path) -> int:
    return max(map(step_of, checkpoint.found(directory / "checkpoints")), default=0)


VARIANTS = {
    "small": ("--network", "small"),
    "small on the device": ("--network", "small", "--augmentation-backend", "device"),
    "speedrun": ("--recipe", "speedrun", "--freeze-at", 0.5),  # frozen from step 6 on
}


@pytest.fixture(scope="module")
def variants(copied_project: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Such a run in another way, made when first asked for."""

    @cache
    def run_of(name: str) -> Path:
        directory = tmp_path_factory.mktemp("variant") / "run"
        done = ended(copied_project / "train.py", arguments(shapes, directory, *VARIANTS[name]))
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert (directory / "samples.png").is_file()
        return directory

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "variant"),
    [((3, 4), "small"), ((3,), "small on the device"), ((8,), "speedrun")],
    ids=[
        "in the middle of an epoch, and at its end",
        "augmented on the device",
        "with muon, progressive resizing and frozen early layers",
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    steps: tuple[int, ...], variant: str, copied_project: Path, variants: Callable[[str], Path], shapes: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    script, directory, slowly = copied_project / "train.py", tmp_path / "run", tmp_path / "slowly"
    finished, all_arguments = variants(variant), arguments(shapes, directory, *VARIANTS[variant])
    slowly.touch()
    resumed = ""
    for step in steps:
        process = started(script, all_arguments, slowly)
        wait_for((directory / "checkpoints" / f"step-{step:07d}").exists, process)
        process.send_signal(signal.SIGKILL)
        assert resumed in process.communicate()[0]
        for later in checkpoint.found(directory / "checkpoints"):  # as if the kill had come right after this one
            if step_of(later) > step:
                shutil.rmtree(later)
        assert json.loads((directory / "status.json").read_text())["state"] == "running"
        resumed = f"resuming from {directory}/checkpoints/step-{step:07d}"

    done = ended(script, all_arguments)
    assert done.returncode == 0, done.stderr
    assert f"attempt {len(steps) + 1}: {resumed}" in done.stdout
    assert same_result(directory, finished)
    assert without_times(directory) == without_times(finished)
    for tag in ("epoch/test_accuracy", "train/loss"):
        shown = [event.step for event in events(directory).Scalars(tag)]
        assert shown == sorted(set(shown)), f"{tag} goes back"
    for kind in ("images", "tensors"):
        assert set(events(directory).Tags()[kind]) == set(events(finished).Tags()[kind])


@pytest.mark.slow
def test_images_augmented_on_the_device_are_another_run(variants: Callable[[str], Path]) -> None:
    runs = [variants("small"), variants("small on the device")]
    ways = [json.loads((run / "recipe.json").read_text())["recipe"] for run in runs]
    assert [way.pop("augmentation_backend") for way in ways] == ["albumentations", "device"]
    assert ways[0] == ways[1]
    assert without_times(runs[0]) != without_times(runs[1])


@pytest.mark.slow
def test_views_are_evaluated_at_the_end_alone_and_told_beside_the_plain_accuracy(
    finished: Path, variants: Callable[[str], Path]
) -> None:
    directory = variants("speedrun")
    tta = [metrics["test_accuracy_tta"] for metrics in without_times(directory)]
    assert tta[:-1] == [None, None]
    result = json.loads((directory / "result.json").read_text())
    assert result["test_accuracy_tta"] == tta[-1]
    predictions = safetensors.torch.load_file(directory / "predictions.safetensors")
    plain = (predictions["predictions"][-1] == predictions["labels"]).float().mean().item()
    assert result["test_accuracy"] == pytest.approx(plain)
    assert abs(tta[-1] - plain) <= 5 / 22 + 1e-9  # only the least sure quarter may change
    assert json.loads((finished / "result.json").read_text())["test_accuracy_tta"] is None


@pytest.mark.slow
def test_a_stopped_run_saves_says_so_and_goes_on_to_the_same_bytes(
    copied_project: Path, variants: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    script, directory, slowly = copied_project / "train.py", tmp_path / "run", tmp_path / "slowly"
    all_arguments = arguments(shapes, directory, *VARIANTS["small"], "--checkpoint-every", 2)
    slowly.touch()
    last = 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = started(script, all_arguments, slowly)
        wait_for(lambda last=last: newest_step(directory) > last, process)
        process.send_signal(number)
        output = process.communicate(timeout=900)[0]
        assert process.returncode == 0, output
        assert not last or f"resuming from {directory}/checkpoints/step-{last:07d}" in output
        status = json.loads((directory / "status.json").read_text())
        assert status == {"state": "preempted", "step": status["step"], "reason": f"{number.name} asked to stop"}
        newest, _ = checkpoint.newest(directory / "checkpoints")
        assert newest is not None
        assert last < step_of(newest) == status["step"] < STEPS
        last = status["step"]
    done = ended(script, all_arguments)
    assert done.returncode == 0, done.stderr
    assert same_result(directory, variants("small"))


def test_a_broken_newest_checkpoint_is_named_and_skipped(
    finished: Path, shapes: Path, train: Train, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    (directory / "status.json").unlink()
    with (directory / "checkpoints/step-0000012/model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\x00\xff")
    done = train(*arguments(shapes, directory), env=environment())
    assert done.returncode == 0, done.stderr
    assert "skipped a broken checkpoint:" in done.stdout
    assert "step-0000012/model.safetensors does not match its sha256" in done.stdout
    assert "resuming from" in done.stdout
    assert same_result(directory, finished)


def test_a_new_run_branches_off_a_named_checkpoint(finished: Path, shapes: Path, train: Train, tmp_path: Path) -> None:
    named = finished / "checkpoints" / "step-0000009"
    done = train(*arguments(shapes, tmp_path / "run", "--resume", named), env=environment())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert [m["epoch"] for m in without_times(tmp_path / "run")] == [3]


# ---- what is done beside training


LATE = "loop.DELAY['cpu'] = 3\n"  # as on a GPU


@pytest.mark.slow
def test_metrics_that_come_back_later_change_no_result(
    variants: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    variant = "small on the device"
    done = ended(project(tmp_path, LATE), arguments(shapes, tmp_path / "run", *VARIANTS[variant]))
    assert done.returncode == 0, done.stderr
    assert same_result(tmp_path / "run", variants(variant))
    assert without_times(tmp_path / "run") == without_times(variants(variant))


def test_a_loss_that_comes_back_later_is_refused_by_its_own_step(shapes: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(project(tmp_path, LATE + poisoned(2)), *arguments(shapes, tmp_path / "run", "--checkpoint-every", 500)),
        env={**os.environ, **environment()}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "error: loss nan in step 2 at learning rate" in done.stderr.splitlines()[-1]
    assert "last good checkpoint: none yet" in done.stderr
    assert not checkpoint.found(tmp_path / "run/checkpoints")


# What is called before anything is written, before its files are synced, before it has its name, and before an older
# one is deleted.
MOMENTS = ("checkpoint._write_tensors", "files.sync", "checkpoint._commit", "checkpoint._delete")


@pytest.mark.slow
def test_a_run_that_is_killed_while_a_checkpoint_is_written_goes_on_to_the_same_bytes(
    variants: Callable[[str], Path], shapes: Path, tmp_path: Path
) -> None:
    variant, directory = "small on the device", tmp_path / "run"
    all_arguments = arguments(shapes, directory, *VARIANTS[variant])
    resumed = ""
    for function in MOMENTS:  # of the same checkpoint, by one attempt after the other
        patch = (
            "import signal\nfrom cifar import checkpoint, files\n"
            "real_write, writing = checkpoint.write, []\n"
            "def write(attempt, snapshot, metadata):\n"
            "    if snapshot.progress.step == 9: writing.append(True)\n"
            "    return real_write(attempt, snapshot, metadata)\n"
            "def killed(*arguments):\n"
            "    if writing: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real_function(*arguments)\n"
            f"checkpoint.write, real_function = write, {function}\n"
            f"{function} = killed"
        )
        killed = ended(project(tmp_path, patch), all_arguments)
        assert killed.returncode == -signal.SIGKILL, f"{function}: {killed.stderr}"
        assert resumed in killed.stdout
        newest = 9 if function == "checkpoint._delete" else 8
        assert newest_step(directory) == newest
        resumed = f"resuming from {directory}/checkpoints/step-{newest:07d}"
    done = ended(project(tmp_path, ""), all_arguments)
    assert done.returncode == 0, done.stderr
    assert resumed in done.stdout
    assert same_result(directory, variants(variant))
    assert without_times(directory) == without_times(variants(variant))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["checkpoint.write", "tracking.Tracker.draw"])
def test_what_rank_0_cannot_write_ends_all_ranks_with_one_line(what: str, shapes: Path, tmp_path: Path) -> None:
    patch = (
        "from cifar import checkpoint, record, tracking\n"
        "def step(rank, number): time.sleep(0.1)\n"  # or the small network would be through too soon
        "record.PICTURE_SECONDS = 0\n"
        "def full(*arguments): raise OSError(28, 'No space left on device', 'the/disk')\n"
        f"{what} = full"
    )
    more = ("--network", "small", "--augmentation-backend", "device", "--epochs", 50)
    done = ended(project(tmp_path, patch), arguments(shapes, tmp_path / "run", *more), launcher=TWO)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: error: ")]
    assert said == [
        "train.py: error: the/disk (No space left on device); make room there and start the same command again"
    ]
    state = json.loads((tmp_path / "run/status.json").read_text())
    assert (state["state"], state["reason"]) == ("failed", said[0].removeprefix("train.py: error: "))
    assert state["step"] < 100


@pytest.mark.slow
@pytest.mark.parametrize(("augment", "said"), [("albumentations", True), ("device", False)])
def test_a_run_that_waits_for_images_says_what_would_help(
    augment: str, said: bool, shapes: Path, tmp_path: Path
) -> None:
    patch = (
        "from cifar.data import loading\n"
        "for kind, makes in ((loading.WorkerDataset, '__getitems__'), (loading.DeviceDataset, '_batch')):\n"
        "    def late(self, *arguments, real=getattr(kind, makes)):\n"
        "        time.sleep(4)\n"  # four batches, of which some are made before the first step
        "        return real(self, *arguments)\n"
        "    setattr(kind, makes, late)"
    )
    more = ("--network", "small", "--augmentation-backend", augment, "--epochs", 1, "--peak-epoch", 0.5)
    done = ended(project(tmp_path, patch), arguments(shapes, tmp_path / "run", *more))
    assert done.returncode == 0, done.stderr
    spent = json.loads((tmp_path / "run" / "result.json").read_text())["seconds_of_this_attempt"]
    waiting, training = spent[record.WAITING], spent[record.TRAINING]
    assert waiting > record.LATE * (waiting + training)
    assert ("of training was waiting for images; --augmentation-backend device, in a new --run" in done.stdout) == said


# ---- refusals


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--network", "vgg"], "network 'vgg' is unknown; choose one of: "),
        (["--augmentation", "mixup"], "--augmentation 'mixup' is unknown; choose one of: "),
        (["--gradient-accumulation-steps", 5], "--global-batch-size 16 does not divide into 1 process(es) x 5"),
        (["--global-batch-size", 65], "--global-batch-size 65 is more than the 64 training images"),
        (["--data", "no/such/path"], "--data no/such/path does not exist"),
        (
            ["--resume", "no/such/checkpoint"],
            "--resume no/such/checkpoint: no/such/checkpoint/state.json: No such file",
        ),
    ],
)
def test_bad_input_is_one_line_exit_2_and_leaves_no_checkpoint(
    wrong: list[object], words: str, shapes: Path, train: Train, tmp_path: Path
) -> None:
    done = train(*arguments(shapes, tmp_path / "run", *wrong))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("train.py: error: ")
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()  # not even an attempt, which would end one that is training there


def test_a_precision_that_this_machine_lacks_is_refused(shapes: Path, train: Train, tmp_path: Path) -> None:
    done = train(*arguments(shapes, tmp_path / "run"), env={"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert done.returncode == 2
    assert "precision fp16 needs a GPU, and there is none" in done.stderr


def options(directory: Path) -> RunOptions:
    return parse_command_line(["--run", str(directory)])[1]


def check(directory: Path, *flags: str) -> None:
    recipe, given = parse_command_line(["--run", str(directory), *flags])
    run.check(given.run_dir, recipe, given.resume)


def test_a_run_directory_of_another_kind_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"another recipe: .*epochs \(3 there, 24 here\).*choose another --run"):
        check(finished)
    with pytest.raises(
        UserError, match=r"another recipe: augmentation_backend \('albumentations' there, 'device' here\)"
    ):
        check(finished, "--augmentation-backend", "device")
    with pytest.raises(UserError, match="is not empty, and --resume never needs an empty one; choose a new --run"):
        check(finished, "--resume", "never")
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):  # the same command, started again by a machine
        monkeypatch.setenv(name, "1")
        with pytest.raises(UserError, match="another recipe"):
            check(finished, "--resume", "never")
        monkeypatch.delenv(name)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        check(tmp_path)
    with pytest.raises(UserError, match="Not a directory; choose another --run"):
        check(tmp_path / "thesis.tex")
    check(tmp_path / "new", "--resume", "never")


def test_other_images_in_the_same_run_are_refused(finished: Path, tmp_path: Path) -> None:
    recipe = Recipe(**json.loads((finished / "recipe.json").read_text())["recipe"])
    with pytest.raises(UserError, match="holds a run on other images than --data"):
        run.start(options(finished), recipe, "another fingerprint", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to \(Not a directory\); choose another --run"):
        run.start(options(tmp_path / "file" / "run"), recipe, "fingerprint", 1)


def test_a_run_directory_that_is_not_writable_is_refused(finished: Path, disk: Disk) -> None:
    recipe = json.loads((finished / "recipe.json").read_text())
    (disk.path / "run").mkdir()
    shutil.copy(finished / "recipe.json", disk.path / "run")
    disk.remount("ro")
    for name, words in (("new", "Read-only file system"), ("run", "Permission denied")):
        with pytest.raises(UserError, match=rf"/{name} cannot be written to \({words}\); choose another --run"):
            run.start(options(disk.path / name), Recipe(**recipe["recipe"]), recipe["data_fingerprint"], 1)


def test_a_full_disk_is_one_line_and_training_goes_on_when_there_is_room(
    finished: Path, shapes: Path, train: Train, disk: Disk
) -> None:
    disk.remount("size=130m")  # room for the first checkpoint (79 MB) and not for the second
    directory = disk.path / "run"
    done = train(*arguments(shapes, directory), env=environment())
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"train.py: error: {directory}/checkpoints/step-0000004: checkpoint not written (No space")
    assert "Traceback" not in done.stderr
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-0000003"]
    assert json.loads((directory / "status.json").read_text())["state"] == "failed"
    disk.remount("size=600m")
    done = train(*arguments(shapes, directory), env=environment())
    assert done.returncode == 0, done.stderr
    assert same_result(directory, finished)


def test_a_loss_that_is_not_finite_is_refused_with_step_rate_and_last_checkpoint(
    finished: Path, shapes: Path, train: Train, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    (directory / "status.json").unlink()
    for name in ("step-0000012", "step-0000009"):
        shutil.rmtree(directory / "checkpoints" / name)
    # A checkpoint in order, but for one weight of which the losses' sum is infinite.
    path = directory / "checkpoints/step-0000008"
    weights = safetensors.torch.load_file(path / "model.safetensors")
    weights["linear.bias"][0] = 3e38
    content = safetensors.torch.save(weights)
    (path / "model.safetensors").write_bytes(content)
    state = json.loads((path / "state.json").read_text())
    state["sha256"] = {**state["sha256"], "model.safetensors": checkpoint.hashlib.sha256(content).hexdigest()}
    del state["sha256"]["state.json"]
    state["sha256"]["state.json"] = checkpoint._state_sum(state)
    (path / "state.json").write_text(json.dumps(state))

    done = train(*arguments(shapes, directory), env=environment())
    assert done.returncode == 2
    assert "error: loss inf in step 9 at learning rate 0.005; lower --peak-learning-rate" in done.stderr
    assert "last good checkpoint: " in done.stderr
    assert str(path) in done.stderr
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 8)
    assert "loss inf" in status["reason"]
    assert checkpoint.found(directory / "checkpoints") == [path]

"""Every command of the READMEs, run as it stands there, made short by flags at its end."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, SHAPES
from helpers import bench
from helpers.launching import free_port
from safetensors.numpy import load_file

from cifar.bench import __main__ as bench_program
from cifar.bench.context import Bench
from cifar.bench.measurement import Measurement

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
BENCH = (ROOT / "cifar/bench/README.md").read_text()
OTHERS = [(ROOT / folder / "README.md").read_text() for folder in ("cifar/data", "cifar/explain", "cifar/app")]
BLOCKS = re.findall(r"```sh\n(.*?)```", "\n".join((README, *OTHERS, BENCH)), re.DOTALL)
# Each once, without the words behind it; test_slurm.py has the commands of slurm/README.md.
COMMANDS = list(dict.fromkeys(line.partition("  #")[0].rstrip() for block in BLOCKS for line in block.splitlines()))
INSTALLS = [line for line in COMMANDS if line.startswith("pip install")]  # .ci/run begins with the second of them
APP, EXPORT = (line for line in COMMANDS if "cifar.app" in line)
MODEL, SHAPED = (line for line in COMMANDS if "cifar.bench.scaling_model" in line)
CURVES = next(line for line in COMMANDS if "cifar.bench.curves" in line)
LOAD = next(line for line in COMMANDS if "cifar.bench.app" in line)
TENSORBOARD = next(line for line in COMMANDS if line.startswith("tensorboard"))
MULTI_NODE = next(line for line in COMMANDS if "multi_node.yaml" in line)
# What stands in sentences and tables, there and in the two files whose blocks other modules run.
FURTHER = [(ROOT / name).read_text() for name in ("slurm/README.md", ".github/CONTRIBUTING.md")]
SENTENCES = re.sub(r"```.*?```", "", "\n".join((README, *OTHERS, BENCH, *FURTHER)), flags=re.DOTALL)
INLINE = list(dict.fromkeys(" ".join(code.split()) for code in re.findall(r"`([^`]+)`", SENTENCES)))
MODULES = ("predict", "export", "app", "bench", "bench.app", "bench.curves", "bench.scaling_model")
PROGRAMS = (["train.py"], ["explain.py"], *(["-m", f"cifar.{name}"] for name in MODULES))
FLAG = r"(?<![\w-])--[a-z][a-z_-]*"
# Flags of programs that are not installed everywhere: sbatch, scancel, Pyxis, Apptainer; and pytest's.
FOREIGN = {"--partition", "--account", "--time", "--nodes", "--gpus-per-node", "--cpus-per-gpu", "--mem-per-gpu",
           "--batch", "--signal", "--container-image", "--nv", "--dist"}  # fmt: skip


def shortened(line: str, shapes: Path, run: Path) -> list[str]:
    """The command's words, on few small images in few steps; a later flag wins over an earlier one.

    They are for a copy of the project, which has the network `small`: bf16, which a launch configuration may ask for,
    is slow where it is emulated. Importing Albumentations takes seconds, too.
    """
    words = shlex.split(line.rpartition("&& ")[2])
    executable = Path(sys.executable).parent / words[0]
    short = ["--epochs", "2", "--peak-epoch", "1", "--global-batch-size", "16", "--run", str(run)]
    network = ["--network", "whitened" if "speedrun" in words else "small"]
    data = [] if "digits" in words else ["--data", str(shapes), "--augmentation-backend", "device"]
    return [str(executable), *words[1:], *([] if "--help" in words else short + network + data)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def test_it_can_be_read_in_some_minutes_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 180
    for path in [ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("cifar/*/README.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path}: {link}"


def test_it_begins_with_the_two_commands_a_newcomer_needs() -> None:
    assert COMMANDS[0] == "pip install -e . && accelerate launch train.py --recipe digits"
    extras = [f"pip install -e '.[{extra}]'" for extra in ("export", "app", "test")]
    assert [COMMANDS[0], *extras[:2], f"{extras[2]} && pytest"] == INSTALLS


def test_what_the_app_needs_comes_with_it_and_with_the_tests() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["app"][0].startswith("gradio>=")
    assert "cifar[app,export]" in extras["test"]


def test_every_command_is_run_by_a_test_here() -> None:
    run = {*INSTALLS, APP, EXPORT, MODEL, SHAPED, CURVES, LOAD, TENSORBOARD, MULTI_NODE}
    kinds = ("train.py", "explain.py", "cifar.bench ", "cifar.predict", "cifar.export")
    run |= {line for line in COMMANDS if any(kind in f"{line} " for kind in kinds)}
    assert [line for line in COMMANDS if line not in run] == []


def test_every_flag_that_is_named_exists() -> None:
    known = set(launch_command_parser()._option_string_actions)  # its help leaves some out
    for program in PROGRAMS:
        words = [sys.executable, *program, "--help"]
        helped = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        known |= set(re.findall(FLAG, helped))
    assert set(re.findall(FLAG, "\n".join(INLINE))) - known == FOREIGN


@pytest.mark.parametrize(
    "line", [code for code in INLINE if code.startswith(("accelerate launch ", "python -m cifar"))], ids=str
)
def test_a_command_in_a_sentence_or_table_is_understood(line: str) -> None:
    words = shlex.split(line)[1:]
    if line.startswith("accelerate launch "):
        launched = launch_command_parser().parse_args(words[1:])
        words = [launched.training_script, *launched.training_script_args]
    # Refused for nothing but a flag that does not exist.
    done = subprocess.run(
        [sys.executable, *words, "--nope"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    assert re.fullmatch(r"[\w.]+: error: unrecognized arguments: --nope; see .*\n", done.stderr), done.stderr


def test_the_command_of_the_gpu_tests_finds_some() -> None:
    (line,) = (code for code in INLINE if code.startswith("pytest -m gpu -n"))
    without = {name: value for name, value in environment().items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(line), "--collect-only", "-q", "tests/test_gpu.py"], cwd=ROOT, env=without,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d tests collected", done.stdout), done.stdout


def test_the_markers_are_those_that_pytest_knows() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    named = {marker for code in INLINE for marker in re.findall(r"^(?:pytest )?-m (\w+)", code)}
    assert named == {marker.partition(":")[0] for marker in settings["markers"]}


def test_without_a_part_all_parts_of_the_table_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (line,) = (line for line in COMMANDS if line.endswith("cifar.bench"))
    measured = []

    def instead(name: str) -> Callable[[Bench], list[Measurement]]:
        def measure(bench: Bench) -> list[Measurement]:
            bench.runs_on({"device": "CPU", "threads": 2, "torch": "2", "gpus": 0, "native_bf16": False})
            measured.append(name)
            return []

        return measure

    parts = {name: (instead(name), text) for name, (_, text) in bench_program.PARTS.items()}
    monkeypatch.setattr(bench_program, "PARTS", parts)
    bench_program.measure(bench_program.parse_command_line(shlex.split(line)[3:]), tmp_path)
    table = BENCH[BENCH.index("| part |") :].partition("\n\n")[0]
    assert measured == ["limit", *re.findall(r"^\| `(\w+)`", table, re.MULTILINE)]


@pytest.fixture(scope="module")
def finished(copied_project: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run."""
    run = tmp_path_factory.mktemp("readme") / "runs" / "short"
    subprocess.run(shortened("python train.py", shapes, run), cwd=copied_project, capture_output=True, check=True)
    return run


@pytest.fixture(scope="module")
def finished_resnet(copied_project: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with the layers that a command names."""
    run = tmp_path_factory.mktemp("readme") / "runs" / "resnet"
    words = [*shortened("python train.py", shapes, run), "--network", "resnet"]
    subprocess.run(words, cwd=copied_project, capture_output=True, check=True)
    return run


@pytest.mark.parametrize("line", [line for line in COMMANDS if "train.py" in line and line != MULTI_NODE], ids=str)
def test_a_command_does_what_it_says(line: str, copied_project: Path, shapes: Path, tmp_path: Path) -> None:
    words = shortened(line, shapes, tmp_path / "run")
    if "digits" in words and "--help" not in words:
        words += ["--epochs", "1", "--peak-epoch", "0.5", "--global-batch-size", "479"]  # 3 steps
    done = subprocess.run(
        words, cwd=copied_project, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    if "--help" in words:
        assert "usage: train.py" in done.stdout
    else:
        assert "finished: test accuracy" in done.stdout
        assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("line", [line for line in COMMANDS if "explain.py" in line], ids=str)
def test_a_command_explains(line: str, copied_project: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    words = shlex.split(line)
    finished: Path = request.getfixturevalue("finished_resnet" if "--layer" in words else "finished")
    if "--true" in words:  # a class that this run mistakes
        predicted = load_file(finished / "predictions.safetensors")
        mistaken = predicted["labels"][predicted["predictions"][-1] != predicted["labels"]]
        words[words.index("--true") + 1], words[words.index("--count") + 1] = sorted(SHAPES)[mistaken[0]], "1"
    if "--help" not in words:
        words[words.index("--run") + 1] = str(finished)
        words += ["--output", str(tmp_path / "explain")]
    if "--compare" in words:
        words[words.index("--compare") + 1] = str(finished)
    executable = Path(sys.executable).parent / words[0]
    done = subprocess.run(
        [executable, *words[1:]], cwd=copied_project, env=environment(), capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "--help" in words:
        assert "usage: explain.py" in done.stdout
    else:
        assert {path.name for path in (tmp_path / "explain").iterdir()} == {
            "report.html", "misclassified.csv", "gallery.png", "cam.png", "maps", "confusion.png", "calibration.png",
            "result.json", *(["corruptions.png"] if "--corruptions" in words else []),
        }  # fmt: skip


def test_pictures_are_classified(finished: Path, copied_project: Path, shapes: Path, tmp_path: Path) -> None:
    (line,) = (line for line in COMMANDS if "cifar.predict" in line)
    words = shlex.split(line)
    words[words.index("--run") + 1] = str(finished)
    shutil.copytree(shapes / "test", tmp_path / "photos")
    shutil.copy(next(shapes.rglob("*.png")), tmp_path / "scan.png")
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(copied_project)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 22 + 1
    assert all(re.fullmatch(r"(photos/\w+/\d+|scan)\.png  \w+ [01]\.\d{3}", line) for line in lines), lines


def test_a_network_is_exported(finished: Path, copied_project: Path, tmp_path: Path) -> None:
    (line,) = (line for line in COMMANDS if "cifar.export" in line)
    words = shlex.split(line)
    words[words.index("--run") + 1] = str(finished)
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(copied_project)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("resnet.onnx: ")
    assert (tmp_path / "resnet.onnx").is_file()


def test_the_app_answers_at_the_address_of_the_readme(finished: Path, copied_project: Path) -> None:
    port = str(free_port())
    words = shlex.split(APP)
    words[words.index("--run") + 1] = str(finished)
    server = subprocess.Popen(
        [Path(sys.executable).parent / words[0], *words[1:], "--port", port],
        cwd=copied_project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        opened = server.stdout.readline()
        assert opened.startswith("open http://127.0.0.1:"), opened + server.stdout.read()
        assert (
            "http://127.0.0.1:7860"
            in subprocess.run(
                [sys.executable, "-m", "cifar.app", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
        )
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
            assert "gradio" in response.read().decode()
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()
    assert server.returncode == 0


def test_a_space_is_written(finished: Path, copied_project: Path, tmp_path: Path) -> None:
    words = shlex.split(EXPORT)
    words[words.index("--run") + 1], words[words.index("--export-space") + 1] = str(finished), str(tmp_path / "space")
    executable = Path(sys.executable).parent / words[0]
    subprocess.run(
        [executable, *words[1:]], cwd=copied_project, env=environment(), capture_output=True, timeout=900, check=True
    )
    assert (tmp_path / "space" / "app.py").is_file()


@pytest.mark.parametrize("line", [line for line in COMMANDS if "cifar.bench " in line + " "], ids=str)
def test_a_command_measures(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)
    # Of everything only what is cheap: test_bench.py has the rest.
    parts = [word for word in words if word in ("step", "input")] or ["explain"]
    cheap = [] if "step" in words else [*parts, "--recipe", "speedrun"]
    words += ["--recipe", "digits", "--repeats", "2", "--seconds", "0.01", *cheap]
    assert words[:3] == ["python", "-m", "cifar.bench"]
    environment_ = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*bench.command("cifar.bench"), *words[3:]], cwd=tmp_path, env=environment_, capture_output=True, text=True,
        timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = {row.split()[0] for row in done.stdout.splitlines()[2:]}
    assert measured == {"limit", *parts}
    assert {path.name for path in tmp_path.iterdir()} == ({"bench.json"} if "--json" in words else set())


def test_the_model_is_computed() -> None:
    words = shlex.split(MODEL)
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in done.stdout.splitlines() if line.lstrip()[:1].isdigit()]
    assert [int(row[0]) for row in rows] == 2 * [8, 16, 32, 64, 128, 256, 512, 1024]
    assert rows[7][1] == "refused:"  # the batch has fewer images than there are GPUs
    fixed, growing = ([int(row[-1].rstrip("%")) for row in half] for half in (rows[:7], rows[8:]))
    assert fixed == sorted(fixed, reverse=True)
    assert all(low < high <= 100 for low, high in zip(fixed, growing, strict=False))
    # And the bench's README shows it.
    linear = {gpus: [row[-1] for row in rows if row[0] == gpus] for gpus in ("8", "16", "64", "256")}
    shown = [
        line.strip("| ").split(" | ") for line in BENCH.splitlines() if line.startswith(("| the recipe's", "| 512"))
    ]
    assert [[cell.replace(" ", "") for cell in cells[1:5]] for cells in shown] == [
        list(row) for row in zip(*linear.values(), strict=True)
    ]
    assert rows[-1][0] == "1024"
    assert shown[1][-1].replace(" ", "") == rows[-1][-1]


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and /dev/net/tun")
def test_the_model_is_compared_with_a_shaped_network(tmp_path: Path) -> None:
    sudo, *python, module = shlex.split(SHAPED)[:4]
    assert [sudo, *python] == ["sudo", "python", "-m"]
    done = subprocess.run(
        [*bench.command(module), *shlex.split(SHAPED)[4:], "--repeats", "1", "--steps", "1"], cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[1:-1]
    assert [row.split()[-1] for row in rows[:3]] == ["fitted"] * 3
    assert len(rows[3:]) >= 4
    assert all(row.endswith("%") for row in rows[3:])
    assert list(tmp_path.iterdir()) == []


def test_runs_are_drawn_together(finished: Path, tmp_path: Path) -> None:
    words = shlex.split(CURVES)
    words[3 : words.index("--output")] = [str(finished), str(finished)]
    executable = Path(sys.executable).parent / words[0]
    subprocess.run([executable, *words[1:]], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(ROOT)}, check=True)
    assert [path.name for path in tmp_path.iterdir()] == [words[-1]]


def test_the_app_is_measured(finished: Path, copied_project: Path, tmp_path: Path) -> None:
    words = shlex.split(LOAD)
    words[words.index("--run") + 1] = str(finished)
    words += ["--starts", "1", "--answers", "2", "--requests", "5", "--json", str(tmp_path / "bench.json")]
    executable = Path(sys.executable).parent / words[0]
    done = subprocess.run(
        [executable, *words[1:]], cwd=copied_project, env=environment(), capture_output=True, text=True, timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {row.split()[0] for row in done.stdout.splitlines()[1:]} == {"app"}
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["unit"], row["n"]) for row in measured] == [("s", 1), ("s", 2), ("s", 20), ("MB", 5)]
    assert all(value > 0 for row in measured for value in row["values"])


def test_two_machines_train_together(copied_project: Path, shapes: Path, tmp_path: Path) -> None:
    port = str(free_port())
    launchers = []
    for rank in ("0", "1"):
        words = shortened(MULTI_NODE, shapes, tmp_path / "run")
        words[words.index("--machine_rank") + 1] = rank
        words[words.index("--main_process_ip") + 1] = "127.0.0.1"
        words[words.index("--main_process_port") + 1] = port
        words[words.index("train.py") : words.index("train.py")] = ["--num_processes", "2"]
        launchers.append(
            subprocess.Popen(
                words, cwd=copied_project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )
        )  # fmt: skip
    outputs = [launcher.communicate(timeout=900)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    together = "".join(outputs)
    assert "2 processes" in together
    assert together.count("finished: test accuracy") == 1


def test_tensorboard_serves_a_run(finished: Path) -> None:
    words = shlex.split(TENSORBOARD)
    server = subprocess.Popen(
        [Path(sys.executable).parent / words[0], *words[1:], "--port", "0"],
        cwd=finished.parents[1], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = next(match[0] for line in server.stdout if (match := re.search(r"http://localhost:\d+/", line)))
        for path, expected in (("data/runs", "short"), ("data/plugin/scalars/tags", "epoch/test_accuracy")):
            deadline, answer = time.monotonic() + 120, ""
            while expected not in answer:  # it reads the files after it has begun to answer
                assert time.monotonic() < deadline, answer
                time.sleep(0.2)
                with urllib.request.urlopen(address + path, timeout=60) as response:
                    answer = response.read().decode()
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()

"""What only several GPUs of one machine can show, each with a rank of its own over NCCL.

    pytest -m multigpu -n 0 -s

REHEARSE_GPU_TESTS=1 runs the same tests on CPUs with two processes over gloo, to find mistakes in the tests.
"""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import safetensors.numpy
import test_parallel
from conftest import REHEARSAL, ROOT, command, gpus
from test_gpu import DIGITS, STEPS, environment, errors, result, status, wait_for

pytestmark = pytest.mark.multigpu

CONFIG = f"{ROOT}/accelerate_configs/{'cpu_2proc' if REHEARSAL else 'multi_gpu'}.yaml"


@pytest.fixture(scope="module")
def ranks() -> int:
    """One for each GPU, as far as they divide the digits' batches of 64."""
    return 2 if REHEARSAL else next(n for n in range(gpus(), 0, -1) if 64 % n == 0)


def launcher(ranks: int) -> tuple[str, ...]:
    return ("--config_file", CONFIG, "--mixed_precision", "no", "--num_processes", str(ranks),
            "--main_process_port", "0")  # fmt: skip


def started(run: Path, ranks: int, *more: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(command(ROOT / "train.py", *DIGITS, "--run", run, *more, launcher=launcher(ranks)),
                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def test_batches_gradient_and_evaluation_are_those_of_one_gpu(ranks: int, shapes: Path, tmp_path: Path) -> None:
    for name in ("one", "all"):
        (tmp_path / name).mkdir()
    (alone,) = test_parallel.parity(shapes, tmp_path / "one", 1, *launcher(1), env=environment())
    found = test_parallel.parity(shapes, tmp_path / "all", 1, *launcher(min(ranks, 16)), env=environment())
    test_parallel.assert_the_same(found, alone)


def test_all_gpus_learn_the_digits(ranks: int, tmp_path: Path) -> None:
    for number in (1, ranks):
        run = tmp_path / str(number)
        process = started(run, number)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
        assert (result(run)["steps"], result(run)["world_size"]) == (STEPS, number)
        assert float(str(result(run)["test_accuracy"])) > 0.9
        print(f"{number} ranks: {result(run)['images_per_second']:.0f} images/s")


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_the_same_command_gives_the_same_bytes(graph: str, ranks: int, tmp_path: Path) -> None:
    for name in ("first", "second"):
        process = started(tmp_path / name, ranks, "--deterministic", "--cuda-graph", graph)
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
        assert "no CUDA graph" not in output
    ours, theirs = (safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_a_killed_rank_ends_all_and_the_same_command_goes_on(ranks: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = started(run, ranks, "--epochs", 400)
    wait_for((run / "checkpoints/step-0000005").exists, process)
    victim = max(
        (child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()),
        key=lambda child: int(child.environ()["RANK"]),
    )
    victim.send_signal(signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert f"rank {ranks - 1} on" in errors(output)[0]
    assert status(run)["state"] == "failed"
    again = started(run, ranks, "--epochs", 400)
    wait_for(lambda: status(run)["state"] == "running", again)
    again.send_signal(signal.SIGTERM)
    output = again.communicate(timeout=120)[0]
    assert "resuming from" in output


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no GPU")
def test_one_process_too_many_is_one_line(tmp_path: Path) -> None:
    count = gpus()
    process = started(tmp_path / "run", count + 1, "--global-batch-size", count + 1)
    output = process.communicate(timeout=120)[0]
    assert len(errors(output)) == 1
    assert f"has {count} GPU(s) for {count + 1} processes" in errors(output)[0]

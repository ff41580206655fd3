"""What only several GPUs of one machine can show, each with a rank of its own over NCCL.

    pytest -m multigpu -n 0 -s

REHEARSE_GPU_TESTS=1 runs the same tests on CPUs with two processes over gloo, to find mistakes in the tests.
"""

import json
import subprocess
from pathlib import Path

import pytest
import test_parallel
from conftest import REHEARSAL, ROOT, command, gpus
from test_gpu import DIGITS, STEPS, environment, errors, patched, result, status

from cifar.bench import scaling_model

pytestmark = pytest.mark.multigpu

TRAIN = ROOT / "train.py"
CONFIG = f"{ROOT}/accelerate_configs/{'cpu_2proc' if REHEARSAL else 'multi_gpu'}.yaml"


@pytest.fixture(scope="module")
def ranks() -> int:
    """One for each GPU, as far as they divide the digits' batches of 64."""
    return 2 if REHEARSAL else next(n for n in range(gpus(), 0, -1) if 64 % n == 0)


def launcher(ranks: int) -> tuple[str, ...]:
    return ("--config_file", CONFIG, "--mixed_precision", "no", "--num_processes", str(ranks),
            "--main_process_port", "0")  # fmt: skip


def started(run: Path, ranks: int, *more: object, script: Path = TRAIN) -> "subprocess.Popen[str]":
    return subprocess.Popen(command(script, *DIGITS, "--run", run, *more, launcher=launcher(ranks)),
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


def test_more_gpus_are_as_fast_as_the_model_says(ranks: int, tmp_path: Path) -> None:
    rates = {}
    for number in (1, ranks):  # each with 64 images a rank, and some 90 steps
        run = tmp_path / str(number)
        process = started(run, number, "--global-batch-size", 64 * number, "--epochs", number * (1 if REHEARSAL else 4),
                          "--checkpoint-every", 500, "--cuda-graph", "auto")  # fmt: skip
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output
        rates[number] = float(str(result(run)["images_per_second"]))
    parts = scaling_model.flat(
        scaling_model.buckets(json.loads((run / "recipe.json").read_text())["recipe"]["network"])
    )
    expected = 64 * ranks / scaling_model.on_gpus(ranks, 64 / rates[1], parts, scaling_model.Machine()).seconds
    print(f"1 rank: {rates[1]:,.0f} images/s; {ranks} ranks: {rates[ranks]:,.0f}, the model says {expected:,.0f}")
    assert REHEARSAL or rates[ranks] > expected / 2  # it assumes NVLink; without, measure your own


KILLED = (
    "import signal, time\n"
    "from pathlib import Path\n"
    "from cifar import optim\n"
    "real, count = optim.set_lr, 0\n"
    "def set_lr(*arguments):\n"
    "    global count\n"
    "    count += 1\n"
    "    if count == 20 and os.environ['RANK'] == str(int(os.environ['WORLD_SIZE']) - 1):\n"
    "        while not Path(CHECKPOINT).exists(): time.sleep(0.01)\n"
    "        os.kill(os.getpid(), signal.SIGKILL)\n"
    "    real(*arguments)\n"
    "optim.set_lr = set_lr"
)


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_a_killed_rank_ends_all_and_the_same_command_goes_on_to_the_same_bytes(
    graph: str, ranks: int, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ("--deterministic", "--cuda-graph", graph)
    script = patched(tmp_path, f"CHECKPOINT = {str(killed / 'checkpoints/step-0000015')!r}\n{KILLED}")
    for run, program in ((whole, TRAIN), (killed, script), (killed, TRAIN)):
        process = started(run, ranks, *arguments, script=program)
        output = process.communicate(timeout=600)[0]
        assert "no CUDA graph" not in output
        assert (process.returncode == 0) == (program == TRAIN), output
        if program == script:
            assert {f"rank {ranks - 1} on" in line for line in errors(output)} == {True}
            assert status(run)["state"] == "failed"
    assert "resuming from" in output
    for name in ("model.safetensors", f"checkpoints/step-{STEPS:07d}/optimizer.safetensors", "predictions.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no GPU")
def test_one_process_too_many_is_one_line(tmp_path: Path) -> None:
    count = gpus()
    process = started(tmp_path / "run", count + 1, "--global-batch-size", count + 1)
    output = process.communicate(timeout=120)[0]
    assert len(errors(output)) == 1
    assert f"has {count} GPU(s) for {count + 1} processes" in errors(output)[0]

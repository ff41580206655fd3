"""Several processes through the real launcher do what one does (gloo, on CPUs)."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Train, command
from helpers.launching import CPU_2PROC, project
from safetensors.torch import load_file

from cifar.data import sampler

pytestmark = pytest.mark.slow


def parity(
    data: Path, output: Path, accumulation_steps: int, *launcher: str, env: dict[str, str] | None = None
) -> list[dict[str, torch.Tensor]]:
    """What each rank of helpers/parity.py wrote."""
    arguments = command(ROOT / "tests" / "helpers" / "parity.py", data, output, accumulation_steps, launcher=launcher)
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    files = sorted(output.glob(f"*-{accumulation_steps}-*.safetensors"))
    return [load_file(file) for file in files]


def assert_the_same(ranks: list[dict[str, torch.Tensor]], alone: dict[str, torch.Tensor]) -> None:
    """What the ranks were given makes up what one process was, and what they computed is what it computed."""
    for name in (name for name in alone if name.startswith(("images", "labels"))):
        assert torch.equal(torch.cat([rank[name] for rank in ranks]), alone[name]), name
    for rank in ranks:
        # Sums of float32 in another order: equal but for rounding.
        for name in ("gradient", "totals", "probabilities", "evaluation"):
            torch.testing.assert_close(rank[name], alone[name], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    (rank,) = parity(shapes, tmp_path_factory.mktemp("one"), 1)
    return rank


@pytest.mark.parametrize(("launcher", "accumulation_steps"), [(CPU_2PROC, 1), (CPU_2PROC, 2), ((), 4)])
def test_batches_gradient_and_evaluation_are_those_of_one_process(
    launcher: tuple[str, ...], accumulation_steps: int, alone: dict[str, torch.Tensor], shapes: Path, tmp_path: Path
) -> None:
    ranks = parity(shapes, tmp_path, accumulation_steps, *launcher)
    assert len(ranks) == (2 if launcher else 1)
    assert_the_same(ranks, alone)


RECORDING = ROOT / "tests/helpers/recording.py"
SMALL = ("--network", "small")
ON_THE_DEVICE = ("--augmentation-backend", "device")  # without loader workers


def arguments(shapes: Path, run: Path, *more: object) -> list[object]:
    return ["--data", shapes, "--run", run, "--epochs", 3, "--peak-epoch", 1, "--global-batch-size", 16,
            "--checkpoint-every", 3, *more]  # fmt: skip


def ended(script: Path, arguments: list[object], **env: str) -> subprocess.CompletedProcess[str]:
    """Two processes after their end."""
    return subprocess.run(
        command(script, *arguments, launcher=CPU_2PROC), env={**os.environ, **env},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(copied_project: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    run = tmp_path_factory.mktemp("parallel") / "run"
    done = ended(copied_project / "train.py", arguments(shapes, run, *SMALL, *ON_THE_DEVICE))
    assert done.returncode == 0, done.stderr
    assert "CPU, 2 processes" in done.stdout
    assert "global batch 16 (8 a process)" in done.stdout
    assert done.stdout.count("finished: ") == 1
    return run


def test_two_processes_train_one_network_and_evaluate_every_image_once(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert (result["world_size"], result["steps"], result["precision"]) == (2, 12, "no")
    tensors = load_file(finished / "predictions.safetensors")
    assert tensors["predictions"].shape == (3, 22)
    right = tensors["predictions"][-1] == tensors["labels"]
    assert result["test_accuracy"] == pytest.approx(right.float().mean().item())
    assert len((finished / "metrics.jsonl").read_text().splitlines()) == 3


def test_two_processes_run_a_speedrun_with_compressed_gradients(shapes: Path, train: Train, tmp_path: Path) -> None:
    more = ("--recipe", "speedrun", "--gradient-compression", "bf16")
    done = train(*arguments(shapes, tmp_path / "run"), *more, launcher=CPU_2PROC)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["world_size"], result["steps"]) == (2, 12)
    assert result["test_accuracy_tta"] > 1 / 2  # four shapes: it has learned something
    weights = load_file(tmp_path / "run" / "model.safetensors")
    state = load_file(tmp_path / "run" / "checkpoints/step-0000012/optimizer.safetensors")
    assert not any(name.startswith("whitening") for name in state)  # set once, and not learned
    positive, negative = weights["whitening.weight"].split(12)
    assert torch.equal(positive, -negative)
    assert positive.abs().sum() > 0
    # Three quarters are 9 steps: from there on the early layers are as they were, and the rest goes on learning.
    earlier = load_file(tmp_path / "run" / "checkpoints/step-0000009/model.safetensors")
    kept = {name for name, weight in weights.items() if torch.equal(weight, earlier[name])}
    learnt = {name.removesuffix(".momentum_buffer") for name in state}
    assert kept & learnt == {name for name in learnt if name.startswith("stage1")}


def test_a_rank_for_which_the_other_waits_is_named_once(shapes: Path, tmp_path: Path) -> None:
    script = project(tmp_path, "def step(rank, number):\n    if rank == 1: time.sleep(0.5)")
    more = (*SMALL, *ON_THE_DEVICE, "--global-batch-size", 6, "--epochs", 2)  # 10 steps each
    done = ended(script, arguments(shapes, tmp_path / "run", *more))
    assert done.returncode == 0, done.stderr
    named = [line for line in done.stdout.splitlines() if " is slow: its own time per step is " in line]
    assert len(named) == 1
    assert named[0].startswith(f"rank 1 on {os.uname().nodename} ")
    quick, slow = json.loads((tmp_path / "run" / "result.json").read_text())["step_seconds_of_ranks"]
    assert 0 < quick < 0.5 <= slow
    each = f"rank 1 {1000 * slow:,.2f} ms, rank 0 {1000 * quick:,.2f} ms"
    assert f"own time per step, slowest first: {each}\n" in done.stdout


def test_two_processes_that_are_stopped_go_on_to_the_same_bytes(
    finished: Path, copied_project: Path, shapes: Path, tmp_path: Path
) -> None:
    run, slowly = tmp_path / "run", tmp_path / "slowly"
    script, all_arguments = copied_project / "train.py", arguments(shapes, run, *SMALL, *ON_THE_DEVICE)
    slowly.touch()
    running = subprocess.Popen(
        command(script, *all_arguments, launcher=CPU_2PROC), env={**os.environ, "SLOWLY": str(slowly)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("epoch 1/3"):
            running.terminate()  # the launcher passes it on to both ranks
            break
    output = running.communicate(timeout=900)[0]
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted", output
    assert 4 <= status["step"] < 12
    done = ended(script, all_arguments)
    assert done.returncode == 0, done.stderr
    assert f"resuming from {run / 'checkpoints'}/step-{status['step']:07d}" in done.stdout
    assert (run / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    ours, theirs = (load_file(path / "checkpoints/step-0000012/optimizer.safetensors") for path in (run, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_with_other_numbers_of_processes_at_the_same_batches(shapes: Path, tmp_path: Path) -> None:
    outputs, slowly = [], tmp_path / "slowly"
    slowly.touch()
    for ranks, stop_at in ((4, 3), (2, 6), (1, None)):
        launcher = (*CPU_2PROC, "--num_processes", str(ranks)) if ranks > 1 else ("--mixed_precision", "no")
        process = subprocess.Popen(
            command(RECORDING, *arguments(shapes, tmp_path / "run", *SMALL), launcher=launcher),
            env={**os.environ, "RECORD": str(tmp_path), "SLOWLY": str(slowly)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if stop_at:
            while not list((tmp_path / "run" / "checkpoints").glob(f"step-*{stop_at}")):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.05)
            process.terminate()
        else:
            slowly.unlink()
        outputs.append(process.communicate(timeout=900)[0])
    assert "finished: test accuracy" in outputs[-1]
    assert (
        "processes: 4 before, 2 now, so 4 images a process before, 8 now; same batches, but batch-norm statistics are "
        "per process, and the weights will not be equal bit for bit"
    ) in outputs[1]
    assert "processes: 2 before, 1 now, so 8 images a process before, 16 now" in outputs[2]

    taken: dict[int, set[int]] = {ranks: set() for ranks in (4, 2, 1)}
    for ranks, steps in taken.items():
        shares = [
            dict(json.loads(line) for line in (tmp_path / f"{ranks}-{rank}.jsonl").read_text().splitlines())
            for rank in range(ranks)
        ]
        for step in set.intersection(*(set(share) for share in shares)):  # loaders draw some batches ahead
            together = [tuple(sample) for share in shares for sample in share[step]]
            expected = sampler.batch(seed=0, step=step, images=64, global_batch_size=16)
            assert together == list(zip(*expected, strict=True))
            steps.add(step)
    assert set.union(*taken.values()) == set(range(12))
    assert min(taken[2]) >= 3
    assert min(taken[1]) >= 6


def test_a_user_error_ends_all_ranks_with_one_line(shapes: Path, train: Train, tmp_path: Path) -> None:
    done = train(*arguments(shapes, tmp_path / "run"), "--gradient-accumulation-steps", 3, launcher=CPU_2PROC)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "train.py: error" in line]
    assert len(lines) == 1
    assert "--global-batch-size 16 does not divide into 2 process(es) x 3 accumulation step(s)" in lines[0]
    assert "exitcode: 2" in " ".join(done.stderr.split()) or "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()

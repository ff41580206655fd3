"""What a launch says about threads, devices and settings is taken up, or refused in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, Train, command
from helpers.launching import project
from helpers.networks import small
from safetensors.torch import load_file

from cifar import launch, models

pytestmark = pytest.mark.slow

CORES = len(os.sched_getaffinity(0))
TWO = ("--config_file", str(ROOT / "accelerate_configs/cpu_2proc.yaml"), "--main_process_port", "0")
FLAG = "--num_cpu_threads_per_process"


def output_of(
    tmp_path: Path, code: str, launcher: tuple[str, ...] = (), before: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """What a program says that starts as train.py does."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\nfrom cifar import launch\n"
        f"from cifar.errors import UserError\n{code}\n"
    )
    return subprocess.run(
        [*before, *command(script, launcher=launcher)], env={**os.environ, **env},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


THREADS = (
    "import os\nlaunch.start()\n"
    "said = f'threads {torch.get_num_threads()}, GPUs {os.environ[\"CUDA_VISIBLE_DEVICES\"]}\\n'\n"
    "os.write(1, said.encode())\n"  # in one piece
)


@pytest.mark.parametrize(
    ("launcher", "env", "expected"),
    [
        ((), {}, CORES),
        ((), {"OMP_NUM_THREADS": "3"}, 3),
        (("--mixed_precision", "no"), {}, CORES),
        (("--cpu",), {}, CORES),
        (("--cpu", FLAG, "1"), {}, 1),
        (("--mixed_precision", "no", f"{FLAG}=3"), {}, 3),
        (("--mixed_precision", "no", FLAG.replace("_", "-"), "3"), {}, 3),
        (("--mixed_precision", "no"), {"OMP_NUM_THREADS": "3"}, 3),
        (TWO, {}, max(1, CORES // 2)),
        ((*TWO, FLAG, "3"), {}, 3),
    ],
)
def test_threads_are_all_cores_or_as_many_as_were_asked_for_and_two_cpu_processes_see_no_gpu(
    launcher: tuple[str, ...], env: dict[str, str], expected: int, tmp_path: Path
) -> None:
    done = output_of(tmp_path, THREADS, launcher, **env)
    said = [line for line in done.stdout.splitlines() if line.startswith("threads")]
    two = launcher[: len(TWO)] == TWO
    gpus = "-1,-1" if two else os.environ["CUDA_VISIBLE_DEVICES"]  # by the configuration; the tests' own
    assert said == [f"threads {expected}, GPUs {gpus}"] * (2 if two else 1), done.stderr


LIMITS = {"100000 100000": 1, "50000 100000": 1, "max 100000": CORES}
# A process for each, forked once torch has been imported.
LIMITED = f"""
import os
from pathlib import Path
for limit in {list(LIMITS)}:
    Path("/sys/fs/cgroup/cpu.max").write_text(limit)
    if os.fork() == 0:
        launch.start()
        print("threads", torch.get_num_threads(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_threads_keep_to_a_containers_limit(tmp_path: Path) -> None:
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("only root can mount a file system, and not in every container")
    mounted = 'mount -t tmpfs tmpfs /sys/fs/cgroup && exec "$@"'
    done = output_of(tmp_path, LIMITED, before=("unshare", "-m", "sh", "-c", mounted, "sh"))
    assert done.stdout == "".join(f"threads {threads}\n" for threads in LIMITS.values()), done.stderr


MEGATRON = (
    "distributed_type: MEGATRON_LM\nnum_processes: 1\nmegatron_lm_config: "
    "{megatron_lm_tp_degree: 1, megatron_lm_pp_degree: 1, megatron_lm_gradient_clipping: 1.0}\n"
)
FSDP = "distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\nnum_processes: "


@pytest.mark.parametrize(
    ("config", "what", "instead"),
    [
        (f"{FSDP}2\n", "FSDP", "cpu_2proc"),
        (f"{FSDP}1\nparallelism_config: {{parallelism_config_dp_shard_size: 2}}\n", "FSDP", "cpu"),
        (MEGATRON, "Megatron-LM", "cpu"),
    ],
)
def test_a_leftover_configuration_is_refused_in_one_line(
    config: str, what: str, instead: str, train: Train, tmp_path: Path
) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text(f"{config}num_machines: 1\nmixed_precision: 'no'\n")
    done = train("--recipe", "digits", "--run", tmp_path / "run", launcher=("--quiet",), env={
        "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)})  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "train.py: error: " in line]
    assert len(lines) == 1, done.stderr
    assert f"the launch asks for {what} (a flag, a --config_file, or a default_config.yaml" in lines[0]
    assert lines[0].endswith(f"launch with --config_file accelerate_configs/{instead}.yaml")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "the launch asks for DeepSpeed"),  # what its launcher sets
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "precision fp8 is not supported; launch with"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK in the environment; unset it"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 without LOCAL_RANK in the environment; unset it"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number in the environment"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 without WORLD_SIZE in the environment; unset it"),
        ({"LOCAL_WORLD_SIZE": "many"}, "LOCAL_WORLD_SIZE=many is not a number"),
    ],
)
def test_what_was_launched_wrongly_is_refused_in_one_line(
    env: dict[str, str], words: str, train: Train, tmp_path: Path
) -> None:
    done = train("--recipe", "digits", "--run", tmp_path / "run", env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


WITHOUT_NCCL = """
from cifar import failure
launch.is_nccl_available = lambda: False  # as in a build of torch for CPUs alone
def main():
    model = launch.start("bf16").prepare(torch.nn.Linear(3, 1))
    print("prepared")
try:
    with failure.fail_together(): main()
except UserError as error: print(error)
failure.leave(0)
"""


@pytest.mark.parametrize(
    ("launcher", "words"), [(TWO, "--gradient-compression bf16 needs a torch build with NCCL"), ((), "prepared")]
)
def test_what_cannot_compress_gradients_says_so(launcher: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = output_of(tmp_path, WITHOUT_NCCL, launcher)
    assert done.stdout.count(words) == (2 if launcher else 1), done.stdout + done.stderr
    assert done.returncode == 0


def test_gradients_do_not_depend_on_the_launchers_number_of_accumulation_steps(tmp_path: Path) -> None:
    code = "x = torch.ones((), requires_grad=True)\nlaunch.start().backward(x * 1)\nprint(x.grad)"
    done = output_of(tmp_path, code, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert done.stdout == "tensor(1.)\n", done.stderr


def test_a_network_that_was_compiled_is_compiled_again_once_some_of_it_is_frozen(tmp_path: Path) -> None:
    code = (
        "accelerator, network = launch.start(), torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Linear(1, 1))\n"
        "launch.prepare(accelerator, network, torch.optim.SGD(network.parameters(), 1), None)\n"
        "network[0].requires_grad_(False)\n"
        "print(type(launch.rewrap_ddp(accelerator, network)).__name__)"
    )
    done = output_of(tmp_path, code, ACCELERATE_DYNAMO_BACKEND="EAGER")
    assert done.stdout == "OptimizedModule\n", done.stderr


def test_a_machine_without_a_launcher_has_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert launch.local_processes() == 1


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (4, 1, 3), (16, 1, 8), (16, 4, 3), (2, 4, 1)]
)
def test_loader_workers_are_the_further_cores_and_at_most_8(
    cores: int, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.cores, "available", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert launch.loader_workers() == workers


@pytest.mark.parametrize(
    ("native", "precision", "words"),
    [(True, "no", "computes bf16 natively"), (False, "bf16", "only emulates bf16")],
)
def test_the_faster_precision_is_named(
    native: bool, precision: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, mixed_precision=precision)
    monkeypatch.setattr(launch, "native_bf16", lambda _: native)
    assert words in launch.topology(job, 512)
    monkeypatch.setattr(launch, "native_bf16", lambda _: not native)
    assert "hint" not in launch.topology(job, 512)


QUICK = ("--network", "whitened", "--augmentation-backend", "device")


def test_torchrun_launches_it_too(shapes: Path, tmp_path: Path) -> None:
    # torchrun takes --run for the beginning of a flag of its own, and --run-dir for none.
    run = tmp_path / "run"
    for program, more in (
        ("train.py", ("--data", shapes, *QUICK, "--epochs", 1, "--global-batch-size", 16)), ("explain.py", ()),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
             ROOT / program, "--run-dir", run, *map(str, more)],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["world_size"] == 2
    assert (run / "explain" / "report.html").is_file()


@pytest.mark.parametrize(
    ("ranks", "backend", "regional"), [(1, "inductor", False), (2, "inductor", True), (2, "aot_eager", False)]
)
def test_a_compiled_network_trains_stops_and_goes_on_under_its_own_names(
    ranks: int, backend: str, regional: bool, shapes: Path, tmp_path: Path
) -> None:
    # 20 steps, with frozen early layers from step 16 on.
    arguments = ["--data", shapes, "--run", tmp_path / "run", *QUICK, "--epochs", 5, "--checkpoint-every", 1,
                 "--global-batch-size", 16, "--freeze-at", 0.8]  # fmt: skip
    launcher = (*(TWO if ranks == 2 else ("--mixed_precision", "no")), "--dynamo_backend", backend)
    name, script = "whitened", ROOT / "train.py"
    if regional:  # Accelerate compiles the modules of lists one by one, and this network has one
        launcher = (*launcher, "--dynamo_use_regional_compilation")
        name, script = "small", project(tmp_path, "")
    # Compiling takes longer than a step may: the first one has the limit that also a download has.
    environment = {**os.environ, "CIFAR_HANG_SECONDS": "60"}
    process = subprocess.Popen(
        command(script, *arguments, "--network", name, launcher=launcher), env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not list((tmp_path / "run/checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=900)[0]
    assert "stopped on request after step" in output, output
    done = subprocess.run(command(script, *arguments, "--network", name, launcher=launcher), env=environment,
                          capture_output=True, text=True, timeout=900, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    network = small.build(4, 0.0) if regional else models.build(name, classes=4, dropout=0)
    assert set(load_file(tmp_path / "run/model.safetensors")) == set(network.state_dict())
    # Compiling takes longer than the few steps, and is no part of them.
    spent = json.loads((tmp_path / "run/result.json").read_text())["seconds_of_this_attempt"]
    assert spent["set-up"] > spent["training"]

"""What only a GPU can show, on one of them: every program as its own process, through the real launcher.

    pytest -m gpu -n 6 --dist worksteal

Six at a time, since starting some fifty programs takes longer than what they then do: on 16 cores about 4 minutes
(reckoned from 15 to 20 s for each; not measured).

Needs torch, accelerate, numpy, safetensors, tensorboard, matplotlib, scikit-learn, grad-cam and Albumentations, and no
network. REHEARSE_GPU_TESTS=1 runs the same tests on CPUs (float32 for float16), to find mistakes in the tests.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy
import test_parallel
from conftest import GPU_ENVIRONMENT, REHEARSAL, ROOT, command, step_of
from helpers.launching import TwoLaunchers
from PIL import Image
from safetensors.torch import load_file

from cifar import checkpoint
from cifar.data.cache import open_data

pytestmark = pytest.mark.gpu

PRECISIONS = ("no",) if REHEARSAL else ("no", "bf16", "fp16")
HALF = PRECISIONS[-1]
# On CPUs the default network would take a minute for each of some forty runs.
NETWORK = ("--network", "whitened") if REHEARSAL else ()
DIGITS = ("--recipe", "digits", "--epochs", 2, "--checkpoint-every", 5, *NETWORK)
# The other network, optimizer and augmentation: whitening, Muon, progressive resizing, test-time augmentation.
SPEEDRUN = ("--recipe", "speedrun", "--data", "digits", "--epochs", 2, "--global-batch-size", 64, "--freeze-at", 0.5)
ONE = ("--num_processes", "1")  # also where there are more GPUs
STEPS = 45  # 2 epochs of 1,437 images in batches of 64
HOST = os.uname().nodename


def environment(**more: str) -> dict[str, str]:
    return {**GPU_ENVIRONMENT, "CIFAR_DEVICE": "cpu" if REHEARSAL else "cuda", **more}


def started(run: Path, *more: object, precision: str = PRECISIONS[0], **variables: str) -> "subprocess.Popen[str]":
    """train.py as one process."""
    arguments = command(
        ROOT / "train.py", *DIGITS, "--run", run, *more, launcher=(*ONE, "--mixed_precision", precision)
    )
    return subprocess.Popen(
        arguments, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(process: "subprocess.Popen[str]") -> str:
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return output


def result(run: Path) -> dict[str, object]:
    return json.loads((run / "result.json").read_text())  # type: ignore[no-any-return]


def status(run: Path) -> dict[str, object]:
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


def wait_for(condition: Callable[[], bool], *processes: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- one process


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run of the digits in a precision, made when first asked for."""
    made: dict[str, Path] = {}

    def run(precision: str) -> Path:
        if precision not in made:
            folder = tmp_path_factory.mktemp(precision) / "run"
            output = finished(started(folder, precision=precision))
            assert ("CPU, 1 process" in output) == REHEARSAL
            made[precision] = folder
        return made[precision]

    return run


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_learns_the_digits(precision: str, run_of: Callable[[str], Path]) -> None:
    measured = result(run_of(precision))
    assert (measured["steps"], measured["precision"], measured["world_size"]) == (STEPS, precision, 1)
    assert float(str(measured["test_accuracy"])) > 0.9
    for name in ("model.safetensors", "predictions.safetensors"):
        for tensor in safetensors.numpy.load_file(run_of(precision) / name).values():
            assert np.isfinite(tensor.astype(np.float64)).all(), name


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_a_killed_run_goes_on_to_the_same_bytes(graph: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ("--deterministic", "--cuda-graph", graph)
    finished(started(whole, *arguments, precision=HALF))
    process = started(killed, *arguments, precision=HALF)
    wait_for((killed / "checkpoints/step-0000015").exists, process)
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.communicate()
    assert "resuming from" in finished(started(killed, *arguments, precision=HALF))
    for name in ("model.safetensors", f"checkpoints/step-{STEPS:07d}/optimizer.safetensors", "predictions.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_a_profile_sees_the_gpu(tmp_path: Path) -> None:
    output = finished(started(tmp_path / "run", "--profile", 5, precision=HALF))
    trace = gzip.decompress((tmp_path / "run/profile/attempt-1.rank-0.pt.trace.json.gz").read_bytes())
    kernels = [event for event in json.loads(trace)["traceEvents"] if event.get("cat") == "kernel"]
    assert bool(kernels) != REHEARSAL
    assert float(re.findall(r"  convolution +([0-9.]+)", output)[0]) > 0
    (parts,) = re.findall(r"a step of \S+ ms waits for (.*)", output)
    assert int(re.findall(r"the device (\d+)%", parts)[0]) > 0


def runs_through(script: str, *arguments: object) -> None:
    """A program of its own, which asserts."""
    ended_well(sys.executable, "-c", script, *arguments, cwd=ROOT)


def ended_well(*words: object, cwd: Path | None = None, **variables: str) -> str:
    """The standard output of a command."""
    done = subprocess.run([*map(str, words)], cwd=cwd, env=environment(**variables), capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_images_that_are_augmented_on_the_device_are_those_of_the_cpu() -> None:
    script = (
        "import sys, torch\nfrom cifar import device\nfrom cifar.data import augment, loading, sampler\n"
        "from cifar.data.cache import open_data\nfrom cifar.recipes import Recipe\n"
        "data = open_data('digits')\n"
        "samples = sampler.batch(0, 3, len(data.train_labels), 64)\n"
        "for name in augment.AUGMENTATIONS:\n"
        "    here, there = (loading.DeviceDataset(data, augment.find(name), 0, torch.device(kind))\n"
        "                   .__getitems__(samples)[0].cpu() for kind in ('cpu', device.decide(1).kind))\n"
        "    assert torch.equal(here, there), name\n"
    )
    runs_through(script)


def test_batches_that_are_sent_beside_the_steps_arrive_whole() -> None:
    script = (
        "import torch\nfrom cifar import device\nfrom cifar.data import loading, sampler\n"
        "from cifar.data.cache import open_data\nfrom cifar.recipes import Recipe\n"
        "data = open_data('digits')\n"
        "def sums(kind, way):\n"
        "    there = torch.device(kind)\n"
        "    recipe = Recipe(augmentation_backend=way, augmentation='crop_alternating_flip_light')\n"
        "    images = loading.training_images(recipe, data, there)\n"
        "    shares = sampler.DistributedBatchSampler(recipe, len(data.train_labels), 3, 40, 0, 1)\n"
        "    work, found = torch.ones(2048, 2048, device=there), []\n"
        "    for images, labels in loading.training_batches(images, shares, 2, there):\n"
        "        for _ in range(20 if kind == 'cuda' else 0):\n"
        "            work = work @ work * 0\n"  # the batch is looked at late, when its successor has been sent
        "        bits = images.permute(0, 2, 3, 1).view(torch.int32).sum(dtype=torch.int64)\n"
        "        found.append(torch.stack((bits, labels.sum())))\n"
        "        del images, labels\n"  # its memory may be used again
        "    return torch.stack(found).tolist()\n"
        "for way in ('albumentations', 'device'):\n"
        "    assert sums('cpu', way) == sums(device.decide(1).kind, way), way\n"
    )
    runs_through(script)


def test_a_run_is_explained_as_a_cpu_explains_it(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    run = run_of("no")
    for kind in ("cpu", "cuda"):
        more = ("--check", "--neighbours") if kind == "cuda" else ()  # which take minutes on a CPU
        words = command(ROOT / "explain.py", "--run", run, "--output", tmp_path / kind, *more,
                        launcher=(*ONE, "--mixed_precision", "no"))  # fmt: skip
        ended_well(*words, **({"CIFAR_DEVICE": "cpu"} if kind == "cpu" else {}))
    ours, theirs = (json.loads((tmp_path / kind / "result.json").read_text()) for kind in ("cuda", "cpu"))
    # An image on the border between two classes may fall to either side.
    assert abs(ours["mistakes"] - theirs["mistakes"]) <= 1


def test_pictures_are_classified_as_by_a_cpu(run_of: Callable[[str], Path], tmp_path: Path) -> None:
    for number, image in enumerate(open_data("digits").test_images[:20]):
        Image.fromarray(np.asarray(image)).save(tmp_path / f"{number}.png")
    words = (sys.executable, "-m", "cifar.predict", "--run", run_of("no"), "--format", "json", tmp_path)
    outputs = (ended_well(*words, cwd=ROOT), ended_well(*words, cwd=ROOT, CIFAR_DEVICE="cpu"))
    ours, theirs = ([json.loads(line) for line in output.splitlines()] for output in outputs)
    assert len(ours) == len(theirs) == 20
    for mine, other in zip(ours, theirs, strict=True):
        (most,), (expected,) = mine["classes"], other["classes"]
        assert (mine["path"], most["class"]) == (other["path"], expected["class"])
        assert most["probability"] == pytest.approx(expected["probability"], abs=1e-3)


def test_the_bench_measures_a_step(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="the bench's baseline needs torchvision")
    from helpers.bench import command as bench

    arguments = ("step", "--recipe", "digits", "--repeats", 2, "--seconds", 0.01, "--json", "bench.json")
    # Keeps what is there: on a machine without network, packages may lie beside Python's own.
    path = os.pathsep.join([str(ROOT), *filter(None, [GPU_ENVIRONMENT.get("PYTHONPATH")])])
    ended_well(*bench("cifar.bench"), *arguments, cwd=tmp_path, PYTHONPATH=path)
    figures = json.loads((tmp_path / "bench.json").read_text())["figures"]
    assert {"training, plain", "evaluation"} < {figure["what"] for figure in figures}
    assert ("GPU idle" in {figure["what"] for figure in figures}) != REHEARSAL
    assert all(figure["of_limit"] > 0 for figure in figures if "of_limit" in figure)


def test_maps_and_votes_are_those_of_a_cpu_and_of_the_app(run_of: Callable[[str], Path]) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nimport numpy as np, torch\nfrom cifar import launch\n"
        "from cifar.app.engine import Engine\nfrom cifar.explain import evidence, layers, maps, runs\n"
        "run = runs.open_run(Path(sys.argv[1]))\n"
        "data, cells, engine = runs.images(run, None), layers.resolutions(run.network), Engine(run)\n"
        "last = list(cells)[-1]\n"
        "networks = [runs.load(run, device) for device in (torch.device('cpu'), launch.start().device)]\n"
        "images, labels = np.arange(8), np.array(data.test_labels[:8])\n"
        "targets = np.stack((labels, (labels + 1) % 10), axis=1).astype(np.uint8)\n"
        "def equal(ours, theirs):\n"  # a hundredth of a map's scale is less than its colours show
        "    return np.allclose(ours, theirs, rtol=0, atol=0.01 * np.abs(theirs).max())\n"
        "for method in maps.METHODS:\n"
        "    for layer in cells:\n"
        "        theirs, ours = (evidence.attributions(network, data, images, targets, method, layer, last)\n"
        "                        for network in networks)\n"
        "        for name in ('maps', 'peaks', 'votes', 'bias', 'margins'):\n"
        "            assert equal(getattr(ours, name), getattr(theirs, name)), (method, layer, name)\n"
        "        answer = engine.answer(data.test_images[0], int(labels[0]), method, [layer])\n"
        "        assert equal(answer.heatmaps[0].map, ours.maps[0, 0]), (method, layer)\n"
    )
    runs_through(script, run_of("no"))


# ---- steps that wait for nothing


def patched(folder: Path, patch: str) -> Path:
    """A train.py with a patch."""
    script = folder / "train.py"
    script.write_text(
        f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv[0] = 'train.py'\n{patch}\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    return script


COUNTED = "from cifar import graph\n" + REHEARSAL * "graph.KINDS, graph.capture = ('cpu',), lambda step: step\n" + (
    "real_call = graph.GraphedGradients.__call__\n"
    "def call(self, *arguments):\n"
    "    totals = real_call(self, *arguments)\n"
    "    print('replayed', self.replayed)\n"
    "    return totals\n"
    "graph.GraphedGradients.__call__ = call\n"
)  # fmt: skip
UNSAVED = ("--checkpoint-every", 500)  # but at an epoch's end: what is saved is read
# In the middle of the first epoch every hidden read of the device is an error.
NO_READS = (
    ""
    if REHEARSAL
    else (
        "import torch\n"
        "from cifar import loop\n"
        "taken, real_add = 0, loop.DelayedMetrics.add\n"
        "def add(*arguments):\n"
        "    global taken\n"
        "    taken += 1\n"
        "    metrics = real_add(*arguments)\n"
        "    torch.cuda.set_sync_debug_mode('error' if 5 <= taken < 20 else 'default')\n"
        "    return metrics\n"
        "loop.DelayedMetrics.add = add\n"
    )
)


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_no_step_reads_from_the_device(graph: str, tmp_path: Path) -> None:
    # The other way to augment is seen by the next test.
    arguments = (*DIGITS, *UNSAVED, "--run", tmp_path / "run", "--augmentation-backend", "device")
    output = ended_well(*command(patched(tmp_path, COUNTED + NO_READS), *arguments, "--cuda-graph", graph,
                                 launcher=(*ONE, "--mixed_precision", PRECISIONS[-2:][0])))  # fmt: skip
    assert (f"replayed {STEPS}" in output) == (graph == "auto")


BY_GRAPHS = {
    **{each: (each, (*DIGITS, *UNSAVED, "--image-sizes", "28,32", "--freeze-at", 0.8)) for each in PRECISIONS},
    "accumulation": (PRECISIONS[0], (*DIGITS, *UNSAVED, "--gradient-accumulation-steps", 2)),
    "speedrun": (HALF, SPEEDRUN),
}


@pytest.mark.parametrize("name", BY_GRAPHS)
def test_a_run_by_graphs_is_the_same_run(name: str, tmp_path: Path) -> None:
    precision, arguments = BY_GRAPHS[name]
    # float16's scaler asks the device whether gradients overflowed.
    script = patched(tmp_path, COUNTED + NO_READS * (precision != "fp16"))
    for graph in ("auto", "off"):
        words = command(script, *arguments, "--deterministic", "--run", tmp_path / graph, "--cuda-graph", graph,
                        launcher=(*ONE, "--mixed_precision", precision))  # fmt: skip
        output = ended_well(*words)
        assert "no CUDA graph" not in output
        assert (f"replayed {STEPS}" in output) == (graph == "auto")
        assert (result(tmp_path / graph)["test_accuracy_tta"] is None) == (name != "speedrun")
    for file in ("model.safetensors", "predictions.safetensors"):
        assert (tmp_path / "auto" / file).read_bytes() == (tmp_path / "off" / file).read_bytes(), file


def test_a_compiled_network_learns_in_real_float32_and_without_a_graph(tmp_path: Path) -> None:
    patch = COUNTED + (
        "import torch\nfrom cifar import launch\nreal_start = launch.start\n"
        "def start(*arguments):\n"
        "    accelerator = real_start(*arguments)\n"
        "    print('tf32', torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)\n"
        "    return accelerator\n"
        "launch.start = start\n"
    )
    # The smaller network: it compiles sooner.
    arguments = (*DIGITS, "--network", "whitened", "--run", tmp_path / "run", "--cuda-graph", "auto")
    compiling = (*ONE, "--mixed_precision", "no", "--dynamo_backend", "inductor")
    output = ended_well(*command(patched(tmp_path, patch), *arguments, launcher=compiling))
    assert "tf32 False False" in output
    assert "no CUDA graph (the network is compiled)" in output
    assert float(str(result(tmp_path / "run")["test_accuracy"])) > 0.9


# Its step reads the device, which no capture allows.
READS = "from cifar import graph\n" + (
    (
        "graph.KINDS = ('cpu',)\n"
        "def capture(step): raise RuntimeError('CUDA error: operation not permitted when stream is capturing')\n"
        "graph.capture = capture\n"
    )
    if REHEARSAL
    else (
        "real_step = graph._Graph._step\n"
        "def step(self):\n"
        "    real_step(self)\n"
        "    self.flat.sum().item()\n"
        "graph._Graph._step = step\n"
    )
)


def test_a_run_whose_capture_fails_is_the_eager_run(tmp_path: Path) -> None:
    arguments = (*DIGITS, "--deterministic", "--cuda-graph", "auto")
    for name, patch in (("failing", READS), ("eager", "")):
        more = () if patch else ("--cuda-graph", "off")
        done = subprocess.run(
            command(patched(tmp_path, patch), *arguments, "--run", tmp_path / name, *more,
                    launcher=(*ONE, "--mixed_precision", PRECISIONS[0])),
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert ("no CUDA graph (" in done.stdout) == bool(patch)
    assert (tmp_path / "failing/model.safetensors").read_bytes() == (tmp_path / "eager/model.safetensors").read_bytes()


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no GPU that captures")
def test_a_failed_capture_leaves_nothing_behind() -> None:
    script = (
        "import torch\nfrom cifar import graph\n"
        "x, other, size = torch.ones(4, device='cuda'), torch.cuda.Stream(), 1 << 24\n"
        "try:\n"
        "    graph.capture(lambda: x.sum().item())\n"  # reads the device
        "except RuntimeError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError\n"
        "torch.nn.functional.dropout(x)\n"
        # While the allocator takes a capture to be under way, it keeps each block that two streams have used.
        "for _ in range(200):\n"
        "    block = torch.empty(size, dtype=torch.uint8, device='cuda')\n"
        "    block.record_stream(other)\n"
        "    del block\n"
        "    torch.cuda.synchronize()\n"
        "assert torch.cuda.memory_reserved() < 10 * size, torch.cuda.memory_reserved()\n"
        "replays = [graph.capture(lambda: x.add_(1)), graph.capture(lambda: x.mul_(2))]\n"
        "for replay in replays * 2:\n"
        "    replay()\n"
        "assert x.tolist() == [10] * 4, x\n"
    )
    runs_through(script)


# ---- two ranks on one GPU, over NCCL


def variables(hang_seconds: int) -> list[dict[str, str]]:
    """Those of the two ranks: NCCL takes them for two machines, and does not mind that they share a GPU."""
    return [environment(NCCL_HOSTID=f"host{rank}", NCCL_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo",
                        CIFAR_HANG_SECONDS=str(hang_seconds)) for rank in (0, 1)]  # fmt: skip


@pytest.fixture
def two() -> Iterator[Callable[..., TwoLaunchers]]:
    made: list[TwoLaunchers] = []

    def start(
        run: Path, *arguments: object, precision: str, hang_seconds: int = 60, script: Path = ROOT / "train.py"
    ) -> TwoLaunchers:
        words = (script, *DIGITS, "--run", run, *arguments)
        made.append(TwoLaunchers(*words, precision=precision, variables=variables(hang_seconds)))
        return made[-1]

    yield start
    for pair in made:
        pair.end()


def test_batches_gradient_and_evaluation_of_two_ranks_are_those_of_one(shapes: Path, tmp_path: Path) -> None:
    parity = ROOT / "tests" / "helpers" / "parity.py"
    done = subprocess.run(command(parity, shapes, tmp_path, 1, launcher=(*ONE, "--mixed_precision", "no")),
                          env=environment(), capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    pair = TwoLaunchers(parity, shapes, tmp_path, 1, precision="no", variables=variables(60))
    try:
        outputs = pair.outputs()
        assert [launcher.returncode for launcher in pair.launchers] == [0, 0], outputs
    finally:
        pair.end()
    alone, *ranks = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-1-0", "2-1-0", "2-1-1"))
    test_parallel.assert_the_same(ranks, alone)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_ranks_learn_the_digits(precision: str, two: Callable[..., TwoLaunchers], tmp_path: Path) -> None:
    pair = two(tmp_path / "run", precision=precision)
    outputs = pair.outputs()
    assert [launcher.returncode for launcher in pair.launchers] == [0, 0], outputs
    measured = result(tmp_path / "run")
    assert (measured["steps"], measured["precision"], measured["world_size"]) == (STEPS, precision, 2)
    assert float(str(measured["test_accuracy"])) > 0.9


def test_two_ranks_learn_the_digits_by_graphs(two: Callable[..., TwoLaunchers], tmp_path: Path) -> None:
    arguments = ("--cuda-graph", "auto", "--gradient-compression", "none" if REHEARSAL else "bf16")
    pair = two(tmp_path / "run", *arguments, precision=PRECISIONS[0], script=patched(tmp_path, COUNTED))
    outputs = pair.outputs()
    assert [launcher.returncode for launcher in pair.launchers] == [0, 0], outputs
    assert all(f"replayed {STEPS}" in output for output in outputs)
    assert float(str(result(tmp_path / "run")["test_accuracy"])) > 0.9


def test_if_one_of_two_ranks_fails_to_capture_both_go_on_without(
    two: Callable[..., TwoLaunchers], tmp_path: Path
) -> None:
    patch = f"{COUNTED}if os.environ['RANK'] == '1':\n" + textwrap.indent(READS, "    ")
    pair = two(tmp_path / "run", "--cuda-graph", "auto", precision=PRECISIONS[0], script=patched(tmp_path, patch))
    outputs = pair.outputs()
    assert [launcher.returncode for launcher in pair.launchers] == [0, 0], outputs
    assert "no CUDA graph (another rank has none)" in outputs[0]
    assert not any("replayed 1" in output for output in outputs)
    assert float(str(result(tmp_path / "run")["test_accuracy"])) > 0.9


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_two_ranks_stop_together_and_go_on(graph: str, two: Callable[..., TwoLaunchers], tmp_path: Path) -> None:
    run = tmp_path / "run"
    pair = two(run, "--epochs", 40, "--cuda-graph", graph, precision=PRECISIONS[0])
    wait_for((run / "checkpoints/step-0000005").exists, *pair.launchers)
    pair.rank(1).send_signal(signal.SIGTERM)
    outputs = pair.outputs()
    assert status(run)["state"] == "preempted", outputs
    newest, broken = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert (step_of(newest), broken) == (status(run)["step"], [])


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("train.py: error: ")]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_rank_that_is_gone_ends_the_other_with_a_line_that_names_it(
    number: signal.Signals, rank: int, two: Callable[..., TwoLaunchers], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    pair = two(run, "--epochs", 400, precision=PRECISIONS[0])
    wait_for((run / "checkpoints/step-0000005").exists, *pair.launchers)
    victim = pair.rank(rank)
    victim.send_signal(number)
    survivor = pair.launchers[1 - rank]
    output = survivor.communicate(timeout=300)[0]
    assert survivor.returncode != 0
    assert "no step for" not in output  # noticed by its heartbeat, not by the hang limit
    if victim.is_running():
        victim.kill()
    assert len(errors(output)) == 1, output
    assert re.match(rf"train.py: error: rank {rank} on \S+: (no answer|its node does not answer)", errors(output)[0])
    assert "ProcessGroupNCCL" not in output
    wait_for(lambda: status(run)["state"] == "failed")
    assert str(status(run)["reason"]) == errors(output)[0].removeprefix("train.py: error: ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_both_with_its_line(
    rank: int, two: Callable[..., TwoLaunchers], tmp_path: Path
) -> None:
    patch = (
        "from cifar import loop\nreal, count = loop.accumulate_gradients, 0\n"
        "def raising(*arguments):\n"
        "    global count\n"
        "    count += 1\n"
        f"    if os.environ['RANK'] == '{rank}' and count == 7: raise ValueError('boom')\n"
        "    return real(*arguments)\n"
        "loop.accumulate_gradients = raising\n"
    )
    pair = two(tmp_path / "run", precision=PRECISIONS[0], script=patched(tmp_path, patch))
    outputs = pair.outputs()
    assert [len(errors(output)) for output in outputs] == [1, 1], outputs
    assert len({errors(output)[0] for output in outputs}) == 1
    assert errors(outputs[0])[0] == f"train.py: error: rank {rank} on {HOST}: ValueError: boom"
    assert status(tmp_path / "run")["state"] == "failed"
    assert status(tmp_path / "run")["reason"] == f"rank {rank} on {HOST}: ValueError: boom"


# ---- bad launches


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no GPU to share")
def test_two_processes_for_one_gpu_are_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        command(ROOT / "train.py", *DIGITS, "--run", tmp_path / "run",
                launcher=("--config_file", str(ROOT / "accelerate_configs/multi_gpu.yaml"), "--num_processes", "2")),
        env={**environment(), "CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "error: " in line and "train.py" in line] == [
        f"train.py: error: {HOST} has 1 GPU(s) for 2 processes; set --num_processes 1 for this machine"
    ]


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no GPU whose memory could be full")
def test_memory_that_does_not_suffice_is_one_line(tmp_path: Path) -> None:
    script = patched(tmp_path, "import torch\ntorch.cuda.set_per_process_memory_fraction(0.004)")
    done = subprocess.run(command(script, *DIGITS, "--run", tmp_path / "run", "--global-batch-size", 1024),
                          env=environment(), capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "out of memory" in done.stderr.splitlines()[-1]
    assert "--gradient-accumulation-steps" in done.stderr.splitlines()[-1]

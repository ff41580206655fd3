"""What only a GPU runs is little, known, and has a test that runs it there. Some of it a CPU can show."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import test_gpu
import torch
from conftest import FOUND, ROOT, command
from helpers.launching import project
from test_counts import Operations
from torch.nn import functional as F

from cifar import graph, launch
from cifar.data.augment import resize

# The functions and constants that do something else on a GPU, and the tests in test_gpu.py that run them there.
ON_A_GPU = {
    "cifar/data/augment_device.py plan": "test_the_images_that_are_augmented_on_the_device_are_those_of_the_cpu",
    "cifar/data/loading.py _received": "test_batches_that_are_sent_beside_the_steps_arrive_whole",
    "cifar/data/loading.py _uploaded": "test_batches_that_are_sent_beside_the_steps_arrive_whole",
    "cifar/device.py decide": "test_two_processes_for_one_gpu_are_one_line",
    "cifar/device.py kind": "test_every_precision_learns_the_digits",
    "cifar/device.py __init__": "test_no_step_reads_from_the_device",
    "cifar/evaluation.py STOP_EVERY": "test_two_ranks_stop_together_and_go_on",
    "cifar/graph.py KINDS": "test_a_run_by_graphs_is_the_same_run",
    "cifar/graph.py _captured": "test_a_run_by_graphs_is_the_same_run",
    "cifar/graph.py _clean_up": "test_a_failed_capture_leaves_nothing_behind",
    "cifar/graph.py _pool": "test_a_failed_capture_leaves_nothing_behind",
    "cifar/graph.py capture": "test_a_run_by_graphs_is_the_same_run",
    "cifar/graph.py dropout_generator": "test_a_run_by_graphs_is_the_same_run",
    "cifar/graph.py side_stream": "test_a_run_by_graphs_is_the_same_run",
    "cifar/launch.py computed_on": "test_a_killed_run_goes_on_to_the_same_bytes",
    "cifar/launch.py memory_bytes": "test_every_precision_learns_the_digits",
    "cifar/launch.py native_bf16": "test_every_precision_learns_the_digits",
    "cifar/launch.py start": "test_a_compiled_network_learns_in_real_float32_and_without_a_graph",
    "cifar/launch.py topology": "test_every_precision_learns_the_digits",
    "cifar/loop.py DELAY": "test_no_step_reads_from_the_device",
    "cifar/profiling.py _computes": "test_a_profile_sees_the_gpu",
    "cifar/profiling.py activities": "test_a_profile_sees_the_gpu",
    "cifar/profiling.py seconds_by_kind": "test_a_profile_sees_the_gpu",
}


def mentions_cuda(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.Attribute) and node.attr == "cuda")
        or (isinstance(node, ast.Constant) and node.value == "cuda")
        for node in ast.walk(tree)
    )


def places(path: Path) -> Iterator[str]:
    """Each innermost function, and each assignment outside of them, that mentions CUDA."""

    def below(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                if not isinstance(child, ast.ClassDef) and mentions_cuda(child):
                    yield child.name
                elif isinstance(child, ast.ClassDef):
                    yield from below(child)
            elif isinstance(child, ast.Assign | ast.AnnAssign) and mentions_cuda(child):
                target = child.targets[0] if isinstance(child, ast.Assign) else child.target
                yield ast.unparse(target)

    for name in below(ast.parse(path.read_text())):
        yield f"{path.relative_to(ROOT)} {name}"


def test_everything_that_is_different_on_a_gpu_has_a_test_there() -> None:
    paths = [*ROOT.glob("cifar/**/*.py"), ROOT / "train.py", ROOT / "explain.py"]
    found = {place for path in paths if path.parent.name != "bench" for place in places(path)}
    assert found == set(ON_A_GPU)
    for test in ON_A_GPU.values():
        assert callable(getattr(test_gpu, test))


@pytest.mark.slow
def test_the_gpu_tests_are_found_where_packages_are_missing() -> None:
    # A machine with GPUs often has no network: no packages but those that training needs.
    missing = ("gradio", "gradio_client", "fastapi", "starlette", "uvicorn", "httpx", "orjson",  # what gradio brings
               "playwright", "onnx", "onnxruntime", "onnxscript")  # fmt: skip
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "import pytest; sys.exit(pytest.main(['-n', '0', '--collect-only', '-q', '-m', 'gpu or multigpu']))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "test_gpu.py::test_every_precision_learns_the_digits" in done.stdout
    assert "test_multigpu.py::test_all_gpus_learn_the_digits" in done.stdout


# ---- the gpu tests' own conftest


def run_pytest(folder: Path, test: str, driver: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """One file of tests beside the project's conftest.py, in a shell that has GPU 7 and wants a GPU."""
    conftest = (ROOT / "tests/conftest.py").read_text()
    (folder / "conftest.py").write_text(re.sub(r"(?m)^DRIVERS = .*$", f"DRIVERS = ({driver!r},)", conftest))
    (folder / "test_it.py").write_text(test)
    shell = {**os.environ, "CUDA_VISIBLE_DEVICES": "7", "CIFAR_DEVICE": "cuda"}
    del shell[FOUND]
    shell.pop("REHEARSE_GPU_TESTS", None)
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, "test_it.py"],
                          cwd=folder, env=shell, capture_output=True, text=True, check=False)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_gpu_tests_see_the_gpus_of_the_shell(workers: str, tmp_path: Path) -> None:
    test = (
        "import os\nfrom conftest import GPU_ENVIRONMENT\n"
        "def test():\n"
        "    ours, theirs = ([x.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'CIFAR_DEVICE')]\n"
        "                    for x in (os.environ, GPU_ENVIRONMENT))\n"
        "    assert (ours, theirs) == (['-1', None], ['7', 'cuda'])\n"
    )
    done = run_pytest(tmp_path, test, "/nowhere", "-n", workers)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_where_there_is_a_driver_gpu_tests_are_not_all_skipped_in_silence(workers: str, tmp_path: Path) -> None:
    test = "import pytest\n@pytest.mark.gpu\ndef test(): pass\n"
    for driver, code in (("/nowhere", 0), (str(tmp_path), 1)):
        done = run_pytest(tmp_path, test, driver, "-n", workers, "-m", "gpu")
        assert (done.returncode, "1 skipped" in done.stdout) == (code, True), done.stdout
        assert ("every gpu test was skipped" in done.stdout) == (code == 1)


# ---- what a CPU can show of the code for GPUs


def test_after_an_error_beside_the_steps_they_wait_for_what_it_left(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def wait_stream(self, other: "Stream") -> None:
            waits.append((self, other))

    current = Stream(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    with pytest.raises(RuntimeError), graph.side_stream(torch.device("cuda")):
        raise RuntimeError
    (side, before), (after, other) = waits
    assert (before, after, other) == (current, current, side)


def test_captures_share_their_memory_and_one_that_fails_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Graph:
        def replay(self) -> None:
            pass

        def reset(self) -> None:
            calls.append("reset")

    @contextmanager
    def capturing(made: Graph, pool: object = None, *, capture_error_mode: str = "global") -> Iterator[None]:
        calls.append(("capture", pool, capture_error_mode))
        yield

    handles = iter(((0, 1), (0, 2)))
    for name, value in {
        "synchronize": lambda: None, "current_stream": lambda: None, "stream": lambda _: nullcontext(),
        "current_device": lambda: 3, "CUDAGraph": Graph, "graph": capturing,
        "graph_pool_handle": lambda: next(handles),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: calls.append(("end", *pool)))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: calls.append(("release", *pool)))

    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    graph._pool.cache_clear()
    graph.capture(lambda: None)
    graph.capture(lambda: None)
    assert calls == [("capture", (0, 1), "thread_local")] * 2
    calls.clear()
    with pytest.raises(RuntimeError, match="not permitted"):
        graph.capture(fail)
    assert calls == [
        ("capture", (0, 1), "thread_local"), "reset", ("end", 3, (0, 1)), ("release", 3, (0, 1)),
        ("capture", None, "thread_local"),  # nothing, so that the generator is told of an end
    ]  # fmt: skip
    calls.clear()
    graph.capture(lambda: None)
    assert calls == [("capture", (0, 2), "thread_local")]  # nothing uses the first any more
    graph._pool.cache_clear()


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after --deterministic."""
    before = torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory
    for name in ("NCCL_ALGO", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")  # put back afterwards
        os.environ.pop(name)
    launch._make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = before


def test_determinism_fills_no_memory_and_excludes_two_algorithms_of_nccl(deterministic: None) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    with Operations() as operations:
        torch.empty(3)
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert operations.counts == {"empty": 1}
    assert os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"


def test_images_are_resized_by_one_kernel(deterministic: None) -> None:
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for there in (images, images.to("meta")):  # which is no CPU either
        with Operations() as operations:
            resized = resize(there, 24)
        assert operations.counts == {"upsample_bilinear2d": 1}
        assert resized.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(resize(images, 24), F.interpolate(images, size=(24, 24), mode="bilinear"))


def test_what_seeds_dropout_gives_the_bits_of_torchs_own_seeding() -> None:
    found = []
    with torch.random.fork_rng():
        for seed in (torch.manual_seed, graph.dropout_generator(torch.device("cpu")).manual_seed):
            seed(2**32 - 1)
            found.append(F.dropout(torch.ones(1000)))
    assert torch.equal(*found)


@pytest.mark.slow
def test_only_the_first_weights_are_drawn_from_the_generators_of_all_devices(shapes: Path, tmp_path: Path) -> None:
    patch = (
        "import torch\nseed = torch.manual_seed\n"
        "def counted(*arguments):\n"
        "    os.write(1, b'seeded all\\n')\n"
        "    return seed(*arguments)\n"
        "torch.manual_seed = counted\n"
    )
    arguments = ("--data", shapes, "--run", tmp_path / "run", "--epochs", 1, "--peak-epoch", 0, "--augment", "device",
                 "--global-batch-size", 16, "--network", "small")  # fmt: skip
    done = subprocess.run(command(project(tmp_path, patch), *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 4
    assert done.stdout.count("seeded all") == 1

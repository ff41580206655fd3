"""What only a GPU runs is little, known, and has a test that runs it there. Some of it a CPU can show."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FOUND, ROOT, command
from helpers.launching import THREE, project
from test_counts import Operations
from test_graph import FAITHFUL
from torch.nn import functional as F

from cifar import graph, launch
from cifar.data.augment import resize

# The tests that run what the programs below do not run, on a CPU, of the modules that mention CUDA: each piece's first
# line, or a condition that always holds there.
NOT_ON_A_CPU = {
    "test_loading.py::test_a_worker_that_cannot_be_started_is_one_line_and_the_others_end": {
        "cifar/data/loading.py __init__: except OSError as error:",
    },
    "test_loading.py::test_batches_need_no_shared_memory_and_no_temporary_folder": {
        "cifar/data/loading.py _traced: return",
    },
    "test_loading.py::test_a_worker_that_was_killed_is_named": {
        "cifar/data/loading.py _fill: self.process.join(1)",
    },
    "test_gpu.py::test_batches_that_are_sent_beside_the_steps_arrive_whole": {
        "cifar/data/loading.py _received: content = _uploaded(content, uploads)",
        "cifar/data/loading.py _uploaded: with torch.cuda.stream(uploads):",
    },
    "test_loading.py::test_a_users_error_in_a_worker_stays_one": {
        "cifar/data/loading.py _work: except UserError as error:",
    },
    "test_loading.py::test_workers_do_not_outlive_the_process_that_trains": {
        "cifar/data/loading.py _work: return  # the parent died before this process could ask to d",
    },
    "test_launch.py::test_a_compiled_network_trains_stops_and_goes_on_under_its_own_names": {
        "cifar/data/loading.py open_on_all_ranks: failure.allow_compilation()",
    },
    "test_loading.py::test_a_worker_that_hangs_is_named_after_the_hang_limit": {
        "cifar/data/loading.py receive: except TimeoutError:",
    },
    "test_loading.py::test_an_error_in_a_worker_is_told_with_its_place": {
        "cifar/data/loading.py receive: words = bytearray()",
    },
    "test_gpu.py::test_no_step_reads_from_the_device": {
        "cifar/device.py __init__: self._event = torch.cuda.Event(enable_timing=timed, blocking",
        "cifar/device.py wait: self._event.synchronize()",
    },
    "test_gpu.py::test_two_ranks_learn_the_digits": {
        "cifar/device.py seconds_since: return float(earlier._event.elapsed_time(self._event)) / 100",
    },
    "test_failure.py::test_what_one_rank_is_asked_in_a_step_all_do_right_after_it": {
        "cifar/evaluation.py _predict: return None",
        "cifar/evaluation.py evaluate: return None",
    },
    "test_failure.py::test_a_rank_that_dies_is_started_again_in_place": {
        "cifar/launch.py _rejoin: from torch.distributed import PrefixStore, TCPStore, init_pr",
    },
    "test_explain.py::test_the_accuracy_is_the_runs_own_and_every_count_agrees": {
        "cifar/evaluation.py evaluate_whole: evaluated = evaluate(accelerator, network, images, data)",
    },
    "test_graph.py::test_a_graph_that_cannot_be_trusted_is_not_used": {
        "cifar/graph.py _say_why_no_graph: if accelerator.is_main_process:",
        "cifar/graph.py __call__: return self.eager(model, images, labels, write_failed)",
        "cifar/graph.py _capture: except torch.OutOfMemoryError as error:",
        "cifar/graph.py _capture: self.graphs.clear()",
        'cifar/graph.py _first_line: return f"{type(error).__name__}: {str(error).splitlines()[0]',
        "cifar/graph.py problem: except (RuntimeError, ValueError) as error:  # ValueError: b",
        'cifar/graph.py problem: return f"its gradients differ by {difference:.3g} from the e',
    },
    "test_gpu.py::test_a_run_by_graphs_is_the_same_run": {
        'cifar/graph.py _captured: return torch.cuda.graph(graph, pool, capture_error_mode="thr',
        "cifar/graph.py _pool: return torch.cuda.graph_pool_handle()",
        "cifar/graph.py capture: torch.cuda.synchronize()",
        "cifar/graph.py side_stream: stream, current = torch.cuda.Stream(device), torch.cuda.curr",
    },
    "test_gpu.py::test_a_failed_capture_leaves_nothing_behind": {
        "cifar/graph.py _clean_up: device = torch.cuda.current_device()",
    },
    "test_graph.py::test_a_run_by_graphs_is_the_same_run": {
        "cifar/graph.py average_gradients: if self.accelerator.num_processes > 1: (never skipped)",
        "cifar/graph.py problem: allowed += TOLERANCE * eager.norm()",
    },
    "test_augment.py::test_both_ways_draw_the_same_values_equally_often": {
        "cifar/data/augment_device.py augment: if pipeline.cutout: (never skipped)",
        "cifar/data/augment_device.py augment: shift, scale = _brightness_contrast(pipeline.brightness, pip",
        "cifar/data/augment_device.py _brightness_contrast: levels = np.arange(LEVELS)",
        "cifar/data/augment_device.py draw: own = philox.words(seed, indices, np.uint64(0), np.uint64(2)",
    },
    "test_graph.py::test_two_ranks_by_graphs_train_as_with_ddp": {
        "cifar/graph.py average_gradients: if sent is not self.flat: (never skipped)",
    },
    "test_gpu.py::test_a_compiled_network_learns_in_real_float32_and_without_a_graph": {
        "cifar/graph.py gradient_function: if wants_graph:",
    },
    "test_launch.py::test_what_was_launched_wrongly_is_refused_in_one_line": {
        'cifar/launch.py _check_numbers: os.environ["RANK"] = "0"  # so that this process prints the ',
        'cifar/launch.py _check_numbers: what = "WORLD_SIZE" if several else "LOCAL_RANK"',
    },
    "test_gpu.py::test_a_killed_run_goes_on_to_the_same_bytes": {
        'cifar/launch.py computed_on: found["device"] = torch.cuda.get_device_name(accelerator.dev',
        "cifar/launch.py prepare: accelerator.scaler.load_state_dict(scaler)",
    },
    "test_gpu.py::test_every_precision_learns_the_digits": {
        "cifar/launch.py memory_bytes: return torch.cuda.max_memory_allocated(device)",
        "cifar/launch.py native_bf16: return bool(torch.cuda.is_bf16_supported(including_emulation",
        "cifar/launch.py start: if on_cpu: (never skipped)",
    },
    "test_gpu.py::test_a_profile_sees_the_gpu": {
        'cifar/profiling.py _computes: on_gpu = event.device_type.name == "CUDA" and not event.is_u',
    },
    "test_profiling.py::test_an_attempt_with_few_steps_left_and_one_without_room_train_on": {
        "cifar/profiling.py _write: except OSError as error:",
        "cifar/profiling.py of_steps: steps = 0",
    },
}
# What coverage cannot show: functions and constants that mention CUDA within a line that CPUs run, too; and the tests
# in test_gpu.py that run them.
WITHIN_A_LINE = {
    "cifar/data/augment_device.py plan": "test_the_images_that_are_augmented_on_the_device_are_those_of_the_cpu",
    "cifar/device.py decide": "test_two_processes_for_one_gpu_are_one_line",
    "cifar/device.py kind": "test_every_precision_learns_the_digits",
    "cifar/evaluation.py STOP_EVERY": "test_two_ranks_stop_together_and_go_on",
    "cifar/graph.py KINDS": "test_a_run_by_graphs_is_the_same_run",
    "cifar/graph.py dropout_generator": "test_a_run_by_graphs_is_the_same_run",
    "cifar/launch.py topology": "test_every_precision_learns_the_digits",
    "cifar/loop.py DELAY": "test_no_step_reads_from_the_device",
    "cifar/profiling.py activities": "test_a_profile_sees_the_gpu",
    "cifar/profiling.py seconds_by_kind": "test_a_profile_sees_the_gpu",
}
# What depends on the processor or the C library.
OF_THIS_MACHINE = ("topology:", "_keep_freed_memory:")


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


def assert_there_are(tests: Iterable[str]) -> None:
    for test in tests:
        module, name = test.split("::")
        assert f"def {name}(" in (ROOT / "tests" / module).read_text(), test


def test_everything_that_mentions_cuda_has_a_test_on_a_gpu() -> None:
    paths = [*ROOT.glob("cifar/**/*.py"), ROOT / "train.py", ROOT / "explain.py"]
    found = {place for path in paths if path.parent.name != "bench" for place in places(path)}
    on_a_gpu = [pieces for test, pieces in NOT_ON_A_CPU.items() if test.startswith("test_gpu.py::")]
    assert found - {piece.partition(":")[0] for pieces in on_a_gpu for piece in pieces} == set(WITHIN_A_LINE)
    assert_there_are(f"test_gpu.py::{test}" for test in WITHIN_A_LINE.values())


def modules() -> list[str]:
    """Those that do something else on a GPU."""
    paths = [*ROOT.glob("cifar/**/*.py"), ROOT / "train.py", ROOT / "explain.py"]
    return [
        str(path.relative_to(ROOT))
        for path in sorted(paths)
        if path.parent.name != "bench" and re.search(r"[.\"]cuda\b", path.read_text())
    ]


def pieces(path: str, measured: dict[str, Any]) -> Iterator[str]:
    """The first line of each piece of a module that was not run, after its function; and each branch not taken."""
    source = (ROOT / path).read_text()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lines, missing = source.splitlines(), set(measured["missing_lines"])
    skipped = missing | set(measured["excluded_lines"])

    def piece(number: int, branch: str = "") -> str:
        within = [node for node in functions if node.lineno <= number <= (node.end_lineno or 0)]
        name = max(within, key=lambda node: node.lineno).name
        return f"{path} {name}: {lines[number - 1].strip()[:60]}{branch}"

    run = sorted(set(measured["executed_lines"]))
    for number in sorted(missing):
        before = max((other for other in (*run, *missing) if other < number), default=0)
        if before not in missing:
            yield piece(number)
    for line, to in measured["missing_branches"]:
        if line not in missing and to not in skipped and not lines[line - 1].lstrip().startswith("for "):
            yield piece(line, " (never skipped)")


@pytest.mark.slow
def test_everything_that_no_cpu_runs_has_a_test_that_runs_it(shapes: Path, tmp_path: Path) -> None:
    settings = tmp_path / "coverage.ini"
    settings.write_text(
        f"[run]\nbranch = true\nparallel = true\ndata_file = {tmp_path / 'data'}\nsource = cifar\n"
        "patch =\n    subprocess\n    _exit\n[report]\nexclude_also =\n    raise UserError\n    raise AssertionError\n"
        f"include =\n{''.join(f'    {name}{chr(10)}' for name in modules())}"
    )
    unit_tests = [f"tests/test_{name}.py" for name in ("device", "loop", "evaluation")]
    few = tmp_path / "few"  # test images: test-time augmentation takes a quarter, which is fewer than there are ranks
    for folder in shapes.glob("test/*"):
        (few / "test" / folder.name).mkdir(parents=True)
        (few / "test" / folder.name / "00.png").symlink_to(folder / "00.png")
    (few / "train").symlink_to(shapes / "train")
    train = (str(project(tmp_path, FAITHFUL)), "--data", str(few), "--epochs", "3")
    for words in (
        ("run", "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "-m", "not slow", *unit_tests),
        ("run", *train, "--run", str(tmp_path / "1"), "--peak-epoch", "1", "--network", "small",
         "--augmentation-backend", "device", "--global-batch-size", "16", "--gradient-accumulation-steps", "2"),
        ("run", "-m", "accelerate.commands.launch", *THREE, *train, "--run", str(tmp_path / "3"),
         "--recipe", "speedrun", "--global-batch-size", "15", "--freeze-at", "0.5", "--peak-epoch", "0",
         "--cuda-graph", "auto", "--profile", "2", "--deterministic", "--augmentation-backend", "albumentations",
         "--gradient-compression", "bf16"),
        ("combine",), ("json", "-o", str(tmp_path / "found.json")),
    ):  # fmt: skip
        coverage = [sys.executable, "-m", "coverage", words[0], f"--rcfile={settings}", *words[1:]]
        done = subprocess.run(coverage, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    files = json.loads((tmp_path / "found.json").read_text())["files"]
    found = {piece for path, measured in files.items() for piece in pieces(path, measured)}
    found = {each for each in found if each.split(" ")[1] not in OF_THIS_MACHINE}
    assert found == set().union(*NOT_ON_A_CPU.values())
    assert_there_are(NOT_ON_A_CPU)


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
    arguments = ("--data", shapes, "--run", tmp_path / "run", "--epochs", 1, "--peak-epoch", 0,
                 "--augmentation-backend", "device", "--global-batch-size", 16, "--network", "small")  # fmt: skip
    done = subprocess.run(command(project(tmp_path, patch), *arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 4
    assert done.stdout.count("seeded all") == 1

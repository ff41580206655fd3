"""What only a GPU runs is little, known, and has a test that runs it there."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_gpu
from conftest import ROOT

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
    "cifar/graph.py _generator": "test_a_run_by_graphs_is_the_same_run",
    "cifar/graph.py capture": "test_a_run_by_graphs_is_the_same_run",
    "cifar/graph.py side_stream": "test_a_run_by_graphs_is_the_same_run",
    "cifar/launch.py computed_on": "test_a_killed_run_goes_on_to_the_same_bytes",
    "cifar/launch.py memory_bytes": "test_every_precision_learns_the_digits",
    "cifar/launch.py native_bf16": "test_every_precision_learns_the_digits",
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

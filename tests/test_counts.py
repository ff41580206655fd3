"""What a training step costs, counted instead of timed: a step that has become dearer fails here on any machine.

The steps are those of train.py itself, through the real launcher, on a channels-last network: in bf16 where the
processor has it, else in float32.
"""

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, command
from helpers.launching import project
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cifar import launch, models, optim
from cifar.bench import counts, scaling_model
from cifar.bench.context import Bench
from cifar.recipes import RECIPES

pytestmark = pytest.mark.slow

PARAMETERS = 6_572_292  # with the four classes of the shapes
CONVOLUTIONS, NORMS = 8, 8
CHANNELS_LAST = 6  # convolutions whose filters are channels-last; the other two see small maps
KERNELS, BIASES = CONVOLUTIONS + 1, CONVOLUTIONS + 1  # with the linear layer's

FEW = ("--augmentation-backend", "device", "--global-batch-size", "4")  # images: what is counted is the same for more

BF16 = launch.native_bf16(torch.device("cpu"))  # without it, torch would convert to and from float32 in places


def profiled(shapes: Path, folder: Path, processes: int, *more: str) -> dict[str, Any]:
    """The record of one step, after two that warm up."""
    bench = Bench("resnet", 1, 1.0, folder, machine={"native_bf16": BF16, "gpus": 0})
    arguments = ("--data", shapes, "--run", folder / "run", "--epochs", 100, "--global-batch-size", 16, *more)
    with bench.launch("train.py", *arguments, processes=processes) as program:
        program.request("train", amount=1)
        return program.request("profile", amount=1)


@pytest.fixture(scope="module")
def step(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process."""
    return profiled(shapes, tmp_path_factory.mktemp("one"), 1)


def test_an_image_costs_379_million_multiply_adds() -> None:
    sizes = ((32, 3, 64), (32, 64, 128), (16, 128, 128), (16, 128, 128), (16, 128, 256), (8, 256, 512), (4, 512, 512),
             (4, 512, 512))  # fmt: skip
    convolutions = sum(cells**2 * 9 * before * after for cells, before, after in sizes)
    network = models.build("resnet", classes=10, dropout=0.1)
    assert counts.forward_multiply_adds(network) == convolutions + 512 * 10 == 379_261_952
    assert network.training


def test_training_a_whitened_network_costs_303_million_multiply_adds_an_image() -> None:
    whitening, first = 31**2 * 2 * 2 * 3 * 24, 30**2 * 9 * 24 * 64
    rest = (15**2 * 9 * 64 * 64 + 14**2 * 9 * 64 * 256 + (7**2 + 6**2 + 3**2) * 9 * 256 * 256) + 256 * 10
    network = models.build("whitened", classes=10, dropout=0)
    assert counts.forward_multiply_adds(network) == whitening + first + rest == 105_360_160
    images = torch.randn(1, 3, 32, 32).repeat(2, 1, 1, 1)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    # Backward, each product has two, but the whitening none, and the first filters only that for their weights.
    assert counter.get_total_flops() == 2 * 2 * (whitening + 2 * first + 3 * rest) == 4 * 303_085_344
    # With frozen early layers the backward pass ends at the second stage's first filters: 0.81 of that.
    models.freeze(network)
    with FlopCounterMode(display=False) as counter:
        network(images).sum().backward()
    second = 14**2 * 9 * 64 * 256
    saved = first + 2 * 15**2 * 9 * 64 * 64 + second
    assert counter.get_total_flops() == 4 * (303_085_344 - saved) == 4 * 245_153_568


def test_the_optimizer_is_one_kernel(step: dict[str, Any]) -> None:
    # The other one adds 1 to the count of steps.
    assert step["optimizer"] == {"aten::_fused_adam_": 1, "aten::_foreach_add_": 1}


class Operations(TorchDispatchMode):
    """Counts the operators that are called, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("recipe", "shapes_of_filters", "most"), [("resnet_fast", 6, 100), ("speedrun", 4, 70)])
def test_muon_is_nine_products_a_shape_of_filters_and_few_kernels_beside(
    recipe: str, shapes_of_filters: int, most: int, bf16: bool
) -> None:
    with FakeTensorMode():  # what is called does not depend on numbers
        network = models.build(RECIPES[recipe]().network, classes=10, dropout=0)
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        optimizer = optim.build(network, RECIPES[recipe]())
        for _ in range(2):  # the first step makes the state
            for parameter in network.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16), Operations() as operations:
                optimizer.step()
    expected = {
        "_foreach_mul_": 1, "_foreach_add_": 3, "_foreach_add": 1, "_foreach_norm": 2, "_foreach_div_": 3, "cat": 1,
        "bmm": 3 * shapes_of_filters, "baddbmm": 6 * shapes_of_filters,
        "_fused_sgd_": 2,  # biases and norms, and the linear layer
    } | ({"_to_copy": 1} if bf16 else {})  # fmt: skip
    assert operations.counts == expected
    assert operations.counts.total() <= most


def test_nothing_is_converted_without_need(step: dict[str, Any]) -> None:
    expected = {
        "precision": BF16
        * (
            1  # the images to bf16,
            + (KERNELS + BIASES)  # and all weights but the norms';
            + (KERNELS + BIASES)  # their gradients back to float32;
            + 2  # the logits to float32, and their gradient to bf16;
        )
        + 2,  # two sums over booleans: how many are right, and how many labels count in the loss
        "layout": CHANNELS_LAST  # oneDNN gives the kernels' gradients in torch's own layout;
        + CHANNELS_LAST  # fused Adam makes a copy of them in that layout on CPUs, which it does not use;
        + (CONVOLUTIONS - CHANNELS_LAST) * 3  # a small map on its way in and out, and its gradient;
        + 2,  # the last maps before their maximum is taken, and their gradient
        "other": 3,  # the linear layer's bias for each image, the loss's mask, the metrics that ranks sum up
    }
    assert {name: step["copies"].get(name, 0) for name in expected} == expected


def test_the_host_makes_few_calls_in_a_step(shapes: Path, tmp_path: Path) -> None:
    """Ten steps that are not logged; what torch and the small network call is counted apart."""
    patch = (
        "import gc\nfrom cifar import record\n"
        "record.LOG_SECONDS, calls = 1e9, [0, 0]\n"
        "def called(frame, event, argument):\n"
        "    if event == 'call' or event == 'c_call':\n"
        f"        ours = frame.f_code.co_filename.startswith({(f'{ROOT}/cifar', f'{ROOT}/train.py')})\n"
        "        calls[ours and event == 'call'] += 1\n"
        "def step(rank, number):\n"
        "    if number == 6: sys.setprofile(called)\n"
        "    if number == 16:\n"
        "        sys.setprofile(None)\n"
        "        print('calls', *calls, gc.isenabled() * len(gc.get_objects()))"
    )
    more = ("--data", shapes, "--network", "small", "--run", tmp_path / "run", "--epochs", 2, "--peak-epoch", 1, *FEW)
    done = subprocess.run(command(project(tmp_path, patch), *more), capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("calls ")]
    others, ours, objects = (int(word) for word in line.split()[1:])
    assert ours <= 560  # 54 in most steps
    assert others <= 14_000  # 1,203 in a step with torch 2.14
    assert 0 < objects < 100_000  # that a garbage collection looks at, of 500,000


def test_one_process_sends_nothing(step: dict[str, Any]) -> None:
    assert step["collectives"] == []


def test_two_processes_send_the_gradient_once(shapes: Path, tmp_path: Path) -> None:
    sent = profiled(shapes, tmp_path, 2, *FEW)["collectives"]
    reduced = sorted(size for name, size in sent if name == "gloo:all_reduce")
    metrics, *gradient = reduced
    assert metrics == 4 * 4  # loss, correct predictions, stop request, failure to write
    assert sum(gradient) == 4 * PARAMETERS
    assert len(gradient) == 4  # buckets: each is summed while the next is computed, and the last is small
    assert gradient == sorted(bucket.size for bucket in scaling_model.buckets("resnet", classes=4))
    assert min(gradient) < 0.06 * sum(gradient)
    assert len(sent) == 5  # batch-norm's statistics are rank 0's alone, and sent when they are used


def test_compressed_gradients_are_half_the_bytes(shapes: Path, tmp_path: Path) -> None:
    sent = profiled(shapes, tmp_path, 2, *FEW, "--gradient-compression", "bf16")["collectives"]
    metrics, *gradient = sorted(size for name, size in sent if name == "gloo:all_reduce")
    assert metrics == 4 * 4
    assert sum(gradient) == 2 * PARAMETERS
    assert gradient == sorted(bucket.size for bucket in scaling_model.buckets("resnet", 2, classes=4))

"""Counts that are the same on every machine, and where a step's time goes: all from torch's own records."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from cifar.profiling import COLLECTIVE, above, activities, covered, seconds_by_kind

GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")
BYTES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "long int": 8, "int": 4, "unsigned char": 1,
         "signed char": 1, "bool": 1}  # fmt: skip


def multiply_adds(function: Callable[[], object]) -> int:
    """Counts the multiply-adds of all convolutions and matrix products that are computed while `function` runs."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops()) // 2


def forward_multiply_adds(network: nn.Module) -> int:
    """Counts the multiply-adds of one image's forward pass. The network's mode and buffers are left as they were."""
    with torch.no_grad():
        return _of_an_image(network, network)


def step_multiply_adds(network: nn.Module) -> int:
    """Counts those of its forward and backward pass: gradients that no parameter needs are not computed."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]

    def step(image: torch.Tensor) -> None:
        torch.autograd.grad(network(image).sum(), learning)  # not backward(), for which DDP has hooks

    return _of_an_image(network, step)


def _of_an_image(network: nn.Module, function: Callable[[torch.Tensor], object]) -> int:
    mode, weight = network.training, next(network.parameters())
    image = torch.zeros(1, 3, 32, 32, device=weight.device)
    network.eval()
    try:
        return multiply_adds(lambda: function(image))
    finally:
        network.train(mode)


class Record(NamedTuple):
    """What one training step did. Keys are kinds and operators, bytes are what this process hands to collectives."""

    kinds: dict[str, float]  # seconds by kind of operator, on the device that computes
    copies: dict[str, int]  # aten::copy_ by what for: see `_purpose`
    optimizer: dict[str, int]  # operators called directly by the optimizer's step
    collectives: list[tuple[str, int]]  # each one's name and bytes
    kernels: int  # launched on a GPU
    gpu_seconds: float  # in which the GPU was busy


def recorder(device: str) -> profile:
    """Returns a profiler to be started and stopped around a step on this kind of device."""
    return profile(activities=activities(device), record_shapes=True)


def read(recorded: profile, device: str) -> Record:
    """Returns what a stopped profiler has seen."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        recorded.export_chrome_trace(str(path))  # the only source of types and strides
        events = json.loads(path.read_text())["traceEvents"]
    on_gpu = [event for event in events if event.get("cat") in GPU_EVENTS]
    events = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    copies = Counter(_purpose(event["args"]) for event in events if event["name"] == "aten::copy_")
    collectives = [(event["name"], _bytes(event["args"])) for event in events if COLLECTIVE.match(event["name"])]
    direct: Counter[str] = Counter()
    recorded_events = recorded.events() or []  # type: ignore[no-untyped-call]
    for event in recorded_events:
        if (outer := next(above(event), None)) and outer.name.startswith("Optimizer.step"):
            direct[event.name] += 1
    seconds = seconds_by_kind(recorded_events, device)
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in on_gpu]
    return Record(seconds, dict(copies), dict(direct), sorted(collectives), len(on_gpu), covered(spans) / 1e6)


def _purpose(arguments: dict[str, Any]) -> str:
    """Returns what a copy is for.

    It is 'scalar', 'precision' (a new type), 'layout' (of images or kernels, new strides) or 'other'.
    """
    (to, source, *_), types, strides = (arguments[key] for key in ("Input Dims", "Input type", "Input Strides"))
    if not to:
        return "scalar"
    if types[0] != types[1]:
        return "precision"
    return "layout" if len(source) == 4 and strides[0] != strides[1] else "other"


def _bytes(arguments: dict[str, Any]) -> int:
    shapes = arguments["Input Dims"]
    return sum(
        math.prod(shape) * BYTES.get(kind, 0) for shape, kind in zip(shapes, arguments["Input type"], strict=True)
    )

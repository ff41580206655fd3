"""Peak performance of the machine: matmul throughput in each precision, and memory bandwidth.

The matmuls have the shapes of `resnet`'s convolutions: positions x (9 x input channels) x output channels. On a GPU,
which those do not fill, there is a large one too. A precision's limit is the fastest of them, so that no fraction of it
flatters.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

from cifar.bench import interleave
from cifar.bench.context import COPY, Bench, products
from cifar.bench.interleave import Answer, Program
from cifar.bench.measurement import Measurement
from cifar.errors import command_line

ROWS = 8192  # positions: those of 8 images of 32x32, or of 512 of 4x4
SHAPES = ((576, 128), (1152, 128), (1152, 256), (2304, 512), (4608, 512))
FILLS_A_GPU = (8192, 8192)
COPIED = 1 << 28  # bytes, many times the caches


def measure(bench: Bench) -> list[Measurement]:
    """Measures the limits; also sets `bench.limits`, and what depends on the machine."""
    with Program("limit", ["-m", "cifar.bench.limit"], {}) as program:
        bench.runs_on(program.request("metadata"))
        shapes = (*SHAPES, FILLS_A_GPU) if bench.machine["gpus"] else SHAPES
        contestants: dict[str, tuple[Program, dict[str, Any]]] = {
            f"{precision} {shape}": (program, {"do": "multiply", "precision": precision, "shape": shape})
            for precision in bench.machine["precisions"]
            for shape in shapes
        }
        contestants[COPY] = (program, {"do": "copy"})
        answers = interleave.alternate(contestants, bench.repeats, bench.seconds / len(shapes))
    measured = []
    for precision in bench.machine["precisions"]:
        measured += bench.best(products(precision), 1e9, [
            Measurement("limit", f"{products(precision)}, {ROWS}x{shape[0]}x{shape[1]}", "10^9 multiply-adds/s",
                        interleave.rates(answers[f"{precision} {shape}"], ROWS * shape[0] * shape[1] / 1e9))
            for shape in shapes
        ])  # fmt: skip
    copied = interleave.rates(answers[COPY], 2 * COPIED / 1e9)
    measured += bench.best(COPY, 1e9, [Measurement("limit", f"{COPY}, read and written", "GB/s", copied)])
    return measured


@command_line("limit")
def main() -> None:
    """Runs the program that is measured: torch alone, on the GPU or on all cores."""
    import torch

    from cifar import launch
    from cifar.device import decide

    device = torch.device(decide(1).kind)

    def metadata() -> Answer:
        cpu = torch.cpu.get_capabilities().get("cpu_name", "CPU")
        return {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
            "gpus": torch.cuda.device_count() if device.type == "cuda" else 0,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "native_bf16": launch.native_bf16(device),
            "precisions": [
                "float32",
                *(["bf16"] if launch.native_bf16(device) else []),  # emulated bf16 is no hardware limit, and slow
                *(["float16"] if device.type == "cuda" else []),
            ],
        }

    @cache  # created by the first, uncounted request
    def operands(precision: str, inner: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        kind = {"float32": torch.float32, "bf16": torch.bfloat16, "float16": torch.float16}[precision]
        left, right = (torch.randn(*size, device=device).to(kind) for size in ((ROWS, inner), (inner, columns)))
        return left, right, torch.mm(left, right)

    @cache
    def arrays() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones(COPIED // 4, device=device), torch.ones(COPIED // 4, device=device)

    def repeated(function: Callable[[], object], amount: int) -> Answer:
        interleave.synchronize(device.type)
        began = time.perf_counter()
        for _ in range(amount):
            function()
        interleave.synchronize(device.type)
        return {"amount": amount, "seconds": time.perf_counter() - began}

    def multiply(precision: str, shape: tuple[int, int], amount: int) -> Answer:
        left, right, product = operands(precision, *shape)
        return repeated(lambda: torch.mm(left, right, out=product), amount)

    def copy(amount: int) -> Answer:
        source, target = arrays()
        return repeated(lambda: target.copy_(source), amount)

    interleave.serve({"metadata": metadata, "multiply": multiply, "copy": copy})


if __name__ == "__main__":
    main()

"""Maps of an explanation: in batches, as explain.py makes them, and one image at a time."""

import sys
import time

from cifar.bench import interleave
from cifar.bench.context import Bench
from cifar.bench.interleave import Answer, Program
from cifar.bench.measurement import Measurement


def measure(bench: Bench) -> list[Measurement]:
    """Measures Grad-CAM in float32, of two classes of each image, with random weights.

    The layer is the one that explain.py chooses.
    """
    with Program("explain", ["-m", "cifar.bench.explain", bench.recipe], {}) as program:
        metadata = program.request("metadata")
        contestants = {
            "batches": (program, {"do": "maps", "batch": metadata["batch"]}),
            "single": (program, {"do": "maps", "batch": 1}),
        }
        answers = interleave.alternate(contestants, bench.repeats, bench.seconds, metadata["batch"])
    rates, single = interleave.rates(answers["batches"]), interleave.rates(answers["single"])
    limit = bench.limit(metadata["multiply_adds"], "float32")
    return [
        Measurement("explain", f"maps in batches of {metadata['batch']}", "images/s", rates, limit, "one at a time",
                    interleave.quotients(rates, single)),
        Measurement("explain", "maps one at a time", "images/s", single, limit),
    ]  # fmt: skip


def main() -> None:
    """Runs the program that is measured: the functions that explain.py calls, in a process set up as its own."""
    import torch

    from cifar import launch, models, recipes
    from cifar.bench import counts
    from cifar.explain import layers, maps

    accelerator = launch.start()
    name = recipes.RECIPES[sys.argv[1]]().network
    layer = layers.default(layers.resolutions(name))
    images = torch.randn(maps.BATCH, 3, 32, 32, device=accelerator.device)
    images = images.contiguous(memory_format=torch.channels_last)
    network = models.create(name, 10, 0.0, 0, images).eval()
    classes = torch.tensor([[0, 1]] * maps.BATCH, device=accelerator.device)
    objectives = maps.one_hot(classes, 10)

    def explained(start: int, end: int) -> None:
        maps.compute(network, layer, "gradcam", images[start:end], objectives[start:end])

    def metadata() -> Answer:
        return {"batch": maps.BATCH, "multiply_adds": counts.multiply_adds(lambda: explained(0, 1))}

    def timed(amount: int, batch: int) -> Answer:
        began = time.perf_counter()
        for start in range(0, amount, batch):
            explained(start % maps.BATCH, start % maps.BATCH + batch)  # ends with its maps in the CPU's memory
        return {"amount": amount, "seconds": time.perf_counter() - began}

    interleave.serve({"metadata": metadata, "maps": timed})


if __name__ == "__main__":
    main()

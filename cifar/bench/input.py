"""The input pipeline: images/s on one core, and how long a step waits for a batch."""

from cifar.bench import interleave
from cifar.bench.context import Bench
from cifar.bench.measurement import Measurement

MADE = 256  # images: what it is measured in


def measure(bench: Bench) -> list[Measurement]:
    """Measures the input. The limit is how many images/s training would need if its steps were only matmuls."""
    with bench.ours("input") as ours, bench.plain() as plain:
        trained = bench.training(ours, plain)
        metadata = ours.request("metadata")
        makers = {"ours": (ours, {"do": "input"}), "plain": (plain, {"do": "input"})}
        made = interleave.alternate(makers, bench.repeats, bench.seconds, MADE)
    rates, plain_rates = interleave.rates(made["ours"]), interleave.rates(made["plain"])
    limit = bench.limit(metadata["step_multiply_adds"])
    return [
        Measurement("input", "training images from one core", "images/s", rates, limit, "plain",
                    interleave.quotients(rates, plain_rates)),
        *(
            Measurement("input", f"waiting for a batch, {name}", "of a step",
                        [answer["input"] / answer["seconds"] for answer in answers])
            for name, answers in trained.items()
        ),
    ]  # fmt: skip

"""Training images: how many a core makes, and how long a step waits for them."""

from cifar.bench import turns
from cifar.bench.context import Bench
from cifar.bench.figures import Figure

MADE = 256  # images: what it is measured in


def measure(bench: Bench) -> list[Figure]:
    """The limit is what training could use up if its steps were nothing but matrix products."""
    with bench.ours("input") as ours, bench.plain() as plain:
        trained = bench.training(ours, plain)
        facts = ours.turn("facts")
        makers = {"ours": (ours, {"do": "input"}), "plain": (plain, {"do": "input"})}
        made = turns.alternate(makers, bench.repeats, bench.seconds, MADE)
    rates, plain_rates = turns.rates(made["ours"]), turns.rates(made["plain"])
    limit = bench.steps_limit(facts)
    return [
        Figure("input", "training images from one core", "images/s", rates, limit, "plain",
               turns.quotients(rates, plain_rates)),
        *(
            Figure("input", f"waiting for a batch, {name}", "of a step", [t["input"] / t["seconds"] for t in answers])
            for name, answers in trained.items()
        ),
    ]  # fmt: skip

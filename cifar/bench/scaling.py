"""Two processes, each with half of the threads or a GPU of its own, against one; and the bytes that they exchange."""

from cifar.bench import turns
from cifar.bench.context import Bench
from cifar.bench.figures import Figure


def measure(bench: Bench) -> list[Figure]:
    """The same global batch on both sides. Nothing on a machine with a single GPU."""
    if bench.machine["gpus"] == 1:
        return []
    with bench.ours("one") as one, bench.ours("two", processes=2) as two:
        contestants = {"one": (one, {"do": "train"}), "two": (two, {"do": "train"})}
        answers = turns.alternate(contestants, bench.repeats, bench.seconds)
        profiles = [two.turn("profile", amount=1, uncounted=1) for _ in range(bench.repeats)]
        facts = one.turn("facts")
    reduced = [sum(size for name, size in p["collectives"] if "all_reduce" in name or "allreduce" in name)
               for p in profiles]  # fmt: skip
    others = [sum(size for _, size in p["collectives"]) - part for p, part in zip(profiles, reduced, strict=True)]
    bench.counts["collectives_per_step"] = profiles[0]["collectives"]
    gradient = ("the gradient in float32", 4 * facts["parameters"] / 1e6)
    rates = {name: turns.rates(answers[name], bench.batch) for name in answers}
    return [
        Figure("scaling", "training, 2 processes", "images/s", rates["two"], bench.steps_limit(facts), "1 process",
               turns.quotients(rates["two"], rates["one"])),
        Figure("scaling", "training, 1 process", "images/s", rates["one"], bench.steps_limit(facts)),
        # Around a ring of n each process sends 2(n-1)/n of what is summed: for two, just as much.
        Figure("scaling", "summed over the processes, each", "MB a step", [b / 1e6 for b in reduced], gradient),
        Figure("scaling", "sent from the first to the others", "MB a step", [b / 1e6 for b in others], gradient),
    ]  # fmt: skip

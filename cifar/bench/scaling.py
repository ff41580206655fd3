"""Two processes, each with half of the threads or a GPU of its own, against one; and the bytes that they exchange."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import NamedTuple

from cifar.bench import interleave, scaling_model
from cifar.bench.context import EPOCH, Bench
from cifar.bench.measurement import Measurement
from cifar.bench.scaling_model import Bucket
from cifar.recipes import RECIPES, override
from cifar.schedule import Schedule

RANKS = (1, 2, 4, 8)  # numbers of GPUs whose per-GPU batch one GPU computes
GROWING = (8, 16, 64, 256, 1024)  # numbers of GPUs that each compute the recipe's whole batch
GRAPHS = ("off", "auto")


class Phase(NamedTuple):
    """Consecutive steps of a training that cost the same."""

    image_size: int
    frozen: bool  # the early layers
    steps: int

    def __str__(self) -> str:
        return f"{self.image_size}x{self.image_size}{', frozen' if self.frozen else ''}"


Steps = dict[Phase, dict[int, list[float]]]  # seconds of a step, by number of GPUs that share the batch
Parts = dict[Phase, list[Bucket]]


def measure(bench: Bench) -> list[Measurement]:
    """Compares one process with two, at the same global batch. With a single GPU, see `on_one_gpu`."""
    if bench.machine["gpus"] == 1:
        return on_one_gpu(bench)
    with bench.ours("one") as one, bench.ours("two", processes=2) as two:
        contestants = {"one": (one, {"do": "train"}), "two": (two, {"do": "train"})}
        answers = interleave.alternate(contestants, bench.repeats, bench.seconds)
        profiles = [two.request("profile", amount=1, uncounted=1) for _ in range(bench.repeats)]
        metadata = one.request("metadata")
    reduced = [sum(size for name, size in p["collectives"] if "all_reduce" in name or "allreduce" in name)
               for p in profiles]  # fmt: skip
    others = [sum(size for _, size in p["collectives"]) - part for p, part in zip(profiles, reduced, strict=True)]
    bench.counts["collectives_per_step"] = profiles[0]["collectives"]
    gradient = ("the gradient in float32", 4 * metadata["parameters"] / 1e6)
    rates = {name: interleave.rates(answers[name], bench.batch) for name in answers}
    limit = bench.limit(metadata["step_multiply_adds"])
    return [
        Measurement("scaling", "training, 2 processes", "images/s", rates["two"], limit,
                    "1 process", interleave.quotients(rates["two"], rates["one"])),
        Measurement("scaling", "training, 1 process", "images/s", rates["one"], limit),
        # In a ring all-reduce of n processes each sends 2(n-1)/n of the data: for two, all of it.
        Measurement("scaling", "summed over the processes, each", "MB a step", [b / 1e6 for b in reduced], gradient),
        Measurement("scaling", "sent from the first to the others", "MB a step", [b / 1e6 for b in others], gradient),
    ]  # fmt: skip


def phases(schedule: Schedule) -> list[Phase]:
    """Returns the phases of a whole training: progressive resizing, and freezing."""

    def kind(step: int) -> tuple[int, bool]:
        return schedule.image_size(step), step >= schedule.freeze_step

    return [Phase(*of, len(list(steps))) for of, steps in groupby(range(schedule.total_steps), kind)]


def on_one_gpu(bench: Bench) -> list[Measurement]:
    """Times steps with the per-GPU batch of n GPUs, and extrapolates to n GPUs with the model.

    The computing is measured, in each phase of the recipe; the all-reduce within and between machines is modelled
    (scaling_model.py). The time of a whole training on CIFAR-10 is that of its steps.
    """
    recipe = RECIPES[bench.recipe]()
    training = phases(Schedule(override(recipe, {"global_batch_size": bench.batch}), EPOCH, 1))
    images = bench.batch * sum(phase.steps for phase in training)
    measured: list[Measurement] = []
    for graph in GRAPHS:
        how = "by graph" if graph == "auto" else "eager"
        parts = {phase: scaling_model.buckets(recipe.network, frozen=phase.frozen) for phase in training}
        if graph == "auto":
            parts = {phase: scaling_model.flat(overlapped) for phase, overlapped in parts.items()}
        steps = _steps(bench, graph, training)

        def computed(what: str, growth: int, seconds: list[float], alone: list[float]) -> Measurement:
            rates = [growth * images / each for each in seconds]
            of_one = [images / each for each in alone]
            return Measurement("scaling", what, "images/s", rates, None, "1 GPU", interleave.quotients(rates, of_one))

        one = _whole(steps, parts, 1, 1)
        for ranks in RANKS:
            for phase in training:
                what = f"{bench.batch // ranks} images of {phase}, {how}"
                measured.append(Measurement("scaling", what, "ms a step", [1e3 * s for s in steps[phase][ranks]]))
            several = _whole(steps, parts, ranks, ranks)
            measured.append(computed(f"{ranks} GPUs computed from it", 1, several, one))
            measured.append(Measurement("scaling", f"all steps of {bench.recipe} on CIFAR-10", "s", several))
        for gpus in GROWING:
            what = f"{gpus} GPUs, {bench.batch} images each, {how}"
            measured.append(computed(what, gpus, _whole(steps, parts, gpus, 1), one))
    return measured


def _steps(bench: Bench, graph: str, training: Sequence[Phase]) -> Steps:
    """Measures the seconds of a step in each phase, by number of GPUs that share the batch."""
    with ExitStack() as stack:
        # Augmented on the device: one process may have more loader workers than each of eight would.
        flags = ("--cuda-graph", graph, "--augmentation-backend", "device", "--global-batch-size")
        programs = {
            ranks: stack.enter_context(bench.ours(f"{graph}-{ranks}", *flags, bench.batch // ranks)) for ranks in RANKS
        }
        steps: Steps = {}
        for phase in training:  # in this order: what is frozen does not learn again
            request = {"do": "train", "image_size": phase.image_size, "frozen": phase.frozen}
            contestants = {str(ranks): (program, request) for ranks, program in programs.items()}
            answers = interleave.alternate(contestants, bench.repeats, bench.seconds / len(training))
            steps[phase] = {
                ranks: [done["seconds"] / done["amount"] for done in answers[str(ranks)]] for ranks in RANKS
            }
    return steps


def _whole(steps: Steps, parts: Parts, gpus: int, ranks: int) -> list[float]:
    """Returns the seconds of all steps on `gpus` with the per-GPU batch of `ranks`, for each repeat."""
    machine, repeats = scaling_model.Machine(), zip(*(of[ranks] for of in steps.values()), strict=True)
    return [
        sum(
            phase.steps * scaling_model.on_gpus(gpus, computing, parts[phase], machine).seconds
            for phase, computing in zip(steps, seconds, strict=True)
        )
        for seconds in repeats
    ]

"""Two processes, each with half of the threads or a GPU of its own, against one; and the bytes that they exchange."""

from contextlib import ExitStack

from cifar.bench import interleave, scaling_model
from cifar.bench.context import EPOCH, Bench
from cifar.bench.measurement import Measurement
from cifar.bench.scaling_model import Bucket
from cifar.recipes import RECIPES, override
from cifar.schedule import Schedule

RANKS = (1, 2, 4, 8)  # numbers of GPUs whose per-GPU batch one GPU computes
GROWING = (8, 16, 64, 256, 1024)  # numbers of GPUs that each compute the recipe's whole batch
GRAPHS = ("off", "auto")


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
    return [
        Measurement("scaling", "training, 2 processes", "images/s", rates["two"], bench.steps_limit(metadata),
                    "1 process", interleave.quotients(rates["two"], rates["one"])),
        Measurement("scaling", "training, 1 process", "images/s", rates["one"], bench.steps_limit(metadata)),
        # In a ring all-reduce of n processes each sends 2(n-1)/n of the data: for two, all of it.
        Measurement("scaling", "summed over the processes, each", "MB a step", [b / 1e6 for b in reduced], gradient),
        Measurement("scaling", "sent from the first to the others", "MB a step", [b / 1e6 for b in others], gradient),
    ]  # fmt: skip


def on_one_gpu(bench: Bench) -> list[Measurement]:
    """Times steps with the per-GPU batch of n GPUs, and extrapolates to n GPUs with the model.

    The computing is measured; the all-reduce within and between machines is modelled (scaling_model.py). The time of a
    whole training has its steps alone, all of them with images of full size and no layer frozen.
    """
    recipe, machine = RECIPES[bench.recipe](), scaling_model.Machine()
    overlapped = scaling_model.buckets(recipe.network)
    whole_training = Schedule(override(recipe, {"global_batch_size": bench.batch}), EPOCH, 1)

    def rates(gpus: int, batch: int, seconds: list[float], parts: list[Bucket]) -> list[float]:
        return [batch / scaling_model.on_gpus(gpus, computing, parts, machine).seconds for computing in seconds]

    def computed(what: str, of_all: list[float], of_one: list[float]) -> Measurement:
        return Measurement("scaling", what, "images/s", of_all, None, "1 GPU", interleave.quotients(of_all, of_one))

    measured: list[Measurement] = []
    for graph in GRAPHS:
        with ExitStack() as stack:
            # Augmented on the device: one process may have more loader workers than each of eight would.
            flags = ("--cuda-graph", graph, "--augmentation-backend", "device", "--global-batch-size")
            programs = {
                ranks: stack.enter_context(bench.ours(f"{graph}-{ranks}", *flags, bench.batch // ranks))
                for ranks in RANKS
            }
            contestants = {str(ranks): (program, {"do": "train"}) for ranks, program in programs.items()}
            answers = interleave.alternate(contestants, bench.repeats, bench.seconds)
        how = "by graph" if graph == "auto" else "eager"
        parts = scaling_model.flat(overlapped) if graph == "auto" else overlapped
        steps = {ranks: [done["seconds"] / done["amount"] for done in answers[str(ranks)]] for ranks in RANKS}
        one = rates(1, bench.batch, steps[1], parts)
        for ranks, seconds in steps.items():
            what = f"a step of {bench.batch // ranks} images, {how}"
            measured.append(Measurement("scaling", what, "ms", [1e3 * step for step in seconds]))
            several = rates(ranks, bench.batch, seconds, parts)
            measured.append(computed(f"{ranks} GPUs computed from it", several, one))
            whole = [whole_training.total_steps * bench.batch / rate for rate in several]
            measured.append(Measurement("scaling", f"all steps of {bench.recipe} on CIFAR-10", "s", whole))
        measured += [
            computed(
                f"{gpus} GPUs, {bench.batch} images each, {how}", rates(gpus, gpus * bench.batch, steps[1], parts), one
            )
            for gpus in GROWING
        ]
    return measured

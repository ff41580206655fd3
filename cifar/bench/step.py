"""A training step as the launcher runs it, where its time goes, and an evaluation."""

from collections.abc import Sequence

from cifar.bench import interleave
from cifar.bench.context import Bench
from cifar.bench.interleave import Answer
from cifar.bench.measurement import Measurement

EVALUATED = 500  # images: evaluation's batch, and what it is measured in


def measure(bench: Bench) -> list[Measurement]:
    """Measures training steps and evaluation.

    Ratios are to the plain loop; evaluation's also to the forward pass only, on images that are ready.
    """
    with bench.ours("ours") as ours, bench.plain() as plain:
        trained = bench.training(ours, plain)
        profiles = [ours.request("profile", amount=1, uncounted=1) for _ in range(bench.repeats)]
        metadata = ours.request("metadata")
        evaluators = {
            "ours": (ours, {"do": "evaluate"}),
            "forward": (ours, {"do": "forward"}),
            "plain": (plain, {"do": "evaluate"}),
        }
        evaluated = interleave.alternate(evaluators, bench.repeats, bench.seconds, EVALUATED)
    bench.counts |= {"multiply_adds_per_image": metadata["multiply_adds"], "parameters": metadata["parameters"]}
    bench.counts |= {"multiply_adds_of_a_step_per_image": metadata["step_multiply_adds"]}
    bench.counts |= {"copies_per_step": profiles[0]["copies"], "optimizer_per_step": profiles[0]["optimizer"]}

    rates, plain_rates = (interleave.rates(trained[name], bench.batch) for name in ("ours", "plain"))
    evaluating, forward, plain_evaluating = (interleave.rates(evaluated[name]) for name in ("ours", "forward", "plain"))
    limit, forward_limit = bench.limit(metadata["step_multiply_adds"]), bench.limit(metadata["multiply_adds"])
    per_image = metadata["step_multiply_adds"] / 1e9
    name = f"training, {bench.precision}"
    return [
        Measurement("step", name, "images/s", rates, limit, "plain", interleave.quotients(rates, plain_rates)),
        Measurement("step", name, "10^9 multiply-adds/s", [rate * per_image for rate in rates],
                    (limit[0], limit[1] * per_image)),
        *(_on_a_gpu(trained["ours"], profiles) if bench.machine["gpus"] else ()),
        Measurement("step", "training, plain", "images/s", plain_rates, limit),
        *(
            Measurement("step", f"time for {kind}", "of a step",
                        [profile["kinds"][kind] / profile["seconds"] for profile in profiles])
            for kind in profiles[0]["kinds"]
        ),
        Measurement("step", "time for the rest", "of a step",
                    [1 - sum(profile["kinds"].values()) / profile["seconds"] for profile in profiles]),
        Measurement("step", "evaluation", "images/s", evaluating, forward_limit, "plain",
                    interleave.quotients(evaluating, plain_evaluating)),
        Measurement("step", "evaluation", "images/s", evaluating, forward_limit, "forward pass",
                    interleave.quotients(evaluating, forward)),
    ]  # fmt: skip


def _on_a_gpu(trained: Sequence[Answer], profiles: Sequence[Answer]) -> list[Measurement]:
    """Returns host time, kernel launches and idle time of the GPU in a step."""
    seconds = [done["seconds"] / done["amount"] for done in trained]
    return [
        Measurement("step", "a step", "ms", [1e3 * step for step in seconds]),
        Measurement("step", "the host's part of it", "ms", [1e3 * done["host"] / done["amount"] for done in trained]),
        Measurement("step", "kernels", "of a step", [profile["kernels"] for profile in profiles]),
        Measurement("step", "GPU idle", "of a step",
                    [max(0.0, 1 - profile["gpu_seconds"] / step)
                     for profile, step in zip(profiles, seconds, strict=True)]),
    ]  # fmt: skip

"""Checkpoints: how long a save blocks training, and how long verifying and restoring take."""

from statistics import median

from cifar.bench import interleave
from cifar.bench.context import COPY, EPOCH, Bench
from cifar.bench.interleave import Answer
from cifar.bench.measurement import Measurement


def measure(bench: Bench) -> list[Measurement]:
    """Measures checkpoints, with train.py saving after every step.

    The baseline, torch.save and torch.load, has no checksums, sync or rename. An epoch's time is extrapolated from the
    same measurements' step times to CIFAR-10's images.
    """
    with bench.ours("checkpoint", "--checkpoint-every", 1) as ours, bench.plain() as plain:
        savers = {"ours": (ours, {"do": "train"}), "plain": (plain, {"do": "save"})}
        plain.request("train", amount=1)  # before it, Adam has nothing to save
        saved = interleave.alternate(savers, bench.repeats, bench.seconds)
        readers = {
            "ours": (ours, {"do": "restore"}),
            "plain": (plain, {"do": "restore"}),
        }
        restored = interleave.alternate(readers, bench.repeats, bench.seconds)
    size = restored["ours"][0]["bytes"]
    seconds, plain_seconds = [median(t["save"]) for t in saved["ours"]], _each(saved["plain"])
    steps = [t["seconds"] / t["amount"] for t in saved["ours"]]
    shares = [s / (s + step * EPOCH / bench.batch) for s, step in zip(seconds, steps, strict=True)]
    reading, plain_reading = _each(restored["ours"]), _each(restored["plain"])
    limit = (COPY, bench.limits[COPY] / 1e6)
    return [
        Measurement("checkpoint", "training waits for a save", "s", seconds, None, "plain",
                    interleave.quotients(plain_seconds, seconds)),
        Measurement("checkpoint", f"a save's {size / 1e6:.1f} MB", "MB/s", [size / s / 1e6 for s in seconds], limit),
        Measurement("checkpoint", "a save", "of an epoch and it", shares),
        Measurement("checkpoint", "verified and restored", "s", reading, None, "plain",
                    interleave.quotients(plain_reading, reading)),
        Measurement("checkpoint", "verified and restored", "MB/s", [size / s / 1e6 for s in reading], limit),
    ]  # fmt: skip


def _each(answers: list[Answer]) -> list[float]:
    return [answer["seconds"] / answer["amount"] for answer in answers]

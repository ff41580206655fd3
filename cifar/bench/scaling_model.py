"""How long a step takes on n processes, and where this job stops scaling.

    python -m cifar.bench.scaling_model                    # 8 to 1,024 GPUs, computed
    sudo python -m cifar.bench.scaling_model --measure     # two processes over a shaped network, measured and computed

A step is a forward pass and a backward pass, during which gradients are all-reduced bucket by bucket as they become
ready; communication that outlasts it is exposed. Then one small all-reduce of metrics decides whether to continue.
Processes wait for the slowest of them.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from cifar.bench.context import Bench
from cifar.bench.measurement import short, spread
from cifar.bench.shaped import Link, two_machines
from cifar.errors import Parser, command_line
from cifar.recipes import RECIPES

SEGMENT = 1 << 20  # bytes: gloo's
SUMS = 1  # small all-reduces in a step besides those of the gradients


class Bucket(NamedTuple):
    """A part of the gradient that is summed at once. `ready` is the fraction of a step's computing before it."""

    size: int  # bytes
    ready: float


class Network(NamedTuple):
    """What connects n processes."""

    bandwidth: float  # bytes per second that a process sends, and receives at the same time
    delay: float  # seconds from one to another
    hops: float  # delays that a message takes, with its handshake
    nccl: bool = False  # tree all-reduces where faster, and pipelined; gloo has neither


class Step(NamedTuple):
    """Seconds of one step, and what they are made of."""

    computing: float
    exposed: float  # communication that no computing hides
    waiting: float  # for the slowest process

    @property
    def seconds(self) -> float:
        return self.computing + self.exposed + self.waiting


def buckets(network_name: str, bytes_each: int = 4, classes: int = 10, frozen: bool = False) -> list[Bucket]:
    """Returns a network's gradient as DDP sums it, in order; `bytes_each` is 2 if it is compressed.

    Gradients become ready from the last layer to the first; `frozen` early layers have none. Work is counted in
    multiply-adds; the backward pass has twice those of the forward pass.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cifar import launch, models

    network = models.build(network_name, classes, 0.0).eval()
    if frozen:
        models.freeze(network)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    root = type(network).__name__
    work = {name.removeprefix(f"{root}."): sum(of.values()) for name, of in counter.get_flop_counts().items()}
    learning = {
        name: [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        for name, module in network.named_modules()
    }
    forward, backward = counter.get_total_flops(), 2 * sum(work.get(name, 0) for name, own in learning.items() if own)
    found: list[Bucket] = []
    size, done = 0, forward
    for name, own in reversed(learning.items()):
        done += 2 * work.get(name, 0) if own else 0
        for parameter in own:
            size += bytes_each * parameter.numel()
            if size >= (launch.BUCKET_MB << 20) * bytes_each / 4:  # DDP's limit is for float32
                found.append(Bucket(size, done / (forward + backward)))
                size = 0
    return [*found, Bucket(size, 1.0)] if size else found


def sum_seconds(size: float, processes: int, network: Network) -> float:
    """Returns the seconds of a sum of `size` bytes over all processes.

    Around a ring each sends 2(n-1)/n of it, in 2(n-1) messages. NCCL needs only as many messages as a double binary
    tree is deep, up and down (Sanders, Speck, Traff 2009). gloo cuts each into segments, waits for the other side
    before each, and has two of them under way.
    """
    if processes == 1:
        return 0.0
    messages, sending = 2 * (processes - 1), 2 * (processes - 1) / processes * size / network.bandwidth
    waiting = network.hops * network.delay
    if network.nccl:
        return min(messages, 2 * math.ceil(math.log2(processes))) * waiting + sending
    if not size:
        return messages * waiting
    segments = messages * max(2, math.ceil(size / processes / SEGMENT))
    return max(sending, (sending + segments * waiting) / 2)


def step(computing: float, parts: Sequence[Bucket], processes: int, network: Network, deviation: float = 0.0) -> Step:
    """Models a step.

    `computing` is a process's seconds without any network, `deviation` their standard deviation. The maximum of n
    normal variables is about sqrt(2 ln n) deviations above their mean, a little less for small n.
    """
    if processes == 1:
        return Step(computing, 0.0, 0.0)
    ends = 0.0
    for bucket in parts:
        ends = max(ends, bucket.ready * computing) + sum_seconds(bucket.size, processes, network)
    exposed = max(0.0, ends - computing)
    small = sum_seconds(0, processes, network) * SUMS
    return Step(computing, exposed + small, deviation * math.sqrt(2 * math.log(processes)))


# ---- on GPUs: assumed


class Machine(NamedTuple):
    """An assumed cluster. Nothing of it was measured here."""

    rate: float = 48_000.0  # images/s: 0.35 of an A100's 312e12 bf16 FLOP/s, at 6 x 379 M FLOP an image
    least: float = 3e-3  # seconds of a step's some 300 kernels, at 10 microseconds each
    deviation: float = 0.03  # of a step's time
    inside: Network = Network(200e9, 5e-6, 1, nccl=True)  # up to 8 GPUs: NVLink
    between: Network = Network(25e9, 15e-6, 1, nccl=True)  # a 200 Gbit/s adapter for each GPU

    def computing(self, batch: float) -> float:
        """Returns the seconds that a GPU computes for a step of `batch` images."""
        return max(self.least, batch / self.rate)


def flat(parts: Sequence[Bucket]) -> list[Bucket]:
    """Returns the same gradient as a CUDA graph sums it: all of it at once, after the backward pass."""
    return [Bucket(sum(part.size for part in parts), 1.0)]


def on_gpus(gpus: int, computing: float, parts: Sequence[Bucket], machine: Machine) -> Step:
    """Models a step on so many GPUs that each compute for `computing` seconds."""
    network = machine.inside if gpus <= 8 else machine.between
    return step(computing, parts, gpus, network, machine.deviation * computing)


def table() -> str:
    """Tabulates the model from 8 to 1,024 GPUs: at the recipe's batch, and at a batch that grows with them."""
    machine, recipe = Machine(), RECIPES["resnet"]()
    compression = {"float32": buckets(recipe.network), "bf16": buckets(recipe.network, 2)}
    alone = recipe.global_batch_size / machine.computing(recipe.global_batch_size)
    size, inside, between = sum(size for size, _ in compression["float32"]), machine.inside, machine.between
    assumed = (
        f"assumed: {machine.rate:,.0f} images/s a GPU, {machine.least * 1e3:g} ms a step at least, "
        f"{inside.bandwidth / 1e9:g} GB/s within 8 GPUs, {between.bandwidth / 1e9:g} GB/s beyond, "
        f"{inside.delay * 1e6:g} and {between.delay * 1e6:g} microseconds, trees, steps vary by {machine.deviation:.0%}"
    )
    lines = [
        f"{recipe.network}: {size / 1e6:.1f} MB of gradients in {len(compression['float32'])} buckets", assumed,
        "GPUs   images a GPU   ms a step   computing   exposed (bf16)   waiting   images/s   of linear",
    ]  # fmt: skip
    for growing in (False, True):
        lines.append("a batch of 512 for each GPU" if growing else "the recipe's batch of 512")
        for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
            batch = recipe.global_batch_size / (1 if growing else gpus)
            if batch < 1:
                lines.append(f"{gpus:>5}   refused: the batch has fewer images than there are GPUs")
                continue
            found = on_gpus(gpus, machine.computing(batch), compression["float32"], machine)
            half = on_gpus(gpus, machine.computing(batch), compression["bf16"], machine)
            rate = gpus * batch / found.seconds
            lines.append(
                f"{gpus:>5}{batch:>15g}{found.seconds * 1e3:>12.2f}{found.computing * 1e3:>12.2f}"
                f"{found.exposed * 1e3:>9.2f} ({half.exposed * 1e3:.2f}){found.waiting * 1e3:>10.2f}{rate:>11,.0f}"
                f"{rate / gpus / alone:>12.0%}"
            )
    return "\n".join(lines)


# ---- here: measured

# bit/s and seconds: links for fitting (FAST, SLOW, FAR) and for comparison (POINTS). At most 1 Gbit/s: the thread
# that forwards packets shares the cores with both processes.
FAST, SLOW, FAR = (1_000e6, 0.0), (100e6, 0.0), (250e6, 0.02)
POINTS = [(500e6, 0.0), (250e6, 0.0), (1_000e6, 0.005), (1_000e6, 0.01), (500e6, 0.01), (100e6, 0.02)]
BATCH = 32  # images of a step of both


def check(repeats: int, steps: int) -> str:
    """Compares the model with two processes, with a core each, over links of several speeds.

    Each link is measured `repeats` times, for so many steps. The model's three free parameters are fitted to three
    links: computing time (including the CPU cost of sending) to a fast one, readiness of the first bucket to a slow
    one, delays per message to a distant one.
    """
    lines = ["Mbit/s   delay   measured ms a step (lowest to highest)   computed   error"]
    found: dict[tuple[float, float], list[float]] = {point: [] for point in (FAST, SLOW, FAR, *POINTS)}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=Path.cwd()) as folder, Link() as link:
        bench = Bench("resnet", repeats, 0.0, Path(folder), machine={"native_bf16": False, "gpus": 0})
        with two_machines(bench, "--global-batch-size", BATCH, "--augmentation-backend", "device") as program:
            for _ in range(repeats):
                for point, seconds in found.items():
                    link.bits, link.delay = point
                    answer = program.request("train", amount=steps, uncounted=2)
                    seconds.append(answer["seconds"] / steps)
    first, *others = buckets("resnet")

    def computed(point: tuple[float, float], numbers: Sequence[float]) -> float:
        computing, ready, hops = numbers
        network = Network(point[0] / 8, point[1], hops)
        return step(computing, [Bucket(first.size, ready), *others], 2, network).seconds

    numbers = [1.0, 1.0, 0.0]

    def with_one(which: int, point: tuple[float, float]) -> Callable[[float], float]:
        return lambda value: computed(point, [*numbers[:which], value, *numbers[which + 1 :]])

    for _ in range(10):  # each is fitted to one link, given the others, until they agree
        for which, (point, highest) in enumerate(((FAST, 1e3), (SLOW, 1.0), (FAR, 1e3))):
            numbers[which] = _solved(with_one(which, point), median(found[point]), highest)
    computing, ready, hops = numbers
    for (bits, delay), seconds in found.items():
        model = computed((bits, delay), numbers)
        error = "fitted" if (bits, delay) in (FAST, SLOW, FAR) else f"{model / median(seconds) - 1:+.1%}"
        lines.append(f"{bits / 1e6:>6,.0f}{delay * 1e3:>5g} ms   {spread([1e3 * s for s in seconds]):<38}"
                     f"{short(model * 1e3):>11}   {error}")  # fmt: skip
    fit = f"computing {computing * 1e3:.0f} ms, first bucket after {ready:.2f} of it, {hops:.1f} delays a message"
    return "\n".join([*lines, f"{fit}, n = {repeats}"])


def _solved(function: Callable[[float], float], value: float, highest: float) -> float:
    """Solves function(x) = value for an increasing function between 0 and `highest`, by bisection."""
    low, high = 0.0, highest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < value else (low, middle)
    return low


def parse_command_line() -> argparse.Namespace:
    """Raises UserError for a flag that is unknown, or no number."""
    parser = Parser(
        prog="python -m cifar.bench.scaling_model", allow_abbrev=False,
        description="How long a step takes on many processes.",
    )  # fmt: skip
    parser.add_argument("--measure", action="store_true", help="check it here: Linux, root, ten minutes")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="measurements of each link (3)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="steps of a measurement (8)")
    return parser.parse_args()


def main() -> None:
    with command_line("bench"):
        arguments = parse_command_line()
        print(check(arguments.repeats, arguments.steps) if arguments.measure else table())


if __name__ == "__main__":
    main()

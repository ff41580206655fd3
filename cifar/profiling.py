"""Some training steps under torch's profiler: a trace, seconds by kind of operator, and what a step waits for.

Every rank writes its own files, `profile/attempt-A.rank-R.*` in the run directory: traces are too large to send to
rank 0.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, schedule

from cifar import files
from cifar.errors import UserError

WARM_UP = 5  # steps before the trace, for autotuning and allocation
IMAGES, EVALUATION = "images", "evaluation"  # what loading.py and evaluation.py call their parts of a trace

# An operator belongs to the first kind whose pattern is found in its name; within the optimizer's step, to that.
KINDS = {
    "convolution": r"(?i)conv",
    "normalisation": r"(?i)batch_?norm|group_?norm|layer_?norm",
    "pooling": r"(?i)pool",
    "activation": r"(?i)relu|threshold|clamp|celu|gelu|silu",
    "fills and copies": r"(?i)copy|copies|clone|contiguous|zero|fill|aten::cat$",
}
OPTIMIZER = "optimizer"
COLLECTIVE = re.compile(r"(gloo|nccl):|ncclDevKernel")

Span = tuple[float, float]  # begin and end


class Waits(NamedTuple):
    """The seconds of the traced steps, by what they were spent on; evaluations between them left out."""

    device: float  # computing
    host: float  # Python, and launching what the device computes
    images: float
    ranks: float  # collectives that no computation overlaps

    def sentence(self, steps: int) -> str:
        """Says what a step waits for, the longest first."""
        names = dict(zip(("the device", "the host", "images", "the other ranks"), self, strict=True))
        first, *rest = sorted(names, key=lambda name: -names[name])
        parts = {name: f"{seconds / sum(self):.0%}" for name, seconds in names.items()}
        others = ", ".join(f"{name} {parts[name]}" for name in rest)
        return f"a step of {1e3 * sum(self) / steps:,.1f} ms waits for {first} {parts[first]} of its time; {others}"


class StepProfiler:
    """Traces `steps` steps after some warm-up steps; nothing if `steps` is 0."""

    def __init__(self, steps: int, stem: Path, accelerator: Accelerator) -> None:
        self.steps, self.stem, self.accelerator = steps, stem, accelerator
        self.profile: profile | None = None
        if steps:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it reports an error for each GPU that is not there
            when = schedule(wait=WARM_UP - 1, warmup=1, active=steps, repeat=1)
            self.profile = profile(
                activities=activities(accelerator.device.type), schedule=when, on_trace_ready=self._write
            )

    def step(self) -> None:
        """Tells the profiler that a step has ended. Call it at the end of each step."""
        if self.profile:
            self.profile.step()

    def _write(self, traced: profile) -> None:
        """Leaves trace and table in the run's directory, and prints the table on rank 0. A full disk is no failure."""
        device, events = self.accelerator.device.type, traced.events() or []  # type: ignore[no-untyped-call]
        lines = [f"profile of {self.steps} steps, milliseconds of each by kind of operator"]
        waited, by_kind = waits(events, device), seconds_by_kind(events, device)
        by_kind["the rest"] = sum(waited) - sum(by_kind.values())
        lines += [
            f"  {name:16} {1e3 * seconds / self.steps:9.2f}"
            for name, seconds in sorted(by_kind.items(), key=lambda item: -item[1])
        ]
        lines.append(waited.sentence(self.steps))
        trace = Path(f"{self.stem}.pt.trace.json.gz")  # as TensorBoard's profiler plugin wants it
        try:
            self.stem.parent.mkdir(exist_ok=True)
            temporary = trace.with_name(f".{trace.name}.tmp.gz")
            traced.export_chrome_trace(str(temporary))
            temporary.rename(trace)
            files.replace(Path(f"{self.stem}.txt"), "\n".join(lines) + "\n")
            lines.append(f"the trace is {trace}; https://ui.perfetto.dev shows it")
        except OSError as error:
            lines.append(f"{trace} cannot be written ({error.strerror}); training continues without it")
        if self.accelerator.is_main_process:
            print("\n".join(lines), flush=True)


def check(steps: int, total: int) -> None:
    """Raises UserError where a run of `total` steps is too short for a profile of `steps`."""
    if steps and WARM_UP + steps > total:
        raise UserError(f"--profile {steps} needs {WARM_UP + steps} steps, and the run has {total}; ask for fewer")


@contextmanager
def of_steps(
    steps: int, accelerator: Accelerator, run: Path, attempt: int, done: int, total: int
) -> Iterator[StepProfiler]:
    """Yields a profiler of the next `steps` of a run's `total` steps, of which some are done.

    An attempt that resumes from a checkpoint and has too few left does without.
    """
    if done + WARM_UP + steps > total:
        steps = 0
    stem = run / "profile" / f"attempt-{attempt}.rank-{accelerator.process_index}"
    profiler = StepProfiler(steps, stem, accelerator)
    with profiler.profile or nullcontext():
        try:
            yield profiler
        finally:
            if profiler.profile:
                profiler.profile.on_trace_ready = None  # do not write an incomplete profile


def activities(device: str) -> list[ProfilerActivity]:
    """Returns what a profiler records where this kind of device computes."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]


def seconds_by_kind(events: Sequence[Any], device: str) -> dict[str, float]:
    """Sums the seconds of operators and kernels in a profiler's events, by KINDS; the optimizer's are its alone."""
    seconds = dict.fromkeys((*KINDS, OPTIMIZER), 0.0)
    for event in events:
        if event.device_type.name != "CPU" or COLLECTIVE.match(event.name):
            continue  # a kernel's time is that of the operator that launched it, too
        in_optimizer = any(each.name.startswith("Optimizer.") for each in (event, *above(event)))
        found = OPTIMIZER if in_optimizer else _kind_of_operator(event.name)
        if found:
            seconds[found] += (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6
    return seconds


def _kind_of_operator(name: str) -> str | None:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)


def above(event: Any) -> Iterator[Any]:
    """Yields the ancestors of an event, nearest first."""
    while (event := event.cpu_parent) is not None:
        yield event


def waits(events: Sequence[Any], device: str) -> Waits:
    """Returns what the traced steps were spent on, from a profiler's events.

    At each moment only the first of these counts: an evaluation, computing, the wait for images, a collective. On a
    CPU, computing that makes images is part of that wait.
    """
    host = [event for event in events if event.device_type.name == "CPU"]
    steps = [_span(event) for event in host if event.name.startswith("ProfilerStep")]
    begin, end = min(steps)[0], max(steps)[1]
    spans = {
        "evaluation": [_span(event) for event in host if event.name == EVALUATION],
        "device": [_span(event) for event in events if _computes(event, device)],
        "images": [_span(event) for event in host if event.name == IMAGES],
        "ranks": [_span(event) for event in events if COLLECTIVE.match(event.name)],
    }
    order = ("evaluation", "images", "device", "ranks") if device == "cpu" else tuple(spans)
    counted: list[Span] = []
    seconds = {}
    for what in order:
        before = covered(counted)
        counted += [(max(begin, a), min(end, b)) for a, b in spans[what] if a < end and b > begin]
        seconds[what] = (covered(counted) - before) / 1e6
    host_seconds = (end - begin) / 1e6 - sum(seconds.values())
    return Waits(seconds["device"], host_seconds, seconds["images"], seconds["ranks"])


def covered(spans: Sequence[Span]) -> float:
    """Returns how much of the time lies in at least one of the spans."""
    total, until = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _span(event: Any) -> Span:
    return event.time_range.start, event.time_range.end


def _computes(event: Any, device: str) -> bool:
    """Returns whether an event is a kernel or a copy on a GPU, or an operator on a CPU."""
    if device == "cuda":
        on_gpu = event.device_type.name == "CUDA" and not event.is_user_annotation
        return on_gpu and not COLLECTIVE.match(event.name)
    return bool(event.name.startswith("aten::"))

"""Shared by all benchmarks: settings, limits of the machine, and the programs that are measured."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from cifar import recipes
from cifar.bench import interleave
from cifar.bench.interleave import Answer, Program
from cifar.bench.measurement import Measurement
from cifar.data.cache import open_data

IMAGES = {"train": 25_000, "test": 5_000}
EPOCH = 50_000  # images: CIFAR-10's
# Repeats, and seconds of each measurement, by default. A GPU makes hundreds of steps in a second, and the starts of the
# programs take most of the time there.
ON_A_CPU, ON_A_GPU = (5, 5.0), (3, 1.0)
COPY = "memory copy"  # name of the memory-bandwidth limit, in bytes per second


def products(precision: str) -> str:
    """Names the matmul limit in a precision, in multiply-adds per second."""
    return f"{precision} matmul"


@dataclass
class Bench:
    """One invocation of the benchmark. Programs write to `folder`, which is deleted at the end."""

    recipe: str
    repeats: int  # 0: the machine's default, as for the next
    seconds: float  # of one measurement
    folder: Path
    machine: Answer = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)  # what does not depend on time
    _training: dict[str, list[Answer]] | None = None

    def runs_on(self, machine: Answer) -> None:
        """Stores the machine's description and sets the defaults for it."""
        self.machine = machine
        repeats, seconds = ON_A_GPU if machine["gpus"] else ON_A_CPU
        self.repeats, self.seconds = self.repeats or repeats, self.seconds or seconds

    @property
    def precision(self) -> str:
        """The launcher's --mixed_precision."""
        return "bf16" if self.machine["native_bf16"] else "no"

    @property
    def batch(self) -> int:
        """Images of a step."""
        return recipes.RECIPES[self.recipe]().global_batch_size

    def best(self, name: str, unit: float, measured: list[Measurement]) -> list[Measurement]:
        """Records the highest median as the limit `name`; `unit` is that of the measurements."""
        self.limits[name] = unit * max(median(each.values) for each in measured)
        return measured

    def limit(self, multiply_adds: int, precision: str = "") -> tuple[str, float]:
        """Returns the images per second if an image cost its matmuls alone, by default in the launcher's precision."""
        name = products(precision or ("bf16" if self.precision == "bf16" else "float32"))
        return f"{name}, {multiply_adds:,} an image", self.limits[name] / multiply_adds

    # ---- programs

    def ours(
        self, name: str, *arguments: object, run: str = "", environment: Mapping[str, str] | None = None, **more: Any
    ) -> Program:
        """Starts train.py with the bench's recipe, as the launcher starts it, under observation.

        `run` names the run directory where several machines have one in common; `more` is for `launch`.
        """
        environment = {**self._environment(), **(environment or {})}
        return self.launch(name, *self._arguments(run or name), *arguments, environment=environment, **more)

    def launch(
        self,
        name: str,
        *arguments: object,
        processes: int = 1,
        machines: Sequence[object] = (),
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        """Starts train.py with these arguments.

        With several machines, `machines` are arguments of this machine's launcher; `before` is a command prefix.
        """
        if processes > 1:
            config = "multi_gpu" if self.machine["gpus"] else "cpu_2proc"
        else:
            config = "single_gpu" if self.machine["gpus"] else "cpu"
        config_file = interleave.ROOT / "accelerate_configs" / f"{config}.yaml"
        launcher = ("-m", "accelerate.commands.launch", "--config_file", config_file, "--mixed_precision",
                    self.precision, "--num_processes", processes, "--main_process_port", 29400 if machines else 0,
                    *machines, "--module", "cifar.bench.probe")  # fmt: skip
        return Program(name, [str(word) for word in (*launcher, *arguments)], environment or {}, before)

    def plain(self, *arguments: object) -> Program:
        words = ("-m", "cifar.bench.plain", *self._arguments("plain"), *arguments)
        return Program("plain", [str(word) for word in words], self._environment())

    def _arguments(self, name: str) -> list[object]:
        # Enough epochs that no measurement reaches the end. Images have their full size, even with progressive
        # resizing, and nothing is frozen, unless a request asks for it (scaling.py).
        return ["--recipe", self.recipe, "--data", self.images(), "--run", self.folder / name, "--epochs", 1000,
                "--image-sizes", 32]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {"XDG_CACHE_HOME": str(self.folder / "cache")}

    def training(self, ours: Program, plain: Program) -> dict[str, list[Answer]]:
        """Returns measurements of training steps, made once for all parts."""
        if self._training is None:
            contestants = {"ours": (ours, {"do": "train"}), "plain": (plain, {"do": "train"})}
            self._training = interleave.alternate(contestants, self.repeats, self.seconds)
        return self._training

    def images(self) -> Path:
        """Returns a zip of the scanned digits as JPEG, repeated: only speed matters here."""
        path = self.folder / "images.zip"
        if path.exists():
            return path
        data = open_data("digits")
        with zipfile.ZipFile(path, "w") as archive:
            for split, count in IMAGES.items():
                images, labels = (getattr(data, f"{split}_{kind}") for kind in ("images", "labels"))
                encoded = [_jpeg(image) for image in images]
                for number in range(count):
                    which = number % len(encoded)
                    name = f"{split}/{data.classes[labels[which]]}/{number:05}.jpg"
                    archive.writestr(zipfile.ZipInfo(name), encoded[which])
        return path


def _jpeg(image: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()

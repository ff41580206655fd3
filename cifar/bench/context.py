"""What all parts of the bench share: how much is measured, on which machine, and the programs that are measured."""

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
COPY = "memory copy"  # the name of a limit, in bytes per second


def products(precision: str) -> str:
    """The name of another, in multiply-adds per second."""
    return f"{precision} matrix products"


@dataclass
class Bench:
    """One call of the bench. What the programs write goes into `folder`, which is thrown away at the end."""

    recipe: str
    repeats: int
    seconds: float  # of one turn
    folder: Path
    machine: Answer = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)  # what does not depend on time
    _training: dict[str, list[Answer]] | None = None

    @property
    def precision(self) -> str:
        """What the launcher is given."""
        return "bf16" if self.machine["native_bf16"] else "no"

    @property
    def batch(self) -> int:
        """Images of a step."""
        return recipes.RECIPES[self.recipe]().global_batch_size

    def best(self, name: str, unit: float, figures: list[Measurement]) -> list[Measurement]:
        """Makes the highest median a limit; `unit` is that of the figures."""
        self.limits[name] = unit * max(median(figure.values) for figure in figures)
        return figures

    def steps_limit(self, facts: Answer) -> tuple[str, float]:
        """Images per second if a step were nothing but matrix products: 3 x forward, as each product has two in the
        backward pass (the first convolution's one, which makes 0.2% of the 6.6 M network's sum).
        """
        name = products("bf16" if self.precision == "bf16" else "float32")
        return f"{name}, 3 x {facts['multiply_adds']:,} an image", self.limits[name] / 3 / facts["multiply_adds"]

    def forward_limit(self, facts: Answer) -> tuple[str, float]:
        """The same for the forward pass only."""
        name, limit = self.steps_limit(facts)
        return name.replace("3 x ", ""), 3 * limit

    # ---- programs

    def ours(
        self,
        name: str,
        *arguments: object,
        processes: int = 1,
        run: str = "",
        machines: Sequence[object] = (),
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        """train.py with the bench's recipe, as the launcher starts it, under observation.

        On several machines each has its own launcher, whose arguments are `machines`, after the command `before`, and
        all have one `run`.
        """
        arguments = (*self._arguments(run or name), *arguments)
        environment = {**self._environment(), **(environment or {})}
        return self.launch(
            name, *arguments, processes=processes, machines=machines, before=before, environment=environment
        )

    def launch(
        self,
        name: str,
        *arguments: object,
        processes: int = 1,
        machines: Sequence[object] = (),
        before: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Program:
        """train.py with these arguments."""
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
        """The baseline."""
        words = ("-m", "cifar.bench.plain", *self._arguments("plain"), *arguments)
        return Program("plain", [str(word) for word in words], self._environment())

    def _arguments(self, name: str) -> list[object]:
        # So many epochs, so that no turn is the last. Images have their full size on all sides, also for a recipe that
        # begins with smaller ones; what else one changes on its way is measured as it begins.
        return ["--recipe", self.recipe, "--data", self.images(), "--run", self.folder / name, "--epochs", 1000,
                "--image-sizes", 32]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {"XDG_CACHE_HOME": str(self.folder / "cache")}

    def training(self, ours: Program, plain: Program) -> dict[str, list[Answer]]:
        """Turns of training steps, measured once for all parts."""
        if self._training is None:
            contestants = {"ours": (ours, {"do": "train"}), "plain": (plain, {"do": "train"})}
            self._training = interleave.alternate(contestants, self.repeats, self.seconds)
        return self._training

    def images(self) -> Path:
        """A zip of the scanned digits as JPEG, over and over: only speed matters here."""
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

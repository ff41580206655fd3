"""One network in memory, used by one request at a time, with the same functions as explain.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch

from cifar.data.augment import normalize
from cifar.errors import UserError
from cifar.explain import layers, maps, runs, votes
from cifar.explain.findings import Float, Int64, UInt8
from cifar.explain.layers import Grid
from cifar.explain.runs import Run

BUSY_SECONDS = 120  # to wait for the previous request, or for grad-cam's import from a slow file system


@dataclass(frozen=True)
class Heatmap:
    """A class activation map at one layer of h x w cells."""

    layer: str
    grid: Grid  # where the cells lie on the picture
    map: Float  # [h, w] >= 0, not rescaled
    peak: float  # the raw maximum before negative evidence was cut; <= 0: no positive evidence


@dataclass(frozen=True)
class Votes:
    """How much each cell of the last stage added to the margin between two classes."""

    layer: str
    grid: Grid
    target: int
    against: int
    cells: Float  # [h, w] signed; their sum plus `bias` is `margin`
    bias: float
    margin: float  # logit(target) - logit(against)


@dataclass(frozen=True)
class Answer:
    """What the network says about a picture of 32x32 pixels, and why."""

    pixels: UInt8  # [32, 32, 3]
    probabilities: Float  # [C]
    ranking: Int64  # [C] the classes, the most probable first
    target: int  # the class that maps and votes are for
    method: str
    heatmaps: list[Heatmap]
    votes: Votes | None  # None where maps were not asked for


class Engine:
    """A run's network behind a lock: two threads on one network would mix up their maps."""

    def __init__(self, run: Run) -> None:
        """Raises UserError for weights that are not the network's."""
        self.run = run
        self.network = runs.load(run, torch.device("cpu"))
        self.layers = layers.resolutions(run.network)
        self._lock = Lock()

    def warm_up(self) -> None:
        """Answers once, so that no visitor waits for grad-cam, which takes seconds to import."""
        self.answer(np.zeros((32, 32, 3), np.uint8), None, "gradcam", [self.default_layer])

    @property
    def default_layer(self) -> str:
        """Where maps are made unless another layer is asked for."""
        return layers.default(self.layers)

    def answer(self, pixels: UInt8, target: int | None, method: str, at: list[str]) -> Answer:
        """Returns probabilities of a picture [32, 32, 3], maps at the layers `at`, and votes where there are any maps.

        Maps are for the class `target`, by default the predicted one. Votes compare it with the predicted class, or, if
        it is that one, with the runner-up. Raises UserError if the network stays busy.
        """
        with self._alone():
            images = self._tensor(pixels[None])
            with torch.no_grad():
                logits = self.network(images)[0]
            # By logits: very small probabilities are all the same float32, 0.
            ranking: Int64 = np.argsort(-logits.numpy(), kind="stable")
            first, second = ranking[:2].tolist()
            target = first if target is None else target
            heatmaps, counted = [], None
            for layer in at:
                objectives = maps.one_hot(torch.tensor([[target]]), len(ranking))
                raw, _ = maps.compute(self.network, layer, method, images, objectives)
                heatmaps.append(self._heatmap(layer, raw[0, 0]))
            if at:
                against, last_stage = second if target == first else first, list(self.layers)[-1]
                cells, bias, margin = votes.compute(self.network, last_stage, images, torch.tensor([[target, against]]))
                grid = layers.grid(self.network, last_stage)
                counted = Votes(last_stage, grid, target, against, cells[0], float(bias[0]), float(margin[0]))
        return Answer(pixels, logits.softmax(dim=0).numpy(), ranking, target, method, heatmaps, counted)

    def heatmaps(self, pixels: UInt8, targets: UInt8, method: str, layer: str) -> tuple[list[Heatmap], Float]:
        """Returns the map of each picture [n, 32, 32, 3] for its class of `targets` [n], and probabilities [n, C]."""
        with self._alone():
            objectives = maps.one_hot(torch.from_numpy(targets.astype(np.int64))[:, None], len(self.run.classes))
            raw, logits = maps.compute(self.network, layer, method, self._tensor(pixels), objectives)
        return [self._heatmap(layer, values) for values in raw[:, 0]], torch.from_numpy(logits).softmax(dim=1).numpy()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock. Raises UserError if it is not free within BUSY_SECONDS."""
        if not self._lock.acquire(timeout=BUSY_SECONDS):
            raise UserError(f"the network has been busy for {BUSY_SECONDS} s; try again later")
        try:
            yield
        finally:
            self._lock.release()

    def _tensor(self, pixels: UInt8) -> torch.Tensor:
        return normalize(torch.from_numpy(pixels), self.run.mean, self.run.std)

    def _heatmap(self, layer: str, raw: Float) -> Heatmap:
        return Heatmap(layer, layers.grid(self.network, layer), np.maximum(raw, 0), float(raw.max()))

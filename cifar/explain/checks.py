"""Map faithfulness, against a shuffled baseline. Measured on mistakes and on as many correctly classified images.

Flip test: cover the map's highest cell with a blank square; how often does the prediction change? Without cutout in
training, the square itself is out of distribution: see `square`.

Deletion and insertion (arXiv 1806.07421): mean probability of the predicted class while cells are blanked, or
uncovered, highest first; a faithful map has a small deletion area and a large insertion area. Smooth maps score well in
both whatever they show (arXiv 2304.13836), so each is repeated with the map's cells shuffled; only the difference
counts.

Randomisation (arXiv 1810.03292): correlation with the map after re-initialising weights; a map that does not change
does not depend on what was learned. Stability: correlation with the map of the mirrored image, over the cells that then
lie within half a cell of one, or of the image moved by one pixel.
"""

import copy

import numpy as np
import torch
from torch import nn

from cifar import failure
from cifar.data.augment import AUGMENTATIONS
from cifar.data.cache import Data
from cifar.explain import layers, maps
from cifar.explain.evidence import tensor
from cifar.explain.findings import Float, Int64, UInt8
from cifar.explain.layers import NONE, Grid

SQUARE = 8  # pixels a side; zero is the data's mean
STEPS = 8  # parts in which the cells are deleted or inserted
BATCH = 500  # images of a forward pass


def square(augmentation: str | None) -> str:
    """Describes the square of the flip test, and whether the network has seen such squares in training."""
    size = f"a blank square of {SQUARE}x{SQUARE} pixels"
    if augmentation not in AUGMENTATIONS:  # the version that trained the run did not say
        return size
    side = AUGMENTATIONS[augmentation].cutout
    if not side:
        return f"{size}, which training without a cutout ({augmentation}) has never shown the network"
    return f"{size}; training has shown the network such squares of {side}x{side} ({augmentation})"


def measure(
    network: nn.Module, data: Data, wrong: Int64, predictions: UInt8, method: str, layer: str, seed: int
) -> dict[str, float | int]:
    """Returns metrics of the mistakes `wrong` [m] and m correct images drawn with `seed`; `predictions` [n] are of all.

    Each is a mean over images, and `<metric>_sd` their standard deviation; `<group>_images` is their number. Those with
    `shuffled` belong to the baseline; correlations are Pearson's, between the cells of two maps of one image.
    """
    correct = np.random.default_rng(seed).permutation(np.flatnonzero(predictions == data.test_labels))
    found: dict[str, float | int] = {}
    for group, indices in (("mistakes", wrong), ("correct", correct[: len(wrong)])):
        found[f"{group}_images"] = len(indices)
        if len(indices):
            images = tensor(data, indices, next(network.parameters()).device)
            predicted = predictions[indices].astype(np.int64)
            for name, values in examine(network, images, predicted, method, layer, seed).items():
                found[f"{group}_{name}"], found[f"{group}_{name}_sd"] = float(values.mean()), float(values.std())
    return found


def examine(
    network: nn.Module, images: torch.Tensor, predicted: Int64, method: str, layer: str, seed: int
) -> dict[str, Float]:
    """Returns each metric for each of n normalised images [n, 3, 32, 32] and its map for the class predicted [n]."""
    generator = np.random.default_rng(seed)
    targets = torch.from_numpy(predicted).to(images.device)
    classes = _probabilities(network, images[:1]).shape[1]

    def maps_of(other: nn.Module, pictures: torch.Tensor) -> Float:
        return maps.compute(other, layer, method, pictures, maps.one_hot(targets[:, None], classes))[0][:, 0]

    true_maps, grid = maps_of(network, images), layers.grid(network, layer)
    count = len(true_maps)
    shuffled = generator.permuted(true_maps.reshape(count, -1), axis=1).reshape(true_maps.shape)
    metrics: dict[str, Float] = {}
    for name, ranked in (("", true_maps), ("_shuffled", shuffled)):
        answers = _probabilities(network, _hide_best_cell(images, ranked, grid)).argmax(axis=1)
        metrics[f"flip_rate{name}"] = (answers != predicted).astype(np.float32)
        for kind in ("deletion", "insertion"):
            inserting = kind == "insertion"
            metrics[f"{kind}_area{name}"] = _area(network, images, ranked, grid, predicted, inserting)

    for name, parts in (("last_layer", _with_weights(network)[-1:]), ("all_layers", _with_weights(network))):
        metrics[f"correlation_after_randomising_{name}"] = _correlations(
            true_maps, maps_of(_randomised(network, parts, seed), images)
        )
    twins = grid.mirrored()
    twinned = np.flatnonzero(twins != NONE)
    if len(twinned):  # else no cell of the mirrored image lies where one of the image does
        mirrored = maps_of(network, images.flip(-1))[..., twins[twinned]]
        metrics["correlation_mirrored"] = _correlations(true_maps[..., twinned], mirrored)
    moved = nn.functional.pad(images, (1, 0, 0, 0), mode="reflect")[..., :-1]
    by = round(1 / grid.stride)  # a whole cell at the finest layer, no more than half of one elsewhere
    there = maps_of(network, moved)[..., by:]
    metrics["correlation_moved_one_pixel"] = _correlations(true_maps[..., : grid.cells - by], there)
    return metrics


def _probabilities(network: nn.Module, images: torch.Tensor) -> Float:
    failure.report_progress()
    with torch.no_grad():
        return np.concatenate([network(batch).softmax(dim=1).cpu().numpy() for batch in torch.split(images, BATCH)])


def _hide_best_cell(images: torch.Tensor, ranked: Float, grid: Grid) -> torch.Tensor:
    """Copies the images, each with a blank square, wholly inside, around the middle of its map's highest cell."""
    hidden, size = images.clone(), images.shape[-1]
    for image, best in zip(hidden, ranked.reshape(len(ranked), -1).argmax(axis=1), strict=True):
        middles = (grid.first + place * grid.stride for place in divmod(int(best), grid.cells))
        top, left = (min(max(round(middle - SQUARE / 2), 0), size - SQUARE) for middle in middles)
        image[:, top : top + SQUARE, left : left + SQUARE] = 0
    return hidden


def _area(
    network: nn.Module, images: torch.Tensor, ranked: Float, grid: Grid, predicted: Int64, inserting: bool
) -> Float:
    """Returns the area [n] under the predicted class's probability over the fraction of cells deleted or inserted.

    Pixels beyond all cells go with the nearest one, so that nothing is left of the image at the end, or all of it.
    """
    flat = ranked.reshape(len(ranked), -1)
    place = flat.argsort(axis=1)[:, ::-1].argsort(axis=1).reshape(ranked.shape)  # 0: the highest cell
    curve, cells = [], grid.nearest()
    for step in range(STEPS + 1):
        taken = (place < step * flat.shape[1] / STEPS)[:, cells][:, :, cells]
        visible = torch.from_numpy(taken if inserting else ~taken)[:, None].to(images.device)
        curve.append(_probabilities(network, images * visible)[range(len(images)), predicted])
    area: Float = np.asarray(np.trapezoid(np.stack(curve), dx=1 / STEPS, axis=0), np.float32)
    return area


def _with_weights(network: nn.Module) -> list[str]:
    """Returns the names of the layers that can be re-initialised, from the images to the logits."""
    return [name for name, part in network.named_modules() if hasattr(part, "reset_parameters")]


def _randomised(network: nn.Module, parts: list[str], seed: int) -> nn.Module:
    """Returns a copy with some layers re-initialised."""
    other = copy.deepcopy(network)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in parts:
            other.get_submodule(name).reset_parameters()  # type: ignore[operator]
    return other


def _correlations(ours: Float, theirs: Float) -> Float:
    """Returns Pearson's correlation of each image's two maps; 0 where a map is the same everywhere."""
    a, b = (values.reshape(len(values), -1) for values in (ours, theirs))
    a, b = (values - values.mean(axis=1, keepdims=True) for values in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    correlations: Float = np.divide((a * b).sum(axis=1), norms, out=np.zeros(len(a), np.float32), where=norms > 0)
    return correlations

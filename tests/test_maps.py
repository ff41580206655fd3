"""Maps and votes against what they are by definition, on networks small enough to know the answer."""

import runpy
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from cifar import models
from cifar.explain import checks, figures, layers, maps, votes
from cifar.explain.findings import ExplainedImages
from cifar.explain.layers import Grid
from cifar.explain.maps import METHODS

CLASSES = 3


class Patches(nn.Module):
    """A linear network: 8x8 cells of 4x4 pixels with four channels each, and one weight for each of their values."""

    explainable_layers: ClassVar = {"stage": 8}

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 4, kernel_size=4, stride=4)
        self.relu = nn.ReLU(inplace=True)  # would overwrite the activations of `stage`, if it were left in place
        self.linear = nn.Linear(4 * 8 * 8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.relu(self.stage(x) + 10).flatten(1) - 10)  # the shift disarms the ReLU
        return logits


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def patches() -> Patches:
    torch.manual_seed(0)
    return Patches().eval()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet", CLASSES, 0.1).eval()


def of_class(number: int, count: int) -> torch.Tensor:
    return maps.one_hot(torch.full((count, 1), number), CLASSES)


def closed_form(method: str, network: Patches, images: torch.Tensor, number: int) -> torch.Tensor:
    """The maps [n, 8, 8] of a linear network, whose gradients are its weights."""
    activations = network.stage(images).detach()
    weights = network.linear.weight[number].detach().reshape(1, 4, 8, 8)
    if method == "gradcam":
        return (weights.mean(dim=(2, 3), keepdim=True) * activations).sum(dim=1)
    if method == "hirescam":
        return (weights * activations).sum(dim=1)
    assert method == "layercam"
    return (weights.relu() * activations).sum(dim=1)


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "layercam"])
def test_maps_of_a_linear_network_are_those_of_the_formula(method: str, patches: Patches, images: torch.Tensor) -> None:
    for number in range(CLASSES):
        found, logits = maps.compute(patches, "stage", method, images, of_class(number, len(images)))
        np.testing.assert_allclose(found[:, 0], closed_form(method, patches, images, number), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, patches(images).detach(), rtol=1e-5, atol=1e-5)


def test_maps_are_signed_and_not_rescaled(patches: Patches, images: torch.Tensor) -> None:
    found, _ = maps.compute(patches, "stage", "gradcam", images, of_class(0, len(images)))
    doubled, _ = maps.compute(patches, "stage", "gradcam", images, 2 * of_class(0, len(images)))
    assert found.min() < 0 < found.max()
    np.testing.assert_allclose(doubled, 2 * found, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3"])
def test_a_batch_gives_the_maps_of_its_images_one_by_one(
    method: str, layer: str, resnet: nn.Module, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = maps.one_hot(torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]]), CLASSES)
    monkeypatch.setattr(maps, "BATCH", 3)  # so that the five images are a batch and a smaller one
    together, logits = maps.compute(resnet, layer, method, images, objectives)
    single = [maps.compute(resnet, layer, method, images[k : k + 1], objectives[k : k + 1]) for k in range(5)]
    cells = layers.resolutions("resnet")[layer]
    assert together.shape == (5, 2, cells, cells)
    scale = np.abs(together).max()
    np.testing.assert_allclose(together, np.concatenate([found for found, _ in single]), atol=1e-4 * scale)
    np.testing.assert_allclose(logits, np.concatenate([found for _, found in single]), atol=1e-4)


def test_maps_equal_those_that_the_package_makes_once_these_are_rescaled(
    resnet: nn.Module, images: torch.Tensor
) -> None:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import scale_cam_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    found, _ = maps.compute(resnet, "layer2", "gradcam", images, of_class(1, len(images)))
    cam = GradCAM(resnet, [resnet.layer2])
    try:
        theirs = cam(images, [ClassifierOutputTarget(1)] * len(images))
    finally:
        cam.activations_and_grads.release()
        resnet.zero_grad()
    ours = scale_cam_image(scale_cam_image(np.maximum(found[:, 0], 0), (32, 32)))  # it stretches twice
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_left_as_it_was(method: str, images: torch.Tensor) -> None:
    network = models.build("resnet", CLASSES, 0.1).train()
    network.layer1.eval()
    network.prep.requires_grad_(False)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)

    def state() -> list[object]:
        modules = [
            (part.training, getattr(part, "inplace", None), len(part._forward_hooks), len(part._forward_pre_hooks),
             len(part._backward_hooks)) for part in network.modules()
        ]  # fmt: skip
        return [modules, [parameter.requires_grad for parameter in network.parameters()]]

    before, weights = state(), {name: value.clone() for name, value in network.state_dict().items()}
    maps.compute(network, "layer2", method, images, of_class(0, len(images)))
    assert state() == before
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in network.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())

    with pytest.raises(RuntimeError):  # three images too many for their objectives: it fails halfway
        maps.compute(network, "layer2", method, images, torch.ones(len(images), 1, CLASSES + 1))
    assert state() == before


@pytest.mark.parametrize("name", models.names())
def test_resolutions_in_the_help_are_those_of_the_network(name: str, images: torch.Tensor) -> None:
    network = models.build(name, CLASSES, 0.0).eval()
    for layer, cells in layers.resolutions(name).items():
        found, _ = maps.compute(network, layer, "hirescam", images[:1], of_class(0, 1))
        assert found.shape == (1, 1, cells, cells)
    assert {layer: layers.grid(network, layer).cells for layer in network.explainable_layers} == layers.resolutions(
        name
    )
    assert layers.resolutions(name)[layers.default(layers.resolutions(name))] >= 7


@pytest.mark.parametrize("name", models.names())
def test_votes_add_up_to_the_margin(name: str, images: torch.Tensor) -> None:
    network = models.build(name, CLASSES, 0.0).eval()
    targets = torch.tensor([[0, 1], [1, 0], [2, 0], [0, 2], [1, 2]])
    counted, biases, margins = votes.compute(network, list(layers.resolutions(name))[-1], images, targets)
    logits = network(images).detach()
    expected = (logits.gather(1, targets[:, :1]) - logits.gather(1, targets[:, 1:]))[:, 0]
    np.testing.assert_allclose(margins, expected, atol=1e-5)
    np.testing.assert_allclose(counted.sum(axis=(1, 2)) + biases, margins, atol=1e-5)
    assert counted.min() < 0 < counted.max()


def test_the_bias_is_what_is_left_without_any_vote(resnet: nn.Module, images: torch.Tensor) -> None:
    np.testing.assert_allclose(votes.bias(resnet, "layer3", images[:1]), resnet.linear.bias.detach(), atol=1e-6)


def test_opacity_is_true() -> None:
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    values, grid = generator.random((8, 8), np.float32), Grid(8, 2, 4)
    colours = figures.enlarged(figures.coloured(values, limit=1), 4)
    np.testing.assert_array_equal(figures.blended(picture, values, grid, 1, opacity=0), picture)
    np.testing.assert_array_equal(figures.blended(picture, values, grid, 1, opacity=1), colours)
    half = figures.blended(picture, values, grid, 1, opacity=0.5).astype(float)
    assert np.abs(half - (picture.astype(float) + colours) / 2).max() <= 0.5


SMALL = Path(__file__).parent / "helpers" / "networks" / "small.py"


def with_layers(name: str) -> tuple[nn.Module, dict[str, Grid]]:
    """A network in float64, with fresh weights and statistics of its own, and where the cells of its layers lie."""
    torch.manual_seed(0)
    network = runpy.run_path(str(SMALL))["build"](CLASSES, 0.0) if name == "small" else models.build(name, CLASSES, 0.0)
    return network.double().eval(), {layer: layers.grid(network, layer) for layer in network.explainable_layers}


def activations_of(network: nn.Module, layer: str, images: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    network(images)
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("name", [*models.names(), "small"])
def test_a_cell_lies_where_the_pixels_are_that_it_comes_from(name: str) -> None:
    """The centroid of the squared gradients of each interior cell is within a pixel of the centre that is declared."""
    network, grids = with_layers(name)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64).requires_grad_()
    pixels = torch.arange(32, dtype=torch.float64) + 0.5
    for layer, grid in grids.items():
        activations, of_pixels = activations_of(network, layer, images), grid.of_pixels().tolist()
        for cell in {1, grid.cells // 2, grid.cells - 2}:
            (gradients,) = torch.autograd.grad(activations[:, :, cell, cell].sum(), images, retain_graph=True)
            centre = grid.first + cell * grid.stride
            for other in (2, 3):
                found = (gradients**2).sum(dim=(0, 1, other))
                assert float(found @ pixels / found.sum()) == pytest.approx(centre, abs=1)
            assert of_pixels.count(cell) == round(grid.stride)
            assert of_pixels[int(centre)] == cell


@pytest.mark.parametrize("name", [*models.names(), "small"])
def test_the_flip_test_hides_the_middle_of_the_best_cell(name: str) -> None:
    _, grids = with_layers(name)
    for grid in grids.values():
        for cell in range(grid.cells):
            ranked = np.zeros((1, grid.cells, grid.cells), np.float32)
            ranked[0, cell, grid.cells - 1 - cell] = 1
            hidden = checks._hide_best_cell(torch.ones(1, 3, 32, 32), ranked, grid)[0, 0] == 0
            down, across = (int(grid.first + place * grid.stride) for place in (cell, grid.cells - 1 - cell))
            assert hidden[down, across]
            assert hidden.sum() == checks.SQUARE**2


def test_pixels_beyond_the_cells_stay_as_they_are_and_go_with_the_nearest() -> None:
    _, grids = with_layers("whitened")
    grid = grids["stage2"]
    values = np.linspace(0, 1, 49, dtype=np.float32).reshape(7, 7)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shown = figures.blended(picture, values, grid, 1, opacity=1)
    np.testing.assert_array_equal(shown[:28, :28], figures.enlarged(figures.coloured(values, 1), 4))
    np.testing.assert_array_equal(shown[28:], picture[28:])
    np.testing.assert_array_equal(shown[:, 28:], picture[:, 28:])
    assert grid.spans() == [(4 * cell, 4) for cell in range(7)]
    assert not grid.covering
    assert grid.nearest().tolist() == [min(pixel // 4, 6) for pixel in range(32)]
    assert grids["stage3"].spans() == [(0, 8), (8, 8), (16, 8)]


def test_votes_are_drawn_where_their_cells_lie() -> None:
    _, grids = with_layers("whitened")
    votes = np.array([[[-1, 1, -1], [1, -1, 1], [-1, 1, -1]]], np.float32)
    nothing = np.zeros((1, 2), np.float32)
    shown = ExplainedImages(np.zeros(1, np.int64), np.zeros((1, 32, 32, 3), np.uint8), [], np.zeros((1, 2), np.uint8),
                            np.zeros((1, 2, 7, 7), np.float32), nothing, votes, nothing[0], nothing[0],
                            grids["stage2"], grids["stage3"])  # fmt: skip
    drawn = figures._vote_panel(shown, 0)[-192:].reshape(24, 8, 24, 8, 3)[:, 0, :, 0].astype(int)  # the cells' corners
    red = drawn[..., 0] - drawn[..., 2] > 50
    blue = drawn[..., 2] - drawn[..., 0] > 50
    assert not (red | blue)[18:].any()
    assert not (red | blue)[:, 18:].any()
    assert red[0, 7]
    assert blue[0, 0]
    assert blue[17, 17]


def test_cells_that_a_mirror_does_not_bring_onto_others_are_not_compared() -> None:
    _, grids = with_layers("whitened")
    assert grids["stage1"].mirrored().tolist() == [layers.NONE] * 15  # half a cell apart
    assert grids["stage2"].mirrored().tolist() == [layers.NONE, 6, 5, 4, 3, 2, 1]
    assert grids["stage3"].mirrored().tolist() == [layers.NONE, 2, 1]
    assert Grid(4, 4, 8).mirrored().tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3"])
def test_a_map_of_no_class_is_high_where_the_layer_is_active(
    layer: str, resnet: nn.Module, images: torch.Tensor
) -> None:
    found, _ = maps.compute(resnet, layer, "eigencam", images, of_class(0, len(images)))
    norms = np.linalg.norm(activations_of(resnet, layer, images).detach().numpy(), axis=1)
    assert checks._correlations(found[:, 0], norms).min() > 0
    noise = 1e-3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    again, _ = maps.compute(resnet, layer, "eigencam", images + noise, of_class(0, len(images)))
    assert checks._correlations(found[:, 0], again[:, 0]).min() > 0


def test_methods_of_no_class_are_those_whose_maps_do_not_depend_on_it(resnet: nn.Module, images: torch.Tensor) -> None:
    objectives = maps.one_hot(torch.tensor([[0, 1]] * len(images)), CLASSES)
    found = {name: maps.compute(resnet, "layer2", name, images, objectives)[0] for name in METHODS}
    assert tuple(name for name, both in found.items() if (both[:, 0] == both[:, 1]).all()) == maps.OF_NO_CLASS


def test_a_map_keeps_its_own_cells_and_zero_is_neutral() -> None:
    values = np.zeros((8, 8), np.float32)
    values[2, 5] = 1
    shown = figures.blended(np.zeros((32, 32, 3), np.uint8), values, Grid(8, 2, 4), 1, opacity=1)
    other = np.argwhere((shown != shown[0, 0]).any(axis=2))
    assert (other.min(axis=0).tolist(), other.max(axis=0).tolist(), len(other)) == ([8, 20], [11, 23], 16)
    red, green, blue = figures.coloured(np.zeros((1, 1), np.float32), 1, signed=True)[0, 0].astype(int)
    assert max(red, green, blue) - min(red, green, blue) <= 2  # grey or white
    # A map without any evidence is drawn as one, not stretched.
    assert len(np.unique(figures.coloured(np.zeros((8, 8), np.float32), 0).reshape(-1, 3), axis=0)) == 1


def test_checks_know_a_map_that_finds_the_place_that_decides() -> None:
    """A network that looks at one cell of 4x4 pixels: HiResCAM marks it, and the same map shuffled does not."""
    network = Patches().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        network.stage.weight[0] = 1 / 48
        place = torch.zeros(4, 8, 8)
        place[0, 3, 4] = 20
        network.linear.weight[0] = place.flatten()
        network.linear.bias[1] = 10
    images = torch.ones(40, 3, 32, 32)
    assert network(images).argmax(dim=1).unique().tolist() == [0]
    found = checks.examine(network, images, np.zeros(40, np.int64), "hirescam", "stage", seed=0)
    assert found["flip_rate"].mean() == 1
    assert found["flip_rate_shuffled"].mean() < 0.5  # the square hides 4 of the 64 cells, and a few more in part
    assert found["deletion_area"].mean() < 0.2 < found["deletion_area_shuffled"].mean()
    assert found["insertion_area"].mean() > 0.8 > found["insertion_area_shuffled"].mean()
    assert all(values.shape == (40,) for values in found.values())


def test_a_mirrored_image_has_the_mirrored_map_where_a_network_sees_no_side() -> None:
    network = Patches().eval()
    with torch.no_grad():
        for parameter in (network.stage.weight, network.linear.weight):
            parameter.fill_(0.01)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = checks.examine(network, images, np.zeros(4, np.int64), "gradcam", "stage", seed=0)
    np.testing.assert_allclose(found["correlation_mirrored"], 1, atol=1e-4)
    assert found["correlation_after_randomising_all_layers"].max() < 0.9

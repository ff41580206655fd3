"""The networks: whatever is in cifar/models is held to these."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cifar import models, summary
from cifar.data import augment, loading
from cifar.data.cache import open_data
from cifar.errors import UserError
from cifar.models import resnet


@pytest.fixture(params=models.names())
def network(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.build(request.param, classes=10, dropout=0.1)


def test_logits_have_one_number_per_class(network: torch.nn.Module) -> None:
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_every_parameter_gets_a_gradient(network: torch.nn.Module) -> None:
    F.cross_entropy(network(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    # A convolution's bias is taken out again by the batch-norm behind it: its gradient is zero but for rounding.
    before_norm = {f"{name}.bias" for name, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        assert name in before_norm or parameter.grad.abs().sum() > 0, name


def test_frozen_early_layers_get_no_gradient_and_change_no_other(network: torch.nn.Module) -> None:
    def gradients() -> dict[str, torch.Tensor | None]:
        torch.manual_seed(0)  # for dropout
        network.zero_grad()
        F.cross_entropy(network(images), torch.arange(4)).backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    images = torch.randn(4, 3, 32, 32)
    before = gradients()
    models.freeze(network)
    after = gradients()
    frozen = {name for name in after if name.startswith(network.early_layers)}
    learning = {name for name, gradient in after.items() if gradient is not None}
    assert learning == {name for name, gradient in before.items() if gradient is not None} - frozen
    assert any(before[name] is not None for name in frozen)
    for name in learning:
        torch.testing.assert_close(after[name], before[name])


@pytest.mark.parametrize("size", [16, 20, 24, 28, 40])
def test_images_of_other_sizes_pass(size: int, network: torch.nn.Module) -> None:
    assert network(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_evaluation_does_not_depend_on_the_rest_of_the_batch(network: torch.nn.Module) -> None:
    images = torch.randn(4, 3, 32, 32)
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_explainable_layers_exist(network: torch.nn.Module) -> None:
    modules = dict(network.named_modules())
    assert set(network.explainable_layers) <= set(modules)


def test_a_convolution_of_small_maps_gives_the_numbers_and_gradients_of_any_other() -> None:
    torch.manual_seed(0)
    usual = nn.Conv2d(16, 16, kernel_size=3, padding=1)
    small = resnet.SmallMapConv2d(16, 16, kernel_size=3, padding=1)
    small.load_state_dict(usual.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.randn(8, 16, 4, 4).contiguous(memory_format=layout)
        results = []
        for convolution in (usual, small):
            convolution.to(memory_format=layout)  # type: ignore[call-overload]
            x = images.clone().requires_grad_()
            y = convolution(x)
            assert y.is_contiguous(memory_format=layout)
            assert convolution.weight.is_contiguous() == (convolution is small or layout is torch.contiguous_format)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, convolution.weight.grad, convolution.bias.grad))
            convolution.zero_grad()
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_resnet_has_the_published_parameters() -> None:
    network = models.build("resnet", classes=10, dropout=0.1)
    expected = {
        "prep": 1_920,
        "layer1.0": 74_112,
        "layer1.1.block1": 147_840,
        "layer1.1.block2": 147_840,
        "layer2": 295_680,
        "layer3.0": 1_181_184,
        "layer3.1.block1": 2_360_832,
        "layer3.1.block2": 2_360_832,
        "linear": 5_130,
    }
    assert {name: summary.parameter_count(network.get_submodule(name)) for name in expected} == expected
    assert summary.parameter_count(network) == sum(expected.values()) == 6_575_370


def test_a_pool_before_the_relu_changes_no_bit() -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    network = models.build("resnet", classes=10, dropout=0)
    F.cross_entropy(network(images), torch.arange(8)).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    for stage in (network.layer1[0], network.layer2, network.layer3[0]):
        stage[2], stage[3] = stage[3], stage[2]
        assert isinstance(stage[2], torch.nn.ReLU)
    F.cross_entropy(network(images), torch.arange(8)).backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, network.parameters(), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cells", [(4, 4), (3, 3), (2, 2), (1, 1), (8, 5)])
def test_the_global_pool_is_that_of_torch_to_the_bit_and_ties_go_to_the_same_cell(
    cells: tuple[int, int], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    coarse = torch.randint(0, 3, (16, 40, *cells)).float()  # many cells share a map's maximum
    coarse[:, 0], coarse[0, 1], coarse[1, 2] = 0, float("nan"), -float("inf")
    for maps in (coarse, torch.randn(16, 40, *cells), coarse.bfloat16()):
        results = []
        for pool in (torch.nn.AdaptiveMaxPool2d(1), resnet.GlobalMaxPool2d()):
            x = maps.contiguous(memory_format=layout).requires_grad_()
            y = pool(x)
            y.backward(torch.randn(16, 40, 1, 1, generator=torch.Generator().manual_seed(1)).to(y.dtype))
            results.append((y.detach(), x.grad))
        for expected, actual in zip(*results, strict=True):
            assert actual.shape == expected.shape
            assert torch.equal(actual.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("size", [32, 28, 24, 20])
def test_rows_that_a_pool_throws_away_change_nothing(size: int) -> None:
    network = models.build("whitened", classes=10, dropout=0).double().eval()
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    x = F.gelu(network.whitening(images))
    for stage in (network.stage1, network.stage2, network.stage3):
        x = F.max_pool2d(F.conv2d(x, stage.conv1.weight, padding=1), 2)
        x = F.gelu(stage.norm2(stage.conv2(F.gelu(stage.norm1(x)))))
    torch.testing.assert_close(network(images), network.linear(x.amax(dim=(2, 3))))


def test_whitening_makes_patches_uncorrelated_with_variance_1() -> None:
    smooth = F.avg_pool2d(torch.randn(500, 3, 36, 36), 5, stride=1)  # neighbours are alike, as in photographs
    images = smooth / smooth.std() + 0.3 * torch.randn(500, 1, 32, 32)  # and so are the channels
    network = models.build("whitened", classes=10, dropout=0)
    network.init_from_data(images)
    positive, negative = network.whitening(images).permute(1, 0, 2, 3).flatten(1).split(12)
    torch.testing.assert_close(positive, -negative)
    torch.testing.assert_close(positive @ positive.T / positive.shape[1], torch.eye(12), atol=0.02, rtol=0)
    assert not network.whitening.weight.requires_grad


def test_whitening_is_computed_from_all_classes(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SAMPLE", 12)
    data, cpu = open_data(str(shapes)), torch.device("cpu")  # sorted by class, as folders are
    every = augment.normalize(torch.from_numpy(data.train_images), data.mean, data.std)
    found = [int((every == image).all(dim=(1, 2, 3)).nonzero()[0]) for image in loading.sample_images(data, cpu)]
    assert len(set(found)) == 12
    assert set(data.train_labels[found]) == {0, 1, 2, 3}


def test_whitening_of_blank_images_is_finite() -> None:
    network = models.build("whitened", classes=10, dropout=0)
    network.init_from_data(torch.tensor([7.6, 8.4, 9.2]).view(1, 3, 1, 1).expand(500, 3, 32, 32))
    assert network.whitening.weight.isfinite().all()


def test_the_summary_shows_shapes_parameters_and_size_and_leaves_the_network_alone() -> None:
    network = models.build("resnet", classes=10, dropout=0.1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    lines = summary.table(network).splitlines()
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert rows["layer3.1.block2.0"] == ["SmallMapConv2d", "512x4x4", "2,359,808"]
    assert rows["total"] == ["6,575,370"]
    assert lines[-1] == "26.301 MB in float32"
    printed = [int(row[-1].replace(",", "")) for name, row in rows.items() if len(row) == 3 and row[-1][0].isdigit()]
    assert sum(printed) == 6_575_370


def test_an_unknown_network_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"'vgg' is unknown; choose one of: .*resnet"):
        models.build("vgg", classes=10, dropout=0)

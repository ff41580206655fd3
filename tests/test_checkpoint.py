"""A checkpoint is complete or it is not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import Disk
from torch import nn

from cifar import checkpoint, models, optim
from cifar.attempt import claim
from cifar.checkpoint import BrokenCheckpointError, Progress
from cifar.errors import UserError
from cifar.recipes import Recipe

RECIPE = Recipe()
FACTS = {"network": "resnet", "classes": ["a", "b"], "recipe": RECIPE.model_dump(), "data_fingerprint": "d"}


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network in channels-last memory after three steps."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 6 * 6, 2))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optim.build(network, RECIPE)
    for _ in range(3):
        step(network, optimizer)
    return network, optimizer


def step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    network(torch.randn(8, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {**network.state_dict(), **checkpoint.optimizer_tensors(network, optimizer)}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    network, optimizer = trained(seed=0)
    progress = Progress(step=7, seconds=1.5, loss_sum=0.1 + 0.2, correct=3, seen=8)
    return checkpoint.save(claim(tmp_path, 1), network, optimizer, progress, FACTS), network, optimizer


Saved = tuple[Path, nn.Module, torch.optim.Optimizer]


def test_what_is_restored_trains_on_bit_for_bit(saved: Saved) -> None:
    path, network, optimizer = saved
    other_network, other_optimizer = trained(seed=1)
    progress = checkpoint.restore(path, other_network, other_optimizer, RECIPE, "d")
    assert progress == Progress(step=7, seconds=1.5, loss_sum=0.1 + 0.2, correct=3, seen=8)
    assert_equal(tensors(network, optimizer), tensors(other_network, other_optimizer))
    for pair in ((network, optimizer), (other_network, other_optimizer)):
        torch.manual_seed(5)
        step(*pair)
    assert_equal(tensors(network, optimizer), tensors(other_network, other_optimizer))
    moments = other_optimizer.state[other_network[0].weight]["exp_avg"]  # type: ignore[index]
    assert moments.is_contiguous(memory_format=torch.channels_last)


def test_it_is_three_files_without_a_pickle(saved: Saved) -> None:
    path = saved[0]
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert path.name == "step-0000007"
    state = json.loads((path / "state.json").read_text())
    assert state["classes"] == ["a", "b"]
    assert safetensors.torch.load_file(path / "model.safetensors").keys() == saved[1].state_dict().keys()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.99])
def test_a_flipped_byte_anywhere_is_found(name: str, place: float, saved: Saved) -> None:
    file = saved[0] / name
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=name):
        checkpoint.verify(saved[0])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: os.truncate(file, file.stat().st_size // 2)])
def test_a_missing_or_truncated_file_is_found(name: str, spoil: Callable[[Path], None], saved: Saved) -> None:
    spoil(saved[0] / name)
    with pytest.raises(BrokenCheckpointError, match=name):
        checkpoint.verify(saved[0])


def test_the_newest_complete_checkpoint_is_chosen_and_broken_ones_are_named(saved: Saved) -> None:
    path, network, optimizer = saved
    newer = checkpoint.save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), FACTS)
    assert checkpoint.choose(path.parent, "auto") == (newer, [])
    (newer / "model.safetensors").write_bytes(b"")
    (path.parent / "step-0000012").mkdir()
    chosen, broken = checkpoint.choose(path.parent, "auto")
    assert chosen == path
    assert "step-0000012" in broken[0]
    assert "step-0000010/model.safetensors does not match its sha256" in broken[1]
    (path / "state.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint; choose a new --run"):
        checkpoint.choose(path.parent, "auto")


def test_without_checkpoints_training_begins(tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path / "checkpoints", "auto") == (None, [])


def test_a_named_checkpoint_must_be_whole_and_the_newest(saved: Saved, tmp_path: Path) -> None:
    path, network, optimizer = saved
    assert checkpoint.choose(tmp_path / "new", str(path)) == (path, [])
    checkpoint.save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), FACTS)
    with pytest.raises(UserError, match="holds a later checkpoint, step-0000010; give a new --run"):
        checkpoint.choose(path.parent, str(path))
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"--resume .*optimizer.safetensors: No such file"):
        checkpoint.choose(tmp_path / "new", str(path))


def rewritten(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, object]) -> Path:
    return checkpoint.save(claim(path.parents[1], 1), network, optimizer, Progress(step=7), {**FACTS, **facts})


def test_a_newer_format_is_refused(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = rewritten(*saved, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 2, this version reads up to 1; update it"):
        checkpoint.choose(path.parent, "auto")


def test_another_recipe_other_images_or_another_network_are_refused(saved: Saved) -> None:
    network, optimizer = trained(seed=1)
    path = rewritten(*saved, {"recipe": {**RECIPE.model_dump(), "dropout": 0.7}})
    with pytest.raises(UserError, match=r"another recipe: dropout \(0.7 there, 0.1 here\)"):
        checkpoint.restore(path, network, optimizer, RECIPE, "d")
    path = rewritten(*saved, {})
    with pytest.raises(UserError, match="trained on other images"):
        checkpoint.restore(path, network, optimizer, RECIPE, "another fingerprint")
    resnet = models.build("resnet", 2, 0)
    with pytest.raises(UserError, match=r"another network \(\d+ tensors differ, .* first\)"):
        checkpoint.restore(path, resnet, optim.build(resnet, RECIPE), RECIPE, "d")


def test_the_last_three_are_kept(tmp_path: Path) -> None:
    network, optimizer = trained(seed=0)
    for number in range(1, 6):
        checkpoint.save(claim(tmp_path, 1), network, optimizer, Progress(step=number), FACTS)
    assert [path.name for path in checkpoint.found(tmp_path / "checkpoints")] == [
        "step-0000005",
        "step-0000004",
        "step-0000003",
    ]


def test_a_broken_checkpoint_that_is_newer_costs_no_good_one(tmp_path: Path) -> None:
    network, optimizer = trained(seed=0)
    for number in (1, 2, 3):
        checkpoint.save(claim(tmp_path, 1), network, optimizer, Progress(step=number), FACTS)
    for number in (2, 3):
        (tmp_path / "checkpoints" / f"step-{number:07d}" / "state.json").unlink()
    for number in (2, 3):  # training has gone on from step 1, and comes by the broken ones again
        path = checkpoint.save(claim(tmp_path, 1), network, optimizer, Progress(step=number), FACTS)
        assert checkpoint.newest(tmp_path / "checkpoints")[0] == path
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_a_crash_while_writing_leaves_the_one_before(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path, network, optimizer = saved

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_state_sum", crash)  # both safetensors files are written by then
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), FACTS)
    monkeypatch.undo()
    assert checkpoint.choose(path.parent, "auto") == (path, [])
    checkpoint.save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), FACTS)
    assert len(list(path.parent.iterdir())) == 2  # nothing half-written is left


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(disk: Disk) -> None:
    disk.remount("size=400k")
    network, optimizer = trained(seed=0)
    first = checkpoint.save(claim(disk.path, 1), network, optimizer, Progress(step=1), FACTS)
    (disk.path / "ballast").write_bytes(bytes(360_000))
    torch.manual_seed(0)
    large = nn.Linear(100, 100)
    with pytest.raises(UserError, match=r"step-0000002: checkpoint not written \(No space left on device\); make room"):
        checkpoint.save(claim(disk.path, 1), large, optim.build(large, RECIPE), Progress(step=2), FACTS)
    assert checkpoint.choose(disk.path / "checkpoints", "auto") == (first, [])
    assert [path.name for path in (disk.path / "checkpoints").iterdir()] == ["step-0000001"]


def test_the_result_loads_with_safetensors_alone(tmp_path: Path) -> None:
    network, _ = trained(seed=0)
    checkpoint.export(claim(tmp_path, 1), network, FACTS)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert_equal(loaded, network.state_dict())
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert json.loads((tmp_path / "config.json").read_text())["network"] == "resnet"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "attempts"}

"""A checkpoint is complete or it is not there."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Disk
from torch import nn

from cifar import checkpoint, files, models, optim
from cifar.attempt import Attempt, claim
from cifar.checkpoint import BrokenCheckpointError, Chosen, Progress, Snapshot
from cifar.errors import LostError, UserError
from cifar.recipes import Recipe

RECIPE = Recipe()
METADATA = {"network": "resnet", "classes": ["a", "b"], "recipe": RECIPE.model_dump(), "data_fingerprint": "d"}


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


def save(
    attempt: Attempt, network: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, metadata: dict[str, Any]
) -> Path:
    """Copies and writes."""
    return checkpoint.write(attempt, Snapshot(network, optimizer, progress), metadata)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer]:
    network, optimizer = trained(seed=0)
    progress = Progress(step=7, seconds=1.5, loss_sum=0.1 + 0.2, correct=3, seen=8)
    return save(claim(tmp_path, 1), network, optimizer, progress, METADATA), network, optimizer


Saved = tuple[Path, nn.Module, torch.optim.Optimizer]


def test_a_snapshot_is_of_its_own_step_however_late_it_is_written(saved: Saved, tmp_path: Path) -> None:
    path, network, optimizer = saved
    progress = Progress(step=7)
    snapshot, before = Snapshot(network, optimizer, progress), tensors(network, optimizer)
    before = {name: tensor.clone() for name, tensor in before.items()}
    step(network, optimizer)
    progress.step += 1
    late = checkpoint.write(claim(tmp_path / "late", 1), snapshot, METADATA)
    assert late.name == path.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (late / file).read_bytes() == (path / file).read_bytes()
    network, optimizer = trained(seed=1)
    assert checkpoint.restore(late, network, optimizer, RECIPE, METADATA["data_fingerprint"]).step == 7  # type: ignore[arg-type]
    assert_equal(tensors(network, optimizer), before)


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
    newer = save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), METADATA)
    assert checkpoint.choose(path.parent, "auto") == Chosen(newer, 10, None, [])
    (newer / "model.safetensors").write_bytes(b"")
    (path.parent / "step-0000012").mkdir()
    chosen = checkpoint.choose(path.parent, "auto")
    assert (chosen.path, chosen.step) == (path, 7)
    assert "step-0000012" in chosen.skipped[0]
    assert "step-0000010/model.safetensors does not match its sha256" in chosen.skipped[1]
    (path / "state.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint; choose a new --run"):
        checkpoint.choose(path.parent, "auto")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_who_may_read_it_is_what_the_umask_says(umask: int, tmp_path: Path) -> None:
    network, optimizer = trained(seed=0)
    before = os.umask(umask)
    try:
        path = save(claim(tmp_path, 1), network, optimizer, Progress(step=7), METADATA)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


def test_without_checkpoints_training_begins(tmp_path: Path) -> None:
    assert checkpoint.choose(tmp_path / "checkpoints", "auto") == Chosen(skipped=[])


def test_a_named_checkpoint_must_be_whole_and_the_newest(saved: Saved, tmp_path: Path) -> None:
    path, network, optimizer = saved
    assert checkpoint.choose(tmp_path / "new", str(path)) == Chosen(path, 7, str(path))
    save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), METADATA)
    with pytest.raises(UserError, match="holds a later checkpoint, step-0000010; give a new --run"):
        checkpoint.choose(path.parent, str(path))
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"--resume .*optimizer.safetensors: No such file"):
        checkpoint.choose(tmp_path / "new", str(path))


def rewritten(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, object]) -> Path:
    shutil.rmtree(path)
    return save(claim(path.parents[1], 1), network, optimizer, Progress(step=7), {**METADATA, **metadata})


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
        save(claim(tmp_path, 1), network, optimizer, Progress(step=number), METADATA)
    assert [path.name for path in checkpoint.found(tmp_path / "checkpoints")] == [
        "step-0000005",
        "step-0000004",
        "step-0000003",
    ]


def test_a_broken_checkpoint_that_is_newer_costs_no_good_one(tmp_path: Path) -> None:
    network, optimizer = trained(seed=0)
    for number in (1, 2, 3):
        save(claim(tmp_path, 1), network, optimizer, Progress(step=number), METADATA)
    for number in (2, 3):
        (tmp_path / "checkpoints" / f"step-{number:07d}" / "state.json").unlink()
    for number in (2, 3):  # training has gone on from step 1, and comes by the broken ones again
        path = save(claim(tmp_path, 1), network, optimizer, Progress(step=number), METADATA)
        assert checkpoint.newest(tmp_path / "checkpoints")[0] == path
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    assert checkpoint.verify(path)["progress"]["step"] == 3


def test_a_run_from_a_named_checkpoint_goes_on_from_its_own_by_the_same_command(saved: Saved, tmp_path: Path) -> None:
    named, network, optimizer = saved
    branch = tmp_path / "branch"
    origin = checkpoint.choose(branch / "checkpoints", str(named)).origin
    metadata = {**METADATA, "resumed_from": origin}
    own = save(claim(branch, 1), network, optimizer, Progress(step=9), metadata)
    for resume in (str(named), os.path.relpath(named), "auto"):
        assert checkpoint.choose(branch / "checkpoints", resume) == Chosen(own, 9, str(named), [])
    shutil.rmtree(named)
    assert checkpoint.choose(branch / "checkpoints", str(named)).path == own
    other = saved[0].with_name("step-0000008")
    with pytest.raises(UserError, match="No such file"):
        checkpoint.choose(branch / "checkpoints", str(other))


def test_a_checkpoint_is_taken_under_any_name(saved: Saved, tmp_path: Path) -> None:
    copied = tmp_path / "my best one"
    shutil.copytree(saved[0], copied)
    assert checkpoint.choose(tmp_path / "new", str(copied)) == Chosen(copied, 7, str(copied))
    shutil.copytree(saved[0], saved[0].with_name("step-0000099"))
    assert checkpoint.choose(saved[0].parent, "auto").step == 7
    shutil.copytree(saved[0], saved[0].with_name("step-0000099 (copy)"))
    assert checkpoint.choose(saved[0].parent, "auto").step == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weight", "moment", "buffer"])
def test_what_is_not_finite_is_not_saved(part: str, value: float, saved: Saved) -> None:
    path, network, optimizer = saved
    parameter = next(network.parameters())
    tensor = {
        "weight": parameter.data, "moment": optimizer.state[parameter]["exp_avg_sq"], "buffer": network[1].running_var,  # type: ignore[index]
    }[part]  # fmt: skip
    tensor[(-1,) * tensor.ndim] = value
    with pytest.raises(UserError, match=rf"not finite after step 10; lower .* \(last good checkpoint: {path}\)"):
        save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), METADATA)
    assert checkpoint.found(path.parent) == [path]


# ---- an attempt that another one has succeeded


class Frozen:
    """Stops at the n-th look at or change of the file system, while `meanwhile` happens."""

    def __init__(self) -> None:
        self.left, self.meanwhile = 0, lambda: None
        sys.addaudithook(self)

    def __call__(self, event: str, _arguments: object) -> None:
        if self.left and event.partition(".")[0] in ("open", "os", "shutil"):
            self.left -= 1
            if not self.left:
                self.meanwhile()

    def at(self, number: int, meanwhile: Callable[[], None]) -> None:
        self.left, self.meanwhile = number, meanwhile


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    return Frozen()


@pytest.mark.parametrize("broken", [(), (2, 3), (3, 4)])
def test_wherever_an_attempt_freezes_it_spoils_nothing_of_its_successor(
    broken: tuple[int, ...], tmp_path: Path, frozen: Frozen
) -> None:
    """Both save step 4; it is tried at every operation of the first one's save."""
    network, optimizer = trained(seed=0)
    moment, finished = 0, False
    while not finished:
        moment += 1
        run = tmp_path / str(moment)
        for number in range(1, 4):
            save(claim(run, 1), network, optimizer, Progress(step=number), METADATA)
        for number in broken:
            (run / "checkpoints" / f"step-{number:07d}").mkdir(exist_ok=True)
            (run / "checkpoints" / f"step-{number:07d}" / "state.json").write_text("{}")
        older = claim(run, 1)
        seen: list[Path] = []

        def succeed() -> None:
            newer = claim(run, 1)  # noqa: B023
            chosen = checkpoint.choose(run / "checkpoints", "auto")  # noqa: B023
            assert chosen.path is not None
            seen.append(chosen.path)  # noqa: B023
            if chosen.step < 4:
                seen.append(save(newer, network, optimizer, Progress(step=4), {**METADATA, "of": "newer"}))  # noqa: B023

        frozen.at(moment, succeed)
        try:
            save(older, network, optimizer, Progress(step=4), METADATA)
        except UserError as error:
            assert "was taken over by attempt 5" in str(error)  # noqa: PT017
        finished = frozen.left > 0
        frozen.at(0, lambda: None)
        if seen:
            checkpoint.verify(seen[-1])
        newest = checkpoint.newest(run / "checkpoints")[0]
        assert newest == (seen[-1] if seen else run / "checkpoints/step-0000004" if 4 not in broken else newest)
        assert not list((run / "checkpoints").glob(".*")), moment
    assert moment > 20


def test_a_crash_while_writing_leaves_the_one_before(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path, network, optimizer = saved

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_state_sum", crash)  # both safetensors files are written by then
    with pytest.raises(KeyboardInterrupt):
        save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), METADATA)
    monkeypatch.undo()
    assert checkpoint.choose(path.parent, "auto") == Chosen(path, 7, None, [])
    save(claim(path.parents[1], 1), network, optimizer, Progress(step=10), METADATA)
    assert len(list(path.parent.iterdir())) == 2  # nothing half-written is left


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(disk: Disk) -> None:
    disk.remount("size=400k")
    network, optimizer = trained(seed=0)
    first = save(claim(disk.path, 1), network, optimizer, Progress(step=1), METADATA)
    (disk.path / "ballast").write_bytes(bytes(360_000))
    torch.manual_seed(0)
    large = nn.Linear(100, 100)
    with pytest.raises(UserError, match=r"step-0000002: checkpoint not written \(No space left on device\); make room"):
        save(claim(disk.path, 1), large, optim.build(large, RECIPE), Progress(step=2), METADATA)
    assert checkpoint.choose(disk.path / "checkpoints", "auto") == Chosen(first, 1, None, [])
    assert [path.name for path in (disk.path / "checkpoints").iterdir()] == ["step-0000001"]


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [
        (errno.ENOSPC, 2, "make room there and start again"), (errno.EACCES, 2, "make it writable and start again"),
        (errno.ESTALE, 1, "the file system fails"), (errno.EIO, 1, "the file system fails"),
    ],
)  # fmt: skip
def test_only_what_the_user_can_mend_is_the_users_error(
    number: int, status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    network, optimizer = trained(0)
    attempt = claim(tmp_path, 1)
    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(UserError, match=words) as error:
        save(attempt, network, optimizer, Progress(step=1), METADATA)
    assert error.value.status == status  # 1 is tried again, by launchers and job scripts


@pytest.mark.parametrize(("number", "status"), [(errno.EACCES, 2), (errno.ESTALE, 1)])
def test_a_folder_that_cannot_be_read_does_not_count_as_empty(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> list[str]:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read") as error:
        checkpoint.choose(tmp_path, "auto")
    assert error.value.status == status


def test_a_checkpoint_on_a_disk_that_fails_is_not_skipped(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(LostError, match="cannot be read"):
        checkpoint.choose(saved[0].parent, "auto")


def test_the_result_loads_with_safetensors_alone(tmp_path: Path) -> None:
    network, _ = trained(seed=0)
    checkpoint.export(claim(tmp_path, 1), network, METADATA)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert_equal(loaded, network.state_dict())
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert json.loads((tmp_path / "config.json").read_text())["network"] == "resnet"
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "attempts"}


def test_what_the_bits_depend_on_is_said_when_it_has_changed(tmp_path: Path) -> None:
    network, optimizer = trained(seed=0)
    before = {
        **METADATA,
        "world_size": 2,
        "precision": "no",
        "computed_on": {"device": "H100", "torch": "2.11", "cuDNN": "9"},
    }
    path = save(claim(tmp_path, 1), network, optimizer, Progress(step=1), before)
    assert checkpoint.changes(path, before, 512) == []
    now = {**before, "computed_on": {"device": "H200", "torch": "2.11", "cuDNN": "10"}}
    (line,) = checkpoint.changes(path, now, 512)
    assert line.startswith(
        "device: H100 before, H200 now; cuDNN: 9 before, 10 now; same batches, but the weights may not"
    )
    path = save(claim(tmp_path, 1), network, optimizer, Progress(step=2), {**before, "computed_on": {}})
    assert checkpoint.changes(path, now, 512) == []  # of a version that did not record it

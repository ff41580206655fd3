"""Recipes and the command line made from them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
import test_schedule
from conftest import ROOT, Train

from cifar import recipes
from cifar.errors import UserError
from cifar.recipes import RECIPES, Recipe, parse_command_line


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_documented_and_its_help_shows_its_values(name: str, train: Train) -> None:
    recipe = RECIPES[name]()
    shown = train("--recipe", name, "--help")
    assert shown.returncode == 0
    assert "--global-batch-size INT" in shown.stdout
    assert "--augmentation-backend albumentations|device" in shown.stdout
    assert f"({recipe.global_batch_size})" in shown.stdout
    documentation = RECIPES[name].__doc__ or ""
    for fact in ("accelerate launch", "test accuracy", "minute"):
        assert fact in documentation


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    shown = subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        recipes.resnet().epochs = 3


def test_flags_change_the_fields_they_name() -> None:
    recipe, options = parse_command_line(["--recipe", "digits", "--epochs", "9", "--dropout=0.5", "--run", "somewhere"])
    assert recipe == RECIPES["digits"]().model_copy(update={"epochs": 9, "peak_epoch": 3.0, "dropout": 0.5})
    assert (options.run_dir, options.recipe_name) == (Path("somewhere"), "digits")
    assert parse_command_line([])[1] == (Path("runs/resnet"), "auto", 500, "resnet", False, "off", 0)


@pytest.mark.parametrize("name", RECIPES)
def test_with_other_epochs_alone_the_schedule_keeps_its_shape(name: str) -> None:
    recipe = RECIPES[name]()
    assert parse_command_line(["--recipe", name, "--epochs", str(recipe.epochs)])[0] == recipe
    rates = test_schedule.rates(recipe, 1000)
    for epochs in (1, 2, 3, 7, 100_000):
        shorter = parse_command_line(["--recipe", name, "--epochs", str(epochs)])[0]
        assert test_schedule.rates(shorter, 1000) == pytest.approx(rates)
        assert shorter.model_copy(update={"epochs": recipe.epochs, "peak_epoch": recipe.peak_epoch}) == recipe
    assert parse_command_line(["--epochs", "8", "--peak-epoch", "5"])[0].peak_epoch == 5


def test_a_run_from_before_the_peak_moved_along_goes_on_with_its_own(tmp_path: Path) -> None:
    arguments = ["--recipe", "digits", "--epochs", "9"]
    before = {**RECIPES["digits"]().model_dump(), "epochs": 9}
    assert before["peak_epoch"] == 2
    for place, more in (("run/recipe.json", ["--run", f"{tmp_path}/run"]), ("step-0000009/state.json", [])):
        (tmp_path / place).parent.mkdir()
        (tmp_path / place).write_text(json.dumps({"recipe": before}))
        named = more or ["--run", f"{tmp_path}/new", "--resume", f"{tmp_path}/step-0000009"]
        recipe, _ = parse_command_line([*arguments, *named])
        assert recipes.differences(recipe, before) == []
        assert parse_command_line([*arguments[:2], "--epochs", "12", *named])[0].peak_epoch == 4
    moved = {**before, "peak_epoch": 3.0}
    (tmp_path / "run/recipe.json").write_text(json.dumps({"recipe": moved}))
    assert recipes.differences(parse_command_line([*arguments, "--run", f"{tmp_path}/run"])[0], moved) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--recipe", "resnett"], "'resnett' is unknown"),
        (["--epoch", "3"], "--epoch"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--epochs", "0"], "--epochs 0"),
        (["--epochs", "many"], "--epochs many"),
        (["--epochs", "1e3"], "--epochs 1e3"),
        (["--epochs", "4", "--peak-epoch", "4"], "peak_epoch 4"),
        (["--epochs"], "--epochs"),
        (["--dropout", "1"], "--dropout 1"),
        (["--dropout", "nan"], "--dropout nan"),
        (["--peak-learning-rate", "-1"], "--peak-learning-rate -1"),
        (["--peak-learning-rate", "inf"], "--peak-learning-rate inf"),
        (["--global-batch-size", "-512"], "--global-batch-size -512"),
        (["--seed", "1.5"], "--seed 1.5"),
        (["--seed", "-1"], "--seed -1"),
        (["--image-sizes", "32,"], "--image-sizes 32,"),
        (["--image-sizes", "24,8"], "--image-sizes 24,8: each side must be from 16 to 64"),
        (["--image-sizes", "big"], "--image-sizes big: string should match"),
        (["--optimizer", "sgd"], "--optimizer sgd: input should be 'adam' or 'muon'"),
        (["--test-time-augmentation", "often"], "--test-time-augmentation often: input should be a valid boolean"),
        (["--augmentation-backend", "foo"], "--augmentation-backend foo: input should be 'albumentations' or 'device'"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0"),
        (["--checkpoint-every", "often"], "--checkpoint-every often"),
        (["--checkpoint-every", "9" * 5000], "--checkpoint-every 999"),
        (["stray"], "stray"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_status_2(arguments: list[str], named: str, train: Train) -> None:
    done = train(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: error: ")
    assert named in done.stderr


def test_a_process_that_is_alone_prints_its_error_whatever_its_rank(train: Train) -> None:
    done = train("--nonsense", env={"RANK": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: ")


def test_closed_streams_are_no_fault() -> None:
    script = f"exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'train.py'))} --nonsense >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_differences_name_fields_and_values() -> None:
    there = {**recipes.resnet().model_dump(), "epochs": 30, "data": "elsewhere"}
    assert recipes.differences(recipes.resnet(), there) == ["epochs (30 there, 24 here)"]
    del there["augmentation_backend"]  # as written by a version that had no such field
    assert recipes.differences(recipes.resnet(), there) == ["epochs (30 there, 24 here)"]


def test_a_field_is_understood_under_its_former_name() -> None:
    now = parse_command_line(["--augmentation-backend", "device"])[0]
    assert now.augmentation_backend == "device"
    assert parse_command_line(["--augment", "device"])[0] == now
    there = now.model_dump()
    there["augment"] = there.pop("augmentation_backend")  # in the recipe.json of an older run
    assert recipes.differences(now, there) == []
    assert recipes.differences(Recipe(), there) == ["augmentation_backend ('device' there, 'albumentations' here)"]


def test_override_refuses_a_field_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="momentum"):
        recipes.override(Recipe(), {"momentum": 0.9})

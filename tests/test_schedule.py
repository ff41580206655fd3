"""Every function of the step."""

import pytest

from cifar.errors import UserError
from cifar.recipes import Recipe
from cifar.schedule import Schedule


def rates(recipe: Recipe, steps: int) -> list[float]:
    """The learning rates of a run of so many steps, and the one after it."""
    schedule = Schedule(recipe, recipe.global_batch_size)
    schedule.total_steps = steps
    return [schedule.learning_rate(step) for step in range(steps + 1)]


@pytest.mark.parametrize("total", [2344, 100])
def test_one_cycle_passes_its_corner_points(total: int) -> None:
    found = rates(Recipe(epochs=24, peak_epoch=5, peak_learning_rate=0.01), total)
    peak = total * 5 / 24
    assert found[0] == pytest.approx(0.01 / 25)
    assert max(found) == pytest.approx(0.01, rel=1 / peak)
    assert abs(found.index(max(found)) - peak) <= 1
    assert found[total] == 0
    assert found[total - 1] == pytest.approx(0.01 / (total - peak))
    middle = round((peak + total) / 2)
    assert found[middle] == pytest.approx(0.01 * (total - middle) / (total - peak))
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)


def test_without_a_warm_up_the_rate_falls_from_its_peak_at_once() -> None:
    found = rates(Recipe(epochs=8, peak_epoch=0, peak_learning_rate=0.24), 100)
    assert (found[0], found[50], found[100]) == pytest.approx((0.24, 0.12, 0))


def test_a_checkpoint_is_due_at_each_epochs_end_and_every_so_many_steps() -> None:
    schedule = Schedule(Recipe(global_batch_size=16, epochs=3, peak_epoch=1), images=50, checkpoint_every=4)
    assert [steps for steps in range(1, 11) if schedule.completes_epoch(steps)] == [4, 7, 10]
    assert [steps for steps in range(1, 11) if schedule.saves(steps)] == [4, 7, 8, 10]
    assert not schedule.completes_epoch(0)
    assert (schedule.total_steps, schedule.epochs_completed(10)) == (10, 3)


def test_a_batch_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"--global-batch-size 512 is more than the 50 training images; lower it"):
        Schedule(Recipe(global_batch_size=512), images=50)


def test_each_size_is_shown_for_an_equal_part_of_the_steps() -> None:
    schedule = Schedule(Recipe(image_sizes="20,24,28", global_batch_size=1, epochs=1, peak_epoch=0), images=261)
    sizes = [schedule.image_size(step) for step in range(261)]
    assert sizes == [20] * 87 + [24] * 87 + [28] * 87
    assert {Schedule(Recipe(), 512).image_size(step) for step in range(10)} == {32}


def test_the_early_layers_are_frozen_from_a_part_of_the_steps_on() -> None:
    for steps, part, first in ((261, 0.75, 196), (12, 0.5, 6), (10, 1.0, 10)):  # 195 are not yet three quarters of 261
        recipe = Recipe(freeze_at=part, global_batch_size=1, epochs=1, peak_epoch=0)
        assert Schedule(recipe, images=steps).freeze_step == first


def test_each_step_and_rank_has_random_numbers_of_its_own() -> None:
    schedule = Schedule(Recipe(), images=512)
    seeds = [schedule.generator_seed(step, rank) for step in range(50) for rank in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert schedule.generator_seed(3, 1) == Schedule(Recipe(dropout=0.5), images=600).generator_seed(3, 1)

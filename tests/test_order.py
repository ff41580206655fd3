"""Which images make up batch k."""

import pytest

from cifar.data import order
from cifar.recipes import Recipe


def stream(seed: int, images: int, epochs: int, batch_size: int) -> list[order.Sample]:
    steps = order.total_steps(images, epochs, batch_size)
    return [sample for step in range(steps) for sample in order.batch(seed, step, images, batch_size)]


@pytest.mark.parametrize(("images", "batch_size"), [(64, 16), (50, 16), (64, 64)])
def test_every_image_is_drawn_exactly_once_per_epoch(images: int, batch_size: int) -> None:
    samples = stream(0, images, 3, batch_size)
    assert samples[: 3 * images] == sorted(samples[: 3 * images], key=lambda sample: sample[0])
    for epoch in range(3):
        assert sorted(index for e, index in samples if e == epoch) == list(range(images))
    assert len(samples) - 3 * images < batch_size
    assert {epoch for epoch, _ in samples[3 * images :]} <= {3}


def test_the_order_changes_with_epoch_and_seed_only() -> None:
    first, second = (tuple(order.permutation(0, epoch, 1000)) for epoch in (0, 1))
    assert first != second
    assert first != tuple(order.permutation(1, 0, 1000))
    order.permutation.cache_clear()
    assert first == tuple(order.permutation(0, 0, 1000))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_ranks_shares_are_the_global_batch(ranks: int) -> None:
    recipe = Recipe(global_batch_size=16)
    shares = [list(order.RankBatches(recipe, 50, 2, 7, rank, ranks)) for rank in range(ranks)]
    for number, step in enumerate(range(2, 7)):
        assert [sample for share in shares for sample in share[number]] == order.batch(0, step, 50, 16)

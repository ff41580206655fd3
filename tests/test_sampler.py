"""Which images make up batch k."""

import numpy as np
import pytest

from cifar.data import sampler
from cifar.recipes import Recipe

Pairs = list[tuple[int, int]]  # (epoch, index)


def pairs(samples: sampler.Samples) -> Pairs:
    assert samples.epochs.dtype == samples.indices.dtype == np.int64
    return list(zip(samples.epochs.tolist(), samples.indices.tolist(), strict=True))


def stream(seed: int, images: int, epochs: int, batch_size: int) -> Pairs:
    steps = -(-images * epochs // batch_size)
    return [pair for step in range(steps) for pair in pairs(sampler.batch(seed, step, images, batch_size))]


@pytest.mark.parametrize(("images", "batch_size"), [(64, 16), (50, 16), (64, 64)])
def test_every_image_is_drawn_exactly_once_per_epoch(images: int, batch_size: int) -> None:
    samples = stream(0, images, 3, batch_size)
    assert samples[: 3 * images] == sorted(samples[: 3 * images], key=lambda sample: sample[0])
    for epoch in range(3):
        assert sorted(index for e, index in samples if e == epoch) == list(range(images))
    assert len(samples) - 3 * images < batch_size
    assert {epoch for epoch, _ in samples[3 * images :]} <= {3}


def test_the_order_changes_with_epoch_and_seed_only() -> None:
    first, second = (tuple(sampler.permutation(0, epoch, 1000)) for epoch in (0, 1))
    assert first != second
    assert first != tuple(sampler.permutation(1, 0, 1000))
    sampler.permutation.cache_clear()
    assert first == tuple(sampler.permutation(0, 0, 1000))


@pytest.mark.parametrize("batch_size", [16, 48, 120])  # of 50 images: the last holds parts of four epochs
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [1, 64, sampler.BLOCK])
def test_the_ranks_shares_are_slices_of_the_stream_however_many_are_computed_at_once(
    block: int, ranks: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "BLOCK", block)
    whole = [(epoch, index) for epoch in range(20) for index in sampler.permutation(0, epoch, 50).tolist()]
    recipe = Recipe(global_batch_size=batch_size)
    shares = [list(sampler.DistributedBatchSampler(recipe, 50, 2, 7, rank, ranks)) for rank in range(ranks)]
    for number, step in enumerate(range(2, 7)):
        expected = whole[step * batch_size : (step + 1) * batch_size]
        assert [pair for share in shares for pair in pairs(share[number])] == expected
        assert pairs(sampler.batch(0, step, 50, batch_size)) == expected


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_workers_shares_are_every_nth_batch(workers: int) -> None:
    batches = sampler.DistributedBatchSampler(Recipe(global_batch_size=16), 50, 2, 13, 1, 2)
    whole = [pairs(samples) for samples in batches]
    assert len(whole) == len(batches) == 11
    for number in range(workers):
        part = batches.every(workers, number)
        assert [pairs(samples) for samples in part] == whole[number::workers]
        assert len(part) == len(whole[number::workers])


def test_the_order_stays_what_it_is() -> None:
    """Another one would be as good, but a run that began before a change would not go on as it was."""
    assert pairs(sampler.batch(7, 2, 10, 8)) == [
        (1, 6), (1, 9), (1, 8), (1, 1), (2, 5), (2, 9), (2, 6), (2, 3),
    ]  # fmt: skip

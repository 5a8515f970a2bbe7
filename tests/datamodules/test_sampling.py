import random
from itertools import pairwise

import pytest
from torch.utils.data import DataLoader, DistributedSampler

from datamodules import LengthGroupedSampler

RANDOM = random.Random(0)
LENGTHS = [RANDOM.randint(1, 200) for _ in range(1003)]


def waste(batches: list[list[int]]) -> float:
    """Padded positions in every hundred."""
    padded = sum(len(batch) * max(LENGTHS[index] for index in batch) for batch in batches)
    return 1 - sum(LENGTHS[index] for batch in batches for index in batch) / padded


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


def test_training_sees_every_sample_and_fills_the_last_batch() -> None:
    batches = list(LengthGroupedSampler(LENGTHS, 8))
    assert {len(batch) for batch in batches} == {8}
    assert len(batches) == 126  # ceil(1003 / 8)
    assert set(flat(batches)) == set(range(1003))
    assert sorted(flat(list(LengthGroupedSampler(LENGTHS[:1000], 8)))) == list(range(1000))


def test_fewer_samples_than_a_batch() -> None:
    (batch,) = LengthGroupedSampler([5, 6, 7], 8)
    assert len(batch) == 8
    assert set(batch) == {0, 1, 2}


def test_padding_waste_is_below_that_of_random_batches() -> None:
    order = list(range(1000))
    RANDOM.shuffle(order)
    at_random = waste([order[start : start + 8] for start in range(0, 1000, 8)])
    assert at_random > 0.4
    assert waste(list(LengthGroupedSampler(LENGTHS, 8))) < 0.06


def test_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=1)
    first = list(sampler)
    assert list(sampler) == first == list(LengthGroupedSampler(LENGTHS, 8, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(LengthGroupedSampler(LENGTHS, 8, seed=7)) != first


def test_batches_come_in_no_order_of_length() -> None:
    longest = [max(LENGTHS[index] for index in batch) for batch in LengthGroupedSampler(LENGTHS, 8)]
    rises = sum(left < right for left, right in pairwise(longest))
    assert 40 < rises < 85  # of 125; sorted batches would give about 3 or 122


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    alone = [sorted(batch) for batch in LengthGroupedSampler(LENGTHS, 12)]
    ranks = [list(LengthGroupedSampler(LENGTHS, 3, num_replicas=4, rank=rank)) for rank in range(4)]
    assert [sorted(flat(list(parts))) for parts in zip(*ranks, strict=True)] == alone


def test_ranks_are_disjoint() -> None:
    lengths = LENGTHS[:1000]  # 1000 = 4 * 250, so nothing is repeated
    ranks = [flat(list(LengthGroupedSampler(lengths, 5, num_replicas=4, rank=rank))) for rank in range(4)]
    assert sorted(flat(ranks)) == list(range(1000))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [2, 8, 30])
def test_evaluation_sees_every_sample_once_on_ranks_with_as_many_batches(world: int, batch_size: int) -> None:
    for count in (8, 9, 16, 17, 1003):
        samplers = [
            LengthGroupedSampler(LENGTHS[:count], batch_size, shuffle=False, num_replicas=world, rank=rank)
            for rank in range(world)
        ]
        ranks = [list(sampler) for sampler in samplers]
        assert sorted(flat(flat(ranks))) == list(range(count))
        assert {len(batches) for batches in ranks} == {len(samplers[0])}
        assert max(len(batch) for batches in ranks for batch in batches) <= batch_size
        for batches in ranks:
            lengths = [LENGTHS[index] for index in flat(batches)]
            assert lengths == sorted(lengths, reverse=True)


def test_skipped_batches_are_those_seen_and_only_in_their_epoch() -> None:
    sampler = LengthGroupedSampler(LENGTHS, 8)
    sampler.set_epoch(1)
    whole = list(sampler)
    sampler.skip_batches = 100
    assert list(sampler) == whole[100:]
    assert len(sampler) == 126
    sampler.set_epoch(1)  # as Lightning does once more at the start of the resumed epoch
    assert list(sampler) == whole[100:]
    sampler.set_epoch(2)
    assert len(list(sampler)) == 126


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_batches_that_are_left(workers: int) -> None:
    class Same:
        def __getitem__(self, indices: list[int]) -> list[int]:
            return indices

    sampler = LengthGroupedSampler(LENGTHS[:80], 8)
    whole = list(sampler)
    sampler.skip_batches = 4
    loader = DataLoader(Same(), sampler=sampler, batch_size=None, collate_fn=list, num_workers=workers)
    assert list(loader) == whole[4:]
    assert len(loader) == 10


def test_lightning_takes_it_for_a_distributed_sampler() -> None:
    assert isinstance(LengthGroupedSampler([1, 2], 1), DistributedSampler)


def test_nothing_to_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        LengthGroupedSampler([], 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        LengthGroupedSampler([1], 0)

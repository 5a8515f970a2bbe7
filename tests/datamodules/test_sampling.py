import random
from collections import Counter
from itertools import pairwise
from typing import Any

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


# groups: a third of the samples have images, and are the longer ones
IMAGES = [RANDOM.random() < 0.3 for _ in LENGTHS]
MIXED = [length + 576 * has for length, has in zip(LENGTHS, IMAGES, strict=True)]


def kinds(batch: list[int]) -> set[bool]:
    return {IMAGES[index] for index in batch}


def ranks_of(world: int, batch_size: int, count: int = 1003, **options: Any) -> list[list[list[int]]]:
    samplers = [
        LengthGroupedSampler(MIXED[:count], batch_size, num_replicas=world, rank=rank, groups=IMAGES[:count], **options)
        for rank in range(world)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(own) for own in batches]
    return batches


@pytest.mark.parametrize("sort", [True, False])
def test_training_batches_are_of_one_group_on_all_ranks(sort: bool) -> None:
    ranks = ranks_of(4, 3, group_by_length=sort)
    global_batches = [flat(list(parts)) for parts in zip(*ranks, strict=True)]
    assert all(len(kinds(batch)) == 1 for batch in global_batches)
    assert set(flat(global_batches)) == set(range(1003))
    # each group fills up its last batch
    counts = [IMAGES.count(True), IMAGES.count(False)]
    assert len(global_batches) == sum(-(-count // 12) for count in counts)
    seen = Counter(flat(global_batches))
    assert sum(seen.values()) - 1003 == sum(-count % 12 for count in counts)
    # and the groups alternate in no order
    changes = sum(kinds(left) != kinds(right) for left, right in pairwise(global_batches))
    assert 20 < changes < 52  # of 84, with 26 batches of the rarer group


@pytest.mark.parametrize("sort", [True, False])
def test_global_batches_of_groups_do_not_depend_on_the_number_of_ranks(sort: bool) -> None:
    alone, pair, four = (
        [sorted(flat(list(parts))) for parts in zip(*ranks_of(world, 12 // world, group_by_length=sort), strict=True)]
        for world in (1, 2, 4)
    )
    assert alone == pair == four


def test_one_group_is_as_good_as_none() -> None:
    for shuffle in (True, False):
        plain = LengthGroupedSampler(LENGTHS, 8, shuffle=shuffle, seed=3)
        grouped = LengthGroupedSampler(LENGTHS, 8, shuffle=shuffle, seed=3, groups=["text"] * 1003)
        assert list(plain) == list(grouped)


def test_a_group_smaller_than_a_batch_is_repeated() -> None:
    sampler = LengthGroupedSampler([5] * 20 + [9] * 2, 8, groups=[False] * 20 + [True] * 2)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 4
    (images,) = [batch for batch in batches if set(batch) & {20, 21}]
    assert sorted(images) == [20] * 4 + [21] * 4


def test_within_groups_lengths_are_alike_unless_switched_off() -> None:
    def padding(batches: list[list[int]]) -> float:
        return 1 - sum(map(MIXED.__getitem__, flat(batches))) / sum(len(b) * max(MIXED[i] for i in b) for b in batches)

    (ordered,), (unordered,) = ranks_of(1, 8), ranks_of(1, 8, group_by_length=False)
    assert padding(ordered) < 0.05
    assert padding(unordered) > 0.15
    assert padding(list(LengthGroupedSampler(MIXED, 8, group_by_length=False))) > 0.4  # groups mixed too


def test_resuming_with_groups() -> None:
    sampler = LengthGroupedSampler(MIXED, 8, groups=IMAGES, seed=1)
    sampler.set_epoch(3)
    whole = list(sampler)
    again = LengthGroupedSampler(MIXED, 8, groups=IMAGES, seed=1)
    again.set_epoch(3)
    again.skip_batches = 50
    assert list(again) == whole[50:]
    assert len(again) == len(whole)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [2, 8, 30])
@pytest.mark.parametrize("count", [40, 41, 1003])
def test_evaluation_sees_every_sample_once_and_ranks_see_the_same_group(
    world: int, batch_size: int, count: int
) -> None:
    ranks = ranks_of(world, batch_size, count, shuffle=False)
    assert sorted(flat(flat(ranks))) == list(range(count))
    for parts in zip(*ranks, strict=True):
        assert len(kinds(flat(list(parts)))) == 1
    for batches in ranks:
        assert kinds(batches[0]) == {True}  # the longest come first
        assert MIXED[batches[0][0]] == max(MIXED[index] for index in flat(batches))


def test_as_many_groups_as_samples() -> None:
    with pytest.raises(ValueError, match="expected one group for each of 3 samples, found 2"):
        LengthGroupedSampler([1, 2, 3], 1, groups=[True, False])


# batch sizes by group
SIZES = {"vqa": 3, "nlvr": 1, "caption": 2}
TASKS = ["vqa"] * 20 + ["nlvr"] * 7 + ["caption"] * 9


def of_tasks(world: int = 1, rank: int = 0, sizes: Any = SIZES, **options: Any) -> LengthGroupedSampler:
    return LengthGroupedSampler(
        LENGTHS[: len(TASKS)], sizes, num_replicas=world, rank=rank, groups=TASKS, seed=4, **options
    )


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("sort", [True, False])
def test_each_group_has_its_batch_size(world: int, sort: bool) -> None:
    ranks = [list(of_tasks(world, rank, group_by_length=sort)) for rank in range(world)]
    steps: Counter[str] = Counter()
    seen: Counter[int] = Counter()
    for parts in zip(*ranks, strict=True):
        (task,) = {TASKS[index] for index in flat(list(parts))}
        assert {len(own) for own in parts} == {SIZES[task]}
        steps[task] += 1
        seen.update(flat(list(parts)))
    members = Counter(TASKS)
    assert steps == {task: -(-members[task] // (world * size)) for task, size in SIZES.items()}
    assert steps.total() == len(of_tasks(world))
    for task, size in SIZES.items():
        own = [seen[index] for index, name in enumerate(TASKS) if name == task]
        assert sum(own) == steps[task] * world * size
        assert set(own) <= {1, 2}  # some of the first fill up the last batch


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_of_sized_groups_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    whole = {task: 6 * size for task, size in SIZES.items()}
    share = {task: size // world for task, size in whole.items()}
    alone = [sorted(batch) for batch in of_tasks(sizes=whole)]
    ranks = [list(of_tasks(world, rank, share)) for rank in range(world)]
    assert [sorted(flat(list(parts))) for parts in zip(*ranks, strict=True)] == alone


def test_epochs_are_counted_in_the_indices() -> None:
    plain, counted = of_tasks(), of_tasks(count_epochs=True)
    for epoch in (0, 1, 5):
        plain.set_epoch(epoch)
        counted.set_epoch(epoch)
        assert [[index + 36 * epoch for index in batch] for batch in plain] == list(counted)
    counted.skip_batches = 3
    assert [[divmod(index, 36) for index in batch] for batch in counted] == [
        [(5, index) for index in batch] for batch in list(plain)[3:]
    ]
    ranks = [of_tasks(2, rank, count_epochs=True) for rank in range(2)]
    for sampler in ranks:
        sampler.set_epoch(2)
        assert {index // 36 for batch in sampler for index in batch} == {2}
    # evaluation knows no epochs
    evaluation = of_tasks(shuffle=False, count_epochs=True)
    evaluation.set_epoch(3)
    assert sorted(flat(list(evaluation))) == list(range(36))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_with_a_batch_size_for_each_group(world: int) -> None:
    sizes = SIZES | {"nlvr": 2}
    ranks = [list(of_tasks(world, rank, sizes, shuffle=False)) for rank in range(world)]
    assert sorted(flat(flat(ranks))) == list(range(36))
    for parts in zip(*ranks, strict=True):
        (task,) = {TASKS[index] for index in flat(list(parts))}
        assert max(map(len, parts)) <= sizes[task]


def test_batch_sizes_that_do_not_go_with_the_groups() -> None:
    with pytest.raises(ValueError, match=r"batch_size: no number for nlvr, found \{'vqa': 3, 'caption': 2\}"):
        of_tasks(sizes={"vqa": 3, "caption": 2})
    with pytest.raises(ValueError, match="batch_size must be at least 1, found 0"):
        of_tasks(sizes=SIZES | {"nlvr": 0})
    assert list(of_tasks(sizes=SIZES | {"gqa": 9})) == list(of_tasks())  # one that has no samples now

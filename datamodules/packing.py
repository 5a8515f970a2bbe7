"""Packing: several samples in one row of a batch, so that hardly any of it is padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapreplace
from typing import Any

import torch

from datamodules.encoding import Collator, EncodedSample
from datamodules.sampling import LengthGroupedSampler
from datamodules.steps import Counted
from dora_lightning.data import IGNORE


def pack_lengths(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which samples share a row, longest first, each in the fullest row that has room for it (best fit decreasing).

    Args:
        lengths: The length of each sample, in tokens.
        capacity: Tokens that a row holds.

    Returns:
        Rows of indices into ``lengths``; each index is in one row.

    Raises:
        ValueError: A sample is longer than a row.

    Example::

        >>> pack_lengths([3, 9, 4, 5], capacity=10)
        [[1], [3, 2], [0]]
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit in a row of {capacity}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, row = capacity, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        insort(room, (left - lengths[index], row))
    return rows


def share_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which samples share a row so that a batch of them has the fewest cells, padding included.

    Every number of rows is tried, each sample put into the emptiest row, longest first; of two ways with as many cells
    the one with shorter rows is taken, where attention costs less.

    Args:
        lengths: The length of each sample, in tokens.
        capacity: Tokens that a row holds, at least the longest of ``lengths``.

    Returns:
        Rows of indices into ``lengths``; each index is in one row.

    Example::

        >>> share_rows([6, 5, 2, 1], capacity=10)
        [[0, 3], [1, 2]]
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    best: tuple[int, int, list[list[int]]] | None = None
    for count in range(1, len(lengths) + 1):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, row) for row in range(count)]  # a heap
        for index in order:
            tokens, row = filled[0]
            rows[row].append(index)
            heapreplace(filled, (tokens + lengths[index], row))
        width = max(filled)[0]
        if width <= capacity and (best is None or (count * width, width) < best[:2]):
            best = count * width, width, rows
    assert best is not None
    return best[2]


class PackingSampler(LengthGroupedSampler):
    """Yields batches of rows, each row a list of samples that fit in it together.

    Which lengths share a row is the same in every epoch, so that all have the same number of batches; which samples of
    a length take these places is drawn by the seed and the epoch. With rows in place of samples, all that
    :class:`~datamodules.sampling.LengthGroupedSampler` says of training holds: on any number of ranks a global batch
    is the same set of rows, and the last one is filled up with rows that are seen twice.

    Args:
        lengths: The length of each sample, in tokens.
        capacity: Tokens that a row holds.
        batch_size: Rows in a batch on one rank.
        seed: Seed of the order and of the samples that share a row.
        num_replicas: As in :class:`~datamodules.sampling.LengthGroupedSampler`.
        rank: Likewise.
        group_by_length: Likewise, of rows.

    Example::

        >>> sampler = PackingSampler([3, 9, 4, 5], capacity=10, batch_size=3)
        >>> sorted(next(iter(sampler)))
        [[0], [1], [3, 2]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        capacity: int,
        batch_size: int,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        group_by_length: bool = True,
    ) -> None:
        self.rows = pack_lengths(lengths, capacity)
        self.capacity = capacity
        self.sample_lengths = list(lengths)
        super().__init__(
            [sum(lengths[index] for index in row) for row in self.rows],
            batch_size,
            seed=seed,
            num_replicas=num_replicas,
            rank=rank,
            group_by_length=group_by_length,
        )

    def _training_batches(self) -> list[list[Any]]:
        stands_for = self._exchanged()
        rows = [[stands_for[index] for index in row] for row in self.rows]
        return [[rows[number] for number in batch] for batch in super()._training_batches()]

    def _exchanged(self) -> list[int]:
        """For each sample the one of its length that takes its place in this epoch."""
        members: dict[int, list[int]] = {}
        for index, length in enumerate(self.sample_lengths):
            members.setdefault(length, []).append(index)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        exchanged = list(range(len(self.sample_lengths)))
        for indices in members.values():
            for index, other in zip(indices, torch.randperm(len(indices), generator=generator).tolist(), strict=True):
                exchanged[index] = indices[other]
        return exchanged


class PackingCollator(Collator):
    """Puts the samples of each row behind one another and pads rows on the right to a batch.

    Beside what :class:`~datamodules.encoding.Collator` makes, the batch has ``position_ids`` ``[batch, tokens]``, which
    begin at 0 with each sample and with the padding. A sample's first token is not supervised, since what stands before
    it is another sample. ``samples`` lists the samples of all rows.

    Args:
        pad_token_id: As in :class:`~datamodules.encoding.Collator`.
        cutoff_len: Likewise, of a row.
        share_rows: Samples that are drawn one by one share rows of up to ``cutoff_len`` in place of a row for each: the
            batch is of the same samples, and hardly any of it is padding.
    """

    def __init__(self, pad_token_id: int, cutoff_len: int, share_rows: bool = False) -> None:
        super().__init__(pad_token_id, cutoff_len)
        self.share_rows = share_rows

    def supervised(self, encoded: Sequence[list[EncodedSample] | EncodedSample]) -> Counted:
        """The supervised tokens of rows, or of single samples."""
        return super().supervised([item for row in encoded for item in (row if isinstance(row, list) else [row])])

    def __call__(self, encoded: Sequence[list[EncodedSample] | EncodedSample]) -> dict[str, Any]:
        """Make the batch of rows, or of single samples."""
        rows = [row if isinstance(row, list) else [row] for row in encoded]
        if self.share_rows:
            singles = [item for row in rows for item in row]
            lengths = [len(item.input_ids) for item in singles]
            rows = [[singles[index] for index in row] for row in share_rows(lengths, self.cutoff_len)]
        batch = super().__call__([_joined(row) for row in rows])
        position_ids = torch.zeros_like(batch["input_ids"])
        for number, row in enumerate(rows):
            lengths = [len(item.input_ids) for item in row]
            padding = position_ids.shape[1] - sum(lengths)
            position_ids[number] = torch.cat([torch.arange(length) for length in [*lengths, padding]])
        return batch | {"position_ids": position_ids, "samples": [item.sample for row in rows for item in row]}


def _joined(row: list[EncodedSample]) -> EncodedSample:
    labels = torch.cat([item.labels for item in row])
    starts = torch.tensor([0, *(len(item.labels) for item in row[:-1])]).cumsum(0)
    labels[starts] = IGNORE
    return EncodedSample(row[0].sample, torch.cat([item.input_ids for item in row]), labels)

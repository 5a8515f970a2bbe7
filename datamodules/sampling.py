"""Batches of samples of like length and of one kind, so that little of a batch is padding."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from datamodules.steps import StepPlan

MEGA_BATCH = 50
"""Global batches that are sorted by length together, as in Hugging Face's group-by-length sampler."""


class LengthGroupedSampler(DistributedSampler):
    """Yields whole batches (lists of indices) of samples of like length, each rank its own share.

    Use it as ``DataLoader(dataset, sampler=sampler, batch_size=None)`` over a data set whose ``__getitem__`` takes the
    list. It is a DistributedSampler, so Lightning leaves it alone under DDP and tells it the epoch.

    Training (``shuffle=True``): the order is a function of the seed and the epoch alone. Samples are shuffled, every
    50 global batches are sorted by length and cut, and the batches are shuffled again. A global batch
    (``num_replicas * batch_size`` samples) is the same set on any number of ranks, so a run on four devices follows one
    on a single device with batches four times as large. Each rank gets ``ceil(samples / global batch)`` full batches:
    the last one is filled up with the first samples of the shuffle, which are seen twice in that epoch.

    With ``groups``, all of that holds group by group, and a global batch is of one group: every rank has images, or
    none has, as in LLaVA's ``group_by_modality_length`` (there the last batches of both kinds are mixed; here each is
    filled up). The batches of all groups are shuffled together.

    Evaluation (``shuffle=False``): longest first, so that the largest batch fails first, dealt out to the ranks in
    turn. No sample is repeated, so batches are uneven; yet the number of batches is the same on every rank, as sharded
    models need, unless there are fewer samples than places for them to go. Groups follow one another, the one with the
    longest sample first.

    Args:
        lengths: The length of each sample, in tokens.
        batch_size: Samples in a batch on one rank; or a number for each group, by its name.
        shuffle: Training order rather than evaluation order.
        seed: Seed of the training order.
        num_replicas: Ranks that share the data; from ``torch.distributed`` if None, 1 where it is not initialised.
        rank: Which of them this is; likewise.
        groups: The group of each sample, such as whether it has images; None if they are all of one.
        group_by_length: Sort training samples by length; False for batches of any lengths, to compare with.
        count_epochs: Add ``epoch * samples`` to each index of training, for a data set that gives a sample another
            face in each epoch: ``divmod(index, samples)`` is the epoch and the sample, in any process.

    Raises:
        ValueError: There are no samples, not as many groups as lengths, or ``batch_size`` is not positive or names
            other groups.

    Example::

        >>> sampler = LengthGroupedSampler([3, 9, 4, 8], batch_size=2, shuffle=False)
        >>> list(sampler)
        [[1, 3], [2, 0]]
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int | Mapping[Hashable, int],
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        groups: Sequence[Hashable] | None = None,
        group_by_length: bool = True,
        count_epochs: bool = False,
    ) -> None:
        if len(lengths) == 0:
            raise ValueError("there are no samples to draw batches from")
        for size in batch_size.values() if isinstance(batch_size, Mapping) else [batch_size]:
            if size < 1:
                raise ValueError(f"batch_size must be at least 1, found {size}")
        if groups is not None and len(groups) != len(lengths):
            raise ValueError(f"expected one group for each of {len(lengths)} samples, found {len(groups)}")
        in_group = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size() if in_group else 1
        if rank is None:
            rank = torch.distributed.get_rank() if in_group else 0
        # of the data set it only wants to know the length
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.count_epochs = count_epochs
        self._groups = self._by_longest(groups)
        if isinstance(batch_size, Mapping) and (unknown := self._groups.keys() - batch_size.keys()):
            raise ValueError(f"batch_size: no number for {min(map(str, unknown))}, found {dict(batch_size)}")
        self.skip_batches = 0
        """Batches of this epoch that were seen before a restart; iteration leaves them out until the epoch changes."""
        self.epoch_offset = 0
        """Added to the epochs that the trainer names, where a restart made it count one twice."""
        self.plan: StepPlan | None = None
        """How training batches come together to optimizer steps; with it each batch knows its step."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; a new epoch begins at its first batch."""
        epoch += self.epoch_offset
        if epoch != self.epoch:
            self.skip_batches = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        """The batches of this rank; with a :attr:`plan`, those of training as ``StepIndices``.

        They are made here and not at the first ``next``, so the epoch is that of this moment whether or not the loader
        prefetches. Nothing changes: a loader with workers calls this twice for one pass.
        """
        if not self.shuffle:
            return iter(self._evaluation_batches()[self.skip_batches :])
        batches = self._training_batches()
        if self.plan is None:
            return iter([batch[self.rank :: self.num_replicas] for batch in batches[self.skip_batches :]])
        epoch = self.epoch - self.epoch_offset  # as the trainer counts
        return self.plan.batches(batches, self.skip_batches, epoch, self.rank, self.num_replicas)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch, whatever is skipped."""
        if self.shuffle:
            return sum(map(self._global_batches, self._groups))
        return len(self._evaluation_batches())

    def _training_batches(self) -> list[list[Any]]:
        """Global batches, of all ranks; each rank takes every ``num_replicas``-th sample of each."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        global_batches = [batch for name in self._groups for batch in self._shuffled(name, generator)]
        offset = self.epoch * len(self.lengths) if self.count_epochs else 0
        # dealt out in turn, so that each rank gets as many long ones as the others
        return [
            (global_batches[place] + offset).tolist()
            for place in torch.randperm(len(global_batches), generator=generator).tolist()
        ]

    def _shuffled(self, name: Hashable, generator: torch.Generator) -> Sequence[torch.Tensor]:
        """Global batches of one group, each ``[samples]``."""
        group = self._groups[name]
        global_batch = self.num_replicas * self._batch_size(name)
        order = group[torch.randperm(len(group), generator=generator)]
        # repeated as often as needed: there may be fewer samples than one global batch holds
        places = self._global_batches(name) * global_batch
        filled = order.repeat(-(-places // len(order)))[:places]
        if self.group_by_length:
            filled = torch.cat([self._longest_first(mega) for mega in filled.split(MEGA_BATCH * global_batch)])
        return filled.view(-1, global_batch).unbind()

    def _batch_size(self, name: Hashable) -> int:
        return self.batch_size[name] if isinstance(self.batch_size, Mapping) else self.batch_size

    def _global_batches(self, name: Hashable) -> int:
        return -(-len(self._groups[name]) // (self.num_replicas * self._batch_size(name)))

    def _evaluation_batches(self) -> list[list[int]]:
        return [batch for name in self._groups for batch in self._dealt_out(name)]

    def _dealt_out(self, name: Hashable) -> list[list[int]]:
        """This rank's evaluation batches of one group."""
        order = self._longest_first(self._groups[name])
        largest_share = -(-len(order) // self.num_replicas)
        count = -(-largest_share // self._batch_size(name))
        share = order[self.rank :: self.num_replicas]
        return [batch.tolist() for batch in share.tensor_split(count) if len(batch)]

    def _by_longest(self, groups: Sequence[Hashable] | None) -> dict[Hashable, torch.Tensor]:
        """The samples of each group, the group with the longest sample first."""
        members: dict[Hashable, list[int]] = {}
        for index in self._longest_first(torch.arange(len(self.lengths))).tolist():
            members.setdefault(None if groups is None else groups[index], []).append(index)
        return {name: torch.tensor(sorted(indices)) for name, indices in members.items()}

    def _longest_first(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[self.lengths[indices].argsort(descending=True, stable=True)]

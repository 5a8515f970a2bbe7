"""Optimizer steps: what a training batch must know of the other batches that are in the same step."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import Dataset

from dora_lightning.data import OptimizerStep

Counted: TypeAlias = tuple[str, int]
"""What a loss is a mean over (``tokens``, ``rows``, ``pairs``), and how many of them there are."""


class StepIndices(list[Any]):
    """The indices of a batch, together with the step that the batch is a part of."""

    def __init__(self, indices: Sequence[Any], step: OptimizerStep) -> None:
        super().__init__(indices)
        self.step = step


class StepPlan(NamedTuple):
    """How the batches of an epoch come together to optimizer steps."""

    count: Callable[[list[Any]], Counted]
    """What the loss of samples, given by their indices, is a mean over, and how many of these there are."""

    accumulated: Callable[[int], int]
    """Micro-batches of one step in an epoch of the trainer's."""

    limit: int
    """Batches of an epoch that are trained on: the trainer makes a step with the last of them."""

    def batches(
        self, global_batches: Sequence[list[Any]], first: int, epoch: int, rank: int, replicas: int
    ) -> Iterator[StepIndices]:
        """The batches of one rank from number ``first`` on. A step's samples are counted when its first batch is drawn.

        Where a run goes on within a step, whose first gradients are lost, the step counts what is left of it. A step of
        batches whose losses are means over different things has each of these means in proportion to its batches.
        """
        size = self.accumulated(epoch)
        if first % size and first < self.limit:
            rank_zero_warn(
                f"resuming within an optimizer step: the gradients of its first {first % size} batches of {size} are "
                "lost, and its loss is the mean over the rest"
            )
        counts: dict[int, Counted] = {}
        totals: Counter[str] = Counter()
        batches: Counter[str] = Counter()
        for place in range(first, len(global_batches)):
            end = place - place % size + size
            if place < self.limit:
                end = min(end, self.limit)
            if place in (first, self.limit) or place % size == 0:
                counts = {n: self.count(global_batches[n]) for n in range(place, min(end, len(global_batches)))}
                totals, batches = Counter(), Counter()
                for unit, count in counts.values():
                    totals[unit] += count
                    batches[unit] += 1
            own = global_batches[place][rank::replicas]
            unit, _ = counts[place]
            supervised = totals[unit] * len(counts) / batches[unit]
            yield StepIndices(own, OptimizerStep(supervised, self.count(own)[1], size, replicas, place + 1 == end))


def plan_steps(trainer: Trainer | None, count: Callable[[list[Any]], Counted], batches: int) -> StepPlan:
    """How a trainer makes steps of the batches of an epoch.

    Args:
        trainer: the trainer; without one, each batch is a step.
        count: see :class:`StepPlan`.
        batches: of a whole epoch.
    """
    if trainer is None:
        return StepPlan(count, lambda epoch: 1, batches)
    limit = trainer.limit_train_batches
    limit = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return StepPlan(count, callback.get_accumulate_grad_batches, limit)
    accumulated = trainer.accumulate_grad_batches
    return StepPlan(count, lambda epoch: accumulated, limit)


class StepDataset(Dataset):
    """A data set that hands on, with the samples of a batch, the step that the batch is a part of."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, indices: Any) -> tuple[list[Any], OptimizerStep | None]:
        """The samples of one batch, and its step; None where Lightning draws the indices (``overfit_batches``)."""
        step = indices.step if isinstance(indices, StepIndices) else None
        return self.dataset[indices], step


class StepCollator:
    """Makes a batch of what :class:`StepDataset` gives: that of another collator, with the step as ``step``."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, drawn: tuple[list[Any], OptimizerStep | None]) -> dict[str, Any]:
        """Make the batch."""
        samples, step = drawn
        batch = self.collator(samples)
        return batch if step is None else batch | {"step": step}

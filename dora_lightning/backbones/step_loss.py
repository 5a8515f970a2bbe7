"""The loss of an optimizer step: one mean over all that is supervised in it, on any number of batches and processes."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from dora_lightning.data import OptimizerStep

LossMean: TypeAlias = Literal["tokens", "batches"]
"""What the loss of an optimizer step is the mean over."""

_BATCHES = "or take the mean of the batches' means (model.init_args.loss_mean: batches)"


class StepLoss:
    """Turns the mean losses of batches into terms of one mean, and adds them up to the loss of the step.

    Args:
        mean: ``tokens``, or ``batches`` for the mean of the batches' means.

    Raises:
        ValueError: ``mean`` is neither.
    """

    def __init__(self, mean: LossMean) -> None:
        if mean not in get_args(LossMean):
            raise ValueError(f"loss_mean must be one of {', '.join(get_args(LossMean))}, found {mean!r}")
        self.mean = mean
        self._sum: Tensor | float = 0.0
        self._said = False

    def start(self, trainer: Trainer) -> None:
        """Forget a step that was not finished; to be called when training starts.

        A run that goes on within an epoch misses the hook in which ``GradientAccumulationScheduler`` sets that epoch's
        number (lightning 2.6, ``FitLoop.on_advance_start``).
        """
        self._sum = 0.0
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        for callback in callbacks:
            if isinstance(callback, GradientAccumulationScheduler):
                trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)

    def term(
        self, loss: Tensor, count: int, step: OptimizerStep | None, trainer: Trainer
    ) -> tuple[Tensor, Tensor | None]:
        """What a batch contributes, and what its step has come to.

        Args:
            loss: the mean loss of the batch.
            count: what it is the mean over: so many tokens, pairs or rows.
            step: the step that the batch is a part of; None if the batch does not say.
            trainer: divides losses by its number of accumulated batches, and averages gradients over processes.

        Returns:
            The loss to differentiate; and the loss of the step on this process, whose mean over processes is that of
            the step: None within a step, that of the batch where it does not know its step.

        Raises:
            ValueError: the step was counted in another way than it is made.
        """
        if self.mean == "batches" or step is None:
            self._say(trainer)
            return loss, loss.detach()
        if trainer.accumulate_grad_batches != step.batches:
            raise ValueError(
                f"the training batches were drawn for steps of {step.batches}, and trainer.accumulate_grad_batches is "
                f"{trainer.accumulate_grad_batches}: give the trainer the data module rather than its loader, change "
                f"the number by GradientAccumulationScheduler alone, {_BATCHES}"
            )
        if count != step.own:
            raise ValueError(
                f"the loss of a batch is the mean over {count}, and the collator's supervised() said {step.own} "
                f"beforehand: let it count what the loss counts, {_BATCHES}"
            )
        term = loss * step.share
        total = self._sum + term.detach() / step.batches
        self._sum = 0.0 if step.ends else total
        return term, total if step.ends else None

    def _say(self, trainer: Trainer) -> None:
        several = trainer.accumulate_grad_batches > 1 or trainer.world_size > 1
        if several and self.mean == "tokens" and not self._said:
            rank_zero_info(
                "The training batches do not know what is supervised in their whole optimizer step (entry 'step', "
                "dora_lightning.data.OptimizerStep): the loss of a step is the mean of its batches' means"
            )
        self._said = True

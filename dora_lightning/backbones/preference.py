"""Direct preference optimisation with adapters, whose base model is the reference: no second model is held."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from dora_lightning.adapters import AdapterConfig, adapters_disabled
from dora_lightning.backbones.causal_lm import sequence_log_likelihoods
from dora_lightning.backbones.llama import DoRALlama
from dora_lightning.backbones.step_loss import LossMean
from dora_lightning.messages import check_real
from dora_lightning.task import Task

PAIR_MEASURES = ("margin", "accuracy", "reward_chosen", "reward_rejected")
"""What is logged beside the loss."""


class PairScores(NamedTuple):
    """What the model and the reference say of pairs of answers; each ``[pairs]``."""

    chosen: Tensor
    """Reward of the preferred answers, ``beta * (log p - log p_reference)``."""
    rejected: Tensor
    """Reward of the rejected ones."""

    @property
    def margin(self) -> Tensor:
        """By how much the preferred answer is rewarded more."""
        return self.chosen - self.rejected


def dpo_loss(scores: PairScores) -> Tensor:
    """``-log sigmoid(margin)``, the mean over pairs (Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(scores.margin).mean()


class DoRALlamaDPO(DoRALlama):
    """A causal language model whose adapters learn to prefer one answer over another.

    The reference is the same model with its adapters switched off, so it costs a forward pass without gradients and no
    memory. It is what the adapters started from: to go on from a fine-tuned model, merge that one first.

    Batches are dicts with ``input_ids``, ``attention_mask``, ``labels`` ``[2 * pairs, tokens]``, the preferred answers
    in the first half and the rejected ones in the second, and ``samples``, one per pair; labels are ``IGNORE`` on the
    prompt, which both share.

    Beside the loss, training and validation log ``margin`` (mean reward of the preferred answer above the rejected
    one's), ``accuracy`` (share of pairs whose margin is above 0), and the mean rewards ``reward_chosen`` and
    ``reward_rejected``; in training these are of the last batch of the first process.

    Args:
        model_name_or_path: as in :class:`~dora_lightning.backbones.DoRALlama`.
        adapter: likewise; ``method: full`` is refused, since nothing of the reference would be left.
        optimizer: as in :class:`~dora_lightning.backbones.DoRALlama`.
        lr_scheduler: likewise.
        task: likewise.
        judge_in_validation: likewise.
        dtype: likewise.
        attn_implementation: likewise.
        gradient_checkpointing: likewise.
        meta_device: likewise.
        quantization: likewise.
        beta: how dear it is to part from the reference; 0.1 is usual.
        loss_mean: as in :class:`~dora_lightning.backbones.DoRALlama`; here the mean is over pairs.
        on_nonfinite: before an optimizer step whose loss or gradient is NaN or infinite, ``raise`` stops the run and
            names the batch, ``skip`` leaves the step out and warns, ``ignore`` does not look.

    Raises:
        ValueError: beta is not positive, or the adapter leaves no reference.
    """

    def __init__(
        self,
        model_name_or_path: str,
        adapter: AdapterConfig,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        task: Task | None = None,
        judge_in_validation: bool = False,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        meta_device: bool = False,
        quantization: str | None = None,
        beta: float = 0.1,
        loss_mean: LossMean = "tokens",
        on_nonfinite: str = "raise",
    ) -> None:
        super().__init__(
            model_name_or_path,
            adapter,
            optimizer,
            lr_scheduler,
            task,
            judge_in_validation,
            dtype,
            attn_implementation,
            gradient_checkpointing,
            meta_device,
            quantization,
            loss_mean,
            on_nonfinite,
        )
        check_real(above=0, beta=beta)
        if self.adapter.method == "full":
            raise ValueError(
                "method: full trains the reference away; preference tuning needs adapters that can be switched off"
            )
        self.beta = beta
        self.save_hyperparameters({"beta": beta})
        self.held_out: Any = torch.nn.ModuleDict({name: MeanMetric(nan_strategy=math.nan) for name in PAIR_MEASURES})

    def scores(self, batch: dict[str, Any]) -> PairScores:
        """Rewards of both answers of each pair.

        Raises:
            ValueError: the batch holds no pairs.
        """
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        pairs = len(batch["samples"])
        if len(ids) != 2 * pairs:
            raise ValueError(
                f"expected two sequences for each of {pairs} samples, the preferred and the rejected answer, found "
                f"{len(ids)}; use a data module of pairs, such as PreferenceDataModule"
            )
        model = self.language_model
        # before the model's own pass: what that keeps for the backward pass is then not there yet
        with torch.no_grad(), adapters_disabled(model):
            reference = sequence_log_likelihoods(model, ids, mask, labels)
        rewards = self.beta * (sequence_log_likelihoods(model, ids, mask, labels) - reference)
        return PairScores(*rewards.chunk(2))

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Mean loss over pairs, and how many pairs there are."""
        scores = self.scores(batch)
        self._log_pairs(scores)
        return dpo_loss(scores), len(batch["samples"])

    def held_out_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Margin, accuracy and rewards over the validation pairs; the loss is no likelihood of text."""
        return {name: metric.compute() for name, metric in self.held_out.items()}

    def on_validation_epoch_start(self) -> None:
        """Start the metrics anew."""
        super().on_validation_epoch_start()
        for metric in self.held_out.values():
            metric.reset()

    def _log_pairs(self, scores: PairScores) -> None:
        measures = _measures(scores)
        if self.training:
            if self._trainer is not None:
                self.log_dict(
                    {f"train/{name}": values.mean() for name, values in measures.items()},
                    batch_size=len(scores.margin),
                )
            return
        for name, values in measures.items():
            self.held_out[name].update(values)


def _measures(scores: PairScores) -> dict[str, Tensor]:
    """The values ``[pairs]`` of each of :data:`PAIR_MEASURES`."""
    margin = scores.margin.detach()
    values = (margin, (margin > 0).float(), scores.chosen.detach(), scores.rejected.detach())
    return dict(zip(PAIR_MEASURES, values, strict=True))

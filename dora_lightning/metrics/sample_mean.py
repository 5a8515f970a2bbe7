"""What metrics share that are the mean of one score per sample."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """Mean of a score per sample over all processes, however many samples each saw; nan where none saw any.

    A subclass scores its input in ``update`` and hands the scores to ``_add``; ``scored_by`` names how it scores.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    total: Tensor
    samples: Tensor

    def __init__(self, scored_by: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # in float32 a long sum of scores would drift
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        # a MetricCollection lets metrics whose states are the same after the first batch share them from then on; two
        # that score by different rules may be equal there and differ later, so their states are told apart by a name
        self.add_state(f"scored_by_{scored_by}", default=torch.zeros(()), dist_reduce_fx="sum")

    def _add(self, scores: Tensor) -> None:
        self.total += scores.to(self.total).sum()
        self.samples += len(scores)

    def compute(self) -> Tensor:
        """Mean score of all samples."""
        return (self.total / self.samples).float()


def check_lengths(predictions: Sized, references: Sized) -> None:
    """Raises ValueError unless there is one reference per prediction."""
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions for {len(references)} references")

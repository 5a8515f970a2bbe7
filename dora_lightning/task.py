"""What a recipe asks of a backbone, and how answers are judged: the contract that ``tasks/`` fill in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from torch import Tensor, nn

from dora_lightning.data import Sample


class Task(nn.Module):
    """Says how an answer is obtained, reads it out of the text, and keeps the metrics.

    A backbone calls :meth:`update` for each batch, and at the end of the epoch :meth:`compute`, :meth:`records` and
    :meth:`reset`. A task is an ``nn.Module`` so that its metrics move to the device with the model.
    """

    generation: dict[str, Any] | None = None
    """Arguments of ``generate`` (``num_beams``, ``max_new_tokens``, ...), or None if no text is to be generated."""

    ranks_options: bool = False
    """Whether the options of each sample are to be ranked by log-likelihood."""

    def judge_of(self, samples: Sequence[Sample]) -> Task:
        """The task whose :attr:`generation` and :attr:`ranks_options` are those of a batch: here, itself.

        Args:
            samples: a batch; evaluation batches hold samples of one kind.
        """
        return self

    def update(
        self, samples: Sequence[Sample], texts: Sequence[str] | None = None, scores: Sequence[Tensor] | None = None
    ) -> None:
        """Judge a batch.

        Args:
            samples: what was asked.
            texts: one generated text per sample (the continuation alone), if :attr:`generation` is set.
            scores: log-likelihoods ``[options]`` of each sample's options, if :attr:`ranks_options`.
        """
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """Metric name -> value over all samples since :meth:`reset`, synchronised over processes."""
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """One row per sample judged in this process: what was read and what the model answered."""
        raise NotImplementedError

    def files(self, records: list[dict[str, Any]]) -> dict[str, bytes]:
        """Files to write beside the predictions at the end of a test, name -> content.

        Args:
            records: rows of :meth:`records`, of all processes.
        """
        return {}

    def table(self, metrics: dict[str, Tensor]) -> RenderableType:
        """The metrics of :meth:`compute` as something to print."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget what was judged."""
        raise NotImplementedError

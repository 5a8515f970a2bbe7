"""What a recipe asks of a backbone, and how answers are judged: the contract that ``tasks/`` fill in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from torch import Tensor, nn

from dora_lightning.data import Sample


class Task(nn.Module):
    """Says how an answer is obtained, reads it out of the text, and keeps the metrics.

    A backbone calls, for each batch, :meth:`update_generated` if :attr:`generation` is set and :meth:`update_ranked` if
    :attr:`ranks_options`; at the end of the epoch :meth:`compute`, :meth:`records` and :meth:`reset`. A task is an
    ``nn.Module`` so that its metrics move to the device with the model.
    """

    generation: dict[str, Any] | None = None
    """Arguments of ``generate`` (``num_beams``, ``max_new_tokens``, ...), or None if no text is to be generated."""

    ranks_options: bool = False
    """Whether the options of each sample are to be ranked by log-likelihood."""

    def update_generated(self, samples: Sequence[Sample], texts: Sequence[str]) -> None:
        """Judge one generated text per sample (the continuation alone, without the prompt)."""
        raise NotImplementedError

    def update_ranked(self, samples: Sequence[Sample], scores: Sequence[Tensor]) -> None:
        """Judge the log-likelihoods ``[options]`` of each sample's options."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """Metric name -> value over all samples since :meth:`reset`, synchronised over processes."""
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """One row per sample judged in this process: what was read and what the model answered."""
        raise NotImplementedError

    def table(self, metrics: dict[str, Tensor]) -> RenderableType:
        """The metrics of :meth:`compute` as something to print."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget what was judged."""
        raise NotImplementedError

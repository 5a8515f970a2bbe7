"""The base of tasks that judge each generated text on its own, by measures between 0 and 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Tensor, nn

from dora_lightning.data import Sample
from dora_lightning.metrics import PerSourceMean
from dora_lightning.task import Task
from tasks.tables import data_set_table


class WrittenAnswers(Task):
    """Means of some measures per data set, and their unweighted mean over data sets.

    A subclass sets :attr:`measures`, :attr:`title` and :attr:`generation`, and implements :meth:`judge`.
    """

    measures: ClassVar[tuple[str, ...]]
    """Names of the measures, in the order of the table."""
    title: ClassVar[str]
    """Heading of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.ModuleDict({name: PerSourceMean() for name in self.measures})
        self._records: list[dict[str, Any]] = []

    def judge(self, text: str, sample: Sample) -> tuple[dict[str, float], dict[str, Any]]:
        """Each measure of one text, and what is written beside it."""
        raise NotImplementedError

    def update(
        self, samples: Sequence[Sample], texts: Sequence[str] | None = None, scores: Sequence[Tensor] | None = None
    ) -> None:
        """Judge each text.

        Raises:
            ValueError: there are no texts, or a sample has no reference to judge its text by.
        """
        if texts is None:
            raise ValueError(f"{type(self).__name__} judges texts, and none were generated")
        if any(not sample.references for sample in samples):
            raise ValueError(f"{type(self).__name__} compares with a reference, and a sample has none")
        judged = [self.judge(text, sample) for text, sample in zip(texts, samples, strict=True)]
        sources = [sample.source for sample in samples]
        for name, mean in self.means.items():
            mean.update(torch.tensor([float(values[name]) for values, _ in judged]), sources)
        for sample, text, (values, beside) in zip(samples, texts, judged, strict=True):
            row = sample.row or {"prompt": sample.prompt}
            self._records.append({"source": sample.source, **row, "output_pred": text, **beside, **values})

    def compute(self) -> dict[str, Tensor]:
        """``<source>/<measure>`` and ``mean/<measure>``, each in [0, 1]; ``mean`` weighs data sets alike."""
        results: dict[str, Tensor] = {}
        for name, mean in self.means.items():
            per_source = mean.compute()
            results |= {f"{source}/{name}": value for source, value in per_source.items()}
            if per_source:
                results[f"mean/{name}"] = torch.stack(list(per_source.values())).mean()
        return results

    def records(self) -> list[dict[str, Any]]:
        """The rows judged in this process, with ``output_pred`` and the measures."""
        return self._records

    def table(self, metrics: dict[str, Tensor]) -> Table:
        """Data sets in rows, measures in columns, in per cent."""
        return data_set_table(f"{self.title} (%)", {name: name for name in self.measures}, metrics)

    def reset(self) -> None:
        """Forget what was judged."""
        for mean in self.means.values():
            mean.reset()
        self._records = []

"""Mean of a value per data set, when samples of several data sets come mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.sample_rows import NO_NAMES, SampleRows, decode_names, encode_names


def per_source_mean(values: Tensor, sources: Sequence[str]) -> dict[str, Tensor]:
    """Mean of ``values [samples]`` over the samples of each source, in order of name.

    >>> per_source_mean(torch.tensor([1.0, 0.0, 1.0]), ["b", "b", "a"])
    {'a': tensor(1.), 'b': tensor(0.5000)}
    """
    members: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        members.setdefault(source, []).append(index)
    return {source: values[members[source]].mean() for source in sorted(members)}


class PerSourceMean(SampleRows):
    """Mean of a value per source, right when processes see different sources and different numbers of samples.

    ``update`` takes ``values [samples]`` and as many source names; ``compute`` returns source -> mean.

    >>> metric = PerSourceMean()
    >>> metric.update(torch.tensor([1.0, 0.0]), ["boolq", "boolq"])
    >>> metric.update(torch.tensor([1.0]), ["piqa"])
    >>> metric.compute()
    {'boolq': tensor(0.5000), 'piqa': tensor(1.)}
    """

    values: list[Tensor]
    names: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_rows("values", torch.zeros(0))
        self._add_rows("names", NO_NAMES)

    def update(self, values: Tensor, sources: Sequence[str]) -> None:
        """Add one value per sample.

        Raises:
            ValueError: the numbers of values and sources differ, or a name is longer than 64 bytes.
        """
        if len(values) != len(sources):
            raise ValueError(f"got {len(values)} values for {len(sources)} sources")
        names = encode_names(sources)
        self._append("values", values)
        self._append("names", names)

    def compute(self) -> dict[str, Tensor]:
        """Mean per source."""
        return per_source_mean(self._rows("values"), decode_names(self._rows("names")))

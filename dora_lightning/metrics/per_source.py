"""Mean of a value per data set, when samples of several data sets come mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_NAME_BYTES = 64


def per_source_mean(values: Tensor, sources: Sequence[str]) -> dict[str, Tensor]:
    """Mean of ``values [samples]`` over the samples of each source, in order of name.

    >>> per_source_mean(torch.tensor([1.0, 0.0, 1.0]), ["b", "b", "a"])
    {'a': tensor(1.), 'b': tensor(0.5000)}
    """
    members: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        members.setdefault(source, []).append(index)
    return {source: values[members[source]].mean() for source in sorted(members)}


class PerSourceMean(Metric):
    """Mean of a value per source, right when processes see different sources and different numbers of samples.

    ``update`` takes ``values [samples]`` and as many source names; ``compute`` returns source -> mean.

    >>> metric = PerSourceMean()
    >>> metric.update(torch.tensor([1.0, 0.0]), ["boolq", "boolq"])
    >>> metric.update(torch.tensor([1.0]), ["piqa"])
    >>> metric.compute()
    {'boolq': tensor(0.5000), 'piqa': tensor(1.)}
    """

    full_state_update = False
    values: list[Tensor]
    names: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")
        # names travel between processes as bytes, so that no process need know them all beforehand
        self.add_state("names", default=[], dist_reduce_fx="cat")
        self._begin()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._begin()

    def _begin(self) -> None:
        # a process that sees no sample must have something to exchange, or the others would wait for it
        self.values.append(torch.zeros(0, device=self.device))
        self.names.append(torch.zeros(0, _NAME_BYTES, dtype=torch.uint8, device=self.device))

    def update(self, values: Tensor, sources: Sequence[str]) -> None:
        """Add one value per sample.

        Raises:
            ValueError: the numbers of values and sources differ, or a name is longer than 64 bytes.
        """
        if len(values) != len(sources):
            raise ValueError(f"got {len(values)} values for {len(sources)} sources")
        self.values.append(values.to(self.device, torch.float32))
        self.names.append(torch.stack([_to_bytes(source) for source in sources]).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """Mean per source."""
        names = [_from_bytes(name) for name in dim_zero_cat(self.names)]
        return per_source_mean(dim_zero_cat(self.values), names)


def _to_bytes(name: str) -> Tensor:
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES:
        raise ValueError(f"a source name may take {_NAME_BYTES} bytes at most, got {name!r}")
    return torch.tensor(list(encoded.ljust(_NAME_BYTES, b"\0")), dtype=torch.uint8)


def _from_bytes(row: Tensor) -> str:
    return bytes(row.tolist()).rstrip(b"\0").decode()

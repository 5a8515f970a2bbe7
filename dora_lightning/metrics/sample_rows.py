"""What metrics share that need the samples of all processes together before anything can be averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_NAME_BYTES = 64


class SampleRows(Metric):
    """Keeps rows per sample and gathers them from all processes, however many samples each saw.

    A subclass declares its rows with ``_add_rows``, appends to them in ``update`` and reads them with ``_rows`` in
    ``compute``.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._empty: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        for name, empty in self._empty.items():
            getattr(self, name).append(empty.to(self.device))

    def _add_rows(self, name: str, empty: Tensor) -> None:
        self.add_state(name, default=[], dist_reduce_fx="cat")
        # a process that sees no sample must have something to exchange, or the others would wait for it
        self._empty[name] = empty
        getattr(self, name).append(empty)

    def _append(self, name: str, rows: Tensor) -> None:
        getattr(self, name).append(rows.to(self.device, self._empty[name].dtype))

    def _rows(self, name: str) -> Tensor:
        return dim_zero_cat(getattr(self, name))


# names travel between processes as bytes, so that no process need know them all beforehand
NO_NAMES = torch.zeros(0, _NAME_BYTES, dtype=torch.uint8)


def encode_names(names: Sequence[str]) -> Tensor:
    """Names as bytes, uint8 [names, 64]; raises ValueError for a name of more than 64 bytes."""
    return torch.stack([_to_bytes(name) for name in names]) if names else NO_NAMES


def decode_names(rows: Tensor) -> list[str]:
    """The inverse of :func:`encode_names`."""
    return [bytes(row).rstrip(b"\0").decode() for row in rows.tolist()]


def _to_bytes(name: str) -> Tensor:
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES:
        raise ValueError(f"a name may take {_NAME_BYTES} bytes at most, got {name!r}")
    return torch.tensor(list(encoded.ljust(_NAME_BYTES, b"\0")), dtype=torch.uint8)

"""What all processes judged, in one list."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

Row = TypeVar("Row")


def gather(rows: list[Row]) -> list[Row]:
    """The rows of all processes, in their order; to be called on every process.

    For scores that are no mean of what each process scored: a most frequent answer, a document frequency, a question
    that is asked several times.
    """
    if not torch.distributed.is_initialized():
        return rows
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, rows)
    return [row for part in gathered for row in part]

"""MMBench's accuracy: a question counts if it is answered right in every rotation of its options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROTATION = 1_000_000
"""Rotations of a question are rows whose indices differ by a multiple of this."""


def circular_accuracy(correct: Tensor, indices: Sequence[int]) -> Tensor:
    """1.0 where every rotation of a question is answered right, else 0.0: [groups], in order of ``index % 1_000_000``.

    ``correct [samples]`` is 1 (or True) where a row's answer is right, ``indices`` are the rows' numbers in MMBench's
    file. A question whose rotations are not all there counts with those that are. (CircularEval of Liu et al. 2023,
    MMBench.)

    Raises:
        ValueError: not one index per sample.

    >>> circular_accuracy(torch.tensor([1, 1, 1, 0]), [7, 1_000_007, 8, 1_000_008])
    tensor([1., 0.])
    """
    hits = _hits(correct, indices)
    return torch.tensor([hits[group] for group in sorted(hits)], dtype=torch.float32)


def _hits(correct: Tensor, indices: Sequence[int]) -> dict[int, bool]:
    if len(correct) != len(indices):
        raise ValueError(f"got {len(correct)} scores for {len(indices)} indices")
    hits: dict[int, bool] = {}
    for right, index in zip(correct.tolist(), indices, strict=True):
        group = int(index) % _ROTATION
        hits[group] = hits.get(group, True) and bool(right)
    return hits

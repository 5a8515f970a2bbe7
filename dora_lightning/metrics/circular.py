"""MMBench's accuracy: a question counts if it is answered right in every rotation of its options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.per_source import per_source_mean
from dora_lightning.metrics.sample_rows import NO_NAMES, SampleRows, decode_names, encode_names

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
    _check_indices(correct, indices)
    hits: dict[int, bool] = {}
    for right, index in zip(correct.tolist(), indices, strict=True):
        group = int(index) % _ROTATION
        hits[group] = hits.get(group, True) and bool(right)
    return torch.tensor([hits[group] for group in sorted(hits)], dtype=torch.float32)


class CircularAccuracy(SampleRows):
    """MMBench's circular accuracy over all questions, per category and per level-2 category.

    ``update`` takes ``correct [samples]``, as many indices and, if wanted, as many names of categories and level-2
    categories; the rotations of a question may be seen by different processes. ``compute`` returns ``accuracy``,
    ``category/<name>`` and ``l2_category/<name>``, each the mean of :func:`circular_accuracy` over its questions;
    nothing if nothing was seen. A question belongs to the categories of its first row, "" being none.

    Example:
        >>> metric = CircularAccuracy()
        >>> metric.update(torch.tensor([1, 1]), [7, 8], ["ocr", "celebrity"], ["perception", "perception"])
        >>> metric.update(torch.tensor([1, 0]), [1_000_007, 1_000_008], ["ocr", "celebrity"], ["perception"] * 2)
        >>> metric.compute()  # doctest: +NORMALIZE_WHITESPACE
        {'accuracy': tensor(0.5000), 'category/celebrity': tensor(0.), 'category/ocr': tensor(1.),
         'l2_category/perception': tensor(0.5000)}
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    correct: list[Tensor]
    indices: list[Tensor]
    category: list[Tensor]
    l2_category: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_rows("correct", torch.zeros(0, dtype=torch.uint8))
        self._add_rows("indices", torch.zeros(0, dtype=torch.long))
        self._add_rows("category", NO_NAMES)
        self._add_rows("l2_category", NO_NAMES)

    def update(
        self,
        correct: Tensor,
        indices: Sequence[int],
        categories: Sequence[str] | None = None,
        l2_categories: Sequence[str] | None = None,
    ) -> None:
        """Add rows.

        Raises:
            ValueError: not one index or not one name of each kind per sample, or a name longer than 64 bytes.
        """
        _check_indices(correct, indices)
        names = {"category": categories, "l2_category": l2_categories}
        encoded = {}
        for kind, given in names.items():
            if given is not None and len(given) != len(correct):
                raise ValueError(f"got {len(correct)} scores for {len(given)} names of the kind {kind}")
            encoded[kind] = encode_names([""] * len(correct) if given is None else given)
        self._append("correct", correct.bool())
        self._append("indices", torch.tensor([int(index) for index in indices], dtype=torch.long))
        for kind, rows in encoded.items():
            self._append(kind, rows)

    def compute(self) -> dict[str, Tensor]:
        """Mean over all questions and over those of each category."""
        correct, indices = self._rows("correct"), self._rows("indices").tolist()
        if not indices:
            return {}
        scores = circular_accuracy(correct, indices)
        results = {"accuracy": scores.mean()}
        # the row with the lowest index stands for its question; questions come in order of their number
        first = {index % _ROTATION: row for row, index in sorted(enumerate(indices), key=lambda item: -item[1])}
        rows = [first[group] for group in sorted(first)]
        for kind in ("category", "l2_category"):
            names = decode_names(self._rows(kind)[rows])
            means = per_source_mean(scores, names)
            results |= {f"{kind}/{name}": mean for name, mean in means.items() if name}
        return {name: value.to(self.device) for name, value in results.items()}


def _check_indices(correct: Tensor, indices: Sequence[int]) -> None:
    if len(correct) != len(indices):
        raise ValueError(f"got {len(correct)} scores for {len(indices)} indices")

"""Equality of an answer with the one right answer."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.sample_mean import SampleMean, check_lengths

_VARIANTS = ("gqa", "lmms_gqa")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(predictions: Sequence[str], references: Sequence[str], variant: str = "gqa") -> Tensor:
    """1.0 where a prediction is the one right answer, else 0.0: [samples].

    Variants:
        gqa: the prediction lower-cased without periods at its end, as LLaVA writes it for GQA's own ``eval.py``,
            which asks for equality.
        lmms_gqa: both lower-cased and without any punctuation, as lmms-eval compares them.

    Raises:
        ValueError: an unknown variant, not one answer per prediction, or an answer that is not a text.

    >>> exact_match(["Yes.", "yes!", "a yes"], ["yes", "yes", "yes"])
    tensor([1., 0., 0.])
    >>> exact_match(["Yes.", "yes!", "a yes"], ["yes", "yes", "yes"], variant="lmms_gqa")
    tensor([1., 1., 0.])
    """
    if variant not in _VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(_VARIANTS)}")
    check_lengths(predictions, references)
    for reference in references:
        if not isinstance(reference, str):
            raise ValueError(f"an exact match is with one answer, a text, got {reference!r}")
    if variant == "gqa":
        hits = [p.rstrip(".").lower() == r for p, r in zip(predictions, references, strict=True)]
    else:
        hits = [_letters(p) == _letters(r) for p, r in zip(predictions, references, strict=True)]
    return torch.tensor(hits, dtype=torch.float32)


class ExactMatch(SampleMean):
    """Share of answers that are the one right answer; the variants are those of :func:`exact_match`.

    ``update`` takes as many predictions as answers; ``compute`` returns a scalar in [0, 1], nan if nothing was seen.

    Example:
        >>> metric = ExactMatch()
        >>> metric.update(["Red.", "left"], ["red", "right"])
        >>> metric.compute()
        tensor(0.5000)
    """

    def __init__(self, variant: str = "gqa", **kwargs: Any) -> None:
        exact_match([], [], variant)  # an unknown variant is refused here, not after an epoch
        super().__init__(f"exact_match_{variant}", **kwargs)
        self.variant = variant

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Add answers; raises as :func:`exact_match`."""
        self._add(exact_match(predictions, references, self.variant))


def _letters(text: str) -> str:
    return text.lower().translate(_WITHOUT_PUNCTUATION)

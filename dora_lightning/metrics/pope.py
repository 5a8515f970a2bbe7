"""POPE: yes-or-no questions on whether an object is in an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dora_lightning.metrics.sample_mean import check_lengths

_NEGATIONS = frozenset(("No", "not", "no"))


def read_yes_no(text: str) -> str:
    """``no`` if the first sentence of ``text`` has a No, no or not, else ``yes``: POPE's own rule (Li et al. 2023).

    >>> read_yes_no("No, there is no dog."), read_yes_no("There is a dog. Not a cat.")
    ('no', 'yes')
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if _NEGATIONS.intersection(words) else "yes"


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, Tensor]:
    """Accuracy, precision, recall and F1 of ``yes``, and the share of predictions that are ``yes``: scalars.

    ``predictions`` are generated texts, read by :func:`read_yes_no`. A ratio of nothing is 0, of no samples nan.

    Raises:
        ValueError: not one label per prediction, or a label that is neither ``yes`` nor ``no``.

    >>> pope_scores(["Yes.", "yes", "No"], ["yes", "no", "no"])["f1"]
    tensor(0.6667)
    """
    return _scores(_read(predictions, labels))


def _read(predictions: Sequence[str], labels: Sequence[str]) -> Tensor:
    """Whether prediction and label are ``yes``: uint8 [samples, 2]."""
    check_lengths(predictions, labels)
    for label in labels:
        if label not in ("yes", "no"):
            raise ValueError(f"a label of POPE is 'yes' or 'no', got {label!r}")
    pairs = [(read_yes_no(p) == "yes", label == "yes") for p, label in zip(predictions, labels, strict=True)]
    return torch.tensor(pairs, dtype=torch.uint8).reshape(-1, 2)


def _scores(pairs: Tensor) -> dict[str, Tensor]:
    predicted, actual = pairs.bool().unbind(dim=1)
    hits = (predicted & actual).sum()
    # precision and recall of nothing are 0, as a division by at least 1 makes them
    precision = hits / predicted.sum().clamp(min=1)
    recall = hits / actual.sum().clamp(min=1)
    return {
        "accuracy": (predicted == actual).float().mean(),
        "precision": precision,
        "recall": recall,
        "f1": 2 * hits / (predicted.sum() + actual.sum()).clamp(min=1),
        "yes_ratio": predicted.float().mean(),
    }

"""POPE: yes-or-no questions on whether an object is in an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.sample_mean import check_lengths
from dora_lightning.metrics.sample_rows import NO_NAMES, SampleRows, decode_names, encode_names

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


class POPE(SampleRows):
    """POPE's scores in each of its splits, and the mean of their F1, by which models are compared.

    ``update`` takes generated texts, as many labels (``yes`` or ``no``) and as many names of splits, e.g. ``random``,
    ``popular`` and ``adversarial``. POPE's answer files carry no key of their own: the n-th line of a split's file is
    the label of the n-th question of that split, so texts and labels are joined by their order there. ``compute``
    returns ``<split>/accuracy``, ``precision``, ``recall``, ``f1`` and ``yes_ratio`` per split as :func:`pope_scores`,
    and ``f1``, the mean over the splits; nothing if nothing was seen.

    Example:
        >>> metric = POPE()
        >>> metric.update(["Yes", "No."], ["yes", "no"], ["random", "random"])
        >>> metric.update(["Yes", "Yes, it is."], ["yes", "no"], ["popular", "popular"])
        >>> scores = metric.compute()
        >>> scores["random/f1"], scores["popular/precision"], scores["popular/yes_ratio"], scores["f1"]
        (tensor(1.), tensor(0.5000), tensor(1.), tensor(0.8333))
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    pairs: list[Tensor]
    splits: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_rows("pairs", torch.zeros(0, 2, dtype=torch.uint8))
        self._add_rows("splits", NO_NAMES)

    def update(self, predictions: Sequence[str], labels: Sequence[str], splits: Sequence[str]) -> None:
        """Add answers.

        Raises:
            ValueError: as :func:`pope_scores`, or not one split per prediction, or a split's name longer than 64 bytes.
        """
        if len(splits) != len(predictions):
            raise ValueError(f"got {len(predictions)} predictions for {len(splits)} splits")
        pairs, names = _read(predictions, labels), encode_names(splits)
        self._append("pairs", pairs)
        self._append("splits", names)

    def compute(self) -> dict[str, Tensor]:
        """Scores per split and the mean F1."""
        members: dict[str, list[int]] = {}
        for index, split in enumerate(decode_names(self._rows("splits"))):
            members.setdefault(split, []).append(index)
        scores = {split: _scores(self._rows("pairs")[members[split]]) for split in sorted(members)}
        results = {f"{split}/{name}": value for split, named in scores.items() for name, value in named.items()}
        if scores:
            results["f1"] = torch.stack([named["f1"] for named in scores.values()]).mean()
        return results


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

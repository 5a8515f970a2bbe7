"""The record that every data set is turned into, and that every task judges."""

from typing import Any, NamedTuple

IGNORE = -100
"""Label of a position that is not supervised, as everywhere in torch and transformers."""


class Sample(NamedTuple):
    """One training or evaluation example, whatever data set it came from.

    A named tuple, so that Lightning carries it to the device inside a batch without copying what it holds.
    """

    prompt: str
    """Text the model reads, template included; generation starts right after its last character."""

    target: str
    """Text the model is trained to write after ``prompt``; appended to it without any separator."""

    options: tuple[str, ...] = ()
    """Texts that could stand in place of ``target``, for ranking by log-likelihood; empty if open-ended."""

    references: tuple[str, ...] = ()
    """Answers that count as right, as the task's extraction reads them out of a generated text."""

    images: tuple[Any, ...] = ()
    """Images the prompt refers to, in the order of its ``<image>`` placeholders; see :mod:`dora_lightning.images`."""

    source: str = ""
    """Name of the data set, e.g. ``boolq``; scores are reported per source."""

    row: dict[str, Any] | None = None
    """The row as it was read, written back beside the prediction."""

    answered: tuple[tuple[int, int], ...] = ()
    """Spans ``[start, end)`` of characters of ``prompt`` that the model is trained to write too: the earlier answers of
    a conversation."""

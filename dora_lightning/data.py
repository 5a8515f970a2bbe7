"""What recipes and backbones agree on: the record of a sample, and what a training batch knows of its step."""

from __future__ import annotations

from typing import Any, NamedTuple

IGNORE = -100
"""Label of a position that is not supervised, as everywhere in torch and transformers."""


class Sample:
    """One training or evaluation example, whatever data set it came from.

    A plain class, neither a tuple nor a dataclass: Lightning walks through those to convert and move tensors, copies
    what they hold, takes encoded images apart byte by byte, and refuses frozen dataclasses. A sample goes to the device
    as it is. Do not change one: several batches and stages share it.
    """

    __slots__ = ("answered", "images", "options", "prompt", "references", "row", "source", "target")

    prompt: str
    """Text the model reads, template included; generation starts right after its last character."""

    target: str
    """Text the model is trained to write after ``prompt``; appended to it without any separator."""

    options: tuple[str, ...]
    """Texts that could stand in place of ``target``, for ranking by log-likelihood; empty if open-ended."""

    references: tuple[str, ...]
    """Answers that count as right, as the task's extraction reads them out of a generated text."""

    images: tuple[Any, ...]
    """Images the prompt refers to, in the order of its ``<image>`` placeholders; see :mod:`dora_lightning.images`."""

    source: str
    """Name of the data set, e.g. ``boolq``; scores are reported per source."""

    row: dict[str, Any] | None
    """The row as it was read, written back beside the prediction."""

    answered: tuple[tuple[int, int], ...]
    """Spans ``[start, end)`` of characters of ``prompt`` that the model is trained to write too: the earlier answers of
    a conversation."""

    def __init__(
        self,
        prompt: str,
        target: str,
        options: tuple[str, ...] = (),
        references: tuple[str, ...] = (),
        images: tuple[Any, ...] = (),
        source: str = "",
        row: dict[str, Any] | None = None,
        answered: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.prompt = prompt
        self.target = target
        self.options = options
        self.references = references
        self.images = images
        self.source = source
        self.row = row
        self.answered = answered

    def _replace(self, **changes: Any) -> Sample:
        """A sample with other values in some fields, as of a named tuple."""
        return Sample(**(self._fields() | changes))

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal."""
        return isinstance(other, Sample) and self._fields() == other._fields()

    def __repr__(self) -> str:
        """The fields by name."""
        return f"Sample({', '.join(f'{name}={value!r}' for name, value in self._fields().items())})"


class OptimizerStep(NamedTuple):
    """What a training batch knows of the optimizer step that it is a part of; it stands in the batch as ``step``.

    With it the loss of the step is one mean over all that is supervised in it, on any number of micro-batches and
    processes, whose gradients are averaged as they are.
    """

    supervised: float
    """What the step's loss is the mean over: supervised tokens (pairs, rows) of all processes and micro-batches."""

    own: int
    """How many of them this batch has."""

    batches: int
    """Micro-batches that the trainer divides the loss by, ``accumulate_grad_batches``; an epoch's last step may have
    fewer."""

    replicas: int
    """Processes with batches of their own, over which gradients are averaged."""

    ends: bool
    """Whether the step is made with this batch."""

    @property
    def share(self) -> float:
        """What the mean loss of this batch is multiplied by: 1 where it has as much of the step as any other batch.

        >>> OptimizerStep(supervised=40, own=30, batches=2, replicas=1, ends=True).share
        1.5
        """
        return self.own * self.batches * self.replicas / max(1, self.supervised)

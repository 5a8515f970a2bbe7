"""Generated text is of numbers: the likeliest of NaN would be a token like any other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from dora_lightning.adapters.finite import NonFiniteError


class FiniteLogits(LogitsProcessor):
    """Watches the scores of each generated token, and waits for the device when all is generated.

    Args:
        prompts: what is answered, in words for the message; rows of a prompt's beams follow one another.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = prompts
        self._bad: Tensor | None = None  # [rows]
        self._rows = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores [rows, V]``, with zeros for what is no number: sampling from NaN ends the process on a GPU."""
        bad = ~(scores < math.inf)  # minus infinity is how a token is ruled out
        rows, self._rows = bad.any(dim=-1), len(scores)
        self._bad = rows if self._bad is None or len(self._bad) != len(rows) else self._bad | rows
        return scores.masked_fill(bad, 0.0)

    def added_to(self, options: dict[str, Any]) -> dict[str, Any]:
        """``options`` of ``generate`` of transformers, with this before their own processors."""
        return options | {"logits_processor": LogitsProcessorList([self, *options.get("logits_processor", ())])}

    def check(self) -> None:
        """To be called when all is generated.

        Raises:
            NonFiniteError: scores were NaN or infinite; names the first such prompt.
        """
        rows = [] if self._bad is None else torch.nonzero(self._bad).flatten().tolist()
        if rows:
            first = self.prompts[rows[0] * len(self.prompts) // self._rows]
            raise NonFiniteError(
                f"the model's scores of the next token are NaN or infinite for {first[:60]!r}: its weights are, or "
                "numbers overflow in its precision; nothing is answered"
            )

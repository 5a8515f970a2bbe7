"""What metrics of captions share: captions of all processes, each sample once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.caption_tokenizers import Tokenizer, tokenize_captions
from dora_lightning.metrics.sample_mean import check_lengths
from dora_lightning.metrics.sample_rows import SampleRows


class CaptionRows(SampleRows):
    """Keeps captions with their references as texts, and gathers them from all processes.

    A subclass reads them with ``_captions`` in ``compute``. They are taken apart into words there, since Java starts
    once for all captions or once for each batch; and metrics with different tokenizers can share the state in a
    MetricCollection.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    records: list[Tensor]

    def __init__(self, tokenizer: str | Tokenizer, ascii_only: bool, **kwargs: Any) -> None:
        tokenize_captions([], tokenizer)  # an unknown tokenizer or missing Java is refused here, not after an epoch
        super().__init__(**kwargs)
        self.tokenizer = tokenizer
        self.ascii_only = ascii_only
        # a record is a line of JSON: id, caption, references
        self._add_rows("records", torch.zeros(0, dtype=torch.uint8))

    def update(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], ids: Sequence[str | int] | None = None
    ) -> None:
        """Add captions; without ``ids`` every one counts as a sample of its own.

        Raises:
            ValueError: not one set of references or one id per caption, or a set without any reference.
        """
        check_captions(predictions, references)
        if ids is not None and len(ids) != len(predictions):
            raise ValueError(f"got {len(predictions)} predictions for {len(ids)} ids")
        names = [None] * len(predictions) if ids is None else [i if isinstance(i, str) else int(i) for i in ids]
        records = [json.dumps([*record]) for record in zip(names, predictions, map(list, references), strict=True)]
        text = "".join(f"{record}\n" for record in records).encode()
        self._append("records", torch.tensor(list(text), dtype=torch.uint8))

    def _captions(self) -> tuple[list[str], list[list[str]]]:
        """Candidates and their references over all processes.

        Raises:
            ValueError: an id came with different references.
        """
        candidates: list[str] = []
        references: list[list[str]] = []
        seen: dict[str | int, list[str]] = {}
        for line in self._rows("records").cpu().numpy().tobytes().splitlines():
            name, candidate, texts = json.loads(line)
            if name is not None and name in seen:
                if seen[name] != texts:
                    raise ValueError(
                        f"id {name!r} came with different references, {seen[name]!r} and {texts!r}: all references of"
                        " a sample belong into one update"
                    )
                continue
            if name is not None:
                seen[name] = texts
            candidates.append(candidate)
            references.append(texts)
        return candidates, references


def check_captions(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raises ValueError unless there is one set of at least one reference per candidate."""
    check_lengths(candidates, references)
    for candidate, texts in zip(candidates, references, strict=True):
        if isinstance(texts, str) or len(texts) == 0:
            raise ValueError(f"a caption needs at least one reference in a list, got {texts!r} for {candidate!r}")
        if not all(isinstance(text, str) for text in (candidate, *texts)):
            raise ValueError(f"captions and references are texts, got {texts!r} for {candidate!r}")


def split_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str | Tokenizer, ascii_only: bool
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """The words of candidates and of their references; raises as :func:`check_captions`."""
    check_captions(candidates, references)
    # in one call: Java takes longer to start than to split
    words = iter(tokenize_captions([*candidates, *chain.from_iterable(references)], tokenizer, ascii_only))
    return list(islice(words, len(candidates))), [list(islice(words, len(texts))) for texts in references]

"""Statements about a pair of images, true or false: NLVR2.

Judged as VL-BART is, by which of the two words is likelier, and scored as the official evaluation (lil-lab/nlvr) does:
accuracy over rows, and consistency, the share of sentences that are judged rightly with all of their pairs of images.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from dora_lightning.data import Sample
from dora_lightning.gathering import gather
from dora_lightning.task import Task
from tasks.submissions import file_part, natural_order
from tasks.tables import data_set_table

# split-set-pair-sentence, such as dev-850-0-1
_IDENTIFIER = re.compile(r"(.+-[0-9]+)-[0-9]+-([0-9]+)")
_MEASURES = ("accuracy", "consistency", "majority")


class NLVR(Task):
    """Accuracy and consistency of statements whose truth is ranked: options ``true`` and ``false``.

    Results are ``<source>/accuracy``, ``<source>/consistency`` and ``<source>/majority`` (what always giving the more
    frequent answer would score), and their unweighted means over data sets. Of rows with the same ``identifier`` the
    first counts. Samples without a reference (hidden test sets) are judged and kept in the records, and not scored.

    Args:
        submissions: write ``<source>_predictions.csv``, a line ``identifier,True`` or ``identifier,False`` per row.
    """

    ranks_options = True

    def __init__(self, submissions: bool = True) -> None:
        super().__init__()
        self.submissions = submissions
        self._records: list[dict[str, Any]] = []
        self._judged: list[_Judged] = []

    def update(
        self, samples: Sequence[Sample], texts: Sequence[str] | None = None, scores: Sequence[Tensor] | None = None
    ) -> None:
        """Compare the likelier option with the reference.

        Raises:
            ValueError: there are no scores; a row has no ``identifier`` of the form ``split-set-pair-sentence``; the
                options are not true and false, or the reference is neither.
        """
        if scores is None:
            raise ValueError("NLVR judges by the options' log-likelihoods, and none were computed")
        for sample, score in zip(samples, scores, strict=True):
            row = sample.row or {}
            sentence = _sentence_of(row.get("identifier"), sample.source)
            truths = [_truth(option, sample.source) for option in sample.options]
            if sorted(truths) != [False, True]:
                raise ValueError(f"{sample.source}: the options are 'true' and 'false', got {sample.options}")
            answer = truths[int(score.argmax())]
            told: dict[str, Any] = {"source": sample.source, "references": list(sample.references)}
            told |= {"log_likelihoods": score.tolist(), "ranked": str(answer).lower(), "ranked_score": None}
            if sample.references:
                gold = _truth(sample.references[0], sample.source)
                told["ranked_score"] = float(answer == gold)
                self._judged.append(_Judged(sample.source, row["identifier"], sentence, gold, answer == gold))
            self._records.append({**row, **told})

    def compute(self) -> dict[str, Tensor]:
        """Each measure in [0, 1], over the answers of all processes."""
        sources: dict[str, dict[str, _Judged]] = {}
        for judged in gather(self._judged):
            sources.setdefault(judged.source, {}).setdefault(judged.identifier, judged)
        results: dict[str, Tensor] = {}
        for source in sorted(sources):
            rows = list(sources[source].values())
            sentences: dict[str, bool] = {}
            for row in rows:
                sentences[row.sentence] = sentences.get(row.sentence, True) and row.right
            results[f"{source}/accuracy"] = torch.tensor(sum(row.right for row in rows) / len(rows))
            results[f"{source}/consistency"] = torch.tensor(sum(sentences.values()) / len(sentences))
            results[f"{source}/majority"] = torch.tensor(max(Counter(row.gold for row in rows).values()) / len(rows))
        if sources:
            for name in _MEASURES:
                values = [results[f"{source}/{name}"] for source in sorted(sources)]
                results[f"mean/{name}"] = torch.stack(values).mean()
        return results

    def records(self) -> list[dict[str, Any]]:
        """The rows judged in this process, with ``log_likelihoods``, ``ranked`` and ``ranked_score``."""
        return self._records

    def files(self, records: list[dict[str, Any]]) -> dict[str, bytes]:
        """``<source>_predictions.csv`` as the official evaluation reads it."""
        answers: dict[str, dict[str, str]] = {}
        for record in records if self.submissions else ():
            answers.setdefault(record["source"], {}).setdefault(record["identifier"], record["ranked"].capitalize())
        return {
            f"{file_part(source)}_predictions.csv": "".join(
                f"{identifier},{named[identifier]}\n" for identifier in sorted(named, key=natural_order)
            ).encode()
            for source, named in answers.items()
        }

    def table(self, metrics: dict[str, Tensor]) -> Table:
        """Data sets in rows, measures in columns, in per cent."""
        return data_set_table("True or false (%)", {name: name for name in _MEASURES}, metrics, light=True)

    def reset(self) -> None:
        """Forget what was judged."""
        self._records = []
        self._judged = []


class _Judged(NamedTuple):
    source: str
    identifier: str
    sentence: str
    gold: bool
    right: bool


def _sentence_of(identifier: Any, source: str) -> str:
    """What rows about one sentence share: all but the number of the pair of images.

    >>> _sentence_of("dev-850-3-1", "nlvr2")
    'dev-850--1'
    """
    parts = _IDENTIFIER.fullmatch(identifier) if isinstance(identifier, str) else None
    if parts is None:
        raise ValueError(
            f"{source}: a row's 'identifier' is split-set-pair-sentence, such as dev-850-0-1, got {identifier!r}"
        )
    return f"{parts[1]}--{parts[2]}"


def _truth(text: str, source: str) -> bool:
    """Whether an option or a reference says true; a conversation template may have put something behind it."""
    word = text.strip().lower()
    if not word.startswith(("true", "false")):
        raise ValueError(f"{source}: expected 'true' or 'false', got {text!r}")
    return word.startswith("true")

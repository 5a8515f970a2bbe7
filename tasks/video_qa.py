"""Questions about videos: multiple choice by label (VL-BART) or by letter (LLaVA), and short answers.

Protocols: VL-Adapter's VL-BART writes ``a2`` for the third choice, and what it writes counts if it is exactly that; in
the file for VALUE's server the second character is read as the choice, and 0 stands where it is no digit. A model that
is asked for a letter is read by VLMEvalKit's rules, as for MMBench. Short answers are compared as in
:class:`~tasks.vqa.VQA`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.data import Sample
from dora_lightning.metrics import read_letter_mmbench
from tasks.submissions import natural_order
from tasks.vqa import VQA
from tasks.vqa_protocols import LETTERS, Protocol


class VideoQA(VQA):
    """Accuracy per data set and their unweighted mean, by generation, by ranking the options, or both.

    Results are ``<source>/accuracy`` (generated), ``<source>/ranking`` (the likeliest option), ``<source>/unparsed``
    (texts without an answer, which count as wrong), ``<source>/majority`` (what always giving the most frequent answer
    would score), and ``mean/accuracy`` and ``mean/ranking``.

    A row with ``choices`` is multiple choice: by letter if it says ``letters``, else by ``a0``, ``a1`` and so on; other
    rows have short answers. Where rows have a ``qid``, ``<source>_submission.json`` holds ``{qid: index}``, as VALUE's
    server reads it: of what was generated, or of the likeliest option where nothing was.

    Args:
        judge: ``generation``, ``ranking`` or ``both``.
        max_new_tokens: longest answer.
        submissions: write the files for VALUE's server.

    Raises:
        ValueError: unknown judge.
    """

    def __init__(self, judge: str = "generation", max_new_tokens: int = 20, submissions: bool = True) -> None:
        super().__init__(judge, max_new_tokens, submissions=submissions, picture=0)

    def files(self, records: list[dict[str, Any]]) -> dict[str, bytes]:
        """The file for VALUE's server of each data set that has one."""
        if not self.submissions:
            return {}
        chosen: dict[str, dict[str, int]] = {}
        for record in sorted(records, key=lambda record: natural_order(record.get("qid"))):
            index = _submitted(record) if "qid" in record and "choices" in record else None
            if index is not None:
                chosen.setdefault(record["source"], {})[str(record["qid"])] = index
        return {f"{source}_submission.json": json.dumps(answers).encode() for source, answers in chosen.items()}

    def _protocol(self, sample: Sample) -> Protocol:
        row = sample.row or {}
        if "choices" not in row:
            return super()._protocol(sample)
        return _LETTERED if row.get("letters") else _LABELLED


def _read_label(text: str, sample: Sample) -> str:
    assert sample.row is not None
    label = re.fullmatch(r"a([0-9])", text.strip())
    return label[0] if label and int(label[1]) < len(sample.row["choices"]) else ""


def _read_letter(text: str, sample: Sample) -> str:
    assert sample.row is not None
    options = dict(zip(LETTERS, sample.row["choices"], strict=False))
    return read_letter_mmbench(text.strip(), options) or ""


def _score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    return torch.tensor([float(answer in right) for answer, right in zip(answers, references, strict=True)])


_LABELLED = Protocol(_read_label, _score, str)
_LETTERED = Protocol(_read_letter, _score, str)


def _submitted(record: dict[str, Any]) -> int | None:
    """The choice that a record stands for in the file for the server; None if it was not judged."""
    count = len(record["choices"])
    if "output_pred" not in record:
        likelihoods = record.get("log_likelihoods")
        return None if likelihoods is None else max(range(count), key=lambda place: likelihoods[place])
    if record.get("letters"):
        return LETTERS.index(record["pred"]) if record["pred"] else 0
    second = record["output_pred"][1:2]
    return int(second) if second in "0123456789"[:count] and second else 0

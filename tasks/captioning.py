"""Captions of images and of videos, scored as the COCO evaluation and the VALUE benchmark score them.

What VL-BART's papers report is CIDEr-D times 100: of COCO captions (Karpathy's test split) and of the video benchmarks
TVC and YC2C, whose captions VALUE strips of all that is not ASCII first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from dora_lightning.data import Sample
from dora_lightning.gathering import gather
from dora_lightning.messages import check_whole
from dora_lightning.metrics import caption_scores, tokenize_captions
from dora_lightning.task import Task
from tasks.caption_files import caption_files, caption_id
from tasks.tables import data_set_table

ASCII_ONLY = ("tvc", "yc2c")
"""Data sets whose official evaluation puts a space for each character that is not ASCII."""

_COLUMNS = {"cider_d": "CIDEr-D", "bleu_4": "BLEU-4", "bleu_1": "BLEU-1", "rouge_l": "ROUGE-L", "blank": "blank"}


class Captioning(Task):
    """CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L per data set.

    Results are ``<source>/cider_d`` in [0, 10], and ``<source>/bleu_1`` to ``bleu_4``, ``rouge_l`` and ``blank`` (the
    share of empty captions) in [0, 1]; papers report all times 100, as the table does. ``mean/...`` weighs data sets
    alike. Document frequencies are those of a data set's references, over all processes. Of samples with the same
    ``clip_id`` or ``image_id`` in their rows the first counts. Samples without references (hidden test sets) are
    captioned and kept in the records, and not scored.

    Args:
        num_beams: beams of the search; 5 as published.
        max_new_tokens: longest caption. VL-BART's published lengths, 40 for COCO and 20 for videos, count the token
            that the decoder starts with, so that they are 39 and 19 here.
        tokenizer: ``ptb``, or ``java`` for the COCO evaluation's own program; see
            :func:`dora_lightning.metrics.tokenize_captions`.
        ascii_only: put a space for each character that is not ASCII; None does so for :data:`ASCII_ONLY`.
        submissions: write the benchmarks' submission files; see :func:`tasks.caption_files.caption_files`.
        results_name: name in COCO's submission file, such as ``test2014_mine``; the data set's if None.

    Raises:
        ValueError: an unknown tokenizer, or a name of which no file can be made.
        ModuleNotFoundError: ``java`` without pycocoevalcap.
        FileNotFoundError: ``java`` without a Java runtime.
    """

    def __init__(
        self,
        num_beams: int = 5,
        max_new_tokens: int = 39,
        tokenizer: str = "ptb",
        ascii_only: bool | None = None,
        submissions: bool = True,
        results_name: str | None = None,
    ) -> None:
        super().__init__()
        check_whole(1, num_beams=num_beams, max_new_tokens=max_new_tokens)
        tokenize_captions([], tokenizer)  # what is missing is noticed here, not after an epoch
        if results_name is not None and (not results_name or set(results_name) & set("/\\")):
            raise ValueError(f"results_name is a part of a file's name, such as test2014_mine, got {results_name!r}")
        self.generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": False}
        self.tokenizer = tokenizer
        self.ascii_only = ascii_only
        self.submissions = submissions
        self.results_name = results_name
        self._records: list[dict[str, Any]] = []
        self._captions: list[_Captioned] = []

    def update(
        self, samples: Sequence[Sample], texts: Sequence[str] | None = None, scores: Sequence[Tensor] | None = None
    ) -> None:
        """Keep each text with the references.

        Raises:
            ValueError: there are no texts.
        """
        if texts is None:
            raise ValueError("Captioning judges texts, and none were generated")
        for sample, text in zip(samples, texts, strict=True):
            row = sample.row or {"prompt": sample.prompt}
            caption = text.strip()
            told = {"source": sample.source, "references": list(sample.references)}
            self._records.append({**row, **told, "output_pred": text, "pred": caption})
            if sample.references:
                self._captions.append(_Captioned(sample.source, caption_id(row), caption, sample.references))

    def compute(self) -> dict[str, Tensor]:
        """``<source>/<measure>`` and ``mean/<measure>`` over the captions of all processes.

        Raises:
            ValueError: an id came with different references.
        """
        sources: dict[str, list[_Captioned]] = {}
        for captioned in _each_once(gather(self._captions)):
            sources.setdefault(captioned.source, []).append(captioned)
        results: dict[str, Tensor] = {}
        for source in sorted(sources):
            results |= {f"{source}/{name}": value for name, value in self._scores(source, sources[source]).items()}
        for name in _names(results):
            results[f"mean/{name}"] = torch.stack([results[f"{source}/{name}"] for source in sorted(sources)]).mean()
        return results

    def _scores(self, source: str, captioned: Sequence[_Captioned]) -> dict[str, Tensor]:
        captions, references = [row.caption for row in captioned], [row.references for row in captioned]
        ascii_only = source in ASCII_ONLY if self.ascii_only is None else self.ascii_only
        scores = caption_scores(captions, references, self.tokenizer, ascii_only)
        blank = torch.tensor([not caption for caption in captions]).float().mean()
        return {name: value.float() for name, value in scores.items()} | {"blank": blank}

    def records(self) -> list[dict[str, Any]]:
        """The rows judged in this process, with ``output_pred`` and, without space around it, ``pred``."""
        return self._records

    def files(self, records: list[dict[str, Any]]) -> dict[str, bytes]:
        """The submission files."""
        return caption_files(records, self.results_name) if self.submissions else {}

    def table(self, metrics: dict[str, Tensor]) -> Table:
        """Data sets in rows, measures in columns, all times 100."""
        return data_set_table("Captions (x 100)", _COLUMNS, metrics, light=True)

    def reset(self) -> None:
        """Forget what was judged."""
        self._records = []
        self._captions = []


class _Captioned(NamedTuple):
    """What is scored of a sample; small, since processes exchange it."""

    source: str
    name: int | str | None
    caption: str
    references: tuple[str, ...]


def _each_once(captioned: Sequence[_Captioned]) -> list[_Captioned]:
    """The first of each id of a data set, and all that have none."""
    kept: dict[Any, _Captioned] = {}
    for number, row in enumerate(captioned):
        key = (row.source, row.name, number if row.name is None else None)
        first = kept.setdefault(key, row)
        if first.references != row.references:
            raise ValueError(
                f"{row.source}: id {row.name!r} came with different references, {first.references!r} and "
                f"{row.references!r}: all references of an image or clip belong into one sample"
            )
    return list(kept.values())


def _names(results: dict[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(name.rpartition("/")[2] for name in results))

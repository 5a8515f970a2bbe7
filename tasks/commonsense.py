"""Multiple-choice commonsense questions, judged by generation and by ranking the options.

Protocols: the generation judge is that of LLM-Adapters, which the DoRA paper uses (4-beam search, the first match of a
regular expression per data set counts, no match is wrong); the ranking judge is that of lm-evaluation-harness (``acc``
by log-likelihood, ``acc_norm`` by log-likelihood per character). Their numbers do not compare.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dora_lightning.data import Sample
from dora_lightning.messages import check_whole
from dora_lightning.metrics import PerSourceMean
from dora_lightning.task import Task
from tasks.tables import data_set_table

JUDGES = ("generation", "ranking", "both")

_NUMBERED = r"answer1|answer2|answer3|answer4|answer5"
ANSWER_PATTERNS = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": _NUMBERED,
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
    "ARC-Easy": _NUMBERED,
    "ARC-Challenge": _NUMBERED,
    "openbookqa": _NUMBERED,
}
"""How the published evaluation reads the answer out of the text; case-sensitive, the first match counts."""


def extract_answer(text: str, sample: Sample) -> str:
    """The answer in a generated text, or "" if there is none.

    Where the answer is a published label (``answer2``, ``true``) the published pattern reads it; else the option that
    occurs first in the text is the answer, the longest one if several begin there.

    >>> extract_answer("the answer is answer2", Sample("...", "...", references=("answer2",), source="ARC-Easy"))
    'answer2'
    """
    text = text.split("### Response:")[-1].strip()
    pattern = ANSWER_PATTERNS.get(sample.source)
    if pattern and all(re.fullmatch(pattern, reference) for reference in sample.references):
        found = re.search(pattern, text)
        return found.group() if found else ""
    options = [option.strip() for option in sample.options]
    present = [(text.find(option), -len(option), option) for option in options if option in text]
    return min(present)[2] if present else ""


class CommonsenseQA(Task):
    """Accuracy per data set and their unweighted mean, by generation, by ranking, or both.

    Args:
        judge: ``generation``, ``ranking`` or ``both``.
        num_beams: beams of the search; 4 as published, 1 is greedy and several times faster.
        max_new_tokens: longest answer.

    Raises:
        ValueError: unknown judge.
    """

    def __init__(self, judge: str = "generation", num_beams: int = 4, max_new_tokens: int = 32) -> None:
        super().__init__()
        check_whole(1, num_beams=num_beams, max_new_tokens=max_new_tokens)
        if judge not in JUDGES:
            raise ValueError(f"judge must be one of {', '.join(JUDGES)}, got {judge!r}")
        if judge != "ranking":
            self.generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "do_sample": False}
            self.generated = PerSourceMean()
            self.unparsed = PerSourceMean()
        self.ranks_options = judge != "generation"
        if self.ranks_options:
            self.ranked = PerSourceMean()
            self.ranked_norm = PerSourceMean()
        self._records: list[dict[str, Any]] = []

    def update(
        self, samples: Sequence[Sample], texts: Sequence[str] | None = None, scores: Sequence[Tensor] | None = None
    ) -> None:
        """Compare each text's answer with the references, and the likeliest option with the target.

        Raises:
            ValueError: options are to be ranked and the target is none of them.
        """
        sources = [sample.source for sample in samples]
        records = [{"source": sample.source, **(sample.row or {"prompt": sample.prompt})} for sample in samples]
        if texts is not None:
            answers = [extract_answer(text, sample) for text, sample in zip(texts, samples, strict=True)]
            correct = [answer in _references(sample) for answer, sample in zip(answers, samples, strict=True)]
            self.generated.update(_as_floats(correct), sources)
            self.unparsed.update(_as_floats([answer == "" for answer in answers]), sources)
            for record, text, answer, flag in zip(records, texts, answers, correct, strict=True):
                record |= {"output_pred": text, "pred": answer, "flag": flag}
        if scores is not None:
            choices = [_choose(score, sample) for score, sample in zip(scores, samples, strict=True)]
            self.ranked.update(_as_floats([choice == gold for choice, _, gold in choices]), sources)
            self.ranked_norm.update(_as_floats([choice == gold for _, choice, gold in choices]), sources)
            for record, score, sample, (choice, _, gold) in zip(records, scores, samples, choices, strict=True):
                ranked = sample.options[choice].strip()
                record |= {"log_likelihoods": score.tolist(), "ranked": ranked, "ranked_flag": choice == gold}
        self._records += records

    def compute(self) -> dict[str, Tensor]:
        """``<source>/<measure>`` and ``mean/<measure>``, each in [0, 1]; ``mean`` weighs data sets alike."""
        results: dict[str, Tensor] = {}
        for measure, metric in self._measures().items():
            per_source = metric.compute()
            results |= {f"{source}/{measure}": value for source, value in per_source.items()}
            if per_source:
                results[f"mean/{measure}"] = torch.stack(list(per_source.values())).mean()
        return results

    def records(self) -> list[dict[str, Any]]:
        """The rows judged in this process, with ``output_pred``, ``pred`` and ``flag`` as in the published files."""
        return self._records

    def table(self, metrics: dict[str, Tensor]) -> Table:
        """Data sets in rows, measures in columns, in per cent."""
        return data_set_table("Accuracy (%)", {measure: measure for measure in self._measures()}, metrics)

    def reset(self) -> None:
        """Forget what was judged."""
        for metric in self._measures().values():
            metric.reset()
        self._records = []

    def _measures(self) -> dict[str, PerSourceMean]:
        measures: dict[str, PerSourceMean] = {}
        if self.generation is not None:
            measures |= {"generation": self.generated, "unparsed": self.unparsed}
        if self.ranks_options:
            measures |= {"ranking": self.ranked, "ranking_norm": self.ranked_norm}
        return measures


def _choose(score: Tensor, sample: Sample) -> tuple[int, int, int]:
    """Index of the likeliest option, of the likeliest per character, and of the right one."""
    if sample.target not in sample.options:
        raise ValueError(f"{sample.source}: the target {sample.target!r} is not among the options {sample.options}")
    lengths = torch.tensor([max(1, len(option)) for option in sample.options], device=score.device)
    return int(score.argmax()), int((score / lengths).argmax()), sample.options.index(sample.target)


def _as_floats(flags: Sequence[bool]) -> Tensor:
    return torch.tensor(flags, dtype=torch.float32)


def _references(sample: Sample) -> tuple[str, ...]:
    return sample.references or (sample.target.strip(),)

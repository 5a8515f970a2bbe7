"""From judged answers to each benchmark's measures and their mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_lightning.metrics import circular_accuracy, pope_scores
from tasks.vqa_protocols import benchmark_of

_GROUPS = ("pope", "easy_vqa", "moving_shapes")
"""Benchmarks of several sources, which have one number together."""

SHUFFLED = "_shuffled"
"""How a source's name ends whose videos are shown with their frames in any order."""


class Judged(NamedTuple):
    """What the measures need of one answer whose truth is known; small, since processes exchange it."""

    source: str
    score: float | None = None
    """Score of the generated answer, None if none was generated."""
    parsed: bool = True
    """Whether an answer could be read out of the generated text."""
    ranked: float | None = None
    """Whether the likeliest option is the right one, None if options were not ranked."""
    answer: str = ""
    """The generated answer as it was read (POPE alone)."""
    truth: str = ""
    """The one short answer, in the form in which equal answers are equal; "" if there are several, or letters."""
    has_image: bool = True
    number: int = 0
    """MMBench's number of the row; its rotations differ by multiples of a million."""
    categories: tuple[str, ...] = ()


# measure -> the scores it is made from
_JUDGES: dict[str, Callable[[Judged], float | None]] = {"accuracy": lambda j: j.score, "ranking": lambda j: j.ranked}


def vqa_results(judged: Sequence[Judged]) -> dict[str, Tensor]:
    """``<source>/<measure>`` in [0, 1], and ``mean/accuracy`` and ``mean/ranking`` over the benchmarks.

    Args:
        judged: all answers whose truth is known, of all processes, each once.
    """
    sources: dict[str, list[Judged]] = {}
    for row in judged:
        sources.setdefault(row.source, []).append(row)
    results: dict[str, Tensor] = {}
    for source in sorted(sources):
        results |= _source_results(source, sources[source])
    results |= _group_results(sources, results)
    for measure in _JUDGES:
        headlines = _headlines(results, measure)
        if headlines:
            results[f"mean/{measure}"] = torch.stack(list(headlines.values())).mean()
    return results


def _source_results(source: str, rows: Sequence[Judged]) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    benchmark = benchmark_of(source)
    for measure, score_of in _JUDGES.items():
        scored = [row for row in rows if score_of(row) is not None]
        if not scored:
            continue
        if benchmark == "scienceqa":
            # the published number is that of the questions with an image
            overall = "overall" if measure == "accuracy" else f"{measure}_overall"
            results[f"{source}/{overall}"] = _mean(score_of, scored)
            scored = [row for row in scored if row.has_image]
            if not scored:
                continue
        if benchmark == "mmbench":
            results |= _circular(source, measure, score_of, scored)
        else:
            results[f"{source}/{measure}"] = _mean(score_of, scored)
    generated = [row for row in rows if row.score is not None]
    if generated and benchmark == "pope":
        scores = pope_scores([row.answer for row in generated], [row.truth for row in generated])
        results |= {f"{source}/{measure}": value for measure, value in scores.items()}
    elif generated:
        results[f"{source}/unparsed"] = _mean(lambda row: not row.parsed, generated)
    if all(row.truth for row in rows):
        results[f"{source}/majority"] = torch.tensor(_most_frequent(rows) / len(rows))
    return results


def _circular(
    source: str, measure: str, score_of: Callable[[Judged], float | None], rows: Sequence[Judged]
) -> dict[str, Tensor]:
    """Accuracy over questions whose every rotation is answered rightly: of all, and of each category."""
    groups: dict[str, list[Judged]] = {source: list(rows)}
    for row in rows:
        for category in row.categories:
            groups.setdefault(f"{source}/{category}", []).append(row)
    return {
        f"{name}/{measure}": circular_accuracy(
            torch.tensor([score_of(row) for row in members]), [row.number for row in members]
        ).mean()
        for name, members in groups.items()
    }


def _group_results(sources: dict[str, list[Judged]], results: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is said of the kinds of question of a made benchmark together, and of POPE's splits together."""
    grouped: dict[str, Tensor] = {}
    for group in ("easy_vqa", "moving_shapes"):
        # shuffled frames tell how much of the score the order of frames gives; they are no part of it
        kinds = [rows for name, rows in sources.items() if benchmark_of(name) == group and not name.endswith(SHUFFLED)]
        grouped |= _kinds_results(group, kinds)
    splits = [source for source in sources if benchmark_of(source) == "pope"]
    for measure in ("f1", "ranking"):
        values = [results[f"{split}/{measure}"] for split in splits if f"{split}/{measure}" in results]
        if values:
            grouped[f"pope/{measure}"] = torch.stack(values).mean()
    return grouped


def _kinds_results(group: str, kinds: Sequence[list[Judged]]) -> dict[str, Tensor]:
    """Measures over all questions of all kinds."""
    results: dict[str, Tensor] = {}
    questions = [row for rows in kinds for row in rows]
    for measure, score_of in _JUDGES.items():
        scored = [row for row in questions if score_of(row) is not None]
        if scored:
            results[f"{group}/{measure}"] = _mean(score_of, scored)
    generated = [row for row in questions if row.score is not None]
    if generated:
        results[f"{group}/unparsed"] = _mean(lambda row: not row.parsed, generated)
    if questions:
        # a guess per kind of question: the better of the two baselines
        results[f"{group}/majority"] = torch.tensor(sum(map(_most_frequent, kinds)) / len(questions))
    return results


def _headlines(results: dict[str, Tensor], measure: str) -> dict[str, Tensor]:
    """The number that each benchmark is known by."""
    headlines: dict[str, Tensor] = {}
    for name, value in results.items():
        source, _, of = name.rpartition("/")
        published = "f1" if (source, measure) == ("pope", "accuracy") else measure
        in_group = benchmark_of(source) in _GROUPS and source not in _GROUPS
        if of == published and not source.startswith("mmbench/") and not in_group:
            headlines[source] = value
    return headlines


def _mean(score_of: Callable[[Judged], float | None], rows: Sequence[Judged]) -> Tensor:
    return torch.tensor([float(score_of(row) or 0) for row in rows], dtype=torch.float64).mean().float()


def _most_frequent(rows: Sequence[Judged]) -> int:
    return max(Counter(row.truth for row in rows).values())

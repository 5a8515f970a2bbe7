"""The scores in FastChat's judgment files: per turn, per category, and their mean."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dora_lightning.mt_bench.questions import Question, field, read_lines
from dora_lightning.terminal import PlainTable

LOWEST_RATING, HIGHEST_RATING = 1, 10
NO_SCORE = -1
"""Score of a judgment in which no rating from 1 to 10 was found; it is counted, and left out of every mean."""


class ModelScores(NamedTuple):
    """Mean scores of one model, from 1 to 10; None where nothing was rated."""

    model: str
    mean: float | None
    """Over all judgments, of both turns."""
    turns: dict[int, float | None]
    categories: dict[str, float | None]
    rated: int
    """Judgments with a score."""
    unrated: int
    """Judgments without one."""


def read_judgments(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The rows of judgment files, as FastChat's ``gpt-4_single.jsonl``; of several on one answer the last counts.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line is no judgment of a single answer; the message names the file and line.
    """
    rows = [row for path in paths for row in read_lines(Path(path), _judgment)]
    return list({(row["model"], row["question_id"], row["turn"], str(row.get("judge"))): row for row in rows}.values())


def scores(judgments: Sequence[dict[str, Any]], questions: Sequence[Question] = ()) -> list[ModelScores]:
    """Mean scores of each model, the best first; those per category need the questions.

    Raises:
        ValueError: a judgment is on a question that is not among those given.
    """
    categories = {question.question_id: question.category for question in questions}
    names = list(dict.fromkeys(categories.values()))
    if categories:
        for row in judgments:
            if row["question_id"] not in categories:
                raise ValueError(f"a judgment of {row['model']} is on question {row['question_id']}, which is unknown")
    results = []
    for model in dict.fromkeys(row["model"] for row in judgments):
        own = [row for row in judgments if row["model"] == model]
        rated = [row for row in own if row["score"] != NO_SCORE]
        results.append(
            ModelScores(
                model,
                _mean(rated),
                {
                    turn: _mean([row for row in rated if row["turn"] == turn])
                    for turn in sorted({r["turn"] for r in own})
                },
                {name: _mean([row for row in rated if categories[row["question_id"]] == name]) for name in names},
                len(rated),
                len(own) - len(rated),
            )
        )
    return sorted(results, key=lambda result: -(result.mean or 0))


def score_table(results: Sequence[ModelScores]) -> PlainTable:
    """Models in columns; turns, their mean and categories in rows."""
    table = PlainTable(title="MT-Bench (1 to 10)")
    table.add_column("")
    for result in results:
        table.add_column(result.model, justify="right", overflow="fold")
    for turn in sorted({turn for result in results for turn in result.turns}):
        table.add_row(f"turn {turn}", *(_shown(result.turns.get(turn)) for result in results))
    table.add_row("mean", *(_shown(result.mean) for result in results))
    table.add_section()
    for name in dict.fromkeys(name for result in results for name in result.categories):
        table.add_row(name, *(_shown(result.categories.get(name)) for result in results))
    table.add_section()
    table.add_row("rated", *(str(result.rated) for result in results))
    table.add_row("without a score", *(str(result.unrated) for result in results))
    return table


def _mean(rows: Sequence[dict[str, Any]]) -> float | None:
    return sum(row["score"] for row in rows) / len(rows) if rows else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _judgment(row: dict[str, Any]) -> dict[str, Any]:
    field(row, "question_id", int, "a number")
    field(row, "model", str, "the name of a model")
    field(row, "turn", int, "1 or 2")
    score = row.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise ValueError(f"field 'score' must be a number, found {score!r:.80}")
    judge = row.get("judge", [])
    if not isinstance(judge, list) or not all(isinstance(name, str) for name in judge):
        raise ValueError(f"field 'judge' must be the list of a model and a prompt, found {judge!r:.80}")
    if not LOWEST_RATING <= score <= HIGHEST_RATING:
        row = row | {"score": NO_SCORE}  # other programs take whatever number the judge wrote
    return row

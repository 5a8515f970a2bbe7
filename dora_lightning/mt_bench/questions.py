"""FastChat's files of questions and of answers: one JSON object a line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_lightning.files import json_rows

_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER_TEMPERATURE = 0.7
# what has one right answer is judged beside a reference
_REFERENCE_CATEGORIES = ("math", "reasoning", "coding")


@dataclass(frozen=True)
class Question:
    """One question of ``question.jsonl``."""

    question_id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    """Right answers to the turns, where the file has them."""

    @property
    def temperature(self) -> float:
        """Temperature that FastChat answers this category at; 0 is greedy."""
        return _TEMPERATURES.get(self.category, _OTHER_TEMPERATURE)

    @property
    def needs_reference(self) -> bool:
        """Whether the judge is shown a right answer."""
        return self.category in _REFERENCE_CATEGORIES


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file, by their number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no question, or a number occurs twice; the message names the file and line.
    """
    questions = read_lines(Path(path), _question)
    seen: set[int] = set()
    for question in questions:
        if question.question_id in seen:
            raise ValueError(f"{path}: question {question.question_id} occurs twice")
        seen.add(question.question_id)
    return sorted(questions, key=lambda question: question.question_id)


def read_answers(path: str | Path) -> dict[int, dict[str, Any]]:
    """The rows of a model's answers, or of reference answers, by the question's number; of several the last counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no answer; the message names the file and line.
    """
    return {row["question_id"]: row for row in read_lines(Path(path), _answer)}


def read_lines(path: Path, convert: Callable[[dict[str, Any]], Any]) -> list[Any]:
    """What ``convert`` makes of each line of a JSONL file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object, ``convert`` refused it, or there are none.
    """
    rows = []
    for place, row in json_rows(path, "one JSON object a line"):
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {row!r:.80}")
            rows.append(convert(row))
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
    if not rows:
        raise ValueError(f"{path}: the file holds no row")
    return rows


def field(row: dict[str, Any], name: str, kind: type, what: str) -> Any:
    """A field of a row.

    Raises:
        ValueError: it is missing or of another type.
    """
    value = row.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"field {name!r} must be {what}, found {value!r:.80}")
    return value


def texts(value: Any, name: str) -> tuple[str, ...]:
    """A list of texts.

    Raises:
        ValueError: it is none, or empty.
    """
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"field {name!r} must be a list of texts, found {value!r:.80}")
    return tuple(value)


def _question(row: dict[str, Any]) -> Question:
    return Question(
        field(row, "question_id", int, "a number"),
        field(row, "category", str, "text"),
        texts(row.get("turns"), "turns"),
        texts(row["reference"], "reference") if row.get("reference") not in (None, []) else (),
    )


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    field(row, "question_id", int, "a number")
    choices = field(row, "choices", list, "a list with the answers")
    if not choices or not isinstance(choices[0], dict):
        raise ValueError(f"field 'choices' must be a list of objects, found {choices!r:.80}")
    texts(choices[0].get("turns"), "choices[0].turns")
    if not isinstance(row.get("model_id", ""), str):
        raise ValueError(f"field 'model_id' must be text, found {row['model_id']!r:.80}")
    return row

"""Questions like MT-Bench's, and what FastChat's reader expects of a file of answers."""

import json
from pathlib import Path
from typing import Any

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["is it cold?", "is it hot?"]},
    {"question_id": 91, "category": "roleplay", "turns": ["what is it?", "and then?"]},
    {"question_id": 101, "category": "reasoning", "turns": ["who is it?", "or true?"], "reference": ["a", "b"]},
    {"question_id": 111, "category": "math", "turns": ["1 or 2?", "2 or 3?"]},
    {"question_id": 141, "category": "stem", "turns": ["task?", "answer?"]},
    {"question_id": 151, "category": "humanities", "turns": ["request?", "response?"]},
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_fastchat_answers(path: Path, numbers: list[int]) -> None:
    """FastChat reads a line of JSON per question, sorted and once each: ``question_id``, ``answer_id``, ``model_id``,
    ``choices`` of ``index`` and ``turns``, ``tstamp``; the model's name is that of the file."""
    rows = read_lines_of(path)
    assert [row["question_id"] for row in rows] == numbers == sorted(set(numbers))
    for row in rows:
        assert type(row["question_id"]) is int
        assert type(row["answer_id"]) is str
        assert row["model_id"] == path.name.removesuffix(".jsonl")
        assert type(row["tstamp"]) is float
        (choice,) = row["choices"]
        assert choice["index"] == 0
        assert [type(turn) for turn in choice["turns"]] == [str, str]
    assert len({row["answer_id"] for row in rows}) == len(rows)

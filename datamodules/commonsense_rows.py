"""The eight commonsense tasks as rows: LLM-Adapters' JSON, the hub's columns, and :class:`Question` between them."""

import re
from dataclasses import dataclass
from typing import Any

from datamodules.rows import Row, require_field

TASKS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Challenge", "ARC-Easy", "openbookqa")
"""The eight tasks in the order that LLM-Adapters lists them; also the names of its folders."""

ARC_OR_OPENBOOKQA = "arc_openbookqa"
"""Name for a row of ARC-Challenge, ARC-Easy or openbookqa whose file does not say which: the three look the same."""

_OUTPUT = "the correct answer is "
_LABELS_AT_END = re.compile(r"Answer format:\s*([^\s/]+(?:/[^\s/]+)+)\s*$")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question, free of any file's layout."""

    task: str
    """One of :data:`TASKS` (or :data:`ARC_OR_OPENBOOKQA`)."""
    text: str
    """All that comes before the options: question, goal, context or sentence."""
    options: tuple[str, ...]
    """The texts to choose from, in order."""
    answer: int
    """Index of the right option."""


@dataclass(frozen=True)
class _Format:
    """How LLM-Adapters writes the instruction of one task."""

    lead: str
    label: str  # options are headed "{Label}1: ", and the answer is "{label}1"
    between: str = " "
    before_labels: str = "\n\n"


_ANSWER = _Format("Please choose the correct answer to the question: ", "answer")
_FORMATS = {
    "boolq": _Format("Please answer the following question with true or false, question: ", ""),
    "piqa": _Format("Please choose the correct solution to the question: ", "solution", between="\n\n"),
    "social_i_qa": _ANSWER,
    "hellaswag": _Format("Please choose the correct ending to complete the given sentence: ", "ending"),
    "winogrande": _Format(
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        "option",
        before_labels=" ",
    ),
    "ARC-Challenge": _ANSWER,
    "ARC-Easy": _ANSWER,
    "openbookqa": _ANSWER,
    ARC_OR_OPENBOOKQA: _ANSWER,
}
_BOOLQ_OPTIONS = ("true", "false")


def answer_labels(instruction: str) -> tuple[str, ...]:
    """The valid labels, read from the end of an instruction.

    >>> answer_labels("Which one? Answer format: answer1/answer2")
    ('answer1', 'answer2')

    Raises:
        ValueError: The instruction does not end in ``Answer format: a/b``.
    """
    match = _LABELS_AT_END.search(instruction)
    if match is None:
        raise ValueError(
            f"field 'instruction' must end in the valid labels, as in 'Answer format: answer1/answer2'; "
            f"it ends in {instruction[-60:]!r}"
        )
    return tuple(match[1].split("/"))


def recognise_task(row: Row) -> str | None:
    """Which task a row is from, by the format of its instruction; None if it is none of the eight.

    ARC and OpenBookQA share one format, so they are :data:`ARC_OR_OPENBOOKQA`. Social IQa has that format too, always
    with three options; the few ARC rows with three options (0.4 % of them) are taken for it.
    """
    instruction = require_field(row, "instruction")
    for task in ("boolq", "piqa", "hellaswag", "winogrande"):
        if instruction.startswith(_FORMATS[task].lead):
            return task
    if not instruction.startswith(_ANSWER.lead):
        return None
    return "social_i_qa" if len(answer_labels(instruction)) == 3 else ARC_OR_OPENBOOKQA


def parse_row(row: Row, task: str) -> Question:
    """Read a row of LLM-Adapters.

    Args:
        row: The row, with ``instruction`` and ``answer``.
        task: One of :data:`TASKS` (or :data:`ARC_OR_OPENBOOKQA`).

    Raises:
        ValueError: The instruction is not in the task's format, its options can be cut apart in more than one way, or
            the answer is not one of the labels.
    """
    form = _FORMATS[task]
    instruction, answer = require_field(row, "instruction"), require_field(row, "answer")
    labels = answer_labels(instruction)
    tail = f"{form.before_labels}Answer format: {'/'.join(labels)}"
    if not instruction.startswith(form.lead) or not instruction.endswith(tail):
        raise ValueError(
            f"field 'instruction' is not in the format of {task}, "
            f"{form.lead + '...' + form.before_labels + 'Answer format: ...'!r}; found {instruction!r:.200}"
        )
    if labels != _labels(task, len(labels)):
        raise ValueError(f"the labels of {task} are {form.label}1/{form.label}2/..., found {'/'.join(labels)}")
    if answer not in labels:
        raise ValueError(f"field 'answer' must be one of {'/'.join(labels)}, found {answer!r}")
    body = instruction[len(form.lead) : -len(tail)]
    if task == "boolq":
        return Question(task, body, _BOOLQ_OPTIONS, labels.index(answer))
    text, *options = _cut(body, _headings(form, len(labels)))
    return Question(task, text, tuple(options), labels.index(answer))


def render_row(question: Question) -> Row:
    """Write a question as LLM-Adapters does: ``instruction``, ``input`` (empty), ``output`` and ``answer``."""
    form = _FORMATS[question.task]
    labels = _labels(question.task, len(question.options))
    parts = [form.lead, question.text]
    if question.task != "boolq":
        for heading, option in zip(_headings(form, len(labels)), question.options, strict=True):
            parts += [heading, option]
    parts += [form.before_labels, "Answer format: ", "/".join(labels)]
    answer = labels[question.answer]
    return {"instruction": "".join(parts), "input": "", "output": _OUTPUT + answer, "answer": answer}


def _labels(task: str, count: int) -> tuple[str, ...]:
    if task == "boolq":
        return _BOOLQ_OPTIONS
    return tuple(f"{_FORMATS[task].label}{number}" for number in range(1, count + 1))


def _headings(form: _Format, count: int) -> list[str]:
    """What stands before each option, e.g. ``\\n\\nAnswer1: `` and `` Answer2: ``."""
    heads = [f"{form.label.capitalize()}{number}: " for number in range(1, count + 1)]
    return ["\n\n" + heads[0], *(form.between + head for head in heads[1:])]


def _cut(body: str, headings: list[str]) -> list[str]:
    parts = []
    for heading in headings:
        found = body.count(heading)
        if found != 1:
            raise ValueError(
                f"the options cannot be told apart: {heading!r} stands {found} times in {body!r:.200}, expected once"
            )
        part, body = body.split(heading)
        parts.append(part)
    return [*parts, body]


def parse_hub_row(row: dict[str, Any], task: str) -> Question:
    """Read a row of the task's data set on the Hugging Face hub.

    The columns are those that lm-evaluation-harness reads: ``google/boolq`` (or SuperGLUE's, with ``label``),
    ``baber/piqa``, ``lighteval/siqa``, ``Rowan/hellaswag``, ``allenai/winogrande``, ``allenai/ai2_arc`` and
    ``allenai/openbookqa``.

    Raises:
        ValueError: A column is missing, or the answer is not one of the options (as in test splits without answers).
    """
    try:
        text, options, answer = _HUB_READERS[task](row)
    except KeyError as error:
        raise ValueError(f"column {error} is missing for {task}; the row has {', '.join(map(repr, row))}") from error
    if not 0 <= answer < len(options):
        raise ValueError(f"the answer of {task} must be one of its {len(options)} options, found number {answer + 1}")
    return Question(task, text, tuple(options), answer)


_Parts = tuple[str, list[str], int]


def _boolq(row: dict[str, Any]) -> _Parts:
    name = "answer" if "answer" in row else "label"
    if row[name] not in (0, 1):  # true and false are
        raise ValueError(f"column {name!r} must be true or false, found {row[name]!r:.80}")
    return _text(row, "question") + "?", list(_BOOLQ_OPTIONS), 0 if row[name] else 1


def _piqa(row: dict[str, Any]) -> _Parts:
    return _text(row, "goal"), [_text(row, "sol1"), _text(row, "sol2")], _number(row, "label")


def _social_i_qa(row: dict[str, Any]) -> _Parts:
    options = [_text(row, f"answer{letter}") for letter in "ABC"]
    return f"{_text(row, 'context')} {_text(row, 'question')}", options, _number(row, "label") - 1


def _hellaswag(row: dict[str, Any]) -> _Parts:
    return f"{_text(row, 'activity_label')}: {_text(row, 'ctx')}", _texts(row, "endings"), _number(row, "label")


def _winogrande(row: dict[str, Any]) -> _Parts:
    return _text(row, "sentence"), [_text(row, "option1"), _text(row, "option2")], _number(row, "answer") - 1


def _arc(row: dict[str, Any]) -> _Parts:
    choices, key = row["choices"], _text(row, "answerKey").strip()
    if not isinstance(choices, dict):
        raise ValueError(f"column 'choices' must hold texts and labels, found {choices!r:.80}")
    texts, labels = _texts(choices, "text"), _texts(choices, "label")
    if len(texts) != len(labels) or key not in labels:
        raise ValueError(f"column 'answerKey' must be the label of one of {len(texts)} choices, found {key!r:.80}")
    return _text(row, "question"), texts, labels.index(key)


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise ValueError(f"column {name!r} must be text, found {row[name]!r:.80}")
    return row[name]


def _texts(row: dict[str, Any], name: str) -> list[str]:
    value = row[name]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"column {name!r} must be a list of texts, found {value!r:.80}")
    return value


def _number(row: dict[str, Any], name: str) -> int:
    """A whole number, which some data sets write as text; "" where answers are hidden."""
    value = row[name]
    if isinstance(value, int | str) and re.fullmatch(r"-?\d{1,9}", str(value)):
        return int(value)
    raise ValueError(f"column {name!r} must be the number of the answer, found {value!r:.80}")


def _openbookqa(row: dict[str, Any]) -> _Parts:
    return _arc({**row, "question": row["question_stem"]})


_HUB_READERS = {
    "boolq": _boolq,
    "piqa": _piqa,
    "social_i_qa": _social_i_qa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "ARC-Challenge": _arc,
    "ARC-Easy": _arc,
    "openbookqa": _openbookqa,
}

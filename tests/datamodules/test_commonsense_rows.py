import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import (
    ARC_OR_OPENBOOKQA,
    TASKS,
    answer_labels,
    parse_hub_row,
    parse_row,
    recognise_task,
    render_row,
)
from tests.datamodules.commonsense_examples import HUB_ROWS, INSTRUCTIONS, QUESTIONS, row_of


@pytest.mark.parametrize("task", TASKS)
def test_the_three_forms_of_a_question_agree(task: str) -> None:
    assert parse_row(row_of(task), task) == QUESTIONS[task]
    assert render_row(QUESTIONS[task]) == row_of(task)
    assert parse_hub_row(HUB_ROWS[task], task) == QUESTIONS[task]


def test_boolq_of_superglue() -> None:
    assert parse_hub_row({"question": "is ice cold", "passage": "", "label": 1}, "boolq").answer == 0
    assert parse_hub_row({"question": "is ice cold", "passage": "", "label": 0}, "boolq").answer == 1


@pytest.mark.parametrize("task", ["boolq", "ARC-Challenge", "ARC-Easy", "openbookqa"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_real_row_is_parsed_and_rendered_byte_for_byte(real_data: Path, task: str, split: str) -> None:
    rows = json.loads((real_data / task / f"{split}.json").read_text(encoding="utf-8"))
    unlike = [row for row in rows if render_row(parse_row(row, task)) != row]
    assert len(rows) >= 500
    assert unlike == []


def test_real_rows_are_recognised_but_for_arc_rows_of_three_options(real_data: Path) -> None:
    found = {
        task: [recognise_task(row) for row in json.loads((real_data / task / "test.json").read_text(encoding="utf-8"))]
        for task in ("boolq", "ARC-Challenge", "ARC-Easy", "openbookqa")
    }
    assert set(found["boolq"]) == {"boolq"}
    assert set(found["openbookqa"]) == {ARC_OR_OPENBOOKQA}
    # rows with three options, counted in the files
    assert found["ARC-Challenge"].count("social_i_qa") == 4
    assert found["ARC-Easy"].count("social_i_qa") == 7
    assert set(found["ARC-Challenge"]) == set(found["ARC-Easy"]) == {ARC_OR_OPENBOOKQA, "social_i_qa"}


def test_tasks_are_recognised() -> None:
    arc = ARC_OR_OPENBOOKQA
    expected = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", arc, "social_i_qa", arc]
    assert [recognise_task(row_of(task)) for task in TASKS] == expected
    assert recognise_task({"instruction": "Pick one. Answer format: a/b"}) is None


def test_labels_of_a_row_in_another_format() -> None:
    assert answer_labels("Is it good?\nAnswer format: good/bad/not-sure\n") == ("good", "bad", "not-sure")
    with pytest.raises(ValueError, match=r"must end in the valid labels.*it ends in 'Is it good\?'"):
        answer_labels("Is it good?")


def test_options_that_cannot_be_told_apart_are_an_error() -> None:
    row = row_of("openbookqa")
    row["instruction"] = row["instruction"].replace("a star", "a star Answer3: of")
    with pytest.raises(ValueError, match="' Answer3: ' stands 2 times"):
        parse_row(row, "openbookqa")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "answer9"}, r"must be one of answer1/answer2/answer3/answer4, found 'answer9'"),
        ({"answer": None}, r"field 'answer' must be text, found NoneType"),
        ({"instruction": INSTRUCTIONS["piqa"]}, r"is not in the format of openbookqa"),
        (
            {"instruction": "Please choose the correct answer to the question: x\n\nAnswer format: a/b"},
            r"the labels of openbookqa are answer1/answer2/..., found a/b",
        ),
    ],
)
def test_rows_that_are_not_of_the_task(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_row({**row_of("openbookqa"), **change}, "openbookqa")


def test_hub_rows_without_a_column_or_an_answer() -> None:
    with pytest.raises(ValueError, match="column 'sol2' is missing for piqa; the row has 'goal', 'sol1'"):
        parse_hub_row({"goal": "a", "sol1": "b"}, "piqa")
    with pytest.raises(ValueError, match="must be one of its 2 options, found number 0"):
        parse_hub_row({**HUB_ROWS["piqa"], "label": -1}, "piqa")
    with pytest.raises(ValueError, match="column 'label' must be the number of the answer"):
        parse_hub_row({**HUB_ROWS["hellaswag"], "label": ""}, "hellaswag")

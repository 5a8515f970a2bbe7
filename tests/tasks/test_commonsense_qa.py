"""Answers are read as LLM-Adapters reads them, and accuracies are those counted by hand."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from dora_lightning.data import Sample
from tasks import CommonsenseQA
from tasks.commonsense import extract_answer

LABELS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}


def label_sample(source: str, answer: str) -> Sample:
    options = tuple(f"the correct answer is {label}" for label in LABELS[source])
    return Sample("...", f"the correct answer is {answer}", options, (answer,), source=source, row={"answer": answer})


@pytest.mark.parametrize("source", LABELS)
def test_every_label_is_read(source: str) -> None:
    for label in LABELS[source]:
        sample = label_sample(source, LABELS[source][0])
        assert extract_answer(f"the correct answer is {label}", sample) == label
        assert extract_answer(f"  {label}\n and more", sample) == label


@pytest.mark.parametrize(("source", "other"), [("boolq", "answer1"), *((s, "true") for s in LABELS if s != "boolq")])
def test_labels_of_other_data_sets_are_no_answer(source: str, other: str) -> None:
    assert extract_answer(f"the correct answer is {other}", label_sample(source, LABELS[source][0])) == ""


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("boolq", "false, although true is near", "false"),  # the first match counts
        ("boolq", "True", ""),  # case-sensitive
        ("boolq", "untrue", "true"),  # no word boundary
        ("piqa", "solution3", ""),
        ("hellaswag", "ending5", ""),
        ("winogrande", "option12", "option1"),
        ("ARC-Easy", "answer6 answer5", "answer5"),
        ("social_i_qa", "answer5", "answer5"),  # the published pattern knows five labels for all of these
        ("openbookqa", "", ""),
        ("ARC-Challenge", "answer1 ### Response: answer2", "answer2"),  # what follows the last heading
        ("ARC-Challenge", "### Response: answer3 ### Response:\n answer4", "answer4"),
    ],
)
def test_published_rules(source: str, text: str, expected: str) -> None:
    assert extract_answer(text, label_sample(source, LABELS[source][0])) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" a star", "a star"),
        (" It is blue, not a star", "blue"),  # the first that occurs
        (" a star fish", "a star fish"),  # the longest that begins there
        (" nothing of these", ""),
        ("", ""),
    ],
)
def test_option_texts_are_searched_where_there_are_no_labels(text: str, expected: str) -> None:
    options = (" a star", " blue", " a star fish", " small")
    assert extract_answer(text, Sample("...", " blue", options, ("blue",), source="openbookqa")) == expected
    assert extract_answer(text, Sample("...", " blue", options, ("blue",), source="a data set of my own")) == expected


SAMPLES = [
    label_sample("boolq", "true"),
    label_sample("boolq", "false"),
    label_sample("boolq", "true"),
    label_sample("piqa", "solution2"),
]
TEXTS = ["true", "true", "who knows", "solution2"]


def test_accuracy_by_generation() -> None:
    task = CommonsenseQA("generation")
    task.update(SAMPLES[:3], TEXTS[:3])
    task.update(SAMPLES[3:], TEXTS[3:])
    assert {name: round(float(value), 6) for name, value in task.compute().items()} == {
        "boolq/generation": round(1 / 3, 6),  # one right, one wrong, one unparsed, which counts as wrong
        "piqa/generation": 1.0,
        "mean/generation": round((1 / 3 + 1) / 2, 6),  # data sets weigh alike: 2 of 4 would be 0.5
        "boolq/unparsed": round(1 / 3, 6),
        "piqa/unparsed": 0.0,
        "mean/unparsed": round(1 / 6, 6),
    }


def test_accuracy_by_ranking_and_per_character() -> None:
    options = (" no", " a much longer option")  # 3 and 21 characters
    right_is_long = Sample("...", options[1], options, (options[1].strip(),), source="mine")
    right_is_short = Sample("...", options[0], options, (options[0].strip(),), source="mine")
    task = CommonsenseQA("ranking")
    assert task.generation is None
    # per character: -2 / 3 = -0.67 and -7 / 21 = -0.33
    scores = torch.tensor([-2.0, -7.0])
    task.update([right_is_long, right_is_short, right_is_short], scores=[scores, scores, torch.tensor([-2.0, -21.0])])
    metrics = task.compute()
    assert metrics["mine/ranking"] == pytest.approx(2 / 3)
    assert metrics["mine/ranking_norm"] == pytest.approx(2 / 3)
    flags = [(record["ranked"], record["ranked_flag"]) for record in task.records()]
    assert flags == [("no", False), ("no", True), ("no", True)]
    task.reset()
    task.update([right_is_long], scores=[scores])
    assert (task.compute()["mine/ranking"], task.compute()["mine/ranking_norm"]) == (0.0, 1.0)


def test_both_judges_and_the_records() -> None:
    task = CommonsenseQA("both", num_beams=2, max_new_tokens=5)
    assert task.generation == {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    task.update(SAMPLES[:1], ["it is true"], [torch.tensor([-3.0, -1.0])])
    assert task.records() == [
        {
            "source": "boolq",
            "answer": "true",
            "output_pred": "it is true",
            "pred": "true",
            "flag": True,
            "log_likelihoods": [-3.0, -1.0],
            "ranked": "the correct answer is false",
            "ranked_flag": False,
        }
    ]
    assert task.compute().keys() == {
        f"{source}/{measure}"
        for source in ("boolq", "mean")
        for measure in ("generation", "unparsed", "ranking", "ranking_norm")
    }
    task.reset()
    assert task.records() == []


def render(table: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_shows_data_sets_in_rows_and_the_mean_last() -> None:
    task = CommonsenseQA("generation")
    task.update(SAMPLES, TEXTS)
    lines = [line.split() for line in render(task.table(task.compute())).splitlines()]
    rows = [[cell for cell in line if cell not in "│┃"] for line in lines if line and line[0] in "│┃"]
    assert rows == [
        ["data", "set", "generation", "unparsed"],
        ["boolq", "33.3", "33.3"],
        ["piqa", "100.0", "0.0"],
        ["mean", "66.7", "16.7"],
    ]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="judge must be one of generation, ranking, both, got 'vote'"):
        CommonsenseQA("vote")
    sample = Sample("...", " red", (" blue", " green"), source="mine")
    with pytest.raises(ValueError, match=r"mine: the target ' red' is not among the options"):
        CommonsenseQA("ranking").update([sample], scores=[torch.zeros(2)])

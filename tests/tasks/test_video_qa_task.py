"""Questions about videos: what is read, what it scores, and what VALUE's server gets."""

import json
from typing import Any

import pytest
import torch

from dora_lightning.data import Sample
from tasks.video_qa import VideoQA

CHOICES = ["in the oven", "in the fridge", "on the grill", "in a cooler"]


def labelled(answer: int | None = None, qid: Any = 1, source: str = "how2qa") -> Sample:
    """As VL-BART is asked: what a label stands for is in the prompt."""
    references = () if answer is None else (f"a{answer}",)
    options = tuple(f"a{number}" for number in range(4))
    row = {"qid": qid, "question": "Where?", "choices": CHOICES}
    return Sample("[Q] Where?", next(iter(references), ""), options, references, source=source, row=row)


def lettered(answer: str = "", qid: Any = 1, source: str = "how2qa") -> Sample:
    """As LLaVA is asked."""
    options = tuple(f" {letter}</s>" for letter in "ABCD")
    row = {"qid": qid, "question": "Where?", "choices": CHOICES, "letters": True}
    references, target = ((answer,), f" {answer}</s>") if answer else ((), "")
    return Sample("USER: Where? ASSISTANT:", target, options, references, source=source, row=row)


def submission(task: VideoQA, source: str = "how2qa") -> Any:
    return json.loads(task.files(task.records())[f"{source}_submission.json"])


@pytest.mark.parametrize(
    ("text", "read", "submitted"),
    [
        ("a2", "a2", 2),
        (" a2 ", "a2", 0),
        ("a0", "a0", 0),
        # what VL-Adapter submits is more lenient than what it scores
        ("a2.", "", 2),
        ("b3", "", 3),
        ("a9", "", 0),
        ("a4", "", 0),
        ("a", "", 0),
        ("", "", 0),
        ("a²", "", 0),
        ("on the grill", "", 0),
    ],
)
def test_labels_are_read_as_published(text: str, read: str, submitted: int) -> None:
    task = VideoQA()
    task.update([labelled(2)], texts=[text])
    (record,) = task.records()
    assert record["pred"] == read
    assert record["score"] == float(read == "a2")
    assert submission(task) == {"1": submitted}


@pytest.mark.parametrize(
    ("text", "read", "submitted"),
    [
        ("C", "C", 2),
        (" C", "C", 2),
        ("C. on the grill", "C", 2),
        ("(B)", "B", 1),
        ("On the grill.", "C", 2),
        ("E", "", 0),
    ],
)
def test_letters_are_read_by_letter_or_content(text: str, read: str, submitted: int) -> None:
    task = VideoQA()
    task.update([lettered("C")], texts=[text])
    assert task.records()[0]["pred"] == read
    assert task.records()[0]["score"] == float(read == "C")
    assert submission(task) == {"1": submitted}


def test_accuracy_majority_and_what_could_not_be_read() -> None:
    task = VideoQA()
    answers = [0, 0, 0, 1, 2]
    task.update([labelled(answer) for answer in answers], texts=["a0", "a1", "no", "a1", "a2"])
    task.update([lettered("A", source="tvqa"), lettered("B", source="tvqa")], texts=["A", "A"])
    results = {name: pytest.approx(float(value)) for name, value in task.compute().items()}
    assert results == {
        "how2qa/accuracy": 3 / 5,
        "how2qa/unparsed": 1 / 5,
        "how2qa/majority": 3 / 5,
        "tvqa/accuracy": 1 / 2,
        "tvqa/unparsed": 0,
        "tvqa/majority": 1 / 2,
        "mean/accuracy": (3 / 5 + 1 / 2) / 2,
    }


def test_ranking_alone_and_with_generation() -> None:
    likely = [torch.tensor([-3.0, -1.0, -2.0, -4.0]), torch.tensor([-1.0, -2.0, -3.0, -4.0])]
    task = VideoQA(judge="ranking")
    assert task.generation is None
    assert task.ranks_options
    task.update([labelled(1, qid=7), lettered("C", qid=8)], scores=likely)
    assert [record["ranked"] for record in task.records()] == ["a1", "A"]
    assert float(task.compute()["how2qa/ranking"]) == 0.5
    assert submission(task) == {"7": 1, "8": 0}
    task = VideoQA(judge="both")
    task.update([labelled(1)], texts=["a3"], scores=likely[:1])
    results = task.compute()
    assert (float(results["how2qa/accuracy"]), float(results["how2qa/ranking"])) == (0, 1)
    # what was generated is what is submitted
    assert submission(task) == {"1": 3}


def test_hidden_answers_are_submitted_and_not_scored() -> None:
    task = VideoQA()
    task.update([labelled(qid=10), labelled(qid=9), lettered(qid=2, source="tvqa")], texts=["a3", "a1", "D"])
    assert task.compute() == {}
    assert [record["score"] for record in task.records()] == [None] * 3
    assert submission(task) == {"9": 1, "10": 3}
    assert submission(task, "tvqa") == {"2": 3}
    # the likeliest one is known without the template's end of an answer
    task = VideoQA(judge="ranking")
    task.update([lettered(qid=3)], scores=[torch.tensor([-3.0, -1.0, -2.0, -4.0])])
    assert submission(task) == {"3": 1}


def test_short_answers_have_no_submission() -> None:
    task = VideoQA()
    asked = Sample("What?", " red</s>", references=("red",), source="mine", row={"qid": 1, "question": "What?"})
    task.update([asked, asked], texts=["Red.", "blue"])
    assert float(task.compute()["mine/accuracy"]) == 0.5
    assert task.files(task.records()) == {}


def test_options() -> None:
    assert VideoQA().generation == {"max_new_tokens": 20, "num_beams": 1, "do_sample": False}
    with pytest.raises(ValueError, match="judge must be one of generation, ranking, both, got 'gpt'"):
        VideoQA(judge="gpt")
    task = VideoQA(submissions=False)
    task.update([labelled(1)], texts=["a1"])
    assert task.files(task.records()) == {}


def test_reset() -> None:
    task = VideoQA()
    task.update([labelled(1)], texts=["a1"])
    task.reset()
    assert (task.compute(), task.records(), task.files([])) == ({}, [], {})

"""The task on batches: what is generated and ranked, what a record holds, what is refused."""

import importlib.util
import json
from typing import Any

import pytest
import torch

from dora_lightning.data import Sample
from tasks import VQA


def sample(source: str, *references: str, target: str = "", ranked: tuple[str, ...] = (), **row: Any) -> Sample:
    asked = {"question_id": 1, "question": "What?", **row}
    return Sample("USER: What? ASSISTANT:", target, ranked, references, source=source, row=asked)


def letter(answer: str, end: str = "</s>", **row: Any) -> Sample:
    row = {"choices": ["iron", "wood", "glass"], "has_image": True, **row}
    options = tuple(f" {option}{end}" for option in "ABC")
    return sample("scienceqa", answer, target=f" {answer}{end}", ranked=options, **row)


def test_a_record_holds_the_row_what_was_generated_what_was_read_and_its_score() -> None:
    task = VQA()
    assert task.generation == {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    assert not task.ranks_options
    task.update([sample("vqav2", *["2"] * 2, *["dogs"] * 8, image_id=3)], [" Two.\n"])
    assert task.records() == [
        {
            "question_id": 1,
            "question": "What?",
            "image_id": 3,
            "source": "vqav2",
            "references": ["2"] * 2 + ["dogs"] * 8,
            "output_pred": " Two.\n",
            "pred": "Two.",
            "score": pytest.approx(0.6),
        }
    ]
    assert json.loads(json.dumps(task.records())) == task.records()
    task.reset()
    assert task.records() == []
    assert task.compute() == {}


def test_the_variant_that_is_named_scores() -> None:
    agreed = sample("vqav2", *["cat"] * 10)
    for variants, expected in ((None, 0.0), ({"vqav2": "lmms"}, 1.0)):
        task = VQA(variants=variants)
        task.update([agreed], ["Cat"])
        assert task.compute()["vqav2/accuracy"] == expected


def test_ranking_reads_the_likeliest_option_without_what_ends_it() -> None:
    task = VQA("ranking")
    assert task.generation is None
    assert task.ranks_options
    task.update([letter("B"), letter("C")], scores=[torch.tensor([-2.0, -1.0, -3.0])] * 2)
    assert [(record["ranked"], record["ranked_score"]) for record in task.records()] == [("B", 1.0), ("B", 0.0)]
    assert task.records()[0]["log_likelihoods"] == [-2.0, -1.0, -3.0]
    assert task.compute() == {"scienceqa/ranking": 0.5, "scienceqa/ranking_overall": 0.5, "mean/ranking": 0.5}
    answer = sample("pope_random", "yes", target="Yes<|im_end|>", ranked=("Yes<|im_end|>", "No<|im_end|>"))
    task.update([answer], scores=[torch.tensor([-2.0, -1.0])])
    assert task.records()[-1]["ranked"] == "No"


def test_both_judges_rank_those_that_have_options() -> None:
    task = VQA("both")
    task.update([letter("B"), sample("gqa", "left")], ["A", "left"], [torch.tensor([-2.0, -1.0, -3.0]), torch.zeros(0)])
    results = task.compute()
    assert (results["scienceqa/accuracy"], results["scienceqa/ranking"]) == (0.0, 1.0)
    assert (results["mean/accuracy"], results["mean/ranking"]) == (0.5, 1.0)
    assert "gqa/ranking" not in results
    assert task.records()[0]["pred"] == "A"


def test_hidden_answers_are_kept_and_not_scored() -> None:
    task = VQA("both")
    hidden = letter("B")._replace(references=(), target="")
    task.update([hidden, sample("vqav2")], ["A", "red"], [torch.tensor([-2.0, -1.0, -3.0]), torch.zeros(0)])
    assert task.compute() == {}
    assert [record["score"] for record in task.records()] == [None, None]
    assert task.records()[0]["ranked_score"] is None
    assert [record["pred"] for record in task.records()] == ["A", "red"]
    # among others whose truth is known
    task.update([sample("gqa", "left"), sample("gqa")], ["left", "right"], [torch.zeros(0)] * 2)
    assert (task.compute()["gqa/accuracy"], task.compute()["gqa/majority"]) == (1.0, 1.0)


def test_what_cannot_be_read_is_wrong_and_counted() -> None:
    task = VQA()
    people = sample("vizwiz", *[""] * 10)  # who gave no answer
    task.update([people, letter("B"), letter("B"), sample("easy_vqa_shape", "circle")], [" ", "hm", "B", "\n"])
    results = task.compute()
    assert [record["pred"] for record in task.records()] == ["", "", "B", ""]
    assert (results["vizwiz/accuracy"], results["vizwiz/unparsed"]) == (0.0, 1.0)
    assert (results["scienceqa/accuracy"], results["scienceqa/unparsed"]) == (0.5, 0.5)
    assert (results["easy_vqa/accuracy"], results["easy_vqa/unparsed"]) == (0.0, 1.0)


def test_rows_tell_the_measures_what_they_need() -> None:
    task = VQA(submissions=False)
    options = {"A": "a boat", "B": "a hat"}
    for index, text in ((7, "A"), (1_000_007, "B"), (8, "A")):
        task.update(
            [sample("mmbench", "A", index=index, options=options, category="maps", l2_category="logic")], [text]
        )
    task.update([letter("B", has_image=False), letter("B")], ["A", "B"])
    # the most frequent answer is so after its normalisation
    task.update([sample("easy_vqa_yes_no", answer) for answer in ("Yes", "yes", "no")], ["yes", "yes", "yes"])
    task.update([sample("pope_random", "no"), sample("pope_random", "yes")], ["No.", "no"])
    results = task.compute()
    assert results["mmbench/accuracy"] == results["mmbench/maps/accuracy"] == results["mmbench/logic/accuracy"] == 0.5
    assert (results["scienceqa/accuracy"], results["scienceqa/overall"]) == (1.0, 0.5)
    assert results["easy_vqa/majority"] == pytest.approx(2 / 3)
    assert (results["pope_random/accuracy"], results["pope_random/yes_ratio"], results["pope/f1"]) == (0.5, 0.0, 0.0)
    # MMBench 1/2, ScienceQA 1, easy-VQA 2/3, POPE's F1 0
    assert results["mean/accuracy"] == pytest.approx((1 / 2 + 1 + 2 / 3 + 0) / 4)


def test_a_sample_without_a_row_is_recorded_by_its_prompt() -> None:
    task = VQA()
    task.update([Sample("What?", "a", references=("a",), source="mine")], ["a"])
    assert task.records()[0]["prompt"] == "What?"
    assert task.compute()["mine/accuracy"] == 1.0


def test_a_row_does_not_rename_its_source() -> None:
    task = VQA()
    row = {"source": "web", "references": "none"}
    task.update([sample("gqa", "left")._replace(row=row)], ["left"])
    assert (task.records()[0]["source"], task.records()[0]["references"]) == ("gqa", ["left"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "vote"}, "judge must be one of generation, ranking, both, got 'vote'"),
        ({"picture": -1}, "picture must be at least 0, found -1"),
        ({"variants": {"vqav2": "strict"}}, "vqav2 is judged by one of official, .*, got 'strict'"),
    ],
)
def test_unknown_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQA(**options)


def test_what_cannot_be_ranked_is_an_error() -> None:
    with pytest.raises(ValueError, match="gqa: a sample has no options to rank; use judge: generation or both"):
        VQA("ranking").update([sample("gqa", "left")], scores=[torch.zeros(0)])
    with pytest.raises(ValueError, match=r"scienceqa: the target ' D' is not among the options"):
        VQA("ranking").update([letter("B")._replace(target=" D")], scores=[torch.zeros(3)])


def test_a_label_of_pope_that_is_no_label_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="a label of POPE is 'yes' or 'no', got 'Yes'"):
        VQA().update([sample("pope_random", "Yes")], ["yes"])


def test_a_missing_openpyxl_is_noticed_before_the_test_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    question = sample("mmbench", "A", index=7, options={"A": "a boat", "B": "a hat"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"install dora-lightning\[submissions\], or set submissions: false"):
        VQA().update([question], ["A"])
    task = VQA(submissions=False)
    task.update([question], ["A"])
    assert task.files(task.records()) == {}

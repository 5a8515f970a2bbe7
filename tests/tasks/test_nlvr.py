"""NLVR2: accuracy and consistency as the official evaluation counts them, its file, and what is refused."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dora_lightning.data import Sample
from tasks import NLVR

REAL = Path(__file__).parents[3] / "shared/data/nlvr2/dev_first300.json"
WORDS = ("true", "false")


def statement(identifier: Any, *truth: str, options: tuple[str, ...] = WORDS, source: str = "nlvr2") -> Sample:
    target = truth[0] if truth else ""
    row = {"identifier": identifier, "sentence": "Two dogs."}
    return Sample("nlvr: Two dogs.", target, options, truth, source=source, row=row)


def ranked(*answers: str, options: tuple[str, ...] = WORDS) -> list[torch.Tensor]:
    """Log-likelihoods by which each answer is the likelier one."""
    return [torch.tensor([-1.0 if option.startswith(answer) else -2.0 for option in options]) for answer in answers]


def floats(results: dict[str, Any]) -> dict[str, float]:
    return {name: round(float(value), 4) for name, value in results.items()}


def test_a_sentence_is_consistent_if_it_is_right_with_all_pairs() -> None:
    task = NLVR()
    assert task.generation is None
    assert task.ranks_options
    # sentence 1 of set 850: three pairs, one wrong; sentence 0 of that set; sentence 1 of another set
    rows = [("dev-850-0-1", "true"), ("dev-850-1-1", "true"), ("dev-850-2-1", "false")]
    rows += [("dev-850-0-0", "true"), ("dev-896-0-1", "false")]
    task.update([statement(*row) for row in rows], scores=ranked("true", "false", "false", "true", "false"))
    expected = {"accuracy": 0.8, "consistency": 0.6667, "majority": 0.6}
    assert floats(task.compute()) == {
        f"{of}/{name}": value for of in ("nlvr2", "mean") for name, value in expected.items()
    }
    task.reset()
    assert (task.compute(), task.records()) == ({}, [])


def official(predictions: str, examples: list[dict[str, Any]]) -> tuple[float, float]:
    """Accuracy and consistency by the rules of the official evaluation, sentence by sentence of the file."""
    answers = dict(line.split(",") for line in predictions.split())
    right = {example["identifier"]: answers[example["identifier"]] == example["label"] for example in examples}
    by_sentence: dict[str, list[bool]] = {}
    for example in examples:
        by_sentence.setdefault(example["sentence"], []).append(right[example["identifier"]])
    return sum(right.values()) / len(right), sum(map(all, by_sentence.values())) / len(by_sentence)


@pytest.mark.skipif(not REAL.is_file(), reason="needs rows of NLVR2's dev set")
def test_real_rows_are_grouped_by_their_sentences() -> None:
    examples = [json.loads(line) for line in REAL.read_text().splitlines()]
    task = NLVR()
    generator = torch.Generator().manual_seed(0)
    for example in examples:
        # right four times out of five
        right = torch.rand((), generator=generator) < 0.8
        label = example["label"].lower()
        answer = label if right else {"true": "false", "false": "true"}[label]
        task.update([statement(example["identifier"], label)], scores=ranked(answer))
    accuracy, consistency = official(task.files(task.records())["nlvr2_predictions.csv"].decode(), examples)
    results = floats(task.compute())
    assert 0.3 < consistency < 0.7 < accuracy < 0.9
    assert results["nlvr2/accuracy"] == round(accuracy, 4)
    assert results["nlvr2/consistency"] == round(consistency, 4)
    assert results["nlvr2/majority"] == round(155 / 300, 4)


def test_a_row_counts_once() -> None:
    task = NLVR()
    samples = [statement("dev-1-0-0", "true"), statement("dev-2-0-0", "true")]
    task.update(samples, scores=ranked("true", "false"))
    task.update([samples[1], samples[1]], scores=ranked("true", "true"))
    assert floats(task.compute())["nlvr2/accuracy"] == 0.5
    assert task.files(task.records()) == {"nlvr2_predictions.csv": b"dev-1-0-0,True\ndev-2-0-0,False\n"}


def test_the_options_may_come_in_any_order_and_with_an_end() -> None:
    options = (" False</s>", " True</s>")
    task = NLVR()
    task.update([statement("test1-0-1-0", "true", options=options)], scores=[torch.tensor([-2.0, -1.0])])
    assert floats(task.compute())["nlvr2/accuracy"] == 1.0
    assert task.records() == [
        {
            "identifier": "test1-0-1-0",
            "sentence": "Two dogs.",
            "source": "nlvr2",
            "references": ["true"],
            "log_likelihoods": [-2.0, -1.0],
            "ranked": "true",
            "ranked_score": 1.0,
        }
    ]


def test_hidden_truths_are_judged_and_not_scored() -> None:
    task = NLVR()
    task.update([statement("test2-10-0-0"), statement("test2-9-0-0")], scores=ranked("true", "false"))
    assert task.compute() == {}
    assert [record["ranked_score"] for record in task.records()] == [None, None]
    assert task.files(task.records()) == {"nlvr2_predictions.csv": b"test2-9-0-0,False\ntest2-10-0-0,True\n"}
    assert NLVR(submissions=False).files(task.records()) == {}


def test_the_table() -> None:
    task = NLVR()
    task.update([statement("dev-1-0-0", "true"), statement("dev-1-1-0", "false")], scores=ranked("true", "true"))
    console = Console(file=io.StringIO(), width=80)
    console.print(task.table(task.compute()))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    cells = [line.split() for line in lines if line.strip() and "─" not in line]
    assert cells == [
        ["True", "or", "false", "(%)"],
        ["data", "set", "accuracy", "consistency", "majority"],
        ["nlvr2", "50.0", "0.0", "50.0"],
        ["mean", "50.0", "0.0", "50.0"],
    ]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (statement("dev-850-1", "true"), "nlvr2: a row's 'identifier' is split-set-pair-sentence, .*'dev-850-1'"),
        (statement(None, "true"), "'identifier' is split-set-pair-sentence, .* got None"),
        (statement("dev-1-0-0", "true")._replace(row=None), "'identifier' is .* got None"),
        (statement("dev-1-0-0", "1"), "nlvr2: expected 'true' or 'false', got '1'"),
        (statement("dev-1-0-0", "true", options=("yes", "no")), "nlvr2: expected 'true' or 'false', got 'yes'"),
        (statement("dev-1-0-0", "true", options=("true", "True")), r"the options are 'true' and 'false', got \('true'"),
        (statement("dev-1-0-0", "true", options=()), r"the options are 'true' and 'false', got \(\)"),
    ],
)
def test_what_cannot_be_judged_is_an_error(sample: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NLVR().update([sample], scores=[torch.tensor([-1.0, -2.0])])


def test_options_have_to_be_ranked() -> None:
    with pytest.raises(ValueError, match="NLVR judges by the options' log-likelihoods, and none were computed"):
        NLVR().update([statement("dev-1-0-0", "true")], texts=["true"])

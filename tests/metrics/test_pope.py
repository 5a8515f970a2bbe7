"""POPE's reading and scores: by hand, against torchmetrics' binary metrics, and on POPE's own file where it is."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_f1_score,
    binary_precision,
    binary_recall,
)

from dora_lightning.metrics import POPE, pope_scores, read_yes_no

REAL_FILE = Path(__file__).parents[3] / "shared" / "data" / "pope" / "coco_pope_random.json"


def floats(scores: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("Yes.", "yes"),
        ("No.", "no"),
        ("No, there is no dog.", "no"),
        ("no,", "no"),
        ("Yes, there is a dog. It has no collar.", "yes"),  # the first sentence counts
        ("There is a dog. Not a cat.", "yes"),
        ("There is not a dog in the image", "no"),
        ("There is\nno dog", "yes"),  # only spaces part words
        ("NO", "yes"),  # these three words as they are written
        ("Not really", "yes"),
        ("none", "yes"),
        ("Nothing", "yes"),
        ("there isn't", "yes"),
        ("no!", "yes"),
        ("(no)", "yes"),
        (". no", "yes"),
        ("", "yes"),
        ("I do,not know", "yes"),  # the comma is removed, not replaced
        ("yes or no", "no"),
    ],
)
def test_reading_by_hand(text: str, expected: str) -> None:
    assert read_yes_no(text) == expected
    assert read_yes_no(read_yes_no(text)) == expected


# texts and labels: 3 true positives, 2 false positives, 4 true negatives, 1 false negative
TEXTS = ["Yes", "yes.", "Yes, it is", "Yes", "a dog", "No", "no.", "No, none", "not here", "No"]
LABELS = ["yes", "yes", "yes", "no", "no", "no", "no", "no", "no", "yes"]


def test_scores_by_hand() -> None:
    assert floats(pope_scores(TEXTS, LABELS)) == pytest.approx(
        {"accuracy": 0.7, "precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9, "yes_ratio": 0.5}
    )
    # the share of yes is of the predictions, not of the labels
    assert float(pope_scores(["yes"] * 4, ["yes"] + ["no"] * 3)["yes_ratio"]) == 1.0
    assert float(pope_scores(["no"] * 4, ["yes"] + ["no"] * 3)["yes_ratio"]) == 0.0


@pytest.mark.parametrize(
    ("texts", "labels", "expected"),
    [
        (["no", "no"], ["yes", "no"], {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}),
        (["yes", "no"], ["no", "no"], {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0.5}),
        (["no"], ["no"], {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}),
        (["yes"], ["yes"], {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes_ratio": 1}),
    ],
)
def test_a_ratio_of_nothing_is_zero(texts: list[str], labels: list[str], expected: dict[str, float]) -> None:
    assert floats(pope_scores(texts, labels)) == expected


def answers_to(labels: list[str], seed: int, skill: float) -> tuple[list[str], list[bool]]:
    """Texts that a model could give, and whether each means yes."""
    draw = random.Random(seed)
    yes = ["Yes", "yes", "Yes.", "Yes, there is.", "There is. No doubt.", "yes it is"]
    no = ["No", "no", "No.", "No, there is no such thing.", "There is not", "It is no dog, is it"]
    texts, meant = [], []
    for label in labels:
        says_yes = (label == "yes") == (draw.random() < skill)
        meant.append(says_yes)
        texts.append(draw.choice(yes if says_yes else no))
    return texts, meant


def expected_scores(meant: list[bool], labels: list[str]) -> dict[str, float]:
    predicted, actual = torch.tensor(meant).int(), torch.tensor([label == "yes" for label in labels]).int()
    return {
        "accuracy": float(binary_accuracy(predicted, actual)),
        "precision": float(binary_precision(predicted, actual)),
        "recall": float(binary_recall(predicted, actual)),
        "f1": float(binary_f1_score(predicted, actual)),
        "yes_ratio": sum(meant) / len(meant),
    }


@pytest.mark.parametrize(("seed", "skill"), [(0, 0.9), (1, 0.5), (2, 0.2), (3, 1.0)])
def test_generated_answers_against_torchmetrics(seed: int, skill: float) -> None:
    labels = random.Random(seed).choices(["yes", "no"], weights=[1, 3], k=700)
    texts, meant = answers_to(labels, seed, skill)
    assert floats(pope_scores(texts, labels)) == pytest.approx(expected_scores(meant, labels))


def test_splits_and_the_mean_of_their_f1() -> None:
    splits = {"random": 0.95, "popular": 0.8, "adversarial": 0.7}
    rows, expected = [], {}
    for seed, (split, skill) in enumerate(splits.items()):
        labels = random.Random(seed).choices(["yes", "no"], k=100 + 50 * seed)
        texts, meant = answers_to(labels, seed, skill)
        rows += [(text, label, split) for text, label in zip(texts, labels, strict=True)]
        expected |= {f"{split}/{name}": value for name, value in expected_scores(meant, labels).items()}
    expected["f1"] = sum(expected[f"{split}/f1"] for split in splits) / 3  # not of all answers together
    random.Random(0).shuffle(rows)
    metric = POPE()
    for start in range(0, len(rows), 60):
        texts, labels, names = (list(column) for column in zip(*rows[start : start + 60], strict=True))
        metric(texts, labels, names)  # forward: update, and the batch by itself
    assert floats(metric.compute()) == pytest.approx(expected)
    assert expected["f1"] != pytest.approx(
        float(pope_scores([r[0] for r in rows], [r[1] for r in rows])["f1"]), abs=1e-4
    )
    metric.reset()
    metric.update(TEXTS, LABELS, ["random"] * 10)
    assert floats(metric.compute())["f1"] == pytest.approx(6 / 9)


@pytest.mark.skipif(not REAL_FILE.is_file(), reason="POPE's coco_pope_random.json is not there")
@pytest.mark.parametrize("skill", [0.0, 0.85, 1.0])
def test_popes_own_file(skill: float) -> None:
    labels = [json.loads(line)["label"] for line in REAL_FILE.read_text().splitlines()]
    assert len(labels) > 2900
    assert set(labels) == {"yes", "no"}
    texts, meant = answers_to(labels, 0, skill)
    metric = POPE()
    for start in range(0, len(labels), 500):
        part = slice(start, start + 500)
        metric.update(texts[part], labels[part], ["pope_random"] * len(labels[part]))
    scores = floats(metric.compute())
    expected = expected_scores(meant, labels)
    assert scores == pytest.approx(
        {f"pope_random/{name}": value for name, value in expected.items()} | {"f1": expected["f1"]}
    )
    # labels in another order than the answers' are noticed by a model that knows all answers
    if skill == 1.0:
        assert scores["f1"] == 1.0
        assert float(pope_scores(texts, labels[1:] + labels[:1])["f1"]) < 0.7


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric POPE was called before")
def test_bad_input_is_refused_and_nothing_is_kept_of_it() -> None:
    with pytest.raises(ValueError, match="got 1 predictions for 2 references"):
        pope_scores(["yes"], ["yes", "no"])
    with pytest.raises(ValueError, match="is 'yes' or 'no', got 'Yes'"):
        pope_scores(["yes"], ["Yes"])
    metric = POPE()
    with pytest.raises(ValueError, match="got 1 predictions for 2 splits"):
        metric.update(["yes"], ["yes"], ["random", "popular"])
    with pytest.raises(ValueError, match="64 bytes at most"):
        metric.update(["yes"], ["yes"], ["n" * 65])
    assert metric.compute() == {}

"""Exact match as GQA and lmms-eval take it: by hand, and against the rules on generated answers."""

import random
import string

import pytest
import torch

from dora_lightning.metrics import ExactMatch, exact_match


@pytest.mark.parametrize(
    ("prediction", "answer", "gqa", "lmms_gqa"),
    [
        ("yes", "yes", 1, 1),
        ("Yes.", "yes", 1, 1),
        ("YES...", "yes", 1, 1),
        ("yes!", "yes", 0, 1),
        ("yes. ", "yes", 0, 0),
        (" yes", "yes", 0, 0),
        (".yes", "yes", 0, 1),
        ("y.e.s", "yes", 0, 1),
        ("the yes", "yes", 0, 0),
        ("t-shirt", "t-shirt", 1, 1),
        ("tshirt", "t-shirt", 0, 1),
        ("Red", "Red", 0, 1),  # GQA's answers are lower case, and only the prediction is lower-cased
        ("u.s.", "u.s.", 0, 1),  # GQA's answers end in no period
        ("two", "2", 0, 0),
        ("", "", 1, 1),
        (".", "", 1, 1),
        ("größe", "GRÖSSE", 0, 0),
        ("“yes”", "yes", 0, 0),  # only ASCII punctuation goes
    ],
)
def test_by_hand(prediction: str, answer: str, gqa: int, lmms_gqa: int) -> None:
    assert exact_match([prediction], [answer]).tolist() == [gqa]
    assert exact_match([prediction], [answer], "lmms_gqa").tolist() == [lmms_gqa]


def generated() -> tuple[list[str], list[str]]:
    draw = random.Random(0)
    answers = [draw.choice(["yes", "no", "left", "t-shirt", "dark blue", "Red", "u.s."]) for _ in range(500)]
    ends = ["", "", ".", ".", "..", "!", " ", ". ", "-", ","]
    cases = [str.lower, str.lower, str.upper, str.title]
    predictions = [draw.choice(cases)(draw.choice([a, a, a, "other"])) + draw.choice(ends) for a in answers]
    return predictions, answers


def test_hundreds_of_generated_answers() -> None:
    predictions, answers = generated()
    gqa, lmms = [], []
    for prediction, answer in zip(predictions, answers, strict=True):
        stem = prediction
        while stem.endswith("."):
            stem = stem[:-1]
        gqa.append(float(stem.lower() == answer))
        kept = [[c for c in text.lower() if c not in string.punctuation] for text in (prediction, answer)]
        lmms.append(float(kept[0] == kept[1]))
    assert exact_match(predictions, answers).tolist() == gqa
    assert exact_match(predictions, answers, "lmms_gqa").tolist() == lmms
    assert 100 < sum(gqa) < sum(lmms) < 400


@pytest.mark.parametrize("variant", ["gqa", "lmms_gqa"])
def test_metric_is_the_mean_whatever_the_batches(variant: str) -> None:
    predictions, answers = generated()
    metric = ExactMatch(variant)
    for start, end in [(0, 1), (1, 400), (400, 400), (400, 500)]:
        metric.update(predictions[start:end], answers[start:end])
    assert float(metric.compute()) == pytest.approx(exact_match(predictions, answers, variant).double().mean().item())
    metric.reset()
    metric.update(["Yes."], ["yes"])
    assert float(metric(["no"], ["yes"])) == 0.0  # forward: of this batch
    assert float(metric.compute()) == 0.5


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown variant 'vqa'; there are gqa, lmms_gqa"):
        exact_match([], [], "vqa")
    with pytest.raises(ValueError, match="unknown variant 'vqa'"):
        ExactMatch("vqa")
    with pytest.raises(ValueError, match="got 1 predictions for 2 references"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match=r"one answer, a text, got \('a', 'b'\)"):
        exact_match(["a"], [("a", "b")])  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric ExactMatch was called before")
def test_nothing_seen_has_no_mean() -> None:
    assert torch.isnan(ExactMatch().compute())
    assert exact_match([], []).shape == (0,)

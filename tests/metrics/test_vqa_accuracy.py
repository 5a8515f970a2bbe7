"""Soft accuracy: tables worked by hand from the official rules, and people left out one by one in fractions."""

import random

import pytest
import torch
from torchmetrics import MetricCollection
from vqa_rules import CONTRACTIONS, random_answers, soft_accuracy

from dora_lightning.metrics import VQAAccuracy, vqa_accuracy

VARIANTS = ["official", "m4c", "vl_t5", "lmms", "simplified"]


def score(prediction: str, answers: list[str], variant: str = "official") -> float:
    return round(float(vqa_accuracy([prediction], [answers], variant)), 4)


@pytest.mark.parametrize("variant", ["official", "m4c", "vl_t5", "lmms"])
@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)]
)
def test_matches_among_ten_people(matches: int, expected: float, variant: str) -> None:
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    assert score("cat", answers, variant) == pytest.approx(expected)
    assert score("cat", answers[::-1], variant) == pytest.approx(expected)


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3333), (2, 0.6667), (3, 1.0), (4, 1.0), (10, 1.0)])
def test_simplified_matches_among_ten_people(matches: int, expected: float) -> None:
    assert score("cat", ["cat"] * matches + ["dog"] * (10 - matches), "simplified") == expected


TIE = ["yes"] * 5 + ["no"] * 5
SPLIT = ["2"] * 2 + ["two"] * 1 + ["Two."] * 1 + ["3"] * 3 + ["three"] * 1 + ["many"] * 2


# ten answers, a prediction and its score: official, m4c, vl_t5, lmms, simplified; worked by hand
@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        # ties: both sides of five win, and of two twice nobody does
        ("yes", TIE, [1, 1, 1, 1, 1]),
        ("No", TIE, [1, 1, 1, 1, 1]),
        ("maybe", TIE, [0, 0, 0, 0, 0]),
        ("a", ["b", "c"] * 5, [0, 0, 0, 0, 0]),
        (
            "blue",
            ["blue"] * 2 + ["red"] * 2 + ["green"] * 2 + ["grey"] * 2 + ["gold", "pink"],
            [0.6, 0.6, 0.6, 0.6, 2 / 3],
        ),
        # number words: people's "two" and "Two." count as 2, except for VL-T5, which leaves their words
        ("2", SPLIT, [1, 1, 0.6, 1, 1]),
        ("two", SPLIT, [1, 1, 0.6, 1, 1]),
        ("Three!", SPLIT, [1, 1, 0.9, 1, 1]),
        ("many", SPLIT, [0.6, 0.6, 0.6, 0.6, 2 / 3]),
        # all people agree: official compares texts as they are, VL-T5 normalises the prediction only
        ("Two", ["Two"] * 10, [1, 1, 0, 1, 1]),
        ("two", ["Two"] * 10, [0, 1, 0, 1, 0]),
        ("2", ["2"] * 10, [1, 1, 1, 1, 1]),
        ("a dog.", ["dog"] * 10, [0, 1, 1, 1, 0]),
        ("dog\n", [" dog"] * 10, [1, 1, 0, 1, 1]),
        # people agree but for space at the end, which official removes before it looks
        ("The dog", ["dog"] * 5 + ["dog "] * 5, [0, 1, 1, 1, 0]),
        # contractions and articles
        ("dont know", ["don't know"] * 3 + ["I dont know"] * 7, [0.9, 0.9, 0.9, 0.9, 1]),
        ("the oclock", ["oclock"] * 2 + ["o'clock"] * 1 + ["time"] * 7, [0.9, 0.9, 0.3, 0.9, 1]),
        ("a red car", ["the red car", "red car", "an red car"] + ["car"] * 7, [0.9, 0.9, 0.3, 0.9, 1]),
        # periods, commas and other marks
        ("1,000", ["1000"] * 2 + ["1,000"] + ["1 000"] * 7, [0.9, 0.9, 0.9, 0.9, 1]),
        ("U.S.A", ["usa"] * 2 + ["U.S.A."] * 2 + ["us"] * 6, [1, 1, 0.6, 1, 1]),
        ("3.50", ["3.5"] * 4 + ["3.50."] + ["350"] * 5, [0.3, 0.3, 0.3, 0.3, 1 / 3]),
        ("red/blue", ["red blue"] * 2 + ["red, blue"] * 2 + ["red / blue"] * 3 + ["pink"] * 3, [1, 1, 1, 1, 1]),
        ("t-shirt", ["tshirt"] * 5 + ["t shirt", "t-shirt"] + ["t-shirt -"] * 3, [0.6, 0.6, 0.6, 0.6, 2 / 3]),
        # M4C takes 's as a word of its own, on both sides, and removes commas before words are told apart
        ("mike 's", ["Mike's"] * 4 + ["bob"] * 6, [0, 1, 0, 0, 0]),
        ("xy", ["x,y"] * 4 + ["z"] * 6, [0, 1, 0, 0, 0]),
        # an empty answer is an answer: one that normalises to nothing matches another
        ("", ["a"] * 3 + ["dog"] * 7, [0.9, 0.9, 0, 0.9, 1]),
        ("", ["dog"] * 9 + ["cat"], [0, 0, 0, 0, 0]),
    ],
)
def test_ten_answers_by_hand(prediction: str, answers: list[str], expected: list[float]) -> None:
    assert len(answers) == 10
    assert [score(prediction, answers, variant) for variant in VARIANTS] == pytest.approx(expected, abs=1e-4)


def generated(count: int) -> tuple[list[str], list[list[str]]]:
    """Predictions and ten answers each that often agree with them in some normal form, and often with one another."""
    draw = random.Random(1)
    pool = [*random_answers(60, seed=2), *draw.sample(list(CONTRACTIONS.values()), 20)]
    pool += ["2", "two", "red car", "blue", "on table", "mike's", "x,y", "red/blue", "1,,000-5", "t-shirt"] * 4
    predictions, references = [], []
    for _ in range(count):
        word, *others = draw.sample(pool, draw.choice([2, 3, 6]))
        forms = [
            word,
            word.upper(),
            f"the {word}",
            f"{word}.",
            f" {word}",
            word.replace(",", ""),
            word.replace("'", " '"),
        ]
        predictions.append(draw.choice([*forms, draw.choice(pool)]))
        if draw.random() < 0.15:
            references.append([draw.choice(forms)] * 10)
        else:
            share = draw.random()
            references.append([draw.choice(forms if draw.random() < share else others) for _ in range(10)])
    return predictions, references


@pytest.mark.parametrize("variant", VARIANTS)
def test_hundreds_of_generated_questions(variant: str) -> None:
    predictions, references = generated(600)
    expected = [float(soft_accuracy(p, r, variant)) for p, r in zip(predictions, references, strict=True)]
    torch.testing.assert_close(vqa_accuracy(predictions, references, variant), torch.tensor(expected))
    # every score there is turns up, and so do people who all agree
    assert len(set(expected)) == (4 if variant == "simplified" else 5)
    assert sum(len(set(answers)) == 1 for answers in references) > 50


def test_variants_differ_on_them() -> None:
    predictions, references = generated(600)
    means = {round(float(vqa_accuracy(predictions, references, variant).mean()), 5) for variant in VARIANTS}
    assert len(means) == len(VARIANTS)


@pytest.mark.parametrize("people", [2, 3, 4, 5, 7, 12])
def test_other_numbers_of_people(people: int) -> None:
    for matches in range(people + 1):
        answers = ["cat"] * matches + ["dog"] * (people - matches)
        for variant in ("official", "vl_t5", "lmms", "simplified"):
            assert score("cat", answers, variant) == round(float(soft_accuracy("cat", answers, variant)), 4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown variant 'vqa'; there are official, m4c, vl_t5, lmms, simplified"):
        vqa_accuracy([], [], "vqa")
    with pytest.raises(ValueError, match="unknown variant 'vqa'"):
        VQAAccuracy("vqa")
    with pytest.raises(ValueError, match="got 2 predictions for 1 references"):
        vqa_accuracy(["a", "b"], [["a"] * 10])
    with pytest.raises(ValueError, match=r"'m4c' compares an answer with 10 answers of people, got \['a', .*'b'"):
        vqa_accuracy(["b"], [["a"] * 9], "m4c")
    with pytest.raises(ValueError, match="with 10 answers"):
        vqa_accuracy(["b"], [["a"] * 11], "m4c")
    with pytest.raises(ValueError, match=r"with at least 2 answers of people, got \['a'\]"):
        vqa_accuracy(["b"], [["a"]])
    with pytest.raises(ValueError, match=r"with at least 1 answers of people, got \[\]"):
        vqa_accuracy(["b"], [[]], "simplified")
    with pytest.raises(ValueError, match="got 'a text' for the prediction"):  # not ten letters of one answer
        vqa_accuracy(["b"], ["a text"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_metric_is_the_mean_whatever_the_batches(variant: str) -> None:
    predictions, references = generated(90)
    expected = sum(soft_accuracy(p, r, variant) for p, r in zip(predictions, references, strict=True)) / 90
    metric = VQAAccuracy(variant)
    for start, end in [(0, 1), (1, 60), (60, 60), (60, 90)]:
        metric.update(predictions[start:end], references[start:end])
    assert float(metric.compute()) == pytest.approx(float(expected))
    metric.reset()
    metric.update(["cat"], [["cat"] * 2 + ["dog"] * 8])
    assert float(metric(["cat"], [["dog"] * 10])) == 0.0  # forward: of this batch
    expected_mean = 1 / 3 if variant == "simplified" else 0.3
    assert float(metric.compute()) == pytest.approx(expected_mean)
    assert metric.compute().dtype == torch.float32


def test_variants_in_one_collection_stay_apart() -> None:
    collection = MetricCollection({variant: VQAAccuracy(variant) for variant in VARIANTS})
    collection.update(["cat"], [["cat"] * 4 + ["dog"] * 6])  # 1 for all of them
    collection.update(["two"], [["Two"] * 10])  # 1 for those that normalise people's answers though they agree
    scores = {variant: float(score) for variant, score in collection.compute().items()}
    assert scores == {"official": 0.5, "m4c": 1.0, "vl_t5": 0.5, "lmms": 1.0, "simplified": 0.5}


def test_a_long_sum_does_not_drift() -> None:
    metric = VQAAccuracy()
    metric.update(["cat"], [["cat"] * 3 + ["dog"] * 7])
    # as after ten million questions of this kind
    metric.total *= 10_000_000
    metric.samples *= 10_000_000
    for _ in range(100):
        metric.update(["cat"], [["cat"] * 3 + ["dog"] * 7])
    assert float(metric.total) == pytest.approx(9_000_090, abs=1)
    assert float(metric.compute()) == pytest.approx(0.9, abs=1e-7)

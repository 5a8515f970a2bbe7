"""Circular accuracy: by hand, and against the official loop over base questions on generated files."""

import random

import pytest
import torch

from dora_lightning.metrics import CircularAccuracy, circular_accuracy


def test_by_hand() -> None:
    # 3: both right; 7: the base row wrong; 9: a rotation wrong; 11: one row only; 20: its base row is not there
    rows = {
        3: 1,
        1_000_003: 1,
        7: 0,
        1_000_007: 1,
        2_000_007: 1,
        9: 1,
        1_000_009: 1,
        2_000_009: 0,
        3_000_009: 1,
        11: 1,
        1_000_020: 1,
        2_000_020: 1,
    }
    correct = torch.tensor(list(rows.values()))
    assert circular_accuracy(correct, list(rows)).tolist() == [1, 0, 0, 1, 1]
    assert circular_accuracy(correct.bool(), list(rows)).tolist() == [1, 0, 0, 1, 1]
    assert circular_accuracy(correct.flip(0), list(rows)[::-1]).tolist() == [1, 0, 0, 1, 1]
    assert circular_accuracy(torch.zeros(0), []).shape == (0,)


def test_categories_by_hand() -> None:
    metric = CircularAccuracy()
    #                                           ocr      ocr      celebrity  ocr
    metric.update(torch.tensor([1, 1, 0]), [1, 1_000_001, 2], ["ocr", "ocr", "ocr"], ["fine", "fine", "fine"])
    metric.update(torch.tensor([1, 1, 1]), [1_000_002, 3, 4], ["ocr", "celebrity", "map"], ["fine", "fine", "logic"])
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "accuracy": 0.75,
        "category/celebrity": 1.0,
        "category/map": 1.0,
        "category/ocr": 0.5,
        "l2_category/fine": pytest.approx(2 / 3),
        "l2_category/logic": 1.0,
    }
    metric.reset()
    metric.update(torch.tensor([1.0, 0.0]), [1, 2])
    assert {name: float(value) for name, value in metric.compute().items()} == {"accuracy": 0.5}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_a_question_belongs_to_the_categories_of_its_first_row(order: list[int]) -> None:
    rows = [(5, "ocr"), (1_000_005, "map"), (2_000_005, "")]
    metric = CircularAccuracy()
    metric.update(torch.ones(3), [rows[row][0] for row in order], [rows[row][1] for row in order])
    assert set(metric.compute()) == {"accuracy", "category/ocr"}


def official(rows: list[tuple[int, int, str, str]], kind: int | None = None, name: str = "") -> float:
    """Questions are the rows with an index below a million; one counts if no row of its number is wrong."""
    hits = total = 0
    for base in rows:
        if base[0] >= 1_000_000 or (kind is not None and base[kind] != name):
            continue
        total += 1
        hit = 1
        for row in rows:
            if row[0] % 1_000_000 == base[0] and row[1] == 0:
                hit = 0
        hits += hit
    return hits / total


def generated(questions: int, seed: int) -> list[tuple[int, int, str, str]]:
    """Rows (index, correct, category, level-2 category) in the order of a file: a question, then its rotations."""
    draw = random.Random(seed)
    rows = []
    for number in draw.sample(range(10_000), questions):
        category = draw.choice(["ocr", "celebrity", "spatial relation", "大小", "future prediction"])
        skill = draw.random() ** 0.2
        for rotation in range(draw.choice([1, 2, 3, 4])):
            right = int(draw.random() < skill)
            rows.append((number + rotation * 1_000_000, right, category, "coarse" if category == "ocr" else "fine"))
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_hundreds_of_generated_questions_in_any_order(seed: int) -> None:
    rows = generated(300, seed)
    expected = {"accuracy": official(rows)}
    for kind, column in (("category", 2), ("l2_category", 3)):
        names = sorted({row[column] for row in rows})
        expected |= {f"{kind}/{name}": official(rows, column, name) for name in names}
    random.Random(seed).shuffle(rows)

    metric = CircularAccuracy()
    for start in range(0, len(rows), 64):
        indices, correct, categories, l2_categories = (list(c) for c in zip(*rows[start : start + 64], strict=True))
        metric(torch.tensor(correct), indices, categories, l2_categories)  # forward: update, and the batch by itself
    scores = metric.compute()
    assert {name: float(value) for name, value in scores.items()} == pytest.approx(expected)
    assert list(scores) == list(expected)
    assert 0.3 < expected["accuracy"] < 0.9


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="got 2 scores for 1 indices"):
        circular_accuracy(torch.ones(2), [1])
    metric = CircularAccuracy()
    with pytest.raises(ValueError, match="got 2 scores for 3 indices"):
        metric.update(torch.ones(2), [1, 2, 3])
    with pytest.raises(ValueError, match="got 2 scores for 1 names of the kind l2_category"):
        metric.update(torch.ones(2), [1, 2], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="64 bytes at most"):
        metric.update(torch.ones(1), [1], ["n" * 65])
    metric.update(torch.ones(1), [1], ["n" * 64])  # what was refused has left nothing behind
    assert {name: float(value) for name, value in metric.compute().items()} == {
        "accuracy": 1,
        f"category/{'n' * 64}": 1,
    }

"""Math answers by the published rule and by value, against matches worked by hand."""

from fractions import Fraction
from typing import Any

import pytest

from dora_lightning.data import Sample
from tasks import MathQA
from tasks.math_qa import numeric_answer, published_answer


@pytest.mark.parametrize(
    ("text", "published", "value"),
    [
        ("The answer is 42.", "42", (42,)),
        ("3 apples and 4 pears make 7", "7", (7,)),
        ("It costs $13.50.", "$13.50", (Fraction(27, 2),)),
        ("It costs £5", "£5", (5,)),
        ("$1,000.50", "000.50", (Fraction(2001, 2),)),  # the published rule knows no thousands
        ("They need 12,345,678 bricks", "678", (12345678,)),
        ("1,2 and 3,4", "4", (4,)),  # a list, no thousands
        ("at 10:30", "10:30", (10, 30)),
        ("a ratio of 3:2", "3:2", (3, 2)),
        ("it is 3/4 of it", "4", (Fraction(3, 4),)),
        ("it fell to -5 degrees", "5", (-5,)),
        ("a loss of -$1,200", "200", (-1200,)),
        ("it is \u22125", "5", (-5,)),
        ("from 10-5", "5", (5,)),  # a range or a difference
        ("x = (3)-2", "2", (2,)),
        ("1/0", "0", (1,)),
        ("50%", "50", (50,)),
        ("no number at all", None, None),
        ("", None, None),
    ],
)
def test_the_last_number(text: str, published: str | None, value: Any) -> None:
    assert published_answer(text) == published
    assert numeric_answer(text) == value


def test_both_rules_and_where_they_differ() -> None:
    cases = [
        ("It is 12.", "So 12 of them.", (1, 1, 0)),
        ("It is 13.", "So 12 of them.", (0, 0, 0)),
        ("It is 2.50", "2.5", (0, 1, 0)),  # another text, the same value
        ("It is 2,000.", "1,000", (1, 0, 0)),  # both are read as 000
        ("I do not know.", "Nobody knows.", (1, 0, 1)),  # None == None
        ("I do not know.", "12", (0, 0, 1)),
        ("It is 12", "$12", (0, 1, 0)),
    ]
    task = MathQA()
    samples = [
        Sample("...", gold, references=(gold,), source="orca_math", row={"answer": gold}) for _, gold, _ in cases
    ]
    task.update(samples[:4], [text for text, _, _ in cases[:4]])
    task.update(samples[4:], [text for text, _, _ in cases[4:]])
    means = [sum(values) / 7 for values in zip(*(case[2] for case in cases), strict=True)]
    results = {name: float(value) for name, value in task.compute().items()}
    for name, mean in zip(("exact", "numeric", "unparsed"), means, strict=True):
        assert results[f"orca_math/{name}"] == results[f"mean/{name}"] == pytest.approx(mean)
    records = task.records()
    assert [(row["exact"], row["numeric"], row["unparsed"]) for row in records] == [case[2] for case in cases]
    assert records[3] | {"source": "orca_math"} == {
        "source": "orca_math",
        "answer": "1,000",
        "output_pred": "It is 2,000.",
        "pred": "000",
        "gold": "000",
        "exact": 1,
        "numeric": 0,
        "unparsed": 0,
    }
    task.reset()
    assert task.records() == []
    task.update(samples[:1], ["12"])
    assert float(task.compute()["orca_math/exact"]) == 1


def test_greedy_and_as_long_as_published() -> None:
    assert MathQA().generation == {"max_new_tokens": 1024, "do_sample": False}
    with pytest.raises(ValueError, match="MathQA judges texts, and none were generated"):
        MathQA().update([Sample("...", "1", references=("1",))])
    with pytest.raises(ValueError, match="compares with a reference, and a sample has none"):
        MathQA().update([Sample("...", "1")], ["1"])

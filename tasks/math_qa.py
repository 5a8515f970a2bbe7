"""Math word problems, judged by the last number of the answer.

The published rule is that of fsdp_qlora's evaluation, by which QDoRA's numbers on Orca-Math were made. It compares the
last match of a regular expression as text: two answers without a number are taken for equal, "1,000" is read as
"000", and 2.50 is not 2.5. The numeric rule beside it compares values, and an answer without a number is wrong.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, TypeAlias

from dora_lightning.data import Sample
from dora_lightning.messages import check_whole
from tasks.written_answers import WrittenAnswers

Number: TypeAlias = tuple[Fraction, ...]
"""The value of a number; of a ratio or a time of day, the values of its parts."""

_PUBLISHED = re.compile(r"[\$€£]?\d+(?:\.\d+)?(?:\:\d+(?:\.\d+)?)?")
_SIGN = r"(?:(?<![\w)])[-\u2212](?:[$€£])?)?"  # not the sign of a difference, as in 10-5
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?"
_NUMBER = re.compile(rf"{_SIGN}{_UNSIGNED}(?::{_UNSIGNED})*")


def published_answer(text: str) -> str | None:
    """The last number in a text as fsdp_qlora reads it, or None.

    >>> published_answer("She pays $4.50 for 3, so $13.50."), published_answer("1,000"), published_answer("none")
    ('$13.50', '000', None)
    """
    found = _PUBLISHED.findall(text)
    return found[-1] if found else None


def numeric_answer(text: str) -> Number | None:
    """The value of the last number in a text, or None.

    Signs, thousands, decimals, fractions and ratios are read; currencies and units are not.

    >>> numeric_answer("$1,000.50") == numeric_answer("about 1000.5 dollars"), numeric_answer("-3/4")
    (True, (Fraction(-3, 4),))
    """
    found = _NUMBER.findall(text)
    if not found:
        return None
    return tuple(_value(part) for part in found[-1].split(":"))


class MathQA(WrittenAnswers):
    """Share of problems solved: ``exact`` by the published rule, ``numeric`` by value; ``unparsed`` has no number.

    Args:
        max_new_tokens: longest answer; 1,024 as published.
    """

    measures = ("exact", "numeric", "unparsed")
    title = "Problems solved"

    def __init__(self, max_new_tokens: int = 1024) -> None:
        super().__init__()
        check_whole(1, max_new_tokens=max_new_tokens)
        self.generation = {"max_new_tokens": max_new_tokens, "do_sample": False}

    def judge(self, text: str, sample: Sample) -> tuple[dict[str, float], dict[str, Any]]:
        """Compare the last numbers of the text and of the reference by both rules."""
        pred, gold = published_answer(text), published_answer(sample.references[0])
        value = numeric_answer(text)
        right = value is not None and value == numeric_answer(sample.references[0])
        values = {"exact": float(pred == gold), "numeric": float(right), "unparsed": float(value is None)}
        return values, {"pred": pred, "gold": gold}


def _value(text: str) -> Fraction:
    digits = re.sub(r"[,$€£]", "", text).replace("\u2212", "-")
    whole, slash, below = digits.partition("/")
    return Fraction(whole) / int(below) if slash and int(below) else Fraction(whole)

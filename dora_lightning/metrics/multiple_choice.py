"""Which option a generated text names, and how often it is the right one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.sample_mean import SampleMean, check_lengths

_SCIENCEQA_LETTERS = "ABCDE"
# the period is any character, as in LLaVA's pattern
_THE_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")
_MMBENCH_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_MMBENCH_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def read_letter_scienceqa(text: str, choices: int) -> str | None:
    """The option that ``text`` names among the first ``choices`` letters, or None, as LLaVA reads ScienceQA answers.

    The text is a letter, or begins with a letter, a period and a space, or says "The answer is X." once.

    >>> read_letter_scienceqa("B. the dog", choices=3), read_letter_scienceqa("E", choices=3)
    ('B', None)
    """
    if text in tuple(_SCIENCEQA_LETTERS):
        letter = text
    elif text[:1] in tuple(_SCIENCEQA_LETTERS) and text[1:3] == ". ":
        letter = text[0]
    else:
        said = _THE_ANSWER_IS.findall(text)
        if len(said) != 1:
            return None
        letter = said[0]
    return letter if letter in tuple(_SCIENCEQA_LETTERS[:choices]) else None


def read_letter_lmms(text: str) -> str | None:
    """The letter that ``text`` is, in either case, or begins with as "X.", or None, as in lmms-eval's ScienceQA.

    >>> read_letter_lmms("b"), read_letter_lmms("B. the dog"), read_letter_lmms("the dog")
    ('B', 'B', None)
    """
    text = text.strip()
    if len(text) == 1 and text.isalpha():
        return text.upper()
    return text[0] if text[:1].isupper() and text[1:2] == "." else None


def read_letter_mmbench(text: str, options: Mapping[str, str]) -> str | None:
    """The option that ``text`` names by letter or by content, or None, by the rules of VLMEvalKit without a judge.

    By letter (``can_infer_option``): one of the letters alone stands in the text as a word, first among the last four
    words (``index > words - 5``); "A" in more than three words may be an article and is not read. Else by content
    (``can_infer_text``): one option alone is contained in the text, and the text is at most twice as long as all
    options together. ``options``: letter -> content.

    >>> pets = {"A": "a cat", "B": "a dog"}
    >>> read_letter_mmbench("(B)", pets), read_letter_mmbench("It is a cat.", pets), read_letter_mmbench("A, B", pets)
    ('B', 'A', None)
    """
    if any(refusal in text for refusal in _MMBENCH_REFUSALS):
        return None
    words = text.translate(_MMBENCH_BLANKS).split()
    letters = [letter for letter in options if letter in words]
    if not letters and "Z" in words:  # how VLMEvalKit's judges say that it is none of them
        return None
    if len(letters) == 1:
        article = letters[0] == "A" and len(words) > 3
        if not article and words.index(letters[0]) > len(words) - 5:
            return letters[0]
    text = text.lower()
    if len(text) > 2 * sum(len(content) for content in options.values()):
        return None
    contained = [letter for letter, content in options.items() if content.lower() in text]
    return contained[0] if len(contained) == 1 else None


def letter_accuracy(predicted: Sequence[str | None], answers: Sequence[str]) -> Tensor:
    """1.0 where the letter is right, 0.0 where it is not or none could be read: [samples].

    Raises:
        ValueError: not one answer per prediction.

    >>> letter_accuracy(["A", None, "C"], ["A", "B", "B"])
    tensor([1., 0., 0.])
    """
    check_lengths(predicted, answers)
    return torch.tensor([p == a for p, a in zip(predicted, answers, strict=True)], dtype=torch.float32)


class LetterAccuracy(SampleMean):
    """Share of multiple-choice questions answered with the right letter.

    ``update`` takes as many letters, None where none could be read, as right answers; ``compute`` returns a scalar in
    [0, 1], nan if nothing was seen.

    Example:
        >>> metric = LetterAccuracy()
        >>> metric.update(["A", None, "C", "D"], ["A", "B", "C", "D"])
        >>> metric.compute()
        tensor(0.7500)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("letter_accuracy", **kwargs)

    def update(self, predicted: Sequence[str | None], answers: Sequence[str]) -> None:
        """Add answers; raises as :func:`letter_accuracy`."""
        self._add(letter_accuracy(predicted, answers))

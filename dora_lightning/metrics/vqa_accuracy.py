"""Soft accuracy of visual question answering, against the answers of several people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.answers import clean_answer, normalize_answer
from dora_lightning.metrics.sample_mean import SampleMean, check_lengths

_VARIANTS = ("official", "m4c", "vl_t5", "lmms", "simplified")


def vqa_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]], variant: str = "official") -> Tensor:
    """Soft accuracy [samples] of answers, each against the answers of several people, ten as a rule.

    An answer scores ``min(1, matches among the others / 3)`` against all but one person, averaged over the person left
    out (Antol et al. 2015, VQA; https://visualqa.org/evaluation.html): with ten people 0, .3, .6, .9 and 1 for none,
    one, two, three and more matches.

    Variants, which differ in how answers are normalised first (:func:`~dora_lightning.metrics.normalize_answer`):
        ``official``: ``vqaEval.py`` of the VQA challenge: answers are normalised unless all people gave the same one.
        ``m4c``: TextVQA as LLaVA scores it: always, by the processor of M4C; needs ten answers.
        ``vl_t5``: VL-T5: the prediction always, people's answers only in their punctuation and where they differ.
        ``lmms``: VQAv2 in lmms-eval: always, by the last two steps of M4C's processor.
        ``simplified``: normalised as ``official``, scored ``min(1, matches / 3)`` against all people at once.

    Raises:
        ValueError: an unknown variant, not one set of answers per prediction, or too few answers in a set: ten for
            ``m4c``, two where one is left out, else one.

    >>> people = ["2"] * 2 + ["two dogs"] * 3 + ["dogs"] * 5
    >>> vqa_accuracy(["Two.", "two dogs", "the dogs!"], [people] * 3)
    tensor([0.6000, 0.9000, 1.0000])
    """
    if variant not in _VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(_VARIANTS)}")
    check_lengths(predictions, references)
    scores = [_score(prediction, answers, variant) for prediction, answers in zip(predictions, references, strict=True)]
    return torch.tensor(scores, dtype=torch.float32)


class VQAAccuracy(SampleMean):
    """Mean soft accuracy of answers to questions about images; the variants are those of :func:`vqa_accuracy`.

    ``update`` takes as many predictions as sets of people's answers; ``compute`` returns a scalar in [0, 1], nan if
    nothing was seen.

    Example:
        >>> metric = VQAAccuracy()
        >>> metric.update(["Two", "a cat"], [["2"] * 3 + ["3"] * 7, ["cat"] * 9 + ["dog"]])
        >>> metric.compute()
        tensor(0.9500)
    """

    def __init__(self, variant: str = "official", **kwargs: Any) -> None:
        vqa_accuracy([], [], variant)  # an unknown variant is refused here, not after an epoch
        super().__init__(f"vqa_accuracy_{variant}", **kwargs)
        self.variant = variant

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add answers; raises as :func:`vqa_accuracy`."""
        self._add(vqa_accuracy(predictions, references, self.variant))


def _score(prediction: str, answers: Sequence[str], variant: str) -> float:
    needed = {"m4c": 10, "simplified": 1}.get(variant, 2)
    if isinstance(answers, str) or len(answers) < needed or (variant == "m4c" and len(answers) != needed):
        raise ValueError(
            f"variant {variant!r} compares an answer with {'' if variant == 'm4c' else 'at least '}{needed} answers of"
            f" people, got {answers!r} for the prediction {prediction!r}"
        )
    prediction, answers = _normalize(prediction, answers, variant)
    people, matches = len(answers), answers.count(prediction)
    if variant == "simplified":
        return min(1.0, matches / 3)
    # the one left out is one of the matches, or one of the rest
    return (matches * min(1.0, (matches - 1) / 3) + (people - matches) * min(1.0, matches / 3)) / people


def _normalize(prediction: str, answers: Sequence[str], variant: str) -> tuple[str, list[str]]:
    if variant in ("m4c", "lmms"):
        return normalize_answer(prediction, variant), [normalize_answer(answer, variant) for answer in answers]
    if variant == "vl_t5":
        differ = len(set(answers)) > 1
        return normalize_answer(prediction), [
            normalize_answer(answer, "vl_t5_reference") if differ else answer for answer in answers
        ]
    cleaned = [clean_answer(answer) for answer in answers]
    if len(set(cleaned)) == 1:
        return clean_answer(prediction), cleaned
    return normalize_answer(prediction), [normalize_answer(answer) for answer in answers]

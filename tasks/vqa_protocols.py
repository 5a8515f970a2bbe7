"""How each visual benchmark reads an answer out of a text, and how it scores it.

The first protocol of a benchmark is the one that LLaVA-1.5's published numbers were made with; the others are those of
other evaluation code, whose numbers do not compare with them: VL-BART's are ``vl_t5`` of VQAv2 and ``label`` of GQA.
Sources of nobody's benchmark fall under ``other``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dora_lightning.data import Sample
from dora_lightning.metrics import (
    exact_match,
    letter_accuracy,
    normalize_answer,
    pope_scores,
    read_letter_lmms,
    read_letter_mmbench,
    read_letter_scienceqa,
    read_yes_no,
    vqa_accuracy,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Protocol(NamedTuple):
    """Reading and scoring of one benchmark's answers."""

    read: Callable[[str, Sample], str]
    """Answer in a generated text, "" if there is none."""

    score: Callable[[Sequence[str], Sequence[Sequence[str]]], Tensor]
    """Scores ``[samples]`` in [0, 1] of answers against the references of each."""

    truth: Callable[[str], str] | None = None
    """The form in which two references are the same answer, where there is one short answer a question."""


def benchmark_of(source: str) -> str:
    """Benchmark that a :attr:`Sample.source` belongs to.

    >>> benchmark_of("pope_random"), benchmark_of("moving_shapes_color"), benchmark_of("gqa"), benchmark_of("my photos")
    ('pope', 'moving_shapes', 'gqa', 'other')
    """
    if source in ("pope_random", "pope_popular", "pope_adversarial"):
        return "pope"
    if source in ("easy_vqa_shape", "easy_vqa_color", "easy_vqa_yes_no"):
        return "easy_vqa"
    if source.startswith("moving_shapes_"):
        return "moving_shapes"
    return source if source in PROTOCOLS else "other"


def options_of(sample: Sample) -> dict[str, str]:
    """Letter -> text of a multiple-choice question.

    Raises:
        ValueError: its row holds neither ``options`` nor ``choices``.
    """
    row = sample.row or {}
    if "options" in row:
        return row["options"]
    if "choices" in row:
        return dict(zip(LETTERS, row["choices"], strict=False))
    raise ValueError(f"{sample.source}: the row of a question with letters needs 'choices' or 'options', it is {row}")


def select_variants(variants: Mapping[str, str]) -> dict[str, str]:
    """Benchmark -> name of its protocol: the first of each, or the one that ``variants`` names.

    Raises:
        ValueError: no such benchmark, or none of its protocols.
    """
    for benchmark, variant in variants.items():
        if benchmark not in PROTOCOLS:
            raise ValueError(f"variants: no benchmark {benchmark!r}, there are {', '.join(PROTOCOLS)}")
        if variant not in PROTOCOLS[benchmark]:
            known = ", ".join(PROTOCOLS[benchmark])
            raise ValueError(f"variants: {benchmark} is judged by one of {known}, got {variant!r}")
    return {name: variants.get(name, next(iter(protocols))) for name, protocols in PROTOCOLS.items()}


def _stripped(text: str, sample: Sample) -> str:
    return text.strip()


def _consensus(variant: str) -> Protocol:
    """Agreement with several people."""
    return Protocol(_stripped, partial(vqa_accuracy, variant=variant))


def _exact(variant: str) -> Protocol:
    """Equality with the one answer."""

    def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
        return exact_match(answers, [reference[0] for reference in references], variant=variant)

    return Protocol(_stripped, score, str)


def _normalized_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """Equality with any reference after the official normalisation of VQA answers."""
    right = [
        _normalize(answer) in {_normalize(reference) for reference in accepted}
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return torch.tensor(right, dtype=torch.float32)


def _label_lookup(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    """Whether an answer is one of the question's labels as it stands; each of GQA's scores 1."""
    right = [answer in accepted for answer, accepted in zip(answers, references, strict=True)]
    return torch.tensor(right, dtype=torch.float32)


def _normalize(answer: str) -> str:
    return normalize_answer(answer, "official")


def _score_letters(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    return letter_accuracy([answer or None for answer in answers], [reference[0] for reference in references])


def _letter(read: Callable[[str, Sample], str | None]) -> Protocol:
    return Protocol(lambda text, sample: read(text.strip(), sample) or "", _score_letters)


def _score_yes_no(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tensor:
    pairs = zip(answers, references, strict=True)
    return torch.stack([pope_scores([answer], [reference[0]])["accuracy"] for answer, reference in pairs])


_CONSENSUS = {name: _consensus(name) for name in ("official", "m4c", "lmms", "vl_t5", "simplified")}
_EXACT = {name: _exact(name) for name in ("gqa", "lmms_gqa")}
_NORMALIZED = {"normalized": Protocol(_stripped, _normalized_match, _normalize)}
_LETTERS = {
    "llava": _letter(lambda text, sample: read_letter_scienceqa(text, len(options_of(sample)))),
    "vlmevalkit": _letter(lambda text, sample: read_letter_mmbench(text, options_of(sample))),
    "lmms": _letter(lambda text, sample: read_letter_lmms(text)),
}

PROTOCOLS: dict[str, dict[str, Protocol]] = {
    "vqav2": _CONSENSUS,
    "vizwiz": _CONSENSUS,
    "textvqa": {"m4c": _CONSENSUS["m4c"], **_CONSENSUS},
    "gqa": {**_EXACT, "label": Protocol(_stripped, _label_lookup, str)},
    "scienceqa": _LETTERS,
    "mmbench": {"vlmevalkit": _LETTERS["vlmevalkit"], **_LETTERS},
    "pope": {"llava": Protocol(lambda text, sample: read_yes_no(text.strip()), _score_yes_no, str)},
    "easy_vqa": {**_NORMALIZED, **_EXACT},
    "moving_shapes": {**_NORMALIZED, **_EXACT},
    "other": {**_NORMALIZED, **_EXACT, **_CONSENSUS},
}
"""Benchmark -> name -> protocol; the first is the default."""

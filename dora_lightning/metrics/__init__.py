"""torchmetrics Metrics: a functional core and a stateful shell each."""

from dora_lightning.metrics.answers import normalize_answer
from dora_lightning.metrics.circular import CircularAccuracy, circular_accuracy
from dora_lightning.metrics.exact_match import ExactMatch, exact_match
from dora_lightning.metrics.multiple_choice import (
    LetterAccuracy,
    letter_accuracy,
    read_letter_lmms,
    read_letter_mmbench,
    read_letter_scienceqa,
)
from dora_lightning.metrics.per_source import PerSourceMean, per_source_mean
from dora_lightning.metrics.pope import POPE, pope_scores, read_yes_no
from dora_lightning.metrics.vqa_accuracy import VQAAccuracy, vqa_accuracy

__all__ = [
    "POPE",
    "CircularAccuracy",
    "ExactMatch",
    "LetterAccuracy",
    "PerSourceMean",
    "VQAAccuracy",
    "circular_accuracy",
    "exact_match",
    "letter_accuracy",
    "normalize_answer",
    "per_source_mean",
    "pope_scores",
    "read_letter_lmms",
    "read_letter_mmbench",
    "read_letter_scienceqa",
    "read_yes_no",
    "vqa_accuracy",
]

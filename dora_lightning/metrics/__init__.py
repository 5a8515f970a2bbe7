"""torchmetrics Metrics: a functional core and a stateful shell each."""

from dora_lightning.metrics.answers import normalize_answer
from dora_lightning.metrics.caption_tokenizers import tokenize_captions
from dora_lightning.metrics.cider import CIDErD, cider_d
from dora_lightning.metrics.circular import CircularAccuracy, circular_accuracy
from dora_lightning.metrics.coco_captions import CaptionScores, caption_scores, coco_bleu, coco_rouge_l
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
from dora_lightning.metrics.ptb_words import ptb_words
from dora_lightning.metrics.vqa_accuracy import VQAAccuracy, vqa_accuracy

__all__ = [
    "POPE",
    "CIDErD",
    "CaptionScores",
    "CircularAccuracy",
    "ExactMatch",
    "LetterAccuracy",
    "PerSourceMean",
    "VQAAccuracy",
    "caption_scores",
    "cider_d",
    "circular_accuracy",
    "coco_bleu",
    "coco_rouge_l",
    "exact_match",
    "letter_accuracy",
    "normalize_answer",
    "per_source_mean",
    "pope_scores",
    "ptb_words",
    "read_letter_lmms",
    "read_letter_mmbench",
    "read_letter_scienceqa",
    "read_yes_no",
    "tokenize_captions",
    "vqa_accuracy",
]

"""BLEU, ROUGE-L and CIDEr-D of captions as the COCO evaluation (``pycocoevalcap``) computes them.

torchmetrics' BLEU takes the first reference of those that are equally close in length, where COCO takes the shortest,
and is 0 where an n-gram length has no match, where COCO's is tiny; its ROUGE-L takes F1 of the best reference, where
COCO combines the best precision and the best recall with beta 1.2. So neither gives COCO's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.caption_ngrams import MAX_ORDER, CaptionNGrams
from dora_lightning.metrics.caption_rows import CaptionRows, split_captions
from dora_lightning.metrics.caption_tokenizers import Tokenizer
from dora_lightning.metrics.cider import cider_d_of_ngrams

_NAMES = ("cider_d", *(f"bleu_{order}" for order in range(1, MAX_ORDER + 1)), "rouge_l")
_BETA = 1.2
# what keeps COCO's BLEU from dividing by 0, a part of its numbers where nothing matches
_TINY, _SMALL = 1e-15, 1e-9


def coco_bleu(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str | Tokenizer = "ptb",
    ascii_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """BLEU-1 to BLEU-4 of all samples, float64 [4], and of each: float64 [samples, 4], in [0, 1].

    Clipped n-gram precision with a brevity penalty against the reference whose length is closest, the shorter of two
    (Papineni et al. 2002). Arguments and errors are those of :func:`~dora_lightning.metrics.cider_d`.

    >>> coco_bleu(["a cat is on a mat"], [["A cat is on the mat.", "a cat on a mat"]])[0]
    tensor([1.0000, 1.0000, 0.9086, 0.7071], dtype=torch.float64)
    """
    return _bleu(CaptionNGrams(*split_captions(candidates, references, tokenizer, ascii_only)))


def coco_rouge_l(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str | Tokenizer = "ptb",
    ascii_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """ROUGE-L of all samples, a scalar, and of each: float64 [samples], in [0, 1].

    F-measure of the longest common subsequence, beta 1.2, of the best precision and the best recall over a sample's
    references (Lin 2004). Arguments and errors are those of :func:`~dora_lightning.metrics.cider_d`.

    >>> coco_rouge_l(["a cat on the mat"], [["A cat sat on the mat.", "a cat on a mat"]])[0]
    tensor(0.8944, dtype=torch.float64)
    """
    scores = _rouge_l(*split_captions(candidates, references, tokenizer, ascii_only))
    return scores.mean(), scores


def caption_scores(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str | Tokenizer = "ptb",
    ascii_only: bool = False,
) -> dict[str, Tensor]:
    """``cider_d``, ``bleu_1`` to ``bleu_4`` and ``rouge_l`` of all samples, each a scalar; captions are split once.

    CIDEr-D is in [0, 10], the others in [0, 1]; papers report all times 100. Arguments and errors are those of
    :func:`~dora_lightning.metrics.cider_d`.

    >>> caption_scores(["a cat on the mat"], [["A cat sat on the mat.", "a cat on a mat"]])["bleu_3"]
    tensor(0.8736, dtype=torch.float64)
    """
    words = split_captions(candidates, references, tokenizer, ascii_only)
    ngrams = CaptionNGrams(*words)
    scores = (cider_d_of_ngrams(ngrams).mean(), *_bleu(ngrams)[0], _rouge_l(*words).mean())
    return dict(zip(_NAMES, scores, strict=True))


class CaptionScores(CaptionRows):
    """CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L of captions over all processes; see :func:`caption_scores`.

    ``update`` takes captions, as many sets of references and, if wanted, as many ids: of samples with the same id only
    the first counts, such as those that a distributed sampler repeats to fill up. ``compute`` returns ``cider_d``,
    ``bleu_1`` to ``bleu_4`` and ``rouge_l``, nan if nothing was seen.

    Example:
        >>> metric = CaptionScores()
        >>> metric.update(["a cat on a mat"], [["A cat on a mat.", "a cat sleeps on a mat"]], ids=["cat"])
        >>> metric.update(["two cats run"], [["Two dogs run.", "Two dogs are running!"]], ids=["dogs"])
        >>> scores = metric.compute()
        >>> scores["cider_d"], scores["bleu_1"], scores["rouge_l"]
        (tensor(4.2626), tensor(0.8750), tensor(0.8333))
    """

    def __init__(self, tokenizer: str | Tokenizer = "ptb", ascii_only: bool = False, **kwargs: Any) -> None:
        super().__init__(tokenizer, ascii_only, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """All scores."""
        scores = caption_scores(*self._captions(), self.tokenizer, self.ascii_only)
        return {name: score.float().to(self.device) for name, score in scores.items()}


def _bleu(ngrams: CaptionNGrams) -> tuple[Tensor, Tensor]:
    samples, lengths = ngrams.samples, ngrams.lengths
    if samples == 0:
        return torch.full((MAX_ORDER,), torch.nan, dtype=torch.float64), torch.zeros(0, MAX_ORDER, dtype=torch.float64)
    per_sample = lengths[samples:].split(ngrams.reference_counts.tolist())
    closest = torch.tensor(
        [
            min(people.tolist(), key=lambda length: (abs(length - own), length))
            for own, people in zip(lengths[:samples].tolist(), per_sample, strict=True)
        ]
    )
    matches, possible = [], []
    for n, order in enumerate(ngrams.orders, start=1):
        # a candidate's n-gram counts as often as it occurs in the reference that has most of it
        limit = torch.zeros_like(order.candidates.times).scatter_reduce(
            0, order.shared_candidate, order.references.times[order.shared_reference], "amax"
        )
        clipped = torch.minimum(order.candidates.times, limit)
        matches.append(torch.zeros(samples, dtype=torch.float64).index_add_(0, order.candidates.caption, clipped))
        possible.append((lengths[:samples] - n + 1).clamp(min=0))
    counts = torch.stack(matches, dim=1), torch.stack(possible, dim=1), lengths[:samples], closest
    return _bleu_of_counts(*(count.sum(dim=0) for count in counts)), _bleu_of_counts(*counts)


def _bleu_of_counts(matches: Tensor, possible: Tensor, length: Tensor, closest: Tensor) -> Tensor:
    """BLEU [..., 4] of counts [..., 4] and of lengths [...]."""
    precision = (matches + _TINY) / (possible + _SMALL)
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = torch.exp((1 - 1 / ratio).clamp(max=0))
    return precision.cumprod(dim=-1) ** (1 / torch.arange(1, MAX_ORDER + 1)) * brevity.unsqueeze(-1)


def _rouge_l(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Tensor:
    scores = [_rouge_l_of_one(words, people) for words, people in zip(candidates, references, strict=True)]
    return torch.tensor(scores, dtype=torch.float64)


def _rouge_l_of_one(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # to COCO a caption without words is one empty word
    candidate = candidate or [""]
    references = [reference or [""] for reference in references]
    common = [_longest_common_subsequence(candidate, reference) for reference in references]
    precision = max(common) / len(candidate)
    recall = max(length / len(reference) for length, reference in zip(common, references, strict=True))
    if precision == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, by a row of the usual table at a time, kept as the bits of an integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(one)) - 1
    row = every  # a bit is 0 where the subsequence grows by one
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & every
    return len(one) - row.bit_count()

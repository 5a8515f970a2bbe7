"""CIDEr-D: how much a caption says of what people agree on about an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dora_lightning.metrics.caption_ngrams import MAX_ORDER, CaptionNGrams, NGrams
from dora_lightning.metrics.caption_rows import CaptionRows, split_captions
from dora_lightning.metrics.caption_tokenizers import Tokenizer

_SIGMA = 6.0
_SCALE = 10.0


def cider_d(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str | Tokenizer = "ptb",
    ascii_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """CIDEr-D of all samples, a scalar, and of each: float64 [samples], in [0, 10]; papers report it times 100.

    Cosine similarity of the n-grams (one to four words) of a candidate with those of each reference, weighted by how
    rare they are among the samples' references, with counts clipped to the reference's and a Gaussian penalty (sigma 6)
    on a difference in length; the mean over references and n, times 10 (Vedantam et al. 2015, CIDEr, section 6). The
    numbers are those of the COCO evaluation (``pycocoevalcap``), whose length is the number of bigrams. As n-grams are
    weighted over the whole set, a score depends on all samples; that of a single sample is 0.

    Args:
        candidates: one caption per sample.
        references: as many sets of people's captions, at least one caption each.
        tokenizer: ``"ptb"``, ``"java"`` or a function from a caption to its words; see
            :func:`~dora_lightning.metrics.tokenize_captions`.
        ascii_only: put a space for each character that is not ASCII first, as the VALUE benchmark does.

    Raises:
        ValueError: not one set of references per candidate, a set without any, or an unknown tokenizer.

    >>> people = [["A cat on a mat.", "a cat sleeps on a mat"], ["Two dogs run.", "Two dogs are running!"]]
    >>> cider_d(["a cat on a mat", "two cats run"], people)
    (tensor(4.2626, dtype=torch.float64), tensor([7.3360, 1.1892], dtype=torch.float64))
    """
    scores = cider_d_of_ngrams(CaptionNGrams(*split_captions(candidates, references, tokenizer, ascii_only)))
    return scores.mean(), scores


def cider_d_of_ngrams(ngrams: CaptionNGrams) -> Tensor:
    """CIDEr-D of each sample: float64 [samples]."""
    similarity = sum(_similarity(ngrams, order) for order in ngrams.orders)  # [K], 0 for candidates
    # the candidate of a sample is the caption of its number; captions differ by as many bigrams as words, unless one is
    # empty, and then its similarity is 0
    difference = (ngrams.lengths[ngrams.sample] - ngrams.lengths).double()
    similarity = similarity * torch.exp(-(difference**2) / (2 * _SIGMA**2))
    total = torch.zeros(ngrams.samples, dtype=torch.float64).index_add_(0, ngrams.sample, similarity)
    return total * _SCALE / (MAX_ORDER * ngrams.reference_counts)


def _similarity(ngrams: CaptionNGrams, order: NGrams) -> Tensor:
    """Clipped cosine similarity of each reference with its candidate: [K], 0 for candidates."""
    candidates, references = order.candidates, order.references
    # document frequency: in the references of how many samples an n-gram occurs
    documents = torch.unique(ngrams.sample[references.caption] * order.different + references.gram)
    frequency = torch.bincount(documents % max(order.different, 1), minlength=order.different)
    rarity = math.log(max(ngrams.samples, 1)) - frequency.clamp(min=1).double().log()
    weight_c = candidates.times * rarity[candidates.gram]  # [C]
    weight_r = references.times * rarity[references.gram]  # [R]
    zeros = torch.zeros(len(ngrams.sample), dtype=torch.float64)
    norm = zeros.index_add(0, candidates.caption, weight_c**2).index_add(0, references.caption, weight_r**2).sqrt()
    shared_r = weight_r[order.shared_reference]
    clipped = torch.minimum(weight_c[order.shared_candidate], shared_r) * shared_r
    dot = zeros.index_add(0, references.caption[order.shared_reference], clipped)
    # a caption whose every n-gram is in all samples has no direction: its similarity is 0
    lengths = norm[ngrams.sample] * norm
    return torch.where(lengths > 0, dot / lengths, 0.0)


class CIDErD(CaptionRows):
    """CIDEr-D over all captions of all processes, with n-grams weighted over that whole set; see :func:`cider_d`.

    ``update`` takes captions, as many sets of references and, if wanted, as many ids: of samples with the same id only
    the first counts, such as those that a distributed sampler repeats to fill up. ``compute`` returns a scalar in
    [0, 10], nan if nothing was seen.

    Example:
        >>> metric = CIDErD()
        >>> metric.update(["a cat on a mat"], [["A cat on a mat.", "a cat sleeps on a mat"]], ids=[391895])
        >>> metric.update(["two cats run"], [["Two dogs run.", "Two dogs are running!"]], ids=[522418])
        >>> metric.update(["a cat on a mat"], [["A cat on a mat.", "a cat sleeps on a mat"]], ids=[391895])
        >>> metric.compute()
        tensor(4.2626)
    """

    plot_upper_bound = _SCALE

    def __init__(self, tokenizer: str | Tokenizer = "ptb", ascii_only: bool = False, **kwargs: Any) -> None:
        super().__init__(tokenizer, ascii_only, **kwargs)

    def compute(self) -> Tensor:
        """CIDEr-D of all samples."""
        candidates, references = self._captions()
        return cider_d(candidates, references, self.tokenizer, self.ascii_only)[0].float().to(self.device)

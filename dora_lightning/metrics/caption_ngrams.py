"""n-grams of candidate captions and of their references, counted as tensors for all captions at once.

Shapes: S samples, one candidate each; K captions, the S candidates and then all references; C and R rows, one for each
different n-gram of a candidate and of a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

MAX_ORDER = 4
"""CIDEr-D and BLEU-4 count n-grams of one to four words."""


class Counts(NamedTuple):
    """How often each n-gram occurs in each caption, in order of both."""

    caption: Tensor
    """Number of the caption: long [rows]."""

    gram: Tensor
    """Number of the n-gram, the same in every caption: long [rows]."""

    times: Tensor
    """Occurrences of the n-gram in the caption: float64 [rows]."""


class NGrams(NamedTuple):
    """All n-grams of one length."""

    candidates: Counts
    """[C] rows."""

    references: Counts
    """[R] rows."""

    shared_candidate: Tensor
    """[M]; with ``shared_reference`` the pairs of rows that hold the same n-gram of the same sample."""

    shared_reference: Tensor
    """[M]."""

    different: int
    """Number of different n-grams in all captions."""


class CaptionNGrams:
    """The n-grams of captions given as lists of words, ``references`` with at least one list per candidate.

    A word with a space inside is taken apart, as it is by the COCO evaluation, which passes captions on as texts.
    """

    def __init__(self, candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> None:
        captions = [" ".join(words).split() for words in chain(candidates, chain.from_iterable(references))]
        counts = torch.tensor([len(captions_of_one) for captions_of_one in references], dtype=torch.long)
        samples = torch.arange(len(candidates))
        self.samples = len(candidates)
        self.reference_counts = counts  # [S]
        self.sample = torch.cat([samples, samples.repeat_interleave(counts)])  # [K], the sample of a caption
        self.lengths = torch.tensor([len(words) for words in captions], dtype=torch.long)  # [K], in words
        self.orders = [self._split(rows) for rows in _count(captions, self.lengths)]  # one NGrams for each n

    def _split(self, rows: Counts) -> NGrams:
        is_candidate = rows.caption < self.samples
        candidates = Counts(*(column[is_candidate] for column in rows))
        references = Counts(*(column[~is_candidate] for column in rows))
        different = int(rows.gram.max()) + 1 if len(rows.gram) else 0
        # an n-gram of a sample is one number; those of candidates are in order
        wanted = self.sample[references.caption] * different + references.gram
        present = candidates.caption * different + candidates.gram
        place = torch.searchsorted(present, wanted)
        found = place < len(present)
        found[found.clone()] = present[place[found]] == wanted[found]
        return NGrams(candidates, references, place[found], found.nonzero().flatten(), different)


def _count(captions: list[list[str]], lengths: Tensor) -> list[Counts]:
    vocabulary: dict[str, int] = {}
    tokens = torch.tensor([vocabulary.setdefault(w, len(vocabulary)) for w in chain(*captions)], dtype=torch.long)
    caption = torch.arange(len(captions)).repeat_interleave(lengths)
    starts, grams = torch.arange(len(tokens)), tokens
    orders = []
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            # an n-gram is the (n-1)-gram at its start and one word more, where its caption has one
            last = starts + order - 1
            inside = last < len(tokens)
            inside[inside.clone()] = caption[last[inside]] == caption[starts[inside]]
            starts, grams, last = starts[inside], grams[inside], last[inside]
            grams = torch.unique(grams * len(vocabulary) + tokens[last], return_inverse=True)[1]
        different = int(grams.max()) + 1 if len(grams) else 1
        keys, count = torch.unique(caption[starts] * different + grams, return_counts=True)
        orders.append(Counts(keys // different, keys % different, count.double()))
    return orders

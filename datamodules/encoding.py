"""Samples -> token ids -> padded batches, with the prompt masked out of the labels."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from datamodules.steps import Counted
from dora_lightning.data import IGNORE, Sample
from dora_lightning.pretrained import brings_special_tokens

_PAD_MULTIPLE = 8  # tensor cores want it, and the published collator does it
_CHUNK = 1024
_Tokenizer: TypeAlias = Callable[..., Any]


class EncodedSample(NamedTuple):
    """A sample and its tokens; ``input_ids`` and ``labels`` are ``[tokens]``, with one token for each image."""

    sample: Sample
    input_ids: torch.Tensor
    labels: torch.Tensor
    image_tokens: tuple[int, ...] = ()
    """How many tokens the model reads in place of each image's one."""
    cut: int = 0
    """Tokens on the right that were cut off."""
    turns: torch.Tensor | None = None
    """``[tokens]``, of several samples that share an image; see :mod:`datamodules.sharing`."""

    @property
    def supervised(self) -> int:
        """How many tokens count towards the loss; the first does not, since nothing comes before it."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def trains(self) -> bool:
        """Whether any token counts towards the loss."""
        return self.supervised > 0

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return len(self.input_ids) + sum(self.image_tokens) - len(self.image_tokens)


def encode_samples(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int | None = 256,
    train_on_inputs: bool = False,
) -> list[EncodedSample]:
    """Tokenise prompt and target as one text, so that training sees the tokens that the text really has.

    The end-of-sequence token is appended where the text does not end in a special token of its own, then tokens beyond
    ``cutoff_len`` are cut off on the right, as in LLM-Adapters' ``finetune.py``. A token counts as target if it reaches
    past the prompt's last character, so one that straddles the boundary is trained; likewise one that reaches into a
    span of ``Sample.answered``.

    Args:
        samples: What to encode.
        tokenizer: A fast tokenizer says which characters a token stands for; with a slow one, boundaries are where
            the tokens of the text up to there and of the whole text part.
        cutoff_len: Most tokens in a sequence; None to cut nothing.
        train_on_inputs: Count the prompt towards the loss too.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    ends = tuple(special.union(tokenizer.all_special_tokens))
    eos = tokenizer.eos_token_id
    encoded: list[EncodedSample] = []
    for sample, ids, trained in _tokenised(samples, tokenizer):
        if eos is not None and ids[-1:] != [eos] and not (sample.prompt + sample.target).endswith(ends):
            ids = [*ids, eos]
            trained = torch.cat([trained, torch.tensor([True])])
        input_ids = torch.tensor(
            ids[:cutoff_len], dtype=torch.int32
        )  # half the memory of int64; the collator widens it
        labels = input_ids.clone()
        if not train_on_inputs:
            labels[~trained[:cutoff_len]] = IGNORE
        encoded.append(EncodedSample(sample, input_ids, labels, cut=len(ids) - len(input_ids)))
    return encoded


def _tokenised(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Sample, list[int], torch.Tensor]]:
    """Each sample with its tokens, and ``[tokens]`` of bool: which of them the model is to write."""
    tokenise = _tokenise_fast if tokenizer.is_fast else _tokenise_slow
    for brought, run in groupby(
        samples, lambda sample: brings_special_tokens(tokenizer, sample.prompt + sample.target)
    ):
        # verbose=False: transformers warns of texts longer than the model's window, and whoever called cuts them
        tokenizer_call = partial(tokenizer, add_special_tokens=not brought, return_attention_mask=False, verbose=False)
        while chunk := list(islice(run, _CHUNK)):
            yield from zip(chunk, *tokenise(chunk, tokenizer_call), strict=True)


def _tokenise_fast(samples: list[Sample], tokenizer: _Tokenizer) -> tuple[list[list[int]], list[torch.Tensor]]:
    tokens = tokenizer([sample.prompt + sample.target for sample in samples], return_offsets_mapping=True)
    masks = []
    for sample, offsets in zip(samples, tokens["offset_mapping"], strict=True):
        start, end = torch.tensor(offsets, dtype=torch.int32).view(-1, 2).unbind(1)
        # all that follows the first token of the target, special tokens included, whose offsets are 0
        trained = (end > len(sample.prompt)).cumsum(0) > 0
        for first, last in sample.answered:
            # byte-level tokenizers do not count white space in, so a token of nothing else starts where it ends
            trained |= (end > first) & ((start < last) | (end <= last))
        masks.append(trained)
    return tokens["input_ids"], masks


def _tokenise_slow(samples: list[Sample], tokenizer: _Tokenizer) -> tuple[list[list[int]], list[torch.Tensor]]:
    texts = [sample.prompt + sample.target for sample in samples]
    rows = tokenizer(texts)["input_ids"]
    masks = []
    for sample, text, ids in zip(samples, texts, rows, strict=True):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        # what the tokenizer put at the beginning
        added = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
        trained = torch.zeros(len(ids), dtype=torch.bool)
        trained[added + _tokens_before(tokenizer, text[: len(sample.prompt)], plain)[0] :] = True
        for first, last in sample.answered:
            start, _ = _tokens_before(tokenizer, text[:first], plain)
            _, stop = _tokens_before(tokenizer, text[:last], plain)
            trained[added + start : added + stop] = True
        masks.append(trained)
    return rows, masks


def _tokens_before(tokenizer: _Tokenizer, beginning: str, ids: list[int]) -> tuple[int, int]:
    """How many of a text's tokens lie within its beginning, and how many with one that reaches out of it."""
    within = tokenizer(beginning, add_special_tokens=False)["input_ids"]
    common = _common_prefix(within, ids)
    return common, common + (common < len(within))


def _common_prefix(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class EncodedDataset(Dataset):
    """Encoded samples, drawn a whole batch at a time: ``dataset[[3, 1]]``, or packed, ``dataset[[[3, 1], [2]]]``."""

    def __init__(self, encoded: list[EncodedSample]) -> None:
        self.encoded = encoded
        self.lengths = [item.length for item in encoded]
        self.groups = [bool(item.image_tokens) for item in encoded]
        """Which samples have images: batches hold samples of one kind."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.encoded)

    def __getitem__(self, indices: list[int] | list[list[int]] | int) -> list[Any]:
        """The samples of one batch, or of each of its rows.

        An index alone is a batch of one sample, where Lightning puts its own sampler in (``overfit_batches``).
        """
        if isinstance(indices, int):
            indices = [indices]
        return [self.encoded[i] if isinstance(i, int) else [self.encoded[j] for j in i] for i in indices]


class Collator:
    """Pads encoded samples on the right to a batch.

    The width is a multiple of 8, but never above ``cutoff_len``. The batch is a dict of ``input_ids``,
    ``attention_mask`` and ``labels``, each ``[batch, tokens]`` of int64, and ``samples``, the list of samples; and
    ``turns``, likewise, where several samples share a row.

    Args:
        pad_token_id: The token to pad with; it is masked in attention and labels.
        cutoff_len: The most tokens that a sample has.
    """

    def __init__(self, pad_token_id: int, cutoff_len: int) -> None:
        self.pad_token_id = pad_token_id
        self.cutoff_len = cutoff_len

    def supervised(self, encoded: Sequence[Any]) -> Counted:
        """What the loss of samples is the mean over, before they are made a batch: their supervised tokens."""
        return "tokens", sum(item.supervised for item in encoded)

    def __call__(self, encoded: list[EncodedSample]) -> dict[str, Any]:
        """Make the batch."""
        lengths = torch.tensor([len(item.input_ids) for item in encoded])
        longest = int(lengths.max())
        width = max(longest, min(self.cutoff_len, -(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE))
        batch = {
            "input_ids": _pad([item.input_ids for item in encoded], width, self.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": _pad([item.labels for item in encoded], width, IGNORE),
            "samples": [item.sample for item in encoded],
        }
        if any(item.turns is not None for item in encoded):
            turns = [torch.zeros_like(i.input_ids) if i.turns is None else i.turns for i in encoded]
            batch["turns"] = _pad(turns, width, 0)
        return batch


def _pad(rows: list[torch.Tensor], width: int, value: int) -> torch.Tensor:
    padded = pad_sequence(rows, batch_first=True, padding_value=value).long()
    return torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=value)

"""Samples -> token ids -> padded batches, with the prompt masked out of the labels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dora_lightning.data import IGNORE, Sample

_PAD_MULTIPLE = 8  # tensor cores want it, and the published collator does it
_CHUNK = 1024


class EncodedSample(NamedTuple):
    """A sample and its tokens; ``input_ids`` and ``labels`` are ``[tokens]``."""

    sample: Sample
    input_ids: torch.Tensor
    labels: torch.Tensor

    @property
    def trains(self) -> bool:
        """Whether any token counts towards the loss."""
        return bool((self.labels != IGNORE).any())


def encode_samples(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int = 256,
    train_on_inputs: bool = False,
) -> list[EncodedSample]:
    """Tokenise prompt and target as one text, so that training sees the tokens that the text really has.

    Tokens beyond ``cutoff_len`` are cut off on the right; the end-of-sequence token is appended where there is room, as
    in LLM-Adapters' ``finetune.py``. A token counts as target if it reaches past the prompt's last character, so one
    that straddles the boundary is trained.

    Args:
        samples: What to encode.
        tokenizer: A fast tokenizer gives the boundary by character offsets; for a slow one it is where the tokens
            of the prompt alone and of the whole text part.
        cutoff_len: Most tokens in a sequence.
        train_on_inputs: Count the prompt towards the loss too.
    """
    encoded: list[EncodedSample] = []
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK]
        texts = [sample.prompt + sample.target for sample in chunk]
        options = {"truncation": True, "max_length": cutoff_len, "return_attention_mask": False}
        tokens = tokenizer(texts, return_offsets_mapping=tokenizer.is_fast, **options)
        if tokenizer.is_fast:
            boundaries = [
                next((i for i, (_, end) in enumerate(offsets) if end > len(sample.prompt)), len(offsets))
                for sample, offsets in zip(chunk, tokens["offset_mapping"], strict=True)
            ]
        else:
            prompts = tokenizer([sample.prompt for sample in chunk], **options)
            boundaries = [
                _common_prefix(prompt, ids)
                for prompt, ids in zip(prompts["input_ids"], tokens["input_ids"], strict=True)
            ]
        for sample, ids, boundary in zip(chunk, tokens["input_ids"], boundaries, strict=True):
            encoded.append(_encoded(sample, ids, boundary, tokenizer.eos_token_id, cutoff_len, train_on_inputs))
    return encoded


def _encoded(
    sample: Sample, ids: list[int], boundary: int, eos: int | None, cutoff_len: int, train_on_inputs: bool
) -> EncodedSample:
    if eos is not None and ids[-1:] != [eos] and len(ids) < cutoff_len:
        ids = [*ids, eos]
    input_ids = torch.tensor(ids, dtype=torch.int32)  # half the memory of int64; the collator widens it
    labels = input_ids.clone()
    if not train_on_inputs:
        labels[:boundary] = IGNORE
    return EncodedSample(sample, input_ids, labels)


def _common_prefix(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class EncodedDataset(Dataset):
    """Encoded samples, drawn a whole batch at a time: ``dataset[[3, 1]]``."""

    def __init__(self, encoded: list[EncodedSample]) -> None:
        self.encoded = encoded
        self.lengths = [len(item.input_ids) for item in encoded]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.encoded)

    def __getitem__(self, indices: list[int] | int) -> list[EncodedSample]:
        """The samples of one batch; of one sample where Lightning puts its own sampler in (``overfit_batches``)."""
        if isinstance(indices, int):
            indices = [indices]
        return [self.encoded[index] for index in indices]


class Collator:
    """Pads encoded samples on the right to a batch.

    The width is a multiple of 8, but never above ``cutoff_len``. The batch is a dict of ``input_ids``,
    ``attention_mask`` and ``labels``, each ``[batch, tokens]`` of int64, and ``samples``, the list of samples.

    Args:
        pad_token_id: The token to pad with; it is masked in attention and labels.
        cutoff_len: The most tokens that a sample has.
    """

    def __init__(self, pad_token_id: int, cutoff_len: int) -> None:
        self.pad_token_id = pad_token_id
        self.cutoff_len = cutoff_len

    def __call__(self, encoded: list[EncodedSample]) -> dict[str, Any]:
        """Make the batch."""
        lengths = torch.tensor([len(item.input_ids) for item in encoded])
        longest = int(lengths.max())
        width = max(longest, min(self.cutoff_len, -(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE))
        return {
            "input_ids": _pad([item.input_ids for item in encoded], width, self.pad_token_id),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": _pad([item.labels for item in encoded], width, IGNORE),
            "samples": [item.sample for item in encoded],
        }


def _pad(rows: list[torch.Tensor], width: int, value: int) -> torch.Tensor:
    padded = pad_sequence(rows, batch_first=True, padding_value=value).long()
    return torch.nn.functional.pad(padded, (0, width - padded.shape[1]), value=value)

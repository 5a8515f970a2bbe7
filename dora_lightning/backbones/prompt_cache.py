"""Key-value caches of prompts in which no token is read twice: not what prompts begin with alike, nor once per beam.

Shapes: N prompts, T tokens of the longest, H key-value heads, D features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache

_WORTH_A_PASS = 256
"""Tokens that reading a common beginning on its own must save: a pass has a price of its own."""


class PromptCache(DynamicCache):
    """The cache of prompts that several beams share: what reordering the beams moves is generated tokens alone."""

    prompt_tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each row what row ``beam_idx`` of the same prompt has generated."""
        layer: Any
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                generated = states[:, :, self.prompt_tokens :]
                generated.copy_(generated.index_select(0, beam_idx.to(states.device)))


class Reader(Protocol):
    """Has a model read tokens ``[N, T]``, writing to the cache."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache) -> Any:
        """The mask is over what the cache holds and the tokens, the positions are of the tokens."""


def read_prompts(
    read: Reader, cache: PromptCache, rows: Sequence[Sequence[int]], device: torch.device, share: bool = True
) -> Tensor:
    """Fill a cache with prompts, padded on the left, and return the mask ``[N, T]`` of what is no padding.

    Args:
        read: the model.
        cache: an empty one.
        rows: the tokens of each prompt, at least one.
        device: where the model is.
        share: read what all prompts begin with once for all of them, if that saves enough.
    """
    start = shared_start(rows) if share else []
    mask = torch.ones(len(rows), len(start), dtype=torch.long, device=device)
    if start:
        tokens = torch.tensor([start], device=device)
        read(tokens, mask[:1], torch.arange(len(start), device=device)[None], cache)
        cache.batch_repeat_interleave(len(rows))
    rests = [torch.tensor(row[len(start) :], dtype=torch.long) for row in rows]
    lengths = torch.tensor([len(rest) for rest in rests], device=device)
    width = int(lengths.max())
    if width:
        rest_ids = pad_sequence(rests, batch_first=True, padding_side="left").to(device)
        rest_mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        mask = torch.cat([mask, rest_mask], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, len(start) :]
        read(rest_ids, mask, positions, cache)
    if start and not mask.all():
        mask = _padding_first(cache, mask)
    cache.prompt_tokens = mask.shape[1]
    return mask


def shared_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows begin with, or nothing if reading it once for all of them saves too little."""
    start = common_start(rows)
    return start if len(start) * (len(rows) - 1) >= _WORTH_A_PASS else []


def common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that all rows begin with."""
    length = next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows)))
    return list(rows[0][:length])


def _padding_first(cache: PromptCache, mask: Tensor) -> Tensor:
    """Move the padding between the common beginning and the rest to the left; keys know their positions already."""
    order = mask.argsort(dim=1, stable=True)  # [N, T]
    layer: Any
    for layer in cache.layers:
        layer.keys, layer.values = (
            states.gather(2, order[:, None, :, None].to(states.device).expand_as(states))
            for states in (layer.keys, layer.values)  # [N, H, T, D]
        )
    return mask.gather(1, order)

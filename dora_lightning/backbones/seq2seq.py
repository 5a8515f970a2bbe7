"""Losses and scores of an encoder-decoder, with logits only where they are needed.

Shapes: B samples, T tokens that the encoder reads, S positions of its output, L target tokens, D hidden features, V
vocabulary, N positions that are supervised or scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import shift_tokens_right

from dora_lightning.adapters import weights_kept
from dora_lightning.backbones.finite_logits import FiniteLogits
from dora_lightning.data import IGNORE
from dora_lightning.vl_bart.model import VLBart


def target_loss(
    model: VLBart, hidden: Tensor, mask: Tensor, labels: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, int]:
    """Cross-entropy of the targets, and how many tokens, or rows with a target, it is the mean over.

    Args:
        model: the model.
        hidden: the encoder's output ``[B, S, D]``.
        mask: ``[B, S]``, 0 on padding.
        labels: ``[B, L]``, begun and ended by the tokenizer's own tokens, ``IGNORE`` on padding.
        row_weights: ``[B]``; the loss is then the mean over rows that have a target of weight times the mean over a
            row's tokens, as in VL-T5's VQA. None for the mean over all tokens.
    """
    supervised = labels != IGNORE
    tokens = int(supervised.sum())
    logits = _target_logits(model, hidden, mask, labels)  # [N, V]
    if not tokens:
        return logits.sum() * 0.0, 0
    if row_weights is None:
        return F.cross_entropy(logits.float(), labels[supervised]), tokens
    losses = F.cross_entropy(logits.float(), labels[supervised], reduction="none")
    rows = supervised.nonzero()[:, 0]
    sums = losses.new_zeros(len(labels)).index_add(0, rows, losses)
    lengths = supervised.sum(dim=1)
    weighted = (row_weights * sums / lengths.clamp(min=1))[lengths > 0]
    return weighted.mean(), len(weighted)


@torch.no_grad()
@weights_kept()
def target_log_likelihoods(
    model: VLBart, tokenizer: PreTrainedTokenizerBase, hidden: Tensor, mask: Tensor, options: Sequence[Sequence[str]]
) -> list[Tensor]:
    """Log-likelihood of each sample's options as targets, in fp32; the encoder's output serves all of them.

    The token that ends a text counts where an option is the beginning of another one, and only there: else it would
    tell nothing apart. So of two options of one token each, their first tokens decide, as in VL-T5's NLVR2.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        hidden: the encoder's output ``[B, S, D]``.
        mask: ``[B, S]``, 0 on padding.
        options: texts for each sample; one may have none.

    Returns:
        For each sample ``[options]``.
    """
    if not any(options):
        return [torch.zeros(0, device=hidden.device) for _ in options]
    rows: list[list[int]] = []
    for texts in options:
        targets = [list(tokenizer(text)["input_ids"]) for text in texts]
        if not _some_begin_others([ids[:-1] for ids in targets]):
            targets = [ids[:-1] for ids in targets]
        rows += targets
    owner = torch.tensor([sample for sample, texts in enumerate(options) for _ in texts], device=hidden.device)
    labels = _padded(rows, hidden.device)
    logits = _target_logits(model, hidden[owner], mask[owner], labels)
    supervised = labels != IGNORE
    log_probs = -F.cross_entropy(logits.float(), labels[supervised], reduction="none")
    sums = log_probs.new_zeros(len(rows)).index_add(0, supervised.nonzero()[:, 0], log_probs)
    return list(sums.split([len(texts) for texts in options]))


@torch.no_grad()
@weights_kept()
def generate_targets(
    model: VLBart, tokenizer: PreTrainedTokenizerBase, hidden: Tensor, mask: Tensor, **options: Any
) -> list[str]:
    """Text that the decoder writes for each sample, without special tokens.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        hidden: the encoder's output ``[B, S, D]``.
        mask: ``[B, S]``, 0 on padding.
        options: handed to ``generate`` of transformers (``max_new_tokens``, ``num_beams``, ...).

    Raises:
        NonFiniteError: the model's scores are NaN or infinite.
    """
    outputs = BaseModelOutput(last_hidden_state=hidden)
    finite = FiniteLogits([f"row {number} of the batch" for number in range(len(hidden))])
    ids = cast(Any, model).generate(encoder_outputs=outputs, attention_mask=mask, **finite.added_to(options))
    finite.check()
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def encode_prompts(
    model: VLBart, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], vision: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The encoder's output ``[B, S, D]`` of texts and what they are about, and its mask ``[B, S]``."""
    inputs = tokenizer(list(prompts), padding=True, return_tensors="pt").to(model.device)
    return model.encode(inputs["input_ids"], inputs["attention_mask"], **(vision or {}))


def _target_logits(model: VLBart, hidden: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Logits ``[N, V]`` at supervised positions."""
    config: Any = model.config
    inputs = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
    # padding comes after all that is supervised, so that a causal decoder needs no mask for it
    output = model.model.decoder(
        input_ids=inputs, encoder_hidden_states=hidden, encoder_attention_mask=mask, use_cache=False
    ).last_hidden_state
    return model.lm_head(output[labels != IGNORE]) + model.final_logits_bias.to(output.device)


def _some_begin_others(rows: Sequence[Sequence[int]]) -> bool:
    ordered = sorted(map(tuple, rows))
    return any(after[: len(before)] == before for before, after in pairwise(ordered))


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=IGNORE).to(device)

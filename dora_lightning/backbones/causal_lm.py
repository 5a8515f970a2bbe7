"""Losses and scores of a causal language model, with logits only where they are needed.

Shapes: B sequences, T tokens, D hidden features, V vocabulary, N positions that are supervised or scored. With a
vocabulary of 128,000 the logits ``[B, T, V]`` would dominate memory; here only ``[N, V]`` exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dora_lightning.data import IGNORE

# models that change the output embedding's product before the softmax
_LOGIT_OPTIONS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def supervised_loss(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, int]:
    """Mean cross-entropy over supervised positions, and how many there are.

    Args:
        model: causal language model.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 0 on padding.
        labels: ``[B, T]``, the input's own ids where supervised, ``IGNORE`` elsewhere; shifted here.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE  # [B, T - 1]
    hidden = _decoder(model)(input_ids, attention_mask).last_hidden_state  # [B, T, D]
    logits = _logits(model, hidden[:, :-1][supervised])  # [N, V]
    count = int(supervised.sum())
    if count == 0:
        return logits.sum() * 0.0, 0
    return F.cross_entropy(logits.float(), targets[supervised]), count


@torch.no_grad()
def option_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
) -> list[Tensor]:
    """Log-likelihood of each option as the continuation of its prompt, in one batch.

    The tokens that all options of a question share with its prompt are read once; their key-value cache then serves
    every option. Prompt and option are tokenised together, so tokens that straddle the border are those of the text.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        prompts: one per question.
        options: texts that are appended to the prompt without a separator, at least one per question.

    Returns:
        For each question ``[options]``, in fp32.
    """
    questions = [_tokenize_options(tokenizer, p, o) for p, o in zip(prompts, options, strict=True)]
    # the last shared token is read with each option, since it predicts the option's first token
    prefixes = [shared[:-1] for shared, _ in questions]
    if min(map(len, prefixes)) == 0:
        prefixes = [[] for _ in questions]
    rows = [
        (question, shared[len(prefix) :], continuation)
        for question, (prefix, (shared, continuations)) in enumerate(zip(prefixes, questions, strict=True))
        for continuation in continuations
    ]
    owner = torch.tensor([question for question, _, _ in rows], device=model.device)
    inputs = _pad([[*start, *continuation[:-1]] for _, start, continuation in rows], model.device)
    targets = _pad([[*start[1:], *continuation] for _, start, continuation in rows], model.device)
    scored = _pad([[0] * (len(start) - 1) + [1] * len(c) for _, start, c in rows], model.device).bool()
    lengths = torch.tensor([len(start) + len(c) - 1 for _, start, c in rows], device=model.device)
    mask = (torch.arange(inputs.shape[1], device=model.device) < lengths[:, None]).long()
    offset = torch.tensor([len(prefixes[question]) for question, _, _ in rows], device=model.device)
    positions = offset[:, None] + torch.arange(inputs.shape[1], device=model.device)

    cache = None
    if prefixes[0]:
        prefix_ids = _pad(prefixes, model.device, left=True)
        prefix_lengths = torch.tensor([len(prefix) for prefix in prefixes], device=model.device)
        width = prefix_ids.shape[1]
        prefix_mask = (torch.arange(width, device=model.device) >= width - prefix_lengths[:, None]).long()
        prefix_positions = (prefix_mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        _decoder(model)(prefix_ids, prefix_mask, prefix_positions, cache)
        cache.batch_select_indices(owner)
        mask = torch.cat([prefix_mask[owner], mask], dim=1)
    # by position: transformers renames the cache's keyword between releases
    hidden = _decoder(model)(inputs, mask, positions, cache).last_hidden_state
    log_probs = torch.zeros(scored.shape, device=model.device)
    logits = _logits(model, hidden[scored]).float()  # [N, V]
    log_probs[scored] = -F.cross_entropy(logits, targets[scored], reduction="none")
    return list(log_probs.sum(dim=1).split([len(continuations) for _, continuations in questions]))


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    add_special_tokens: bool = True,
    **options: Any,
) -> list[str]:
    """Continuation of each prompt, without the prompt and without special tokens.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        prompts: read as they are; padded on the left.
        add_special_tokens: begin each prompt as the tokenizer does; False for prompts that a chat template made.
        options: handed to ``generate`` of transformers (``max_new_tokens``, ``num_beams``, ``do_sample``, ...).
    """
    encoded = tokenizer(
        list(prompts), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=add_special_tokens
    ).to(model.device)
    generate: Callable[..., Tensor] = cast(Any, model).generate
    output = generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return tokenizer.batch_decode(output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def _tokenize_options(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Tokens that the prompt and all prompt-option texts begin with, and what each option adds to them."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    full = [tokenizer(prompt + option)["input_ids"] for option in options]
    shared = _common_start([prompt_ids, *full])
    # every option must have a token of its own to score, even if it is empty or another one's beginning
    shared = shared[: min(len(ids) for ids in full) - 1]
    if not shared:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [start], full
    return shared, [ids[len(shared) :] for ids in full]


def _common_start(rows: Sequence[list[int]]) -> list[int]:
    length = next((i for i, tokens in enumerate(zip(*rows, strict=False)) if len(set(tokens)) > 1), min(map(len, rows)))
    return rows[0][:length]


def _pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> Tensor:
    side = "left" if left else "right"
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side).to(device)


def _decoder(model: PreTrainedModel) -> nn.Module:
    return model.get_decoder()


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``[N, V]`` of hidden states ``[N, D]``."""
    return model.get_output_embeddings()(hidden)


def check_plain_logits(model: PreTrainedModel) -> None:
    """Check that the model's logits are its output embedding's product and nothing else.

    Raises:
        ValueError: the architecture caps or scales its logits.
    """
    changed = [option for option in _LOGIT_OPTIONS if getattr(model.config, option, None) not in (None, 1, 1.0)]
    if changed:
        raise ValueError(
            f"{type(model).__name__} changes its logits ({', '.join(changed)}); DoRALlama is for models of the LLaMA "
            "family, whose logits are the output embedding's product alone"
        )

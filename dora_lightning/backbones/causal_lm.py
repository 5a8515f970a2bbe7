"""Losses and scores of a causal or vision-language model, with logits only where they are needed.

Shapes: B sequences, T tokens, D hidden features, V vocabulary, N positions that are supervised or scored. With a
vocabulary of 128,000 the logits ``[B, T, V]`` would dominate memory; here only those of positions that count exist,
and of many of these only a part at a time (:mod:`~dora_lightning.backbones.token_losses`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from dora_lightning.adapters import weights_kept
from dora_lightning.backbones.finite_logits import FiniteLogits
from dora_lightning.backbones.prompt_cache import PromptCache, common_start, read_prompts, shared_start
from dora_lightning.backbones.token_losses import token_losses
from dora_lightning.data import IGNORE
from dora_lightning.pretrained import tokenize

# models that change the output embedding's product before the softmax
_LOGIT_OPTIONS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def supervised_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    vision: Mapping[str, Tensor] | None = None,
    position_ids: Tensor | None = None,
    turns: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Mean cross-entropy over supervised positions, and how many there are.

    Args:
        model: causal language model, or one that reads images too.
        input_ids: ``[B, T]``, with as many image tokens as the images take.
        attention_mask: ``[B, T]``, 0 on padding.
        labels: ``[B, T]``, the input's own ids where supervised, ``IGNORE`` elsewhere; shifted here.
        vision: what the image processor made of the images, in their order (``pixel_values``, ...).
        position_ids: ``[B, T]`` of packed rows, which hold several sequences: it begins at 0 with each of them, and
            with the padding. Nothing is attended to across these beginnings. None for one sequence in a row.
        turns: ``[B, T]`` of rows that several sequences share the beginning of: 0 there, then 1, 2, ... in the rest
            of each. Each attends to the beginning and to itself, at the positions it would have alone.

    Raises:
        ValueError: sequences share a beginning and the model's attention takes no mask of its own for each row.
    """
    if turns is not None:
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"rows that share an image need the attention sdpa or eager, not {model.config._attn_implementation}"
            )
        attention_mask = _turns_mask(turns, attention_mask, model.dtype)
        position_ids = _turns_positions(turns)
    losses, _ = _supervised_losses(model, input_ids, attention_mask, labels, vision, position_ids)
    # a mean over nothing would be NaN; the sum of nothing is 0, and of the graph
    return losses.sum() / max(1, len(losses)), len(losses)


def sequence_log_likelihoods(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> Tensor:
    """Sum of the log-probabilities of each sequence's supervised tokens, ``[B]``, in fp32.

    Args:
        model: causal language model.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 0 on padding.
        labels: ``[B, T]``, the input's own ids where supervised, ``IGNORE`` elsewhere; shifted here.
    """
    losses, rows = _supervised_losses(model, input_ids, attention_mask, labels)
    return losses.new_zeros(len(input_ids)).index_add(0, rows, -losses)


def _supervised_losses(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    vision: Mapping[str, Tensor] | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy ``[N]`` of each supervised position, in fp32, and its row ``[N]``."""
    targets = labels[:, 1:]
    supervised = targets != IGNORE  # [B, T - 1]
    if position_ids is None or attention_mask.ndim == 4:
        hidden = _hidden(model, input_ids, attention_mask, position_ids, vision=vision)  # [B, T, D]
    else:
        hidden = _hidden_of_packed(model, input_ids, position_ids)
    losses = token_losses(
        partial(_logits, model),
        hidden[:, :-1][supervised],
        targets[supervised],
        model.config.get_text_config().vocab_size,
    )
    return losses, supervised.nonzero()[:, 0]


@torch.no_grad()
@weights_kept()
def option_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    vision: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Log-likelihood of each option as the continuation of its prompt, in one batch.

    The tokens that all options of a question share with its prompt are read once; their key-value cache then serves
    every option. Prompt and option are tokenised together, so tokens that straddle the border are those of the text.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        prompts: one per question.
        options: texts that are appended to the prompt without a separator; a question may have none.
        vision: what the image processor made of the prompts' images, in their order.

    Returns:
        For each question ``[options]``, in fp32.
    """
    if not any(options):
        return [torch.zeros(0, device=model.device) for _ in options]
    questions = [_tokenize_options(tokenizer, p, o) for p, o in zip(prompts, options, strict=True)]
    # the last shared token is read with each option, since it predicts the option's first token
    prefixes = [shared[:-1] for shared, _ in questions]
    if vision is None and min(map(len, prefixes)) == 0:
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
        cache = PromptCache(config=model.config)
        # where a token stands for an image, or another process has other prompts, each prompt is read as it is
        share = vision is None and _attends_to_all(cache) and not _is_sharded(model)
        prefix_mask = read_prompts(partial(_hidden, model, vision=vision), cache, prefixes, model.device, share)
        cache.batch_select_indices(owner)
        mask = torch.cat([prefix_mask[owner], mask], dim=1)
    hidden = _hidden(model, inputs, mask, positions, cache)
    log_probs = torch.zeros(scored.shape, device=model.device)
    logits = _logits(model, hidden[scored]).float()  # [N, V]
    log_probs[scored] = -F.cross_entropy(logits, targets[scored], reduction="none")
    return list(log_probs.sum(dim=1).split([len(continuations) for _, continuations in questions]))


@torch.no_grad()
@weights_kept()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    vision: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> list[str]:
    """Continuation of each prompt, without the prompt and without special tokens.

    Args:
        model: causal language model, or one that reads images too.
        tokenizer: its tokenizer.
        prompts: padded on the left; begun as the tokenizer begins a text, unless they bring its special tokens.
        vision: what the image processor made of the prompts' images, in their order.
        options: handed to ``generate`` of transformers (``max_new_tokens``, ``num_beams``, ``do_sample``, ...).

    Raises:
        NonFiniteError: the model's scores are NaN or infinite.
    """
    rows = [tokenize(tokenizer, prompt) for prompt in prompts]
    input_ids = _pad(rows, model.device, left=True, value=tokenizer.pad_token_id)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    width = input_ids.shape[1]
    inputs: dict[str, Any] = dict(vision or {})
    if vision is None and (cache := _cache_of_prompts(model, rows, options)) is not None:
        inputs[_cache_keyword(model.base_model)] = cache
    generate: Callable[..., Tensor] = cast(Any, model).generate
    finite = FiniteLogits(prompts)
    output = generate(
        input_ids=input_ids,
        attention_mask=(torch.arange(width, device=model.device) >= width - lengths[:, None]).long(),
        pad_token_id=tokenizer.pad_token_id,
        **inputs,
        **finite.added_to(options),
    )
    finite.check()
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


# what generate of transformers does alike if it finds the prompt in its cache
_OPTIONS_WITH_CACHE = {
    *("max_new_tokens", "min_new_tokens", "max_length", "min_length", "num_return_sequences", "do_sample"),
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("num_beams", "length_penalty", "early_stopping", "eos_token_id", "bad_words_ids", "suppress_tokens"),
}


def _cache_of_prompts(
    model: PreTrainedModel, rows: Sequence[list[int]], options: Mapping[str, Any]
) -> PromptCache | None:
    """All of the prompts but their last tokens, read once, in as many rows as ``generate`` will have.

    Left to itself it reads each prompt once for every beam. None where nothing would be saved, or where it is not
    certain to do the same with a cache.
    """
    prompts = [row[:-1] for row in rows]
    defaults: Any = model.generation_config
    copies = max(options.get(name, getattr(defaults, name)) or 1 for name in ("num_beams", "num_return_sequences"))
    saves = copies > 1 or shared_start(prompts)
    plain = defaults.use_cache is not False and defaults.cache_implementation is None
    if not saves or not plain or min(map(len, prompts)) == 0 or not options.keys() <= _OPTIONS_WITH_CACHE:
        return None
    cache = PromptCache(config=model.config)
    if not _attends_to_all(cache) or _is_sharded(model):
        return None
    read_prompts(partial(_hidden, model), cache, prompts, model.device)
    cache.batch_repeat_interleave(copies)
    return cache


def _attends_to_all(cache: Cache) -> bool:
    """Whether every layer attends to all that was read: no windows, no recurrent states."""
    return bool(cache.layers) and all(type(layer) is DynamicLayer for layer in cache.layers)


def _is_sharded(model: PreTrainedModel) -> bool:
    """Whether processes share the parameters: then they must call the model equally often, whatever the prompts."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _tokenize_options(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Tokens that the prompt and all prompt-option texts begin with, and what each option adds to them."""
    prompt_ids = tokenize(tokenizer, prompt)
    full = [tokenize(tokenizer, prompt + option) for option in options]
    shared = common_start([prompt_ids, *full])
    # every option must have a token of its own to score, even if it is empty or another one's beginning
    shared = shared[: min((len(ids) for ids in full), default=len(prompt_ids) + 1) - 1]
    if not shared:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return [start], full
    return shared, [ids[len(shared) :] for ids in full]


def _turns_mask(turns: Tensor, attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention's scores ``[B, 1, T, T]``: each turn sees what is shared and what came of itself."""
    width = turns.shape[1]
    seen = (turns[:, None, :] == 0) | (turns[:, None, :] == turns[:, :, None])  # [B, T (query), T (key)]
    seen &= torch.ones(width, width, dtype=torch.bool, device=turns.device).tril()
    seen &= attention_mask[:, None, :].bool() | torch.eye(width, dtype=torch.bool, device=turns.device)
    return torch.zeros(seen.shape, dtype=dtype, device=turns.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _turns_positions(turns: Tensor) -> Tensor:
    """Position ``[B, T]`` of each token in its own sequence."""
    index = torch.arange(turns.shape[1], device=turns.device)
    begins = torch.ones_like(turns, dtype=torch.bool)
    begins[:, 1:] = turns[:, 1:] != turns[:, :-1]
    start = (index * begins).cummax(dim=1).values
    # a row of which nothing is shared is one sequence
    shared = (turns != 0).int().argmax(dim=1, keepdim=True)
    return index - start + shared * (turns != 0)


def _pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False, value: int = 0) -> Tensor:
    side = "left" if left else "right"
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_side=side, padding_value=value).to(device)


def _hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    vision: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Last hidden states ``[B, T, D]``: what the output embedding is applied to."""
    body: nn.Module = model.base_model  # of a vision-language model, the tower and the projector too
    inputs: dict[str, Any] = dict(vision or {})
    if cache is not None:
        inputs[_cache_keyword(body)] = cache
    else:
        # else the model makes one of its own: copies of keys and values, and a packed row is taken for one sequence
        inputs["use_cache"] = False
    inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    return body(**inputs).last_hidden_state


def _cache_keyword(body: nn.Module) -> str:
    # transformers renamed it
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


def _hidden_of_packed(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states ``[B, T, D]`` of packed rows.

    Models see where sequences begin by their positions, and only where they are given no mask and no cache.
    """
    if "flash" not in str(model.config._attn_implementation):
        return _hidden(model, input_ids, None, position_ids)
    # flash attention sees it in a batch of one row alone, and for it one long row costs no more than several
    return _hidden(model, input_ids.view(1, -1), None, position_ids.view(1, -1)).view(*input_ids.shape, -1)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``[N, V]`` of hidden states ``[N, D]``."""
    return model.get_output_embeddings()(hidden)


def enable_recomputation(model: PreTrainedModel) -> None:
    """Recompute each block in the backward pass instead of keeping its activations."""
    # the name changed within transformers 5
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # newer releases have the embedding's output require a gradient, which reentrant recomputation needs: blocks below
    # the first adapter would be computed again and have a backward pass, for a gradient that nobody reads
    model.disable_input_require_grads()


def check_plain_logits(model: PreTrainedModel) -> None:
    """Check that the model's logits are its output embedding's product and nothing else.

    Raises:
        ValueError: the architecture caps or scales its logits.
    """
    config = model.config.get_text_config()
    changed = [option for option in _LOGIT_OPTIONS if getattr(config, option, None) not in (None, 1, 1.0)]
    if changed:
        raise ValueError(
            f"{type(model).__name__} changes its logits ({', '.join(changed)}); supported are models of the LLaMA "
            "family, whose logits are the output embedding's product alone"
        )

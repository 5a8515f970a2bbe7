"""What PeftLlama needs of PEFT: configs, virtual tokens, AdaLoRA's penalty and scores.

Shapes: B sequences, T tokens, N supervised positions, V vocabulary.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from dora_lightning.backbones.finite_logits import FiniteLogits
from dora_lightning.backbones.prompt_cache import common_start
from dora_lightning.data import IGNORE
from dora_lightning.pretrained import resolve_pretrained, tokenize

TYPES = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "ADALORA", "IA3", "LORA", "LOHA", "LOKR", "OFT")
"""Methods of PEFT that the tests run: losses, texts, rankings, resuming."""

ADAPTER = "default"
# what PeftLlama says itself, or what is of finished adapters
_SET_HERE = {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"}
_SET_HERE |= {"peft_version", "rank_pattern"}


def peft_config(peft: Mapping[str, Any], model_name_or_path: str) -> Any:
    """PEFT's config of ``peft_type`` with the other entries as its options.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: an unknown method or option, or a value that PEFT refuses.
    """
    known = [name for name in TYPES if name in peft_library().PEFT_TYPE_TO_CONFIG_MAPPING]
    kind = peft.get("peft_type")
    if kind not in known:
        raise ValueError(f"peft.peft_type is {kind!r}; it can be {', '.join(known)}")
    make = peft_library().PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    options = {name: value for name, value in peft.items() if name != "peft_type"}
    names = sorted(field.name for field in fields(make) if field.init and field.name not in _SET_HERE)
    for name in options.keys() - set(names):
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"peft has no option {name!r} for {kind}; {hint}it can be {', '.join(names)}")
    if kind == "ADALORA":
        # the run's length is known when it starts
        options.setdefault("total_step", options.get("tinit", 0) + options.get("tfinal", 0) + 1)
    if options.get("prompt_tuning_init") == "TEXT":
        options.setdefault("tokenizer_name_or_path", resolve_pretrained(model_name_or_path))
    try:
        config = make(task_type="CAUSAL_LM", **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"peft: {kind}: {error}") from error
    if kind == "ADALORA" and config.init_r <= config.target_r:
        raise ValueError(
            f"AdaLoRA lowers ranks from init_r to target_r: init_r {config.init_r} must be above {config.target_r}"
        )
    return config


def peft_library() -> Any:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("PeftLlama needs PEFT: pip install 'dora-lightning[baselines]'") from error
    return peft


def losses_with_virtual_tokens(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy ``[N]`` of each supervised position in fp32, and its row ``[N]``, by PEFT's own forward pass.

    Args:
        model: a ``PeftModelForCausalLM`` that adds virtual tokens.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, 0 on padding, which is on the right.
        labels: ``[B, T]``, ``IGNORE`` where not supervised; shifted here.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE  # [B, T - 1]
    columns = supervised.any(dim=0).nonzero()
    first = int(columns[0]) if len(columns) else targets.shape[1]
    # the last positions alone: of a prompt no logits are needed
    kept = labels.shape[1] - first
    with former_names():
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=kept)
    logits = output.logits[:, :-1][supervised[:, first:]].float()  # [N, V]
    return F.cross_entropy(logits, targets[supervised], reduction="none"), supervised.nonzero()[:, 0]


@torch.no_grad()
def texts_with_virtual_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], **options: Any
) -> list[str]:
    """Continuation of each prompt, without special tokens; ``options`` as in ``generate`` of transformers.

    Raises:
        NonFiniteError: the model's scores are NaN or infinite.
    """
    base = model.get_base_model()
    rows = [tokenize(tokenizer, prompt) for prompt in prompts]
    # not by PEFT's generate: transformers 5.2x knows the cache by another name, and it would leave the prefix out.
    # Virtual tokens come first and see nothing else, so all prompts go on from their keys and values.
    count = model.peft_config[ADAPTER].num_virtual_tokens
    width = count + max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[1] * count + [0] * (width - count - len(row)) + [1] * len(row) for row in rows])
    defaults = base.generation_config
    copies = max(options.get(key, getattr(defaults, key)) or 1 for key in ("num_beams", "num_return_sequences"))
    keyword, cache = virtual_cache(model, len(rows) * copies)
    finite = FiniteLogits(prompts)
    output = base.generate(
        input_ids=ids,  # those at the virtual tokens' places are not read
        attention_mask=mask.to(model.device),
        pad_token_id=pad,
        **{keyword: cache},
        **finite.added_to(options),
    )
    finite.check()
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


@torch.no_grad()
def options_with_virtual_tokens(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], options: Sequence[Sequence[str]]
) -> list[Tensor]:
    """Log-likelihood ``[options]`` of each prompt's options, in fp32; each is read with its whole prompt."""
    device = model.device
    rows, labels = [], []
    for prompt, texts in zip(prompts, options, strict=True):
        full = [tokenize(tokenizer, prompt + text) for text in texts]
        shared = len(common_start([tokenize(tokenizer, prompt), *full]))
        # every option has a token of its own to score, even if it is empty or another one's beginning
        shared = min([shared, *(len(ids) - 1 for ids in full)])
        rows += [torch.tensor(ids) for ids in full]
        labels += [torch.tensor([IGNORE] * shared + ids[shared:]) for ids in full]
    counts = [len(texts) for texts in options]
    if not rows:
        return [torch.zeros(0, device=device) for _ in options]
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    targets = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    losses, owners = losses_with_virtual_tokens(model, ids.to(device), mask.to(device), targets.to(device))
    return list(losses.new_zeros(len(rows)).index_add(0, owners, -losses).split(counts))


def virtual_cache(model: Any, batch_size: int) -> tuple[str, Cache]:
    """Keys and values of the virtual tokens in as many rows, and what the model's forward pass calls a cache."""
    body = model.get_base_model().base_model
    # transformers renamed it
    keyword = "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"
    prompt = model.get_prompt(batch_size=batch_size)
    if isinstance(prompt, Cache):  # prefix tuning
        return keyword, prompt
    cache = DynamicCache(config=model.config)
    body(inputs_embeds=prompt.to(body.dtype), use_cache=True, **{keyword: cache})
    return keyword, cache


@contextmanager
def former_names() -> Iterator[None]:
    """Hide that PEFT calls things by names that transformers 5.2x has changed, and still knows."""
    with warnings.catch_warnings():
        for name in ("is_gradient_checkpointing", "past_key_values"):
            warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
        yield


def orthogonality_penalty(model: Any) -> Tensor:
    """AdaLoRA's penalty as in PEFT: weighted mean of ``|A A^T - I|`` and ``|B^T B - I|`` (Frobenius) over layers."""
    terms = []
    for name, matrix in model.base_model.model.named_parameters():
        if f".lora_A.{ADAPTER}" in name or f".lora_B.{ADAPTER}" in name:
            gram = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
            terms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return model.peft_config[ADAPTER].orth_reg_weight * torch.stack(terms).mean()


def importances(allocator: Any) -> Iterator[dict[str, Tensor]]:
    """What AdaLoRA's allocator remembers of each parameter, in a fixed order."""
    return iter((allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc))

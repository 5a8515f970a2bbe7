"""Merge adapters into the weights of a model in memory, take them out again, or do without them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.inject import adapter_layers
from dora_lightning.adapters.quantized import dequantized, is_quantized, plain_linear


def merge_adapters(model: nn.Module, unload: bool = False) -> nn.Module:
    """Write each adapter's ``g (W + s B A)`` into its base layer, from fp32 arithmetic rounded once.

    The merged model computes the same and costs what the base costs. The original weights are kept, so memory grows by
    the adapted weights until :func:`unmerge_adapters`; ``unload`` drops them and the adapters instead and leaves plain
    modules, as ``transformers`` knows them. A weight that was tied to another module's is a weight of its own from then
    on; ``unload`` sets ``tie_word_embeddings`` of the model's config to false then. A model whose modules were trained
    in full (``method="full"``) is as it should be already.

    The base of an adapter on quantised weights is the dequantised weight, not the one before quantisation: it is what
    the adapter was trained on. The merged weight is in the dtype of the model's other weights; ``unload`` dequantises
    the remaining quantised layers too, and the model is a plain one.

    To merge a model that does not fit in memory twice, stream it:
    :func:`dora_lightning.training.merging.merge_to_folder`.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model has no adapters.
    """
    dtype = torch.float32
    for name, layer in _layers_of(model):
        layer.merge()
        dtype = layer.merged_dtype
        if unload:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    config: AdapterConfig | None = getattr(model, "adapter_config", None)
    if unload and config is not None:
        own: Any = getattr(model, "config", None)
        if config.resolved.get("tied") and own is not None:
            own.tie_word_embeddings = False
        _leave_quantization(model, dtype)
        del model.adapter_config
    return model


def unmerge_adapters(model: nn.Module) -> nn.Module:
    """Put the original weights back, bit for bit; nothing happens to a model that is not merged.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model has no adapters.
    """
    for _, layer in _layers_of(model):
        layer.unmerge()
    return model


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Let ``model`` compute what the pretrained model does, merged or not, and put everything back at the end.

    May be nested, and puts things back after an exception too.

    >>> from dora_lightning import AdapterConfig, inject_adapters
    >>> model = inject_adapters(nn.Sequential(nn.Linear(4, 4)), AdapterConfig(rank=2))
    >>> with adapters_disabled(model):
    ...     model[0].disabled
    True
    >>> model[0].disabled
    False

    Raises:
        ValueError: the model has no adapters, or modules that were trained in full, whose pretrained weights are gone.
    """
    if _trained_in_full(model):
        raise ValueError("method='full' trains the pretrained weights themselves; there are no others to go back to")
    states = [(layer, layer.disabled, layer.weight if layer.merged else None) for _, layer in _layers_of(model)]
    try:
        for layer, _, _ in states:
            layer.disabled = True
            layer.unmerge()
        yield model
    finally:
        for layer, disabled, merged in states:
            layer.disabled = disabled
            if merged is not None and not layer.merged:
                layer.put_weight(merged)


def _leave_quantization(model: nn.Module, dtype: torch.dtype) -> None:
    """Plain layers for the quantised ones that had no adapter, and no word of it in what transformers saves."""
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            parent, _, child = name.rpartition(".")
            plain = plain_linear(module, dequantized(module).to(dtype))
            setattr(model.get_submodule(parent), child, plain)
    if getattr(model, "hf_quantizer", None) is not None:
        unquantized: Any = model
        unquantized.hf_quantizer.remove_quantization_config(unquantized)


def _trained_in_full(model: nn.Module) -> bool:
    configs = (getattr(module, "adapter_config", None) for module in model.modules())
    return any(config is not None and config.method == "full" for config in configs)


def _layers_of(model: nn.Module) -> list:
    layers = list(adapter_layers(model))
    if not layers and not _trained_in_full(model):
        raise ValueError("the model has no adapters; call inject_adapters(model, config) first")
    return layers

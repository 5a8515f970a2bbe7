"""Merge adapters into the weights of a model in memory, take them out again, or do without them for a while."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dora_lightning.adapters.finite import check_finite
from dora_lightning.adapters.inject import adapter_layers, replace_module
from dora_lightning.adapters.layers import AdapterLayer
from dora_lightning.adapters.quantized import dequantized, is_quantized, plain_linear


def merge_adapters(model: nn.Module, unload: bool = False) -> nn.Module:
    """Write each adapter's ``g (W + s B A)`` into its base layer, from fp32 arithmetic rounded once.

    The merged model computes the same and costs what the base costs. The original weights are kept, so memory grows by
    the adapted weights until :func:`unmerge_adapters`; ``unload`` drops them and the adapters instead and leaves plain
    modules, as ``transformers`` knows them. A weight that was tied to another module's is a weight of its own from then
    on; ``unload`` sets ``tie_word_embeddings`` of the model's config to false then. The adapted model may be inside
    ``model`` (a LightningModule). A model whose modules were trained in full (``method="full"``) is as it should be
    already.

    The base of an adapter on quantised weights is the dequantised weight, not the one before quantisation: it is what
    the adapter was trained on. The merged weight is in the dtype of the model's other weights; ``unload`` dequantises
    the remaining quantised layers too, and the model is a plain one.

    To merge a model that does not fit in memory twice, stream it:
    :func:`dora_lightning.training.merging.merge_to_folder`.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model has no adapters.
        NonFiniteError: an adapter holds NaN or infinity; nothing is merged.
    """
    own_tensors = {
        f"{name}.{part}": tensor
        for name, layer in _layers_of(model)
        for part, tensor in layer.named_parameters(recurse=False)
    }
    check_finite(own_tensors, "nothing is merged")
    dtype = torch.float32
    layers = [layer for _, layer in _layers_of(model)]
    if unload:
        _untie(model, layers)
    for layer in layers:
        layer.merge()
        dtype = layer.merged_dtype
        if unload:
            replace_module(model, layer, layer.base_layer)
    if unload:
        for root in [module for module in model.modules() if "adapter_config" in vars(module)]:
            _leave_quantization(root, dtype)
            del root.adapter_config
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


def _untie(model: nn.Module, layers: list[AdapterLayer]) -> None:
    """Have configs say so where a weight that is tied to another module's becomes one of its own."""
    owners = Counter(id(module._parameters.get("weight")) for module in model.modules())
    tied = set()
    for layer in layers:
        # a merged layer's original is held by nobody else here but what it is tied to
        (weight,) = layer._unmerged or (layer.weight,)
        if isinstance(weight, Tensor) and owners[id(weight)] > (0 if layer.merged else 1):
            tied.add(id(layer))
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "tie_word_embeddings") and any(id(part) in tied for part in module.modules()):
            config.tie_word_embeddings = False


def _leave_quantization(model: nn.Module, dtype: torch.dtype) -> None:
    """Plain layers for the quantised ones that had no adapter, and no word of it in what transformers saves."""
    for module in list(model.modules()):
        if is_quantized(module):
            replace_module(model, module, plain_linear(module, dequantized(module).to(dtype)))
    for module in model.modules():
        quantizer: Any = vars(module).get("hf_quantizer")
        if quantizer is not None:
            quantizer.remove_quantization_config(module)


def _trained_in_full(model: nn.Module) -> bool:
    configs = (vars(module).get("adapter_config") for module in model.modules())
    return any(config is not None and config.method == "full" for config in configs)


def _layers_of(model: nn.Module) -> list:
    layers = list(adapter_layers(model))
    if not layers and not _trained_in_full(model):
        raise ValueError("the model has no adapters; call inject_adapters(model, config) first")
    return layers

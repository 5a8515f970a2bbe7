"""Merge adapters into the weights of a model in memory, and take them out again."""

from __future__ import annotations

from torch import nn

from dora_lightning.adapters.inject import adapter_layers


def merge_adapters(model: nn.Module, unload: bool = False) -> nn.Module:
    """Write each adapter's ``g (W + s B A)`` into its base layer, from fp32 arithmetic rounded once.

    The merged model computes the same and costs what the base costs. The original weights are kept, so memory grows by
    the adapted weights until :func:`unmerge_adapters`; ``unload`` drops them and the adapters instead and leaves plain
    modules, as ``transformers`` knows them. To merge a model that does not fit in memory twice, stream it:
    :func:`dora_lightning.training.merging.merge_to_folder`.

    Returns:
        The same ``model``.

    Raises:
        ValueError: the model has no adapters.
    """
    for name, layer in _layers_of(model):
        layer.merge()
        if unload:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    if unload and hasattr(model, "adapter_config"):
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


def _layers_of(model: nn.Module) -> list:
    layers = list(adapter_layers(model))
    if not layers:
        raise ValueError("the model has no adapters; call inject_adapters(model, config) first")
    return layers

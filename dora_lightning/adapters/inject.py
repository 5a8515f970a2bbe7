"""Find the modules to adapt, put adapter layers in their place, freeze the rest."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.layers import AdapterLayer, DoRALinear, LoRALinear, MagnitudeLinear

ALL_LINEAR = "all-linear"

_LAYERS: dict[str, type[DoRALinear] | type[LoRALinear] | type[MagnitudeLinear]] = {
    "dora": DoRALinear,
    "lora": LoRALinear,
    "magnitude": MagnitudeLinear,
}


def inject_adapters(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Replace the target modules of ``model`` by adapter layers, in place, and freeze every other parameter.

    Calling it again with the same config changes nothing.

    Args:
        model: any module; ``all-linear`` leaves out the output embedding of a transformers model.
        config: what to adapt, and how.

    Returns:
        The same ``model``.

    Raises:
        ValueError: a pattern matches nothing, or something that cannot be adapted, or the model already has adapters
            of another config. The message says what would match; the model is unchanged.
    """
    present = getattr(model, "adapter_config", None)
    if present == config:
        return model
    if present is not None or any(True for _ in adapter_layers(model)):
        raise ValueError("the model already has adapters of another config; load it anew to inject different ones")

    methods = find_targets(model, config)
    # all are made before the first is put in place: if one fails (out of memory), the model is as it was
    layers = {name: _adapter_layer(model.get_submodule(name), method, config) for name, method in methods.items()}
    model.requires_grad_(False)
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    _leave_fused_paths(model)
    model.adapter_config = copy.deepcopy(config)  # type: ignore[assignment]  # nn.Module's setattr is typed for tensors and modules
    return model


def restrict_to_magnitude(model: nn.Module, patterns: str | list[str]) -> list[str]:
    """Let the modules that match train their magnitude alone, in place; what else trains stays as it is.

    An adapter that a module has gives way to a :class:`~dora_lightning.adapters.layers.MagnitudeLinear`; a plain
    ``nn.Linear`` gets one and is frozen. Nothing happens where it is one already.

    Args:
        model: with or without adapters.
        patterns: as in :class:`AdapterConfig`.

    Returns:
        Dotted names of the modules that matched.

    Raises:
        ValueError: as for :func:`inject_adapters`.
    """
    present: AdapterConfig | None = getattr(model, "adapter_config", None)
    axis = "out" if present is None else present.norm_axis
    config = AdapterConfig(method="magnitude", target_modules=patterns, norm_axis=axis)
    names = sorted(find_targets(model, config))
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, MagnitudeLinear):
            base_layer = layer.base_layer if isinstance(layer, AdapterLayer) else layer
            _replace(model, name, "magnitude", base_layer, config)
    _leave_fused_paths(model)
    if present is None:
        model.adapter_config = config  # type: ignore[assignment]  # nn.Module's setattr is typed for tensors and modules
    else:
        model.adapter_config = replace(present, magnitude_only_modules=names)  # type: ignore[assignment]
    return names


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, str]:
    """Dotted name of each module to adapt -> its method, in the model's order.

    Raises:
        ValueError: as for :func:`inject_adapters`.
    """
    modules = _named_modules(model)
    for name in _excluded(modules, config.exclude_modules):
        del modules[name]
    targets = _matches(modules, config.target_modules, "target_modules", _output_embedding(model))
    magnitude_only = _matches(
        modules, config.magnitude_only_modules, "magnitude_only_modules", _output_embedding(model)
    )
    return {
        name: "magnitude" if name in magnitude_only else config.method
        for name in modules
        if name in targets or name in magnitude_only
    }


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdapterLayer]]:
    """Dotted name and layer of every adapter in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            yield name, module


def adapted_submodule(module: nn.Module) -> tuple[str, nn.Module]:
    """Dotted name of the model inside ``module`` that adapters were injected into ("" for ``module``), and that model.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [(name, child) for name, child in module.named_modules() if hasattr(child, "adapter_config")]
    if len(found) != 1:
        names = ", ".join(name or "the module itself" for name, _ in found) or "none"
        raise ValueError(f"expected one model with adapters inside {type(module).__name__}, found {names}")
    return found[0]


def _leave_fused_paths(model: nn.Module) -> None:
    """In evaluation ``nn.TransformerEncoderLayer`` reads its linear layers' weights and never calls them."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if any(True for _ in adapter_layers(module)):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0  # its own sign for "no fused path"


def _adapter_layer(base_layer: nn.Module, method: str, config: AdapterConfig) -> AdapterLayer:
    assert isinstance(base_layer, nn.Linear)  # find_targets has checked
    layer = _LAYERS[method](base_layer, config)
    return layer.train(base_layer.training)


def _is_adaptable(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its out_proj and never calls it: an adapter there would train nothing
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by dotted name; of an adapter's inside the base layer goes by the adapter's name, as before injection."""
    inside = {f"{name}.{child}" for name, layer in adapter_layers(model) for child, _ in layer.named_modules() if child}
    return {
        name: module.base_layer if isinstance(module, AdapterLayer) else module
        for name, module in model.named_modules()
        if name and name not in inside
    }


def _replace(model: nn.Module, name: str, method: str, base_layer: nn.Module, config: AdapterConfig) -> None:
    assert isinstance(base_layer, nn.Linear)  # find_targets has checked
    base_layer.requires_grad_(False)
    layer = _LAYERS[method](base_layer, config)
    layer.train(base_layer.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _matches(
    modules: dict[str, nn.Module], patterns: str | list[str], option: str, output_embedding: nn.Module | None
) -> set[str]:
    if not patterns:
        return set()
    if patterns == ALL_LINEAR:
        found = {n for n, m in modules.items() if _is_adaptable(m) and m is not output_embedding}
        if not found:
            raise ValueError(f"{option}: the model has no nn.Linear to adapt")
        return found
    matched: set[str] = set()
    for pattern, found in _found(modules, patterns):
        if not found:
            raise ValueError(f"{option}: {pattern!r} matches no module. {_what_would_match(modules, pattern)}")
        for name in sorted(found):
            if not _is_adaptable(modules[name]):
                kind = type(modules[name]).__name__
                raise ValueError(
                    f"{option}: {pattern!r} matches {name}, a {kind}; only nn.Linear can be adapted. "
                    f"{_what_would_match(modules, pattern)}"
                )
        matched |= found
    return matched


def _excluded(modules: dict[str, nn.Module], patterns: str | list[str]) -> set[str]:
    excluded: set[str] = set()
    for pattern, found in _found(modules, patterns):
        if not found:
            raise ValueError(f"exclude_modules: {pattern!r} matches no module")
        excluded |= found
    return excluded


def _found(modules: dict[str, nn.Module], patterns: str | list[str]) -> Iterator[tuple[str, set[str]]]:
    """Each pattern, and the names that it matches: a string as a regular expression, those of a list as suffixes."""
    if isinstance(patterns, str):
        yield patterns, {name for name in modules if re.fullmatch(patterns, name)}
        return
    for pattern in patterns:
        yield pattern, {name for name in modules if name == pattern or name.endswith(f".{pattern}")}


def _what_would_match(modules: dict[str, nn.Module], pattern: str) -> str:
    names = sorted({name.rpartition(".")[2] for name, module in modules.items() if _is_adaptable(module)})
    if not names:
        return "The model has no nn.Linear."
    close = difflib.get_close_matches(pattern.rpartition(".")[2], names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Linear modules of this model end in: {', '.join(names)}"


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None

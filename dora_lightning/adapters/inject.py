"""Find the modules to adapt, put adapter layers in their place, freeze the rest."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dora_lightning.adapters.config import AdapterConfig, by_pattern, outside
from dora_lightning.adapters.layers import AdapterLayer, DoRALinear, LoRALinear, MagnitudeLinear
from dora_lightning.adapters.operators import is_linear, operator_of
from dora_lightning.adapters.patterns import named_by
from dora_lightning.adapters.quantized import is_quantized, keep_packing
from dora_lightning.adapters.vera import DVoRALinear, VeRALinear

ALL_LINEAR = "all-linear"

_LAYERS: dict[str, type[AdapterLayer]] = {
    "dora": DoRALinear,
    "lora": LoRALinear,
    "vera": VeRALinear,
    "dvora": DVoRALinear,
    "magnitude": MagnitudeLinear,
}
_ADAPTABLE = "linear layers, convolutions and embeddings"


def inject_adapters(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Replace the target modules of ``model`` by adapter layers, in place, and freeze every other parameter.

    Calling it again with the same config changes nothing.

    Args:
        model: any module; ``all-linear`` leaves out the output embedding of every transformers model in it.
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
    _check_full_can_train(model, methods)
    config = replace(copy.deepcopy(config), resolved=_resolved(model, methods))
    _check_patterns_are_used(config, methods)
    trained = {name for name, method in methods.items() if method == "full"}
    _check_untied(model, trained)
    keep_packing(model)
    # all are made before the first is put in place: if one fails (out of memory), the model is as it was
    layers = {
        name: _adapter_layer(model.get_submodule(name), method, config, name)
        for name, method in methods.items()
        if method != "full"
    }
    model.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    for name, layer in layers.items():
        layer.base_layer.requires_grad_(False)
        layer.merged_dtype = _dtype_of(model)
        replace_module(model, model.get_submodule(name), layer)
    _leave_fused_paths(model)
    model.adapter_config = config  # type: ignore[assignment]  # nn.Module's setattr is typed for tensors and modules
    return model


def within(model: nn.Module, config: AdapterConfig, parts: Sequence[str]) -> AdapterConfig:
    """The config that reaches into the named parts of ``model`` alone: what lies outside of them is excluded too.

    Raises:
        ValueError: ``exclude_modules`` names what is not in the model.
    """
    # checked here: the longer pattern would hide a name that matches nothing
    _excluded(_named_modules(model), config.exclude_modules)
    return replace(config, exclude_modules=outside(parts, config.exclude_modules))


def restrict_to_magnitude(model: nn.Module, patterns: str | list[str]) -> list[str]:
    """Let the modules that match train their magnitude alone, in place; what else trains stays as it is.

    An adapter that a module has gives way to a :class:`~dora_lightning.adapters.layers.MagnitudeLinear`; a plain module
    gets one and is frozen. Nothing happens where it is one already.

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
            base_layer.requires_grad_(False)
            restricted = _adapter_layer(base_layer, "magnitude", config, name)
            restricted.merged_dtype = _dtype_of(model)
            replace_module(model, layer, restricted)
    _leave_fused_paths(model)
    config = config if present is None else replace(present, magnitude_only_modules=names)
    # VeRA's pair stays what it was, though the widest of its modules may be among those that left it
    pair = {key: value for key, value in config.resolved.items() if key == "projection"}
    resolved = _resolved(model, find_targets(model, config)) | pair
    model.adapter_config = replace(config, resolved=resolved)  # type: ignore[assignment]  # as above
    return names


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, str]:
    """Dotted name of each module to adapt -> its method, in the model's order.

    Raises:
        ValueError: as for :func:`inject_adapters`.
    """
    modules = _named_modules(model)
    for name in _excluded(modules, config.exclude_modules):
        del modules[name]
    full = config.method == "full"
    heads = _output_embeddings(model)
    targets = _matches(modules, config.target_modules, "target_modules", heads, full)
    magnitude_only = _matches(modules, config.magnitude_only_modules, "magnitude_only_modules", heads)
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
    # not hasattr: what torch.compile returns answers for the model that it wraps
    found = [(name, child) for name, child in module.named_modules() if "adapter_config" in vars(child)]
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


def _adapter_layer(base_layer: nn.Module, method: str, config: AdapterConfig, name: str) -> AdapterLayer:
    try:
        layer = _LAYERS[method](base_layer, config, name)
    except ValueError as error:
        raise ValueError(f"{name}, a {type(base_layer).__name__}: {error}") from error
    return layer.train(base_layer.training)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """What a model with quantised weights computes with: the dtype of those that are not."""
    adapters = {id(p) for _, layer in adapter_layers(model) for p in layer.parameters(recurse=False)}
    for module in model.modules():
        if not isinstance(module, AdapterLayer) and not is_quantized(module):
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and id(parameter) not in adapters:
                    return parameter.dtype
    return torch.float32


def _check_full_can_train(model: nn.Module, methods: dict[str, str]) -> None:
    for name, method in methods.items():
        if method == "full" and any(is_quantized(module) for module in model.get_submodule(name).modules()):
            raise ValueError(f"{name}: method='full' trains the weight itself; quantised ones cannot train")


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old`` inside ``model``, under every name that it has there."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _resolved(model: nn.Module, methods: dict[str, str]) -> dict[str, Any]:
    """``AdapterConfig.resolved``: what a reader of checkpoints must know of the model."""
    modules = _named_modules(model)
    operators = {name: operator_of(modules[name]) for name, method in methods.items() if method != "full"}
    transposed = [name for name, operator in operators.items() if operator is not None and operator.transposed]
    owners = Counter(
        id(weight) for module in modules.values() if (weight := module._parameters.get("weight")) is not None
    )
    tied = [name for name in operators if owners[id(modules[name].weight)] > 1]
    shapes = [
        operator.features(modules[name])
        for name, operator in operators.items()
        if operator is not None and methods[name] in ("vera", "dvora")
    ]
    projection = [max(sizes) for sizes in zip(*shapes, strict=True)]
    found = {"transposed": transposed, "tied": tied, "projection": projection}
    return {key: value for key, value in found.items() if value}


def _check_patterns_are_used(config: AdapterConfig, methods: dict[str, str]) -> None:
    names = [name for name, method in methods.items() if method == config.method]
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(by_pattern(name, {pattern: True}, False) for name in names):
                listed = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise ValueError(f"{option}: {pattern!r} matches none of the target modules, which end in: {listed}")


def _check_untied(model: nn.Module, trained: set[str]) -> None:
    """Refuse to train in full what is also the weight of a module that is no target."""
    inside = {id(p) for name in trained for p in model.get_submodule(name).parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and not any(name.startswith(f"{target}.") for target in trained):
            raise ValueError(
                f"{name} is the same tensor as one of a target's: training it in full changes both. "
                "Name both modules in target_modules, or untie them first"
            )


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by dotted name; of an adapter's inside the base layer goes by the adapter's name, as before injection."""
    inside = {f"{name}.{child}" for name, layer in adapter_layers(model) for child, _ in layer.named_modules() if child}
    return {
        name: module.base_layer if isinstance(module, AdapterLayer) else module
        for name, module in model.named_modules()
        if name and name not in inside
    }


def _matches(
    modules: dict[str, nn.Module],
    patterns: str | list[str],
    option: str,
    heads: set[int],
    full: bool = False,
) -> set[str]:
    if not patterns:
        return set()
    if patterns == ALL_LINEAR:
        found = {n for n, m in modules.items() if is_linear(m) and id(m) not in heads}
        if not found:
            raise ValueError(f"{option}: the model has no nn.Linear to adapt")
        return found
    matched: set[str] = set()
    for pattern, found in named_by(modules, patterns):
        if not found:
            raise ValueError(f"{option}: {pattern!r} matches no module. {_what_would_match(modules, pattern)}")
        for name in sorted(found):
            if not full and operator_of(modules[name]) is None:
                kind = type(modules[name]).__name__
                raise ValueError(
                    f"{option}: {pattern!r} matches {name}, a {kind}; only {_ADAPTABLE} can be adapted. "
                    f"{_what_would_match(modules, pattern)}"
                )
        if full and not any(True for name in found for _ in modules[name].parameters()):
            raise ValueError(f"{option}: {pattern!r} matches {', '.join(sorted(found))}, without parameters to train")
        matched |= found
    return matched


def _excluded(modules: dict[str, nn.Module], patterns: str | list[str]) -> set[str]:
    excluded: set[str] = set()
    for pattern, found in named_by(modules, patterns):
        if not found:
            raise ValueError(f"exclude_modules: {pattern!r} matches no module. {_what_would_match(modules, pattern)}")
        excluded |= found
    return excluded


def _what_would_match(modules: dict[str, nn.Module], pattern: str) -> str:
    names = sorted({name.rpartition(".")[2] for name, module in modules.items() if is_linear(module)})
    if not names:
        return "The model has no nn.Linear."
    close = difflib.get_close_matches(pattern.rpartition(".")[2], names, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Linear modules of this model end in: {', '.join(names)}"


def _output_embeddings(model: nn.Module) -> set[int]:
    """``id`` of each module that is, or is inside, the output embedding of ``model`` or of a model in it."""
    heads: set[int] = set()
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if not callable(get):
            continue
        try:
            found = get()
        except (NotImplementedError, AttributeError):  # of a model that has none, as vision towers
            continue
        for head in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(head, nn.Module):
                heads |= {id(part) for part in head.modules()}
    return heads

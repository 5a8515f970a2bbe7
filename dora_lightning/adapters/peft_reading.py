"""Put adapters that PEFT has written into a model; :mod:`dora_lightning.adapters.peft_format` says how they look."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_lightning.adapters.config import AdapterConfig, by_pattern
from dora_lightning.adapters.inject import adapter_layers, find_targets, inject_adapters
from dora_lightning.adapters.layers import AdapterLayer, LoRALinear
from dora_lightning.adapters.operators import is_lookup, operator_of
from dora_lightning.adapters.peft_format import (
    TENSORS_NAME,
    adapted_model,
    as_regex,
    check_computes_alike,
    check_whole,
    disk_shapes,
    from_disk,
    listing,
)
from dora_lightning.adapters.peft_parsing import Contents, Module, init_of, parse_folder
from dora_lightning.adapters.vera import VeRALinear, shared_pair


def load_peft_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter of a PEFT folder (LoRA, DoRA or VeRA) into ``model``, in place.

    A model without adapters gets them, in exactly the modules that the file holds tensors for, and is frozen but for
    them. A model with adapters (or with one adapted model inside) keeps its config; method, rank, scaling and modules
    must be those of the file. Dropout is read as the ``exact_dropout`` that PEFT applies in DoRA. What started from
    the weights (``pissa``, ``olora``) gets its first values from them once more, as in PEFT.

    Args:
        model: the base model that the adapter was trained on; names in the file are relative to it.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``. Pickles are never read.

    Returns:
        The same ``model``.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: the adapter has an option that cannot be represented exactly, or does not fit the model; the message
            names the option, module or tensor. The model is unchanged.
    """
    folder = Path(folder)
    root = adapted_model(model)
    layers = dict(adapter_layers(root))
    config = None
    try:
        contents = parse_folder(folder)
        _check_base_weights(root, contents.base_weights)
        if layers:
            _check_fit(layers, contents)
        else:
            _check_modules(root, contents.modules)
        values = {name: _values(name, module, root.get_submodule(name)) for name, module in contents.modules.items()}
        if not layers:
            config = _derived_config(root, contents)
        _check_pair(root, contents)
        if config is not None:
            layers = dict(adapter_layers(inject_adapters(root, config)))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    with torch.no_grad():
        for name, tensors in values.items():
            for part, tensor in tensors.items():
                if isinstance(parameter := getattr(layers[name], part, None), nn.Parameter):
                    parameter.copy_(tensor)
    return model


def _check_modules(root: nn.Module, modules: Mapping[str, Module]) -> None:
    present = dict(root.named_modules())
    if absent := [name for name in modules if name not in present]:
        linear = [name for name, module in present.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"the model has no modules {listing(absent)}; its linear modules are {listing(linear) or 'none'}. "
            "Names in the file are relative to the model that was given to PEFT"
        )
    others = [f"{n}, a {type(present[n]).__name__}" for n in modules if operator_of(present[n]) is None]
    if others:
        raise ValueError(
            f"only linear layers, convolutions and embeddings can be adapted, the file holds tensors for: "
            f"{listing(others)}"
        )


def _check_base_weights(root: nn.Module, weights: Mapping[str, tuple[str, Tensor]]) -> None:
    """Weights of the base beside the adapter must be those that the model has."""
    for key, (name, weight) in weights.items():
        present: Any = None
        with suppress(AttributeError):
            present = root.get_submodule(name).weight
        if present is None or present.shape != weight.shape or not torch.equal(present.cpu().to(weight.dtype), weight):
            raise ValueError(
                f"{TENSORS_NAME} holds unexpected tensors: {key}; known are those of adapters, and the model's own"
            )


def _values(name: str, module: Module, target: nn.Module) -> dict[str, Tensor]:
    """The module's tensors in the shapes of our parameters."""
    check_whole(name, target)
    base: Any = target.base_layer if isinstance(target, AdapterLayer) else target
    if module.lookup != is_lookup(base) and "lora_A" in module.tensors:
        prefix = "lora_embedding_" if module.lookup else "lora_"
        raise ValueError(f"the file holds {prefix}A of {name}, a {type(base).__name__}")
    check_computes_alike(name, base, module.method)
    if module.scales_bias and (bias := getattr(base, "bias", None)) is not None and (bias.is_meta or bool(bias.any())):
        raise ValueError(
            f"{name} has a bias, and the file is torchtune's (magnitude), which scales the bias by the magnitude; no "
            "adapter computes that here. Merge it with torchtune and load the merged weights"
        )
    wide = torch.promote_types(base.weight.dtype, torch.float32)
    shapes = disk_shapes(base, module.rank)
    values = {}
    for part, tensor in module.tensors.items():
        if tuple(tensor.shape) != shapes[part]:
            raise ValueError(f"{name}.{part} has shape {tuple(tensor.shape)}, expected {shapes[part]}")
        if not tensor.is_floating_point() or torch.promote_types(tensor.dtype, wide) != wide:
            raise ValueError(f"{name}.{part} is {tensor.dtype}, which {wide} cannot hold exactly")
        try:
            values[part] = from_disk(part, tensor, base)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return values


def _derived_config(root: nn.Module, contents: Contents) -> AdapterConfig:
    options, modules = contents.options, contents.modules
    methods = {name: module.method for name, module in modules.items()}
    direction = [name for name, method in methods.items() if method != "magnitude"]
    method = methods[direction[0]] if direction else "magnitude"
    targets = direction or list(modules)
    magnitude_only = [name for name in modules if direction and name not in direction]
    shared = {"method": method, **_shared_options(method, options, direction)}
    candidates: list[tuple[Any, Any]] = [(targets, magnitude_only), (as_regex(targets), as_regex(magnitude_only))]
    if options.get("target_modules") and not magnitude_only:
        candidates.insert(0, (options["target_modules"], []))  # the user's own words, where they mean the same
    for target_modules, magnitude_only_modules in candidates:
        config = AdapterConfig(
            target_modules=target_modules, magnitude_only_modules=magnitude_only_modules or [], **shared
        )
        with suppress(ValueError):  # of a pattern that matches nothing here
            if find_targets(root, config) == methods:
                break
    return config  # the last one matches the very names


def _shared_options(method: str, options: Mapping[str, Any], direction: list[str]) -> dict[str, Any]:
    """What the config of the modules with a direction says beside their names."""
    dropout = float(options["vera_dropout" if method == "vera" else "lora_dropout"])
    if method == "magnitude":
        if dropout:
            raise ValueError(f"lora_dropout={dropout} is not supported where only magnitudes are trained")
        return {}
    if method == "vera":
        return {
            "rank": options["r"],
            "dropout": dropout,
            "d_initial": float(options["d_initial"]),
            "projection_seed": options["projection_prng_key"],
        }
    found: dict[str, Any] = {
        "rank": options["r"],
        "alpha": float(options["lora_alpha"]),
        "dropout": dropout,
        "init": init_of(options),
        "use_rslora": bool(options.get("use_rslora")),
    }
    for option, number in (("rank_pattern", int), ("alpha_pattern", float)):
        # those that name modules without a direction, or none, mean nothing here
        found[option] = {
            pattern: number(value)
            for pattern, value in options[option].items()
            if any(by_pattern(name, {pattern: True}, False) for name in direction)
        }
    if method == "dora":
        found |= {"exact_dropout": bool(dropout), "detach_norm": bool(options.get("dora_simple", True))}
    return found


def _check_fit(layers: Mapping[str, AdapterLayer], contents: Contents) -> None:
    modules = contents.modules
    if more := modules.keys() - layers.keys():
        raise ValueError(
            f"it holds tensors for {listing(more)}, where the model has no adapters; it has {listing(layers)}"
        )
    if fewer := layers.keys() - modules.keys():
        raise ValueError(f"it lacks tensors for {listing(fewer)}, where the model has adapters")
    for name, module in modules.items():
        layer = layers[name]
        if layer.merged:
            raise ValueError(f"the adapter of {name} is merged; call unmerge_adapters(model) first")
        theirs: dict[str, Any] = {"method": module.method}
        ours: dict[str, Any] = {"method": layer.method}
        if module.method == "magnitude" and layer.method == "dora":
            theirs["method"] = "dora"  # A = B = 0 is also a DoRA module
        if isinstance(layer, VeRALinear):
            theirs |= {"rank": module.rank, "projection_seed": contents.options.get("projection_prng_key")}
            ours |= {"rank": layer.rank, "projection_seed": layer.pair.seed}
        elif isinstance(layer, LoRALinear):
            theirs |= {"rank": module.rank, "scaling": module.scaling, "init": init_of(contents.options)}
            ours |= {"rank": layer.rank, "scaling": layer.scaling}
            ours["init"] = layer.init if layer.init_A is not None else "kaiming"
        for option, value in theirs.items():
            same = math.isclose(value, ours[option], rel_tol=1e-9) if option == "scaling" else value == ours[option]
            if not same:
                raise ValueError(f"{option} of {name} is {value} in the file, {ours[option]} in the model")


def _check_pair(root: nn.Module, contents: Contents) -> None:
    """The random pair in the file must be what its seed gives here: it is made from the seed ever after."""
    if not contents.pair:
        return
    options, bases = contents.options, [root.get_submodule(name) for name in contents.modules]
    bases = [module.base_layer if isinstance(module, AdapterLayer) else module for module in bases]
    sizes = [operator.features(base) for base in bases if (operator := operator_of(base)) is not None]
    rows, columns = (max(size) for size in zip(*sizes, strict=True))
    pair = shared_pair(options["r"], rows, columns, options["projection_prng_key"]).on(torch.device("cpu"))
    for key, ours in zip("AB", pair, strict=True):
        theirs = contents.pair.get(key)
        if theirs is not None and (theirs.shape != ours.shape or not torch.equal(theirs.to(ours.dtype), ours)):
            raise ValueError(
                f"vera_{key} in the file is not what projection_prng_key={options['projection_prng_key']} gives here: "
                "it was drawn by another version of torch or for a wider model"
            )

"""Read adapters that PEFT has written; :mod:`dora_lightning.adapters.peft_format` says how they look."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.inject import adapter_layers, find_targets, inject_adapters
from dora_lightning.adapters.layers import AdapterLayer, LoRALinear
from dora_lightning.adapters.peft_format import (
    CONFIG_NAME,
    PARTS,
    TENSORS_NAME,
    adapted_model,
    as_regex,
    check_whole,
    listing,
)

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:(?P<low_rank>lora_[AB])(?:\.default)?\.weight|(?P<magnitude>lora_magnitude_vector)(?:(?:\.default)?\.weight)?)"
)
# what changes the function of the adapted model in a way that AdapterConfig has no word for
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)
# the others (PiSSA, OLoRA, CorDA, LoftQ, ...) belong to base weights that they changed
_INITS_THAT_LEAVE_THE_BASE = ("gaussian", "orthogonal", "eva")


def load_peft_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the adapter of a PEFT folder into ``model``, in place.

    A model without adapters gets them, in exactly the modules that the file holds tensors for, and is frozen but for
    them. A model with adapters (or with one adapted model inside) keeps its config; method, rank, scaling and modules
    must be those of the file. ``use_rslora`` is read as the equivalent alpha, and dropout as the ``exact_dropout`` that
    PEFT applies in DoRA.

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
        options = _read_options(folder)
        modules = _read_modules(folder, options)
        if layers:
            _check_fit(layers, modules)
        else:
            config = _derived_config(root, options, modules)
        for name, module in modules.items():
            _check_tensors(name, module, root.get_submodule(name))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if config is not None:
        layers = dict(adapter_layers(inject_adapters(root, config)))
    with torch.no_grad():
        for name, module in modules.items():
            for part, tensor in module.tensors.items():
                if isinstance(parameter := getattr(layers[name], part, None), nn.Parameter):
                    parameter.copy_(tensor)
    return model


@dataclass
class _Module:
    """What a file says of one module."""

    use_dora: bool
    rank: int
    alpha: float  # the update is scaled by alpha / rank, also with rsLoRA
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def method(self) -> str:
        if not self.use_dora:
            return "lora"
        return "dora" if self.tensors["lora_A"].any() or self.tensors["lora_B"].any() else "magnitude"


def _read_options(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no PEFT adapter folder: it has no {CONFIG_NAME}")
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{CONFIG_NAME} must hold an object, got a {type(options).__name__}")
    if options.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be 'LORA', got {options.get('peft_type')!r}")
    if options.get("bias", "none") not in ("none", None):
        raise ValueError(f"bias={options['bias']!r} is not supported: biases are never trained here")
    init = options.get("init_lora_weights")
    if not (init is None or isinstance(init, bool) or init in _INITS_THAT_LEAVE_THE_BASE):
        raise ValueError(
            f"init_lora_weights={init!r} is not supported: such an adapter belongs to a changed base. "
            "Convert the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    variants = [name for name in options if name.startswith("use_") and name not in ("use_dora", "use_rslora")]
    for name in (*_REFUSED, *variants):
        if options.get(name):
            raise ValueError(f"{name}={options[name]!r} is not supported")
    for name, default in {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}.items():  # PEFT's
        if not _is_number(options.setdefault(name, default)):
            raise ValueError(f"{name} must be a number, got {options[name]!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = options[name] = options.get(name) or {}
        if not isinstance(patterns, dict) or not all(_is_number(value) for value in patterns.values()):
            raise ValueError(f"{name} must map patterns to numbers, got {patterns!r}")
    return options


def _read_modules(folder: Path, options: Mapping[str, Any]) -> dict[str, _Module]:
    path = folder / TENSORS_NAME
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise ValueError(
                f"it holds adapter_model.bin, a pickle, which is never read. Load it with PEFT, if you trust "
                f"it, and save it again: save_pretrained writes {TENSORS_NAME}"
            )
        raise FileNotFoundError(f"{folder} is no PEFT adapter folder: it has no {TENSORS_NAME}")
    modules: dict[str, _Module] = {}
    unexpected = []
    use_dora = bool(options.get("use_dora"))
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a dict
                match = _KEY.fullmatch(key)
                if match is None or (match["magnitude"] and not use_dora):
                    unexpected.append(key)
                    continue
                name, part = match["module"], match["low_rank"] or "magnitude"
                if name not in modules:
                    modules[name] = _Module(use_dora, *_rank_and_alpha(name, options))
                if part in modules[name].tensors:
                    raise ValueError(f"{TENSORS_NAME} holds {part} of {name} twice")
                modules[name].tensors[part] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{TENSORS_NAME} could not be read as safetensors: {error}") from error
    except re.error as error:
        raise ValueError(f"rank_pattern or alpha_pattern: {error}") from error
    if unexpected:
        raise ValueError(
            f"{TENSORS_NAME} holds unexpected tensors: {listing(unexpected)}; known are lora_A, lora_B"
            f"{' and lora_magnitude_vector' if use_dora else ' (use_dora is false)'} of linear modules"
        )
    expected = PARTS if use_dora else PARTS[:2]
    missing = [f"{name}.{part}" for name, module in modules.items() for part in expected if part not in module.tensors]
    if missing:
        raise ValueError(f"{TENSORS_NAME} lacks tensors: {listing(missing)}")
    if not modules:
        raise ValueError(f"{TENSORS_NAME} holds no tensors")
    return modules


def _rank_and_alpha(name: str, options: Mapping[str, Any]) -> tuple[int, float]:
    rank = _by_pattern(name, options["rank_pattern"], options["r"])
    alpha = _by_pattern(name, options["alpha_pattern"], options["lora_alpha"])
    if not isinstance(rank, int) or rank < 1 or not alpha > 0:
        raise ValueError(f"r must be a whole number of at least 1 and lora_alpha above 0, got {rank} and {alpha}")
    return rank, float(alpha * math.sqrt(rank) if options.get("use_rslora") else alpha)


def _by_pattern(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """The value of the first pattern that matches, as PEFT's ``get_pattern_key`` finds it."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _derived_config(root: nn.Module, options: Mapping[str, Any], modules: Mapping[str, _Module]) -> AdapterConfig:
    present = dict(root.named_modules())
    if absent := [name for name in modules if name not in present]:
        linear = [name for name, module in present.items() if isinstance(module, nn.Linear)]
        raise ValueError(
            f"the model has no modules {listing(absent)}; its linear modules are {listing(linear) or 'none'}. "
            "Names in the file are relative to the model that was given to PEFT"
        )
    if others := [
        f"{name}, a {type(present[name]).__name__}" for name in modules if type(present[name]) is not nn.Linear
    ]:
        raise ValueError(f"only nn.Linear can be adapted, the file holds tensors for: {listing(others)}")

    methods = {name: module.method for name, module in modules.items()}
    low_rank = {name: module for name, module in modules.items() if module.method != "magnitude"}
    ranks = {name: module.rank for name, module in low_rank.items()}
    alphas = {name: module.alpha for name, module in low_rank.items()}
    for option, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if len(set(values.values())) > 1:
            values_named = listing(f"{value:g} for {name}" for value, name in {v: n for n, v in values.items()}.items())
            raise ValueError(
                f"{option} is not supported: modules share a rank and alpha here, the file has {values_named}"
            )

    shared: dict[str, Any] = {"method": "magnitude"}
    dropout = options["lora_dropout"]
    if low_rank:
        method, one = next((module.method, module) for module in low_rank.values())
        exact = {"exact_dropout": True} if method == "dora" and dropout else {}
        shared = {"method": method, "rank": one.rank, "alpha": one.alpha, "dropout": float(dropout), **exact}
    elif dropout:
        raise ValueError(f"lora_dropout={dropout} is not supported where only magnitudes are trained")
    targets = list(low_rank) or list(modules)
    magnitude_only = [name for name in modules if low_rank and name not in low_rank]
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


def _check_fit(layers: Mapping[str, AdapterLayer], modules: Mapping[str, _Module]) -> None:
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
        if isinstance(layer, LoRALinear):
            theirs |= {"rank": module.rank, "scaling": module.alpha / module.rank}
            ours |= {"rank": layer.rank, "scaling": layer.scaling}
        for option, value in theirs.items():
            same = math.isclose(value, ours[option], rel_tol=1e-9) if option == "scaling" else value == ours[option]
            if not same:
                raise ValueError(f"{option} of {name} is {value} in the file, {ours[option]} in the model")


def _check_tensors(name: str, module: _Module, target: nn.Module) -> None:
    check_whole(name, target)
    rows, columns = target.out_features, target.in_features
    wide = torch.promote_types(target.weight.dtype, torch.float32)  # type: ignore[arg-type]
    shapes = {"lora_A": (module.rank, columns), "lora_B": (rows, module.rank), "magnitude": (rows,)}
    for part, tensor in module.tensors.items():
        if tuple(tensor.shape) != shapes[part]:
            raise ValueError(f"{name}.{part} has shape {tuple(tensor.shape)}, expected {shapes[part]}")
        if not tensor.is_floating_point() or torch.promote_types(tensor.dtype, wide) != wide:
            raise ValueError(f"{name}.{part} is {tensor.dtype}, which {wide} cannot hold exactly")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

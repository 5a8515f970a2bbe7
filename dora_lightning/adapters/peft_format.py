"""Adapters as PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

On disk the tensors of a module ``q_proj [out, in]`` are called::

    base_model.model.q_proj.lora_A.weight           [rank, in]
    base_model.model.q_proj.lora_B.weight           [out, rank]
    base_model.model.q_proj.lora_magnitude_vector   [out]       with use_dora only

PEFT has no module that trains its magnitude alone. It is written as a DoRA module of rank 1 with ``A = B = 0``, which
computes the same and, since both gradients are zero, trains its magnitude alone; a DoRA module with ``A = B = 0`` is
read as one. A file says nothing of ``detach_norm``, and PEFT drops the input of both paths, as ``exact_dropout`` does.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.inject import (
    _is_adaptable,
    adapted_submodule,
    adapter_layers,
    find_targets,
    inject_adapters,
)
from dora_lightning.adapters.layers import AdapterLayer, LoRALinear

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:(?P<low_rank>lora_[AB])(?:\.default)?\.weight|(?P<magnitude>lora_magnitude_vector)(?:(?:\.default)?\.weight)?)"
)
_PARTS = ("lora_A", "lora_B", "magnitude")
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
    root = _adapted_model(model)
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


def save_peft_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the adapter of ``model`` as PEFT (0.18 or later) reads it.

    Args:
        model: with adapters, or with one adapted model inside. Names are written relative to the adapted model, or to
            ``model`` if that is a part of one (``module.model``, where a whole LightningModule was adapted).
        folder: made if need be. Files are written beside it and renamed; a reader never sees a part of one.

    Returns:
        ``folder``.

    Raises:
        ValueError: the model has no adapters, or some that PEFT has no equivalent for; nothing is written.
    """
    folder = Path(folder)
    root = _adapted_model(model)
    layers = dict(adapter_layers(root))
    if not layers:
        raise ValueError("the model has no adapters; call inject_adapters(model, config) first")
    options = _options_of(root, layers)
    tensors = {}
    for name, layer in layers.items():
        _check_whole(name, layer)
        tensors.update({f"base_model.model.{name}.{key}": tensor for key, tensor in _tensors_of(layer).items()})

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write the adapter to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial-"))
    try:
        save_file(tensors, partial / TENSORS_NAME, metadata={"format": "pt"})
        (partial / CONFIG_NAME).write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        if folder.exists():
            for name in (TENSORS_NAME, CONFIG_NAME):
                (partial / name).chmod(0o644)
                (partial / name).replace(folder / name)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


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


# Reading -------------------------------------------------------------------------------------------------------------


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
            f"{TENSORS_NAME} holds unexpected tensors: {_listing(unexpected)}; known are lora_A, lora_B"
            f"{' and lora_magnitude_vector' if use_dora else ' (use_dora is false)'} of linear modules"
        )
    expected = _PARTS if use_dora else _PARTS[:2]
    missing = [f"{name}.{part}" for name, module in modules.items() for part in expected if part not in module.tensors]
    if missing:
        raise ValueError(f"{TENSORS_NAME} lacks tensors: {_listing(missing)}")
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
            f"the model has no modules {_listing(absent)}; its linear modules are {_listing(linear) or 'none'}. "
            "Names in the file are relative to the model that was given to PEFT"
        )
    if others := [f"{name}, a {type(present[name]).__name__}" for name in modules if not _is_adaptable(present[name])]:
        raise ValueError(f"only nn.Linear can be adapted, the file holds tensors for: {_listing(others)}")

    methods = {name: module.method for name, module in modules.items()}
    low_rank = {name: module for name, module in modules.items() if module.method != "magnitude"}
    ranks = {name: module.rank for name, module in low_rank.items()}
    alphas = {name: module.alpha for name, module in low_rank.items()}
    for option, values in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if len(set(values.values())) > 1:
            listing = _listing(f"{value:g} for {name}" for value, name in {v: n for n, v in values.items()}.items())
            raise ValueError(f"{option} is not supported: modules share a rank and alpha here, the file has {listing}")

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
    candidates: list[tuple[Any, Any]] = [(targets, magnitude_only), (_as_regex(targets), _as_regex(magnitude_only))]
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
            f"it holds tensors for {_listing(more)}, where the model has no adapters; it has {_listing(layers)}"
        )
    if fewer := layers.keys() - modules.keys():
        raise ValueError(f"it lacks tensors for {_listing(fewer)}, where the model has adapters")
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
    _check_whole(name, target)
    rows, columns = target.out_features, target.in_features
    wide = torch.promote_types(target.weight.dtype, torch.float32)  # type: ignore[arg-type]
    shapes = {"lora_A": (module.rank, columns), "lora_B": (rows, module.rank), "magnitude": (rows,)}
    for part, tensor in module.tensors.items():
        if tuple(tensor.shape) != shapes[part]:
            raise ValueError(f"{name}.{part} has shape {tuple(tensor.shape)}, expected {shapes[part]}")
        if not tensor.is_floating_point() or torch.promote_types(tensor.dtype, wide) != wide:
            raise ValueError(f"{name}.{part} is {tensor.dtype}, which {wide} cannot hold exactly")


# Writing -------------------------------------------------------------------------------------------------------------


def _options_of(root: nn.Module, layers: Mapping[str, AdapterLayer]) -> dict[str, Any]:
    methods = {layer.method for layer in layers.values()}
    if "lora" in methods and len(methods) > 1:
        raise ValueError(
            "PEFT has one use_dora for all modules: an adapter with method='lora' and magnitude_only_modules cannot be "
            "written; merge it instead"
        )
    low_rank = [layer for layer in layers.values() if isinstance(layer, LoRALinear)]
    rank, scaling, dropout = (low_rank[0].rank, low_rank[0].scaling, low_rank[0].dropout.p) if low_rank else (1, 1, 0.0)
    ranks = {name: layer.rank if isinstance(layer, LoRALinear) else 1 for name, layer in layers.items()}
    alphas = {name: ranks[name] * getattr(layer, "scaling", scaling) for name, layer in layers.items()}
    base = getattr(getattr(root, "config", None), "name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(root).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base if isinstance(base, str) and base else None,
        "use_dora": methods != {"lora"},
        "r": rank,
        "lora_alpha": _plain(rank * scaling),
        "lora_dropout": dropout,
        "target_modules": _exact_names(layers, root),
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": _plain(a) for name, a in alphas.items() if a != rank * scaling},
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _tensors_of(layer: AdapterLayer) -> dict[str, Tensor]:
    """Tensors of a layer by their names on disk, in memory of their own."""
    parts = {part: getattr(layer, part, None) for part in _PARTS}
    if layer.method == "magnitude":
        magnitude = parts["magnitude"]
        assert magnitude is not None
        parts["lora_A"] = magnitude.new_zeros(1, layer.in_features)
        parts["lora_B"] = magnitude.new_zeros(layer.out_features, 1)
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    return {
        names[part]: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for part, tensor in parts.items()
        if tensor is not None
    }


def _exact_names(names: Iterable[str], root: nn.Module) -> str | list[str]:
    """The names as a list, or as a regular expression if one is also the end of another module's name."""
    listed = set(names)
    others = [name for name, _ in root.named_modules() if name not in listed]
    ambiguous = any(other.endswith(f".{name}") for name in listed for other in others)
    return _as_regex(names) if ambiguous else list(names)


# Both ----------------------------------------------------------------------------------------------------------------


def _adapted_model(model: nn.Module) -> nn.Module:
    """What names in the file are relative to: the one adapted model inside ``model``, or ``model`` itself."""
    if any(hasattr(module, "adapter_config") for module in model.modules()):
        return adapted_submodule(model)[1]
    return model


def _check_whole(name: str, module: nn.Module) -> None:
    if getattr(module, "norm_axis", "out") == "in":
        raise ValueError(f"norm_axis='in' ({name}) has no equivalent in PEFT: its magnitudes belong to outputs")
    for parameter in module.parameters(recurse=False):
        if parameter.is_meta or isinstance(parameter, DTensor):
            kind = "on the meta device" if parameter.is_meta else "sharded"
            raise ValueError(f"{name} is {kind}; PEFT's files hold whole tensors")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_regex(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def _plain(number: int | float) -> int | float:
    return int(number) if number == int(number) else number


def _listing(names: Iterable[str]) -> str:
    ordered = list(names) if isinstance(names, list) else sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")

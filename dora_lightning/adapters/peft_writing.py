"""Write adapters as PEFT reads them; :mod:`dora_lightning.adapters.peft_format` says how they look."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from dora_lightning.adapters.config import AdapterConfig
from dora_lightning.adapters.finite import check_finite
from dora_lightning.adapters.inject import adapter_layers
from dora_lightning.adapters.layers import AdapterLayer, DoRALinear, LoRALinear, MagnitudeLinear
from dora_lightning.adapters.operators import is_linear
from dora_lightning.adapters.peft_format import (
    CONFIG_NAME,
    TENSORS_NAME,
    adapted_model,
    as_regex,
    check_computes_alike,
    check_whole,
    disk_names,
    is_transposed,
    to_disk,
)
from dora_lightning.adapters.vera import VeRALinear
from dora_lightning.files import open_atomically


def save_peft_adapter(model: nn.Module, folder: str | Path, save_projection: bool | None = None) -> Path:
    """Write the adapter of ``model`` as PEFT (0.18 or later) reads it.

    Args:
        model: with adapters, or with one adapted model inside. Names are written relative to the adapted model, or to
            ``model`` if that is a part of one (``module.model``, where a whole LightningModule was adapted).
        folder: made if need be. Files are written beside it and renamed; a reader never sees a part of one.
        save_projection: for VeRA, whether to write the random pair too (as PEFT does, and as here if not given), or to
            leave it to the seed.

    Returns:
        ``folder``.

    Raises:
        ValueError: the model has no adapters, or some that PEFT has no equivalent for; nothing is written.
    """
    folder = Path(folder)
    root = adapted_model(model)
    layers = dict(adapter_layers(root))
    config: AdapterConfig | None = getattr(root, "adapter_config", None)
    if config is not None and config.method == "full":
        raise ValueError("method='full' trains the model's own weights, which PEFT's files do not hold; save the model")
    if not layers:
        raise ValueError("the model has no adapters; call inject_adapters(model, config) first")
    for name, layer in layers.items():
        check_whole(name, layer)
    methods = {layer.method for layer in layers.values()}
    if save_projection is not None and methods != {"vera"}:
        raise ValueError(f"save_projection={save_projection} has no effect without method='vera'")
    with torch.no_grad():
        if methods == {"vera"}:
            options, tensors = _vera(root, layers, save_projection is not False)
        else:
            options, tensors = _lora(root, layers)
    _write(folder, options, tensors)
    return folder


@dataclass
class _Written:
    """A layer as a LoRA or DoRA module of PEFT's."""

    rank: int
    scaling: float
    tensors: dict[str, Tensor]

    @property
    def alpha(self) -> int | float:
        alpha = self.rank * self.scaling
        return int(alpha) if alpha == int(alpha) else alpha


def _lora(root: nn.Module, layers: Mapping[str, AdapterLayer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    plain = [layer for layer in layers.values() if layer.method in ("lora", "vera")]
    if plain and len(plain) < len(layers):
        raise ValueError(
            f"PEFT has one use_dora for all modules: an adapter with method={plain[0].method!r} and "
            "magnitude_only_modules cannot be written; merge it instead"
        )
    written = {name: _as_lora(name, layer) for name, layer in layers.items()}
    first = next((name for name, layer in layers.items() if isinstance(layer, LoRALinear)), next(iter(layers)))
    one, dropout = written[first], getattr(layers[first], "dropout", None)
    options = {
        "peft_type": "LORA",
        **_about_the_model(root),
        "use_dora": not plain,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": 0.0 if dropout is None else dropout.p,
        "target_modules": _exact_names(layers, root),
        "rank_pattern": {f"^{re.escape(name)}": w.rank for name, w in written.items() if w.rank != one.rank},
        "alpha_pattern": {f"^{re.escape(name)}": w.alpha for name, w in written.items() if w.alpha != one.alpha},
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": is_transposed(layer.base_layer for layer in layers.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return options, _by_disk_name(layers, {name: module.tensors for name, module in written.items()})


def _as_lora(name: str, layer: AdapterLayer) -> _Written:
    base = layer.base_layer
    method = {"dvora": "dora"}.get(layer.method, layer.method)
    check_computes_alike(name, base, method)
    parts: dict[str, Tensor] = {}
    if isinstance(layer, LoRALinear):
        parts["lora_A"], parts["lora_B"] = layer.factors()
        rank, scaling = len(parts["lora_A"]), layer.scaling
    else:
        rank, scaling = layer.operator.groups(base), 1.0
        parts["lora_A"] = torch.zeros(rank, layer.in_features)
        parts["lora_B"] = torch.zeros(layer.out_features, 1)
    if isinstance(layer, (DoRALinear, MagnitudeLinear)):
        parts["magnitude"] = layer.magnitude
    return _Written(rank, scaling, {part: to_disk(part, tensor, base, rank) for part, tensor in parts.items()})


def _vera(
    root: nn.Module, layers: Mapping[str, AdapterLayer], save_projection: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    # of a layer: the model given may be a part of the one that was adapted
    first = next(layer for layer in layers.values() if isinstance(layer, VeRALinear))
    for name, layer in layers.items():
        if not is_linear(layer.base_layer):
            kind = type(layer.base_layer).__name__
            raise ValueError(f"{name}: PEFT has VeRA for linear layers alone, not for a {kind}; merge it instead")
    options = {
        "peft_type": "VERA",
        **_about_the_model(root),
        "r": first.rank,
        "projection_prng_key": first.pair.seed,
        "save_projection": save_projection,
        "d_initial": first.d_initial,
        "vera_dropout": first.dropout.p,
        "target_modules": _exact_names(layers, root),
        "bias": "none",
        "fan_in_fan_out": is_transposed(layer.base_layer for layer in layers.values()),
        "init_weights": True,
        "inference_mode": True,
    }
    values = {
        name: {"lambda_d": layer.lambda_d, "lambda_b": layer.lambda_b}
        for name, layer in layers.items()
        if isinstance(layer, VeRALinear)
    }
    tensors = _by_disk_name(layers, values)
    if save_projection:
        tensors["base_model.vera_A"], tensors["base_model.vera_B"] = first.pair.on(torch.device("cpu"))
    return options, tensors


def _about_the_model(root: nn.Module) -> dict[str, Any]:
    base = getattr(getattr(root, "config", None), "name_or_path", None)
    return {
        "task_type": "CAUSAL_LM" if type(root).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base if isinstance(base, str) and base else None,
    }


def _by_disk_name(layers: Mapping[str, AdapterLayer], parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by their names on disk, in memory of their own."""
    return {
        f"base_model.model.{name}.{disk_names(layers[name].base_layer)[part]}": tensor.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for name, tensors in parts.items()
        for part, tensor in tensors.items()
    }


def _exact_names(names: Iterable[str], root: nn.Module) -> str | list[str]:
    """The names as a list, or as a regular expression if one is also the end of another module's name."""
    listed = set(names)
    others = [name for name, _ in root.named_modules() if name not in listed]
    ambiguous = any(other.endswith(f".{name}") for name in listed for other in others)
    return as_regex(names) if ambiguous else list(names)


def _write(folder: Path, options: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    check_finite(tensors, f"{folder} is not written")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder to write the adapter to")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # both are written before either is in its place: an adapter that was there is not mixed with this one
        with open_atomically(folder / CONFIG_NAME) as config, open_atomically(folder / TENSORS_NAME) as weights:
            weights.write(save(tensors, metadata={"format": "pt"}))
            config.write((json.dumps(options, indent=2) + "\n").encode())
    except BaseException:
        if made:
            folder.rmdir()
        raise

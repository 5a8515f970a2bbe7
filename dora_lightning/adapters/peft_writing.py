"""Write adapters as PEFT reads them; :mod:`dora_lightning.adapters.peft_format` says how they look."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_lightning.adapters.inject import adapter_layers
from dora_lightning.adapters.layers import AdapterLayer, LoRALinear
from dora_lightning.adapters.peft_format import (
    CONFIG_NAME,
    PARTS,
    TENSORS_NAME,
    adapted_model,
    as_regex,
    check_whole,
)


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
    root = adapted_model(model)
    layers = dict(adapter_layers(root))
    if not layers:
        raise ValueError("the model has no adapters; call inject_adapters(model, config) first")
    for name, layer in layers.items():
        if layer.method not in ("lora", "dora", "magnitude") or type(layer.base_layer) is not nn.Linear:
            raise ValueError(f"{name}: method={layer.method!r} on {type(layer.base_layer).__name__} is not written")
        if getattr(layer, "init_A", None) is not None:
            raise ValueError(f"{name}: init={layer.init!r} is not written")
    options = _options_of(root, layers)
    tensors = {}
    for name, layer in layers.items():
        check_whole(name, layer)
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
    parts = {part: getattr(layer, part, None) for part in PARTS}
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
    return as_regex(names) if ambiguous else list(names)


def _plain(number: int | float) -> int | float:
    return int(number) if number == int(number) else number

"""Under what names a model's weights are stored in its files.

``transformers`` renames weights of some architectures while it loads them (LLaVA's ``model.language_model.layers`` is
``language_model.model.layers`` in its files). What reads those files without loading the model needs both names.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dora_lightning.adapters import adapter_layers


def base_name(name: str) -> str:
    """Name that a tensor has in the model before adapters are injected."""
    return name.replace(".base_layer.", ".")


def stored_names(model: nn.Module) -> dict[str, str]:
    """Name of each tensor in the base model -> its name in the files ``model`` was loaded from, where they differ.

    Tensors that loading does more to than rename, as it does to stacked experts, are left out.

    Args:
        model: with or without adapters, on any device. Of the one transformers model inside another module (a
            LightningModule) every name differs; of several inside one, which have files of their own, none is known.
    """
    prefix, inner = _only_pretrained(model)
    if inner is None:
        return {}
    renamed = _renamed(inner)
    if not prefix:
        return renamed
    names = (base_name(name) for name in inner.state_dict())
    return {f"{prefix}.{name}": renamed.get(name, name) for name in names}


def base_name_or_path(model: nn.Module) -> str | None:
    """Folder or hub id that ``model``, or the one transformers model inside it, was loaded from; None if unknown."""
    _, inner = _only_pretrained(model)
    name = getattr(getattr(inner or model, "config", None), "name_or_path", None)
    return str(name) if name else None


def _only_pretrained(model: nn.Module) -> tuple[str, PreTrainedModel | None]:
    """The one transformers model that is, or is inside, ``model`` and in no other; its dotted name, and itself."""
    found: dict[str, PreTrainedModel] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    if len(found) != 1:
        return "", None
    return next(iter(found.items()))


def _renamed(model: PreTrainedModel) -> dict[str, str]:
    own = {id(p) for _, layer in adapter_layers(model) for p in layer.parameters(recurse=False)}
    # stand-ins without memory: what is only renamed comes out as the same object
    stand_ins = {
        base_name(name): torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in own
    }
    names = {id(tensor): name for name, tensor in stand_ins.items()}
    stored = revert_weight_conversion(model, dict(stand_ins))
    return {
        names[id(tensor)]: key for key, tensor in stored.items() if id(tensor) in names and names[id(tensor)] != key
    }

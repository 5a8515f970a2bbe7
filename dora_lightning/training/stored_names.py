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
        model: with or without adapters, on any device; one that is no transformers model has nothing renamed.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
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

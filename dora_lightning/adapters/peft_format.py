"""Adapters as PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

On disk the tensors of a module ``q_proj [out, in]`` are called::

    base_model.model.q_proj.lora_A.weight           [rank, in]
    base_model.model.q_proj.lora_B.weight           [out, rank]
    base_model.model.q_proj.lora_magnitude_vector   [out]       with use_dora only

PEFT has no module that trains its magnitude alone. It is written as a DoRA module of rank 1 with ``A = B = 0``, which
computes the same and, since both gradients are zero, trains its magnitude alone; a DoRA module with ``A = B = 0`` is
read as one. A file says nothing of ``detach_norm``, and PEFT drops the input of both paths, as ``exact_dropout`` does.

Here is what reading (:mod:`~dora_lightning.adapters.peft_reading`) and writing
(:mod:`~dora_lightning.adapters.peft_writing`) share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from torch.distributed.tensor import DTensor

from dora_lightning.adapters.inject import adapted_submodule

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PARTS = ("lora_A", "lora_B", "magnitude")


def adapted_model(model: nn.Module) -> nn.Module:
    """What names in the file are relative to: the one adapted model inside ``model``, or ``model`` itself."""
    if any(hasattr(module, "adapter_config") for module in model.modules()):
        return adapted_submodule(model)[1]
    return model


def check_whole(name: str, module: nn.Module) -> None:
    """Refuse an adapter whose values are not here, or that PEFT has no equivalent for."""
    if getattr(module, "norm_axis", "out") == "in":
        raise ValueError(f"norm_axis='in' ({name}) has no equivalent in PEFT: its magnitudes belong to outputs")
    for parameter in module.parameters(recurse=False):
        if parameter.is_meta or isinstance(parameter, DTensor):
            kind = "on the meta device" if parameter.is_meta else "sharded"
            raise ValueError(f"{name} is {kind}; PEFT's files hold whole tensors")


def as_regex(names: Iterable[str]) -> str:
    """A regular expression that matches these names and no others."""
    return "|".join(re.escape(name) for name in names)


def listing(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    ordered = list(names) if isinstance(names, list) else sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")

"""Adapters as PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

On disk the tensors of a module, each name after ``base_model.model.<module>.``, are::

    layer                    A                                  B                               magnitude (use_dora)
    nn.Linear, Conv1D        lora_A.weight [rank, in]           lora_B.weight [out, rank]       [out]
    nn.Conv1d, 2d, 3d        lora_A.weight [rank, in, *kernel]  lora_B.weight [out, rank, 1..]  [1, out, 1..]
    nn.Embedding             lora_embedding_A [rank, tokens]    lora_embedding_B [dim, rank]    [dim]

with the magnitude called ``lora_magnitude_vector``. VeRA's are ``vera_lambda_d [rank]`` and ``vera_lambda_b [out]``,
and once, if ``save_projection``, ``base_model.vera_A`` and ``base_model.vera_B``.

PEFT has no module that trains its magnitude alone. It is written as a DoRA module of rank 1 with ``A = B = 0``, which
computes the same and, since both gradients are zero, trains its magnitude alone; a DoRA module with ``A = B = 0`` is
read as one. PEFT has no DVoRA either: it is written as DoRA with ``diag(d) A`` and ``diag(b) B``. What started from
the weights (``pissa``, ``olora``) is written as an update of the pretrained weights, of twice the rank, as PEFT
converts it. A file says nothing of ``detach_norm``, and PEFT drops the input of both paths, as ``exact_dropout`` does.

In a convolution with groups, PEFT lets ``A`` mix the groups' channels, and takes DoRA's norm of a weight that it does
not apply. LoRA is written with zeros in ``A`` for the other groups' channels, and only read if it has them; DoRA is not
written.

Here is what reading (:mod:`~dora_lightning.adapters.peft_reading`) and writing
(:mod:`~dora_lightning.adapters.peft_writing`) share.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dora_lightning.adapters.inject import adapted_submodule
from dora_lightning.adapters.operators import is_lookup, is_transposed_linear, operator_of

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"


def disk_names(base_layer: nn.Module) -> dict[str, str]:
    """Our name of each of a module's tensors -> its name on disk."""
    if is_lookup(base_layer):
        low_rank = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
    else:
        low_rank = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    vera = {"lambda_d": "vera_lambda_d", "lambda_b": "vera_lambda_b"}
    return {**low_rank, **vera, "magnitude": "lora_magnitude_vector"}


def disk_shapes(base_layer: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Shape on disk of each of a module's tensors."""
    operator = operator_of(base_layer)
    assert operator is not None
    rows, columns = operator.features(base_layer)
    shapes = {"lora_A": (rank, columns), "lora_B": (rows, rank), "magnitude": (rows,)}
    if kernel := kernel_of(base_layer):
        ones = tuple(1 for _ in kernel)
        shapes["lora_A"] = (rank, base_layer.in_channels, *kernel)
        shapes["lora_B"] = (rows, rank // base_layer.groups, *ones)
        shapes["magnitude"] = (1, rows, *ones)
    return shapes | {"lambda_d": (rank,), "lambda_b": (rows,)}


def kernel_of(base_layer: Any) -> tuple[int, ...]:
    """Kernel of a convolution; empty for any other layer."""
    return tuple(base_layer.kernel_size) if hasattr(base_layer, "kernel_size") else ()


def to_disk(part: str, tensor: Tensor, base_layer: Any, rank: int) -> Tensor:
    """One of our tensors in its shape on disk."""
    shape = disk_shapes(base_layer, rank)[part]
    if part != "lora_A" or not kernel_of(base_layer) or base_layer.groups == 1:
        return tensor.reshape(shape)
    groups = base_layer.groups
    dense = tensor.new_zeros(shape)
    for group, (blocks, rows) in enumerate(zip(_by_group(dense, groups), tensor.chunk(groups), strict=True)):
        blocks[group].copy_(rows.reshape(blocks[group].shape))
    return dense


def from_disk(part: str, tensor: Tensor, base_layer: Any) -> Tensor:
    """One of PEFT's tensors in our shape.

    Raises:
        ValueError: ``A`` of a convolution with groups mixes them.
    """
    if part in ("magnitude", "lambda_d", "lambda_b"):
        return tensor.reshape(-1)
    if part != "lora_A" or not kernel_of(base_layer) or base_layer.groups == 1:
        return tensor.flatten(1)
    kept = []
    for group, blocks in enumerate(_by_group(tensor, base_layer.groups)):
        kept.append(blocks[group].flatten(1))
        if any(block.any() for other, block in enumerate(blocks) if other != group):
            raise ValueError("lora_A mixes the channels of the convolution's groups, and could not be merged")
    return torch.cat(kept)


def _by_group(lora_A: Tensor, groups: int) -> list[tuple[Tensor, ...]]:
    """Views of the rows of each group, by the group whose channels they read."""
    return [rows.chunk(groups, dim=1) for rows in lora_A.chunk(groups)]


def is_transposed(base_layers: Iterable[nn.Module]) -> bool:
    """PEFT's ``fan_in_fan_out``, which it takes from the layers itself."""
    return all(is_transposed_linear(base_layer) for base_layer in base_layers)


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


def check_computes_alike(name: str, base_layer: Any, method: str) -> None:
    """Refuse a convolution that PEFT would compute another function of."""
    if not kernel_of(base_layer):
        return
    if any(step != 1 for step in base_layer.dilation):
        raise ValueError(f"{name}: PEFT's update of a convolution ignores its dilation")
    if base_layer.padding_mode != "zeros" and method != "magnitude":
        raise ValueError(f"{name}: PEFT's update of a convolution ignores padding_mode={base_layer.padding_mode!r}")
    if base_layer.groups > 1 and method == "dora":
        raise ValueError(f"{name}: PEFT takes DoRA's norm of a convolution with groups of a weight that it is not")


def as_regex(names: Iterable[str]) -> str:
    """A regular expression that matches these names and no others."""
    return "|".join(re.escape(name) for name in names)


def listing(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    ordered = list(names) if isinstance(names, list) else sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")

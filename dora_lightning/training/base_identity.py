"""Recognise a base model by its numbers, so that an adapter is never put on another one by mistake.

Of each weight a checksum of its bits is kept, which any change alters, and a few values, which are still comparable
when the same weights are loaded in another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 8
# two roundings to half precision of the same number differ by less than this
_OTHER_DTYPE_RTOL = 2.0**-7


def base_identity(model: nn.Module, name: str) -> dict[str, Any]:
    """Name of the base model, and a checksum and a few values of each of its frozen weights, in plain containers.

    Args:
        model: the model with real weights, with or without adapters.
        name: folder or hub id it was loaded from.
    """
    frozen = {
        key.replace(".base_layer.", "."): parameter
        for key, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point() and not parameter.is_meta
    }
    return _identity(frozen, name)


def check_same_base(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Compare the base a checkpoint was trained on with the one at hand; another dtype of the same weights passes.

    Raises:
        ValueError: they differ; the message names both models and the first weight that differs.
    """
    theirs, ours = saved["samples"], present["samples"]
    for key in sorted(theirs.keys() ^ ours.keys()):
        where = "this base" if key in theirs else "the checkpoint's base"
        raise _wrong_base(saved, present["name"], f"{where} has no weight {key}")
    for key in theirs:
        _compare(saved, present, key)


def check_weight_of_base(saved: dict[str, Any], key: str, weight: Tensor, name: str) -> None:
    """As :func:`check_same_base`, for one weight of the base ``name``; a weight that was not recorded passes."""
    if key in saved["samples"]:
        _compare(saved, _identity({key: weight}, name), key)


def _identity(weights: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    return {
        "name": name,
        "samples": {key: _sample(weight) for key, weight in weights.items()},
        "checksums": {key: _checksum(weight) for key, weight in weights.items()},
        "dtypes": {key: str(weight.dtype) for key, weight in weights.items()},
    }


def _compare(saved: dict[str, Any], present: dict[str, Any], key: str) -> None:
    if saved["dtypes"][key] == present["dtypes"][key]:
        same = saved["checksums"][key] == present["checksums"][key]
    else:
        theirs, ours = saved["samples"][key], present["samples"][key]
        same = theirs.shape == ours.shape and torch.allclose(
            theirs, ours, rtol=_OTHER_DTYPE_RTOL, atol=1e-5 * _OTHER_DTYPE_RTOL
        )
    if not same:
        raise _wrong_base(saved, present["name"], f"{key} holds other values")


def _wrong_base(saved: dict[str, Any], name: str, reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint was trained on another base model: {saved['name']!r}, not {name!r} ({reason}). "
        "Load it on the base it was trained on."
    )


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES].to("cpu", torch.float32, copy=True)


def _checksum(weight: Tensor) -> int:
    """Sum of the bits as whole numbers, which is the same on every device and in every order of summation."""
    flat = weight.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    whole = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    rest = flat[whole:].view(torch.uint8).sum(dtype=torch.int64)
    # eight bytes at a time: without a conversion the sum runs at the speed of memory
    return int(flat[:whole].view(torch.int64).sum() + rest)

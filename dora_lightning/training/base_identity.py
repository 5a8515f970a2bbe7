"""Recognise a base model by a few of its numbers, so that an adapter is never put on another one by mistake."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 8
# two roundings to half precision of the same number differ by less than this
_OTHER_DTYPE_RTOL = 2.0**-7


def base_identity(model: nn.Module, name: str) -> dict[str, Any]:
    """Name of the base model and a few values of each of its frozen weights, in plain containers.

    Args:
        model: the model with real weights, with or without adapters.
        name: folder or hub id it was loaded from.
    """
    frozen = {
        key.replace(".base_layer.", "."): parameter
        for key, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point() and not parameter.is_meta
    }
    return {
        "name": name,
        "samples": {key: _sample(parameter) for key, parameter in frozen.items()},
        "dtypes": {key: str(parameter.dtype) for key, parameter in frozen.items()},
    }


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
        _compare(saved, key, ours[key], present["dtypes"][key], present["name"])


def check_weight_of_base(saved: dict[str, Any], key: str, weight: Tensor, name: str) -> None:
    """As :func:`check_same_base`, for one weight of the base ``name``; a weight that was not recorded passes."""
    if key in saved["samples"]:
        _compare(saved, key, _sample(weight), str(weight.dtype), name)


def _compare(saved: dict[str, Any], key: str, ours: Tensor, dtype: str, name: str) -> None:
    theirs = saved["samples"][key]
    rtol = 0.0 if saved["dtypes"][key] == dtype else _OTHER_DTYPE_RTOL
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=rtol, atol=1e-5 * rtol):
        raise _wrong_base(saved, name, f"{key} holds other values")


def _wrong_base(saved: dict[str, Any], name: str, reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint was trained on another base model: {saved['name']!r}, not {name!r} ({reason}). "
        "Load it on the base it was trained on."
    )


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES].to("cpu", torch.float32, copy=True)

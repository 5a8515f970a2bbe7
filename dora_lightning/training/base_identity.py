"""Recognise a base model by a few of its numbers, so that an adapter is never put on another one by mistake."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 8
# two roundings to half precision of the same number differ by less than this
_HALF_TOLERANCE = 2.0**-7


def base_identity(model: nn.Module, name: str) -> dict[str, Any]:
    """Name of the base model and a few values of each of its frozen weights, in plain containers.

    Args:
        model: the model with real weights, with or without adapters.
        name: folder or hub id it was loaded from.
    """
    samples = {
        _plain_name(key): _sample(parameter)
        for key, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point() and not parameter.is_meta
    }
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if not p.requires_grad}
    return {"name": name, "dtypes": sorted(dtypes), "samples": samples}


def check_same_base(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Compare the base a checkpoint was trained on with the one at hand; another dtype of the same weights passes.

    Raises:
        ValueError: they differ; the message names both models and the first weight that differs.
    """
    ours, theirs = present["samples"], saved["samples"]
    exact = saved["dtypes"] == present["dtypes"]
    for key in theirs.keys() | ours.keys():
        if key not in ours or key not in theirs:
            where = "this base" if key not in ours else "the checkpoint's base"
            raise _wrong_base(saved, present, f"{where} has no weight {key}")
    for key, theirs_sample in theirs.items():
        if not _same(theirs_sample, ours[key], exact):
            raise _wrong_base(saved, present, f"{key} holds other values")


def _same(a: Tensor, b: Tensor, exact: bool) -> bool:
    if a.shape != b.shape:
        return False
    return torch.equal(a, b) if exact else torch.allclose(a, b, rtol=_HALF_TOLERANCE, atol=1e-7)


def _wrong_base(saved: dict[str, Any], present: dict[str, Any], reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint was trained on another base model: {saved['name']!r}, not {present['name']!r} ({reason}). "
        "Load it on the base it was trained on."
    )


def _plain_name(key: str) -> str:
    return key.replace(".base_layer.", ".")


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step][:_SAMPLES].to("cpu", torch.float32, copy=True)

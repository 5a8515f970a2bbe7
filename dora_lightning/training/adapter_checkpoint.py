"""Checkpoints that hold the adapter and whatever else trains, never the frozen base.

A Lightning checkpoint made this way has, beside Lightning's own keys, an entry ``dora_lightning``: the format version,
the adapter config, the base model's identity, and the prefix of the adapted model inside the LightningModule. It holds
plain containers and tensors only, so ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_lightning.adapters import AdapterConfig
from dora_lightning.adapters.finite import check_finite
from dora_lightning.adapters.quantized import is_quantized
from dora_lightning.training.base_identity import check_same_base
from dora_lightning.training.checkpoint_files import load_checkpoint_file

KEY = "dora_lightning"
FORMAT_VERSION = 1
# the second is where WeightAveraging keeps the model itself, the average being in the first
_MODEL_STATES = ("state_dict", "current_model_state")


@dataclass
class AdapterCheckpoint:
    """An adapter checkpoint as read from disk.

    Attributes:
        config: how the adapter was injected.
        base: identity of the base model, see :mod:`dora_lightning.training.base_identity`.
        tensors: name inside the adapted model -> trained tensor.
        backbone: name of the LightningModule's class.
        step: optimiser steps taken.
        options: hyperparameters of the LightningModule, as it saved them.
    """

    config: AdapterConfig
    base: dict[str, Any]
    tensors: dict[str, Tensor]
    backbone: str = ""
    step: int = 0
    options: dict[str, Any] = field(default_factory=dict)


def write_adapter_entry(
    checkpoint: dict[str, Any], module: nn.Module, config: AdapterConfig, base: dict[str, Any], prefix: str
) -> None:
    """Reduce a Lightning checkpoint to what trains, and add the ``dora_lightning`` entry, in place.

    Raises:
        NonFiniteError: a parameter that trains holds NaN or infinity; the checkpoint from before stays.
    """
    frozen = frozen_names(module)
    # buffers may hold infinity rightly, as masks of attention do
    trained = dict(module.named_parameters(remove_duplicate=False)).keys() - frozen
    for states in _MODEL_STATES:
        if states in checkpoint:
            checkpoint[states] = {k: v for k, v in checkpoint[states].items() if k not in frozen}
            weights = {name: value for name, value in checkpoint[states].items() if name in trained}
            check_finite(weights, f"no checkpoint is saved of step {checkpoint['global_step']}")
    checkpoint[KEY] = {
        "format_version": FORMAT_VERSION,
        "adapter": config.to_dict(),
        "base": base,
        "prefix": prefix,
        "backbone": type(module).__name__,
    }


def check_adapter_entry(
    checkpoint: dict[str, Any], module: nn.Module, config: AdapterConfig, base: dict[str, Any]
) -> None:
    """Check that a checkpoint belongs to this adapter and base, and holds exactly what trains.

    Raises:
        ValueError: wrong base, wrong config, missing or unexpected keys, other shapes, each by name.
    """
    entry = _entry(checkpoint, "the checkpoint")
    check_same_base(entry["base"], base)
    saved = AdapterConfig(**entry["adapter"])
    differing = [f"{k}={v!r} (here {getattr(config, k)!r})" for k, v in vars(saved).items() if getattr(config, k) != v]
    if differing:
        raise ValueError(f"the checkpoint's adapter was made with another config: {', '.join(differing)}")
    frozen = frozen_names(module)
    expected = {name: value for name, value in module.state_dict().items() if name not in frozen}
    present = checkpoint["state_dict"]
    if missing := expected.keys() - present.keys():
        raise ValueError(f"the checkpoint lacks {_listing(missing)}, which train here")
    if unexpected := present.keys() - expected.keys():
        raise ValueError(f"the checkpoint holds {_listing(unexpected)}, unknown to this model")
    for name, value in expected.items():
        if present[name].shape != value.shape:
            shapes = f"has shape {tuple(present[name].shape)}, here {tuple(value.shape)}"
            raise ValueError(f"the checkpoint does not fit this model: {name} {shapes}")


def add_frozen(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put the frozen tensors of ``module`` into a checkpoint that was read, for who loads it strictly, in place."""
    frozen = frozen_names(module)
    base = {name: value for name, value in module.state_dict().items() if name in frozen}
    for states in _MODEL_STATES:
        if states in checkpoint:
            checkpoint[states] = base | checkpoint[states]


def read_adapter_checkpoint(path: str | Path, mmap: bool = False) -> AdapterCheckpoint:
    """Read what a checkpoint file holds of the adapter, on the CPU.

    Args:
        path: the file.
        mmap: leave tensors in the file until they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an adapter checkpoint of this library.
    """
    checkpoint = load_checkpoint_file(path, mmap=mmap)
    entry = _entry(checkpoint, str(path))
    prefix = entry["prefix"]
    tensors = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    # one that was written before there were several says nothing
    config, backbone = AdapterConfig(**entry["adapter"]), entry.get("backbone", "")
    options = checkpoint.get("hyper_parameters", {})
    return AdapterCheckpoint(config, entry["base"], tensors, backbone, checkpoint["global_step"], options)


def frozen_names(module: nn.Module) -> set[str]:
    """Every dotted name of a parameter that does not train; a tied one has several.

    And of what else a quantised layer keeps in a state dict, such as the scales of its weight.
    """
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    for prefix, layer in module.named_modules():
        if is_quantized(layer):
            frozen |= {f"{prefix}.{name}" for name in layer.state_dict()}
    return frozen


def _entry(checkpoint: dict[str, Any], what: str) -> dict[str, Any]:
    entry = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    if entry is None:
        raise ValueError(f"{what} is no adapter checkpoint of dora-lightning: it has no entry {KEY!r}")
    if entry["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{what} has format {entry['format_version']}, this version reads up to {FORMAT_VERSION}")
    return entry


def _listing(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")

"""What was adapted and what trains, as numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from dora_lightning.adapters.inject import adapter_layers, find_targets
from dora_lightning.adapters.quantized import is_quantized

GROUPS = ("magnitude", "lora_A", "lora_B", "other")
# VeRA's vectors scale the rows of A and of B, and go where those would
_GROUP_OF = {"lambda_d": "lora_A", "lambda_b": "lora_B"}


@dataclass
class AdapterSummary:
    """Counts of adapted modules and of parameters.

    Attributes:
        modules: last part of the name of each kind of adapted module -> ``(method, how many)``.
        groups: parameter group -> trainable parameters in it; groups that train nothing are left out.
        total: all parameters of the model, adapters included.
    """

    modules: dict[str, tuple[str, int]]
    groups: dict[str, int]
    total: int

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(self.groups.values())

    @property
    def share(self) -> float:
        """Trainable share of all parameters, adapters included, as PEFT and the paper count it; in [0, 1]."""
        return self.trainable / self.total


def parameter_group(name: str) -> str:
    """Optimiser group of a parameter, by its dotted name: ``magnitude``, ``lora_A``, ``lora_B`` or ``other``.

    VeRA's ``lambda_d`` is in ``lora_A``, its ``lambda_b`` in ``lora_B``.

    >>> parameter_group("model.layers.0.self_attn.q_proj.lora_A")
    'lora_A'
    >>> parameter_group("model.layers.0.self_attn.q_proj.lambda_b")
    'lora_B'
    """
    last = name.rpartition(".")[2]
    last = _GROUP_OF.get(last, last)
    return last if last in GROUPS else "other"


def summarize_adapters(model: nn.Module) -> AdapterSummary:
    """Count the adapted modules and the parameters of ``model``; works on the meta device too."""
    counts = Counter((name.rpartition(".")[2], layer.method) for name, layer in adapter_layers(model))
    for module in model.modules():
        config = getattr(module, "adapter_config", None)
        if config is not None and config.method == "full":
            methods = find_targets(module, config)
            counts += Counter((name.rpartition(".")[2], "full") for name, kind in methods.items() if kind == "full")
    groups: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter_group(name)] += parameter.numel()
    return AdapterSummary(
        modules={kind: (method, count) for (kind, method), count in counts.items()},
        groups={group: groups[group] for group in GROUPS if groups[group]},
        total=sum(parameter.numel() for parameter in model.parameters()) + _packed_away(model),
    )


def _packed_away(model: nn.Module) -> int:
    """How many weights share a place with others in packed tensors."""
    packed: list[Any] = [module for module in model.modules() if is_quantized(module)]
    return sum(module.in_features * module.out_features - module.weight.numel() for module in packed)

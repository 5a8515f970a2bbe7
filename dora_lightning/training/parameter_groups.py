"""Named optimiser groups, and the check that each trainable parameter is in exactly one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dora_lightning.adapters.summary import GROUPS, parameter_group


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters of ``module`` in the groups ``magnitude``, ``lora_A``, ``lora_B``, ``other``.

    Magnitudes get no weight decay: it would pull the norm of the weight, not a small update, towards zero.

    Raises:
        ValueError: nothing is trainable.
    """
    members: dict[str, list[nn.Parameter]] = {group: [] for group in GROUPS}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            members[parameter_group(name)].append(parameter)
    groups: list[dict[str, Any]] = [{"name": group, "params": found} for group, found in members.items() if found]
    if not groups:
        raise ValueError("nothing is trainable: no adapter was injected and everything is frozen")
    for group in groups:
        if group["name"] == "magnitude":
            group["weight_decay"] = 0.0
    return groups


def check_optimizers(module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
    """Check that something trains and that every trainable parameter is in exactly one optimiser group.

    An adapter injected after the optimiser was built would otherwise never train, without any error.

    Raises:
        ValueError: names the parameters that are in no group, or in several.
    """
    trainable = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("nothing is trainable: no adapter was injected and everything is frozen")
    counts = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    problems = {"in no optimiser group": lambda n: n == 0, "in more than one optimiser group": lambda n: n > 1}
    for problem, is_so in problems.items():
        names = [name for key, name in trainable.items() if is_so(counts[key])]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{len(names)} trainable parameters are {problem}: {', '.join(names[:3])}{more}. "
                "Build the optimiser from the module's parameters after the adapters are injected."
            )

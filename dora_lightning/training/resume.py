"""Resume a run with some optimiser settings changed: what the config says now wins over the checkpoint.

Lightning restores the optimiser's groups and the scheduler's base rates from the checkpoint, so a learning rate that
was changed in the config or on the command line would be dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dora_lightning.training.regroup import flatten_schedulers


def configured_options(optimizers: Iterable[Optimizer]) -> list[list[dict[str, Any]]]:
    """Options of each group of each optimiser as configured, in plain values; take them before anything is restored."""
    return [
        [
            {
                k: v
                for k, v in group.items()
                if k not in ("params", "lr") and isinstance(v, (int, float, bool, str, tuple))
            }
            | {"lr": float(group.get("initial_lr", group["lr"]))}
            for group in optimizer.param_groups
        ]
        for optimizer in optimizers
    ]


def apply_overrides(
    saved: list[list[dict[str, Any]]],
    configured: list[list[dict[str, Any]]],
    optimizers: Iterable[Optimizer],
    schedulers: Iterable[LRScheduler],
) -> list[str]:
    """Put options that differ between the saved and the present config into the restored optimisers and schedulers.

    Returns:
        One line per change, for the log.
    """
    changes: list[str] = []
    for index, optimizer in enumerate(optimizers):
        if index >= len(saved) or len(saved[index]) != len(configured[index]):
            continue
        for position, group in enumerate(optimizer.param_groups):
            before, now = saved[index][position], configured[index][position]
            for option in now:
                if option not in before or before[option] == now[option]:
                    continue
                label = f"{group.get('name', position)}.{option}"
                changes.append(f"{label}: {now[option]} (checkpoint: {before[option]})")
                if option == "lr":
                    _override_rate(optimizer, position, before["lr"], now["lr"], schedulers)
                else:
                    group[option] = now[option]
    return changes


def _override_rate(
    optimizer: Optimizer, position: int, before: float, now: float, schedulers: Iterable[LRScheduler]
) -> None:
    group = optimizer.param_groups[position]
    # where the schedule stands is kept: the restored rate is the old base rate times the schedule's factor
    group["lr"] = group["lr"] * now / before if before else now
    if "initial_lr" in group:
        group["initial_lr"] = now
    for scheduler in flatten_schedulers(schedulers):
        # ReduceLROnPlateau and the chains keep no base rate
        if scheduler.optimizer is optimizer and hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs[position] = now

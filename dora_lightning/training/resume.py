"""Resume a run: what cannot be gone on with is refused, and settings of now win over those of the checkpoint.

Lightning restores the optimiser's groups and the scheduler's base rates from the checkpoint, so a learning rate that
was changed in the config or on the command line would be dropped without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dora_lightning.training.checkpoint_files import check_training_state
from dora_lightning.training.regroup import flatten_schedulers


def check_resumable(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Refuse to go on from a checkpoint that lacks what training needs, or that is past the end of this run.

    Raises:
        ValueError: the checkpoint holds weights alone, or ``max_steps`` or ``max_epochs`` lie before it.
    """
    name = str(trainer.ckpt_path)
    check_training_state(checkpoint, name)
    step = checkpoint["global_step"]
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
    for option, limit, done in (("max_steps", trainer.max_steps, step), ("max_epochs", trainer.max_epochs, epochs)):
        if limit is None or limit == -1 or done < limit:
            continue
        at = f"{name} is at step {step}, with {epochs} epochs done"
        if done > limit:
            raise ValueError(
                f"{at}, and {option} is {limit}: there is nothing left to train. Raise {option}, or start a new run"
            )
        rank_zero_info(f"{at}, and {option} is {limit}: there is nothing left to train")


def optimizer_classes(optimizers: Iterable[Optimizer]) -> list[str]:
    """Name of each optimiser's class."""
    return [type(optimizer).__name__ for optimizer in optimizers]


def check_optimizer_classes(saved: list[str], optimizers: Iterable[Optimizer], name: str) -> None:
    """Refuse to load the state of one optimiser into another.

    Raises:
        ValueError: their classes differ.
    """
    classes = optimizer_classes(optimizers)
    if saved and saved != classes:
        raise ValueError(
            f"{name} holds the state of the optimizer {', '.join(saved)}, and the config asks for "
            f"{', '.join(classes)}, which cannot go on from it; set the optimizer back, or start a new run"
        )


def trainer_settings(trainer: Trainer) -> dict[str, Any]:
    """Settings of the Trainer that decide what a step computes."""
    names = ("accumulate_grad_batches", "precision", "gradient_clip_val")
    return {name: getattr(trainer, name) for name in names}


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


def config_changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """One line for each value that differs, by its dotted name.

    >>> list(config_changes({"data": {"seed": 1, "size": 2}}, {"data": {"seed": 3, "size": 2}}))
    ['data.seed: 3 (checkpoint: 1)']
    """
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            dotted = f"{name}.{key}" if name else str(key)
            yield from config_changes(before.get(key, "not there"), now.get(key, "not there"), dotted)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for place, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from config_changes(old, new, f"{name}[{place}]")
    elif before != now:
        yield f"{name}: {now} (checkpoint: {before})"


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

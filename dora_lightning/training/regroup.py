"""Split an optimiser's parameter groups after it was built, its schedulers following.

A group's options (learning rate, momentum, what a scheduler keeps in it) are copied to the parts, then changed.
Schedulers keep one entry per group in lists; these are split alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

# options of a group, and lists of a scheduler, that are learning rates and scale with them
_RATE_OPTIONS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_RATE_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")


@dataclass
class Part:
    """A part of a group.

    Attributes:
        name: what LearningRateMonitor shows.
        params: its parameters.
        factor: what the group's learning rates are multiplied by.
        options: options that replace the group's (``weight_decay``).
    """

    name: str
    params: list[Any]
    factor: float
    options: dict[str, Any]


def split_groups(optimizer: Optimizer, schedulers: Iterable[Any], parts: list[list[Part]]) -> None:
    """Put the parts of each group in its place, in the optimiser and in the schedulers that drive it.

    Args:
        optimizer: not stepped yet.
        schedulers: those that drive ``optimizer``.
        parts: for each of its groups.

    Raises:
        ValueError: the optimiser has stepped or knows one group only, or a scheduler keeps its rates in a way that is
            not known, or one floor for all groups while rates are to differ.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS has one group for all parameters; it cannot be split")
    if optimizer.state:
        raise ValueError("the optimiser has taken steps already; its groups can be split only before")
    schedulers = list(flatten_schedulers(schedulers))
    before = len(optimizer.param_groups)
    for scheduler in schedulers:
        _check_known(scheduler, before)
        _check_floor(scheduler, parts)
    groups = []
    for group, split in zip(optimizer.param_groups, parts, strict=True):
        for part in split:
            options = {k: v for k, v in group.items() if k != "params"}
            scaled = {k: options[k] * part.factor for k in _RATE_OPTIONS if k in options}
            if "param_names" in group:  # of an optimiser that was made from named parameters
                known = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
                options["param_names"] = [known[id(parameter)] for parameter in part.params]
            groups.append({"params": part.params, **options, **scaled, **part.options, "name": part.name})
    optimizer.param_groups[:] = groups
    for scheduler in schedulers:
        for name in (*_RATE_LISTS, *_OTHER_LISTS):
            values = getattr(scheduler, name, None)
            if isinstance(values, (list, tuple)) and len(values) == before:
                split_values = [
                    value * part.factor if name in _RATE_LISTS else value
                    for value, split in zip(values, parts, strict=True)
                    for part in split
                ]
                setattr(scheduler, name, split_values)


def flatten_schedulers(schedulers: Iterable[Any]) -> Iterable[Any]:
    """Schedulers, and those inside of chains."""
    for scheduler in schedulers:
        yield scheduler
        yield from flatten_schedulers(getattr(scheduler, "_schedulers", ()))


def _check_known(scheduler: Any, groups: int) -> None:
    """A scheduler of somebody else's may keep a list per group under a name of its own."""
    kind = type(scheduler)
    if not isinstance(scheduler, (LRScheduler, ReduceLROnPlateau)):
        raise ValueError(f"{kind.__name__} is no torch scheduler; its groups cannot be split")
    if kind.__module__.startswith(("torch.", "dora_lightning.")):
        return
    known = {*_RATE_LISTS, *_OTHER_LISTS, "_schedulers", "_milestones"}
    strange = [
        name
        for name, value in vars(scheduler).items()
        if isinstance(value, (list, tuple)) and len(value) == groups and name not in known
    ]
    if strange:
        raise ValueError(f"{kind.__name__} keeps {', '.join(strange)} per group; such a scheduler cannot be split")


def _check_floor(scheduler: Any, parts: list[list[Part]]) -> None:
    """``CosineAnnealingLR`` and its kin anneal every group to one rate, which cannot follow a factor."""
    floor = getattr(scheduler, "eta_min", 0)
    scaled = [part for split in parts for part in split if part.factor != 1]
    if floor and scaled:
        raise ValueError(
            f"{type(scheduler).__name__} has one eta_min={floor} for all groups, which cannot follow "
            f"{scaled[0].name}'s factor {scaled[0].factor:g}; use eta_min=0"
        )

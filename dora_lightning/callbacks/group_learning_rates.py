"""A learning rate and weight decay per parameter group and module, whatever optimiser a module builds."""

from __future__ import annotations

import math
import re
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from dora_lightning.adapters.summary import parameter_group
from dora_lightning.training.method_hooks import after_method
from dora_lightning.training.regroup import Part, split_groups

Rate = float | dict[str, float]
_KEYS = ("factor", "lr", "weight_decay")


class GroupLearningRates(Callback):
    """Splits the groups of the optimisers that ``configure_optimizers`` returns; schedulers follow their group.

    A rate is a factor on what the module's own optimiser says (``lora_B: 16`` is LoRA+), or a dict with ``factor`` or
    an absolute ``lr``, and ``weight_decay``. Magnitudes get no weight decay unless a dict says otherwise.

    Args:
        magnitude: rate of magnitudes.
        lora_A: rate of down-projections.
        lora_B: rate of up-projections.
        other: rate of whatever else trains.
        modules: regular expression found in a parameter's dotted name -> rate; the first that is found wins, over
            the rates by group.

    Raises:
        ValueError: a rate is not a number of at least 0 or has an unknown key. At the start of a fit: a rate or pattern
            applies to nothing that trains, or an optimiser or scheduler cannot be regrouped.
    """

    def __init__(
        self,
        magnitude: float | dict[str, float] = 1.0,
        lora_A: float | dict[str, float] = 1.0,
        lora_B: float | dict[str, float] = 1.0,
        other: float | dict[str, float] = 1.0,
        modules: dict[str, float | dict[str, float]] | None = None,
    ) -> None:
        self.groups = {
            "magnitude": {"weight_decay": 0.0} | _options("magnitude", magnitude),
            "lora_A": _options("lora_A", lora_A),
            "lora_B": _options("lora_B", lora_B),
            "other": _options("other", other),
        }
        self.modules = {pattern: _options(pattern, rate) for pattern, rate in (modules or {}).items()}
        for pattern in self.modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"modules: {pattern!r} is no regular expression: {error}") from error
        given = {"magnitude": magnitude, "lora_A": lora_A, "lora_B": lora_B, "other": other}
        self._asked_for = [name for name, rate in given.items() if rate != 1.0]

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the module's optimisers regrouped as soon as they are made."""
        after_method(pl_module, "configure_optimizers", trainer, self, lambda made: self._regroup(pl_module, made))

    def _regroup(self, pl_module: LightningModule, made: Any) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        optimizers, schedulers = _parts_of(made)
        trains = {parameter_group(name) for name, p in pl_module.named_parameters() if p.requires_grad}
        if unused := [name for name in self._asked_for if name not in trains]:
            present = ", ".join(sorted(trains))
            raise ValueError(f"GroupLearningRates: nothing that trains is in {', '.join(unused)}; there is: {present}")
        unmatched = set(self.modules)
        for optimizer in optimizers:
            parts = []
            for index, group in enumerate(optimizer.param_groups):
                several = len(optimizer.param_groups) > 1
                own = group.get("name") or (str(index) if several else "")
                parts.append(self._split(group, names, unmatched, own))
            _name_apart(parts)
            split_groups(optimizer, [s for s in schedulers if _drives(s, optimizer)], parts)
        if unmatched:
            trained = [name for name, p in pl_module.named_parameters() if p.requires_grad]
            present = ", ".join(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", name) for name in trained))
            raise ValueError(
                f"GroupLearningRates: {sorted(unmatched)} match no parameter that trains; there are: {present}"
            )

    def _split(self, group: dict[str, Any], names: dict[int, str], unmatched: set[str], own: str) -> list[Part]:
        members: dict[str, tuple[dict[str, float], list[Any]]] = {}
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            pattern = next((pattern for pattern in self.modules if re.search(pattern, name)), None)
            kind = parameter_group(name)
            if pattern is not None:
                if parameter.requires_grad:
                    unmatched.discard(pattern)
                # a magnitude inside a named module still gets no decay
                label, options = f"{pattern}/{kind}", self.modules[pattern]
                if kind == "magnitude":
                    options = {"weight_decay": 0.0} | options
            else:
                label, options = kind, self.groups[kind]
            members.setdefault(label, (options, []))[1].append(parameter)
        return [_part(label, options, params, group, own) for label, (options, params) in members.items()]


def _part(label: str, options: dict[str, float], params: list[Any], group: dict[str, Any], own: str) -> Part:
    # the rate the schedule starts from, or climbs to (OneCycleLR): what the optimiser shows now may be a warm-up's
    base = float(group.get("max_lr", group.get("initial_lr", group["lr"])))
    if "lr" in options:
        if base == 0:
            raise ValueError(f"GroupLearningRates: an absolute lr for {label} needs a group whose own lr is not 0")
        factor = options["lr"] / base
    else:
        factor = options.get("factor", 1.0)
    replaced = {"weight_decay": options["weight_decay"]} if {"weight_decay"} <= options.keys() & group.keys() else {}
    name = label if own in ("", label) else f"{own}/{label}"
    return Part(name, params, factor, replaced)


def _options(name: str, rate: Rate) -> dict[str, float]:
    options = dict(rate) if isinstance(rate, dict) else {"factor": rate}
    unknown = options.keys() - set(_KEYS)
    if unknown or {"factor", "lr"} <= options.keys():
        raise ValueError(f"{name}: expected a factor, or a dict of factor or lr, and weight_decay; got {rate!r}")
    if not all(_is_number(value) and math.isfinite(value) and value >= 0 for value in options.values()):
        raise ValueError(f"{name}: expected numbers of at least 0, got {rate!r}")
    return options


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parts_of(made: Any) -> tuple[list[Optimizer], list[Any]]:
    """Optimisers and schedulers in whatever ``configure_optimizers`` may return."""
    optimizers: list[Optimizer] = []
    schedulers: list[Any] = []
    if isinstance(made, Optimizer):
        optimizers.append(made)
    elif isinstance(made, dict):
        optimizers.append(made["optimizer"])
        if "lr_scheduler" in made:
            schedulers.append(_scheduler(made["lr_scheduler"]))
    elif isinstance(made, (list, tuple)) and len(made) == 2 and isinstance(made[0], (list, tuple)):
        optimizers += made[0]
        several = made[1] if isinstance(made[1], (list, tuple)) else [made[1]]
        schedulers += [_scheduler(entry) for entry in several]
    elif isinstance(made, (list, tuple)):
        for entry in made:
            more_optimizers, more_schedulers = _parts_of(entry)
            optimizers += more_optimizers
            schedulers += more_schedulers
    else:
        raise ValueError(
            f"GroupLearningRates: cannot regroup what configure_optimizers returned: {type(made).__name__}"
        )
    return optimizers, schedulers


def _scheduler(entry: Any) -> Any:
    return entry["scheduler"] if isinstance(entry, dict) else entry


def _drives(scheduler: Any, optimizer: Optimizer) -> bool:
    return getattr(scheduler, "optimizer", optimizer) is optimizer


def _name_apart(parts: list[list[Part]]) -> None:
    """LearningRateMonitor refuses two groups of one name."""
    seen: dict[str, int] = {}
    for part in (part for split in parts for part in split):
        count = seen[part.name] = seen.get(part.name, 0) + 1
        if count > 1:
            part.name = f"{part.name}_{count}"

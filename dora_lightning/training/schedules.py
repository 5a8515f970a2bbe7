"""Learning rate schedules that need to know how long the run is."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dora_lightning.messages import check_real, check_whole

DECAYS = ("linear", "cosine", "constant")


class WarmupDecay(LRScheduler):
    """Linear warm-up from 0, then decay to 0 at the last step of the run.

    A backbone sets :attr:`total_steps` from its Trainer, so a config need not repeat it.

    Args:
        optimizer: its groups keep their ratios.
        warmup: steps of warm-up if a whole number of 1 or more, else a share of all steps in [0, 1).
        decay: ``linear``, ``cosine`` or ``constant``.
        total_steps: optimiser steps of the whole run.
        last_epoch: as in torch.

    Raises:
        ValueError: a value is out of range, or the schedule is used before the number of steps is known.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> schedule = WarmupDecay(optimizer, warmup=2, total_steps=6)
    >>> [round(schedule.factor(step), 2) for step in range(7)]
    [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0,
        decay: str = "linear",
        total_steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        check_real(0, warmup=warmup)
        check_whole(1, none="that of the run", total_steps=total_steps)
        if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
            raise ValueError(f"warmup must be a share in [0, 1) or a whole number of steps, got {warmup!r}")
        if decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
        self.warmup = warmup
        self.decay = decay
        self.total_steps = total_steps
        super().__init__(optimizer, last_epoch)

    def set_total_steps(self, steps: int) -> None:
        """Say how long the run is; the rates of the present step follow."""
        self.total_steps = steps
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def factor(self, step: int) -> float:
        """What the base learning rates are multiplied by at ``step``."""
        if self.total_steps is None:
            raise ValueError("WarmupDecay needs total_steps: a backbone sets it; elsewhere pass it yourself")
        warmup_steps = math.ceil(self.warmup * self.total_steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup_steps:
            return step / warmup_steps
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1, self.total_steps - warmup_steps))
        return 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def get_lr(self) -> list[float | Tensor]:
        """Rate of each group at the present step."""
        if self.total_steps is None and self.last_epoch == 0:
            return [0.0 for _ in self.base_lrs]
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore where the schedule was; the length and shape stay those of the present run's config."""
        kept = ("total_steps", "warmup", "decay")
        super().load_state_dict({k: v for k, v in state_dict.items() if k not in kept})

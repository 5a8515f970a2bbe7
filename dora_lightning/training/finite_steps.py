"""Stop a training at the first loss or gradient that is not finite, before the optimizer makes weights of it.

The losses of all micro-batches of an optimizer step are looked at together with its gradients, right before the step:
one pass over the gradients, one number that all processes add up, and one wait for the device per step, none per
micro-batch. Every process stops at the same step.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from dora_lightning.adapters.finite import NonFiniteError, local_part, nonfinite_names
from dora_lightning.gathering import gather

ON_NONFINITE = ("raise", "skip", "ignore")
_MOST_IN_A_ROW = 20
_LOSSES_KEPT = 256  # for the message; a step of more micro-batches is looked at all the same
_WAY_OUT = (
    "try a lower learning rate or a longer warmup, trainer.gradient_clip_val, or precision bf16-mixed in place of "
    "16-mixed, or look at that data; on_nonfinite: skip leaves such steps out"
)


class FiniteSteps:
    """Looks at each optimizer step's losses and gradients; to be called from the hooks of the same names.

    Under a gradient scaler (``precision: 16-mixed``) gradients overflow now and then, and the scaler leaves those steps
    out itself: there the losses alone are looked at.

    Args:
        on_nonfinite: ``raise`` stops the run, ``skip`` leaves the step out and warns (it stops after 20 steps in a row,
            and where weights are not finite), ``ignore`` does not look.

    Attributes:
        skipped: steps that were left out.

    Raises:
        ValueError: unknown ``on_nonfinite``.
    """

    def __init__(self, on_nonfinite: str = "raise") -> None:
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {on_nonfinite!r}")
        self.on_nonfinite = on_nonfinite
        self.skipped = 0
        self._in_a_row = 0
        self._batch = ""
        self._total: Tensor | None = None
        self._losses: deque[tuple[str, Tensor]] = deque(maxlen=_LOSSES_KEPT)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note which batch the losses are of."""
        self._batch = described_batch(batch, batch_idx)

    def on_before_backward(self, loss: Tensor) -> None:
        """Note a loss, where it is."""
        if self.on_nonfinite != "ignore":
            value = loss.detach().float().sum()
            self._total = value if self._total is None else self._total + value.to(self._total.device)
            self._losses.append((self._batch, value))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the losses since the last step and at the gradients; to be called on every process.

        Raises:
            NonFiniteError: one is not finite, and such steps are not to be left out.
        """
        if self.on_nonfinite == "ignore":
            return
        device = trainer.strategy.root_device
        losses, total = list(self._losses), self._total
        self._losses.clear()
        self._total = None
        gradients = [] if _has_scaler(trainer) else _gradients(optimizer)
        bad = torch.zeros((), device=device)
        for number in (total, _largest(gradients)):
            if number is not None:
                bad = bad + (~number.isfinite()).to(device, torch.float32)
        # a process whose own numbers are finite must not go on alone
        if not float(trainer.strategy.reduce(bad, reduce_op="sum")):
            self._in_a_row = 0
            return
        what = _sentence(trainer, pl_module, optimizer, losses)
        weights = gather(_nonfinite_weights(pl_module))
        if weights:
            raise NonFiniteError(f"{what}; weights are not finite already: {_listing(weights)}; {_WAY_OUT}")
        self._in_a_row += 1
        if self.on_nonfinite == "raise" or self._in_a_row >= _MOST_IN_A_ROW:
            in_a_row = f" ({self._in_a_row} steps in a row)" if self._in_a_row > 1 else ""
            raise NonFiniteError(f"{what}{in_a_row}; the step was not taken; {_WAY_OUT}")
        for parameter in _parameters(optimizer):
            parameter.grad = None  # which optimizers pass over
        self.skipped += 1
        rank_zero_warn(f"{what}; the step is left out (on_nonfinite: skip), {self.skipped} so far")


def described_batch(batch: Any, batch_idx: int) -> str:
    """A batch in words: its number and, where it has a list ``samples``, what they are of."""
    samples = batch.get("samples") if isinstance(batch, Mapping) else None
    if not isinstance(samples, list) or not samples:
        return f"batch {batch_idx}"
    counts = Counter(str(getattr(sample, "source", "")) or "no name" for sample in samples)
    named = ", ".join(f"{count} of {source}" for source, count in counts.items())
    return f"batch {batch_idx} (samples: {named}; the first begins {str(getattr(samples[0], 'prompt', ''))[:60]!r})"


def cause_in_weights(pl_module: LightningModule) -> str:
    """Whether the model's weights are to blame for outputs that are not finite, or else what may be."""
    if names := _nonfinite_weights(pl_module):
        return f"weights are not finite: {_listing(names)}"
    return "all weights are finite: look at that data, or use a precision of wider range, as bf16-mixed or 32-true"


def _sentence(
    trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, losses: list[tuple[str, Tensor]]
) -> str:
    """What is not finite, the same on every process."""
    # a scaler multiplies losses, and accumulation divides them: neither makes a number of NaN
    values = [(name, float(value)) for name, value in losses]
    own = [f"the loss of {name} is {value}" for name, value in values if not math.isfinite(value)]
    if not own:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        gradients = {
            names.get(id(p), "a parameter of the optimizer"): p.grad
            for p in _parameters(optimizer)
            if p.grad is not None
        }
        own = [f"the gradient of {_listing(found)} is not finite"] if (found := nonfinite_names(gradients)) else []
    # where a loss is NaN, so are the gradients, on all processes
    everywhere = gather(own)
    everywhere = [line for line in everywhere if line.startswith("the loss")] or everywhere
    rates = sorted({float(group["lr"]) for group in optimizer.param_groups if "lr" in group})
    at = f", learning rate {' and '.join(f'{rate:g}' for rate in rates)}" if rates else ""
    more = f" (and {len(everywhere) - 1} more)" if len(everywhere) > 1 else ""
    return f"step {trainer.global_step} of epoch {trainer.current_epoch}{at}: {everywhere[0]}{more}"


def _has_scaler(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    """What this process holds of the gradients."""
    return [local_part(parameter.grad) for parameter in _parameters(optimizer) if parameter.grad is not None]


def _largest(tensors: Sequence[Tensor]) -> Tensor | None:
    """The largest absolute number, NaN if there is one; not a sum of squares, which may overflow by itself."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    return torch.nn.utils.get_total_norm(filled, math.inf) if filled else None


def _nonfinite_weights(pl_module: LightningModule) -> list[str]:
    return nonfinite_names(dict(pl_module.named_parameters()))


def _listing(names: list[str]) -> str:
    return names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")

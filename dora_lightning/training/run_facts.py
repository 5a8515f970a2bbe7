"""What a run was, in numbers: measured while it trains, kept in checkpoints, and summed up at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dora_lightning.adapters import AdapterConfig, AdapterSummary

_KEPT = 10


@dataclass
class Losses:
    """The first and the last training losses of a run, one per batch, or per optimizer step where a module says it.

    They stay where they are until they are asked for: reading a number of a GPU waits for all that it has to do.
    """

    first: list[Any] = field(default_factory=list)
    last: list[Any] = field(default_factory=list)
    count: int = 0
    unit: str = "batches"

    def add(self, loss: Tensor | float) -> None:
        """Note a batch's or step's loss."""
        self.count += 1
        if len(self.first) < _KEPT:
            self.first.append(loss)
        self.last = [*self.last[1 - _KEPT :], loss]

    def ends(self) -> tuple[float, float] | None:
        """Means over the first and the last :attr:`window` losses; ``None`` if none was noted."""
        if not self.count:
            return None
        return _mean(self.first[: self.window]), _mean(self.last[-self.window :])

    @property
    def window(self) -> int:
        """Losses that are averaged at each end: up to 10, at most a quarter of all."""
        return max(1, min(_KEPT, self.count // 4))


@dataclass
class Progress:
    """What a run has done so far, over all of its parts; goes into checkpoints.

    Attributes:
        since_step: optimiser step at which it was first watched; above 0 only if an earlier part was not.
        parts: how often training was started.
        seconds: training, without validation.
        validating: seconds of validation in between.
        samples: by all processes; ``None`` if batches do not tell.
        peak_memory: bytes, the most that any part took of a device or process.
        losses: of this process.
        best: score of validation -> its best value and the step of it.
    """

    since_step: int = 0
    parts: int = 0
    seconds: float = 0.0
    validating: float = 0.0
    samples: int | None = 0
    peak_memory: int = 0
    losses: Losses = field(default_factory=Losses)
    best: dict[str, tuple[float, int]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Plain containers and numbers."""
        state = asdict(self)
        state["losses"] |= {end: [float(loss) for loss in state["losses"][end]] for end in ("first", "last")}
        return state | {"best": {name: list(found) for name, found in self.best.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What :meth:`state` was made of."""
        best = {name: (value, step) for name, (value, step) in state["best"].items()}
        return cls(**{**state, "losses": Losses(**state["losses"]), "best": best})


@dataclass
class RunFacts:
    """A finished fit.

    Attributes:
        module: class of the LightningModule.
        base: what the pretrained model was loaded from, where that is known.
        adapters: adapted modules and parameters.
        config: of the adapters; ``None`` without any.
        steps: optimiser steps, those of earlier parts included.
        epochs: passes over the training data, where its length is known.
        progress: what was measured.
        losses: mean training loss at the start and at the end, over all processes.
        memory: where -> peak bytes in this part, one entry per process.
        on_gpu: whether that is memory of a GPU, allocated by torch, or else what a process took of main memory.
        folder: the run's folder; ``None`` if nothing is written.
    """

    module: str
    base: str | None
    adapters: AdapterSummary
    config: AdapterConfig | None
    steps: int
    epochs: float | None
    progress: Progress
    losses: tuple[float, float] | None
    memory: dict[str, int]
    on_gpu: bool
    folder: Path | None

    def measured(self) -> dict[str, Any]:
        """What ``result.json`` says of it."""
        return {
            "parameters": {"trainable": self.adapters.trainable, "total": self.adapters.total},
            "seconds": self.progress.seconds,
            "peak_memory_bytes": self.progress.peak_memory,
        }


def samples_in(batch: Any) -> int | None:
    """Samples of a batch: the length of its list ``samples``, or else the first dimension that all tensors share.

    >>> samples_in([torch.zeros(4, 2), torch.zeros(4)])
    4
    >>> samples_in({"samples": ["a", "b", "c"], "input_ids": torch.zeros(1, 9)})
    3
    >>> samples_in([torch.zeros(4, 2), torch.zeros(2)]) is None
    True
    """
    if isinstance(batch, Mapping) and isinstance(batch.get("samples"), list):
        return len(batch["samples"])
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch has allocated on a GPU, or that this process has taken of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # of this process alone; getrusage begins with what the process that started it had
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError):
        return _resident_peak()


def _resident_peak() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _mean(losses: list[Any]) -> float:
    """Of those that are finite: a step whose loss is not may have been left out."""
    values = [value for loss in losses if math.isfinite(value := float(loss))]
    return sum(values) / len(values) if values else math.nan

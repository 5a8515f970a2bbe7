"""From a config to what fits, how fast, and on how many devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dora_lightning.planning.activations import Step
from dora_lightning.planning.blocks import Sizes, read_sizes
from dora_lightning.planning.devices import GIB, Device, device_named
from dora_lightning.planning.memory import DDP, FSDP2, ONE_DEVICE, Memory, Variant, device_memory
from dora_lightning.planning.models import PlannedModel, planned_model
from dora_lightning.planning.operations import forward_operations, norm_operations, step_operations
from dora_lightning.planning.options import PlanOptions
from dora_lightning.planning.settings import RunSettings
from dora_lightning.planning.weights import Weights, count_weights

MOST_DEVICES = 1024
_MOST_ROWS = 2**16


@dataclass(frozen=True)
class Outcome:
    """One way to run.

    Attributes:
        variant: strategy, devices, checkpointing.
        memory: of one device, with the batch size that was asked for.
        fits: whether that is there.
        largest_batch: the largest batch size of a device that fits; 0 if none does.
        tokens_per_second: of all devices together, at the batch size that was asked for.
        communication: share of a step that weights are waited for, if they come while products are computed.
        hours: of the whole run, or None.
    """

    variant: Variant
    memory: Memory
    fits: bool
    largest_batch: int
    tokens_per_second: float
    communication: float
    hours: float | None


@dataclass(frozen=True)
class Plan:
    """A plan.

    Attributes:
        model: what was planned.
        settings: of the config.
        options: of the command.
        device: its figures.
        memory: bytes of a device.
        devices: how many.
        weights: all parameters.
        step: a device's micro-batch.
        operations: of a token in the forward and backward pass, without and with checkpointing.
        outcomes: the ways to run.
        chosen: the config's own, as far as it is among them.
        fewest: variant -> the fewest devices that do, or None.
    """

    model: PlannedModel
    settings: RunSettings
    options: PlanOptions
    device: Device
    memory: float
    devices: int
    weights: Weights
    step: Step
    operations: tuple[float, float]
    outcomes: tuple[Outcome, ...]
    chosen: Outcome | None
    fewest: dict[str, int | None]

    @property
    def best(self) -> Outcome | None:
        """What to use: the simplest of what fits and is about as fast as the fastest."""
        fitting = [outcome for outcome in self.outcomes if outcome.fits]
        fastest = max((outcome.tokens_per_second for outcome in fitting), default=0.0)
        return next((outcome for outcome in fitting if outcome.tokens_per_second >= 0.98 * fastest), None)


def make_plan(settings: RunSettings, options: PlanOptions) -> Plan:
    """Plan a run.

    Args:
        settings: of the config.
        options: of the command.

    Raises:
        ValueError: the model, the adapter or an option cannot be planned.
        OSError: the model's config could not be loaded.
    """
    device = device_named(options.device)
    model = planned_model(settings.model, settings.adapter, settings.dtype, options.shape)
    sizes, weights = read_sizes(model), count_weights(model, settings.quantization)
    step = _step(settings, options, model)
    devices = options.gpus or settings.devices or 1
    memory = GIB * (options.memory or device.memory)
    planner = _Planner(settings, options, device, sizes, weights, step, memory)
    variants = [
        Variant(strategy, devices, checkpointing)
        for strategy in ([ONE_DEVICE] if devices == 1 else [DDP] + [FSDP2] * (settings.quantization is None))
        for checkpointing in (False, True)
    ]
    outcomes = tuple(planner.outcome(variant) for variant in variants)
    own = ONE_DEVICE if devices == 1 else FSDP2 if settings.strategy == "ModelParallelStrategy" else DDP
    plain, recomputed = (planner.operations(checkpointing) / step.tokens for checkpointing in (False, True))
    return Plan(
        model=model,
        settings=settings,
        options=options,
        device=device,
        memory=memory,
        devices=devices,
        weights=weights,
        step=step,
        operations=(plain, recomputed),
        outcomes=outcomes,
        chosen=next((o for o in outcomes if o.variant == Variant(own, devices, settings.checkpointing)), None),
        fewest=planner.fewest(),
    )


def _step(settings: RunSettings, options: PlanOptions, model: PlannedModel) -> Step:
    stream = model.model.dtype.itemsize
    rows = settings.batch_size * settings.sequences
    return Step(
        rows=rows,
        length=settings.tokens,
        supervised=options.supervised,
        compute_bytes=settings.compute_bytes or stream,
        stream_bytes=stream,
        attention=settings.attention,
        masked=settings.packed or rows > 1,  # rows of several lengths are padded
        quantized=settings.quantization is not None,
    )


@dataclass(frozen=True)
class _Planner:
    settings: RunSettings
    options: PlanOptions
    device: Device
    sizes: Sizes
    weights: Weights
    step: Step
    limit: float

    def outcome(self, variant: Variant) -> Outcome:
        memory = self.memory(variant, self.settings.batch_size)
        seconds, waiting = self.seconds_per_step(variant)
        tokens = self.step.tokens * self.settings.accumulate * variant.devices
        return Outcome(
            variant=variant,
            memory=memory,
            fits=memory.total <= self.limit,
            largest_batch=self.largest_batch(variant),
            tokens_per_second=tokens / seconds,
            communication=waiting / seconds,
            hours=self.hours(tokens / seconds, seconds),
        )

    def memory(self, variant: Variant, batch_size: int) -> Memory:
        rows = batch_size * self.settings.sequences
        step = replace(self.step, rows=rows, masked=self.settings.packed or rows > 1)
        reserve = GIB * self.options.reserve
        return device_memory(self.weights, self.sizes, step, variant, self.settings.moments, reserve)

    def largest_batch(self, variant: Variant) -> int:
        return largest(lambda size: self.memory(variant, size).total <= self.limit, _MOST_ROWS)

    def operations(self, checkpointing: bool) -> int:
        """Operations of a micro-batch; preference tuning's reference is another forward pass."""
        operations = step_operations(self.sizes, replace(self.step, checkpointing=checkpointing))
        return operations + (forward_operations(self.sizes, self.step) if self.settings.sequences > 1 else 0)

    def seconds_per_step(self, variant: Variant) -> tuple[float, float]:
        """Seconds of an optimiser step, and how many of them weights or gradients are waited for."""
        peak = self.options.peak or self.device.tflops
        rate = 1e12 * peak * self.options.utilization
        norms = norm_operations(self.sizes) / (rate * self.device.fp32_tflops / self.device.tflops)
        computing = self.operations(variant.checkpointing) / rate
        bandwidth = 1e9 * self.options.bandwidth if self.options.bandwidth else self.device.bandwidth(variant.devices)
        others = (variant.devices - 1) / variant.devices
        accumulate = self.settings.accumulate
        if variant.strategy == FSDP2:
            # each block is gathered for the forward pass and again for the backward pass; gradients are the adapters'
            blocks = self.weights.bytes_of(trains=False) + self.weights.bytes_of(trains=True) - self.weights.root
            gathering = others * (2 * blocks + self.weights.root) / bandwidth
            micro = max(computing, gathering)
            return accumulate * micro + norms, accumulate * (micro - computing)
        reducing = 2 * others * self.weights.bytes_of(trains=True) / bandwidth if variant.strategy == DDP else 0.0
        return accumulate * computing + norms + reducing, reducing

    def hours(self, tokens_per_second: float, seconds: float) -> float | None:
        spans = []
        if self.settings.max_steps > 0:
            spans.append(self.settings.max_steps * seconds / 3600)
        # how many samples share a packed row is not known
        length = self.options.mean_tokens or (None if self.settings.packed else self.step.length)
        if self.settings.samples is not None and self.settings.epochs > 0 and length is not None:
            tokens = self.settings.samples * self.settings.epochs * self.settings.sequences * length
            spans.append(tokens / tokens_per_second / 3600)
        return min(spans, default=None)

    def fewest(self) -> dict[str, int | None]:
        """The fewest devices that hold the config's batch: whole, and sharded."""
        found: dict[str, int | None] = {}
        for checkpointing in (False, True):
            variant = Variant(ONE_DEVICE, 1, checkpointing)
            fits = self.memory(variant, self.settings.batch_size).total <= self.limit
            found[str(variant)] = 1 if fits else None
            if self.settings.quantization is not None:
                continue
            found[str(Variant(FSDP2, 1, checkpointing))] = self._fewest_shards(checkpointing)
        return found

    def _fewest_shards(self, checkpointing: bool) -> int | None:
        for devices in range(2, MOST_DEVICES + 1):
            if self.memory(Variant(FSDP2, devices, checkpointing), self.settings.batch_size).total <= self.limit:
                return devices
        return None


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest whole number from 1 to ``most`` that fits, if every smaller one does too; 0 if none fits.

    >>> largest(lambda number: number <= 5, 100)
    5
    """
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

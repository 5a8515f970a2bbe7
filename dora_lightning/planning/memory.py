"""Memory of one device by part, under each strategy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dora_lightning.planning.activations import Step, activations
from dora_lightning.planning.blocks import Sizes
from dora_lightning.planning.weights import Weights

ONE_DEVICE, DDP, FSDP2 = "one device", "DDP", "FSDP2"


@dataclass(frozen=True)
class Variant:
    """A way to run: a strategy on so many devices, with or without checkpointing of activations."""

    strategy: str
    devices: int
    checkpointing: bool

    def __str__(self) -> str:
        """As a column is headed."""
        return self.strategy + (", checkpointing" if self.checkpointing else "")


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most, by part.

    Attributes:
        base: frozen weights, buffers, and VeRA's random pair.
        adapters: parameters that train.
        gradients: theirs, and under DDP the buckets they are reduced in.
        optimizer: its states.
        gathered: FSDP2's whole weights: a block, the next one, and what is outside of blocks.
        norms: what magnitudes keep of the base, fp32 vectors.
        activations: kept from the forward to the backward pass; with checkpointing the inputs of blocks.
        logits: logits and their gradients at supervised positions, at their most.
        block: temporaries of a block's backward pass; with checkpointing, what is computed again.
        reserve: left for the device's own context, communication and fragmentation.
    """

    base: float
    adapters: float
    gradients: float
    optimizer: float
    gathered: float
    norms: float
    activations: float
    logits: float
    block: float
    reserve: float

    @property
    def total(self) -> float:
        """The most there is at once: logits are gone before the first block's backward pass."""
        fixed = self.base + self.adapters + self.gradients + self.optimizer + self.gathered + self.norms
        return fixed + self.activations + max(self.logits, self.block) + self.reserve


def device_memory(
    weights: Weights, sizes: Sizes, step: Step, variant: Variant, moments: int = 2, reserve: float = 0.0
) -> Memory:
    """Memory of one device.

    Args:
        weights: all parameters.
        sizes: of the model.
        step: a micro-batch; its ``checkpointing`` is that of ``variant``.
        variant: strategy, devices, checkpointing.
        moments: numbers in fp32 that the optimiser keeps per parameter; Adam's 2, and a count of steps per tensor.
        reserve: bytes.
    """
    kept = activations(sizes, replace(step, checkpointing=variant.checkpointing))
    shards = variant.devices if variant.strategy == FSDP2 else 1
    adapters = weights.bytes_of(trains=True, shards=shards)
    return Memory(
        base=weights.bytes_of(trains=False, shards=shards) + weights.buffers,
        adapters=adapters,
        gradients=adapters * (2 if variant.strategy == DDP else 1),
        optimizer=moments * adapters + (4 * weights.tensors if moments else 0),
        gathered=2 * weights.block + weights.root if variant.strategy == FSDP2 else 0,
        norms=weights.vectors,
        activations=kept.saved,
        logits=kept.logits_peak,
        block=kept.backward + (kept.block if variant.checkpointing else 0),
        reserve=reserve,
    )

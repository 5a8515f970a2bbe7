"""Bytes of weights, gradients and optimiser states on one device, whole or sharded."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import cast

from torch import nn

from dora_lightning.adapters import AdapterConfig
from dora_lightning.adapters.layers import DoRALinear, MagnitudeLinear
from dora_lightning.adapters.summary import GROUPS, parameter_group
from dora_lightning.planning.models import PlannedModel, is_packed

_BLOCK_4BIT, _BLOCK_NESTED, _GROUP_INT4 = 64, 256, 128


@dataclass(frozen=True)
class Weight:
    """Parameters of one shape.

    Attributes:
        rows: size of the first dimension, which FSDP2 cuts.
        row_bytes: bytes of one row.
        numbers: how many numbers it has.
        trains: whether it has a gradient.
        in_block: whether it is in a transformer block; the others are in FSDP2's root unit.
    """

    rows: int
    row_bytes: float
    numbers: int
    trains: bool
    in_block: bool

    def bytes_of(self, shards: int = 1) -> float:
        """Bytes on the device that holds most: FSDP2 gives the first ones ``ceil(rows / shards)`` rows."""
        return -(-self.rows // shards) * self.row_bytes


@dataclass(frozen=True)
class Weights:
    """All parameters of an adapted model.

    Attributes:
        counts: each kind of parameter, and how many there are.
        groups: optimiser group -> trainable parameters.
        base: parameters of the base, frozen or not, as they are before they are packed.
        tensors: how many parameters train.
        buffers: bytes of buffers and of VeRA's pair, which are never sharded.
        vectors: bytes of the norms that magnitudes keep, ``|W|^2`` and ``|W + s B A|`` in fp32.
        block: bytes of the largest block.
        root: bytes of what is outside of blocks.
    """

    counts: dict[Weight, int]
    groups: dict[str, int]
    base: int
    tensors: int
    buffers: int
    vectors: int
    block: float
    root: float

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        return sum(self.groups.values())

    def bytes_of(self, trains: bool, shards: int = 1) -> float:
        """Bytes on one device of what trains, or of what is frozen."""
        return sum(count * weight.bytes_of(shards) for weight, count in self.counts.items() if weight.trains == trains)


def count_weights(planned: PlannedModel, quantization: str | None = None) -> Weights:
    """Count the parameters of a model on the meta device, as :mod:`torch` and the quantising library would store them.

    Args:
        planned: the adapted model.
        quantization: as in :class:`~dora_lightning.backbones.DoRALlama`.
    """
    model = planned.model
    listed = _children(model)
    blocks = {f"{name}." for name, child in model.named_modules() if child in listed}
    packed = {
        f"{name}.weight" for name, child in model.named_modules() if quantization and is_packed(model, child)
    }  # an adapted layer's is called base_layer.weight
    counts: Counter[Weight] = Counter()
    groups: Counter[str] = Counter()
    per_block: defaultdict[str, float] = defaultdict(float)
    base = 0
    for name, parameter in model.named_parameters():
        rows = parameter.shape[0] if parameter.ndim else 1
        numbers = parameter.numel()
        size = float(numbers * parameter.element_size())
        if name in packed:
            size = packed_bytes(quantization, *parameter.shape)
        block = next((block for block in blocks if name.startswith(block)), "")
        counts[Weight(rows, size / rows, numbers, parameter.requires_grad, bool(block))] += 1
        per_block[block] += size
        if parameter.requires_grad:
            groups[parameter_group(name)] += numbers
        if name.rpartition(".")[2] not in _ADAPTER_PARAMETERS:
            base += numbers
    return Weights(
        counts=dict(counts),
        groups={group: groups[group] for group in GROUPS if groups[group]},
        base=base,
        tensors=sum(count for weight, count in counts.items() if weight.trains),
        buffers=_buffers(planned),
        vectors=_vectors(model),
        block=max((size for block, size in per_block.items() if block), default=0),
        root=per_block[""],
    )


_ADAPTER_PARAMETERS = {"lora_A", "lora_B", "lambda_d", "lambda_b", "magnitude"}


def packed_bytes(quantization: str | None, rows: int, columns: int) -> float:
    """Bytes of a linear layer's weight as the quantising library stores it.

    Four bits of bitsandbytes have a scale in fp32 for 64 numbers; with ``-dq`` the scales have 8 bits, and one in fp32
    for 256 of them (Dettmers et al. 2023, section 3). Eight bits have a scale per row in fp32, torchao's a zero of a
    byte too; its four bits have a scale and a zero in bf16 for 128 numbers.

    >>> packed_bytes("nf4", 64, 64)
    2304.0
    """
    numbers = rows * columns
    scales = numbers / _BLOCK_4BIT
    if quantization in ("nf4", "fp4"):
        return numbers / 2 + 4 * scales
    if quantization in ("nf4-dq", "fp4-dq"):
        return numbers / 2 + scales + 4 * scales / _BLOCK_NESTED
    if quantization == "int8":
        return numbers + 4 * rows
    if quantization == "torchao-int8":
        return numbers + 5 * rows
    if quantization == "torchao-int4":
        return numbers / 2 + 4 * numbers / _GROUP_INT4
    raise ValueError(f"unknown quantization {quantization!r}")


def _children(model: nn.Module) -> set[nn.Module]:
    return {block for child in model.modules() if isinstance(child, nn.ModuleList) for block in child}


def _buffers(planned: PlannedModel) -> int:
    model = planned.model
    total = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    resolved = cast(AdapterConfig, model.adapter_config).resolved
    if planned.adapter.method in ("vera", "dvora"):
        total += 4 * planned.adapter.rank * sum(resolved["projection"])
    if planned.keeps_first_values:
        total += sum(4 * p.numel() for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B")))
    return total


def _vectors(model: nn.Module) -> int:
    total = 0
    for module in model.modules():
        if isinstance(module, DoRALinear):
            total += 8 * module.magnitude.numel()
        elif isinstance(module, MagnitudeLinear):
            total += 4 * module.magnitude.numel()
    return total

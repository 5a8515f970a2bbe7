"""How far magnitudes and directions moved: the learning patterns of the paper (section 3, equations 4 and 5).

For a weight ``W0 [out, in]`` and the tuned ``W'``, with ``m`` the norm of each row (one value per output feature)::

    delta_m = mean_n |m'_n - m0_n|            delta_d = mean_n (1 - cos(W'_n, W0_n))

Both are small differences of large numbers when little was trained: ``1 - cos`` of an update of 1e-4 is 5e-9. They are
computed from three sums per row, in float64: ``a = |w|^2``, ``c = <w, u>``, ``b = |u|^2`` for a row ``w`` and its
update ``u``. Then ``|w + u|^2 = a + 2 c + b``, the norm changes by ``(2 c + b) / (|w + u| + |w|)``, and the part of
``u`` that is orthogonal to ``w`` gives ``sin^2 = (b - c^2 / a) / |w + u|^2`` and ``1 - cos = sin^2 / (1 + cos)``.

The sums go over weights a block of rows at a time; of an adapter they come from ``W A^T`` and ``A A^T``, and neither
``B A`` nor ``W'`` is built. A row of zeros (real models have them) has no direction and is left out of ``delta_d``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dora_lightning.adapters.functional import NORM_EPS
from dora_lightning.adapters.layers import AdapterLayer, LoRALinear
from dora_lightning.adapters.operators import ungrouped
from dora_lightning.adapters.quantized import row_slabs
from dora_lightning.adapters.vera import VeRALinear, scaled_pair

WEIGHT = "base_layer.weight"
"""Name of the base's weight among an adapter layer's tensors."""

# elements that are widened to float64 at a time
_BLOCK = 2**18


class WeightChange(NamedTuple):
    """How far one weight moved.

    Attributes:
        delta_m: mean absolute change of the magnitudes, in the weight's own units.
        delta_d: mean of ``1 - cos`` between new and old rows, 0 to 2.
    """

    delta_m: float
    delta_d: float


class LowRank(NamedTuple):
    """The update ``scaling * B A`` with ``A [rank, in]`` and ``B [out, rank]``."""

    A: Tensor
    B: Tensor
    scaling: float


class Correlation(NamedTuple):
    """Pearson's ``r``, or nan and the reason why there is none."""

    r: float
    reason: str = ""


def weight_change(before: Tensor, after: Tensor, norm_axis: str = "out", transposed: bool = False) -> WeightChange:
    """``delta_m`` and ``delta_d`` of two weights ``[out, in]``, neither of which is widened as a whole.

    Args:
        before: ``W0``; the kernel of a convolution counts as ``[out, in / groups * kernel]``.
        after: ``W'``, of the same shape, in any dtype.
        norm_axis: ``out`` for one magnitude per output feature, ``in`` for one per input feature.
        transposed: whether they are stored ``[in, out]``, as those of ``Conv1D`` and of embeddings.

    Raises:
        ValueError: the shapes differ, or are of no matrix.

    >>> weight_change(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]]))
    WeightChange(delta_m=5.0, delta_d=0.0)
    """
    if before.shape != after.shape or before.ndim < 2:
        raise ValueError(
            f"expected two weights of one shape, with at least two dimensions, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}"
        )
    new = dict(row_blocks(after))
    pairs = ((old, new[start]) for start, old in row_blocks(before))
    return change_of_blocks(pairs, (norm_axis == "out") != transposed)


def row_blocks(stored: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A weight as a matrix, a few rows at a time, each with the number of its first row."""
    matrix = stored.detach().flatten(1)
    height = block_height(matrix.shape[1])
    for start in range(0, len(matrix), height):
        yield start, matrix[start : start + height]


def block_height(columns: int) -> int:
    """How many rows :func:`row_blocks` takes at a time, of a matrix that is that wide."""
    return max(1, _BLOCK // max(1, columns))


def change_of_blocks(blocks: Iterable[tuple[Tensor, Tensor]], by_row: bool) -> WeightChange:
    """As :func:`weight_change`, of blocks of rows ``(old, new)`` as they are stored.

    Args:
        blocks: pairs of equal shape that follow one another.
        by_row: whether a magnitude belongs to a stored row; else to a column.
    """
    sums = _Sums(by_row)
    for before, after in blocks:
        old = _wide(before)
        update = _wide(after) - old
        axis = 1 if by_row else 0
        sums.add(torch.stack([(x * y).sum(axis) for x, y in ((old, old), (old, update), (update, update))], dim=1))
    norm_sq, inner, update_sq = sums.total().T
    return _change(norm_sq, inner, update_sq, None)


def change_of_adapter(
    blocks: Iterable[tuple[int, Tensor]],
    low_rank: LowRank | None,
    magnitude: Tensor | None,
    norm_axis: str = "out",
    transposed: bool = False,
) -> WeightChange:
    """``delta_m`` and ``delta_d`` of ``m (W + s B A) / |W + s B A|``, of which nothing but ``W`` is there.

    Args:
        blocks: of the rows of ``W`` as it is stored, each with the number of its first row.
        low_rank: the update of the direction; none if only the magnitude trains.
        magnitude: ``m'``; none if the norm of ``W + s B A`` is left to itself (LoRA).
        norm_axis: as in :func:`weight_change`.
        transposed: likewise.
    """
    by_row = (norm_axis == "out") != transposed
    A = B = None
    if low_rank is not None:
        A, B = _wide(low_rank.A), low_rank.scaling * _wide(low_rank.B)
        if norm_axis == "in":
            A, B = B.T, A.T
    norms, products = _Sums(by_row), _Sums(by_row)
    for start, block in blocks:
        rows = _wide(block)
        norms.add(rows.square().sum(1 if by_row else 0))
        if A is not None:
            products.add(rows @ A.T if by_row else rows.T @ A[:, start : start + len(rows)].T)
    norm_sq = norms.total()
    inner = update_sq = torch.zeros_like(norm_sq)
    if A is not None and B is not None:
        inner = (B * products.total()).sum(1)
        update_sq = ((B @ (A @ A.T)) * B).sum(1)
    return _change(norm_sq, inner, update_sq, None if magnitude is None else _wide(magnitude))


@torch.no_grad()
def layer_change(layer: AdapterLayer, tensors: Mapping[str, Tensor] | None = None) -> WeightChange:
    """``delta_m`` and ``delta_d`` of an adapter layer of any method, on any base.

    Args:
        layer: its weight is not merged.
        tensors: the layer's own parameters and buffers, and its base's weight as :data:`WEIGHT`, where the layer
            itself holds shards of them.

    Raises:
        ValueError: the adapter is merged at present.
    """
    if layer.merged:
        raise ValueError("the adapter is merged, and the weight it started from is put away; unmerge it first")
    held = tensors if tensors is not None else layer_tensors(layer)
    if layer.quantized:
        blocks: Iterable[tuple[int, Tensor]] = ((rows.start, slab) for rows, slab in row_slabs(layer.base_layer))
    else:
        blocks = row_blocks(held[WEIGHT])
    low_rank = None
    if isinstance(layer, VeRALinear):
        low_rank = LowRank(*scaled_pair(layer.pair, held["lambda_d"], held["lambda_b"], layer.in_features), 1.0)
    elif isinstance(layer, LoRALinear):
        low_rank = low_rank_update(held, layer.scaling)
    axis = getattr(layer, "norm_axis", "out")
    return change_of_adapter(blocks, low_rank, held.get("magnitude"), axis, layer.operator.transposed)


def layer_tensors(layer: AdapterLayer) -> dict[str, Tensor]:
    """What :func:`layer_change` reads of a layer, by name; without the weight of a quantised base, which is packed."""
    own = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return {name: tensor.detach() for name, tensor in own} | ({} if layer.quantized else {WEIGHT: layer.weight})


def low_rank_update(tensors: Mapping[str, Tensor], scaling: float) -> LowRank:
    """The update of ``lora_A`` and ``lora_B``, less that of ``init_A`` and ``init_B`` if training began there.

    Then it is ``(B - B0) A + B0 (A - A0)``, whose terms are small where ``B A - B0 A0`` cancels.
    """
    A, B = tensors["lora_A"], tensors["lora_B"]
    if "init_A" not in tensors:
        return LowRank(A, ungrouped(A, B), scaling)
    A, B, A0, B0 = (_wide(tensor) for tensor in (A, B, tensors["init_A"], tensors["init_B"]))
    return LowRank(torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1), scaling)


def correlation(changes: Sequence[WeightChange]) -> Correlation:
    """Pearson's correlation of ``delta_d`` and ``delta_m`` over layers and checkpoints (paper, section 3.2).

    >>> round(correlation([WeightChange(1.0, 0.1), WeightChange(2.0, 0.2), WeightChange(3.0, 0.3)]).r, 6)
    1.0
    """
    if len(changes) < 3:
        return Correlation(math.nan, f"needs at least 3 points, there are {len(changes)}")
    deviations = []
    for name in ("delta_d", "delta_m"):
        values = [getattr(change, name) for change in changes]
        mean = math.fsum(values) / len(values)
        spread = [value - mean for value in values]
        size = math.sqrt(math.fsum(value * value for value in spread))
        if size <= 1e-12 * max(map(abs, values)):
            return Correlation(math.nan, f"{name} is the same everywhere")
        deviations.append([value / size for value in spread])
    r = math.fsum(x * y for x, y in zip(*deviations, strict=True))
    return Correlation(max(-1.0, min(1.0, r)))


class RunningCorrelation:
    """:func:`correlation` of changes that come one after the other, none of which is kept."""

    def __init__(self) -> None:
        self._count = 0
        self._means = [0.0, 0.0]
        self._squares = [0.0, 0.0]  # of the deviations from the means
        self._product = 0.0
        self._largest = [0.0, 0.0]

    def add(self, change: WeightChange) -> None:
        """Count one more (Welford's update, which does not cancel)."""
        self._count += 1
        values = (change.delta_d, change.delta_m)
        before = [value - mean for value, mean in zip(values, self._means, strict=True)]
        for index, value in enumerate(values):
            self._means[index] += before[index] / self._count
            self._squares[index] += before[index] * (value - self._means[index])
            self._largest[index] = max(self._largest[index], abs(value))
        self._product += before[0] * (values[1] - self._means[1])

    def value(self) -> Correlation:
        """Of all that were added."""
        if self._count < 3:
            return Correlation(math.nan, f"needs at least 3 points, there are {self._count}")
        for name, square, largest in zip(("delta_d", "delta_m"), self._squares, self._largest, strict=True):
            if math.sqrt(square) <= 1e-12 * largest:
                return Correlation(math.nan, f"{name} is the same everywhere")
        r = self._product / math.sqrt(self._squares[0]) / math.sqrt(self._squares[1])
        return Correlation(max(-1.0, min(1.0, r)))


class _Sums:
    """What blocks of rows give for each feature: their rows one after the other, or the sum over all of them."""

    def __init__(self, by_row: bool) -> None:
        self._by_row = by_row
        self._parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        """``part [features, ...]`` of the next block."""
        if self._by_row or not self._parts:
            self._parts.append(part)
        else:
            # in place: what is kept between large blocks that come and go would scatter them over the heap
            self._parts[0] += part

    def total(self) -> Tensor:
        """``[features, ...]`` of all blocks."""
        return torch.cat(self._parts)


def _change(norm_sq: Tensor, inner: Tensor, update_sq: Tensor, magnitude: Tensor | None) -> WeightChange:
    """From the three sums of each feature, all in float64; NaN where a number is not finite."""
    read = [norm_sq, inner, update_sq] + ([] if magnitude is None else [magnitude])
    if not all(bool(values.isfinite().all()) for values in read):
        return WeightChange(math.nan, math.nan)  # below, comparisons would leave such features out
    old = norm_sq.sqrt()
    new_sq = (norm_sq + 2 * inner + update_sq).clamp(min=0)
    new = new_sq.sqrt()
    if magnitude is None:
        delta_m = ((2 * inner + update_sq) / (new + old).clamp(min=NORM_EPS)).abs()
    else:
        delta_m = (magnitude.abs() - old).abs()
    directed = (old > NORM_EPS) & (new > NORM_EPS)
    if magnitude is not None:
        directed &= magnitude != 0
    norm_sq, inner, update_sq, new_sq = (values[directed] for values in (norm_sq, inner, update_sq, new_sq))
    cosine = (norm_sq + inner) / (old * new)[directed]
    sine_sq = (update_sq - inner.square() / norm_sq).clamp(min=0) / new_sq
    away = torch.where(cosine > 0, sine_sq / (1 + cosine.clamp(min=0)), 1 - cosine)
    if magnitude is not None:
        # a negative magnitude turns the row round
        away = torch.where(magnitude[directed] < 0, 2 - away, away)
    return WeightChange(float(delta_m.mean()), float(away.mean()) if len(away) else 0.0)


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    # Apple's GPUs have no float64
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)

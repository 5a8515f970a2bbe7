"""What tells a weight from any other: a digest of its bits, and projections that survive rounding to another dtype.

Both can be made of a weight that is never whole anywhere, since both add up over its rows. The digest is that of dtype,
shape and a sum modulo 2^256: of the SHA-256 of each row's number and bytes. (Rows of a few bytes, those of a vector
above all, are hashed together: processes hand on the bytes.) The projections are ``r_k^T W c_k`` with signs
``r_k [rows]`` and ``c_k [columns]`` that depend on nothing but their places.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_NARROW = 64  # bytes
_SLAB = 2**24  # elements that are brought from a GPU, or to fp32, at a time
PROJECTIONS = 8
PartialDigest = tuple[int, dict[int, bytes]]
"""What the rows of one process add to a digest: a sum, or the bytes of narrow rows by their place."""


def digest_of_rows(piece: Tensor, first: int, columns: int) -> PartialDigest:
    """What whole rows add to a digest.

    Args:
        piece: whole rows, on any device.
        first: place of their first element in the flattened weight.
        columns: elements of a row.
    """
    flat = piece.detach().reshape(-1)
    size = flat.element_size()
    width = columns * size
    if width < _NARROW:
        return 0, {first: _bytes_of(flat).tobytes()} if len(flat) else {}
    total = 0
    step = max(1, _SLAB // columns) * columns
    for slab in flat.split(step):
        content = _bytes_of(slab)
        for number in range(len(slab) // columns):
            row = hashlib.sha256(b"%d:" % (first // columns + number))
            row.update(content[number * width : (number + 1) * width])
            total += int.from_bytes(row.digest(), "little")
        first += len(slab)
    return total % 2**256, {}


def whole_digest(dtype: torch.dtype, shape: Sequence[int], parts: Iterable[PartialDigest]) -> str:
    """The digest of a weight from what all of its rows add to it: SHA-256, in hexadecimal."""
    total = 0
    narrow: dict[int, bytes] = {}
    for some, content in parts:
        total += some
        narrow |= content
    found = hashlib.sha256(f"{dtype} {tuple(shape)} {total % 2**256:x}".encode())
    for first in sorted(narrow):
        found.update(narrow[first])
    return found.hexdigest()


def digest_of(weight: Tensor) -> str:
    """The digest of a whole weight, on any device."""
    return whole_digest(weight.dtype, weight.shape, [digest_of_rows(weight, 0, columns_of(weight.shape))])


def columns_of(shape: Sequence[int]) -> int:
    """Elements of a row of a weight of that shape; a vector's rows are its elements."""
    return max(1, math.prod(shape[1:]))


def digests_of(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each weight, several at a time: hashing leaves Python's lock."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(8, workers)) as threads:
        return dict(zip(weights, threads.map(digest_of, weights.values()), strict=True))


def project(piece: Tensor, first: int, columns: int) -> Tensor:
    """What whole rows of a weight add to its projections, and to its squared norm: ``[PROJECTIONS + 1]``, float64.

    Args:
        piece: whole rows.
        first: place of their first element in the flattened weight.
        columns: elements of a row.
    """
    rows = piece.detach().reshape(-1, columns)
    number = first // columns
    down = _signs(len(rows), 1, number).T.to(rows.device, torch.float32, memory_format=torch.contiguous_format)
    across = _signs(rows.shape[1], 2).to(rows.device, torch.float64)
    found = torch.zeros(PROJECTIONS + 1, dtype=torch.float64, device=rows.device)
    step = max(1, _SLAB // rows.shape[1])
    for begin in range(0, len(rows), step):
        some = rows[begin : begin + step].float()
        found[:-1] += ((down[:, begin : begin + step] @ some).double() * across.T).sum(dim=1)
        found[-1] += torch.linalg.vector_norm(some).double().square()
    return found.cpu()


def same_but_for_rounding(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    """Whether two weights' :func:`project` differ by no more than ``tolerance`` of the weight's norm."""
    ours, theirs = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    # a projection of what differs has the size of what differs, whatever that is
    difference = (ours - theirs)[:-1].square().mean().sqrt()
    return bool(difference <= tolerance * theirs[-1].sqrt() + 1e-12)


def _bytes_of(flat: Tensor) -> memoryview:
    return flat.contiguous().cpu().view(torch.uint8).numpy().data


def _signs(count: int, seed: int, first: int = 0) -> Tensor:
    """``[count, PROJECTIONS]`` of 1 and -1 for the places ``first, first + 1, ...``, the same on every machine."""
    mixed = torch.arange(first, first + count, dtype=torch.int64) * 0x1E3779B97F4A7C15 + seed * 0x3F58476D1CE4E5B9
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 30)) * 0x3F58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
    bits = (mixed[:, None] >> torch.arange(20, 20 + PROJECTIONS)) & 1
    return bits * 2 - 1

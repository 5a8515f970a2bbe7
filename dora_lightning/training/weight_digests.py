"""What tells a weight from any other: a digest of its bits, and projections that survive rounding to another dtype.

Both can be made of a weight that is never whole anywhere. Its bytes are hashed in chunks of a fixed size, counted from
its start, and its digest is that of dtype, shape and all chunks in order. Its projections are ``r_k^T W c_k`` with
signs ``r_k [rows]`` and ``c_k [columns]`` that depend on nothing but their places: sums over the rows, which add up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CHUNK = 2**16  # bytes
_SLAB = 2**26  # bytes that are brought from a GPU at a time
_ELEMENTS = 2**22  # that are brought to fp32 at a time
PROJECTIONS = 8


class PartialDigest:
    """The digest of a weight of which this process adds some elements, in the order in which they stand.

    Args:
        dtype: of the weight.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._chunks: dict[int, bytes] = {}
        self._open = bytearray()
        self._open_at = 0
        self._borders: dict[int, bytes] = {}

    def add(self, piece: Tensor, first: int) -> None:
        """Add elements ``first, first + 1, ...`` of the flattened weight."""
        flat = piece.detach().reshape(-1)
        start = first * flat.element_size()
        for slab in flat.split(max(1, _SLAB // flat.element_size())):
            content = slab.contiguous().cpu().view(torch.uint8).numpy().data
            self._add_bytes(content, start)
            start += len(content)

    def _add_bytes(self, content: memoryview, start: int) -> None:
        if self._open and self._open_at + len(self._open) != start:
            self._close()
        position = 0
        while position < len(content):
            at = start + position
            end = min(len(content), position + _CHUNK - at % _CHUNK)
            if at % _CHUNK == 0 and end - position == _CHUNK:
                self._chunks[at // _CHUNK] = hashlib.sha256(content[position:end]).digest()
            else:
                if not self._open:
                    self._open_at = at
                self._open += content[position:end]
                if (at + end - position) % _CHUNK == 0:
                    self._close()
            position = end

    def _close(self) -> None:
        """Hash the chunk that is open, or, where this process has only a part of it, keep that for :meth:`whole`."""
        if not self._open:
            return
        if len(self._open) == _CHUNK:
            self._chunks[self._open_at // _CHUNK] = hashlib.sha256(self._open).digest()
        else:
            self._borders[self._open_at] = bytes(self._open)
        self._open = bytearray()

    def part(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """What this process has added, to be sent to the others: digests of whole chunks, and pieces of others."""
        self._close()
        return self._chunks, self._borders

    def whole(self, shape: Sequence[int], parts: Iterable[tuple[dict[int, bytes], dict[int, bytes]]]) -> str:
        """The digest of the weight of that shape, from the parts of all processes."""
        chunks: dict[int, bytes] = {}
        pieces: dict[int, bytes] = {}
        for some, borders in parts:
            chunks |= some
            pieces |= borders
        rest: dict[int, bytearray] = {}
        for start, content in sorted(pieces.items()):
            rest.setdefault(start // _CHUNK, bytearray()).extend(content)
        chunks |= {number: hashlib.sha256(content).digest() for number, content in rest.items()}
        found = hashlib.sha256(f"{self._dtype} {tuple(shape)}".encode())
        for number in sorted(chunks):
            found.update(chunks[number])
        return found.hexdigest()


def digest_of(weight: Tensor) -> str:
    """The digest of a whole weight, on any device: SHA-256, in hexadecimal."""
    partial = PartialDigest(weight.dtype)
    partial.add(weight, 0)
    return partial.whole(weight.shape, [partial.part()])


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
    rows = piece.detach().reshape(-1, max(1, columns))
    number = first // max(1, columns)
    down = _signs(len(rows), 1, number).to(rows.device, torch.float32)
    across = _signs(rows.shape[1], 2).to(rows.device, torch.float64)
    found = torch.zeros(PROJECTIONS + 1, dtype=torch.float64, device=rows.device)
    step = max(1, _ELEMENTS // rows.shape[1])
    for begin in range(0, len(rows), step):
        some = rows[begin : begin + step].float()
        found[:-1] += ((down[begin : begin + step].T @ some).double() * across.T).sum(dim=1)
        found[-1] += torch.linalg.vector_norm(some).double().square()
    return found.cpu()


def same_but_for_rounding(one: Sequence[float], other: Sequence[float], tolerance: float) -> bool:
    """Whether two weights' :func:`project` differ by no more than ``tolerance`` of the weight's norm."""
    ours, theirs = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    # a projection of what differs has the size of what differs, whatever that is
    difference = (ours - theirs)[:-1].square().mean().sqrt()
    return bool(difference <= tolerance * theirs[-1].sqrt() + 1e-12)


def _signs(count: int, seed: int, first: int = 0) -> Tensor:
    """``[count, PROJECTIONS]`` of 1 and -1 for the places ``first, first + 1, ...``, the same on every machine."""
    mixed = torch.arange(first, first + count, dtype=torch.int64) * 0x1E3779B97F4A7C15 + seed * 0x3F58476D1CE4E5B9
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 30)) * 0x3F58476D1CE4E5B9
        mixed = (mixed ^ (mixed >> 27)) * 0x14D049BB133111EB
    bits = (mixed[:, None] >> torch.arange(20, 20 + PROJECTIONS)) & 1
    return bits * 2 - 1

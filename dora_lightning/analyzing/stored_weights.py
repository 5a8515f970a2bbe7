"""Weights in safetensors files, read a few rows at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dora_lightning.adapters.analysis import block_height, row_blocks
from dora_lightning.adapters.operators import operator_of

# elements that are read at a time: what was read before goes with the closed file
_PIECE = 2**22
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class StoredWeights:
    """The floating-point tensors of some safetensors files.

    Args:
        files: of one model; a name is in one of them.

    Raises:
        ValueError: one of them is no safetensors file.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._where: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as reader:
                    for key in reader.keys():  # noqa: SIM118  # no dict
                        part = reader.get_slice(key)
                        if part.get_dtype() in _DTYPES:
                            self._where[key] = file
                            self._shapes[key] = tuple(part.get_shape())
            except SafetensorError as error:
                raise ValueError(f"{file} could not be read as safetensors: {error}") from error

    def __contains__(self, key: object) -> bool:
        """Whether there is a weight of that name."""
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a weight, from the file's header."""
        return self._shapes[key]

    def whole(self, key: str) -> Tensor:
        """A weight, on the CPU."""
        # Lightning builds models with the GPU as default device, where safetensors would put them
        with torch.device("cpu"), safe_open(self._where[key], framework="pt") as reader:
            return reader.get_tensor(key)

    def blocks(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """As :func:`~dora_lightning.adapters.analysis.row_blocks` of the weight, which is never whole in memory."""
        rows, *rest = self._shapes[key]
        columns = math.prod(rest)
        height = block_height(columns)
        step = height * max(1, _PIECE // max(1, height * columns))
        for first in range(0, rows, step):
            with torch.device("cpu"), safe_open(self._where[key], framework="pt") as reader:
                piece = reader.get_slice(key)[first : min(rows, first + step)]
                for start, block in row_blocks(piece):
                    yield first + start, block
                del piece, block


def is_matrix(shape: tuple[int, ...], module: nn.Module | None) -> bool:
    """Whether a weight is one matrix ``[out, in]``, or a convolution's kernel, and not a vector or a stack."""
    return len(shape) == 2 or (len(shape) > 2 and module is not None and operator_of(module) is not None)


def write_tensors(
    file: IO[bytes], shapes: Sequence[tuple[str, Sequence[int], torch.dtype]], tensors: Iterable[Tensor]
) -> None:
    """Write a safetensors file from tensors that come one after the other, of which one at a time is in memory.

    Args:
        file: where to write.
        shapes: name, shape and dtype of each tensor.
        tensors: on the CPU, in that order.
    """
    header, end = {}, 0
    for name, shape, dtype in shapes:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

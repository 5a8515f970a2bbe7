"""NaN and infinity are refused by name: they are never trained on, saved, merged or scored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class NonFiniteError(ValueError):
    """A number that has to be finite is NaN or infinite."""


def nonfinite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, of shards in what this process has of them.

    Waits once for each device they are on.

    >>> nonfinite_names({"a": torch.tensor([1.0, torch.inf]), "b": torch.ones(2), "c": torch.tensor([3])})
    ['a']
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        tensor = local_part(tensor.detach())
        if tensor.is_floating_point() or tensor.is_complex():
            by_device.setdefault(tensor.device, {})[name] = tensor
    found: set[str] = set()
    for group in by_device.values():
        # float8 has no isfinite
        wide = [tensor if tensor.element_size() > 1 else tensor.float() for tensor in group.values()]
        bad = torch.stack([~tensor.isfinite().all() for tensor in wide]).tolist()
        found |= {name for name, is_bad in zip(group, bad, strict=True) if is_bad}
    return [name for name in tensors if name in found]


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that all numbers are finite.

    Args:
        tensors: name -> tensor.
        what: the sentence's beginning: what would be done with them, or what they are of.

    Raises:
        NonFiniteError: some are not; names them.
    """
    if bad := nonfinite_names(tensors):
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise NonFiniteError(f"{what}: {bad[0]}{more} holds NaN or infinity")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor, and the numbers that a sparse one has."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor._values() if tensor.is_sparse else tensor

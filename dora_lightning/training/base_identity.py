"""Recognise a base model by its numbers, so that an adapter is never put on another one by mistake.

Of each weight a digest of dtype, shape and bits is kept, which any change alters, and projections, which are still
comparable when the same weights are loaded in another dtype. Checkpoints of older versions have, in their place, a sum
of bits and a few values, neither of which sees rows in another order; both are still made, to be compared with those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dora_lightning.adapters.quantized import is_quantized, packed_tensors, row_slabs, scheme_of
from dora_lightning.training.stored_names import base_name, stored_names
from dora_lightning.training.weight_digests import (
    columns_of,
    digest_of_rows,
    digests_of,
    project,
    same_but_for_rounding,
    whole_digest,
)

_SAMPLES = 8
# two roundings to half precision of the same number differ by less than this
_OTHER_DTYPE_RTOL = 2.0**-7
_weakly_compared: set[str] = set()


def base_identity(model: nn.Module, name: str) -> dict[str, Any]:
    """What a base model is, in plain containers.

    Its name, digest and projections of each of its frozen weights, and the names of weights that its files call
    otherwise than the model does. Of a quantised weight the digest is that of the packed data, the projections are
    those of the dequantised weight, and ``quantized`` says how it came about. ``checksums`` and ``samples`` are what
    older versions compare.

    Args:
        model: the model with real weights, with or without adapters.
        name: folder or hub id it was loaded from.
    """
    # a shard is no sample of the whole; adapters are injected, and this is called, before sharding
    packed = {f"{prefix}.weight": module for prefix, module in model.named_modules() if is_quantized(module)}
    frozen = {
        base_name(key): parameter
        for key, parameter in model.named_parameters()
        if not parameter.requires_grad
        and key not in packed
        and parameter.is_floating_point()
        and not parameter.is_meta
        and not isinstance(parameter, DTensor)
    }
    identity = _identity(frozen, name) | {"stored_names": stored_names(model)}
    for key, module in packed.items():
        _add_quantized(identity, base_name(key), module)
    return identity


def awaited_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Name in the base -> dtype, of the frozen weights that are still on the meta device."""
    return {
        base_name(key): parameter.dtype
        for key, parameter in model.named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point() and parameter.is_meta
    }


def check_same_base(saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Compare the base a checkpoint was trained on with the one at hand; another dtype of the same weights passes.

    Raises:
        ValueError: they differ; the message names both models and the first weight that differs.
    """
    theirs, ours = saved["dtypes"], present["dtypes"]
    for key in sorted(theirs.keys() ^ ours.keys()):
        where = "this base" if key in theirs else "the checkpoint's base"
        raise _wrong_base(saved, present["name"], f"{where} has no weight {key}")
    for key in theirs:
        _compare(saved, present, key)


def check_weight_of_base(saved: dict[str, Any], key: str, weight: Tensor | nn.Module, name: str) -> None:
    """As :func:`check_same_base`, for the weight ``key`` of the base ``name``; one that was not recorded passes.

    A quantised weight is given as the layer that has it.
    """
    if key not in saved["dtypes"]:
        return
    if isinstance(weight, Tensor):
        present = _identity({key: weight}, name)
    else:
        present = _identity({}, name)
        _add_quantized(present, key, weight)
    _compare(saved, present, key)


def weights_digest(model: nn.Module) -> str:
    """A short name for a model's weights and buffers: any change to one of them gives another."""
    tensors = dict(model.named_parameters()) | {name: buffer.detach() for name, buffer in model.named_buffers()}
    return hashlib.sha256(repr(sorted(digests_of(tensors).items())).encode()).hexdigest()[:16]


class StreamedIdentity:
    """The very identity :func:`base_identity` gives, of weights that are never whole anywhere.

    Each process adds the rows it holds, in their order; what it has made of them is put together with the others'.
    """

    def __init__(self, name: str, dtypes: Mapping[str, torch.dtype], stored: Mapping[str, str]) -> None:
        self._name = name
        self._stored = dict(stored)
        self._dtypes = dict(dtypes)
        self._parts: dict[str, list[tuple[Any, ...]]] = {}

    def add(self, key: str, piece: Tensor, first: int, numel: int) -> None:
        """Add whole rows of the weight ``key``, which has ``numel`` elements, from its element ``first`` on."""
        flat = piece.detach().reshape(-1)
        step = _sample_step(numel)
        values: dict[int, float] = {}
        for position in range(-(-first // step), _SAMPLES):
            if position * step >= min(numel, first + len(flat)):
                break
            values[position] = float(flat[position * step - first])
        columns = columns_of(piece.shape)
        shape = (numel // columns, *piece.shape[1:]) if piece.ndim else ()
        checksum = _checksum_of_piece(flat, first, numel)
        digest, projections = digest_of_rows(flat, first, columns), project(flat, first, columns).tolist()
        self._parts.setdefault(key, []).append((shape, checksum, values, digest, projections))

    def parts(self) -> dict[str, list[tuple[Any, ...]]]:
        """What this process has added of each weight, to be sent to the others."""
        return self._parts

    def whole(self, parts: Sequence[dict[str, list[tuple[Any, ...]]]]) -> dict[str, Any]:
        """The identity, from the parts of all processes."""
        identity = _empty_identity(self._name) | {"stored_names": self._stored}
        for key, dtype in self._dtypes.items():
            pieces = [piece for part in parts for piece in part.get(key, ())]
            shapes, checksums, values, digests, projections = zip(*pieces, strict=True)
            # wraps around as the sum of 64-bit numbers does
            identity["checksums"][key] = (sum(checksums) + 2**63) % 2**64 - 2**63
            identity["samples"][key] = _as_samples({place: value for some in values for place, value in some.items()})
            identity["dtypes"][key] = str(dtype)
            identity["digests"][key] = whole_digest(dtype, shapes[0], digests)
            identity["projections"][key] = [sum(some) for some in zip(*projections, strict=True)]
        return identity


def _empty_identity(name: str) -> dict[str, Any]:
    return {"name": name, "digests": {}, "projections": {}, "dtypes": {}, "checksums": {}, "samples": {}}


def _identity(weights: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    return {
        "name": name,
        "digests": digests_of(weights),
        "projections": {key: project(weight, 0, columns_of(weight.shape)).tolist() for key, weight in weights.items()},
        "dtypes": {key: str(weight.dtype) for key, weight in weights.items()},
        "checksums": {key: _checksum(weight) for key, weight in weights.items()},
        "samples": {key: _sample(weight) for key, weight in weights.items()},
    }


def _add_quantized(identity: dict[str, Any], key: str, module: Any) -> None:
    rows, columns = module.out_features, module.in_features
    step = _sample_step(rows * columns)
    wanted = [step * position for position in range(_SAMPLES)]
    values = []
    projections = torch.zeros(())
    for part, slab in row_slabs(module):
        first, last = part.start * columns, part.stop * columns
        projections = projections + project(slab, first, columns)
        flat = slab.reshape(-1)
        values += [float(flat[index - first]) for index in wanted if first <= index < last]
    identity["samples"][key] = torch.tensor(values, device="cpu")
    packed = packed_tensors(module)
    identity["checksums"][key] = sum(_checksum(tensor) for tensor in packed)
    # a vector: some libraries store rows of one byte, others of many
    vectors = {str(number): tensor.reshape(-1) for number, tensor in enumerate(packed)}
    identity["digests"][key] = hashlib.sha256(repr(digests_of(vectors)).encode()).hexdigest()
    identity["projections"][key] = projections.tolist()
    scheme = scheme_of(module)
    identity["dtypes"][key] = f"{scheme['scheme']} from {scheme['dtype']} on {scheme['device']}"
    identity.setdefault("quantized", {})[key] = scheme


def _compare(saved: dict[str, Any], present: dict[str, Any], key: str) -> None:
    theirs, ours = _format(saved, key), _format(present, key)
    if theirs != ours:
        raise _wrong_base(saved, present["name"], f"{key} was {theirs} in training and is {ours} here")
    same_dtype = saved["dtypes"][key] == present["dtypes"][key]
    if "digests" not in saved:
        same = _is_the_same_by_sums(saved, present, key, same_dtype)
    elif same_dtype:
        same = saved["digests"][key] == present["digests"][key]
    else:
        same = same_but_for_rounding(saved["projections"][key], present["projections"][key], _OTHER_DTYPE_RTOL)
    if not same:
        raise _wrong_base(saved, present["name"], f"{key} holds other values")


def _is_the_same_by_sums(saved: dict[str, Any], present: dict[str, Any], key: str, same_dtype: bool) -> bool:
    """The weaker check that checkpoints of older versions allow."""
    if saved["name"] not in _weakly_compared:
        _weakly_compared.add(saved["name"])
        rank_zero_info(
            f"The checkpoint was written by an older version: its base {saved['name']!r} is compared by sums and "
            "samples of the weights, which do not see rows in another order. One saved now is compared by digests."
        )
    if same_dtype:
        return bool(saved["checksums"][key] == present["checksums"][key])
    theirs, ours = saved["samples"][key], present["samples"][key]
    atol = 1e-5 * _OTHER_DTYPE_RTOL
    return theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=_OTHER_DTYPE_RTOL, atol=atol)


def _format(identity: dict[str, Any], key: str) -> str:
    scheme = identity.get("quantized", {}).get(key)
    if scheme is None:
        return "not quantised"
    return f"quantised to {scheme['scheme']}" + (f" by {scheme['blocksize']}" if "blocksize" in scheme else "")


def _wrong_base(saved: dict[str, Any], name: str, reason: str) -> ValueError:
    return ValueError(
        f"the checkpoint was trained on another base model: {saved['name']!r}, not {name!r} ({reason}). "
        "Load it on the base it was trained on."
    )


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: _sample_step(flat.numel())][:_SAMPLES].to("cpu", torch.float32, copy=True)


def _as_samples(values: Mapping[int, float]) -> Tensor:
    return torch.tensor([value for _, value in sorted(values.items())], dtype=torch.float32, device="cpu")


def _sample_step(numel: int) -> int:
    return max(1, numel // _SAMPLES)


def _checksum(weight: Tensor) -> int:
    """Sum of the bits as whole numbers, which is the same on every device and in every order of summation."""
    flat = weight.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    whole = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    rest = flat[whole:].view(torch.uint8).sum(dtype=torch.int64)
    # eight bytes at a time: without a conversion the sum runs at the speed of memory
    return int(flat[:whole].view(torch.int64).sum() + rest)


def _checksum_of_piece(flat: Tensor, first: int, numel: int) -> int:
    """What elements ``first, first + 1, ...`` of a weight contribute to its :func:`_checksum`."""
    size = flat.element_size()
    # the eight bytes at a time are counted from the start of the weight, and its last few bytes are counted one by one
    whole = max(0, min(len(flat), numel * size // 8 * 8 // size - first))
    head, rest = flat[:whole], flat[whole:].contiguous().view(torch.uint8)
    before = first * size % 8 // size
    after = -(before + whole) % (8 // size)
    if before or after or head.storage_offset() * size % 8 or not head.is_contiguous():
        head = torch.cat([head.new_zeros(before), head, head.new_zeros(after)])  # a zero has no bits
    return int(head.view(torch.int64).sum() + rest.sum(dtype=torch.int64))

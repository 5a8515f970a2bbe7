"""Give a model that was built on the meta device its weights: each process reads the rows it holds, and no others.

A model of which every process loads a whole copy, to cut it into shards afterwards, takes the machine's memory once per
process. Here the model is built, adapted and sharded without weights; then the local shards are allocated and filled
from the safetensors files, which can be read in part. An unsharded model (one device, DDP) is filled by the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dora_lightning.adapters import adapted_submodule, adapter_layers
from dora_lightning.adapters.functional import NORM_EPS, weight_norm_sq
from dora_lightning.adapters.initialization import draws_from_weight, start_low_rank
from dora_lightning.adapters.layers import AdapterLayer, DoRALinear, LoRALinear, MagnitudeLinear
from dora_lightning.adapters.operators import is_lookup
from dora_lightning.adapters.vera import VeRALinear
from dora_lightning.pretrained import local_folder, weight_files
from dora_lightning.training.base_identity import StreamedIdentity
from dora_lightning.training.stored_names import base_name, stored_names

# rows are read and converted this many elements at a time
_PIECE = 2**24
# weights whose digests are gathered at a time
_GATHERED = 4


def awaits_weights(module: nn.Module) -> bool:
    """Whether any parameter is on the meta device."""
    return any(parameter.is_meta for parameter in module.parameters())


def allocate(module: nn.Module, device: torch.device) -> None:
    """Put empty memory in the place of meta parameters, tied ones once; all else moves to ``device`` as it is."""
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                if parameter not in replaced:
                    empty = torch.empty_like(parameter, device=device)
                    replaced[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                child._parameters[name] = replaced[parameter]
    module.to(device)  # FSDP2 takes up new parameters here


@torch.no_grad()
def stream_weights(
    module: nn.Module, base: str, device: torch.device, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """Allocate what is on the meta device, fill it from the base's files, and start the adapters.

    Adapters start as they do on a model with weights: ``lora_A`` and ``lora_B`` are drawn from the CPU's random numbers
    in the order of the modules, the magnitude is the norm of the weight as it is held here.

    Args:
        module: holds one model with adapters; sharded by ``fully_shard``, or not at all. To be called on every process.
        base: folder, hub id, GGUF file or package that the weights are read from.
        device: where this process's shards belong.
        dtypes: dtype of each frozen weight, by its name in the base, before anything cast it: what its identity is of.

    Returns:
        The identity of the base, as :func:`~dora_lightning.training.base_identity.base_identity` gives it.

    Raises:
        ValueError: a parameter that no file holds, or of another shape; one outside of the adapted model; adapters that
            start from the weights themselves, which no process has whole.
    """
    prefix, model = adapted_submodule(module)
    awaited = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if outside := [name for name in awaited if prefix and not name.startswith(f"{prefix}.")]:
        raise ValueError(f"{outside[0]} is on the meta device and no part of the pretrained model: nothing fills it")
    if not hasattr(model, "config"):
        raise ValueError(
            f"the adapted {type(model).__name__} is on the meta device and is no transformers model, which knows where "
            "its weights are; name the part that is one (module of the callback DoRA)"
        )
    adapters = [layer for _, layer in adapter_layers(model) if any(p.is_meta for p in layer.parameters(recurse=False))]
    for layer in adapters:
        if isinstance(layer, LoRALinear) and not isinstance(layer, VeRALinear) and draws_from_weight(layer.init):
            raise ValueError(f"init={layer.init!r} starts from whole weights; build the model with its weights for it")
    stored = stored_names(model)
    sources = _sources(model, local_folder(base), stored)
    allocate(module, device)
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    identity = StreamedIdentity(base, dtypes, stored)
    by_row = {id(layer.weight): _norm_of_rows(layer) for layer in adapters if _has_magnitude(layer)}
    norms_sq: dict[int, list[Tensor]] = {weight: [] for weight in by_row}
    tensors = model.state_dict(keep_vars=True)
    for file, weights in sources.items():
        # Lightning builds models with the GPU as default device, where safetensors would put whole tensors
        with torch.device("cpu"), safe_open(file, framework="pt") as reader:
            for name, key in weights.items():
                tensor, weight = tensors[name], base_name(name)
                whole_elsewhere = mesh is not None and mesh.get_local_rank() != 0 and not isinstance(tensor, DTensor)
                for first, piece in _fill(tensor, reader.get_slice(key), dtypes.get(weight, tensor.dtype)):
                    if weight in dtypes and not whole_elsewhere:
                        identity.add(weight, piece, first, tensor.numel())
                    if id(tensor) in by_row:
                        used = piece.to(tensor.dtype).flatten(1)  # what the forward pass computes with
                        norms_sq[id(tensor)].append(weight_norm_sq(used if by_row[id(tensor)] else used.T))
    for layer in adapters:
        _start(layer, norms_sq.get(id(layer.weight), []))
    return identity.whole(_gathered(identity.parts(), dtypes, mesh))


def _sources(model: nn.Module, folder: Path, stored: Mapping[str, str]) -> dict[Path, dict[str, str]]:
    """File -> name in ``model`` -> name in the file, of all that is to be read."""
    files: dict[str, tuple[Path, list[int]]] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            files |= {key: (file, weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118  # no dict
    own = {id(p) for _, layer in adapter_layers(model) for p in layer.parameters(recurse=False)}
    names: dict[int, list[str]] = {}  # tied weights have several
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        # a buffer is real and keeps what it was built with, unless a file holds it
        if id(tensor) not in own and (tensor.is_meta or not isinstance(tensor, nn.Parameter)):
            names.setdefault(id(tensor), []).append(name)
    sources: dict[Path, dict[str, str]] = {}
    missing = []
    for first, *others in names.values():
        own_names = [base_name(name) for name in (first, *others)]
        key = next((key for name in own_names for key in (stored.get(name, name), name) if key in files), None)
        if key is None:
            missing += [base_name(first)] if tensors[first].is_meta else []
            continue
        file, shape = files[key]
        if list(tensors[first].shape) != shape:
            raise ValueError(f"{key} is {shape} in {file}, and {list(tensors[first].shape)} in the model")
        sources.setdefault(file, {})[first] = key
    if missing:
        more = f" (nor {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ValueError(f"{folder} holds no weight {missing[0]}{more}, which the model needs")
    return sources


def _fill(tensor: Tensor, source: Any, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Copy this process's rows from a slice of a file; yields them in ``dtype``, with the first one's position."""
    local, start = _local_rows(tensor)
    if tensor.ndim == 0:
        piece = source[...].to(dtype)
        local.copy_(piece)
        yield 0, piece
        return
    row = tensor.numel() // max(1, len(tensor))
    step = max(1, _PIECE // max(1, row))
    for begin in range(0, len(local), step):
        end = min(len(local), begin + step)
        piece = source[start + begin : start + end].to(dtype)
        local[begin:end].copy_(piece)
        yield (start + begin) * row, piece


def _local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The part of ``tensor`` that this process holds, and the number of its first row."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0
    if list(tensor.placements) != [Shard(0)]:
        raise ValueError(f"weights can be streamed into rows on one mesh dimension, not into {tensor.placements}")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local().detach(), offset[0]


def _has_magnitude(layer: AdapterLayer) -> bool:
    return isinstance(layer, (DoRALinear, MagnitudeLinear))


def _norm_of_rows(layer: Any) -> bool:
    """Whether a magnitude belongs to a row of the weight as it is stored; else to a column."""
    return (layer.norm_axis == "out") != layer.operator.transposed


def _start(layer: AdapterLayer, norms_sq: list[Tensor]) -> None:
    """Give the adapter its first values; ``norms_sq`` are of the pieces of the weight that this process has read."""
    if isinstance(layer, VeRALinear):
        layer.reset_vectors()
    elif isinstance(layer, LoRALinear):
        own = (layer.lora_A, layer.lora_B)
        whole_A, whole_B = (torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in own)
        start_low_rank(whole_A, whole_B, layer.init, layer.weight, layer.scaling, is_lookup(layer.base_layer))
        for tensor, whole in zip(own, (whole_A, whole_B), strict=True):
            rows, start = _local_rows(tensor)
            rows.copy_(whole[start : start + len(rows)])
    if isinstance(layer, (DoRALinear, MagnitudeLinear)):
        values, start = _local_rows(layer.magnitude)
        if _norm_of_rows(layer):
            # rows of the magnitude are cut as rows of the weight are
            norm_sq = torch.cat([values.new_zeros(0), *(piece.to(values) for piece in norms_sq)])
        else:
            norm_sq = _summed(norms_sq, layer.weight, values)[start : start + len(values)]
        if isinstance(layer, DoRALinear):
            norm_sq = norm_sq.clamp(min=NORM_EPS**2)  # as functional.adapted_norm has it
        values.copy_(norm_sq.sqrt())


def _summed(norms_sq: list[Tensor], weight: Tensor, values: Tensor) -> Tensor:
    """Squared norm of every column of ``weight``, over the rows of all processes."""
    total = values.new_zeros(weight.shape[1])
    for piece in norms_sq:
        total += piece.to(total)
    if isinstance(weight, DTensor):
        dist.all_reduce(total, group=weight.device_mesh.get_group())
    return total


def _gathered(part: dict[str, Any], keys: Iterable[str], mesh: DeviceMesh | None) -> list[dict[str, Any]]:
    """What each process has of ``keys``, a few of them at a time."""
    if mesh is None:
        return [part]
    parts: list[dict[str, Any]] = [{} for _ in range(mesh.size())]
    names = sorted(keys)
    for start in range(0, len(names), _GATHERED):
        some: list[Any] = [None] * mesh.size()
        own = {key: part[key] for key in names[start : start + _GATHERED] if key in part}
        dist.all_gather_object(some, own, group=mesh.get_group())
        for whole, piece in zip(parts, some, strict=True):
            whole |= piece
    return parts

"""Merge an adapter into a Hugging Face folder, one tensor at a time.

The base's safetensors files are copied tensor by tensor; a tensor that an adapter belongs to is replaced by
``g (W + s B A)``. The merged tensor has the shape and dtype of the base's, so each file's header stays as it is. Memory
holds one weight at a time. Everything is written beside the target and renamed at the end: a reader never sees a part.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from dora_lightning.adapters import AdapterConfig
from dora_lightning.adapters.functional import merge_weight
from dora_lightning.adapters.summary import parameter_group
from dora_lightning.pretrained import local_folder
from dora_lightning.training.adapter_checkpoint import AdapterCheckpoint
from dora_lightning.training.base_identity import check_weight_of_base
from dora_lightning.training.stored_names import base_name

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}


def merge_to_folder(
    base: str,
    adapter: AdapterCheckpoint,
    output: str | Path,
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write the merged model as a Hugging Face folder that ``transformers`` loads without this library.

    Args:
        base: folder, hub id, GGUF file or package the adapter was trained on.
        adapter: config, identity of the base, and trained tensors.
        output: folder to make.
        overwrite: replace ``output`` if it exists.
        notes: text files to write beside the weights, name -> text.

    Returns:
        ``output``.

    Raises:
        FileExistsError: ``output`` exists and may not be overwritten.
        ValueError: the base is not the one the adapter was trained on, or has no safetensors.
        OSError: the disk is full. Nothing is left behind in any case.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; choose another folder or pass overwrite")
    source = local_folder(base)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} holds no safetensors files, the only kind of weights that is read")
    # absent from checkpoints that were written before there were such models
    stored = adapter.base.get("stored_names", {})
    updates = {stored.get(name, name): update for name, update in _group_by_module(adapter.tensors).items()}
    _check_weights_exist(files, updates, source)

    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (*output.parent.glob(f".{output.name}.partial-*"), *output.parent.glob(f".{output.name}.old-*")):
        shutil.rmtree(leftover)  # of a process that was killed
    _check_space(sum(file.stat().st_size for file in files), output.parent)
    partial = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.partial-"))
    try:
        for file in source.iterdir():
            if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and not file.name.endswith(".bin.index.json"):
                shutil.copyfile(file, partial / file.name)
        for file in files:
            _merge_file(file, partial / file.name, adapter, updates, base)
        for name, text in (notes or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.chmod(0o755)
        _replace(partial, output)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"the disk filled up while merging into {output}; nothing was left there"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _merge_file(
    source: Path, target: Path, adapter: AdapterCheckpoint, updates: Mapping[str, Mapping[str, Tensor]], base: str
) -> None:
    own_names = {key: name for name, key in adapter.base.get("stored_names", {}).items()}
    with open(source, "rb") as reader, open(target, "wb") as writer, safe_open(source, framework="pt") as weights:
        length = reader.read(8)
        header = reader.read(int.from_bytes(length, "little"))
        writer.write(length)
        writer.write(header)
        for name in _in_file_order(header):
            tensor = weights.get_tensor(name)
            check_weight_of_base(adapter.base, own_names.get(name, name), tensor, base)
            if update := updates.get(name):
                tensor = _merged(name, tensor, update, adapter.config)
            _write_tensor(writer, tensor)


def _merged(name: str, weight: Tensor, update: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    _check_shapes(name, weight, update, config.norm_axis)
    if "other" in update:
        return update["other"].to(weight.dtype)
    return merge_weight(
        weight, update.get("lora_A"), update.get("lora_B"), config.scaling, update.get("magnitude"), config.norm_axis
    )


def _check_shapes(name: str, weight: Tensor, update: Mapping[str, Tensor], norm_axis: str) -> None:
    rank = len(update["lora_A"]) if "lora_A" in update else 0
    expected: dict[str, tuple[int, ...]] = {"other": tuple(weight.shape)}
    if weight.ndim == 2:
        rows, columns = weight.shape
        magnitude = rows if norm_axis == "out" else columns
        expected |= {"lora_A": (rank, columns), "lora_B": (rows, rank), "magnitude": (magnitude,)}
    shapes = {part: tuple(tensor.shape) for part, tensor in update.items()}
    if any(shape != expected.get(part) for part, shape in shapes.items()):
        raise ValueError(f"the adapter does not fit {name} {tuple(weight.shape)}: it has {shapes}")


def _write_tensor(writer: BinaryIO, tensor: Tensor) -> None:
    writer.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _in_file_order(header: bytes) -> Iterator[str]:
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    yield from sorted(entries, key=lambda name: entries[name]["data_offsets"][0])


def _group_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name of the base's weight -> the tensors that change it, by their parameter group."""
    updates: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group = parameter_group(name)
        weight = name if group == "other" else name.rpartition(".")[0] + ".weight"
        updates.setdefault(base_name(weight), {})[group] = tensor.detach().cpu()
    return updates


def _check_weights_exist(files: list[Path], updates: Mapping[str, object], source: Path) -> None:
    present: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            present.update(weights.keys())
    if missing := sorted(updates.keys() - present):
        raise ValueError(
            f"{source} has no weight {missing[0]}"
            + (f" (nor {len(missing) - 1} more)" if len(missing) > 1 else "")
            + ", which the adapter belongs to: another base model, or a weight tied to another one"
        )


def _check_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"the merged model takes {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free"
        )


def _replace(partial: Path, output: Path) -> None:
    if not output.exists():
        partial.rename(output)
        return
    old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.old-"))
    output.rename(old / output.name)
    partial.rename(output)
    shutil.rmtree(old)

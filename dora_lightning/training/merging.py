"""Merge an adapter into a Hugging Face folder, one tensor at a time.

The base's safetensors files are copied tensor by tensor; a tensor that an adapter belongs to is replaced by
``g (W + s B A)``, or by what was trained in full. The merged tensor has the shape and dtype of the base's, so each
file's header stays as it is. Memory holds one weight at a time. Of an adapter on a quantised base, each weight that was
quantised is so again, checked, and dequantised: the merged model is ``g (W_dq + s B A)``, since ``W_dq`` is what was
trained on, and not the ``W`` that the file holds. Everything is written beside the target and renamed at
the end: a reader never sees a part. What is replaced is a folder that was made so, never the base.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from dora_lightning.adapters import AdapterConfig
from dora_lightning.adapters.finite import check_finite
from dora_lightning.adapters.functional import merge_weight
from dora_lightning.adapters.operators import as_matrix, as_stored, ungrouped
from dora_lightning.adapters.quantized import dequantized, quantize_again
from dora_lightning.adapters.vera import scaled_pair, shared_pair
from dora_lightning.files import check_folder, write_folder
from dora_lightning.files.folders import MARKER, tidy_folder
from dora_lightning.pretrained import local_folder
from dora_lightning.training.adapter_checkpoint import AdapterCheckpoint
from dora_lightning.training.base_identity import check_weight_of_base
from dora_lightning.training.complete_adapter import check_complete
from dora_lightning.training.stored_names import base_name

SOURCE_FILE = "merged_from.json"
"""Among the notes of a merged folder: the checkpoint it was made from, so that a restarted run knows what is merged."""
# tensors of an adapter by the last part of their names; anything else replaces the base's tensor of its name
_PARTS = ("magnitude", "lora_A", "lora_B", "init_A", "init_B", "lambda_d", "lambda_b")
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
        overwrite: replace ``output`` if it exists, was made by this function, and holds no other files.
        notes: text files to write beside the weights, name -> text.

    Returns:
        ``output``.

    Raises:
        FileExistsError: ``output`` exists and may not be replaced, see :func:`dora_lightning.files.check_folder`.
        ValueError: the base is not the one the adapter was trained on, or has no safetensors; an adapted weight is tied
            to another module's, which would change with it.
        NonFiniteError: a merged weight would hold NaN or infinity in the base's dtype.
        OSError: the disk is full. Nothing is left behind in any case.
    """
    output = Path(output)
    check_complete(adapter.config, adapter.tensors)
    source = local_folder(base)
    check_folder(output, overwrite, keep=[source])
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{source} holds no safetensors files, the only kind of weights that is read")
    if adapter.base.get("quantized") and "quantization_config" in _config_of(source):
        raise ValueError(
            f"the weights in the files of {source} are quantised already, and are only written as they are; "
            "merge in memory (merge_adapters(model, unload=True)) and save the model"
        )
    if tied := adapter.config.resolved.get("tied"):
        raise ValueError(
            f"the weight of {tied[0]} is tied to another module's, which must not change with it, and the files hold "
            "it once; merge in memory (merge_adapters(model, unload=True)) and save the model"
        )
    # absent from checkpoints that were written before there were such models
    stored = adapter.base.get("stored_names", {})
    updates = {stored.get(name, name): update for name, update in _group_by_module(adapter.tensors).items()}
    updates = _of_stored_weights(files, updates, source)

    output.parent.mkdir(parents=True, exist_ok=True)
    tidy_folder(output)  # before the space that it takes is counted
    _check_space(sum(file.stat().st_size for file in files), output.parent)

    def write(folder: Path) -> None:
        for file in source.iterdir():
            if file.is_file() and not _is_weights(file) and file.name not in (MARKER, SOURCE_FILE):
                shutil.copyfile(file, folder / file.name)
        for file in files:
            _merge_file(file, folder / file.name, adapter, updates, base)
        for name, text in (notes or {}).items():
            (folder / name).write_text(text, encoding="utf-8")

    try:
        write_folder(output, write, overwrite, keep=[source])
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno, f"the disk filled up while merging into {output}; nothing was left there"
            ) from error
        raise
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
            own_name = own_names.get(name, name)
            dtype = tensor.dtype
            scheme = adapter.base.get("quantized", {}).get(own_name)
            if scheme is None:
                check_weight_of_base(adapter.base, own_name, tensor, base)
            else:
                layer = quantize_again(tensor, scheme)
                check_weight_of_base(adapter.base, own_name, layer, base)
                tensor = dequantized(layer)
            if update := updates.get(name):
                tensor = _checked(own_name, tensor, _merged(own_name, tensor, update, adapter.config).to(dtype))
            _write_tensor(writer, tensor.to(dtype))


def _merged(name: str, weight: Tensor, update: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    if "other" in update:
        if update["other"].shape != weight.shape:
            raise _does_not_fit(name, weight, update)
        return update["other"].to(weight.dtype)
    module = name.rpartition(".")[0]
    transposed = module in config.resolved.get("transposed", ())
    matrix = as_matrix(weight, transposed)
    if weight.ndim < 2 or not _fits(matrix, update, config.norm_axis, grouped=weight.ndim > 2):
        raise _does_not_fit(name, weight, update)
    A, B, scaling = _low_rank(matrix, update, config, module)
    merged = merge_weight(matrix, A, B, scaling, update.get("magnitude"), config.norm_axis)
    return as_stored(merged, weight, transposed)


def _low_rank(
    matrix: Tensor, update: Mapping[str, Tensor], config: AdapterConfig, module: str
) -> tuple[Tensor | None, Tensor | None, float]:
    """``A``, ``B`` and ``s`` of the module's update, as :meth:`LoRALinear.low_rank` gives them."""
    if "lambda_d" in update:
        d, b = update["lambda_d"], update["lambda_b"]
        rows, columns = config.resolved["projection"]
        pair = shared_pair(len(d), rows, columns, config.projection_seed)
        return *scaled_pair(pair, d, b, matrix.shape[1]), 1.0
    if "lora_A" not in update:
        return None, None, 1.0
    A, B = update["lora_A"], update["lora_B"]
    if "init_A" in update:
        A, B = torch.cat([A, update["init_A"]]), torch.cat([B, -update["init_B"]], dim=1)
    return A, ungrouped(A, B), config.scaling_of(module)


def _fits(matrix: Tensor, update: Mapping[str, Tensor], norm_axis: str, grouped: bool) -> bool:
    rows, columns = matrix.shape
    rank = own = len(update.get("lora_A", update.get("lambda_d", ())))
    if grouped and "lora_B" in update:
        own = update["lora_B"].shape[-1]  # the rank over the groups of a convolution
        if own == 0 or rank % own or rows % (rank // own):
            return False
    expected = {"lora_A": (rank, columns), "lora_B": (rows, own), "lambda_d": (rank,), "lambda_b": (rows,)}
    expected |= {"init_A": (rank, columns), "init_B": (rows, own)}
    expected["magnitude"] = (rows if norm_axis == "out" else columns,)
    return all(tuple(tensor.shape) == expected[part] for part, tensor in update.items())


def _checked(name: str, weight: Tensor, merged: Tensor) -> Tensor:
    """``merged``, if it is finite; a buffer of the base, as a mask of attention, may hold infinity rightly."""
    if weight.isfinite().all():
        check_finite({name: merged}, f"nothing is merged: of the merged weights, as {_plain(merged.dtype)}")
    return merged


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _does_not_fit(name: str, weight: Tensor, update: Mapping[str, Tensor]) -> ValueError:
    shapes = {part: tuple(tensor.shape) for part, tensor in update.items()}
    return ValueError(f"the adapter does not fit {name} {tuple(weight.shape)}: it has {shapes}")


def _write_tensor(writer: BinaryIO, tensor: Tensor) -> None:
    writer.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _in_file_order(header: bytes) -> Iterator[str]:
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    yield from sorted(entries, key=lambda name: entries[name]["data_offsets"][0])


def _group_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name of the base's weight -> the tensors that change it, by :data:`_PARTS`, or ``other`` for the whole of it."""
    updates: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        part, weight = (part, f"{module}.weight") if part in _PARTS else ("other", name)
        updates.setdefault(base_name(weight), {})[part] = tensor.detach().cpu()
    return updates


def _of_stored_weights(
    files: list[Path], updates: Mapping[str, dict[str, Tensor]], source: Path
) -> dict[str, dict[str, Tensor]]:
    """The updates without those of tied weights' further names, which files leave out and checkpoints hold."""
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            stored.update(weights.keys())
    present = {name: update for name, update in updates.items() if name in stored}
    whole = [update["other"] for update in present.values() if "other" in update]
    missing = sorted(name for name in updates.keys() - stored if not _is_among(updates[name].get("other"), whole))
    if missing:
        raise ValueError(
            f"{source} has no weight {missing[0]}"
            + (f" (nor {len(missing) - 1} more)" if len(missing) > 1 else "")
            + ", which the adapter belongs to: another base model, or a weight tied to another one"
        )
    return present


def _is_among(tensor: Tensor | None, others: list[Tensor]) -> bool:
    """Whether a trained weight is another one too. By value, since gathering from shards makes copies of it; vectors,
    which may well be alike, as biases that are zero, are tied nowhere."""
    return tensor is not None and tensor.ndim > 1 and any(torch.equal(tensor, other) for other in others)


def _config_of(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".bin.index.json")


def _check_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"the merged model takes {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free"
        )

"""What can be analysed: tuned folders, adapter checkpoints, PEFT's folders, and what a run wrote down itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_lightning.adapters.analysis import (
    LowRank,
    WeightChange,
    change_of_adapter,
    change_of_blocks,
    low_rank_update,
    row_blocks,
)
from dora_lightning.adapters.initialization import draws_from_weight, start_low_rank
from dora_lightning.adapters.peft_format import CONFIG_NAME, from_disk
from dora_lightning.adapters.peft_parsing import init_of, parse_folder
from dora_lightning.adapters.quantized import quantize_again, row_slabs
from dora_lightning.adapters.vera import scaled_pair, shared_pair
from dora_lightning.analyzing.base_model import BaseModel, matrix_shape, stored_matrix
from dora_lightning.analyzing.records import PATTERN_FILE, Record, make_record, read_records
from dora_lightning.analyzing.stored_weights import StoredWeights, is_matrix
from dora_lightning.pretrained import local_folder, weight_files
from dora_lightning.training.adapter_checkpoint import AdapterCheckpoint, read_adapter_checkpoint
from dora_lightning.training.base_identity import check_weight_of_base
from dora_lightning.training.stored_names import base_name

_PARTS = ("magnitude", "lora_A", "lora_B", "init_A", "init_B", "lambda_d", "lambda_b")
Wanted = Callable[[str], bool]


def collect(tuned: Sequence[str], base: str | None, wanted: Wanted) -> list[Record]:
    """The records of everything that is named, in the order of their steps.

    Args:
        tuned: run folders or their ``learning_pattern.jsonl``, adapter checkpoints, PEFT folders, model folders or hub
            ids.
        base: what they were tuned from, where they do not say.
        wanted: says of a module's name whether it is asked for.

    Raises:
        FileNotFoundError: something is not there.
        ValueError: the base is not known or another one, or nothing changed.
    """
    models: dict[str, BaseModel] = {}

    def base_of(recorded: str | None, name: str) -> BaseModel:
        chosen = base or recorded
        if not chosen:
            raise ValueError(f"{name} does not say what it was tuned from; give --base FOLDER or a hub id")
        if chosen not in models:
            models[chosen] = BaseModel(chosen, recorded_in=None if base else name)
        return models[chosen]

    records: list[Record] = []
    for place, name in enumerate(_expanded(tuned), start=1):
        path = Path(name).expanduser()
        if path.suffix == ".jsonl":
            found = [record for record in read_records(path) if wanted(record.module)]
        elif path.suffix == ".ckpt":
            adapter = read_adapter_checkpoint(path, mmap=True)
            found = list(_of_checkpoint(adapter.step, adapter, base_of(adapter.base["name"], name), wanted))
        elif (path / CONFIG_NAME).is_file():
            found = list(_of_peft(_step(path, place), path, base_of, wanted))
        else:
            found = list(_of_folder(_step(path, place), name, base_of(None, name), wanted))
        if not found:
            raise ValueError(f"{name}: none of the modules that are asked for differs from where training started")
        records += found
    if twice := [
        key for key, count in Counter((record.step, record.module) for record in records).items() if count > 1
    ]:
        step, module = twice[0]
        raise ValueError(f"two of {', '.join(tuned)} are of step {step} ({module}): analyse one run at a time")
    return sorted(records, key=lambda record: record.step)


def _expanded(tuned: Sequence[str]) -> Iterator[str]:
    """What was named; a run folder stands for its learning pattern, or else for its checkpoints."""
    for name in tuned:
        path = Path(name).expanduser()
        checkpoints = sorted((path / "checkpoints").glob("*.ckpt"))
        if (path / PATTERN_FILE).is_file():
            yield str(path / PATTERN_FILE)
        elif checkpoints:
            # the last one is often one of the others too
            steps = {read_adapter_checkpoint(path, mmap=True).step: str(path) for path in checkpoints}
            yield from (steps[step] for step in sorted(steps))
        else:
            yield name


def _step(path: Path, place: int) -> int:
    """What transformers' Trainer says of a folder of its own; else its place among those that were named."""
    state = path / "trainer_state.json"
    return int(json.loads(state.read_text(encoding="utf-8"))["global_step"]) if state.is_file() else place


def _of_folder(step: int, name: str, base: BaseModel, wanted: Wanted) -> Iterator[Record]:
    tuned = StoredWeights(weight_files(local_folder(name)))
    shared = [(key, module) for key, module in base.matrices() if key in tuned]
    if not shared:
        raise ValueError(f"{name} and {base.name} have no weights of the same names: they are not of one model")
    for key, module in shared:
        if not wanted(module):
            continue
        if tuned.shape(key) != base.weights.shape(key):
            raise ValueError(
                f"{key} is {list(base.weights.shape(key))} in {base.name} and {list(tuned.shape(key))} in {name}: "
                "another base model, or a resized vocabulary; leave it out with --modules"
            )
        pairs = zip(base.weights.blocks(key), tuned.blocks(key), strict=True)
        change = change_of_blocks(((old, new) for (_, old), (_, new) in pairs), not base.transposed(module))
        if change != WeightChange(0.0, 0.0):  # what did not train is as it was
            yield make_record(step, module, "merged", change)


def _of_checkpoint(step: int, adapter: AdapterCheckpoint, base: BaseModel, wanted: Wanted) -> Iterator[Record]:
    config = adapter.config
    for module, parts in _by_module(adapter.tensors).items():
        if not wanted(module):
            continue
        weight_name = module if module in adapter.tensors else f"{module}.weight"
        key = base.key_of(adapter.base.get("stored_names", {}).get(weight_name, weight_name))
        if key is None:
            if "other" in parts:
                continue  # a new part of the model, or a further name of a tied weight
            raise ValueError(f"{base.name} has no weight {weight_name}, which the adapter belongs to")
        if "other" in parts:
            weight = parts["other"]
            if not is_matrix(tuple(weight.shape), base.module(module)):
                continue
            pairs = zip(base.weights.blocks(key), row_blocks(weight), strict=True)
            change = change_of_blocks(((old.to(new), new) for (_, old), (_, new) in pairs), not base.transposed(module))
            yield make_record(step, module, "full", change)
            continue
        whole = base.weights.whole(key)
        blocks = row_blocks(whole)
        scheme = adapter.base.get("quantized", {}).get(weight_name)
        if scheme is None:
            check_weight_of_base(adapter.base, weight_name, whole, base.name)
        else:
            layer = quantize_again(whole, scheme)
            check_weight_of_base(adapter.base, weight_name, layer, base.name)
            blocks = ((rows.start, slab) for rows, slab in row_slabs(layer))
        transposed = module in config.resolved.get("transposed", ())
        low_rank = None
        if "lambda_d" in parts:
            most_rows, most_columns = config.resolved["projection"]
            pair = shared_pair(len(parts["lambda_d"]), most_rows, most_columns, config.projection_seed)
            _, columns = matrix_shape(whole.shape, transposed)
            low_rank = LowRank(*scaled_pair(pair, parts["lambda_d"], parts["lambda_b"], columns), 1.0)
        elif "lora_A" in parts:
            low_rank = low_rank_update(parts, config.scaling_of(module))
        change = change_of_adapter(blocks, low_rank, parts.get("magnitude"), config.norm_axis, transposed)
        method = config.method if low_rank is not None else "magnitude"
        yield make_record(step, module, method, change)


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name of a module -> the tensors that change its weight by their names, or ``other`` for the whole of it."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            found.setdefault(module, {})[part] = tensor
        else:
            found.setdefault(base_name(name).removesuffix(".weight"), {})["other"] = tensor
    return found


def _of_peft(
    step: int, folder: Path, base_of: Callable[[str | None, str], BaseModel], wanted: Wanted
) -> Iterator[Record]:
    try:
        contents = parse_folder(folder)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    options = contents.options
    base = base_of(options.get("base_model_name_or_path"), str(folder))
    keys = {name: base.key_of(f"{name}.weight") for name in contents.modules}
    if absent := [name for name, key in keys.items() if key is None]:
        raise ValueError(f"{base.name} has no weight {absent[0]}.weight, which the adapter in {folder} belongs to")
    shapes = {name: base.weights.shape(key) for name, key in keys.items() if key is not None}
    flipped = {
        name: base.transposed(name) or module.lookup or bool(options.get("fan_in_fan_out"))
        for name, module in contents.modules.items()
    }
    matrices = {name: matrix_shape(shape, flipped[name]) for name, shape in shapes.items()}
    for name, module in contents.modules.items():
        if not wanted(name):
            continue
        layer = base.module(name) or nn.Identity()
        parts: dict[str, Any] = {part: from_disk(part, tensor, layer) for part, tensor in module.tensors.items()}
        rows, columns = matrices[name]
        weight = base.weights.whole(keys[name] or "")
        low_rank = None
        if module.vera:
            most_rows, most_columns = (max(sizes) for sizes in zip(*matrices.values(), strict=True))
            pair = shared_pair(module.rank, most_rows, most_columns, options["projection_prng_key"])
            low_rank = LowRank(*scaled_pair(pair, parts["lambda_d"], parts["lambda_b"], columns), 1.0)
        elif "lora_A" in parts and module.method != "magnitude":
            init = init_of(options)
            if draws_from_weight(init):
                # PEFT takes them out of the weight when it loads the adapter
                parts |= {"init_A": torch.empty(module.rank, columns), "init_B": torch.empty(rows, module.rank)}
                matrix = stored_matrix(weight, flipped[name])
                start_low_rank(parts["init_A"], parts["init_B"], init, matrix, module.scaling)
            low_rank = low_rank_update(parts, module.scaling)
        change = change_of_adapter(row_blocks(weight), low_rank, parts.get("magnitude"), "out", flipped[name])
        yield make_record(step, name, module.method, change)

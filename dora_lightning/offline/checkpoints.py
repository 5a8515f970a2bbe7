"""The model that an adapter checkpoint belongs to, built from what the file says, which may be anybody's.

A checkpoint chooses among what is listed here, and names a base model that must be on this machine already. It has no
say in what is imported, fetched or run.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any, get_args

from dora_lightning.adapters import AdapterConfig
from dora_lightning.backbones import Backbone, DoRALlama, DoRALlava, DoRAVLBart
from dora_lightning.backbones.llava import Training
from dora_lightning.llava_parts import LlavaParts, resolve_llava
from dora_lightning.pretrained import QUANTIZATIONS, resolve_recorded
from dora_lightning.training.adapter_checkpoint import AdapterCheckpoint, read_adapter_checkpoint
from dora_lightning.training.checkpoint_files import load_checkpoint_file
from dora_lightning.vl_bart import VLBartParts, resolve_vl_bart

_KINDS: dict[str, type[Backbone]] = {kind.__name__: kind for kind in (DoRALlama, DoRALlava, DoRAVLBart)}
# hyperparameters that are taken from a file, and their values; transformers would run an attention of any other name
_CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attn_implementation": (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
    "quantization": (None, *QUANTIZATIONS),
    "vision_tower": get_args(Training),
    "projector": get_args(Training),
}


def base_of(path: str, adapter: AdapterCheckpoint, base: str | None) -> str:
    """The base model of a checkpoint. One that was put together from parts is so again where it is not there any more.

    Args:
        path: the checkpoint file.
        adapter: what it holds.
        base: what the user says, which may be fetched; None for what the file says, which is looked up on this machine.

    Raises:
        FileNotFoundError: the model is not to be had.
        ValueError: the file does not say what it was put together from.
    """
    recorded = adapter.base["name"]
    resolve: Callable[..., str] | None
    parts: Any
    resolve, parts = {
        DoRALlava.__name__: (resolve_llava, LlavaParts),
        DoRAVLBart.__name__: (resolve_vl_bart, VLBartParts),
    }.get(adapter.backbone, (None, None))
    if base is not None:
        return base if resolve is None else resolve(base)
    if resolve is None or os.path.isdir(str(recorded)):
        return resolve_recorded(recorded, path)
    source = adapter.options.get("model_name_or_path", recorded)
    try:
        parts = parts(**source) if isinstance(source, dict) else str(source)
    except TypeError as error:
        raise ValueError(f"{path}: model_name_or_path does not describe a model: {error}") from error
    return resolve(parts, path)


def load_backbone(path: str, base: str | None) -> tuple[Backbone, dict[str, Any]]:
    """The backbone of a checkpoint with its trained weights, on the CPU, and how the model's inputs were made.

    Args:
        path: the checkpoint file.
        base: as for :func:`base_of`.

    Raises:
        FileNotFoundError: the base model is not to be had.
        ValueError: it is no adapter checkpoint of a backbone, a hyperparameter has a value that is not taken from a
            file, or the base is another one.
    """
    adapter = read_adapter_checkpoint(path)
    # a subclass of one's own, and one that was written before there were several, is a language model
    kind = _KINDS.get(adapter.backbone, DoRALlama)
    if not isinstance(adapter.options.get("adapter"), dict):
        raise ValueError(
            f"{path} was written by {adapter.backbone or 'a module'}, which is none of the backbones "
            f"({', '.join(_KINDS)}): load it in a program of your own"
        )
    options: dict[str, Any] = {}
    for name in inspect.signature(kind).parameters.keys() & adapter.options.keys():
        value = adapter.options[name]
        if name in _CHOICES:
            if not isinstance(value, (str, type(None))) or value not in _CHOICES[name]:
                known = ", ".join(str(choice) for choice in _CHOICES[name])
                raise ValueError(f"{path}: {name} is {value!r:.80}; of a checkpoint it may be {known}")
            options[name] = value
        elif name == "also_trained":
            options[name] = [str(part) for part in value]
    try:
        config = AdapterConfig(**adapter.options["adapter"])
    except TypeError as error:
        raise ValueError(f"{path}: the adapter's config is not one of this version: {error}") from error
    backbone = kind(base_of(path, adapter, base), config, **options)
    checkpoint = load_checkpoint_file(path)
    backbone.on_load_checkpoint(checkpoint)
    backbone.load_state_dict(checkpoint["state_dict"], strict=False)  # on_load_checkpoint has compared the names
    return backbone, adapter.inputs

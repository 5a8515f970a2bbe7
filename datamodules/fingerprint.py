"""Digests of what a run is trained on, by which a run that goes on notices that it is something else."""

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import PurePath
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dora_lightning.data import Sample


def fingerprint(items: Iterable[Any]) -> dict[str, str]:
    """Digests of encoded samples in their order: of all that is text, and of their tokens and labels.

    Images count by their file's name, so that a data set may move to another folder; one that is no file counts by its
    class. Rows as they were read (fields named ``row``) do not count, and what was ``cut`` off shows in the tokens.
    """
    texts, tokens = sha256(), sha256()
    for item in items:
        found: list[torch.Tensor] = []
        texts.update(repr(_plain(item, found)).encode("utf-8", "surrogatepass"))
        for tensor in found:
            array = tensor.contiguous().numpy()
            tokens.update(f"{array.dtype.str}{array.shape}".encode())
            tokens.update(array)
    return {"samples": texts.hexdigest(), "tokens": tokens.hexdigest()}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the vocabulary, the special tokens and, of a fast tokenizer, all that turns texts into tokens."""
    content: dict[str, Any] = {"special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()}}
    if tokenizer.is_fast:
        # how texts are padded and cut is set by each call
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    else:
        content["vocabulary"] = tokenizer.get_vocab()
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(value: Any, tensors: list[torch.Tensor]) -> Any:
    """Text and numbers of a sample; its tensors are put into a list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return None
    if isinstance(value, Sample):
        texts = (value.prompt, value.target, value.options, value.references, value.answered, value.source)
        return (*texts, *map(_image, value.images))
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return tuple((str(name), _plain(part, tensors)) for name, part in value.items())
    if isinstance(value, tuple):
        names = getattr(value, "_fields", ())
    else:
        names = getattr(type(value), "__slots__", None) or [*getattr(value, "__dict__", ())]
    if not names:
        parts = value if isinstance(value, (list, tuple)) else ()
        return (type(value).__name__, *(_plain(part, tensors) for part in parts))
    return tuple(
        tuple(map(_image, getattr(value, name))) if name == "images" else _plain(getattr(value, name), tensors)
        for name in names
        if name not in ("row", "cut")
    )


def _image(image: Any) -> str:
    return PurePath(image).name if isinstance(image, (str, PurePath)) else type(image).__name__

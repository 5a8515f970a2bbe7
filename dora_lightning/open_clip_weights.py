"""Weights of open_clip's vision towers: where they are, and how they get into a tower."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def plain_name(name: str) -> str:
    """An architecture's name as open_clip's files have it, whose own spelling is OpenAI's: ViT-B/32 is ViT-B-32."""
    return name.replace("/", "-")


def weights_file(name: str | None, pretrained: str, tag: dict[str, Any]) -> Path:
    """The file of weights, downloaded if need be.

    Args:
        name: the architecture; None for a tower that is described by its fields.
        pretrained: tag of open_clip's weights, or a file.
        tag: what open_clip knows of the tag; empty if it is none.

    Raises:
        FileNotFoundError: there is no such file or tag, or it cannot be downloaded.
    """
    import open_clip

    if not tag:
        path = Path(pretrained).expanduser()
        if path.is_file():
            return path
        tags = open_clip.list_pretrained_tags_by_model(plain_name(name)) if name else []
        known = f"a tag of {name} ({', '.join(tags)}) or a file" if tags else "a file"
        raise FileNotFoundError(f"pretrained: no weights {pretrained!r}: expected {known}")
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:
        raise FileNotFoundError(
            f"pretrained: the weights {pretrained!r} of {name} could not be downloaded ({error}); "
            "the path of a file with them will do as well"
        ) from error


def load_weights(tower: nn.Module, path: Path, name: str, dropped: Collection[str]) -> None:
    """Load a whole CLIP's weights, or a vision tower's, into a tower.

    Args:
        tower: the module that holds open_clip's tower as ``visual``.
        path: the file.
        name: what the tower is called, for messages.
        dropped: parts of ``visual`` that the tower does not have.

    Raises:
        ValueError: the file is broken, or its weights do not fit.
    """
    from open_clip.model import resize_pos_embed

    weights = _read_weights(path)
    prefix = "visual."
    # a file of the tower alone has names without the prefix
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    weights = {f"{prefix}{key}": tensor for key, tensor in weights.items() if key.split(".")[0] not in dropped}
    # a transformer's positions are interpolated where the config asks for another image size than the weights had
    resize_pos_embed(weights, tower)
    try:
        tower.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the vision tower of {name}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    from open_clip.factory import load_state_dict

    try:
        weights = load_state_dict(str(path))
    except Exception as error:
        weights = _read_torchscript(path)
        if weights is None:
            raise ValueError(f"{path}: not a file of weights that open_clip reads: {error}") from error
    return weights


def _read_torchscript(path: Path) -> dict[str, Tensor] | None:
    """Weights of a TorchScript archive, which is what OpenAI's own files are; None if the file is none."""
    try:
        with warnings.catch_warnings():
            # deprecated, but nothing else reads such a file
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(str(path), map_location="cpu").state_dict()
    except RuntimeError:
        return None

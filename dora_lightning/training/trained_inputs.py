"""How a run made the inputs of its model out of text, images and videos, so that the finished model is asked alike.

A datamodule says it by a method ``trained_inputs() -> dict`` of plain values, which checkpoints keep and merged folders
have in a file. Known names are ``prompt`` (a text with ``{prompt}``), ``image_aspect_ratio``, ``exif_rotation``,
``frames``, ``every``, ``grid_rows`` and ``video_rows``; others are compared, and used by nobody.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

INPUTS_FILE = "trained_inputs.json"


def inputs_of(trainer: Trainer | None) -> dict[str, Any]:
    """What the Trainer's datamodule says; empty without one that says it."""
    says = getattr(getattr(trainer, "datamodule", None), "trained_inputs", None)
    return dict(says()) if says is not None else {}


def read_inputs(folder: str | Path) -> dict[str, Any]:
    """What a merged folder says; empty if it says nothing.

    Raises:
        ValueError: its file is broken.
    """
    path = Path(folder, INPUTS_FILE)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}; merge the checkpoint again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, found {type(found).__name__}; merge the checkpoint again")
    return found


def differences(trained: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for each value of now that differs from what was trained; what one of the two does not say is left out.

    >>> list(differences({"frames": 8, "exif_rotation": True}, {"frames": 4, "exif_rotation": True}))
    ['frames is 4, and the model was trained with 8']
    """
    for name in now:
        if name in trained and trained[name] != now[name]:
            yield f"{name} is {now[name]!r}, and the model was trained with {trained[name]!r}"

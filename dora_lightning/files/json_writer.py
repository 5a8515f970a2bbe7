"""JSON as bytes of a file, whatever the values are: what has been computed is not lost for a character."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as UTF-8 JSON.

    NaN and infinity, which are no JSON, become null. Half of a surrogate pair, which UTF-8 cannot hold, is written as
    JSON's escape ``\\ud83d``; tensors and arrays as lists; what is no JSON otherwise as its text.

    >>> json_bytes({"loss": float("nan"), "steps": 3})
    b'{"loss": null, "steps": 3}'
    """
    dump = partial(json.dumps, ensure_ascii=False, indent=indent, default=_plain, allow_nan=False)
    try:
        text = dump(value)
    except ValueError:
        text = dump(_without_nonfinite(value))
    return text.encode("utf-8", "backslashreplace")


def json_lines(rows: Iterable[Any]) -> bytes:
    """Values as UTF-8 JSONL; see :func:`json_bytes`."""
    return b"".join(json_bytes(row) + b"\n" for row in rows)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    return _without_nonfinite(value.tolist()) if hasattr(value, "tolist") else value

"""JSON as bytes of a file, whatever the values are: what has been computed is not lost for a character."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """A value as UTF-8 JSON.

    Half of a surrogate pair, which UTF-8 cannot hold, is written as JSON's escape ``\\ud83d``; tensors and arrays as
    lists; what is no JSON otherwise as its text.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=_plain)
    return text.encode("utf-8", "backslashreplace")


def json_lines(rows: Iterable[Any]) -> bytes:
    """Values as UTF-8 JSONL; see :func:`json_bytes`."""
    return b"".join(json_bytes(row) + b"\n" for row in rows)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)

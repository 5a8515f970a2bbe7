"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Let ``write`` fill a file beside ``path`` and rename it, so that no reader and no crash sees half of it.

    What a process that was killed in the midst of it has left behind is removed.
    """
    prefix = f".{path.name}.partial-"
    for leftover in path.parent.glob(f"{prefix}*"):
        leftover.unlink(missing_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """As :func:`write_atomically`, for a content that is there already."""

    def write(file: IO[bytes]) -> None:
        file.write(content)

    write_atomically(path, write)


def write_text_atomically(path: Path, text: str) -> None:
    """As :func:`write_atomically`, for a text in UTF-8."""
    write_bytes_atomically(path, text.encode())

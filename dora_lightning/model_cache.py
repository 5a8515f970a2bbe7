"""Keeps models that were converted or put together: in ``$DORA_LIGHTNING_CACHE``, or ``~/.cache/dora-lightning``."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """The cache."""
    return Path(os.environ.get("DORA_LIGHTNING_CACHE", "~/.cache/dora-lightning")).expanduser()


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``make`` if it is not there; nobody sees half of it.

    Args:
        folder: inside the cache.
        make: fills the folder it is given, which does not exist yet.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        make(made)
        try:
            os.replace(made, folder)
        except OSError:
            if not folder.is_dir():  # another process may have come first with the same one
                raise
    return folder


def digest(*parts: object) -> str:
    """A short name for what a cached folder was made from."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:12]


def file_stamp(path: Path) -> str:
    """Path, size and time of a file: another one if it was changed."""
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"

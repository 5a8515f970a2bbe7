"""Keeps models that were converted or put together: in ``$DORA_LIGHTNING_CACHE``, or ``~/.cache/dora-lightning``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from dora_lightning.files import write_folder

_READ = (".bin", ".json", ".model", ".safetensors", ".txt", ".jinja")


def cache_folder() -> Path:
    """The cache."""
    return Path(os.environ.get("DORA_LIGHTNING_CACHE", "~/.cache/dora-lightning")).expanduser()


def cached(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``make`` if it is not there; nobody sees half of it.

    Args:
        folder: inside the cache.
        make: fills the folder it is given, which exists.
    """
    if not folder.is_dir():
        try:
            write_folder(folder, make)
        except OSError:
            if not folder.is_dir():  # another process may have come first with the same one
                raise
    return folder


def digest(*parts: object) -> str:
    """A short name for what a cached folder was made from."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).hexdigest()[:12]


def file_stamp(path: Path) -> str:
    """Path, size and times of a file: another one if it was changed, even by a copy that keeps the time of writing."""
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def folder_stamps(folder: Path) -> list[str]:
    """Stamps of what is read of a model's folder: weights, configs and tokenizers."""
    return [file_stamp(path) for path in sorted(folder.iterdir()) if path.suffix in _READ]

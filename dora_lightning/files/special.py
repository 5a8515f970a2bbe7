"""Paths that are no files to read: a reader would wait for a named pipe for ever, and a device has no end."""

from __future__ import annotations

import stat
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def special_file(path: str | Path) -> str | None:
    """What stands at ``path`` in place of a file to read, such as ``a named pipe``; None for a file. Opens nothing.

    Raises:
        OSError: there is nothing, or nothing that may be looked at.
    """
    mode = Path(path).stat().st_mode
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "something that is no file")

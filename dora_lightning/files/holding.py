"""Whether an open file is held by a living process: a lock of the operating system, which ends with its process."""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def hold(descriptor: int) -> bool:
    """Hold an open file until it is closed; False if another process, or another opening of the file, holds it.

    On a file system without locks nothing is held, and :func:`is_held` takes every file there for held.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_held(path: Path) -> bool:
    """Whether a living process holds the file. True where nobody can tell, False if the file is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)  # NFS locks only what is open for writing
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        if fcntl is None:
            return True
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False

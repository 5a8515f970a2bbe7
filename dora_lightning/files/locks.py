"""A lock that ends with the processes that hold it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO
from weakref import WeakSet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class NoLocksError(OSError):
    """The file system has no locks."""


class FolderLock:
    """A lock file that one process holds, and the processes it hands the file to.

    A process that is forked, as a loader's worker is, does not hold it.

    The operating system holds the lock for as long as the file is open in any of them, so that a process that was
    killed leaves none behind, while a run that outlives the process that started it keeps its own. The file says who
    it is.

    Args:
        path: the lock file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock, or say that another process has it.

        Args:
            wait: until it is free.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115  # open for as long as the lock is held
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.close()
                return False
            except OSError as error:
                file.close()
                raise NoLocksError(
                    f"{self.path}: this file system has no locks ({error}); put the study elsewhere"
                ) from error
        self._file = file
        _HELD.add(self)
        self.note(os.getpid())
        return True

    def note(self, pid: int) -> None:
        """Write into the file which process is at it."""
        assert self._file is not None
        self._file.truncate(0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        self._file.write(json.dumps({"pid": pid, "host": socket.gethostname(), "since": started}) + "\n")
        self._file.flush()

    @property
    def descriptor(self) -> int:
        """For a child process that is to hold the lock too (``pass_fds``)."""
        assert self._file is not None
        return self._file.fileno()

    def release(self) -> None:
        """Close the file here; a child that holds it keeps the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def holder(self) -> str | None:
        """Who holds the lock, or None if nobody does."""
        if self._file is not None or not self.path.is_file() or not self._is_taken():
            return None
        try:
            found = json.loads(self.path.read_text())
            return f"process {found['pid']} on {found['host']}, since {found['since']}"
        except (ValueError, KeyError):
            return "another process"

    def _is_taken(self) -> bool:
        if fcntl is None:
            return False
        with self.path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


_HELD: WeakSet[FolderLock] = WeakSet()


def _release_all() -> None:
    for lock in list(_HELD):
        lock.release()


if hasattr(os, "register_at_fork"):
    # closing the file in the child leaves the parent's lock alone
    os.register_at_fork(after_in_child=_release_all)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock, waiting for it."""
    lock = FolderLock(path)
    lock.acquire(wait=True)
    try:
        yield
    finally:
        lock.release()

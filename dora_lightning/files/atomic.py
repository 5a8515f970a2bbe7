"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from dora_lightning.files.holding import hold, is_held

# a name that is as long as the file system allows leaves room for no ending
_LONGEST = 200


@contextlib.contextmanager
def open_atomically(path: Path, durable: bool = True, tidy: bool = True) -> Iterator[IO[bytes]]:
    """Open a file beside ``path`` that takes its place at the end, so that no reader and no crash sees half of it.

    After an error nothing is left and ``path`` is as it was. What a process that was killed has left behind is removed;
    the file of a process that is still writing is not. The file's mode is what the user's umask says. A device or a
    pipe is written into as it is.

    Args:
        path: the file.
        durable: wait until the content is on disk. Not needed for what can be computed again.
        tidy: look for leftovers, which takes long in a folder of very many files; see :func:`remove_leftovers`.

    Raises:
        OSError: it could not be written; the error names ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; expected the name of a file to write", str(path))
    if path.exists() and not path.is_file():
        with _naming(path), open(path, "wb") as file:
            yield file
        return
    with _naming(path):
        if tidy:
            remove_leftovers(path.parent, path.name)
        partial, descriptor = _partial_file(path)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(descriptor)
                if os.name == "nt":
                    file.close()  # what is open cannot be renamed there
                os.replace(partial, path)
            if durable:
                sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], durable: bool = True, tidy: bool = True) -> None:
    """Let ``write`` fill a file that takes the place of ``path``; see :func:`open_atomically`."""
    with open_atomically(path, durable, tidy) as file:
        write(file)


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write ``content``, all of it or nothing; see :func:`open_atomically`."""
    write_atomically(path, lambda file: file.write(content))


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text in UTF-8, all of it or nothing; see :func:`open_atomically`."""
    write_bytes_atomically(path, text.encode())


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the files that killed processes have left of what they were writing in ``folder``.

    Args:
        folder: the folder itself, without its subfolders.
        name: of the one file to look for; by default any.
    """
    start = None if name is None else partial_prefix(name)
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            is_partial = entry.name.startswith(start) if start else entry.name[0] == "." and ".partial-" in entry.name
            if is_partial and entry.is_file(follow_symlinks=False) and not is_held(Path(entry.path)):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def partial_prefix(name: str) -> str:
    """How the names of unfinished files and folders begin that are to become ``name``."""
    return f".{os.fsdecode(os.fsencode(name)[:_LONGEST])}.partial-"


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on disk, where the system can do so."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial_file(path: Path) -> tuple[Path, int]:
    """A new file beside ``path`` that this process holds."""
    while True:
        partial = path.with_name(f"{partial_prefix(path.name)}{secrets.token_hex(4)}")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(partial, flags, 0o666)
        except FileExistsError:
            continue
        # one that looks for leftovers may have come upon it before it was held
        if hold(descriptor) and partial.exists():
            return partial, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an error of the operating system name the file that was asked for."""
    try:
        yield
    except OSError as error:
        named = str(error.filename) if error.filename is not None else None
        if error.errno is not None and (named is None or partial_prefix(path.name) in named):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise

"""Outputs of long jobs: looked at before the work, and kept line by line as it is done."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from dora_lightning.files.json_writer import json_lines


def check_writable(path: Path) -> None:
    """See whether a file can be written at ``path``; nothing is left behind, and no folder is made.

    Raises:
        OSError: it cannot; the message names ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")
    try:
        # folders that are not there yet will be made in the first one that is
        with tempfile.TemporaryFile(dir=next(parent for parent in path.parents if parent.exists())):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


class GrowingFile:
    """A file of JSON lines, each of which is on the disk as a whole when :meth:`append` returns.

    A line that a killed process has left half-written at the end is removed. Threads may share it.

    Args:
        path: the file; it and its folder are made at the first line.

    Raises:
        OSError: it cannot be written; the message names ``path``.
        ValueError: there is a file already, of something else.
    """

    def __init__(self, path: Path) -> None:
        check_writable(path)
        self.path = path
        self._lock = Lock()
        if path.is_file():
            _mend_end(path)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add a line of JSON for each row, all of them or none.

        Raises:
            OSError: the disk is full, for one; the message names the file, which holds whole lines still.
        """
        content = json_lines(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, open(self.path, "ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(content) != len(content):
                    raise OSError("only a part could be written")
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(end)
                raise OSError(f"{self.path} could not be written: {error}") from error


def _mend_end(path: Path) -> None:
    """Let a file end with a whole line.

    Raises:
        ValueError: it is no file of JSON lines, and nothing is to be done to it.
    """
    with open(path, "rb+") as file:
        content = file.read()
        if content and not content.lstrip().startswith(b"{"):
            raise ValueError(f"{path} is no file of JSON lines, to which more could be added; name another file")
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        try:
            json.loads(content[whole:])
            file.write(b"\n")  # written by hand, without one at the end
        except ValueError:
            file.truncate(whole)

"""Folders that are there whole or not at all, and that are replaced and removed only if this project wrote them.

Each folder that :func:`write_folder` makes holds a marker that lists its files. A folder without a marker, or with a
file that is not on its list, is never replaced or removed: a file goes only if its name is on the list. An older folder
gives way by two renames, so that one whole copy is there at each moment; what a crash between them leaves is put back.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from dora_lightning.files.atomic import partial_prefix, sync_folder, write_text_atomically
from dora_lightning.files.holding import hold, is_held

MARKER = ".dora-lightning.json"
"""File in a folder that this project made: ``id`` of that making, and ``files``, the names of all files in it."""


def write_folder(
    folder: Path, write: Callable[[Path], object], overwrite: bool = False, keep: Iterable[Path] = ()
) -> None:
    """Let ``write`` fill a new folder that takes the place of ``folder``; nobody sees half of it.

    What a process that was killed in the midst of it has left behind is removed, or put back if it is the only copy.

    Args:
        folder: the folder.
        write: fills the folder it is given, which exists and is empty but for the marker.
        overwrite: replace a folder that is there, see :func:`check_folder`.
        keep: files and folders that must not be replaced: what the new one is made from.

    Raises:
        FileExistsError: ``folder`` may not be replaced. It is as it was, after this and any other error.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    tidy_folder(folder)
    check_folder(folder, overwrite, keep)
    partial, marker = _partial_folder(folder)
    with marker:
        try:
            write(partial)
            _finish(partial, marker)
            _swap(partial, folder, overwrite, keep)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    sync_folder(folder.parent)


def check_folder(folder: Path, overwrite: bool, keep: Iterable[Path] = ()) -> None:
    """See whether :func:`write_folder` could make ``folder``, before the work that fills it.

    Raises:
        FileExistsError: there is one that may not be replaced: ``overwrite`` is false, it is not this project's, it
            holds other files too, it is a link, or it holds something that must be kept.
    """
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a symbolic link to {os.readlink(folder)}; name the folder itself")
    place = folder.resolve()
    for kept in (*keep, Path.cwd(), Path(os.path.expanduser("~"))):
        if kept.resolve().is_relative_to(place):
            raise FileExistsError(f"{folder} is or holds {kept}, which is still needed; choose another folder")
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists; choose another folder or pass overwrite")
    if reason := _not_removable(folder):
        raise FileExistsError(f"{folder} is not replaced: {reason}; choose another folder, or move or delete this one")


def remove_folder(folder: Path) -> bool:
    """Remove a folder that :func:`write_folder` made; one that is not, or holds other files too, stays, with a warning.

    Returns:
        Whether it is gone.
    """
    reason = "it is a symbolic link" if folder.is_symlink() else _not_removable(folder)
    if reason:
        warnings.warn(f"{folder} is not removed: {reason}", stacklevel=2)
        return False
    _remove_listed(folder)
    return not folder.exists()


def adopt_folder(folder: Path, files: Iterable[str]) -> None:
    """Put a marker into a folder that an older version made without one, if it holds no other files than these."""
    if not (folder / MARKER).exists() and set(_files(folder)) <= set(files):
        content = {"id": secrets.token_hex(4), "files": _files(folder)}
        write_text_atomically(folder / MARKER, json.dumps(content, indent=1))


def tidy_folder(folder: Path) -> None:
    """Put back, or remove, what processes that were killed have left of ``folder``."""
    for old in _left(folder, _old_prefix(folder)):
        if not folder.exists() and not folder.is_symlink():
            old.rename(folder)  # killed between the two renames: this is the only copy
        elif _marker_of(folder)["id"] == _id_in(old.name):
            _remove_listed(old)  # killed after them: what replaced it is in its place
        else:
            warnings.warn(f"{old} is left of a process that was killed, and is kept: move or delete it", stacklevel=3)
    for partial in _left(folder, partial_prefix(folder.name)):
        shutil.rmtree(partial, ignore_errors=True)


def _not_removable(folder: Path) -> str | None:
    if not folder.is_dir():
        return "it is a file"
    present = _files(folder)
    if (folder / MARKER).is_file():
        listed = _marker_of(folder)["files"]
        if others := [name for name in present if name not in listed]:
            more = f" and {len(others) - 1} more files" if len(others) > 1 else ""
            return f"it holds {others[0]}{more}, which dora-lightning did not write there"
        return None
    if present:
        return f"it holds {present[0]} and no {MARKER}, so that it is not known to be made by dora-lightning"
    return None


def _files(folder: Path) -> list[str]:
    """Names of all files and links in ``folder`` and its subfolders but the marker, sorted."""
    found = []
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*names, *links)]
    return sorted(name for name in found if name != MARKER)


def _marker_of(folder: Path) -> dict[str, Any]:
    """What the marker says; nothing is listed where it is missing or broken, as in a folder that is not finished."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return {"id": str(found["id"]), "files": set(found["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"id": None, "files": set()}


def _remove_listed(folder: Path) -> None:
    """Remove the files on the marker's list, the marker, and folders that are empty then."""
    listed = _marker_of(folder)["files"]
    for name in _files(folder):
        if name in listed:
            with contextlib.suppress(OSError):
                (folder / name).unlink()
    if not _files(folder):
        shutil.rmtree(folder)  # empty folders and the marker


def _partial_folder(folder: Path) -> tuple[Path, IO[str]]:
    """A new folder beside ``folder``, and its marker, which this process holds."""
    while True:
        partial = folder.with_name(f"{partial_prefix(folder.name)}{secrets.token_hex(4)}")
        try:
            partial.mkdir()
            marker = open(partial / MARKER, "x+", encoding="utf-8")  # noqa: SIM115  # open as long as it is written
        except (FileExistsError, FileNotFoundError):
            continue
        if hold(marker.fileno()) and (partial / MARKER).exists():
            return partial, marker
        marker.close()


def _finish(partial: Path, marker: IO[str]) -> None:
    """List the files, and have all of it on disk."""
    files = _files(partial)
    marker.seek(0)
    marker.truncate()
    json.dump({"id": _id_in(partial.name), "files": files}, marker, indent=1)
    marker.flush()
    os.fsync(marker.fileno())
    if os.name == "nt":
        marker.close()  # a folder with an open file cannot be renamed there
        return
    for name in files:
        if not (partial / name).is_symlink():
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
    for place, _, _ in os.walk(partial):
        sync_folder(Path(place))


def _swap(partial: Path, folder: Path, overwrite: bool, keep: Iterable[Path]) -> None:
    check_folder(folder, overwrite, keep)  # again: the work may have taken hours
    if not folder.exists():
        partial.rename(folder)
        return
    # its name says what replaces it, so that whoever finds both knows that it is not needed any more
    old = folder.with_name(f"{_old_prefix(folder)}{_id_in(partial.name)}")
    with _held_marker(folder):
        folder.rename(old)
        try:
            partial.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        _remove_listed(old)
    if old.exists():
        warnings.warn(f"{old} is what {folder} was before; not all of it could be removed", stacklevel=2)


@contextlib.contextmanager
def _held_marker(folder: Path) -> Iterator[None]:
    """Hold the marker of a folder that gives way, so that no other process takes it for a crash's leftover."""
    if os.name == "nt" or not (folder / MARKER).exists():  # an empty folder has none
        yield
        return
    with open(folder / MARKER, "r+", encoding="utf-8") as marker:
        if not hold(marker.fileno()):
            raise FileExistsError(f"{folder} is being replaced by another process; choose another folder")
        yield


def _old_prefix(folder: Path) -> str:
    return partial_prefix(folder.name).removesuffix("partial-") + "old-"


def _id_in(name: str) -> str:
    return name.rpartition("-")[2]


def _left(folder: Path, prefix: str) -> list[Path]:
    """Folders beside ``folder`` of that name that have a marker which no process holds."""
    named = [path for path in folder.parent.iterdir() if path.name.startswith(prefix)]
    return [path for path in named if (path / MARKER).is_file() and not is_held(path / MARKER)]

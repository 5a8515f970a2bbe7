"""Read checkpoint files: every byte is checked, nothing is unpickled, and a file that cannot be read is named."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RUN_KEY = "dora_lightning_run"
"""Entry of a checkpoint: the id of the run that saved it, and the config it had."""

_PICKLE = b"\x80"
_CHUNK = 1 << 24
_CHECKED: set[tuple[str, int, int]] = set()


def load_checkpoint_file(
    path: str | Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False
) -> dict[str, Any]:
    """The content of a checkpoint, after its checksums were compared.

    ``torch.save`` writes a zip archive with a checksum of each record, which ``torch.load`` does not look at: a flipped
    byte in a weight would be loaded as another number.

    Args:
        path: the file.
        map_location: as in ``torch.load``.
        weights_only: False unpickles whatever the file holds, which runs code of whoever wrote it.
        mmap: leave tensors in the file until they are used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short, damaged or no checkpoint, or holds Python objects; the message has the way out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    check_checksums(path)
    return _load(path, map_location, weights_only, mmap)


def check_checksums(path: str | Path) -> None:
    """Refuse a file that is not what was written, without loading it; a file is read once by a process.

    Raises:
        ValueError: it is cut short, damaged or no checkpoint; the message has the way out.
    """
    path = Path(path)
    found = path.stat()
    known = (str(path.absolute()), found.st_size, found.st_mtime_ns)
    if known in _CHECKED:
        return
    if not _is_archive(path):
        with path.open("rb") as file:
            head = file.read(1)
        if not head:
            raise _unreadable(path, "it is empty")
        if head == _PICKLE:
            raise _unreadable(path, "it is a bare pickle, which could run code, and nothing is unpickled")
        raise _unreadable(path, "it is corrupt or was cut short")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = _damaged_record(archive)
    except Exception as error:
        # zipfile raises anything for an archive whose numbers are wrong
        raise _unreadable(path, f"it is corrupt: {error}") from error
    if damaged is not None:
        raise _unreadable(path, f"it is corrupt: the checksum of its record {damaged} is wrong")
    _CHECKED.add(known)


def choose_checkpoint(checkpoints: Sequence[Path], run: str | None) -> tuple[Path, list[str]]:
    """The checkpoint that a run goes on from: of those with all that it takes, the one with the most steps.

    Args:
        checkpoints: of the run; at least one.
        run: its id; None if it has none.

    Returns:
        The file, and a line for each of the others that cannot be used.

    Raises:
        ValueError: ``last.ckpt`` cannot be used, or none can.
    """
    usable: list[tuple[int, bool, float, Path]] = []
    faults: list[str] = []
    for path in checkpoints:
        is_last = path.stem.startswith("last")
        try:
            # its numbers stay in the file: what is chosen is read whole, and its checksums are compared, later
            content = _load(path, "cpu", weights_only=True, mmap=True)
            _check_run(path, content, run)
            check_training_state(content, str(path))
        except ValueError as error:
            if is_last:
                raise
            faults.append(str(error))
            continue
        usable.append((int(content.get("global_step", 0)), is_last, path.stat().st_mtime, path))
    if not usable:
        raise ValueError(
            f"the run cannot go on: {'; '.join(faults)}. --resume false starts another run, in a folder of its own"
        )
    chosen = max(usable)[-1]
    check_checksums(chosen)
    return chosen, faults


def run_of(path: Path) -> str | None:
    """The id of the run that saved a checkpoint; None if it says nothing, or cannot be read."""
    try:
        return _run_of(_load(path, "cpu", weights_only=True, mmap=True))
    except ValueError:
        return None


def check_training_state(checkpoint: dict[str, Any], name: str) -> None:
    """Refuse to go on training from a checkpoint of weights alone.

    Raises:
        ValueError: it is one.
    """
    missing = [key for key in ("optimizer_states", "lr_schedulers", "loops") if key not in checkpoint]
    if missing:
        raise ValueError(
            f"{name} holds weights alone (no {', '.join(missing)}), as ModelCheckpoint writes with save_weights_only: "
            "true, so training cannot go on from it; go on from a checkpoint with everything, or use it with test, "
            "merge or generate"
        )


def _load(path: Path, map_location: Any, weights_only: bool, mmap: bool) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location=map_location, weights_only=weights_only, mmap=mmap)
    except Exception as error:
        # torch.load raises anything from KeyError to UnpicklingError for a file it cannot read
        if not _is_archive(path):
            check_checksums(path)  # says what it is instead
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise _unreadable(
                path, f"it holds Python objects ({found[1]}), which could run code; tensors and plain values are read"
            ) from error
        raise _unreadable(path, str(error).partition("\n")[0] or type(error).__name__) from error
    if not isinstance(content, dict):
        raise _unreadable(path, f"it holds a {type(content).__name__}, and no dict as Lightning writes it")
    return content


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _damaged_record(archive: zipfile.ZipFile) -> str | None:
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED:
            return record.filename  # torch compresses nothing
        try:
            with archive.open(record) as file:
                while file.read(_CHUNK):
                    pass
        except zipfile.BadZipFile:
            return record.filename
    return None


def _run_of(checkpoint: dict[str, Any]) -> str | None:
    entry = checkpoint.get(RUN_KEY)
    return entry.get("run") if isinstance(entry, dict) else None


def _check_run(path: Path, checkpoint: dict[str, Any], run: str | None) -> None:
    found = _run_of(checkpoint)
    if run is not None and found is not None and found != run:
        raise ValueError(
            f"{path} belongs to another run (id {found}) than its folder (id {run}); put the run's own checkpoint back "
            f"or remove the file, or start a new run from it: --resume false --ckpt_path {path}"
        )


def _unreadable(path: Path, reason: str) -> ValueError:
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime, reverse=True)
    beside = [other.name for other in others if other != path][:3]
    way_out = f"remove it and use another checkpoint that lies beside it ({', '.join(beside)})" if beside else ""
    return ValueError(
        f"{path} could not be read as a checkpoint: {reason}; {way_out or 'take another copy of it, or train anew'}"
    )

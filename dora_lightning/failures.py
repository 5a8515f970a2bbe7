"""What a failed command says: one line for what a user can mend, and a file that holds the whole traceback."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import traceback
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

TRACEBACK_FILE = "traceback.txt"
# what bad input raises, and the disk; anything else is a bug, whose traceback is shown too
_EXPECTED = (ValueError, OSError, ImportError, MisconfigurationException)
_NO_ROOM = 2**24  # bytes: a disk with less is taken for full
_KEPT = "_dora_lightning_traceback"

_MEMORY = (
    "out of memory{where}: {what}. Lower the batch size (data.init_args.batch_size, eval_batch_size; "
    "trainer.accumulate_grad_batches makes up for it), set model.init_args.gradient_checkpointing: true, quantize the "
    "base (model.init_args.quantization: nf4), or shard it (ShardedTraining); the verb plan tells what a run takes"
)
_WORKER = (
    "a worker of the data loader was ended from outside ({what}), as the system does when memory or shared memory "
    "(/dev/shm) runs out. Use fewer workers (data.init_args.num_workers, 0 for none) or smaller batches, or give the "
    "container more of it (docker run --shm-size)"
)


def explain(error: BaseException, folder: Path | None = None) -> str | None:
    """What went wrong and what to change, or ``None`` for what is no fault of the input or the machine: a bug.

    Args:
        error: what was raised.
        folder: the run's, if there is one.
    """
    text = str(error)
    first = text.partition("\n")[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError):
        return _MEMORY.format(where=" on the GPU", what=first)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: " in text:
        return _MEMORY.format(where="", what=first.rpartition("DefaultCPUAllocator: ")[2] or "the system gives no more")
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return _WORKER.format(what=first)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    # torch names neither file nor reason
    if full or (isinstance(error, RuntimeError) and "PytorchStreamWriter failed writing" in text):
        return _about_the_disk(error, first, folder)
    return _reason(error) if isinstance(error, _EXPECTED) else None


def keep_traceback(error: BaseException, folder: Path | None = None) -> Path | None:
    """Write the traceback to the run's folder or, while there is none, to the system's place for temporary files.

    An error that was kept is not kept again.

    Args:
        error: what was raised.
        folder: the run's, if there is one.

    Returns:
        The file; ``None`` if none could be written.
    """
    kept: Path | None = getattr(error, _KEPT, None)
    if kept is not None:
        return kept
    rank = os.environ.get("LOCAL_RANK", "0")
    name = TRACEBACK_FILE if rank == "0" else f"traceback-{rank}.txt"
    lines = [time.strftime("%Y-%m-%d %H:%M:%S"), "", *traceback.format_exception(error), ""]
    content = "\n".join(line.rstrip("\n") for line in lines).encode(errors="backslashreplace")
    for place in (folder if folder is not None and folder.is_dir() else None, None):
        try:
            if place is not None:
                path = place / name
                with open(path, "ab") as file:  # those of earlier attempts stay
                    file.write(content)
            else:
                descriptor, made = tempfile.mkstemp(prefix="dora-lightning-", suffix=f"-{name}")
                path = Path(made)
                with open(descriptor, "wb") as file:
                    file.write(content)
        except OSError:
            continue  # the disk may be what failed
        setattr(error, _KEPT, path)
        return path
    return None


def _about_the_disk(error: BaseException, first: str, folder: Path | None) -> str:
    if getattr(error, "filename", None):
        return str(error)
    places = [place for place in (folder, Path.cwd(), Path(tempfile.gettempdir())) if place is not None]
    full = [str(place) for place in places if place.is_dir() and shutil.disk_usage(place).free < _NO_ROOM]
    where = f"no space is left in {' and '.join(dict.fromkeys(full))}" if full else "the disk or a quota is full"
    run = f" (the run is in {folder})" if folder is not None else ""
    return f"{first}: {where}{run}; free some, or name another folder (trainer.default_root_dir)"


def _reason(error: BaseException) -> str:
    """What went wrong, without what jsonargparse and the data loader say around it."""
    union = ""
    while error.__cause__ is not None and "Union subtypes" in str(error):
        union, error = str(error), error.__cause__
    text = str(error)
    if text.startswith("Expected a <class"):
        # the value was not of the union's first type; what its own type has to say comes below
        own = [line for line in union.split("\n") if line.startswith("  - ") and "Expected a <class" not in line]
        if own:
            return own[0].removeprefix("  - ")
    if text.startswith("Caught ") and "Original Traceback" in text:
        # of a worker: "ValueError: file, row 3: ..." is its last line
        last = text.rstrip().rpartition("\n")[2]
        return last.partition(": ")[2] or last
    return text or type(error).__name__

"""Checkpoint files that are there whole or not at all, also when the process is killed while it writes one.

What was damaged since is found when it is read.

Lightning writes to the system's temporary folder and moves the file to its place. Where that is another file system, as
on most clusters, the move is a copy, and a process killed in it leaves half a ``last.ckpt`` over the one before.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from typing_extensions import override

from dora_lightning.files import write_atomically
from dora_lightning.training.checkpoint_files import load_checkpoint_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, and reads it with its checksums compared.

    Remote paths are left to Lightning.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` as ``path``, all of it or nothing."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: _save(checkpoint, file))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load what was saved, its checksums compared; see :func:`~..checkpoint_files.load_checkpoint_file`."""
        if "://" in str(path) or Path(path).is_dir():
            return super().load_checkpoint(path, map_location, weights_only)
        # torch's own default is to unpickle nothing
        return load_checkpoint_file(path, map_location, weights_only is not False)


def write_checkpoints_atomically(strategy: Strategy) -> None:
    """Let ``strategy`` use :class:`AtomicCheckpointIO`, unless it was given a plugin of its own."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # of a disk that is full torch says "unexpected pos", while it closes the file
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise

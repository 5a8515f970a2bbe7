"""Checkpoint files that are there whole or not at all, also when the process is killed while it writes one.

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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it. Remote paths are left to Lightning."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` as ``path``, all of it or nothing."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: _save(checkpoint, file))


def write_checkpoints_atomically(strategy: Strategy) -> None:
    """Let ``strategy`` write checkpoints by :class:`AtomicCheckpointIO`, unless it was given a plugin of its own."""
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

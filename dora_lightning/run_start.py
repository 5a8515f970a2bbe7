"""Where a run of the command begins: a folder of its own, or the interrupted run that it goes on with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

from dora_lightning.files.locks import FolderLock
from dora_lightning.runs import UnfinishedRun, hold, holder, next_version, run_id, take_version, unfinished_runs
from dora_lightning.training.checkpoint_files import choose_checkpoint, run_of


@dataclass
class RunStart:
    """A run's folder, and what it goes on from.

    Attributes:
        root: of the folders of all runs.
        version: of this one's.
        checkpoint: to go on from; None for a new run.
        lock: on the folder; None on all processes but the first, and where the file system has no locks.
    """

    root: Path
    version: int
    checkpoint: Path | None = None
    lock: FolderLock | None = None

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.root / f"version_{self.version}"

    def loggers(self) -> list[Logger]:
        """TensorBoard and CSV logs. A run that goes on gets another CSV file: Lightning would empty the first."""
        table = next(name for number in count() if not (self.folder / (name := f"metrics_{number}")).exists())
        return [
            TensorBoardLogger(str(self.root), name="", version=self.version),
            CSVLogger(str(self.root), self.folder.name, table),
        ]

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock is not None:
            self.lock.release()


def start_run(
    root: Path, verb: str, resume: bool, checkpoint_folders: Sequence[Path] = (), take: bool = True
) -> RunStart:
    """Find the interrupted run to go on with, or take a new folder; the first process alone takes and locks it.

    A fit of a SLURM job that was put back into the queue goes on with the run that this very job was at.

    Args:
        root: of the folders of all runs.
        verb: of the command.
        resume: go on with the newest run that has saved a checkpoint, unless it or a newer one has finished.
        checkpoint_folders: where checkpoints of the run may lie too, those of ModelCheckpoint's ``dirpath``.
        take: False where loggers of the user's own choose the folder of a new run.

    Raises:
        ValueError: the run to go on with is alive, or cannot go on; the message says why, and what to do.
    """
    passed_over: list[str] = []
    for run in _candidates(root, verb, resume):
        if checkpoints := [*run.checkpoints, *_checkpoints_elsewhere(run.folder, checkpoint_folders)]:
            start = _held(RunStart(root, run.version), verb)
            try:
                start.checkpoint, faults = choose_checkpoint(checkpoints, run_id(run.folder))
            except BaseException:
                start.release()
                raise
            for line in passed_over:
                rank_zero_info(line)
            for line in faults:
                rank_zero_warn(line)
            rank_zero_info(
                f"Resuming the interrupted run {run.folder} from {start.checkpoint.name}; "
                "--resume false starts a new one"
            )
            return start
        alive = holder(run.folder)
        passed_over.append(
            f"{run.folder} has no checkpoint, so there is nothing to go on from: "
            + (f"it is alive ({alive})" if alive else "it was interrupted before it had saved one")
        )
    for line in passed_over:
        rank_zero_info(f"{line}; a new run is started")
    if take and _is_first_process():
        return _held(RunStart(root, take_version(root)), verb)
    return RunStart(root, next_version(root))


class AgreedFolder(Callback):
    """Gives all processes the folder that the first one has taken, and refuses to go on from different checkpoints.

    Args:
        start: what this process found.
        logs: loggers of ours write into the folder.
    """

    def __init__(self, start: RunStart, logs: bool) -> None:
        self._root, self._own = start.root, (start.version, start.checkpoint)
        self._logs = logs

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over what the first process says."""
        version, checkpoint = trainer.strategy.broadcast(self._own)
        if checkpoint != self._own[1]:
            raise ValueError(
                f"process {trainer.global_rank} would go on from {self._own[1]}, the first from {checkpoint}: all "
                f"processes must see the same files in {self._root}"
            )
        if self._logs and version != self._own[0]:
            trainer.loggers = RunStart(self._root, version).loggers()


def _candidates(root: Path, verb: str, resume: bool) -> list[UnfinishedRun]:
    """Runs to go on with, the best first."""
    requeued = verb == "fit" and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
    unfinished = unfinished_runs(root) if resume or requeued else []
    own = [run for run in unfinished if requeued and run.slurm_job == os.environ.get("SLURM_JOB_ID")]
    return own or (unfinished if resume else [])


def _held(start: RunStart, verb: str) -> RunStart:
    if not _is_first_process():
        return start
    start.lock = hold(start.folder, verb)
    if start.lock is None:
        rank_zero_warn(
            f"{start.folder}: this file system has no locks, so nothing keeps another command with --resume true from "
            "going on with this run while it is alive"
        )
    return start


def _is_first_process() -> bool:
    """By what the launcher says; a process that starts the others itself is told nothing."""
    node = os.environ.get("NODE_RANK") or os.environ.get("GROUP_RANK") or "0"
    return getattr(rank_zero_only, "rank", 0) == 0 and node == "0"


def _checkpoints_elsewhere(run: Path, folders: Sequence[Path]) -> list[Path]:
    """Checkpoints of the run that lie outside of its folder: those that have its id."""
    own = run_id(run)
    files = [path for folder in folders if not folder.is_relative_to(run) for path in sorted(folder.glob("*.ckpt"))]
    return [path for path in files if own is not None and run_of(path) == own]

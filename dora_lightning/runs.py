"""Run folders: ``<root>/version_N`` holds a run's config, logs, checkpoints and results.

A run takes its folder by creating it, and holds a lock in it for as long as it lives.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from dora_lightning.files import json_bytes, write_bytes_atomically
from dora_lightning.files.locks import FolderLock, NoLocksError

RESULT_FILE = "result.json"
"""Written when a fit has finished; a run folder without it was interrupted."""

BEFORE_FILE = "before.json"
"""Scores of the untrained model."""

RUN_FILE = "run.json"
"""The id of the run, which its checkpoints have too; its verb, and the SLURM job that was at it last."""

LOCK_FILE = "lock"


@dataclass(frozen=True)
class UnfinishedRun:
    """A fit that has no result.

    Attributes:
        version: of its folder.
        folder: of the run.
        checkpoints: what it has saved in its folder.
        slurm_job: that was at it last.
    """

    version: int
    folder: Path
    checkpoints: list[Path]
    slurm_job: str | None = None


def take_version(root: Path) -> int:
    """Number of a new run folder, which is created here: no two runs get the same."""
    root.mkdir(parents=True, exist_ok=True)
    version = next_version(root)
    while True:
        try:
            (root / f"version_{version}").mkdir()
        except FileExistsError:
            version += 1
        else:
            return version


def next_version(root: Path) -> int:
    """Number of the first run folder that does not exist yet, counting up from the newest."""
    return max(_versions(root), default=-1) + 1


def hold(folder: Path, verb: str) -> FolderLock | None:
    """Lock a run folder until this process ends or releases the lock, and say in it what the run is.

    Returns:
        The lock; None where the file system has none, so that two runs can go on in one folder.

    Raises:
        ValueError: a living run has the folder; the message names its process.
    """
    lock = FolderLock(folder / LOCK_FILE)
    try:
        if not lock.acquire():
            raise ValueError(
                f"{folder} belongs to a run that is alive: {lock.holder() or 'it has just ended'}. Wait until it has "
                "ended, or stop it, and start this command again; --resume false starts another run in a folder of "
                "its own"
            )
        locked = True
    except NoLocksError:
        locked = False
    record = read_result(folder, RUN_FILE) or {"id": uuid4().hex, "verb": verb}
    write_result(folder, RUN_FILE, record | {"slurm_job": os.environ.get("SLURM_JOB_ID")})
    return lock if locked else None


def holder(folder: Path) -> str | None:
    """The living run that has a folder, in words."""
    return FolderLock(folder / LOCK_FILE).holder()


def run_id(folder: Path) -> str | None:
    """The id of the run in a folder; None if it was made before runs had one."""
    return (read_result(folder, RUN_FILE) or {}).get("id")


def unfinished_runs(root: Path) -> list[UnfinishedRun]:
    """Fits without a result that are newer than the last one that has finished, the newest first.

    Folders of other verbs are passed over, and old ones that hold no checkpoint, of which nothing says what they were.
    """
    runs: list[UnfinishedRun] = []
    for version in sorted(_versions(root), reverse=True):
        folder = root / f"version_{version}"
        if (folder / RESULT_FILE).exists():
            break
        # the second are those that Lightning saves when SLURM is about to stop it
        checkpoints = sorted([*folder.glob("checkpoints/*.ckpt"), *folder.glob("hpc_ckpt_*.ckpt")])
        record = read_result(folder, RUN_FILE) or {}
        if checkpoints or record.get("verb") == "fit":
            runs.append(UnfinishedRun(version, folder, checkpoints, record.get("slurm_job")))
    return runs


def unfinished_run(root: Path) -> UnfinishedRun | None:
    """The newest run of a fit, if it was interrupted after it had saved a checkpoint."""
    return next((run for run in unfinished_runs(root) if run.checkpoints), None)


def write_result(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file of results into a run folder, all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(folder / name, json_bytes(content, indent=2) + b"\n")


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """What :func:`write_result` has written; ``None`` if it has not."""
    path = folder / name
    return json.loads(path.read_text()) if path.is_file() else None


def _versions(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    found = (re.fullmatch(r"version_(\d+)", folder.name) for folder in root.iterdir() if folder.is_dir())
    return [int(match.group(1)) for match in found if match]

"""Run folders: ``<root>/version_N`` holds a run's config, logs, checkpoints and results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dora_lightning.files import json_bytes, write_bytes_atomically

RESULT_FILE = "result.json"
"""Written when a fit has finished; a run folder without it was interrupted."""

BEFORE_FILE = "before.json"
"""Scores of the untrained model."""


def next_version(root: Path) -> int:
    """Number of the first run folder that does not exist yet, counting up from the newest."""
    return max(_versions(root), default=-1) + 1


def unfinished_run(root: Path) -> tuple[int, Path] | None:
    """Version and last checkpoint of the newest run of a fit, if it was interrupted after it had saved one.

    Folders that hold neither a checkpoint nor a result are passed over: tests, and runs that failed at the start.
    """
    for version in sorted(_versions(root), reverse=True):
        folder = root / f"version_{version}"
        if (folder / RESULT_FILE).exists():
            return None
        if (checkpoint := folder / "checkpoints" / "last.ckpt").exists():
            return version, checkpoint
    return None


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

"""A cell's folder: which cell it holds, how far that is, and its run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

import dora_lightning
from dora_lightning.comparing.cells import Cell, canonical
from dora_lightning.comparing.study import Study, load_yaml
from dora_lightning.files import write_text_atomically
from dora_lightning.files.locks import FolderLock
from dora_lightning.runs import RESULT_FILE, unfinished_run, write_result

CELL_FILE, FAILURE_FILE, ATTEMPTS_FILE = "cell.json", "failed.json", "attempts.json"

DONE, RUNNING, FAILED, INTERRUPTED, WAITING = "done", "running", "failed", "interrupted", "waiting"
"""States of a cell."""


class CellFolder:
    """``<folder of the study>/<name of the cell>``: the run folder, its log, and what they belong to.

    Args:
        study: the study.
        cell: the cell.
        configs: content of the study's config files.
    """

    def __init__(self, study: Study, cell: Cell, configs: list[dict[str, Any]]) -> None:
        self.cell = cell
        self.path = study.folder / cell.name
        self.configs = study.configs
        self.identity = {"configs": configs, "options": cell.options}
        self.hash = sha256(canonical(self.identity).encode()).hexdigest()
        self.lock = FolderLock(self.path / "lock")
        self.log = self.path / "log.txt"

    def check(self) -> None:
        """Refuse a folder that holds another cell than this one.

        Raises:
            ValueError: it does; the message says what differs.
        """
        file = self.path / CELL_FILE
        if not file.is_file():
            if self.run is not None:
                raise ValueError(f"{self.path} holds a run that no study made; give the study another `folder`")
            return
        kept = json.loads(file.read_text())
        if kept.get("hash") == self.hash:
            return
        changes = list(_differences(kept.get("identity", {}), self.identity))
        shown = "\n  ".join(changes[:5] + ([f"and {len(changes) - 5} more"] if len(changes) > 5 else []))
        raise ValueError(
            f"{self.path} holds a cell of that name that was made from other options:\n  {shown}\n"
            "Its results are not those of this study. Give the study another `folder`, or remove the cell's folder."
        )

    def claim(self) -> None:
        """Write down which cell the folder holds, and the options its run is started with."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / FAILURE_FILE).unlink(missing_ok=True)
        made_by = {"labels": self.cell.labels, "seed": self.cell.seed, "version": dora_lightning.__version__}
        write_result(self.path, CELL_FILE, {"hash": self.hash, **made_by, "identity": self.identity})
        options = dict(self.cell.options)
        options["trainer"] = {**options.get("trainer", {}), "default_root_dir": str(self.path)}
        options["resume"] = True
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
        write_text_atomically(self.options_file, f"# what sets this cell apart; given after the config files\n{text}")

    @property
    def options_file(self) -> Path:
        """The last config file of the cell's run."""
        return self.path / "options.yaml"

    @property
    def arguments(self) -> list[str]:
        """Of ``dora-lightning``, to run the cell."""
        files = [*self.configs, self.options_file]
        return ["fit", *(part for file in files for part in ("--config", str(file)))]

    @property
    def run(self) -> Path | None:
        """The run folder that has finished."""
        results = self.path.glob(f"version_*/{RESULT_FILE}")
        return max((file.parent for file in results), key=lambda run: int(run.name.rpartition("_")[2]), default=None)

    @property
    def state(self) -> str:
        """How far the cell is."""
        if self.run is not None:
            return DONE
        if self.lock.holder():
            return RUNNING
        if (self.path / FAILURE_FILE).is_file():
            return FAILED
        return INTERRUPTED if unfinished_run(self.path) or self.attempts else WAITING

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The processes that ran the cell and were seen to end: how, seconds, peak memory."""
        file = self.path / ATTEMPTS_FILE
        return json.loads(file.read_text())["attempts"] if file.is_file() else []

    def add_attempt(self, **attempt: Any) -> None:
        """Keep how a process that ran the cell ended."""
        write_result(self.path, ATTEMPTS_FILE, {"attempts": [*self.attempts, attempt]})

    def fail(self, reason: str) -> None:
        """Mark the cell as failed, until it is run again."""
        write_result(self.path, FAILURE_FILE, {"reason": reason})

    @property
    def failure(self) -> str | None:
        """Why the cell failed, if it did."""
        file = self.path / FAILURE_FILE
        return json.loads(file.read_text())["reason"] if self.run is None and file.is_file() else None

    def last_lines(self, count: int = 6) -> list[str]:
        """The end of the log, without progress bars."""
        if not self.log.is_file():
            return []
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
        # a bar is drawn again after a carriage return: what counts is what stands there in the end
        lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
        return [line for line in lines if line and not re.search(r"\d+%\|", line)][-count:]


def open_folders(study: Study, cells: list[Cell]) -> list[CellFolder]:
    """The folder of each cell, checked to hold that cell or none.

    Raises:
        ValueError: one holds another cell.
    """
    configs = [load_yaml(path) for path in study.configs]
    folders = [CellFolder(study, cell, configs) for cell in cells]
    for folder in folders:
        folder.check()
    return folders


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What was changed, by dotted names."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{name}[{place}]")
    elif old != new:
        yield f"{name} was {old!r} and is {new!r}"

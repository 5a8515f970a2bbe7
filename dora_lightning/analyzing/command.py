"""The verb ``analyze``."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from dora_lightning.analyzing.figure import plot_pattern
from dora_lightning.analyzing.records import PATTERN_FILE
from dora_lightning.analyzing.report import as_json, report
from dora_lightning.analyzing.sources import collect
from dora_lightning.files import json_bytes, write_bytes_atomically
from dora_lightning.files.growing import check_writable
from dora_lightning.plots import can_plot
from dora_lightning.terminal import say

JSON_FILE, PLOT_FILE = "analysis.json", "learning_pattern.png"


def analyze(
    tuned: list[str] | str,
    base: str | None = None,
    modules: list[str] | str | None = None,
    output: str | None = None,
) -> None:
    """Learning patterns (how magnitudes and directions moved) of a run or of finished models.

    Args:
        tuned: run folder, adapter checkpoint (.ckpt), PEFT folder, or fine-tuned model (folder or hub id); several as
            '[step-100.ckpt, step-200.ckpt]'. Of a run folder its learning_pattern.jsonl is taken, or else its
            checkpoints.
        base: folder or hub id of what it was tuned from; by default what an adapter says of it.
        modules: names or dotted suffixes as '[q_proj, v_proj]', or one regular expression; by default all that trained.
        output: folder for analysis.json and learning_pattern.png; by default the run folder, or else "analysis".
    """
    names = [tuned] if isinstance(tuned, str) else tuned
    if not names:
        raise ValueError("nothing to analyse: name a run folder, a checkpoint or a model")
    _check_regex(modules)
    folder = Path(output) if output is not None else _default_folder(names)
    check_writable(folder / JSON_FILE)
    records = collect(names, base, lambda name: _is_wanted(name, modules))
    folder.mkdir(parents=True, exist_ok=True)
    content = {"base": base, "tuned": names} | as_json(records)
    write_bytes_atomically(folder / JSON_FILE, json_bytes(content, indent=2) + b"\n")
    console = Console()
    console.print(report(records), highlight=False)
    lines = [f"Numbers: {folder / JSON_FILE}"]
    if can_plot():
        lines.append(f"Plot: {plot_pattern(records, folder / PLOT_FILE)}")
    else:
        lines.append("No plot, for want of matplotlib: pip install 'dora-lightning[plots]'")
    say("\n".join(lines), console)


def _check_regex(modules: list[str] | str | None) -> None:
    try:
        re.compile(modules if isinstance(modules, str) else "")
    except re.error as error:
        raise ValueError(f"modules: {modules!r} is not a regular expression: {error}") from error


def _is_wanted(name: str, modules: list[str] | str | None) -> bool:
    if modules is None:
        return True
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in modules)


def _default_folder(names: list[str]) -> Path:
    """The run's folder, if one run is analysed."""
    path = Path(names[0]).expanduser()
    run = path.parent if path.name == PATTERN_FILE else path
    is_run = (run / PATTERN_FILE).is_file() or (run / "checkpoints").is_dir()
    return run if len(names) == 1 and is_run else Path("analysis")

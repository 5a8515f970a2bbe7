"""The verb ``plan``."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from dora_lightning.files import json_bytes, write_bytes_atomically
from dora_lightning.files.growing import check_writable
from dora_lightning.planning.planner import make_plan
from dora_lightning.planning.report import as_json, report
from dora_lightning.planning.settings import parse_command


def plan(cli: type[LightningCLI], args: list[str]) -> None:
    """Memory and speed to expect of a run, before a device is rented.

    Args:
        cli: the command's LightningCLI, which knows the options of ``fit``.
        args: config files and overrides as ``fit`` takes them, and the options of
            :class:`~dora_lightning.planning.options.PlanOptions`.

    Raises:
        ValueError: what is configured cannot be planned; the message says why.
        OSError: the model's config could not be loaded.
    """
    settings, options = parse_command(cli, args)
    if options.json is not None:
        check_writable(Path(options.json))
    made = make_plan(settings, options)
    Console().print(report(made), highlight=False)
    if options.json is not None:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(Path(options.json), json_bytes(as_json(made), indent=2) + b"\n")

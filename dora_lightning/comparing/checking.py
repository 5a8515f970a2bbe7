"""Every cell's options are read by the command's own parser before the first one runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from dora_lightning.adapters import AdapterConfig
from dora_lightning.comparing.cells import Cell


class _Parsed(Exception):  # noqa: N818  # nothing went wrong: all there was to do is done
    """Ends LightningCLI before it builds anything."""


def parse_cells(
    cli: type[LightningCLI], configs: Sequence[Path], cells: Sequence[Cell], seen: Callable[[Cell, Namespace], None]
) -> None:
    """Read the options of cells as ``fit`` would, without building anything.

    Args:
        cli: the command's LightningCLI, whose parser is used.
        configs: the study's config files.
        cells: the cells.
        seen: is given each cell and what ``fit`` would make of it.

    Raises:
        ValueError: an option is unknown or has a bad value; the message names the cell.
    """

    class Reader(cli):  # type: ignore[valid-type,misc]  # a class that is an argument
        def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
            return super().init_parser(**kwargs | {"exit_on_error": False})

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "options.yaml"
                for cell in cells:
                    file.write_text(yaml.safe_dump(cell.options))
                    arguments = [part for path in (*configs, file) for part in ("--config", str(path))]
                    try:
                        config = parser.parse_args(["fit", *arguments]).fit
                        check_adapter(config)
                        _check_logger(config)
                    except (ArgumentError, ValueError) as error:
                        # not from it: the command would show the cause alone, which does not name the cell
                        raise ValueError(f"cell {cell.number} ({cell.name}): {_innermost(error)}") from None
                    seen(cell, config)
            raise _Parsed

    try:
        Reader([], run=True)
    except _Parsed:
        return


def _check_logger(config: Namespace) -> None:
    """Check that the run's folder will be within the cell's.

    Raises:
        ValueError: a logger decides where the run's results go.
    """
    if config.trainer.logger not in (None, True):
        raise ValueError(
            "trainer.logger: a cell's results are found in the folder that the command's own loggers make; leave it out"
        )


def _innermost(error: BaseException) -> BaseException:
    """What went wrong with an option, without all the types that it could have had."""
    while error.__cause__ is not None and "Union subtypes" in str(error):
        error = error.__cause__
    return error


def check_adapter(config: Namespace) -> None:
    """Let the adapter check its options now: it does so when it is made, hours later for the last cell.

    Raises:
        ValueError: they contradict each other.
    """
    adapter = (config.model.get("init_args") or {}).get("adapter") if config.get("model") else None
    if isinstance(adapter, Namespace):
        AdapterConfig(**adapter.as_dict())

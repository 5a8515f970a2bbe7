"""The verb ``compare``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from dora_lightning.comparing.cells import make_cells
from dora_lightning.comparing.checking import parse_cells
from dora_lightning.comparing.folders import DONE, CellFolder, open_folders
from dora_lightning.comparing.report import write_report
from dora_lightning.comparing.results import read_result
from dora_lightning.comparing.running import Runner, StoppedError
from dora_lightning.comparing.study import Study, read_study
from dora_lightning.terminal import PlainTable, say


def compare(cli: type[LightningCLI], args: list[str]) -> None:
    """Run the cells of a study that are not done yet, and report what came out.

    Args:
        cli: the command's LightningCLI, which knows the options of ``fit``.
        args: the study file and options; ``--help`` explains them.

    Raises:
        ValueError: the study, one of its cells, or a choice on the command line is not valid.
        FileNotFoundError: the study or one of its config files is missing.
        SystemExit: with 1 if a cell failed, with 130 if the study was stopped.
    """
    options = _parser().parse_args(args)
    study = read_study(options.study)
    cells = make_cells(study)
    folders = open_folders(study, cells)
    # a report or a log in the terminal's width is a table; elsewhere lines are not cut
    console = Console()
    if options.list:
        console.print(_listing(study, folders))
        return
    if options.report:
        _report(study, folders, console)
        return
    chosen = [_chosen(folders, options.cell)] if options.cell is not None else folders
    devices = [device.strip() for device in options.devices.split(",") if device.strip()] if options.devices else []
    jobs = max(1, len(devices)) if options.jobs is None else options.jobs
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {jobs}")
    if devices and jobs > len(devices):
        raise ValueError(f"--jobs {jobs} needs {jobs} devices, --devices names {len(devices)}: {', '.join(devices)}")
    open_cells = [folder for folder in chosen if folder.run is None]
    # cells that differ in their seed alone have the same options
    distinct = {folder.cell.group: folder.cell for folder in reversed(open_cells)}
    parse_cells(cli, study.configs, list(distinct.values()), lambda cell, config: None)
    jobs = min(jobs, max(1, len(open_cells)))
    done = len(folders) - sum(folder.run is None for folder in folders)
    say(f"{study.title}: {len(cells)} cells in {study.folder}, {done} done, {len(open_cells)} to run", console)
    try:
        Runner(study, len(cells), jobs, devices, console).run(open_cells)
    except StoppedError as stop:
        say(f"Stopped by {stop}; the same command goes on from here", console)
        sys.exit(130)
    if options.cell is None:
        _report(study, folders, console)
    if any(folder.failure for folder in chosen):
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dora-lightning compare",
        description="Run a grid of fits from one base config, one after another, and report what came out. "
        "Run it again after an interruption, and it goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, help="study file, such as configs/studies/smollm2-samples.yaml")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells side by side (default: 1, or one per device)")
    parser.add_argument("--devices", metavar="0,1,...", help="CUDA devices; each job has one of them to itself")
    parser.add_argument("--cell", metavar="K", help="one cell only, by its number in --list (from 0) or its name")
    parser.add_argument("--list", action="store_true", help="show the cells and how far they are, and run nothing")
    parser.add_argument("--report", action="store_true", help="report what is there, and run nothing")
    return parser


def _chosen(folders: list[CellFolder], wanted: str) -> CellFolder:
    for folder in folders:
        if wanted in (str(folder.cell.number), folder.cell.name):
            return folder
    raise ValueError(f"--cell {wanted}: the study has cells 0 to {len(folders) - 1}; --list shows them")


def _listing(study: Study, folders: list[CellFolder]) -> PlainTable:
    table = PlainTable(title=f"{study.title}: {len(folders)} cells in {study.folder}")
    table.add_column("", justify="right")
    table.add_column("cell", no_wrap=True)
    for name in (*(axis.name for axis in study.axes), *(["seed"] if study.seeds else []), "state"):
        table.add_column(name)
    table.add_column(study.metrics[0].title, justify="right")
    for folder in folders:
        cell, state, score = folder.cell, folder.state, ""
        if state == DONE:
            try:
                score = study.metrics[0].shown(read_result(study, folder).metrics[study.metrics[0].name])
            except ValueError:
                score = "none"  # the report says why
        labels = [label or "-" for label in cell.labels.values()] + ([str(cell.seed)] if study.seeds else [])
        table.add_row(str(cell.number), cell.name, *labels, state, score)
    return table


def _report(study: Study, folders: list[CellFolder], console: Console) -> None:
    path = write_report(study, folders)
    say(f"Report: {path}", console)

"""Measures of several data sets as something to print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from torch import Tensor

from dora_lightning.terminal import PlainTable


def data_set_table(
    title: str, columns: Mapping[str, str], metrics: Mapping[str, Tensor], light: bool = False
) -> PlainTable:
    """Data sets in rows, measures in columns, all times 100; the mean comes last.

    Args:
        title: heading of the table.
        columns: measure -> heading of its column.
        metrics: ``<source>/<measure>`` -> value; ``mean`` may be among the sources.
        light: without lines between columns, so that many measures fit in 80 columns.
    """
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1)} if light else {}
    table = PlainTable(title=title, **style)
    table.add_column("data set", overflow="fold" if light else "ellipsis")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    sources = list(dict.fromkeys(name.rpartition("/")[0] for name in metrics))
    for source in sorted(sources, key=lambda name: name == "mean"):
        if source == "mean":
            table.add_section()
        table.add_row(source, *(f"{100 * float(metrics[f'{source}/{name}']):.1f}" for name in columns))
    return table

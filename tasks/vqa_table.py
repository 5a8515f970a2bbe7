"""The measures of visual question answering as something to print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from torch import Tensor

from dora_lightning.terminal import PlainTable
from tasks.vqa_protocols import benchmark_of

_MEASURES = ("accuracy", "f1", "ranking", "majority", "unparsed")
_POPE_MEASURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def results_table(results: Mapping[str, Tensor]) -> RenderableType:
    """Sources in rows, measures in columns, in per cent; POPE's ratios and MMBench's categories in tables of their own.

    Args:
        results: as :func:`tasks.vqa_results.vqa_results` returns them.
    """
    shown = dict(results)
    # a row more takes less room than two columns of dashes
    for measure, name in (("overall", "accuracy"), ("ranking_overall", "ranking")):
        if f"scienceqa/{measure}" in results:
            shown[f"scienceqa (all)/{name}"] = shown.pop(f"scienceqa/{measure}")
    # a source of one's own may have a slash in its name
    sources = list(dict.fromkeys(name.rpartition("/")[0] for name in shown))
    categories = [source for source in sources if source.startswith("mmbench/")]
    splits = [source for source in sources if benchmark_of(source) == "pope" and f"{source}/precision" in shown]
    rows = [source for source in sources if source not in categories]
    tables = [_table("Visual question answering (%)", "data set", rows, _MEASURES, shown)]
    if splits:
        tables.append(_table("POPE (%)", "split", splits, _POPE_MEASURES, shown))
    if categories:
        measures = ("accuracy", "ranking")
        tables.append(_table("MMBench by category (%)", "category", categories, measures, shown, cut="mmbench/"))
    return Group(*tables)


def _table(
    title: str, first: str, rows: Sequence[str], measures: Sequence[str], results: Mapping[str, Tensor], cut: str = ""
) -> PlainTable:
    present = [measure for measure in measures if any(f"{row}/{measure}" in results for row in rows)]
    # light, so that all measures fit in 80 columns
    table = PlainTable(title=title, box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column(first, overflow="fold")
    for measure in present:
        table.add_column("F1" if measure == "f1" else measure.replace("_", "\n"), justify="right", vertical="bottom")
    for row in sorted(rows, key=lambda name: (name == "mean", name)):
        if row == "mean":
            table.add_section()
        values = [results.get(f"{row}/{measure}") for measure in present]
        table.add_row(
            row.removeprefix(cut), *("-" if value is None else f"{100 * float(value):.1f}" for value in values)
        )
    return table

"""What a run prints about itself."""

from __future__ import annotations

from dora_lightning.adapters.summary import AdapterSummary
from dora_lightning.terminal import PlainTable


def summary_table(summary: AdapterSummary) -> PlainTable:
    """Modules that were adapted, parameters per group, and their share of the whole."""
    table = PlainTable(title="Adapters", show_footer=True)
    table.add_column("adapted", footer="trains")
    table.add_column("how", footer=f"of {summary.total:,} parameters")
    table.add_column("count", justify="right", footer=f"{summary.trainable:,} ({summary.share:.2%})")
    for kind, (method, count) in summary.modules.items():
        table.add_row(kind, method, f"{count:,} modules")
    table.add_section()
    for group, count in summary.groups.items():
        table.add_row(group, "", f"{count:,}")
    return table

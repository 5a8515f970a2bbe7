"""The report of a study: ``report.md``, ``results.csv`` and plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dora_lightning.comparing.figures import LOSS_NOTE, draw_figures
from dora_lightning.comparing.folders import DONE, CellFolder
from dora_lightning.comparing.results import Group, Result, best_group, group_results, read_result, within_spread
from dora_lightning.comparing.study import Metric, Study
from dora_lightning.files import write_text_atomically
from dora_lightning.files.locks import held
from dora_lightning.plots import can_plot

REPORT_FILE, RESULTS_FILE = "report.md", "results.csv"


def write_report(study: Study, folders: Sequence[CellFolder]) -> Path:
    """Write the report of what has finished into the study's folder.

    A cell whose run has none of the study's metrics, or no number there, is listed with the reason.

    Args:
        study: the study.
        folders: all of its cells.
    """
    path = study.folder / REPORT_FILE
    # two processes that share a study may come to its end together: who writes last has read last
    with held(study.folder / "report.lock"):
        results, unusable = [], dict[str, str]()
        for folder in folders:
            if folder.state == DONE:
                try:
                    results.append(read_result(study, folder))
                except ValueError as error:
                    unusable[folder.cell.name] = str(error)
        groups = group_results(results)
        write_text_atomically(study.folder / RESULTS_FILE, _results_csv(study, folders, results))
        figures = draw_figures(study, groups) if groups and can_plot() else []
        write_text_atomically(path, _markdown(study, folders, groups, figures, unusable))
    return path


def _markdown(
    study: Study,
    folders: Sequence[CellFolder],
    groups: Sequence[Group],
    figures: Sequence[Path],
    unusable: Mapping[str, str],
) -> str:
    done = sum(len(group.results) for group in groups)
    lines = [f"# {study.title}", "", f"{done} of {len(folders)} cells are done.", ""]
    if groups:
        lines += _table(study, groups)
        lines += ["", *_notes(study, groups), ""]
        for metric in study.metrics:
            lines += [f"## {metric.label or metric.name}", "", _verdict(groups, metric), ""]
            if len(study.axes) > 1:
                lines += [*_cross_table(study, groups, metric), ""]
    if figures:
        lines += ["## Plots", "", "Bars and bands: one sample standard deviation. " + LOSS_NOTE, ""]
        lines += [line for figure in figures for line in (f"![{figure.stem}]({figure.name})", "")]
    elif groups and not can_plot():
        lines += ["No plots: they need matplotlib (`pip install dora-lightning[plots]`).", ""]
    if unusable:
        lines += ["## Without a score", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in unusable.items()]
        lines += [""]
    missing = [folder for folder in folders if folder.state != DONE]
    if missing:
        lines += ["## Not done", ""]
        lines += [f"- `{folder.cell.name}`: {_what_happened(folder)}" for folder in missing]
        lines += [""]
    return "\n".join(lines)


def _table(study: Study, groups: Sequence[Group]) -> list[str]:
    axes = [axis.name for axis in study.axes]
    measures = _measures(groups)
    header = [*axes, "n", *(metric.title for metric in study.metrics), *(title for title, _ in measures)]
    rows = []
    for group in groups:
        cells = [group.labels[axis] or "-" for axis in axes]
        cells += [str(len(group.results))]
        cells += [_score_cell(group, metric, groups) for metric in study.metrics]
        cells += [shown(group.results) for _, shown in measures]
        rows.append(cells)
    align = [":--"] * len(axes) + ["--:"] * (len(header) - len(axes))
    return [_row(header), _row(align), *map(_row, rows)]


def _cross_table(study: Study, groups: Sequence[Group], metric: Metric) -> list[str]:
    """One metric, the last axis in columns and the others in rows."""
    *rows, last = [axis.name for axis in study.axes]
    columns = [*study.axes[-1].values, *([None] if any(group.labels[last] is None for group in groups) else [])]
    found = {tuple(group.labels.values()): group for group in groups}
    table = [[*rows, *(f"{last} {column}" if column else f"no {last}" for column in columns)]]
    table += [[":--"] * len(rows) + ["--:"] * len(columns)]
    for labels in dict.fromkeys(tuple(group.labels[axis] for axis in rows) for group in groups):
        members = [found.get((*labels, column)) for column in columns]
        table += [[label or "-" for label in labels] + [_score_cell(m, metric, groups) if m else "" for m in members]]
    return [_row(cells) for cells in table]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _score_cell(group: Group, metric: Metric, groups: Sequence[Group]) -> str:
    best = best_group(groups, metric)
    text = _with_spread(group, metric)
    if group is best and len(groups) > 1:
        return f"**{text}**"
    return f"{text} ≈" if within_spread(group.score(metric), best.score(metric)) and len(groups) > 1 else text


def _with_spread(group: Group, metric: Metric) -> str:
    score = group.score(metric)
    return metric.shown(score.mean, score.deviation)


def _measures(groups: Sequence[Group]) -> list[tuple[str, Callable[[Sequence[Result]], str]]]:
    """Columns beside the scores: those that every run has."""
    results = [result for group in groups for result in group.results]
    columns: list[tuple[str, Callable[[Sequence[Result]], str]]] = []
    if all(result.trainable is not None for result in results):
        columns.append(("trained", lambda members: f"{members[0].trainable:,}"))
        if all(result.total for result in results):
            columns.append(("share (%)", lambda members: f"{100 * members[0].trainable / members[0].total:.3f}"))  # type: ignore[operator]
    if all(result.seconds is not None for result in results):
        columns.append(("training (s)", lambda members: _mean([result.seconds for result in members])))
    elif all(result.wall_seconds is not None for result in results):
        columns.append(("whole run (s)", lambda members: _mean([result.wall_seconds for result in members])))
    if all(result.peak_memory_bytes is not None for result in results):
        columns.append(("peak (GiB)", lambda members: f"{max(r.peak_memory_bytes or 0 for r in members) / 2**30:.2f}"))
    return columns


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.1f}"


def _notes(study: Study, groups: Sequence[Group]) -> list[str]:
    """How to read the table."""
    notes = ["Mean ± sample standard deviation over n seeds. **Bold**: the best mean."]
    if len(groups) > 1:
        notes.append(
            "≈: within one standard deviation (the larger one of the two) of the best: "
            "these seeds do not tell them apart."
        )
    if any(label is None for group in groups for label in group.labels.values()):
        notes.append("-: the axis does not act on that row.")
    results = [result for group in groups for result in group.results]
    if most := max(result.side_by_side for result in results) - 1:
        notes.append(f"Up to {most + 1} cells ran side by side, so times are longer than those of a run alone.")
    return notes


def _verdict(groups: Sequence[Group], metric: Metric) -> str:
    """What the seeds say of a metric, in words."""
    best = best_group(groups, metric)
    score = best.score(metric)
    value = f"{metric.title} {_with_spread(best, metric)}"
    text = f"Best ({metric.better} is better): **{best.title}**, {value}, n = {len(score.values)}."
    others = [group for group in groups if group is not best]
    if not others:
        return text
    if all(group.score(metric).deviation is None for group in groups):
        return f"{text} With one seed each no spread is known, so nothing says that differences are more than chance."
    near = [group for group in others if within_spread(group.score(metric), score)]
    if not near:
        return f"{text} All others are more than one standard deviation away."
    names = "; ".join(f"{group.title} ({_with_spread(group, metric)})" for group in near)
    return f"{text} Within one standard deviation of it: {names}."


def _what_happened(folder: CellFolder) -> str:
    if folder.failure is None:
        return folder.state
    last = "".join(f"\n      {line}" for line in folder.last_lines(3))
    return f"failed ({folder.failure}), log `{folder.log}`\n{last}"


def _results_csv(study: Study, folders: Sequence[CellFolder], results: Sequence[Result]) -> str:
    """One row for each cell; what is not known is left blank."""
    found = {result.cell.number: result for result in results}
    measures = ("steps", "trainable", "total", "seconds", "wall_seconds", "peak_memory_bytes", "run")
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    axes = [axis.name for axis in study.axes]
    writer.writerow(["cell", *axes, "seed", "state", *(metric.name for metric in study.metrics), *measures])
    for folder in folders:
        cell, result = folder.cell, found.get(folder.cell.number)
        row = [cell.name, *(cell.labels[axis] for axis in axes), cell.seed, folder.state]
        if result is not None:
            row += [repr(result.metrics[metric.name]) for metric in study.metrics]
            row += [getattr(result, measure) for measure in measures]
        writer.writerow(row + [""] * (len(axes) + 3 + len(study.metrics) + len(measures) - len(row)))
    return file.getvalue()

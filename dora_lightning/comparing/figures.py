"""Plots of a study: scores against what was varied, and the losses on the way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_lightning.comparing.results import Group, Score, title_parts
from dora_lightning.comparing.study import Axis, Metric, Study
from dora_lightning.plots import COLORS, MARKERS, new_figure, save_figure
from dora_lightning.training.run_curves import logged_parts, read_curves, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 0.05
"""Share of a run's logged steps that a point of a training curve is the mean of."""
LOSS_NOTE = f"Losses: the mean over seeds, each point of training the mean of the {SMOOTHING:.0%} of steps before it."
SUFFIX = ".png"
Curve = list[tuple[int, float]]


def draw_figures(study: Study, groups: Sequence[Group]) -> list[Path]:
    """Draw what the study has axes for, into its folder.

    - ``score-by-<axis>.png`` for each axis of numbers: a line for each combination of the other labels;
    - ``scores.png`` if no axis is of numbers: a point for each row of the table;
    - ``score-by-parameters.png`` if the runs have counted what trains, and it is not the same everywhere;
    - ``loss.png``: training losses, and held-out losses that were logged more than once.

    Returns:
        The files, in this order.
    """
    figures: dict[str, Figure] = {}
    for axis in study.axes:
        if axis.numbers and len({group.labels[axis.name] for group in groups} - {None}) > 1:
            figures[f"score-by-{re.sub(r'[^A-Za-z0-9]+', '-', axis.name)}"] = _by_axis(study, groups, axis)
    if not figures:
        figures["scores"] = _scores(study, groups)
    counts = [result.trainable for group in groups for result in group.results]
    if None not in counts and len(set(counts)) > 1:
        figures["score-by-parameters"] = _by_parameters(study, groups)
    if (losses := _losses(study, groups)) is not None:
        figures["loss"] = losses
    return [save_figure(figure, study.folder / f"{name}{SUFFIX}") for name, figure in figures.items()]


def _by_axis(study: Study, groups: Sequence[Group], axis: Axis) -> Figure:
    """Lines along an axis of numbers; a band for what the axis does not act on."""
    figure, panels = new_figure(len(study.metrics), title=study.title)
    numbers = axis.numbers or {}
    powers = all(number > 0 and float(number).hex().split("p")[0] == "0x1.0000000000000" for number in numbers.values())
    lines: dict[str, list[Group]] = {}
    for group in groups:
        lines.setdefault(", ".join(title_parts(group.labels, without=[axis.name])), []).append(group)
    span = max(numbers.values()) - min(numbers.values())
    beside = [title for title, members in lines.items() if members[0].labels[axis.name] is not None]
    for metric, panel in zip(study.metrics, panels, strict=True):
        for place, (title, members) in enumerate(lines.items()):
            score = members[0].score(metric)
            if members[0].labels[axis.name] is None:
                _band(panel, metric, score, title, place)
                continue
            # side by side, so that the bars of one line do not hide those of another
            aside = beside.index(title) - (len(beside) - 1) / 2
            points = [(numbers[str(group.labels[axis.name])], group.score(metric)) for group in members]
            at = [x * 2 ** (0.07 * aside) if powers else x + 0.012 * span * aside for x, _ in points]
            _bars(panel, metric, at, [score for _, score in points], title, place)
        if powers:
            panel.set_xscale("log", base=2)
        panel.set_xticks(list(numbers.values()), labels=list(numbers))
        panel.minorticks_off()
        panel.set_xlabel(axis.name)
    _legend(figure, panels[0])
    return figure


def _by_parameters(study: Study, groups: Sequence[Group]) -> Figure:
    """Scores against what trains: a line for each label of the first axis that is not of numbers."""
    figure, panels = new_figure(len(study.metrics), title=study.title)
    words = next((axis.name for axis in study.axes if not axis.numbers), None)
    lines: dict[str, list[Group]] = {}
    for group in groups:
        lines.setdefault(str(group.labels[words] or "-") if words else "", []).append(group)
    for metric, panel in zip(study.metrics, panels, strict=True):
        for place, (title, members) in enumerate(lines.items()):
            members = sorted(members, key=lambda group: group.results[0].trainable or 0)
            at = [float(group.results[0].trainable or 0) for group in members]
            _bars(panel, metric, at, [group.score(metric) for group in members], title, place)
        panel.set_xscale("log")
        panel.set_xlabel("trained parameters")
    _legend(figure, panels[0])
    return figure


def _scores(study: Study, groups: Sequence[Group]) -> Figure:
    """A point with its spread for each row of the table, and the seeds behind it."""
    figure, panels = new_figure(len(study.metrics), size=(4.6, 1.0 + 0.36 * len(groups)), title=study.title)
    for metric, panel in zip(study.metrics, panels, strict=True):
        for place, group in enumerate(groups):
            score, color = group.score(metric), COLORS[place % len(COLORS)]
            values = [_scaled(metric, value) for value in score.values]
            panel.plot(values, [place] * len(values), ".", color=color, alpha=0.35)
            spread = None if score.deviation is None else [_scaled(metric, score.deviation)]
            panel.errorbar([_scaled(metric, score.mean)], [place], xerr=spread, fmt="o", color=color, capsize=3)
        panel.set_yticks(range(len(groups)), labels=[group.title for group in groups])
        panel.set_ylim(len(groups) - 0.5, -0.5)
        panel.set_xlabel(metric.title)
    for panel in panels[1:]:
        panel.tick_params(labelleft=False)
    return figure


def _losses(study: Study, groups: Sequence[Group]) -> Figure | None:
    """Losses by step, the mean over seeds; with several axes, a panel for each label of the first one."""
    split = study.axes[0].name if len(study.axes) > 1 else None
    shown: dict[str, list[tuple[str, Curve, Curve]]] = {}
    for group in groups:
        curves_of = [read_curves(logged_parts(result.run)) for result in group.results]
        train = _smooth(_mean_curve([list(curves.get("train/loss", {}).items()) for curves in curves_of]))
        held_out = _mean_curve([list(curves.get("val/loss", {}).items()) for curves in curves_of])
        if train:
            name = (group.labels[split] or "-") if split else ""
            title = ", ".join(title_parts(group.labels, without=[split] if split else [])) or name or group.title
            shown.setdefault(name, []).append((title, train, held_out if len(held_out) > 1 else []))
    if not shown:
        return None
    figure, panels = new_figure(len(shown), title=study.title)
    for (name, curves), panel in zip(shown.items(), panels, strict=True):
        for place, (title, train, held_out) in enumerate(curves):
            color = COLORS[place % len(COLORS)]
            style = ("-", "-.")[place // len(COLORS) % 2]
            panel.plot(*zip(*train, strict=True), color=color, linestyle=style, linewidth=1.1, label=title)
            if held_out:
                look: dict[str, Any] = {"color": color, "linestyle": ":", "marker": "."}
                panel.plot(*zip(*held_out, strict=True), label=f"{title}, held out", **look)
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.set_ylabel("training loss")
        if [title for title, *_ in curves] != [name]:
            panel.legend(fontsize="small", frameon=False)
    bounds = [panel.get_ylim() for panel in panels]
    for panel in panels:
        panel.set_ylim(min(low for low, _ in bounds), max(high for _, high in bounds))
    return figure


def _bars(panel: Axes, metric: Metric, at: Sequence[float], scores: Sequence[Score], title: str, place: int) -> None:
    spreads = [_scaled(metric, score.deviation or 0.0) for score in scores]
    means = [_scaled(metric, score.mean) for score in scores]
    look: dict[str, Any] = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}
    panel.errorbar(at, means, yerr=spreads if any(spreads) else None, capsize=3, markersize=4, label=title, **look)
    panel.set_ylabel(metric.title)


def _band(panel: Axes, metric: Metric, score: Score, title: str, place: int) -> None:
    color, mean = COLORS[place % len(COLORS)], _scaled(metric, score.mean)
    spread = _scaled(metric, score.deviation or 0.0)
    panel.axhline(mean, color=color, linestyle="--", linewidth=1.2, label=title)
    if spread:
        panel.axhspan(mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
    panel.set_ylabel(metric.title)


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if len(labels) > 1 or any(labels):
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)


def _scaled(metric: Metric, value: float) -> float:
    return 100 * value if metric.percent else value


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean at each step that all have."""
    by_step = [dict(curve) for curve in curves if curve]
    if not by_step:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in by_step)))
    return [(step, sum(curve[step] for curve in by_step) / len(by_step)) for step in steps]


def _smooth(curve: Curve) -> Curve:
    """A moving mean, each point of what came before it."""
    values = smoothed([value for _, value in curve], max(1, round(SMOOTHING * len(curve))))
    return [(step, value) for (step, _), value in zip(curve, values, strict=True)]

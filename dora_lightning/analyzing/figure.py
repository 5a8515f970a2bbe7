"""The paper's scatter plot of a learning pattern (figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dora_lightning.analyzing.records import Record, patterns_of
from dora_lightning.plots import new_figure, save_figure


def plot_pattern(records: Sequence[Record], path: Path) -> Path:
    """Change of direction against change of magnitude, a panel for each type of module.

    Points are coloured by step if there are several, else by layer; the line is the least-squares fit.

    Raises:
        ImportError: matplotlib is not installed.
    """
    patterns = patterns_of(records)
    by_step = len({record.step for record in records}) > 1
    figure, axes = new_figure(panels=len(patterns), columns=3)
    colours = {id(record): record.step if by_step else record.layer or 0 for record in records}
    least, most = min(colours.values()), max(colours.values())
    points = None
    for axis, (kind, pattern) in zip(axes, patterns.items(), strict=True):
        shown = [record for record in records if record.type == kind]
        x, y = [record.delta_d for record in shown], [record.delta_m for record in shown]
        values = [colours[id(record)] for record in shown]
        points = axis.scatter(x, y, c=values, cmap="viridis", vmin=least, vmax=most, s=16, linewidths=0)
        title = kind
        if not pattern.correlation.reason:
            title += f"   r = {pattern.correlation.r:+.2f}"
            slope, intercept = _least_squares(x, y)
            ends = [min(x), max(x)]
            axis.plot(ends, [intercept + slope * end for end in ends], color="#d55e00", linewidth=1.2)
        axis.set_title(title)
        axis.set_xlabel("ΔD")
        axis.set_ylabel("ΔM")
        axis.ticklabel_format(style="sci", scilimits=(-2, 3), useMathText=True)
    if points is not None and least < most:
        figure.colorbar(points, ax=list(axes), label="step" if by_step else "layer", aspect=30)
    return save_figure(figure, path)


def _least_squares(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, mean_y - slope * mean_x

"""Losses and learning rates of a run, drawn from what a CSVLogger has written in all of its parts."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_lightning.plots import COLORS, MARKERS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = dict[str, dict[int, float]]
"""Name -> step -> value."""

_METRICS = "metrics.csv"
_WIDTH, _HEIGHT = 6.0, 3.6


def draw_run(run: Path, folder: Path, logged: Sequence[Path]) -> list[Path]:
    """Draw ``loss.png`` and ``learning_rates.png``, those of them that something is known for.

    Args:
        run: the run's folder; what its parts have logged is in its ``metrics_*``.
        folder: where to write.
        logged: folders of the CSVLoggers of the last part.

    Returns:
        The files.
    """
    parts = logged_parts(run)
    known = {path.resolve() for path in parts}
    parts += [path for path in (place / _METRICS for place in logged) if path.resolve() not in known]
    curves = read_curves(parts)
    # those of training first, whatever was logged first
    names = sorted((name for name in curves if "loss" in name), key=lambda name: name.startswith("val"))
    losses = {name: curves[name] for name in names}
    rates = {name: points for name, points in curves.items() if name.startswith("lr-")}
    drawn = []
    if losses:
        drawn.append(_draw_losses(losses, folder / "loss.png"))
    if rates:
        drawn.append(_draw_rates(rates, folder / "learning_rates.png"))
    return drawn


def logged_parts(run: Path) -> list[Path]:
    """Files of the CSVLoggers of all parts of a run, in their order."""
    return sorted(run.glob(f"metrics_*/{_METRICS}"), key=lambda path: (len(path.parent.name), path.parent.name))


def read_curves(parts: Sequence[Path]) -> Curves:
    """What was logged of training and validation, by name.

    A part that goes on from a checkpoint replaces what came after that.

    Args:
        parts: files of a CSVLogger, in order; one that is not there is passed over.
    """
    curves: Curves = {}
    for path in parts:
        if not path.is_file():
            continue
        with path.open(newline="") as file:
            rows = [
                (int(row["step"]), name, float(value))
                for row in csv.DictReader(file)
                for name, value in row.items()
                # a part may hold nothing but a test after the fit
                if value and name not in ("step", "epoch") and not name.startswith("test")
            ]
        begin = min((step for step, _, _ in rows), default=sys.maxsize)
        curves = {name: {s: v for s, v in points.items() if s < begin} for name, points in curves.items()}
        for step, name, value in rows:
            curves.setdefault(name, {})[step] = value
    return {name: points for name, points in curves.items() if points}


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those before it, ``window`` in all; fewer at the beginning.

    >>> smoothed([4.0, 2.0, 0.0], 2)
    [4.0, 3.0, 1.0]
    """
    return [sum(part) / len(part) for part in (values[max(0, end - window) : end] for end in range(1, len(values) + 1))]


def _draw_losses(losses: Curves, path: Path) -> Path:
    _, (axes,) = new_figure(size=(_WIDTH, _HEIGHT))
    for place, (name, points) in enumerate(losses.items()):
        steps, values = list(points), list(points.values())
        color = COLORS[place % len(COLORS)]
        window = max(1, len(values) // 20)
        if name.startswith("val") or len(values) == 1:
            axes.plot(steps, values, color=color, marker=MARKERS[place % len(MARKERS)], label=name)
        elif window == 1:
            axes.plot(steps, values, color=color, label=name)
        else:
            axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values, window), color=color, label=f"{name}, mean of {window}")
    return _finish(axes, "loss", path)


def _draw_rates(rates: Curves, path: Path) -> Path:
    _, (axes,) = new_figure(size=(_WIDTH, _HEIGHT))
    together: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for name, points in rates.items():
        together.setdefault(tuple(points.items()), []).append(name.removeprefix("lr-"))
    for place, (line, names) in enumerate(together.items()):
        axes.plot(*zip(*line, strict=True), color=COLORS[place % len(COLORS)], label=", ".join(names))
    return _finish(axes, "learning rate", path)


def _finish(axes: Axes, what: str, path: Path) -> Path:
    axes.set_xlabel("step")
    axes.set_ylabel(what)
    axes.legend(frameon=False)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return save_figure(figure, path)

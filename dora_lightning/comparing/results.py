"""What finished cells scored, and what seeds make of it: means, spreads, and differences that mean nothing."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_lightning.comparing.cells import Cell
from dora_lightning.comparing.folders import CellFolder
from dora_lightning.comparing.study import Metric, Study
from dora_lightning.runs import RESULT_FILE


@dataclass(frozen=True)
class Result:
    """What one finished cell came to.

    Attributes:
        cell: the cell.
        run: its run folder.
        metrics: the study's metrics after training, by name.
        steps: optimiser steps.
        trainable: parameters that trained, if the run has counted them.
        total: all parameters of the model, likewise.
        seconds: of training, if the run has measured them.
        wall_seconds: of the whole process with loading and evaluating, over all attempts that were seen to end; None if
            the last one was not.
        peak_memory_bytes: at most: on a GPU what CUDA allocated, on a CPU what the process held (resident).
        side_by_side: most cells that ran at once while this one did.
    """

    cell: Cell
    run: Path
    metrics: dict[str, float]
    steps: int
    trainable: int | None
    total: int | None
    seconds: float | None
    wall_seconds: float | None
    peak_memory_bytes: int | None
    side_by_side: int


@dataclass(frozen=True)
class Score:
    """A metric over seeds.

    Attributes:
        values: of each seed, in their order.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (``n - 1``); None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Group:
    """Cells that differ in their seed alone."""

    labels: dict[str, str | None]
    results: tuple[Result, ...]

    def score(self, metric: Metric) -> Score:
        """A metric over the seeds."""
        return Score(tuple(result.metrics[metric.name] for result in self.results))

    @property
    def title(self) -> str:
        """Its labels in one line."""
        return ", ".join(title_parts(self.labels)) or "all"


def title_parts(labels: dict[str, str | None], without: Iterable[str] = ()) -> list[str]:
    """Labels in words; a number or a switch after its axis's name."""
    shown = {axis: label for axis, label in labels.items() if label is not None and axis not in set(without)}
    return [f"{axis} {label}" if _is_bare(label) else label for axis, label in shown.items()]


def read_result(study: Study, folder: CellFolder) -> Result:
    """Read what a finished cell came to.

    Raises:
        ValueError: the run has none of a metric's name, or it is not a number.
    """
    run = folder.run
    assert run is not None
    content = json.loads((run / RESULT_FILE).read_text())
    after = content["after"]
    for metric in study.metrics:
        if metric.name not in after:
            raise ValueError(f"{run / RESULT_FILE} has no {metric.name}; it has {', '.join(sorted(after))}")
        if after[metric.name] is None or not math.isfinite(after[metric.name]):
            raise ValueError(f"{run / RESULT_FILE}: {metric.name} is no number (NaN or infinity)")
    attempts = folder.attempts
    seen = attempts and attempts[-1]["outcome"] == "ended"
    parameters = content.get("parameters") or {}
    resident = [attempt["peak_rss_bytes"] for attempt in attempts if attempt["peak_rss_bytes"]]
    return Result(
        cell=folder.cell,
        run=run,
        metrics={metric.name: float(after[metric.name]) for metric in study.metrics},
        steps=content["steps"],
        trainable=parameters.get("trainable"),
        total=parameters.get("total"),
        seconds=content.get("seconds"),
        wall_seconds=sum(attempt["seconds"] for attempt in attempts) if seen else None,
        peak_memory_bytes=content.get("peak_memory_bytes") or max(resident, default=None),
        side_by_side=max((attempt["side_by_side"] for attempt in attempts), default=1),
    )


def group_results(results: Sequence[Result]) -> list[Group]:
    """Results of the same labels together, in the order of the study."""
    groups: dict[tuple[str | None, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.cell.group, []).append(result)
    return [Group(members[0].cell.labels, tuple(members)) for members in groups.values()]


def best_group(groups: Sequence[Group], metric: Metric) -> Group:
    """The one with the best mean; the first of equals."""
    sign = 1 if metric.better == "higher" else -1
    return max(groups, key=lambda group: sign * group.score(metric).mean)


def within_spread(score: Score, best: Score) -> bool:
    """Whether the means differ by no more than one standard deviation: the larger one of the two.

    >>> within_spread(Score((0.60, 0.70)), Score((0.68, 0.72)))
    True
    """
    deviations = [deviation for deviation in (score.deviation, best.deviation) if deviation is not None]
    return bool(deviations) and abs(best.mean - score.mean) <= max(deviations)


def _is_bare(label: str) -> bool:
    return label in ("true", "false", "null") or not label[:1].isalpha()

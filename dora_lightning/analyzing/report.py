"""A learning pattern as a table, as JSON, and the quick check that is read off it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType

from dora_lightning.adapters.analysis import Correlation
from dora_lightning.analyzing.records import Record, TypePattern, pattern_of, patterns_of
from dora_lightning.terminal import PlainTable, plain

HELPS_ABOVE = 0.3
"""Correlation of a LoRA run above which DoRA is likely to help: LoRA's is +0.83 in the paper, DoRA's -0.31."""
STILL_DIRECTION, MOVING_MAGNITUDE = 0.25, 0.5
"""A type wants its magnitude alone if its direction moves less than that share of the other types' median, and its
magnitude at least that share of theirs. A heuristic of this library, not of the paper."""


@dataclass(frozen=True)
class QuickCheck:
    """What a short run of LoRA says of DoRA.

    Attributes:
        dora_helps: whether DoRA is likely to help, by the paper's reasoning; None if it cannot be told.
        r: mean over module types of the correlation over layers and steps; None if no type has one.
        r_at_last: mean of that over layers at the last step alone, likewise.
        reason: one sentence for the two.
        magnitude_only: types of modules that may train their magnitude alone.
    """

    dora_helps: bool | None
    r: float | None
    r_at_last: float | None
    reason: str
    magnitude_only: list[str] = field(default_factory=list)


def quick_check(records: Sequence[Record]) -> QuickCheck:
    """Whether DoRA is likely to help, and which types of modules want their magnitude alone."""
    patterns = patterns_of(records)
    still = _magnitude_only(patterns, {record.type for record in records if record.method == "magnitude"})
    r = _mean([pattern.correlation for pattern in patterns.values()])
    at_last = _mean([pattern.at_last for pattern in patterns.values()])
    methods = sorted({record.method for record in records})
    if set(methods) - {"magnitude"} != {"lora"}:
        reason = f"Whether DoRA is likely to help is read off a run of LoRA; this is of {', '.join(methods)}."
        return QuickCheck(None, r, at_last, reason, still)
    if r is None:
        why = next(iter(patterns.values())).correlation.reason
        return QuickCheck(None, r, at_last, f"Whether DoRA would help cannot be told: the correlation {why}.", still)
    shown = f"mean r over module types {r:+.2f}"
    if at_last is not None and at_last != r:
        shown += f", at the last step alone {at_last:+.2f}"
    if r > HELPS_ABOVE:
        reason = (
            f"Magnitudes and directions move together ({shown}; above {HELPS_ABOVE:+.1f}): by the paper's reasoning "
            "DoRA is likely to help."
        )
        return QuickCheck(True, r, at_last, reason, still)
    reason = f"No sign here that DoRA would help ({shown}; not above {HELPS_ABOVE:+.1f})."
    return QuickCheck(False, r, at_last, reason, still)


def report(records: Sequence[Record]) -> RenderableType:
    """The table, and the quick check below it."""
    last = max(record.step for record in records)
    steps = len({record.step for record in records})
    table = PlainTable(title=f"Learning pattern at step {last}")
    table.add_column("module type")
    over_steps = [f"r, {steps} steps"] if steps > 1 else []
    for column in ("modules", "mean ΔM", "mean ΔD", *over_steps, "r, last step" if steps > 1 else "r"):
        table.add_column(column, justify="right")
    patterns = patterns_of(records)
    for kind, pattern in patterns.items():
        table.add_row(kind, *_cells(pattern, steps))
    if len(patterns) > 1:
        table.add_section()
        table.add_row("all", *_cells(pattern_of(records), steps))
    check = quick_check(records)
    lines = [check.reason]
    if check.magnitude_only:
        names = ", ".join(check.magnitude_only)
        lines.append(f"Directions hardly move, and magnitudes do, in {names}: try magnitude_only_modules: [{names}].")
    reasons = {f"{kind}: no r: {p.correlation.reason}" for kind, p in patterns.items() if p.correlation.reason}
    return Group(table, *map(plain, [*sorted(reasons), *lines]))


def as_json(records: Sequence[Record]) -> dict[str, Any]:
    """Everything in plain containers, null for what there is none of."""
    patterns = patterns_of(records)
    return {
        "steps": sorted({record.step for record in records}),
        "methods": sorted({record.method for record in records}),
        "types": {kind: _plain(pattern) for kind, pattern in patterns.items()},
        "all": _plain(pattern_of(records)),
        "quick_check": asdict(quick_check(records)),
        "records": [asdict(record) for record in records],
    }


def _magnitude_only(patterns: dict[str, TypePattern], already: set[str]) -> list[str]:
    still = []
    for kind, pattern in patterns.items():
        others = [other for name, other in patterns.items() if name != kind and name not in already]
        if not others or kind in already:
            continue
        usual_d = statistics.median(other.delta_d for other in others)
        usual_m = statistics.median(other.delta_m for other in others)
        if pattern.delta_d < STILL_DIRECTION * usual_d and pattern.delta_m >= MOVING_MAGNITUDE * usual_m:
            still.append(kind)
    return still


def _mean(correlations: Sequence[Correlation]) -> float | None:
    found = [correlation.r for correlation in correlations if not correlation.reason]
    return statistics.fmean(found) if found else None


def _cells(pattern: TypePattern, steps: int) -> list[str]:
    over_steps = [_shown(pattern.correlation)] if steps > 1 else []
    moved = [str(pattern.count), f"{pattern.delta_m:.3g}", f"{pattern.delta_d:.3g}"]
    return [*moved, *over_steps, _shown(pattern.at_last)]


def _shown(correlation: Correlation) -> str:
    return "-" if correlation.reason else f"{correlation.r:+.2f}"


def _plain(pattern: TypePattern) -> dict[str, Any]:
    found: dict[str, Any] = {"count": pattern.count, "delta_m": pattern.delta_m, "delta_d": pattern.delta_d}
    for name, correlation in (("correlation", pattern.correlation), ("correlation_at_last", pattern.at_last)):
        found[name] = None if correlation.reason else correlation.r
    return found | ({"reason": pattern.correlation.reason} if pattern.correlation.reason else {})

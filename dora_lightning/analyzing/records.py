"""What is written down of learning patterns: one record for each module at each step, as a line of JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dora_lightning.adapters.analysis import Correlation, WeightChange, correlation
from dora_lightning.adapters.finite import NonFiniteError
from dora_lightning.files import json_lines, json_rows, write_bytes_atomically

PATTERN_FILE = "learning_pattern.jsonl"


@dataclass(frozen=True)
class Record:
    """How far one module has moved from where training started.

    Attributes:
        step: optimiser steps taken.
        module: dotted name, relative to the adapted model if there is one.
        type: last part of its name that is no number (``q_proj``).
        layer: first number in its name; None if there is none.
        method: what trains it: ``dora``, ``lora``, ``vera``, ``dvora``, ``magnitude``, ``full``, or ``merged`` of a
            whole model of which no more is known.
        delta_m: mean absolute change of its magnitudes.
        delta_d: mean of ``1 - cos`` between its new and old directions.
    """

    step: int
    module: str
    type: str
    layer: int | None
    method: str
    delta_m: float
    delta_d: float

    @property
    def change(self) -> WeightChange:
        """The two numbers."""
        return WeightChange(self.delta_m, self.delta_d)


@dataclass(frozen=True)
class TypePattern:
    """The records of one type of module, or of all.

    Attributes:
        count: how many modules.
        delta_m: mean over modules at the last step.
        delta_d: likewise.
        correlation: of both over modules and steps, as the paper has it. Both grow from zero, which alone brings it
            up while a run is short.
        at_last: of both over modules at the last step alone.
    """

    count: int
    delta_m: float
    delta_d: float
    correlation: Correlation
    at_last: Correlation


def make_record(step: int, module: str, method: str, change: WeightChange, full_name: str | None = None) -> Record:
    """A record of a module; its type and layer are read from ``full_name``, or from ``module``.

    Raises:
        NonFiniteError: the change is NaN or infinite.

    >>> make_record(3, "model.layers.11.self_attn.q_proj", "dora", WeightChange(0.5, 0.25)).layer
    11
    >>> make_record(3, "encoder.2", "full", WeightChange(0.5, 0.25)).type
    'encoder'
    """
    if not (math.isfinite(change.delta_m) and math.isfinite(change.delta_d)):
        raise NonFiniteError(
            f"{module} at step {step}: the change of magnitude is {change.delta_m} and that of direction "
            f"{change.delta_d}: its weights, or those it started from, hold NaN or infinity"
        )
    parts = (full_name or module).split(".")
    numbers = [int(part) for part in parts if part.isdigit()]
    kind = next((part for part in reversed(parts) if not part.isdigit()), parts[-1])
    return Record(step, module, kind, numbers[0] if numbers else None, method, change.delta_m, change.delta_d)


def patterns_of(records: Sequence[Record]) -> dict[str, TypePattern]:
    """Type of module -> what its records say, in the order of the records."""
    types = dict.fromkeys(record.type for record in records)
    return {kind: pattern_of([record for record in records if record.type == kind]) for kind in types}


def pattern_of(records: Sequence[Record]) -> TypePattern:
    """What these records, of one type or of several, say together."""
    last = max(record.step for record in records)
    at_last = [record for record in records if record.step == last]
    return TypePattern(
        len({record.module for record in records}),
        sum(record.delta_m for record in at_last) / len(at_last),
        sum(record.delta_d for record in at_last) / len(at_last),
        correlation([record.change for record in records]),
        correlation([record.change for record in at_last]),
    )


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write one JSON object a line, all of them or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, json_lines(asdict(record) for record in records))


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add records to a file, at a cost that does not grow with it. A crash leaves at most one line cut in two."""
    with path.open("ab") as file:
        file.write(json_lines(asdict(record) for record in records))
        file.flush()
        os.fsync(file.fileno())


def drop_half_line(path: Path) -> None:
    """Cut off what a writer that was killed left after the last end of a line."""
    with path.open("rb+") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 4096)
            file.seek(start)
            end = file.read(position - start).rfind(b"\n")
            if end >= 0:
                file.truncate(start + end + 1)
                return
            position = start
        file.truncate(0)


def read_records(path: Path) -> list[Record]:
    """Read what :func:`write_records` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no record; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no learning pattern at {path}: the callback WeightDecomposition writes one")
    names = ", ".join(field.name for field in fields(Record))
    records = []
    rows = list(json_rows(path, f"JSON objects with {names}"))
    if rows and isinstance(rows[-1][1], ValueError) and not path.read_bytes().endswith(b"\n"):
        rows.pop()  # cut in two when its writer was killed
    for place, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            if fault := next((value for value in row.values() if isinstance(value, ValueError)), None):
                raise fault
            record = Record(**row)
            float(record.delta_m), float(record.delta_d), int(record.step)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, {place}: expected a JSON object with {names}: {error}") from error
        records.append(record)
    return records

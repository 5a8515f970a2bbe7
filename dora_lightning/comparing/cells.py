"""Cells of a study: every combination of its axes and seeds that is a run of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from dora_lightning.comparing.study import Study


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        number: its place among the cells, from 0; the first seed's cells come first.
        name: of its folder.
        labels: of each axis; None for an axis that does not act on it.
        seed: None if the study has no seeds.
        options: what is set beside the config files, nested as a config file is.
    """

    number: int
    name: str
    labels: dict[str, str | None]
    seed: int | None
    options: dict[str, Any]

    @property
    def group(self) -> tuple[str | None, ...]:
        """What cells that differ in their seed alone have in common."""
        return tuple(self.labels.values())


def make_cells(study: Study) -> list[Cell]:
    """All cells of a study; combinations with the same options are one cell.

    Raises:
        ValueError: options contradict each other, everything is excluded, or two cells would have one name.
    """
    merged: dict[str, tuple[list[dict[str, str | None]], int | None, dict[str, Any]]] = {}
    for seed, *chosen in product(study.seeds or (None,), *(axis.values for axis in study.axes)):
        labels: dict[str, str | None] = dict(zip((axis.name for axis in study.axes), chosen, strict=True))
        if any(rule.covers(labels) for rule in study.exclude):
            continue
        options = _options(study, labels, seed)
        ignored = {axis for rule in study.rules if rule.covers(labels) for axis in rule.ignore}
        shown = {axis: None if axis in ignored else label for axis, label in labels.items()}
        merged.setdefault(canonical(options), ([], seed, options))[0].append(shown)
    if not merged:
        raise ValueError("`exclude` leaves no cell of the study")
    cells: list[Cell] = []
    for number, (members, seed, options) in enumerate(merged.values()):
        # an axis along which cells are the same does not act on them
        labels = {axis: label if all(m[axis] == label for m in members) else None for axis, label in members[0].items()}
        cells.append(Cell(number, _name(study, labels, seed), labels, seed, options))
    names = [cell.name for cell in cells]
    for cell in cells:
        if names.count(cell.name) > 1:
            raise ValueError(
                f"two cells would have the folder {cell.name}: give the labels of the axes names that differ in "
                "letters, digits, dots or underscores"
            )
    return cells


def nested(options: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Options by dotted names as a config file nests them; later ones win.

    >>> nested([("model.init_args.adapter", {"rank": 4}), ("model.init_args.adapter.rank", 8)])
    {'model': {'init_args': {'adapter': {'rank': 8}}}}

    Raises:
        ValueError: a name goes through a value that has no parts.
    """
    tree: dict[str, Any] = {}
    for name, value in options:
        *path, last = name.split(".")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"the options contradict each other: {name} lies in {key}, which is set to {place!r}")
        # a copy, since a later option may change it
        place[last] = json.loads(json.dumps(value))
    return tree


def canonical(content: Any) -> str:
    """JSON that is the same for the same content."""
    return json.dumps(content, sort_keys=True)


def _options(study: Study, labels: Mapping[str, str | None], seed: int | None) -> dict[str, Any]:
    rules = [rule for rule in study.rules if rule.covers(labels)]
    ignored = {axis for rule in rules for axis in rule.ignore}
    parts = [study.overrides]
    parts += [axis.values[str(labels[axis.name])] for axis in study.axes if axis.name not in ignored]
    parts += [rule.set for rule in rules]
    parts += [dict.fromkeys(study.seed_options, seed)] if seed is not None else []
    return nested(pair for part in parts for pair in part.items())


def _name(study: Study, labels: Mapping[str, str | None], seed: int | None) -> str:
    """Labels that are words as they are; numbers and switches after their axis's name."""
    parts = [_part(axis, label) for axis, label in labels.items() if label is not None]
    return "-".join([*parts, *([f"seed{seed}"] if seed is not None else [])]) or "cell"


def _part(axis: str, label: str) -> str:
    word = label if re.match(r"[A-Za-z]", label) and label not in ("true", "false", "null") else f"{axis}{label}"
    return re.sub(r"[^\w.+-]+", "_", word)

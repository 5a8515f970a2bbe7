"""Study files: what is compared, over which axes, with which seeds, and by which metrics."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dora_lightning.files.yaml_limits import check_yaml

_KEYS = (
    "title", "folder", "configs", "overrides", "axes", "seeds", "seed_options", "exclude", "rules", "metrics",
)  # fmt: skip
_OURS = {
    "trainer.default_root_dir": "each cell has a folder of its own below the study's `folder`",
    "resume": "an interrupted cell always goes on where it stopped",
}


@dataclass(frozen=True)
class Metric:
    """A score to compare by.

    Attributes:
        name: as ``result.json`` has it, such as ``val/mean/ranking``.
        better: ``higher`` or ``lower``.
        percent: shown times 100.
        label: how tables and plots call it.
    """

    name: str
    better: str = "higher"
    percent: bool = False
    label: str = ""

    @property
    def title(self) -> str:
        """Label, with the unit."""
        return (self.label or self.name) + (" (%)" if self.percent else "")

    def shown(self, value: float, spread: float | None = None) -> str:
        """A value as tables show it: percents with two decimals, others with four digits; a spread with as many."""
        if self.percent:
            value, decimals = 100 * value, 2
            spread = None if spread is None else 100 * spread
        else:
            decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 4
        return f"{value:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


@dataclass(frozen=True)
class Axis:
    """One thing that is varied: a label for each value, and the options that it sets."""

    name: str
    values: dict[str, dict[str, Any]]

    @property
    def numbers(self) -> dict[str, float] | None:
        """The labels as numbers, if all of them are."""
        try:
            return {label: float(label) for label in self.values}
        except ValueError:
            return None


@dataclass(frozen=True)
class Rule:
    """For cells that ``when`` names: options to set, and axes that do not act on them."""

    when: dict[str, tuple[str, ...]]
    ignore: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)

    def covers(self, labels: Mapping[str, str | None]) -> bool:
        """Whether a combination of labels is meant."""
        return all(labels[axis] in wanted for axis, wanted in self.when.items())


@dataclass(frozen=True)
class Study:
    """What a study file says; :func:`read_study` describes its keys."""

    title: str
    folder: Path
    configs: tuple[Path, ...]
    overrides: dict[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    seed_options: tuple[str, ...]
    exclude: tuple[Rule, ...]
    rules: tuple[Rule, ...]
    metrics: tuple[Metric, ...]


def read_study(path: Path) -> Study:
    """Read a study file.

    Its keys:

    - ``configs``: config files, as ``fit --config A --config B`` takes them, from the current folder.
    - ``folder``: where the cells' run folders and the report go.
    - ``axes``: name -> label -> options by dotted names; or name -> ``{option: NAME, values: [...]}`` with one option
      (or a list of options that all get the value).
    - ``metrics``: name in ``result.json`` -> ``higher`` or ``lower`` (what is better), or a mapping of ``better``,
      ``percent`` (show times 100) and ``label``. The first one is the one that is plotted and judged first.
    - ``overrides``: options of all cells. Later ones win: overrides, axes in their order, rules, seeds.
    - ``seeds``, ``seed_options``: the seeds, and the options that each one sets (``seed_everything``).
    - ``exclude``: combinations that are left out, ``{axis: label or labels}``.
    - ``rules``: ``when`` (as in ``exclude``) with ``set`` (options) or ``ignore`` (axes without effect: full
      fine-tuning has no rank). Cells whose options are the same are one cell, which runs once.
    - ``title``: of the report.

    Raises:
        FileNotFoundError: the study file or one of its config files is missing.
        ValueError: a key is unknown, or a value is not what it must be.
    """
    content = load_yaml(path)
    try:
        return _study(content, path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping, read as configs are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML, or not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        check_yaml(path.read_text(encoding="utf-8"), str(path))
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of keys, found a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _study(content: dict[str, Any], path: Path) -> Study:
    _check_keys("a study", content, _KEYS)
    for key in ("folder", "configs", "axes", "metrics"):
        if not content.get(key):
            raise ValueError(f"`{key}` is missing; a study has {', '.join(_KEYS)}")
    configs = tuple(Path(str(name)) for name in _list("configs", content["configs"]))
    for config in configs:
        if not config.is_file():
            raise FileNotFoundError(f"{path}: configs: {config}: no such file (from the folder {Path.cwd()})")
    axes = tuple(_axis(str(name), values) for name, values in _mapping("axes", content["axes"]).items())
    labels = {axis.name: tuple(axis.values) for axis in axes}
    seeds = tuple(_list("seeds", content.get("seeds")))
    if any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in seeds):
        raise ValueError(f"seeds must be whole numbers of at least 0, got {list(seeds)}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds has one of them twice: {list(seeds)}")
    metrics = tuple(_metric(str(name), given) for name, given in _mapping("metrics", content["metrics"]).items())
    exclude = [Rule(_when("exclude", when, labels)) for when in _list("exclude", content.get("exclude"))]
    return Study(
        title=str(content.get("title") or path.stem),
        folder=Path(str(content["folder"])),
        configs=configs,
        overrides=_options("overrides", content.get("overrides")),
        axes=axes,
        seeds=seeds,
        seed_options=tuple(str(name) for name in _list("seed_options", content.get("seed_options", "seed_everything"))),
        exclude=tuple(exclude),
        rules=tuple(_rule(given, labels) for given in _list("rules", content.get("rules"))),
        metrics=metrics,
    )


def _axis(name: str, given: Any) -> Axis:
    if name in ("seed", "cell", "state"):
        raise ValueError(f"axes: {name} cannot be an axis's name" + ("; use `seeds`" if name == "seed" else ""))
    given = _mapping(f"axes: {name}", given)
    if given.keys() & {"option", "values"}:
        _check_keys(f"axes: {name}", given, ("option", "values"))
        options, values = _list(name, given.get("option")), _list(name, given.get("values"))
        if not options or not values or any(isinstance(value, (dict, list)) for value in values):
            raise ValueError(
                f"axes: {name} must have an option and a list of values, or a mapping from labels to options: "
                f"{name}: {{option: model.init_args.adapter.rank, values: [4, 8]}}"
            )
        given = {label_of(value): dict.fromkeys(map(str, options), value) for value in values}
        if len(given) < len(values):
            raise ValueError(f"axes: {name} has a value twice: {values}")
    if not given:
        raise ValueError(f"axes: {name} has no values")
    return Axis(name, {label_of(key): _options(f"axes: {name}: {key}", value) for key, value in given.items()})


def _metric(name: str, given: Any) -> Metric:
    if isinstance(given, str):
        given = {"better": given}
    given = _mapping(f"metrics: {name}", given)
    _check_keys(f"metrics: {name}", given, ("better", "percent", "label"))
    if given.get("better") not in ("higher", "lower"):
        raise ValueError(f"metrics: {name}: what is better must be `higher` or `lower`, got {given.get('better')!r}")
    if not isinstance(given.get("percent", False), bool):
        raise ValueError(f"metrics: {name}: percent must be true or false, got {given['percent']!r}")
    return Metric(name, **given)


def _rule(given: Any, labels: Mapping[str, tuple[str, ...]]) -> Rule:
    given = _mapping("rules", given)
    _check_keys("rules", given, ("when", "ignore", "set"))
    if not given.get("ignore") and not given.get("set"):
        raise ValueError(f"rules: {given} does nothing: it needs `ignore` (axes) or `set` (options) beside `when`")
    ignore = tuple(str(axis) for axis in _list("ignore", given.get("ignore")))
    for axis in ignore:
        _check_known("rules: ignore", axis, labels)
    return Rule(_when("rules: when", given.get("when"), labels), ignore, _options("rules: set", given.get("set")))


def _when(where: str, given: Any, labels: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    when = {str(axis): tuple(map(label_of, _list(where, value))) for axis, value in _mapping(where, given).items()}
    if not when:
        raise ValueError(f"{where} must name at least one axis and its labels: {{method: full}}")
    for axis, wanted in when.items():
        _check_known(where, axis, labels)
        for label in wanted:
            _check_known(f"{where}: {axis}", label, labels[axis])
    return when


def label_of(value: Any) -> str:
    """A value as YAML would write it.

    >>> [label_of(value) for value in (4, True, "dora", None)]
    ['4', 'true', 'dora', 'null']
    """
    return (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or value is True or value is False
        else str(value)
    )


def _options(where: str, given: Any) -> dict[str, Any]:
    options = {str(name): value for name, value in _mapping(where, {} if given is None else given).items()}
    for name in options:
        if name in _OURS:
            raise ValueError(f"{where}: {name} cannot be set: {_OURS[name]}")
    return options


def _mapping(where: str, given: Any) -> dict[Any, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping, got {given!r}")
    return given


def _list(where: str, given: Any) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, dict) and where in ("seeds", "configs", "exclude", "rules"):
        raise ValueError(f"{where} must be a list, got {given!r}")
    return given if isinstance(given, list) else [given]


def _check_keys(where: str, given: Mapping[Any, Any], known: Iterable[str]) -> None:
    for key in given:
        _check_known(where, str(key), known)


def _check_known(where: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        raise ValueError(f"{where} has no `{name}`; {hint}it can be {', '.join(known)}")

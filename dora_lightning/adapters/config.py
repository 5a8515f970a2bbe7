"""What to adapt, and how: one plain dataclass that YAML, the command line and checkpoints can all hold."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

METHODS = ("dora", "lora", "magnitude")
NORM_AXES = ("out", "in")


@dataclass
class AdapterConfig:
    """Which modules are adapted, and how.

    Modules are named as in PEFT: a list holds names or dotted suffixes (``q_proj``, ``mlp.up_proj``), a single string
    is a regular expression that matches the whole dotted name, and ``all-linear`` means every ``nn.Linear`` except
    the output embedding.

    Args:
        method: ``dora`` (magnitude and low-rank direction), ``lora`` (low-rank update alone) or ``magnitude``
            (magnitude alone).
        rank: rank of the direction update.
        alpha: the update is scaled by ``alpha / rank``. Twice the rank if not given, as in the paper's experiments.
        dropout: dropout probability of the low-rank path's input.
        target_modules: modules that ``method`` is applied to.
        magnitude_only_modules: modules that train their magnitude alone, whether or not they are also targets
            (reduced granularity, paper section 5.6).
        exclude_modules: modules that neither option above reaches, whatever they match.
        detach_norm: hold the norm constant for autograd (paper, section 4.3). ``False`` gives the full gradient.
        exact_dropout: drop the base path's input too, ``W x + (g - 1) W x~ + g s B A x~``, as the official code and
            PEFT do, at the price of a second product with the base weight. Matters only where ``dropout > 0``.
        norm_axis: ``out`` for one magnitude per output feature (every published adapter), ``in`` for one per input
            feature (the paper's "column-wise" taken literally over ``nn.Linear.weight``).

    Raises:
        ValueError: a value is out of range or unknown; the message says what was expected.
    """

    method: str = "dora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    magnitude_only_modules: str | list[str] = field(default_factory=list)
    exclude_modules: str | list[str] = field(default_factory=list)
    detach_norm: bool = True
    exact_dropout: bool = False
    norm_axis: str = "out"

    def __post_init__(self) -> None:
        """Check every value."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {self.rank!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be greater than 0, or null for twice the rank, got {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.norm_axis not in NORM_AXES:
            raise ValueError(f"norm_axis must be 'out' or 'in', got {self.norm_axis!r}")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name the modules to adapt, or use 'all-linear'")
        for name in ("target_modules", "magnitude_only_modules", "exclude_modules"):
            _check_patterns(name, getattr(self, name))
        self._check_unused_options()

    @property
    def scaling(self) -> float:
        """``s = alpha / rank``."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, for checkpoints and hyperparameters."""
        return asdict(self)

    def _check_unused_options(self) -> None:
        """An option that the method would silently ignore is an error."""
        ignored: list[str] = []
        if self.method != "dora":
            ignored += ["detach_norm", "exact_dropout"]
        if self.method == "lora" and not self.magnitude_only_modules:
            ignored += ["norm_axis"]
        if self.method == "magnitude":
            ignored += ["rank", "alpha", "dropout"]
        for name in ignored:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect with method={self.method!r}; remove it")
        if self.exact_dropout and self.norm_axis == "in":
            raise ValueError("exact_dropout is defined for norm_axis='out' only")


def _check_patterns(option: str, patterns: str | list[str]) -> None:
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{option}: {patterns!r} is not a regular expression: {error}") from error
    elif not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"{option} must be a string or a list of module names, got {patterns!r}")

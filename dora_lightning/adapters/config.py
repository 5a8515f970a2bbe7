"""What to adapt, and how: one plain dataclass that YAML, the command line and checkpoints can all hold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from dora_lightning.adapters.patterns import matches
from dora_lightning.messages import check_real, check_whole

METHODS = ("dora", "lora", "vera", "dvora", "magnitude", "full")
NORM_AXES = ("out", "in")
INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_<steps>", "olora")

# options that only some methods read
_READ_BY = {
    **dict.fromkeys(("rank", "dropout"), ("dora", "lora", "vera", "dvora")),
    **dict.fromkeys(("alpha", "use_rslora", "init", "rank_pattern", "alpha_pattern"), ("dora", "lora")),
    **dict.fromkeys(("detach_norm", "exact_dropout"), ("dora", "dvora")),
    **dict.fromkeys(("d_initial", "projection_seed"), ("vera", "dvora")),
    "norm_axis": ("dora", "dvora", "magnitude"),
}
_Value = TypeVar("_Value")


@dataclass
class AdapterConfig:
    """Which modules are adapted, and how.

    Modules are named as in PEFT: a list holds names or dotted suffixes (``q_proj``, ``mlp.up_proj``), a single string
    is a regular expression that matches the whole dotted name, and ``all-linear`` means every ``nn.Linear`` (and
    ``Conv1D`` of transformers) except the output embedding.

    Args:
        method: ``dora`` (magnitude and low-rank direction), ``lora`` (low-rank update alone), ``vera`` (two vectors
            scale one frozen random pair that all modules share), ``dvora`` (magnitude and VeRA's direction),
            ``magnitude`` (magnitude alone) or ``full`` (the modules' own parameters).
        rank: rank of the direction update.
        alpha: the update is scaled by ``alpha / rank``. Twice the rank if not given, as in the paper's experiments.
        dropout: dropout probability of the low-rank path's input. Embeddings have none: their input is an index.
        target_modules: modules that ``method`` is applied to.
        magnitude_only_modules: modules that train their magnitude alone, whether or not they are also targets
            (reduced granularity, paper section 5.6).
        exclude_modules: modules that neither option above reaches, whatever they match.
        detach_norm: hold the norm constant for autograd (paper, section 4.3). ``False`` gives the full gradient.
        exact_dropout: drop the base path's input too, ``W x + (g - 1) W x~ + g s B A x~``, as the official code and
            PEFT do, at the price of a second product with the base weight. Matters only where ``dropout > 0``.
        norm_axis: ``out`` for one magnitude per output feature (every published adapter), ``in`` for one per input
            feature (the paper's "column-wise" taken literally over ``nn.Linear.weight``).
        init: how ``A`` and ``B`` start: ``kaiming`` (uniform ``A``, zero ``B``), ``gaussian`` (normal ``A`` of standard
            deviation ``1 / rank``, zero ``B``), ``orthogonal`` (random, with ``B A = 0``), ``pissa`` (the principal
            singular vectors of the weight), ``pissa_niter_<steps>`` (found by a fast randomised SVD) or ``olora``
            (from its QR decomposition). The model starts at the pretrained function with all of them.
        use_rslora: scale by ``alpha / sqrt(rank)`` (rank-stabilised LoRA).
        rank_pattern: regular expression for the end of a module's name -> its rank, as in PEFT; the first one counts.
        alpha_pattern: the same for alpha.
        d_initial: what VeRA's ``lambda_d`` starts from.
        projection_seed: seed of VeRA's random pair.
        resolved: filled in when adapters are injected, not an option: what a checkpoint's reader must know of the model
            (names of modules whose weight is stored ``[in, out]``, of those whose weight is tied to another module's,
            and the shape of VeRA's random pair).

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
    init: str = "kaiming"
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    d_initial: float = 0.1
    projection_seed: int = 0
    resolved: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Check every value."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        check_whole(1, rank=self.rank)
        check_real(above=0, none="twice the rank", alpha=self.alpha)
        check_real(0, below=1, dropout=self.dropout)
        check_real(d_initial=self.d_initial)
        check_whole(0, projection_seed=self.projection_seed)
        if self.norm_axis not in NORM_AXES:
            raise ValueError(f"norm_axis must be 'out' or 'in', got {self.norm_axis!r}")
        if not self.target_modules:
            raise ValueError("target_modules is empty: name the modules to adapt, or use 'all-linear'")
        for name in ("target_modules", "magnitude_only_modules", "exclude_modules"):
            _check_patterns(name, getattr(self, name))
        if self.init not in INITS[:-2] + INITS[-1:] and not re.fullmatch(r"pissa_niter_\d+", self.init):
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {self.init!r}")
        ranks: dict[str, Any] = {f"rank_pattern: {pattern}": rank for pattern, rank in self.rank_pattern.items()}
        check_whole(1, **ranks)
        alphas: dict[str, Any] = {f"alpha_pattern: {pattern}": alpha for pattern, alpha in self.alpha_pattern.items()}
        check_real(above=0, **alphas)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                _check_patterns(name, pattern)
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            raise ValueError("init='orthogonal' needs an even rank: half of it goes to A, half to B")
        self._check_unused_options()

    @property
    def scaling(self) -> float:
        """``s = alpha / rank`` of modules that no pattern names."""
        return self.scaling_of("")

    def rank_of(self, module: str) -> int:
        """Rank of the module of that dotted name."""
        return by_pattern(module, self.rank_pattern, self.rank)

    def scaling_of(self, module: str) -> float:
        """``s`` of the module of that dotted name."""
        rank = self.rank_of(module)
        alpha = by_pattern(module, self.alpha_pattern, 2 * rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only, for checkpoints and hyperparameters."""
        return asdict(self)

    def _check_unused_options(self) -> None:
        """An option that the method would silently ignore is an error."""
        blank = {name: getattr(self, name) for name in ("rank_pattern", "alpha_pattern") if not getattr(self, name)}
        for name, readers in _READ_BY.items():
            if self.method in readers or (name == "norm_axis" and self.magnitude_only_modules) or name in blank:
                continue
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect with method={self.method!r}; remove it")
        if self.exact_dropout and self.norm_axis == "in":
            raise ValueError("exact_dropout is defined for norm_axis='out' only")


def by_pattern(module: str, patterns: Mapping[str, _Value], default: _Value) -> _Value:
    """The value of the first pattern that matches the end of a module's name, as PEFT matches its patterns.

    >>> by_pattern("layers.0.q_proj", {"v_proj": 4, "q_proj": 8}, 16)
    8
    """
    return next((value for key, value in patterns.items() if matches(rf"(.*\.)?({key})", module)), default)


def outside(parts: Sequence[str], excluded: str | list[str]) -> str:
    """``exclude_modules`` that leaves out what lies in none of the named parts of a model, and what is excluded anyway.

    >>> re.fullmatch(outside(["encoder"], ["q_proj"]), "encoder.layers.0.v_proj") is None
    True
    """
    inside = "|".join(re.escape(part) for part in parts)
    rest = rf"(?!(?:{inside})\.).*"
    if isinstance(excluded, str):
        return rf"{excluded}|{rest}"
    return "|".join([*(rf"(?:.*\.)?{re.escape(name)}" for name in excluded), rest])


def _check_patterns(option: str, patterns: str | list[str]) -> None:
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{option}: {patterns!r:.200} is not a regular expression: {error}") from error
    elif not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) and p for p in patterns):
        raise ValueError(f"{option} must be a string or a list of module names, got {patterns!r}")

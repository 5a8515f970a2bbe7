"""Act after a method of one LightningModule, for as long as the Trainer whose callback asked for it is the one in use.

Callbacks are set up at every stage, and a module may be fitted by one Trainer after another: what an earlier Trainer's
callbacks asked for is dropped when a later one's ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging

_HOOKS = "dora_lightning_hooks"


@dataclass
class _Hooks:
    trainer: Trainer
    actions: dict[tuple[int, int], Callable[..., None]] = field(default_factory=dict)


def after_method(
    pl_module: LightningModule,
    name: str,
    trainer: Trainer,
    callback: Callback,
    action: Callable[..., None],
    order: int = 0,
) -> None:
    """Call ``action(result, *args)`` whenever ``pl_module.<name>(*args)`` has run; asking again changes nothing.

    Args:
        pl_module: its class stays as it is.
        name: the method.
        trainer: the one that ``callback`` belongs to.
        callback: who asks.
        action: what to do.
        order: actions of lower order run first.
    """
    hooks: _Hooks | None = getattr(getattr(pl_module, name), _HOOKS, None)
    if hooks is None:
        hooks = _Hooks(trainer)
        # a plain function: a copy of the module (WeightAveraging) shares it, trainer and all
        wrapped = _wrap(getattr(pl_module, name), hooks)
        setattr(wrapped, _HOOKS, hooks)
        object.__setattr__(pl_module, name, wrapped)
    if hooks.trainer is not trainer:
        hooks.trainer = trainer
        hooks.actions.clear()
    hooks.actions[order, id(callback)] = action


def _wrap(method: Callable[..., Any], hooks: _Hooks) -> Callable[..., Any]:
    # no functools.wraps: Lightning looks behind it for what the class overrides
    def call(*args: Any) -> Any:
        result = method(*args)
        # in order, and as they were asked for
        for _, action in sorted(hooks.actions.items(), key=lambda item: item[0][0]):
            action(result, *args)
        return result

    return call


def check_before_averaging(trainer: Trainer, callback: Callback) -> None:
    """Refuse a WeightAveraging that comes first: it copies the module in its ``setup``, without what is put in later.

    Raises:
        ValueError: names both callbacks.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, WeightAveraging):
            ours, theirs = type(callback).__name__, type(other).__name__
            raise ValueError(f"put {ours} before {theirs} in the list of callbacks: it copies the module")

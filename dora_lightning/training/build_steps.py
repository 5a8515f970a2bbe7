"""Act on a LightningModule right after its model is built, whoever builds it and in whatever order callbacks come.

Lightning calls ``configure_model`` inside the strategy's contexts, before the module is wrapped and before optimisers
are made: the one moment that is right for injecting adapters and for sharding, for models built in ``__init__`` and
for those built in ``configure_model`` itself. (In ``setup`` the latter do not exist yet; in ``on_fit_start`` the
optimiser would never see the adapters.) Callbacks register steps in their ``setup``; the wrapped ``configure_model``
runs them in the order of :class:`BuildStep`, and running them again must change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from lightning.pytorch import LightningModule

_STEPS = "_dora_lightning_build_steps"


class BuildStep(IntEnum):
    """What is done to a model once it is built, in this order."""

    INJECT = 0
    RESTRICT = 1
    SHARD = 2


def after_model_is_built(pl_module: LightningModule, step: BuildStep, action: Callable[[], None]) -> None:
    """Run ``action`` whenever ``pl_module.configure_model`` has run."""
    steps: list[tuple[BuildStep, Callable[[], None]]] | None = pl_module.__dict__.get(_STEPS)
    if steps is None:
        steps = []
        object.__setattr__(pl_module, _STEPS, steps)
        object.__setattr__(pl_module, "configure_model", _wrap(pl_module.configure_model, steps))
    steps.append((step, action))
    steps.sort(key=lambda entry: entry[0])


def _wrap(build: Callable[[], None], steps: list[tuple[BuildStep, Callable[[], None]]]) -> Callable[[], None]:
    def configure_model() -> None:
        build()
        for _, action in steps:
            action()

    return configure_model

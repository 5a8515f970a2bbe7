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

from lightning.pytorch import Callback, LightningModule, Trainer

from dora_lightning.training.method_hooks import after_method, check_before_averaging


class BuildStep(IntEnum):
    """What is done to a model once it is built, in this order."""

    INJECT = 0
    RESTRICT = 1
    SHARD = 2


def after_model_is_built(
    callback: Callback,
    trainer: Trainer,
    pl_module: LightningModule,
    step: BuildStep,
    action: Callable[[LightningModule], None],
) -> None:
    """Run ``action(pl_module)`` whenever ``pl_module.configure_model`` has run; to be called in ``callback.setup``.

    Raises:
        ValueError: ``callback`` comes after a WeightAveraging, which has copied the module by then.
    """
    check_before_averaging(trainer, callback)
    after_method(pl_module, "configure_model", trainer, callback, lambda _: action(pl_module), step)

"""DoRA in any LightningModule."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from typing_extensions import override

from dora_lightning.adapters import AdapterConfig, inject_adapters
from dora_lightning.training.adapter_run import AdapterRun
from dora_lightning.training.build_steps import BuildStep, after_model_is_built


class DoRA(Callback):
    """Injects adapters into a LightningModule; nothing of the module's code changes.

    The module's own ``training_step``, ``configure_optimizers`` and so on see the adapted model. Checkpoints hold the
    adapter and whatever else trains, and are refused on another base. Everything inside the adapted model is frozen but
    the adapters; what lies outside of it (with ``module``) trains as it did.

    Args:
        method: ``dora``, ``lora`` or ``magnitude``.
        rank: rank of the direction update.
        alpha: the update is scaled by ``alpha / rank``; twice the rank if not given.
        dropout: dropout probability of the low-rank path's input.
        target_modules: names or dotted suffixes, one regular expression, or ``all-linear``.
        magnitude_only_modules: modules that train their magnitude alone.
        detach_norm: hold the norm constant for autograd.
        exact_dropout: drop the base path's input too, as PEFT does.
        norm_axis: ``out`` or ``in``.
        module: dotted name of the submodule to adapt (``model.decoder``); by default the whole LightningModule.

    Raises:
        ValueError: a value is out of range; see :class:`~dora_lightning.adapters.AdapterConfig`.
    """

    def __init__(
        self,
        method: str = "dora",
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        magnitude_only_modules: str | list[str] | None = None,
        detach_norm: bool = True,
        exact_dropout: bool = False,
        norm_axis: str = "out",
        module: str | None = None,
    ) -> None:
        self.config = AdapterConfig(
            method=method,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=target_modules,
            magnitude_only_modules=magnitude_only_modules or [],
            detach_norm=detach_norm,
            exact_dropout=exact_dropout,
            norm_axis=norm_axis,
        )
        self.module = module
        self._run = AdapterRun()
        self._prepared: LightningModule | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have adapters injected as soon as the model is built, at every stage, once."""
        _check_order(trainer, self)
        if self._prepared is pl_module:
            return
        self._prepared = pl_module
        after_model_is_built(pl_module, BuildStep.INJECT, partial(self._inject, pl_module))
        # callbacks' own hooks are skipped with save_weights_only=True, the module's never are
        _extend_hook(pl_module, "on_save_checkpoint", partial(self._run.on_save_checkpoint, pl_module))
        _extend_hook(pl_module, "on_load_checkpoint", partial(self._run.on_load_checkpoint, pl_module))
        # the base is not in the checkpoint; on_load_checkpoint does what strict loading would
        pl_module.strict_loading = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimisers have what trains, and print what that is."""
        self._run.on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let optimiser settings that changed since the checkpoint win."""
        self._run.on_train_start(trainer)

    def _inject(self, pl_module: LightningModule) -> None:
        model = _submodule(pl_module, self.module)
        if hasattr(model, "adapter_config"):
            return  # a second call of configure_model, or a later stage
        inject_adapters(model, self.config)
        name = getattr(getattr(model, "config", None), "name_or_path", None) or type(model).__qualname__
        self._run.remember_base(model, name)


def _submodule(pl_module: LightningModule, name: str | None) -> nn.Module:
    if name is None:
        return pl_module
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(child for child, _ in pl_module.named_children())
        raise ValueError(f"module={name!r} is not in {type(pl_module).__name__}, which has: {children}") from error


def _extend_hook(pl_module: LightningModule, name: str, action: Any) -> None:
    """Run ``action`` on the checkpoint after the module's own hook ``name``."""
    original = getattr(pl_module, name)

    def hook(checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        action(checkpoint)

    object.__setattr__(pl_module, name, hook)


def _check_order(trainer: Trainer, callback: DoRA) -> None:
    """WeightAveraging copies the module in its ``setup``; a copy made before ours would have no adapters."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, WeightAveraging):
            raise ValueError(f"put DoRA before {type(other).__name__} in the list of callbacks: it copies the module")

"""DoRA in any LightningModule."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from dora_lightning.adapters import AdapterConfig, inject_adapters, load_peft_adapter
from dora_lightning.training.adapter_run import AdapterRun, check_precision
from dora_lightning.training.atomic_checkpoint import write_checkpoints_atomically
from dora_lightning.training.build_steps import BuildStep, after_model_is_built
from dora_lightning.training.finite_steps import FiniteSteps
from dora_lightning.training.method_hooks import after_method
from dora_lightning.training.stored_names import base_name_or_path

# the run with adapters that a module is in goes on when another Trainer takes the module over
_RUN = "_dora_lightning_run"


class DoRA(Callback):
    """Injects adapters into a LightningModule; nothing of the module's code changes.

    The module's own ``training_step``, ``configure_optimizers`` and so on see the adapted model. Checkpoints hold the
    adapter and whatever else trains, and are refused on another base. Everything inside the adapted model is frozen but
    the adapters; what lies outside of it (with ``module``) trains as it did.

    Args:
        method: ``dora``, ``lora``, ``vera``, ``dvora``, ``magnitude`` or ``full``.
        rank: rank of the direction update.
        alpha: the update is scaled by ``alpha / rank``; twice the rank if not given.
        dropout: dropout probability of the low-rank path's input.
        target_modules: names or dotted suffixes, one regular expression, or ``all-linear``.
        magnitude_only_modules: modules that train their magnitude alone.
        exclude_modules: modules that neither option above reaches, whatever they match.
        detach_norm: hold the norm constant for autograd.
        exact_dropout: drop the base path's input too, as PEFT does.
        norm_axis: ``out`` or ``in``.
        init: how ``A`` and ``B`` start: ``kaiming``, ``gaussian``, ``orthogonal``, ``pissa``, ``pissa_niter_<steps>``
            or ``olora``.
        use_rslora: scale by ``alpha / sqrt(rank)``.
        rank_pattern: regular expression for the end of a module's name -> its rank.
        alpha_pattern: the same for alpha.
        d_initial: what VeRA's ``lambda_d`` starts from.
        projection_seed: seed of VeRA's random pair.
        module: dotted name of the submodule to adapt (``model.decoder``); by default the whole LightningModule.
        init_from: folder of a PEFT adapter to start from; its method, rank, scaling and modules must be those above,
            and its names relative to the adapted module. A checkpoint that is resumed wins over it.
        on_nonfinite: what happens before an optimizer step whose loss or gradient is NaN or infinite: ``raise`` stops
            the run and names the batch, ``skip`` leaves the step out and warns, ``ignore`` does not look, for modules
            that see to it themselves. Checkpoints of weights that are not finite are refused in any case.

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
        exclude_modules: str | list[str] | None = None,
        detach_norm: bool = True,
        exact_dropout: bool = False,
        norm_axis: str = "out",
        init: str = "kaiming",
        use_rslora: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        d_initial: float = 0.1,
        projection_seed: int = 0,
        module: str | None = None,
        init_from: str | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        self.config = AdapterConfig(
            method=method,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target_modules=target_modules,
            magnitude_only_modules=magnitude_only_modules or [],
            exclude_modules=exclude_modules or [],
            detach_norm=detach_norm,
            exact_dropout=exact_dropout,
            norm_axis=norm_axis,
            init=init,
            use_rslora=use_rslora,
            rank_pattern=rank_pattern or {},
            alpha_pattern=alpha_pattern or {},
            d_initial=d_initial,
            projection_seed=projection_seed,
        )
        self.module = module
        self.init_from = init_from
        self._steps = FiniteSteps(on_nonfinite)
        self._run = AdapterRun()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have adapters injected as soon as the model is built, at every stage, once."""
        check_precision(trainer)
        write_checkpoints_atomically(trainer.strategy)
        after_model_is_built(self, trainer, pl_module, BuildStep.INJECT, self._inject)
        self._run = run = pl_module.__dict__.get(_RUN) or AdapterRun()
        object.__setattr__(pl_module, _RUN, run)
        # callbacks' own hooks are skipped with save_weights_only=True, the module's never are
        for name, action in (
            ("on_save_checkpoint", run.on_save_checkpoint),
            ("on_load_checkpoint", run.on_load_checkpoint),
        ):
            after_method(pl_module, name, trainer, self, lambda _, checkpoint, do=action: do(pl_module, checkpoint))
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

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note which batch the next loss is of."""
        self._steps.on_train_batch_start(batch, batch_idx)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note a loss."""
        self._steps.on_before_backward(loss)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop before a step whose loss or gradient is not finite."""
        self._steps.on_before_optimizer_step(trainer, pl_module, optimizer)

    def _inject(self, pl_module: LightningModule) -> None:
        model = _submodule(pl_module, self.module)
        if self._run.injected is None:
            inject_adapters(model, self.config)
            if self.init_from is not None:
                load_peft_adapter(model, self.init_from)
            self._run.remember_base(model, base_name_or_path(model) or type(model).__qualname__)
            self._run.injected = (self.module, self.config)
        elif self._run.injected != (self.module, self.config):
            raise ValueError(
                f"this {type(pl_module).__name__} has adapters of another DoRA callback already: "
                f"{self._run.injected}, not {(self.module, self.config)}; make the module anew"
            )


def _submodule(pl_module: LightningModule, name: str | None) -> nn.Module:
    if name is None:
        return pl_module
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(child for child, _ in pl_module.named_children())
        raise ValueError(f"module={name!r} is not in {type(pl_module).__name__}, which has: {children}") from error

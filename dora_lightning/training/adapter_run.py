"""What a run with adapters does when it starts, at each checkpoint, and when it is resumed.

A backbone and the ``DoRA`` callback do the same here; both hold one :class:`AdapterRun`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from rich.console import Console
from torch import nn

from dora_lightning.adapters import AdapterConfig, adapted_submodule, summarize_adapters
from dora_lightning.training.adapter_checkpoint import KEY, add_frozen, check_adapter_entry, write_adapter_entry
from dora_lightning.training.base_identity import awaited_dtypes, base_identity
from dora_lightning.training.checkpoint_files import RUN_KEY
from dora_lightning.training.parameter_groups import check_optimizers
from dora_lightning.training.random_state import gather_random_states, restore_random_states
from dora_lightning.training.report import summary_table
from dora_lightning.training.resume import (
    apply_overrides,
    check_optimizer_classes,
    check_resumable,
    config_changes,
    configured_options,
    optimizer_classes,
    trainer_settings,
)
from dora_lightning.training.streaming import stream_weights
from dora_lightning.training.trained_inputs import differences, inputs_of


class AdapterRun:
    """State and steps of a run with adapters, to be called from the hooks of the same names.

    Attributes:
        injected: what a callback put in, for it to recognise; ``None`` before, and with a backbone.
    """

    def __init__(self) -> None:
        self.injected: Any = None
        self._base: dict[str, Any] = {}
        self._awaited: dict[str, torch.dtype] = {}
        self._configured: list[list[dict[str, Any]]] = []
        self._restored: list[list[dict[str, Any]]] = []
        self._restored_classes: list[str] = []
        self._random_states: list[dict[str, torch.Tensor]] = []

    def remember_base(self, model: nn.Module, name: str) -> None:
        """Take down what the base model is, while its weights are whole."""
        self._base = base_identity(model, name)
        self._awaited = awaited_dtypes(model)

    def stream_base(self, pl_module: LightningModule, device: torch.device) -> None:
        """Read the weights of a model on the meta device into what this process holds of it; note what they are."""
        self._base = stream_weights(pl_module, self._base["name"], device, self._awaited)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the optimisers have what trains, and print what that is."""
        check_optimizers(pl_module, trainer.optimizers)
        self._check_optimizer_classes(trainer)
        self._configured = configured_options(trainer.optimizers)
        if trainer.is_global_zero:
            Console().print(summary_table(summarize_adapters(pl_module)))

    def on_train_start(self, trainer: Trainer) -> None:
        """Let optimiser settings that changed since the checkpoint win, and go on with its random numbers."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        restored, self._restored = self._restored, []  # a later fit need not begin with a checkpoint
        for change in apply_overrides(restored, self._configured, trainer.optimizers, schedulers):
            rank_zero_info(f"The config overrides the checkpoint: {change}")
        states, self._random_states = self._random_states, []
        restore_random_states(states)

    def on_save_checkpoint(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what trains, and say what base it belongs to."""
        prefix, config = _adapted(pl_module)
        write_adapter_entry(checkpoint, pl_module, config, self._base, prefix)
        trainer = pl_module._trainer
        if trainer is not None:
            checkpoint[KEY]["optimizers"] = optimizer_classes(trainer.optimizers)
            checkpoint[KEY]["trainer"] = trainer_settings(trainer)
        checkpoint[KEY]["inputs"] = inputs_of(trainer)
        checkpoint[KEY]["optimizer_options"] = self._configured
        checkpoint[KEY]["random_states"] = gather_random_states()

    def on_load_checkpoint(self, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or adapter."""
        _, config = _adapted(pl_module)
        check_adapter_entry(checkpoint, pl_module, config, self._base)
        if "averaging_state" in checkpoint:
            add_frozen(checkpoint, pl_module)  # WeightAveraging loads both of its models strictly
        trainer = pl_module._trainer
        for difference in differences(checkpoint[KEY].get("inputs", {}), inputs_of(trainer)):
            rank_zero_warn(f"The checkpoint's model reads other inputs now: {difference}")
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            check_resumable(checkpoint, trainer)
            entry = checkpoint[KEY]
            self._restored_classes = entry.get("optimizers", [])
            self._restored = entry.get("optimizer_options", [])
            self._random_states = entry.get("random_states", [])
            if trainer.optimizers:  # strategies that shard read the checkpoint after they were made
                self._check_optimizer_classes(trainer)
            if RUN_KEY not in checkpoint:  # the command's checkpoints hold the whole config, which is compared
                for line in config_changes(entry.get("trainer", {}), trainer_settings(trainer)):
                    rank_zero_info(f"The config overrides the checkpoint: {line}")

    def _check_optimizer_classes(self, trainer: Trainer) -> None:
        saved, self._restored_classes = self._restored_classes, []
        check_optimizer_classes(saved, trainer.optimizers, str(trainer.ckpt_path))


def check_precision(trainer: Trainer | None) -> None:
    """Refuse a precision plugin that quantises after adapters are there.

    Raises:
        ValueError: it is such a plugin; the message has the alternative.
    """
    if trainer is not None and type(trainer.precision_plugin).__name__ == "BitsandbytesPrecision":
        raise ValueError(
            "BitsandbytesPrecision quantises the model after its magnitudes are set, which would start training at "
            "another function; give the model its quantised base instead: quantization: nf4 of the backbone, or "
            "quantization_config of from_pretrained in your own module"
        )


def run_of(pl_module: LightningModule) -> AdapterRun:
    """The run with adapters that ``pl_module`` is in, whether a backbone or the ``DoRA`` callback holds it.

    Raises:
        ValueError: it is in none.
    """
    for value in vars(pl_module).values():
        if isinstance(value, AdapterRun):
            return value
    raise ValueError(
        f"{type(pl_module).__name__} has parameters on the meta device, and no adapters that tell what pretrained "
        "model they belong to; add the callback DoRA, or build the module with its weights"
    )


def _adapted(pl_module: LightningModule) -> tuple[str, AdapterConfig]:
    name, model = adapted_submodule(pl_module)
    return (f"{name}." if name else ""), cast(AdapterConfig, model.adapter_config)

"""Reduced granularity: some modules train their magnitude alone."""

from __future__ import annotations

import re

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from typing_extensions import override

from dora_lightning.adapters import AdapterLayer, adapter_layers, restrict_to_magnitude
from dora_lightning.training.build_steps import BuildStep, after_model_is_built

MLP_MODULES = (
    r"(.*\.)?((mlp|ffn|feed_forward|feedforward|DenseReluDense)\..+|fc1|fc2|gate_proj|up_proj|down_proj|linear1|linear2"
    r"|intermediate\.dense|(?<!attention\.)output\.dense)"
)
"""The linear modules of a transformer's MLP, as the common architectures call them."""


class MagnitudeOnly(Callback):
    """Lets the named modules train their magnitude alone, the rest as it is (paper, section 5.6).

    Beside ``DoRA`` or a backbone, the named modules give up their low-rank direction. Alone, everything but the
    magnitudes of the named modules is frozen.

    Args:
        modules: names or dotted suffixes, or one regular expression; the MLP's linear modules by default.
    """

    def __init__(self, modules: str | list[str] | None = None) -> None:
        self.modules = modules

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the modules restricted after adapters are injected, at every stage."""
        after_model_is_built(self, trainer, pl_module, BuildStep.RESTRICT, self._restrict)

    def _restrict(self, pl_module: LightningModule) -> None:
        model = _adapted_or_whole(pl_module)
        if not any(True for _ in adapter_layers(model)):
            model.requires_grad_(False)
        names = restrict_to_magnitude(model, self.modules or _mlp_modules(model))
        rank_zero_info(f"Magnitude only: {len(names)} modules")


def _adapted_or_whole(pl_module: LightningModule) -> nn.Module:
    return next((module for module in pl_module.modules() if hasattr(module, "adapter_config")), pl_module)


def _mlp_modules(model: nn.Module) -> str | list[str]:
    """Names of the linear modules that the pattern matches: it matches activation functions between them too."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, AdapterLayer))
        and not name.endswith(".base_layer")
        and re.fullmatch(MLP_MODULES, name)
    ]
    return names or MLP_MODULES

"""What is done to a model once it is built: in order, once per callback, and for one Trainer at a time."""

import copy
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from dora_lightning.training.build_steps import BuildStep, after_model_is_built
from dora_lightning.training.method_hooks import after_method


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.layer = nn.Linear(2, 2)

    def configure_model(self) -> None:
        self.done.append("built")


class Inherits(LightningModule):
    """Does not define configure_model."""


def trainer_with(*callbacks: Callback) -> Trainer:
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return Trainer(callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, **options)


def test_steps_run_in_their_order_after_the_model_is_built() -> None:
    module, callbacks = Module(), [Callback(), Callback(), Callback()]
    trainer = trainer_with(*callbacks)
    for callback, step in zip(callbacks, reversed(BuildStep), strict=True):
        after_model_is_built(callback, trainer, module, step, lambda m, name=step.name: m.done.append(name))
    module.configure_model()
    assert module.done == ["built", "INJECT", "RESTRICT", "SHARD"]


def test_a_callback_that_asks_at_every_stage_acts_once() -> None:
    module, callback, other = Module(), Callback(), Callback()
    trainer = trainer_with(callback, other)
    for _ in range(3):
        after_model_is_built(callback, trainer, module, BuildStep.INJECT, lambda m: m.done.append("ours"))
    after_model_is_built(other, trainer, module, BuildStep.INJECT, lambda m: m.done.append("theirs"))
    module.configure_model()
    assert module.done == ["built", "ours", "theirs"]


def test_a_later_trainer_takes_over() -> None:
    module, first, second = Module(), Callback(), Callback()
    after_model_is_built(first, trainer_with(first), module, BuildStep.SHARD, lambda m: m.done.append("first"))
    after_model_is_built(second, trainer_with(second), module, BuildStep.INJECT, lambda m: m.done.append("second"))
    module.configure_model()
    assert module.done == ["built", "second"]


def test_modules_do_not_share_steps() -> None:
    ours, theirs, callback = Module(), Module(), Callback()
    after_model_is_built(callback, trainer_with(callback), ours, BuildStep.INJECT, lambda m: m.done.append("step"))
    theirs.configure_model()
    assert theirs.done == ["built"]


def test_lightning_sees_that_configure_model_is_defined() -> None:
    module, callback = Inherits(), Callback()
    assert not is_overridden("configure_model", module)
    after_model_is_built(callback, trainer_with(callback), module, BuildStep.INJECT, lambda m: None)
    assert is_overridden("configure_model", module)  # else ModelParallelStrategy refuses the module


def test_a_copy_of_the_module_does_not_copy_the_trainer() -> None:
    module, callback = Module(), Callback()
    trainer = trainer_with(callback)
    after_model_is_built(callback, trainer, module, BuildStep.INJECT, lambda m: None)
    copied = copy.deepcopy(module)
    assert copied.configure_model is module.configure_model


def test_what_averages_weights_must_come_later() -> None:
    callback = Callback()
    with pytest.raises(ValueError, match="put Callback before EMAWeightAveraging in the list of callbacks"):
        after_model_is_built(
            callback, trainer_with(EMAWeightAveraging(), callback), Module(), BuildStep.RESTRICT, lambda m: None
        )
    trainer = trainer_with(callback, EMAWeightAveraging())
    after_model_is_built(callback, trainer, Module(), BuildStep.RESTRICT, lambda m: None)


def test_an_action_gets_the_result_and_the_arguments() -> None:
    class Optimized(Module):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["own"] = 1

        def configure_optimizers(self) -> Any:
            return "optimizer"

    module, callback, seen = Optimized(), Callback(), []
    trainer = trainer_with(callback)
    for name in ("on_save_checkpoint", "configure_optimizers"):
        after_method(module, name, trainer, callback, lambda *args: seen.append(args))
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert module.configure_optimizers() == "optimizer"
    assert seen == [(None, {"own": 1}), ("optimizer",)]

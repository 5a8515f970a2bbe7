"""DoRA in LightningModules that know nothing of it."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_modules import InConfigureModel, InSetup, OptimizerFromInit, Plain, SaveAt, make_loader, values
from tiny import MakeTrainer
from torch import nn

from dora_lightning.adapters import adapter_layers
from dora_lightning.callbacks import DoRA

LINEAR = {"net.encoder.0", "net.encoder.2", "net.head"}


def adapted(module: nn.Module) -> set[str]:
    return {name for name, _ in adapter_layers(module)}


def is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in {"magnitude", "lora_A", "lora_B"}


class Start(Callback):
    """Copies the parameters when training starts."""

    def on_train_start(self, trainer: Any, module: LightningModule) -> None:
        self.parameters = values(module)


# Injection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Plain, InConfigureModel, InSetup])
def test_the_base_stays_bit_for_bit_and_every_adapter_moves(kind: type[Plain], make_trainer: MakeTrainer) -> None:
    module, start = kind(), Start()
    make_trainer(max_steps=8, max_epochs=-1, callbacks=[start, DoRA(rank=2)]).fit(module, make_loader())
    assert adapted(module) == LINEAR
    after = values(module)
    assert after.keys() == start.parameters.keys()
    original = values(Plain())
    for name, value in after.items():
        if is_adapter(name):
            assert not torch.equal(value, start.parameters[name]), name
        else:
            assert torch.equal(value, original[name.replace("base_layer.", "")]), name


def test_a_named_submodule_leaves_the_rest_training_as_it_did(make_trainer: MakeTrainer) -> None:
    module, start = Plain(), Start()
    make_trainer(max_steps=8, max_epochs=-1, callbacks=[DoRA(rank=2, module="net.encoder"), start]).fit(
        module, make_loader()
    )
    assert adapted(module) == {"net.encoder.0", "net.encoder.2"}
    for name, value in values(module).items():
        moved = not torch.equal(value, start.parameters[name])
        assert moved == (is_adapter(name) or name.startswith("net.head")), name


def test_a_submodule_that_is_not_there(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"module='encoder' is not in Plain, which has: net"):
        make_trainer(callbacks=[DoRA(module="encoder")]).fit(Plain(), make_loader())


def test_nothing_that_matches_says_what_would(make_trainer: MakeTrainer) -> None:
    module = Plain()
    with pytest.raises(ValueError, match=r"'haed' matches no module\. Did you mean 'head'\?"):
        make_trainer(callbacks=[DoRA(target_modules=["haed"])]).fit(module, make_loader())
    assert not adapted(module)


def test_a_bad_option_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, found 0"):
        DoRA(rank=0)


def test_configure_model_may_be_called_again(make_trainer: MakeTrainer) -> None:
    module = InConfigureModel()
    trainer = make_trainer(max_steps=2, callbacks=[DoRA(rank=2)])
    trainer.fit(module, make_loader())
    before = values(module)
    module.configure_model()
    module.configure_model()
    assert all(torch.equal(value, before[name]) for name, value in values(module).items())
    assert len(before) == len(values(module))


def test_an_optimizer_that_does_not_hold_the_adapters(make_trainer: MakeTrainer) -> None:
    message = r"9 trainable parameters are in no optimiser group: net\.encoder\.0\.lora_A, .* and 6 more\. Build the"
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=[DoRA(rank=2)]).fit(OptimizerFromInit(), make_loader())


def test_the_order_of_callbacks_does_not_matter(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    losses = []
    for number, order in enumerate([slice(None), slice(None, None, -1)]):
        module = Plain()
        saver = ModelCheckpoint(tmp_path / str(number), save_last=True)
        callbacks: list[Callback] = [DoRA(rank=2), Start(), saver]
        torch.manual_seed(0)
        make_trainer(max_epochs=2, callbacks=callbacks[order]).fit(module, make_loader())
        losses.append(module.losses)
        held = torch.load(saver.last_model_path, weights_only=True)["state_dict"]
        assert held
        assert all(is_adapter(name) for name in held)
    assert losses[0] == losses[1]


# Stages --------------------------------------------------------------------------------------------------------------


def test_every_stage_sees_the_adapted_model(make_trainer: MakeTrainer) -> None:
    module = Plain()
    trainer = make_trainer(max_steps=8, max_epochs=-1, callbacks=[DoRA(rank=2)])
    base = trainer.test(module, make_loader(), verbose=False)[0]["loss"]
    assert adapted(module) == LINEAR  # also a test before any fit
    trainer.fit(module, make_loader())
    after = trainer.test(module, make_loader(), verbose=False)[0]["loss"]
    assert after < base - 0.1
    logits = torch.cat(trainer.predict(module, make_loader()))
    labels = torch.cat([y for _, y in make_loader()])
    assert float(nn.functional.cross_entropy(logits, labels)) == pytest.approx(after, abs=1e-6)
    # another trainer with a callback of its own, on the same module
    again = make_trainer(callbacks=[DoRA(rank=2)]).test(module, make_loader(), verbose=False)[0]["loss"]
    assert again == after


def test_in_a_fresh_process_from_a_checkpoint(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = InConfigureModel()
    trainer = make_trainer(max_steps=8, max_epochs=-1, callbacks=[DoRA(rank=2)])
    trainer.fit(module, make_loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    expected = trainer.test(module, make_loader(), verbose=False)[0]["loss"]
    script = """
import sys
from lightning.pytorch import Trainer
from dora_lightning.callbacks import DoRA
from plain_modules import InConfigureModel, make_loader
trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[DoRA(rank=2)],
                  enable_checkpointing=False, enable_model_summary=False)
result = trainer.test(InConfigureModel(), make_loader(), ckpt_path=sys.argv[1], verbose=False, weights_only=True)
print("loss", result[0]["loss"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run.ckpt")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(re.findall(r"loss (\S+)", done.stdout)[-1]) == pytest.approx(expected, abs=1e-6)


# Checkpoints ---------------------------------------------------------------------------------------------------------


class Wide(Plain):
    """A base of 4 MB, of which an adapter of rank 1 is little."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(8, 1000), nn.Linear(1000, 1000))})
        self.net["head"] = nn.Linear(1000, 2)


@pytest.mark.parametrize("how", ["weights_only", "whole", "ModelCheckpoint"])
def test_a_checkpoint_holds_what_trains_and_its_optimizer(how: str, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module, path = Wide(), tmp_path / "run.ckpt"
    saver = ModelCheckpoint(tmp_path, "run", save_weights_only=True, every_n_train_steps=3, save_top_k=1)
    callbacks = [DoRA(rank=1), *([saver] if how == "ModelCheckpoint" else [])]
    trainer = make_trainer(max_steps=3, callbacks=callbacks)
    trainer.fit(module, make_loader())
    if how != "ModelCheckpoint":
        trainer.save_checkpoint(path, weights_only=how == "weights_only")
    checkpoint = torch.load(path, weights_only=True)
    trains = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert checkpoint["state_dict"].keys() == trains.keys()
    assert all(torch.equal(value, trains[name]) for name, value in checkpoint["state_dict"].items())
    trained = sum(p.numel() for p in trains.values()) * 4
    assert trained < 32_000
    optimizer = 2 * trained if how == "whole" else 0
    assert ("optimizer_states" in checkpoint) == (how == "whole")
    # what is beside the tensors (the base's identity, Lightning's loops, the zip's own entries) is a fixed cost
    assert trained + optimizer < path.stat().st_size < trained + optimizer + 40_000


def test_another_trainer_goes_on_with_the_same_module(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module, path = Plain(), tmp_path / "run.ckpt"
    make_trainer(max_epochs=1, callbacks=[DoRA(rank=2)]).fit(module, make_loader())
    make_trainer(max_epochs=2, callbacks=[DoRA(rank=2), SaveAt(path, 4)]).fit(module, make_loader())
    held = torch.load(path, weights_only=True)
    assert "net.head.weight" in held["dora_lightning"]["base"]["samples"]
    make_trainer(max_epochs=2, callbacks=[DoRA(rank=2)]).fit(module, make_loader(), ckpt_path=path, weights_only=True)
    make_trainer(max_epochs=2, callbacks=[DoRA(rank=2)]).fit(Plain(), make_loader(), ckpt_path=path, weights_only=True)
    with pytest.raises(ValueError, match="has adapters of another DoRA callback already"):
        make_trainer(callbacks=[DoRA(rank=3)]).fit(module, make_loader())


def test_one_callback_for_two_modules_keeps_their_bases_apart(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    callback, first, second = DoRA(rank=2), Plain(seed=1), Plain(seed=2)
    for module in (first, second):
        make_trainer(max_epochs=1, callbacks=[callback]).fit(module, make_loader())
    first.trainer.save_checkpoint(tmp_path / "first.ckpt")
    make_trainer(max_epochs=2, callbacks=[DoRA(rank=2)]).fit(
        Plain(seed=1), make_loader(), ckpt_path=tmp_path / "first.ckpt", weights_only=True
    )


def test_a_fit_after_a_resumed_one_begins_at_its_own_rate(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    make_trainer(max_epochs=1, callbacks=[DoRA(rank=2), SaveAt(path, 4)]).fit(Plain(lr=0.08), make_loader())
    module = Plain(lr=0.02)
    trainer = make_trainer(max_epochs=2, callbacks=[DoRA(rank=2)])
    trainer.fit(module, make_loader(), ckpt_path=path, weights_only=True)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.02]  # the override wins
    again = make_trainer(max_epochs=1, callbacks=[DoRA(rank=2)])
    again.fit(module, make_loader())
    assert [group["lr"] for group in again.optimizers[0].param_groups] == [0.02]


Fit = Callable[..., Plain]


@pytest.fixture
def fit(make_trainer: MakeTrainer) -> Fit:
    def run(*callbacks: Callback, ckpt_path: Path | None = None, kind: type[Plain] = Plain, **options: Any) -> Plain:
        module = kind()
        torch.manual_seed(0)
        trainer = make_trainer(**{"max_epochs": 4, "callbacks": [DoRA(rank=2, dropout=0.0), *callbacks], **options})
        trainer.fit(module, make_loader(), ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)
        return module

    return run


@pytest.mark.parametrize("kind", [Plain, InConfigureModel, InSetup])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_resuming_gives_the_uninterrupted_trajectory(
    fit: Fit, tmp_path: Path, kind: type[Plain], options: dict[str, Any]
) -> None:
    path = tmp_path / "stopped.ckpt"
    whole = fit(kind=kind, **options)
    steps = 4 if options else 8
    first = fit(SaveAt(path, steps, stop=True), kind=kind, **options)
    second = fit(kind=kind, ckpt_path=path, **options)
    assert len(whole.losses) == 16
    assert first.losses == whole.losses[:8]
    assert second.losses == whole.losses[8:]
    for name, value in values(whole).items():
        assert torch.equal(value, values(second)[name]), name


def test_another_base_is_refused(fit: Fit, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit(SaveAt(tmp_path / "run.ckpt", 4, stop=True))
    message = r"trained on another base model: 'Plain', not 'Plain' \(net\.encoder\.0\.weight holds other values\)"
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=[DoRA(rank=2)]).fit(Plain(seed=5), make_loader(), ckpt_path=tmp_path / "run.ckpt")


def test_another_adapter_config_is_refused(fit: Fit, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    fit(SaveAt(tmp_path / "run.ckpt", 4, stop=True))
    trainer = make_trainer(callbacks=[DoRA(rank=2, alpha=7.0)])
    with pytest.raises(ValueError, match=r"another config: alpha=None \(here 7\.0\)"):
        trainer.fit(Plain(), make_loader(), ckpt_path=tmp_path / "run.ckpt")


def test_missing_and_unexpected_keys_are_refused_by_name(fit: Fit, make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    fit(SaveAt(path, 4, stop=True))
    checkpoint = torch.load(path, weights_only=True)
    lacking = dict(checkpoint, state_dict=dict(checkpoint["state_dict"]))
    del lacking["state_dict"]["net.head.magnitude"]
    more = dict(checkpoint, state_dict={**checkpoint["state_dict"], "net.head.lora_C": torch.zeros(1)})
    without = {key: value for key, value in checkpoint.items() if key != "dora_lightning"}
    for changed, message in [
        (lacking, r"lacks net\.head\.magnitude, which train here"),
        (more, r"holds net\.head\.lora_C, unknown to this model"),
        (without, "is no adapter checkpoint of dora-lightning"),
    ]:
        torch.save(changed, path)
        with pytest.raises(ValueError, match=message):
            make_trainer(callbacks=[DoRA(rank=2)]).fit(Plain(), make_loader(), ckpt_path=path)


def test_buffers_are_kept_and_restored(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Normed(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.net["encoder"].append(nn.BatchNorm1d(32))

    module = Normed()
    make_trainer(max_epochs=1, callbacks=[DoRA(rank=2), SaveAt(tmp_path / "run.ckpt", 4)]).fit(module, make_loader())
    loss = make_trainer(callbacks=[DoRA(rank=2)]).test(module, make_loader(), verbose=False)
    fresh = make_trainer(callbacks=[DoRA(rank=2)]).test(
        Normed(), make_loader(), ckpt_path=tmp_path / "run.ckpt", verbose=False, weights_only=True
    )
    assert fresh == loss

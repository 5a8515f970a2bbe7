"""A test for each thing in Lightning that makes adapters train nothing, checkpoints hold the base, or settings vanish.

``--optimizer`` and overrides beside ``--ckpt_path`` are tested on the command itself too, in test_cli.py.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from plain_modules import InConfigureModel, Plain, SaveAt, make_loader, values
from tiny import MakeBackbone, MakeData, MakeTrainer

from dora_lightning.adapters import adapter_layers
from dora_lightning.callbacks import DoRA, GroupLearningRates, MagnitudeOnly


def is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in {"magnitude", "lora_A", "lora_B"}


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_callbacks_hooks_are_skipped_with_save_weights_only(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Hook(Callback):
        called = False

        def on_save_checkpoint(self, *_: Any) -> None:
            self.called = True

    hook, saver = Hook(), ModelCheckpoint(tmp_path, "run", save_weights_only=True, save_top_k=1, every_n_epochs=1)
    make_trainer(callbacks=[DoRA(rank=2), hook, saver]).fit(Plain(), make_loader())
    assert not hook.called  # the trap is still there
    held = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert held["state_dict"]
    assert all(is_adapter(name) for name in held["state_dict"])
    assert "optimizer_states" not in held


def test_a_weights_only_checkpoint_is_loaded_for_testing(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module, path = Plain(), tmp_path / "run.ckpt"
    callbacks = [DoRA(rank=2), SaveAt(path, 4, weights_only=True)]
    trainer = make_trainer(callbacks=callbacks)
    trainer.fit(module, make_loader())
    expected = trainer.test(module, make_loader(), verbose=False)
    fresh = make_trainer(callbacks=[DoRA(rank=2)])
    assert fresh.test(Plain(), make_loader(), ckpt_path=path, weights_only=True, verbose=False) == expected


class Named(Plain):
    """Has a buffer and hyperparameters of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.save_hyperparameters()


def test_checkpoints_hold_plain_containers(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    callbacks = [DoRA(rank=2), MagnitudeOnly(modules=["head"]), GroupLearningRates(lora_B=4), SaveAt(path, 4)]
    make_trainer(callbacks=callbacks).fit(Named(), make_loader())

    def kinds(value: Any) -> set[type]:
        if isinstance(value, dict):
            return {dict}.union(*(kinds(item) for pair in value.items() for item in pair))
        if isinstance(value, (list, tuple)):
            return {list}.union(*(kinds(item) for item in value))
        return {type(value)}

    checkpoint = torch.load(path, weights_only=True)
    plain = {dict, list, str, int, float, bool, type(None), torch.Tensor}
    assert kinds(checkpoint["dora_lightning"]) <= plain
    make_trainer(max_epochs=2, callbacks=callbacks[:3]).fit(Named(), make_loader(), ckpt_path=path)  # the default


@pytest.mark.parametrize("step", [9, 10, 11])
def test_resuming_at_the_end_of_an_epoch_drops_what_the_run_would_have_dropped(
    step: int, make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The iterator that Lightning makes for an epoch draws a seed, and a resumed run does not make the same ones."""
    path, ends = tmp_path / "run.ckpt", []
    for options in ({}, {"ckpt_path": path, "weights_only": True}):
        module = make_backbone(adapter={"dropout": 0.2})
        trainer = make_trainer(max_epochs=2, limit_val_batches=0, callbacks=[SaveAt(path, step)])
        trainer.fit(module, datamodule=make_data(), **options)
        assert trainer.global_step == 20
        ends.append(values(module))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# Injection -----------------------------------------------------------------------------------------------------------


def test_configure_model_is_where_layers_come_to_be(make_trainer: MakeTrainer) -> None:
    """Injected in ``setup`` there would be nothing to adapt; in ``on_fit_start`` the optimiser would not have it."""
    module = InConfigureModel()
    trainer = make_trainer(callbacks=[DoRA(rank=2)])
    trainer.fit(module, make_loader())
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in module.parameters() if p.requires_grad} <= held
    for _, layer in adapter_layers(module):
        assert layer.lora_B.abs().sum() > 0


def test_two_calls_of_configure_model(make_trainer: MakeTrainer) -> None:
    class Twice(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            pl_module.configure_model()  # as WeightAveraging does

    losses = []
    for more in ([], [Twice()]):
        module = InConfigureModel()
        torch.manual_seed(0)
        callbacks = [DoRA(rank=2), MagnitudeOnly(modules=["head"]), *more]
        make_trainer(max_epochs=2, callbacks=callbacks).fit(module, make_loader())
        losses.append(module.losses)
        assert sum(1 for _ in adapter_layers(module)) == 3
    assert losses[0] == losses[1]


def test_a_test_after_a_fit_sees_the_adapters(make_trainer: MakeTrainer) -> None:
    module = InConfigureModel()
    trainer = make_trainer(max_epochs=3, callbacks=[DoRA(rank=2)])
    trainer.fit(module, make_loader())
    before = values(module)
    tested = trainer.test(module, make_loader(), verbose=False)[0]["loss"]
    assert all(torch.equal(value, before[name]) for name, value in values(module).items())
    assert tested < trainer.test(Plain(), make_loader(), verbose=False)[0]["loss"] - 0.05


# WeightAveraging beside us -------------------------------------------------------------------------------------------


def averaging() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.5)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize("kind", [Plain, InConfigureModel])
def test_weight_averaging_after_dora(kind: type[Plain], make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"

    def fit(*more: Callback, **options: Any) -> Plain:
        module = kind()
        torch.manual_seed(0)
        callbacks = [DoRA(rank=2), averaging(), *more]  # as ModelCheckpoint, which saves the step's average
        trainer = make_trainer(max_epochs=4, callbacks=callbacks)
        trainer.fit(module, make_loader(), **options)
        return module

    whole = fit()
    alone = Plain()
    torch.manual_seed(0)
    make_trainer(max_epochs=4, callbacks=[DoRA(rank=2)]).fit(alone, make_loader())
    assert whole.losses == alone.losses
    averaged, last = values(whole), values(alone)
    assert any(not torch.equal(value, last[name]) for name, value in averaged.items() if is_adapter(name))
    for name, value in values(Plain()).items():
        adapted = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.equal(averaged[adapted], value), name

    fit(SaveAt(path, 8, stop=True))
    checkpoint = torch.load(path, weights_only=True)
    for states in ("state_dict", "current_model_state"):
        assert all(is_adapter(name) for name in checkpoint[states]), states
        assert len(checkpoint[states]) == 9
    assert path.stat().st_size < 60_000
    resumed = fit(ckpt_path=path, weights_only=True)
    assert resumed.losses == whole.losses[8:]
    assert all(torch.equal(value, averaged[name]) for name, value in values(resumed).items())


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
def test_weight_averaging_with_a_backbone(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    ends = []
    for options in ({}, {"ckpt_path": path, "weights_only": True}):
        module = make_backbone()
        trainer = make_trainer(max_steps=6, limit_val_batches=0, callbacks=[averaging(), SaveAt(path, 3)])
        trainer.fit(module, datamodule=make_data(), **options)
        ends.append(values(module))
    held = torch.load(path, weights_only=True)
    assert held["state_dict"].keys() == held["current_model_state"].keys()
    assert all(is_adapter(name) for name in held["state_dict"])
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


@pytest.mark.parametrize("ours", [lambda: DoRA(rank=2), lambda: MagnitudeOnly(modules=["head"])])
def test_weight_averaging_before_us_is_refused(make_trainer: MakeTrainer, ours: Any) -> None:
    callback = ours()
    with pytest.raises(ValueError, match=f"put {type(callback).__name__} before EMAWeightAveraging"):
        make_trainer(callbacks=[averaging(), callback]).fit(Plain(), make_loader())


# Rates ---------------------------------------------------------------------------------------------------------------


def test_an_override_beside_ckpt_path_wins(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.ckpt"
    make_trainer(callbacks=[DoRA(rank=2), SaveAt(path, 4)]).fit(Plain(lr=0.05), make_loader())
    trainer = make_trainer(max_epochs=2, callbacks=[DoRA(rank=2)])
    with caplog.at_level("INFO"):
        trainer.fit(Plain(lr=0.01), make_loader(), ckpt_path=path, weights_only=True)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01
    assert "The config overrides the checkpoint: 0.lr: 0.01 (checkpoint: 0.05)" in caplog.text


def test_learning_rate_monitor_accepts_the_names(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Two(Plain):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net["encoder"].parameters()}, {"params": self.net["head"].parameters()}]
            return torch.optim.AdamW(groups, lr=0.05)

    monitor = LearningRateMonitor()
    callbacks = [DoRA(rank=2), GroupLearningRates(modules={"head": 2.0}), monitor]
    trainer = make_trainer(callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Two(), make_loader())
    assert {"lr-AdamW/0/lora_A", "lr-AdamW/1/head/lora_B"} <= set(monitor.lrs)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_llama: Path, commonsense_folder: Path, tmp_path: Path) -> Path:
    content = {
        "model": {
            "class_path": "dora_lightning.backbones.DoRALlama",
            "init_args": {"model_name_or_path": str(tiny_llama), "adapter": {"rank": 2}},
        },
        "data": {
            "class_path": "datamodules.CommonsenseDataModule",
            "init_args": {"data_dir": str(commonsense_folder), "template": "plain"},
        },
        "trainer": {"callbacks": [{"class_path": "dora_lightning.callbacks.MagnitudeOnly"}]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the command prints, in this process."""
    from dora_lightning.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dora-lightning"])
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *sys.path])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what LightningCLI calls

    def run(*args: str) -> tuple[str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(list(args))
        out = capsys.readouterr()
        return out.out, out.err

    return run


def test_the_command_has_no_optimizer_option(printed: Any, config: Path) -> None:
    """Lightning's own is built before adapters are injected, and trains nothing without a word."""
    _, error = printed("fit", "--config", str(config), "--optimizer", "AdamW")
    assert "optimizer" in error
    assert "unrecognized" in error.lower() or "does not accept" in error or "not accepted" in error
    help_text, _ = printed("fit", "--help")
    assert "--optimizer" not in help_text


def callbacks_in(text: str) -> list[str]:
    configured = yaml.safe_load(text)["trainer"]["callbacks"]
    return [entry["class_path"].rpartition(".")[2] for entry in configured]


def test_lists_of_a_second_config_replace_or_append(printed: Any, config: Path, tmp_path: Path) -> None:
    entry = [{"class_path": "dora_lightning.callbacks.GroupLearningRates", "init_args": {"lora_B": 16}}]
    names = {}
    for key in ("callbacks", "callbacks+"):
        second = tmp_path / "second.yaml"
        second.write_text(yaml.safe_dump({"trainer": {key: entry}}))
        out, _ = printed("fit", "--config", str(config), "--config", str(second), "--print_config=skip_default")
        names[key] = callbacks_in(out)
    assert names["callbacks"] == ["GroupLearningRates"]
    assert names["callbacks+"] == ["MagnitudeOnly", "GroupLearningRates"]
    option = "--trainer.callbacks+=dora_lightning.callbacks.GroupLearningRates"
    out, _ = printed("fit", "--config", str(config), option, "--print_config=skip_default")
    assert callbacks_in(out) == ["MagnitudeOnly", "GroupLearningRates"]


def test_every_callback_can_be_written_in_a_config_and_printed(printed: Any, config: Path) -> None:
    names = ["DoRA", "GroupLearningRates", "MagnitudeOnly", "MergeOnSave", "ShardedTraining"]
    options = [f"--trainer.callbacks+=dora_lightning.callbacks.{name}" for name in names]
    out, _ = printed("fit", "--config", str(config), *options, "--print_config")
    assert callbacks_in(out) == ["MagnitudeOnly", *names]

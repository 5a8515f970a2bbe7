"""The DoRA callback that starts from an adapter in PEFT's files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from plain_modules import InConfigureModel, Plain, SaveAt, make_loader, values
from tiny import MakeTrainer, perturb_adapters
from torch import Tensor

from dora_lightning import AdapterConfig, inject_adapters, save_peft_adapter
from dora_lightning.callbacks import DoRA


class Start(Callback):
    """Copies the trainable parameters when training starts."""

    def on_train_start(self, trainer: Any, module: LightningModule) -> None:
        self.adapter = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A perturbed adapter of rank 2 on disk, made on the whole module, and its tensors."""
    module = Plain()
    inject_adapters(module, AdapterConfig(rank=2))
    perturb_adapters(module)
    tensors = {name: value for name, value in values(module).items() if "base_layer" not in name}
    return save_peft_adapter(module, tmp_path / "adapter"), tensors


@pytest.mark.parametrize("kind", [Plain, InConfigureModel])
def test_training_starts_from_the_files(
    kind: type[Plain], adapter: tuple[Path, dict[str, Tensor]], make_trainer: MakeTrainer
) -> None:
    folder, tensors = adapter
    module, start = kind(), Start()
    make_trainer(max_epochs=1, callbacks=[DoRA(rank=2, dropout=0.1, init_from=str(folder)), start]).fit(
        module, make_loader()
    )
    assert start.adapter.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in start.adapter.items())
    after = values(module)
    assert not any(torch.equal(after[name], value) for name, value in tensors.items())


def test_a_checkpoint_wins(adapter: tuple[Path, dict[str, Tensor]], make_trainer: MakeTrainer, tmp_path: Path) -> None:
    folder, _ = adapter
    path = tmp_path / "run.ckpt"
    make_trainer(max_epochs=2, callbacks=[DoRA(rank=2, init_from=str(folder)), SaveAt(path, 4)]).fit(
        Plain(), make_loader()
    )
    held = torch.load(path, weights_only=True)["state_dict"]
    start = Start()
    make_trainer(max_epochs=2, callbacks=[DoRA(rank=2, init_from=str(folder)), start]).fit(
        Plain(), make_loader(), ckpt_path=path, weights_only=True
    )
    assert all(torch.equal(value, held[name]) for name, value in start.adapter.items())


def test_a_second_stage_keeps_what_was_trained(
    adapter: tuple[Path, dict[str, Tensor]], make_trainer: MakeTrainer
) -> None:
    folder, _ = adapter
    module = Plain()
    trainer = make_trainer(max_epochs=1, callbacks=[DoRA(rank=2, init_from=str(folder))])
    trainer.fit(module, make_loader())
    trained = values(module)
    trainer.test(module, make_loader(), verbose=False)
    assert all(torch.equal(value, trained[name]) for name, value in values(module).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "rank of .* is 2 in the file, 4 in the model"),
        ({"rank": 2, "module": "net.encoder"}, r"holds tensors for .*net\.head, where the model has no adapters"),
        ({"rank": 2, "method": "lora"}, "method of .* is dora in the file, lora in the model"),
    ],
)
def test_a_config_that_does_not_fit(
    adapter: tuple[Path, dict[str, Tensor]], make_trainer: MakeTrainer, options: dict[str, Any], message: str
) -> None:
    folder, _ = adapter
    with pytest.raises(ValueError, match=message):
        make_trainer(callbacks=[DoRA(init_from=str(folder), **options)]).fit(Plain(), make_loader())


def test_a_folder_that_is_not_there(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is no PEFT adapter folder"):
        make_trainer(callbacks=[DoRA(rank=2, init_from=str(tmp_path / "nowhere"))]).fit(Plain(), make_loader())

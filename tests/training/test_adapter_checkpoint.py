"""Checkpoints hold what trains and nothing else, are read without unpickling, and fit one model only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import MakeBackbone, MakeData, MakeTrainer, perturb_adapters

from dora_lightning.training.adapter_checkpoint import read_adapter_checkpoint


@pytest.fixture
def saved(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> tuple[Any, Trainer]:
    """A backbone that was trained for two steps, and its Trainer."""
    module, trainer = make_backbone(), make_trainer(max_steps=2)
    trainer.fit(module, datamodule=make_data())
    return module, trainer


def trainable(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("weights_only", [False, True])
def test_holds_what_trains_and_nothing_else(saved: tuple[Any, Trainer], tmp_path: Path, weights_only: bool) -> None:
    module, trainer = saved
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    expected = trainable(module)
    assert checkpoint["state_dict"].keys() == expected.keys()
    assert all(torch.equal(checkpoint["state_dict"][name], value) for name, value in expected.items())
    assert ("optimizer_states" in checkpoint) != weights_only
    # the base model takes 100 kB of this, its identity a few
    assert sum(value.nbytes for value in checkpoint["state_dict"].values()) < 8000


def test_model_checkpoint_that_saves_weights_only(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = ModelCheckpoint(tmp_path / "saved", filename="a", save_weights_only=True, every_n_train_steps=2)
    module = make_backbone()
    make_trainer(max_steps=2, callbacks=[callback]).fit(module, datamodule=make_data())
    checkpoint = torch.load(tmp_path / "saved/a.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == trainable(module).keys()
    assert checkpoint["dora_lightning"]["adapter"]["rank"] == 4


def test_reads_config_base_and_tensors_by_their_names_in_the_model(saved: tuple[Any, Trainer], tmp_path: Path) -> None:
    module, trainer = saved
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    read = read_adapter_checkpoint(tmp_path / "a.ckpt")
    assert read.config == module.adapter
    assert read.base["name"] == module.model_name_or_path
    expected = trainable(module.model)
    assert read.tensors.keys() == expected.keys()
    assert all(torch.equal(read.tensors[name], value) for name, value in expected.items())


def test_metrics_of_the_backbone_are_not_in_the_way(saved: tuple[Any, Trainer], tmp_path: Path) -> None:
    from tasks import CommonsenseQA

    saved[1].save_checkpoint(tmp_path / "a.ckpt")
    module = type(saved[0]).load_from_checkpoint(tmp_path / "a.ckpt", task=CommonsenseQA(), weights_only=True)
    assert trainable(module).keys() == trainable(saved[0]).keys()


def test_missing_and_unexpected_tensors_are_refused_by_name(saved: tuple[Any, Trainer], tmp_path: Path) -> None:
    module, trainer = saved
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    tensor = checkpoint["state_dict"].pop("model.model.layers.0.self_attn.q_proj.lora_A")
    torch.save(checkpoint, tmp_path / "missing.ckpt")
    with pytest.raises(ValueError, match=r"lacks model\.model\.layers\.0\.self_attn\.q_proj\.lora_A, which train here"):
        type(module).load_from_checkpoint(tmp_path / "missing.ckpt", weights_only=True)
    checkpoint["state_dict"] |= {"model.model.layers.0.self_attn.q_proj.lora_A": tensor, "model.extra": tensor}
    torch.save(checkpoint, tmp_path / "unexpected.ckpt")
    with pytest.raises(ValueError, match=r"holds model\.extra, unknown to this model"):
        type(module).load_from_checkpoint(tmp_path / "unexpected.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 8}, r"another config: rank=4 \(here 8\)"),
        ({"alpha": 4.0}, r"alpha=None \(here 4.0\)"),
        ({"method": "lora"}, r"method='dora' \(here 'lora'\)"),
        ({"target_modules": ["q_proj"]}, r"target_modules=\['q_proj', 'v_proj', 'down_proj'\] \(here"),
    ],
)
def test_another_adapter_config_is_refused_by_name(
    saved: tuple[Any, Trainer],
    make_backbone: MakeBackbone,
    make_data: MakeData,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    adapter: dict[str, Any],
    message: str,
) -> None:
    saved[1].save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=4).fit(
            make_backbone(adapter=adapter), datamodule=make_data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
        )


def test_a_tensor_of_another_shape_is_refused_by_name(saved: tuple[Any, Trainer], tmp_path: Path) -> None:
    saved[1].save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.model.layers.1.mlp.down_proj.magnitude"] = torch.ones(3)
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.magnitude has shape \(3,\), here \(32,\)"):
        type(saved[0]).load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)


def _truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [_truncated, lambda content: b"", lambda content: b"not a checkpoint"])
def test_a_damaged_file_is_one_clear_error(
    saved: tuple[Any, Trainer], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    saved[1].save_checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "b.ckpt").write_bytes(damage((tmp_path / "a.ckpt").read_bytes()))
    with pytest.raises(ValueError, match=r"b\.ckpt could not be read as a checkpoint"):
        read_adapter_checkpoint(tmp_path / "b.ckpt")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint file at"):
        read_adapter_checkpoint(tmp_path / "none.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is no adapter checkpoint of dora-lightning"):
        read_adapter_checkpoint(tmp_path / "other.ckpt")
    torch.save(torch.zeros(2), tmp_path / "tensor.ckpt")
    with pytest.raises(ValueError, match="could not be read as a checkpoint: it holds a Tensor, and no dict"):
        read_adapter_checkpoint(tmp_path / "tensor.ckpt")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "thing": Path("x")}, tmp_path / "objects.ckpt")
    with pytest.raises(ValueError, match=r"objects\.ckpt could not be read"):
        read_adapter_checkpoint(tmp_path / "objects.ckpt")


def test_a_newer_format_is_refused(saved: tuple[Any, Trainer], tmp_path: Path) -> None:
    saved[1].save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["dora_lightning"]["format_version"] = 2
    torch.save(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="has format 2, this version reads up to 1"):
        read_adapter_checkpoint(tmp_path / "a.ckpt")


def test_other_parts_that_train_are_saved_too(
    make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    module = make_backbone()
    module.configure_model()
    module.model.model.norm.weight.requires_grad_(True)
    perturb_adapters(module)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "model.norm.weight" in read_adapter_checkpoint(tmp_path / "a.ckpt").tensors

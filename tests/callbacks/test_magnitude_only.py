"""Some modules train their magnitude alone, with other adapters beside them or without."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from plain_modules import InConfigureModel, Plain, SaveAt, make_loader, values
from tiny import MakeBackbone, MakeData, MakeTrainer
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, ViTConfig, ViTModel

from dora_lightning.adapters import adapter_layers
from dora_lightning.callbacks import DoRA, MagnitudeOnly
from dora_lightning.callbacks.magnitude_only import MLP_MODULES

FIRST = "net.encoder.0"


def methods(module: nn.Module) -> dict[str, str]:
    return {name: layer.method for name, layer in adapter_layers(module)}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", [Plain, InConfigureModel])
def test_beside_dora_in_any_order(kind: type[Plain], order: int, make_trainer: MakeTrainer) -> None:
    module = kind()
    callbacks: list[Callback] = [DoRA(rank=2), MagnitudeOnly(modules=["encoder.0"])][::order]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks)
    trainer.fit(module, make_loader())
    assert methods(module) == {FIRST: "magnitude", "net.encoder.2": "dora", "net.head": "dora"}
    base = Plain().net["encoder"][0]
    trained = module.get_submodule(FIRST)
    assert torch.equal(trained.weight, base.weight)
    assert torch.equal(trained.bias, base.bias)
    assert {name for name, _ in trained.named_parameters()} == {"magnitude", "base_layer.weight", "base_layer.bias"}
    assert not torch.allclose(trained.magnitude, base.weight.norm(dim=1))
    # again at another stage
    before = values(module)
    trainer.test(module, make_loader(), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in values(module).items())


def test_alone_everything_else_is_frozen(make_trainer: MakeTrainer) -> None:
    module, before = Plain(), values(Plain())
    make_trainer(max_epochs=2, callbacks=[MagnitudeOnly(modules=r".*encoder\.[02]")]).fit(module, make_loader())
    assert methods(module) == {FIRST: "magnitude", "net.encoder.2": "magnitude"}
    trains = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trains == {f"{FIRST}.magnitude", "net.encoder.2.magnitude"}
    for name, value in values(module).items():
        if name not in trains:
            assert torch.equal(value, before[name.replace("base_layer.", "")]), name


def test_with_a_backbone(make_backbone: MakeBackbone, make_data: MakeData, make_trainer: MakeTrainer) -> None:
    module = make_backbone(adapter={"target_modules": ["q_proj"]})
    trainer = make_trainer(max_steps=3, limit_val_batches=0, callbacks=[MagnitudeOnly()])
    trainer.fit(module, datamodule=make_data())
    found = {name.rpartition(".")[2]: method for name, method in methods(module).items()}
    assert found == {"q_proj": "dora", "gate_proj": "magnitude", "up_proj": "magnitude", "down_proj": "magnitude"}
    # the names an optimiser group has for what trains, and a magnitude that moved
    groups = {group["name"]: len(group["params"]) for group in trainer.optimizers[0].param_groups}
    assert groups == {"magnitude": 2 + 6, "lora_A": 2, "lora_B": 2}
    for _, layer in adapter_layers(module):
        assert not torch.allclose(layer.magnitude, layer.weight.norm(dim=1), atol=1e-4)


def restrict(model: nn.Module) -> set[str]:
    """What the callback does, without a Trainer; names of the modules that it chose."""
    module = LightningModule()
    module.model = model
    MagnitudeOnly()._restrict(module)
    return set(methods(model))


def test_the_default_takes_the_linear_layers_of_mlps() -> None:
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=32,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        )
    )
    assert sorted(restrict(bart)) == [
        f"model.{side}.layers.0.fc{number}" for side in ("decoder", "encoder") for number in (1, 2)
    ]

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for model in (ViTModel(ViTConfig(**sizes)), BertModel(BertConfig(vocab_size=32, **sizes))):
        restrict(model)
        widths = sorted((layer.in_features, layer.out_features) for _, layer in adapter_layers(model))
        assert widths == [(16, 32), (32, 16)]

    torch_s = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False)
    assert restrict(torch_s) == {"layers.0.linear1", "layers.0.linear2"}


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.layers.3.mlp.gate_proj", True),
        ("visual.transformer.resblocks.0.mlp.c_fc", True),
        ("blocks.0.mlp.fc1", True),
        ("encoder.layers.0.ffn.lin1", True),
        ("layers.0.feed_forward.w1", True),
        ("encoder.layers.0.linear1", True),
        ("bert.encoder.layer.0.output.dense", True),
        ("bert.encoder.layer.0.attention.output.dense", False),
        ("model.layers.3.self_attn.q_proj", False),
        ("classifier", False),
        ("mlp", False),
    ],
)
def test_names_the_default_knows(name: str, is_one: bool) -> None:
    assert bool(re.fullmatch(MLP_MODULES, name)) == is_one


def test_nothing_that_matches(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"matches no module.*Linear modules of this model end in: 0, 2, head"):
        make_trainer(callbacks=[MagnitudeOnly()]).fit(Plain(), make_loader())


@pytest.mark.parametrize("with_dora", [True, False])
def test_resuming_gives_the_uninterrupted_trajectory(
    with_dora: bool, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"

    def fit(*more: Callback, **options: Any) -> Plain:
        module = Plain()
        callbacks = [MagnitudeOnly(modules=["encoder.0"]), *([DoRA(rank=2)] if with_dora else []), *more]
        torch.manual_seed(0)
        make_trainer(max_epochs=4, callbacks=callbacks).fit(module, make_loader(), **options)
        return module

    if not with_dora:
        # alone it leaves checkpoints as they are: the whole model, to the very name
        fit(SaveAt(path, 8, stop=True))
        assert "net.head.weight" in torch.load(path, weights_only=True)["state_dict"]
        path.unlink()
    whole, first = fit(), fit(SaveAt(path, 8, stop=True))
    second = fit(ckpt_path=path, weights_only=True)
    assert first.losses + second.losses == whole.losses
    assert len(whole.losses) == 16
    assert all(torch.equal(value, values(second)[name]) for name, value in values(whole).items())
    if with_dora:
        held = torch.load(path, weights_only=True)["state_dict"]
        assert f"{FIRST}.magnitude" in held
        assert f"{FIRST}.lora_A" not in held


def test_a_checkpoint_of_full_dora_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    make_trainer(max_epochs=1, callbacks=[DoRA(rank=2), SaveAt(path, 4)]).fit(Plain(), make_loader())
    trainer = make_trainer(max_epochs=2, callbacks=[DoRA(rank=2), MagnitudeOnly(modules=["encoder.0"])])
    with pytest.raises(ValueError, match="another config: magnitude_only_modules="):
        trainer.fit(Plain(), make_loader(), ckpt_path=path, weights_only=True)

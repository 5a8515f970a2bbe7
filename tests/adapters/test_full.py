"""``method="full"``: the target modules' own parameters train, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_lightning.adapters import (
    AdapterConfig,
    adapter_layers,
    adapters_disabled,
    inject_adapters,
    merge_adapters,
    summarize_adapters,
    unmerge_adapters,
)
from tests.adapters.perturbed import tiny_llama


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_targets_train_and_nothing_is_wrapped() -> None:
    model = tiny_llama()
    names = set(model.state_dict())
    inject_adapters(model, AdapterConfig(method="full", target_modules=["q_proj", "layers.1.input_layernorm"]))
    assert set(model.state_dict()) == names
    assert not list(adapter_layers(model))
    assert trained(model) == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.input_layernorm.weight",
    }
    assert inject_adapters(model, AdapterConfig(**model.adapter_config.to_dict())) is model
    model(torch.arange(8)[None]).logits.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_biases_and_whole_blocks() -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), "head": nn.Linear(3, 2)})
    inject_adapters(model, AdapterConfig(method="full", target_modules=["block"]))
    assert trained(model) == {"block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias"}


def test_all_linear() -> None:
    model = inject_adapters(tiny_llama(), AdapterConfig(method="full"))
    summary = summarize_adapters(nn.ModuleDict({"model": model}))
    assert summary.modules["q_proj"] == ("full", 2)
    assert "lm_head" not in summary.modules
    assert summary.groups == {"other": 2 * (4 * 16 * 16 + 3 * 16 * 24)}
    assert summary.total == sum(p.numel() for p in tiny_llama().parameters())


def test_beside_magnitudes() -> None:
    config = AdapterConfig(method="full", target_modules=["layers.0"], magnitude_only_modules=["o_proj"])
    model = inject_adapters(tiny_llama(), config)
    of_o = {name.partition("o_proj.")[2] for name in trained(model) if "o_proj" in name}
    assert of_o == {"magnitude"}
    assert "model.layers.0.mlp.up_proj.weight" in trained(model)
    assert summarize_adapters(model).modules == {"o_proj": ("magnitude", 2), "0": ("full", 1)}


def test_merging_changes_nothing() -> None:
    model = inject_adapters(tiny_llama(), AdapterConfig(method="full"))
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert merge_adapters(model) is unmerge_adapters(model) is model
    merge_adapters(model, unload=True)
    assert model.model.layers[0].self_attn.q_proj.weight is weight
    assert not hasattr(model, "adapter_config")


def test_there_is_no_pretrained_model_to_go_back_to() -> None:
    model = inject_adapters(tiny_llama(), AdapterConfig(method="full"))
    with (
        pytest.raises(ValueError, match="method='full' trains the pretrained weights themselves"),
        adapters_disabled(model),
    ):
        pass


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_a_tied_weight_is_not_changed_behind_its_other_owner(targets: list[str]) -> None:
    model = tiny_llama(tied=True)
    with pytest.raises(ValueError, match="is the same tensor as one of a target's: training it in full changes both"):
        inject_adapters(model, AdapterConfig(method="full", target_modules=targets))
    assert len(trained(model)) == len(list(model.parameters()))
    inject_adapters(model, AdapterConfig(method="full", target_modules=["lm_head", "embed_tokens"]))
    assert trained(model) == {"model.embed_tokens.weight"}


def test_modules_without_parameters() -> None:
    with pytest.raises(ValueError, match=r"'act_fn' matches .*, without parameters to train"):
        inject_adapters(tiny_llama(), AdapterConfig(method="full", target_modules=["act_fn"]))

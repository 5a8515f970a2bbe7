"""Merging into the model in memory, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from dora_lightning.adapters import AdapterConfig, adapter_layers, inject_adapters, merge_adapters, unmerge_adapters
from tests.adapters.perturbed import assert_close, perturb, tiny_llama

IDS = torch.arange(16)[None]

CONFIGS = [
    AdapterConfig(rank=4, magnitude_only_modules=["o_proj"]),
    AdapterConfig(method="lora", rank=4),
    AdapterConfig(method="magnitude"),
    AdapterConfig(rank=4, norm_axis="in"),
    AdapterConfig(method="vera", rank=4),
    AdapterConfig(method="dvora", rank=4),
    AdapterConfig(rank=4, init="pissa"),
]


def trained(model: nn.Module, config: AdapterConfig) -> nn.Module:
    inject_adapters(model, config)
    perturb(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("config", CONFIGS, ids=["dora", "lora", "magnitude", "norm_axis=in", "vera", "dvora", "pissa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_bit_for_bit(config: AdapterConfig, dtype: torch.dtype) -> None:
    model = trained(tiny_llama().to(dtype), config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    expected = logits(model)
    assert merge_adapters(model) is model
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, parameters_of_base(before))
    assert_close(logits(model), expected, 1e-5 if dtype == torch.float32 else 5e-2)
    assert unmerge_adapters(model) is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(logits(model), expected)


def parameters_of_base(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return state["model.layers.0.self_attn.q_proj.base_layer.weight"]


def test_merging_twice_is_merging_once() -> None:
    model = trained(tiny_llama(), CONFIGS[0])
    merge_adapters(model)
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_adapters(model)
    assert all(torch.equal(tensor, once[name]) for name, tensor in model.state_dict().items())
    unmerge_adapters(unmerge_adapters(model))


def test_training_while_merged_is_refused() -> None:
    model = merge_adapters(trained(tiny_llama(), CONFIGS[0]).train())
    with pytest.raises(RuntimeError, match="call unmerge_adapters"):
        model(IDS)
    logits(model)  # without gradients it may run
    unmerge_adapters(model)(IDS).logits.sum().backward()


def test_cast_while_merged_reaches_the_kept_weight() -> None:
    model = merge_adapters(trained(tiny_llama(), CONFIGS[0])).double()
    unmerge_adapters(model)
    assert {layer.weight.dtype for _, layer in adapter_layers(model)} == {torch.float64}
    logits(model)


def test_unload_leaves_the_plain_model() -> None:
    plain = tiny_llama()
    names = {name: type(module) for name, module in plain.named_modules()}
    model = trained(plain, CONFIGS[0])
    expected = logits(model)
    merge_adapters(model, unload=True)
    assert {name: type(module) for name, module in model.named_modules()} == names
    assert not hasattr(model, "adapter_config")
    assert_close(logits(model), expected, 1e-5)
    again = tiny_llama()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))
    inject_adapters(model, CONFIGS[1])  # a new adapter may follow


def test_unload_of_a_merged_model() -> None:
    model = trained(tiny_llama(), CONFIGS[0])
    expected = logits(model)
    merge_adapters(merge_adapters(model), unload=True)
    assert not list(adapter_layers(model))
    assert_close(logits(model), expected, 1e-5)


def test_an_embedding_tied_to_an_adapted_head_is_left_alone() -> None:
    model = trained(tiny_llama(tied=True), AdapterConfig(rank=4, target_modules=["lm_head", "q_proj"]))
    embedding = model.model.embed_tokens.weight
    assert model.lm_head.weight is embedding
    before = embedding.clone()
    expected = logits(model)
    merge_adapters(model)
    assert torch.equal(embedding, before)
    assert model.model.embed_tokens.weight is embedding
    assert not torch.equal(model.lm_head.weight, before)
    assert_close(logits(model), expected, 1e-5)
    unmerge_adapters(model)
    assert model.lm_head.weight is embedding
    assert torch.equal(embedding, before)
    merge_adapters(model, unload=True)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert not model.config.tie_word_embeddings  # or saving the model would tie them again


def test_a_head_tied_to_an_adapted_embedding_is_left_alone(tmp_path: Path) -> None:
    model = trained(tiny_llama(tied=True), AdapterConfig(rank=4, target_modules=["embed_tokens"]))
    head = model.lm_head.weight
    assert model.model.embed_tokens.weight is head
    assert head.grad is None
    before = head.clone()
    expected = logits(model)
    merge_adapters(model)
    assert torch.equal(model.lm_head.weight, before)
    assert_close(logits(model), expected, 1e-5)
    merge_adapters(model, unload=True).save_pretrained(tmp_path)
    assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, 1e-5)


def test_what_is_tied_and_no_target_stays_tied() -> None:
    model = merge_adapters(trained(tiny_llama(tied=True), AdapterConfig(rank=4)), unload=True)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("act", [merge_adapters, unmerge_adapters])
def test_a_model_without_adapters(act: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(ValueError, match="no adapters"):
        act(nn.Sequential(nn.Linear(2, 2)))

"""Without the adapters for a while: the pretrained model, and then everything as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_lightning import AdapterConfig, adapters_disabled, inject_adapters, merge_adapters
from dora_lightning.adapters import adapter_layers
from tests.adapters.perturbed import perturb, tiny_llama

IDS = torch.arange(16)[None]
CONFIGS = [
    AdapterConfig(rank=4, magnitude_only_modules=["o_proj"]),
    AdapterConfig(rank=4, init="pissa"),
    AdapterConfig(method="dvora", rank=4),
    AdapterConfig(rank=4, target_modules=["embed_tokens", "q_proj"]),
]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=CONFIGS, ids=["dora", "pissa", "dvora", "embedding"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = inject_adapters(tiny_llama(), request.param)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("merged", [False, True])
def test_the_pretrained_model_bit_for_bit(model: nn.Module, merged: bool) -> None:
    if merged:
        merge_adapters(model)
    before, pretrained = logits(model), logits(tiny_llama())
    assert not torch.equal(before, pretrained)
    weights = [layer.weight for _, layer in adapter_layers(model)]
    with adapters_disabled(model) as same:
        assert same is model
        assert torch.equal(logits(model), pretrained)
        with torch.inference_mode():
            assert torch.equal(model(IDS).logits, pretrained)
    assert torch.equal(logits(model), before)
    assert all(layer.weight is weight for weight, (_, layer) in zip(weights, adapter_layers(model), strict=True))
    assert all(layer.merged == merged for _, layer in adapter_layers(model))


def test_nested(model: nn.Module) -> None:
    before, pretrained = logits(model), logits(tiny_llama())
    with adapters_disabled(model):
        with adapters_disabled(model):
            assert torch.equal(logits(model), pretrained)
        assert torch.equal(logits(model), pretrained)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("merged", [False, True])
def test_restored_after_an_exception(model: nn.Module, merged: bool) -> None:
    if merged:
        merge_adapters(model)
    before = logits(model)
    with pytest.raises(RuntimeError, match="inside"), adapters_disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), before)


def test_a_cache_of_keys_and_values_is_of_the_model_that_filled_it(model: nn.Module) -> None:
    tokens = torch.arange(3, 9)[None]
    expected = model.generate(tokens, max_new_tokens=6, do_sample=False)
    with adapters_disabled(model):
        pretrained = model.generate(tokens, max_new_tokens=6, do_sample=False)
    assert torch.equal(pretrained, tiny_llama().eval().generate(tokens, max_new_tokens=6, do_sample=False))
    assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), expected)


def test_norms_follow_what_is_trained_meanwhile() -> None:
    model = inject_adapters(tiny_llama(), AdapterConfig(rank=4))
    logits(model)
    with adapters_disabled(model):
        logits(model)
        torch.manual_seed(0)
        perturb(model)
    other = inject_adapters(tiny_llama(), AdapterConfig(rank=4))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_only_a_model_with_adapters() -> None:
    with pytest.raises(ValueError, match="no adapters"), adapters_disabled(nn.Linear(2, 2)):
        pass

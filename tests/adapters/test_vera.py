"""VeRA's random pair: PEFT's very numbers, one for the whole model, and never lost on the way."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

from dora_lightning.adapters import (
    AdapterConfig,
    DVoRALinear,
    VeRALinear,
    adapter_layers,
    inject_adapters,
    parameter_group,
    restrict_to_magnitude,
)
from dora_lightning.adapters.vera import shared_pair
from tests.adapters.perturbed import assert_close, perturb, tiny_llama

IDS = torch.arange(16)[None]
TARGETS = ["q_proj", "up_proj", "down_proj"]


def vera(method: str = "vera", **options: object) -> nn.Module:
    model = tiny_llama()
    inject_adapters(model, AdapterConfig(method=method, rank=8, target_modules=TARGETS, **options))
    return model


def pairs(model: nn.Module) -> set[int]:
    return {id(layer.pair) for _, layer in adapter_layers(model) if isinstance(layer, VeRALinear)}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_model_as_peft_from_the_same_seed(seed: int) -> None:
    model = vera(projection_seed=seed)
    config = peft.VeraConfig(r=8, target_modules=TARGETS, projection_prng_key=seed)
    twin = peft.get_peft_model(tiny_llama(), config)
    A, B = shared_pair(8, 24, 24, seed).on(torch.device("cpu"))
    assert torch.equal(A, twin.base_model.vera_A["default"])
    assert torch.equal(B, twin.base_model.vera_B["default"])
    perturb(model)
    for name, layer in adapter_layers(model):
        theirs = twin.base_model.model.get_submodule(name)
        assert torch.equal(theirs.vera_lambda_d["default"], torch.full((8,), 0.1))
        assert not theirs.vera_lambda_b["default"].any()
        with torch.no_grad():
            theirs.vera_lambda_d["default"].copy_(layer.lambda_d)
            theirs.vera_lambda_b["default"].copy_(layer.lambda_b)
    assert_close(model(IDS).logits, twin(IDS).logits, 1e-5)
    assert (model(IDS).logits - tiny_llama()(IDS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["vera", "dvora"])
def test_start(method: str) -> None:
    model = vera(method, d_initial=0.3)
    assert_close(model(IDS).logits, tiny_llama()(IDS).logits, 1e-6)
    layer = next(layer for _, layer in adapter_layers(model))
    assert type(layer) is (VeRALinear if method == "vera" else DVoRALinear)
    assert torch.equal(layer.lambda_d, torch.full((8,), 0.3))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lambda_d", "lambda_b"} | ({"magnitude"} if method == "dvora" else set())
    assert {parameter_group(name) for name in trained} == {"lora_A", "lora_B"} | (trained & {"magnitude"})


def test_one_pair_that_is_no_part_of_the_state() -> None:
    model = vera("dvora")
    assert len(pairs(model)) == 1
    assert not any("pair" in name or "vera" in name for name in model.state_dict())
    held = sum(tensor.numel() for tensor in model.state_dict().values())
    base = sum(tensor.numel() for tensor in tiny_llama().state_dict().values())
    assert held == base + sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate: object) -> None:
    model = vera("dvora")
    perturb(model)
    other = duplicate(model)
    assert pairs(other) == pairs(model)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_a_pickle_holds_the_seed_alone() -> None:
    pair = shared_pair(64, 512, 512, 3)
    pair.on(torch.device("cpu"))
    assert len(pickle.dumps(pair)) < 1000


@pytest.mark.parametrize("method", ["vera", "dvora"])
def test_half_precision_leaves_the_adapter_as_it_is(method: str) -> None:
    model = vera(method)
    perturb(model)
    expected = model(IDS).logits
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert_close(model(IDS).logits, expected, 5e-2)
    pair = next(layer.pair for _, layer in adapter_layers(model))
    assert {tensor.dtype for tensor in pair.on(torch.device("cpu"))} == {torch.float32}


def test_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = vera("dvora")
        assert model(IDS).logits.shape == (1, 16, 32)
    model.to_empty(device="cpu")
    model.load_state_dict(vera("dvora").state_dict())
    assert_close(model.lm_head.weight, tiny_llama().lm_head.weight, 0)
    A, _ = next(layer.pair for _, layer in adapter_layers(model)).on(torch.device("cpu"))
    assert torch.equal(A, shared_pair(8, 24, 24, 0).on(torch.device("cpu"))[0])


def test_drawn_in_inference_mode_and_trained_then() -> None:
    model = vera("dvora", projection_seed=12345)
    with torch.inference_mode():
        model(IDS)
    model(IDS).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_restricted_modules_leave_the_pair_of_the_others_alone() -> None:
    model = vera("dvora")
    restrict_to_magnitude(model, ["up_proj", "down_proj"])
    # the pair was made for the widest module, which no longer has a part in it
    assert model.adapter_config.resolved["projection"] == [24, 24]
    assert_close(model(IDS).logits, tiny_llama()(IDS).logits, 1e-6)


def test_nothing_of_the_size_of_the_pair_is_kept_for_the_backward_pass() -> None:
    layer = next(layer for _, layer in adapter_layers(vera("dvora")))
    x = torch.randn(2, layer.in_features, requires_grad=True)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.pair.on(x.device), *layer.parameters())}
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    layer(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert max(kept) < 8 * layer.in_features

"""What the layers keep: the pretrained function at the start, fp32 parameters, the base read through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_lightning.adapters import AdapterConfig, AdapterLayer, inject_adapters
from tests.adapters.perturbed import adapted, assert_close

METHODS = ["dora", "lora", "vera", "dvora", "magnitude"]


def fresh(base: nn.Linear, method: str, **options: object) -> AdapterLayer:
    return inject_adapters(nn.Sequential(base), AdapterConfig(method=method, **options))[0]


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("method", METHODS)
def test_starts_at_the_pretrained_function_bit_for_bit(method: str, axis: str) -> None:
    base = nn.Linear(300, 200, bias=False)
    x = torch.randn(5, 7, 300)
    expected = base(x)
    layer = fresh(base, method, **({} if method in ("lora", "vera") else {"norm_axis": axis}))
    assert torch.equal(layer(x), expected)
    layer.eval()
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_start_with_bias(method: str) -> None:
    base = nn.Linear(300, 200)
    x = torch.randn(5, 7, 300)
    expected = base(x)
    # nn.Linear adds the bias inside the product and may round once less
    assert_close(fresh(base, method)(x), expected, 1e-6)


def test_starts_at_the_pretrained_function_whatever_A_and_B_are() -> None:
    layer = adapted("dora", dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        layer.base_layer.weight.sub_(layer.scaling * layer.lora_B @ layer.lora_A)  # as PiSSA does
        layer.reset_magnitude()
    V = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer(x), x @ V.T + layer.bias)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_parameters_stay_fp32(method: str, dtype: torch.dtype) -> None:
    layer = adapted(method)
    before = {name: p.detach().clone() for name, p in layer.named_parameters() if p.requires_grad}
    layer(torch.randn(2, 12)).sum().backward()
    gradients = {name: getattr(layer, name).grad.clone() for name in before}
    model = nn.Sequential(layer).to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    for name, value in before.items():
        assert torch.equal(getattr(layer, name), value)
        assert torch.equal(getattr(layer, name).grad, gradients[name])
    model(torch.randn(2, 12, dtype=dtype)).sum().backward()
    torch.optim.AdamW([getattr(layer, name) for name in before], lr=1e-4).step()
    for name, value in before.items():
        assert not torch.equal(getattr(layer, name), value)
        assert getattr(layer, name).dtype == torch.float32


def test_bf16_base_gives_fp32_adapters() -> None:
    layer = fresh(nn.Linear(12, 10, dtype=torch.bfloat16), "dora")
    assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
    expected = layer.weight.double().norm(dim=1)
    assert_close(layer.magnitude, expected, 1e-6)


def test_reads_through_to_the_base() -> None:
    layer = adapted("dora")
    base = layer.base_layer
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (12, 10)
    assert "rank=4" in repr(layer)


def test_dropout_only_in_training() -> None:
    layer = adapted("dora", dropout=0.5)
    x = torch.randn(5, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, {}) for method in METHODS), ("dora", {"init": "pissa"}), ("lora", {"init": "olora"})],
)
def test_to_empty_and_reset(method: str, options: dict) -> None:
    """The way of large models: built on the meta device, given memory, loaded, initialised."""
    options = {"rank": 4} | options if method != "magnitude" else {}
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 10))
        inject_adapters(model, AdapterConfig(method=method, **options))
        assert model(torch.randn(5, 12)).shape == (5, 10)
    model.to_empty(device="cpu")
    nn.init.normal_(model[0].base_layer.weight)
    nn.init.zeros_(model[0].base_layer.bias)
    model[0].reset_parameters()
    x = torch.randn(5, 12)
    if "init" in options:
        assert_close(model(x), x @ model[0].weight.T, 1e-5)
    else:
        assert torch.equal(model(x), x @ model[0].weight.T)

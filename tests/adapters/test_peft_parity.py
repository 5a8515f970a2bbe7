"""PEFT is the oracle: outputs, gradients, training and merged weights, away from the initial state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.perturbed import adapted, assert_close, peft_parameters, peft_twin


def run(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # the same dropout mask
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad


def assert_same(ours: nn.Module, twin: nn.Module, bound: float = 1e-5) -> None:
    x, dy = torch.randn(3, 7, ours.in_features), torch.randn(3, 7, ours.out_features)
    (y, dx), (expected_y, expected_dx) = run(ours, x, dy), run(twin, x, dy)
    assert_close(y, expected_y, bound)
    assert_close(dx, expected_dx, bound)
    for name, parameter in peft_parameters(twin).items():
        assert_close(getattr(ours, name).grad, parameter.grad, bound)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_outputs_and_gradients(method: str, bias: bool) -> None:
    layer = adapted(method, 64, 48, bias=bias, rank=8, alpha=12.0)
    assert_same(layer, peft_twin(layer))


def test_lora_with_the_same_dropout_mask() -> None:
    layer = adapted("lora", 64, 48, dropout=0.3)
    assert_same(layer, peft_twin(layer, dropout=0.3))


def test_exact_dropout_with_the_same_mask() -> None:
    layer = adapted("dora", 64, 48, dropout=0.3, exact_dropout=True)
    assert_same(layer, peft_twin(layer, dropout=0.3))


def test_default_dropout_leaves_the_base_path_whole() -> None:
    layer = adapted("dora", dropout=0.5)
    x = torch.randn(7, 12)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    x_dropped = nn.functional.dropout(x, 0.5)
    W, A, B, m = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude))
    g = m / (W + 2 * B @ A).norm(dim=1)
    assert_close(y, g * (x.double() @ W.T + 2 * x_dropped.double() @ A.T @ B.T) + layer.bias.double(), 1e-6)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_twenty_steps_of_adamw(method: str) -> None:
    layer = adapted(method, 32, 24)
    twin = peft_twin(layer)
    x, target = torch.randn(64, 32), torch.randn(64, 24)
    for module in (layer, twin):
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            (module(x) - target).square().mean().backward()
            optimizer.step()
    for name, parameter in peft_parameters(twin).items():
        assert_close(getattr(layer, name), parameter, 1e-4)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_merged_weight(method: str) -> None:
    layer = adapted(method, 64, 48)
    twin = peft_twin(layer)
    twin.merge()
    assert_close(layer.merged_weight(), twin.get_base_layer().weight, 1e-6)

"""Layers whose output is kept anyway keep nothing beside it, and gradients stay what they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakeBackbone, perturb_adapters
from torch import nn

from dora_lightning import AdapterConfig, inject_adapters
from dora_lightning.adapters import adapter_layers
from dora_lightning.adapters.functional import adapter_linear
from dora_lightning.backbones.kept_outputs import reuse_outputs


def inputs_of_layer(dtype: torch.dtype, gain: torch.Tensor | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {"x": draw(3, 5, 8), "weight": draw(6, 8), "lora_A": draw(2, 8), "lora_B": draw(6, 2)}
    made: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    made["gain"] = (1 + 0.2 * draw(6)).to(torch.promote_types(dtype, torch.float32)) if gain is None else gain
    for name in ("x", "lora_A", "lora_B", "gain"):
        made[name].requires_grad_()
    return made


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_gradients_are_those_of_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    reused, exact = inputs_of_layer(dtype), inputs_of_layer(torch.float64)
    adapter_linear(**reused, scaling=0.7, reuse_output=True).square().sum().backward()
    low_rank = 0.7 * exact["x"] @ exact["lora_A"].T @ exact["lora_B"].T
    (exact["gain"] * (exact["x"] @ exact["weight"].T + low_rank)).square().sum().backward()
    for name in ("x", "lora_A", "lora_B", "gain"):
        wanted = exact[name].grad
        assert (reused[name].grad - wanted).abs().max() <= tolerance * wanted.abs().max(), name


def test_a_gain_of_zero_gets_no_gradient_and_no_nan() -> None:
    gain = torch.tensor([1.0, 0.0, -2.0, 1.0, 1.0, 1.0])
    made = inputs_of_layer(torch.float32, gain)
    adapter_linear(**made, reuse_output=True).sum().backward()
    assert made["gain"].grad[1] == 0
    assert made["gain"].grad.isfinite().all()
    assert made["gain"].grad[2] != 0


def test_a_change_of_the_output_in_place_is_refused_and_without_reuse_it_is_not() -> None:
    for reuse in (True, False):
        made = inputs_of_layer(torch.float32)
        loss = adapter_linear(**made, reuse_output=reuse).relu_().sum()
        if reuse:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


def test_beside_a_bias_the_product_is_kept() -> None:
    made = inputs_of_layer(torch.float32) | {"bias": torch.full((6,), 1e6)}
    exact = inputs_of_layer(torch.float64)
    (dy,) = (torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1)),)
    adapter_linear(**made, reuse_output=True).backward(dy)
    adapter_linear(**exact).backward(dy.double())
    torch.testing.assert_close(made["gain"].grad.double(), exact["gain"].grad, rtol=1e-4, atol=1e-4)


def kept_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[int, dict[str, torch.Tensor]]:
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = model.loss(batch)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sum(storage.nbytes() for storage in kept.values()), gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_llama_keeps_less_and_learns_the_same(make_backbone: MakeBackbone, checkpointing: bool) -> None:
    torch.manual_seed(0)
    module = make_backbone(gradient_checkpointing=checkpointing)
    module.configure_model()
    perturb_adapters(module)
    layers = [layer for _, layer in adapter_layers(module)]
    assert all(layer.reuse_output for layer in layers)
    ids = torch.randint(3, 380, (2, 40))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    less, gradients = kept_bytes(module, batch)
    for layer in layers:
        layer.reuse_output = False
    more, wanted = kept_bytes(module, batch)
    assert less < more if not checkpointing else less == more
    assert wanted.keys() == gradients.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_blocks_that_are_not_known_keep_their_products(make_backbone: MakeBackbone, tiny_llama: Path) -> None:
    own = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    inject_adapters(own, AdapterConfig(rank=2, target_modules="all-linear"))
    assert reuse_outputs(own) == 0
    own(torch.randn(3, 4)).sum().backward()
    # kernels for SwiGLU write into what a block's projections gave, and replace its forward
    module = make_backbone()
    module.configure_model()
    block = module.model.model.layers[0].mlp
    block.forward = block.forward
    known = [name for name, layer in adapter_layers(module.model) if not name.startswith("model.layers.0.mlp.")]
    assert reuse_outputs(module.model) == len(known) < len(list(adapter_layers(module.model)))

